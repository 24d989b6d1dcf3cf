"""Usage: the same numbers however a stream was cut, in every dialect; and nothing that only looks like it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy import mock
from proxy.errors import Dialect
from proxy.sse import Scanner
from proxy.usage import REACH, JsonTail, Source, Usage, find_in_json, find_in_tail

OPENAI, ANTHROPIC, RESPONSES = Dialect.OPENAI, Dialect.ANTHROPIC, Dialect.RESPONSES
#: Route of the mock -> dialect.
ROUTES = {
    "/chat/completions": OPENAI,
    "/completions": OPENAI,
    "/responses": RESPONSES,
    "/messages": ANTHROPIC,
}


def reported(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> Usage:
    return Usage(prompt, cached, completion, reasoning, Source.REPORTED)


def data(value: object, name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def chunk(usage: object = None, choices: object = None, **more: object) -> bytes:
    given = [{"index": 0, "delta": {"content": "Hi"}}] if choices is None else choices
    return data({"id": "c", "choices": given, "usage": usage, **more})


def counts(prompt: object, completion: object, **more: object) -> dict[str, object]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, **more}


def message_start(**usage: object) -> bytes:
    return data({"type": "message_start", "message": {"content": [], "usage": usage}}, "message_start")


def message_delta(**usage: object) -> bytes:
    return data(
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}, "message_delta"
    )


def completed(usage: object, **more: object) -> bytes:
    response = {"id": "r", "output": [], "usage": usage, "user": None, "metadata": {}, **more}
    return data(
        {"type": "response.completed", "response": response, "sequence_number": 9}, "response.completed"
    )


DONE = b"data: [DONE]\n\n"
STOP = data({"type": "message_stop"}, "message_stop")


def cut(stream: bytes, sizes: Iterable[int]) -> list[bytes]:
    """Pieces of these sizes, over and over."""
    pieces, at, wanted = [], 0, list(sizes)
    while at < len(stream):
        size = wanted[len(pieces) % len(wanted)]
        pieces.append(stream[at : at + size])
        at += size
    return pieces


def scanned(dialect: Dialect, pieces: Iterable[bytes]) -> Usage | None:
    scanner = Scanner(dialect, expects_terminator=True)
    for piece in pieces:
        scanner.feed(piece)
    return scanner.usage()


def seen(dialect: Dialect, stream: bytes) -> Usage | None:
    """What is found, by every way to it."""
    found = find_in_tail(dialect, stream, b"")
    for size in (len(stream), 7, 1):
        assert scanned(dialect, cut(stream, [size])) == found
    return found


def mock_ask(behaviour: mock.Behaviour, **body: Any) -> mock.Ask:
    """A request as the mock understands it; its events are the streams of these tests."""
    asked = {
        "model": "m",
        "messages": [{"role": "user", "content": "one two three"}],
        "input": "one two three",
    }
    asked |= {"stream_options": {"include_usage": True}} | body
    return mock.Ask("0", msgspec.convert(asked, mock.Body), behaviour)


def mock_stream(route: str, behaviour: mock.Behaviour = mock.NORMAL, **body: Any) -> bytes:
    events = mock.ROUTES["POST", route].events
    assert events is not None
    return b"".join(events(mock_ask(behaviour, **body)))


# ── the shapes ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("dialect", "stream", "found"),
    [
        pytest.param(OPENAI, chunk() + chunk(counts(5, 7), []) + DONE, reported(5, 7), id="extra chunk"),
        pytest.param(OPENAI, chunk() + chunk(counts(5, 7)) + DONE, reported(5, 7), id="on the last content"),
        pytest.param(
            OPENAI,
            chunk(counts(5, 1)) + chunk(counts(5, 2)) + chunk(counts(5, 3)) + DONE,
            reported(5, 3),
            id="cumulative: the last wins",
        ),
        pytest.param(
            OPENAI, chunk(counts(5, 2)) + chunk() + chunk() + DONE, reported(5, 2), id="nulls after it"
        ),
        pytest.param(
            OPENAI,
            chunk(
                counts(
                    50,
                    70,
                    prompt_tokens_details={"cached_tokens": 30, "audio_tokens": 0},
                    completion_tokens_details={"reasoning_tokens": 60},
                    total_tokens=120,
                ),
                [],
            ),
            reported(50, 70, 30, 60),
            id="details",
        ),
        pytest.param(
            OPENAI,
            chunk(counts(50, 7, prompt_cache_hit_tokens=40, prompt_cache_miss_tokens=10), []),
            reported(50, 7, 40),
            id="deepseek",
        ),
        pytest.param(
            OPENAI,
            chunk(counts(9, 2, total_tokens=328, completion_tokens_details={"reasoning_tokens": 317}), []),
            reported(9, 319, 0, 317),
            id="reasoning counted beside the completion",
        ),
        pytest.param(
            OPENAI,
            chunk(counts(20, 198, total_tokens=623)) + chunk(counts(20, 200, total_tokens=625)) + DONE,
            reported(20, 605, 0, 405),
            id="gemini: reasoning in the total alone, counted on every chunk",
        ),
        pytest.param(
            OPENAI,
            chunk(counts(20, 8, total_tokens=99, completion_tokens_details={"reasoning_tokens": 3}), []),
            reported(20, 8, 0, 3),
            id="a total that nobody can explain",
        ),
        pytest.param(
            OPENAI, chunk(counts(20, 8, total_tokens=3), []), reported(20, 8), id="a total too small"
        ),
        pytest.param(
            OPENAI,
            chunk(counts(5, 7, prompt_tokens_details=None, completion_tokens_details={}), []),
            reported(5, 7),
            id="null details",
        ),
        pytest.param(OPENAI, chunk() + DONE, None, id="none"),
        pytest.param(
            ANTHROPIC,
            message_start(input_tokens=5, output_tokens=1) + message_delta(output_tokens=7) + STOP,
            reported(5, 7),
            id="two events",
        ),
        pytest.param(
            ANTHROPIC,
            message_start(
                input_tokens=5, cache_read_input_tokens=100, cache_creation_input_tokens=20, output_tokens=1
            )
            + message_delta(output_tokens=3)
            + message_delta(output_tokens=7)
            + STOP,
            reported(125, 7, 100),
            id="caches are part of the prompt",
        ),
        pytest.param(
            ANTHROPIC,
            message_start(input_tokens=5, cache_read_input_tokens=2, output_tokens=1)
            + message_delta(input_tokens=9, cache_read_input_tokens=None, output_tokens=7),
            reported(11, 7, 2),
            id="the delta may correct the start",
        ),
        pytest.param(
            ANTHROPIC, message_start(input_tokens=5, output_tokens=1), None, id="a first guess is no report"
        ),
        pytest.param(
            ANTHROPIC,
            data({"type": "message_start", "message": {"usage": None}}, "message_start")
            + message_delta(input_tokens=5, output_tokens=7)
            + STOP,
            reported(5, 7),
            id="none at the start",
        ),
        pytest.param(ANTHROPIC, message_delta(output_tokens=7), None, id="half a report is none"),
        pytest.param(
            RESPONSES,
            completed(
                {
                    "input_tokens": 50,
                    "input_tokens_details": {"cached_tokens": 30},
                    "output_tokens": 70,
                    "output_tokens_details": {"reasoning_tokens": 60},
                    "total_tokens": 120,
                }
            ),
            reported(50, 70, 30, 60),
            id="completed",
        ),
        pytest.param(RESPONSES, completed(None), None, id="completed without"),
    ],
)
def test_streams(dialect: Dialect, stream: bytes, found: Usage | None) -> None:
    """What each provider sends, and what it comes to."""
    assert seen(dialect, stream) == found
    assert seen(dialect, stream.replace(b"\n", b"\r\n")) == found
    assert seen(dialect, stream.replace(b"\n", b"\r")) == found
    assert seen(dialect, stream.replace(b"data: ", b"data:").replace(b'":', b'": ')) == found
    assert seen(dialect, stream.rstrip(b"\n")) == found


@pytest.mark.parametrize("number", [-1, 7.0, "7", True, 2**53 + 1, 10**30, [7], {}, None])
def test_what_is_no_count(number: object) -> None:
    """A wrong number is not reported, and hides no right one before it."""
    wrong = chunk(counts(5, number), [])
    assert seen(OPENAI, chunk() + wrong) is None
    assert seen(OPENAI, chunk(counts(1, 2)) + wrong) == reported(1, 2)
    assert seen(OPENAI, chunk(counts(number, 5), [])) is None
    assert find_in_json(OPENAI, json.dumps({"usage": counts(5, number)}).encode()) is None
    start = message_start(input_tokens=5)
    assert seen(ANTHROPIC, start + message_delta(output_tokens=number)) is None
    details = counts(5, 7, prompt_tokens_details={"cached_tokens": number}, completion_tokens_details=number)
    assert seen(OPENAI, chunk(details, [])) == reported(5, 7)


def test_more_cached_than_there_was() -> None:
    """No part is larger than its whole, so that nothing is ever billed below zero."""
    details = {
        "prompt_tokens_details": {"cached_tokens": 9},
        "completion_tokens_details": {"reasoning_tokens": 9},
    }
    assert seen(OPENAI, chunk(counts(5, 7, **details), [])) == reported(5, 7, 5, 7)


@pytest.mark.parametrize(
    ("dialect", "event"),
    [
        (
            OPENAI,
            data({"choices": [{"delta": {"content": '"usage":{"prompt_tokens":1,"completion_tokens":1}}'}}]}),
        ),
        (OPENAI, data({"choices": [{"usage": counts(1, 1)}]})),
        (OPENAI, data({"x": {"usage": counts(1, 1)}})),
        (OPENAI, data({"object": "usage", "list": ["usage", counts(1, 1)]})),
        (OPENAI, b': {"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'),
        (OPENAI, b": " + b"k" * 5000 + b'{"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'),
        (OPENAI, chunk(counts(1, 1))[:-4] + b"\n\n"),
        (RESPONSES, completed(None, tools=[{"parameters": {"usage": counts(1, 1)}}])),
        (RESPONSES, data({"type": "x", "usage": {"input_tokens": 1, "output_tokens": 1}})),
        (ANTHROPIC, data({"content_block": {"input": {"usage": {"input_tokens": 1, "output_tokens": 1}}}})),
    ],
)
def test_what_only_looks_like_it(dialect: Dialect, event: bytes) -> None:
    """Text, comments, other objects of that name, half an event: none of them is a report."""
    assert seen(dialect, event) is None
    real = {
        OPENAI: chunk(counts(5, 7)),
        RESPONSES: completed({"input_tokens": 5, "output_tokens": 7}),
        ANTHROPIC: message_start(input_tokens=5) + message_delta(output_tokens=7),
    }[dialect]
    assert seen(dialect, real + event) == reported(5, 7)
    assert seen(dialect, event + real) == reported(5, 7)


def test_data_of_several_lines() -> None:
    """SSE joins them; comments and other fields between them are none of it."""
    lines = (
        b'data: {"choices":[],\ndata: "usage":\ndata: {"prompt_tokens":5,\n: ping\nid: 3\n'
        b'data:"completion_tokens":7}\ndata: }\n\n'
    )
    assert seen(OPENAI, lines + DONE) == reported(5, 7)
    assert seen(OPENAI, lines.replace(b"\n", b"\r\n") + DONE) == reported(5, 7)


def test_a_tail_may_begin_anywhere() -> None:
    """In the middle of an event, of a line, of a character: only what follows the key counts."""
    event = {"choices": [{"delta": {"content": "größer 大きい"}}], "usage": counts(5, 7)}
    stream = b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n" + DONE
    last = stream.index(b'"usage"')
    for at in range(last + 1):
        assert find_in_tail(OPENAI, b"", stream[at:]) == reported(5, 7)
    assert find_in_tail(OPENAI, b"", stream[last + 1 :]) is None


def test_the_first_events_are_remembered() -> None:
    """Anthropic's message_start says what the prompt took, a megabyte before the end."""
    start, end = message_start(input_tokens=5), message_delta(output_tokens=7)
    between = (
        data({"type": "content_block_delta", "delta": {"text": "x" * 500}}, "content_block_delta") * 2000
    )
    assert find_in_tail(ANTHROPIC, start, between[-3000:] + end) == reported(5, 7)
    assert scanned(ANTHROPIC, cut(start + between + end + STOP, [1400])) == reported(5, 7)


def test_each_event_adds_to_what_was_remembered() -> None:
    """The prompt stays known over any number of deltas."""
    between = data({"type": "content_block_delta", "delta": {"text": "x" * 500}}, "content_block_delta") * 20
    stream = message_start(input_tokens=5) + b"".join(
        between + message_delta(output_tokens=number) for number in (3, 6, 7)
    )
    assert seen(ANTHROPIC, stream + between) == reported(5, 7)


def test_a_report_anywhere_in_a_read() -> None:
    """Wherever what is kept begins: before its event, in it, in its key, behind it."""
    report = chunk(counts(5, 7), []).rstrip()
    before = b": " + b"k" * 3000 + b"\n\n"
    comments = [b": " + b"k" * 2500 + b"\n\n"] * 3
    for after in range(2040 - len(report), 2060):
        comment = b"\n\n: " + b"k" * after + b"\n\n"
        assert scanned(OPENAI, [before + report + comment, *comments]) == reported(5, 7)
        unfinished = report[:-1] + b',"p":"' + b"p" * after
        assert scanned(OPENAI, [before + unfinished, b'"}\n\n', *comments]) == reported(5, 7)


@pytest.mark.parametrize("size", [1, 100, 1460, 16384, 65536, 10**7])
def test_large_last_events(size: int) -> None:
    """A Responses event with its whole answer and its metadata, an echo of a schema, a chunk of 100 KB."""
    usage = {"input_tokens": 5, "output_tokens": 7}
    output = [{"content": [{"type": "output_text", "text": "x" * 30_000}]}]
    tools = [{"parameters": {"properties": {"usage": {"type": "object"}}}}]
    metadata = {f"{key:064}": "v" * 512 for key in range(16)}
    response = {"tools": tools, "output": output, "usage": usage, "metadata": metadata}
    stream = data({"type": "response.completed", "response": response}, "response.completed")
    assert scanned(RESPONSES, cut(stream, [size])) == reported(5, 7)
    early = data({"usage": counts(5, 7), "choices": [{"delta": {"content": "x" * (REACH - 300)}}]})
    assert scanned(OPENAI, cut(chunk() + early + DONE, [size])) == reported(5, 7)


# ── answers that are no stream ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("dialect", "usage", "found"),
    [
        (OPENAI, counts(5, 7, total_tokens=12), reported(5, 7)),
        (OPENAI, {"prompt_tokens": 5, "total_tokens": 5}, reported(5, 0)),
        (OPENAI, {"total_tokens": 5}, reported(5, 0)),
        (OPENAI, {"prompt_tokens": 5}, None),
        (OPENAI, {"completion_tokens": 5, "total_tokens": 9}, None),
        (OPENAI, {"input_tokens": 5, "output_tokens": 7}, reported(5, 7)),
        (OPENAI, None, None),
        (OPENAI, [], None),
        (RESPONSES, {"input_tokens": 5, "output_tokens": 7}, reported(5, 7)),
        (ANTHROPIC, {"input_tokens": 5, "cache_read_input_tokens": 3, "output_tokens": 7}, reported(8, 7, 3)),
    ],
)
def test_json(dialect: Dialect, usage: object, found: Usage | None) -> None:
    """Embeddings have no completion, rerankers only a total; blank lines before the body are DeepSeek's."""
    body = {"object": "x", "choices": [{"text": "t"}], "usage": usage, "model": "m"}
    assert find_in_json(dialect, json.dumps(body).encode()) == found
    assert find_in_json(dialect, b"\n\n\n" + json.dumps(body, indent=2).encode() + b"\n") == found


def test_the_mocks_answers() -> None:
    """Every route of the mock, whole."""
    ask = mock_ask(mock.Behaviour(words=11))
    for (method, path), route in mock.ROUTES.items():
        if method == "GET":
            continue
        dialect = ROUTES.get(path, OPENAI)
        found = find_in_json(dialect, msgspec.json.encode(route.json(ask)))
        assert found is not None
        assert found.prompt_tokens >= 3
        assert found.completion_tokens == (0 if path == "/embeddings" else 11)


@pytest.mark.parametrize("size", [100, 4096, 65536, 10**7])
def test_the_tail_of_a_large_answer(size: int) -> None:
    """What is kept is enough for the usage at its end, and bounded."""
    vectors = [{"embedding": [0.25] * 2000} for _ in range(60)]
    body = json.dumps({"data": vectors, "usage": {"prompt_tokens": 5, "total_tokens": 5}}).encode()
    tail = JsonTail()
    for piece in cut(body, [size]):
        tail.feed(piece)
        assert sum(map(len, tail._reads)) <= 65536 + size
    assert tail.usage(OPENAI) == reported(5, 0)
    assert JsonTail().usage(OPENAI) is None


# ── any stream, any cut ──────────────────────────────────────────────────────────────────────────────────

NUMBERS = st.one_of(st.integers(0, 10**6), st.integers(-5, 2**54), st.sampled_from([None, 1.5, "3", True]))
USAGES = st.one_of(
    st.none(),
    st.builds(counts, NUMBERS, NUMBERS),
    st.fixed_dictionaries(
        {}, optional={name: NUMBERS for name in ("input_tokens", "output_tokens", "cache_read_input_tokens")}
    ),
)
EVENTS = st.one_of(
    st.builds(chunk, USAGES),
    st.builds(chunk, USAGES, st.just([])),
    st.builds(lambda usage: message_start(**(usage or {})), USAGES),
    st.builds(lambda usage: message_delta(**(usage or {})), USAGES),
    st.builds(completed, USAGES),
    st.integers(0, 5000).map(lambda size: chunk(choices=[{"delta": {"content": "y" * size}}])),
    st.integers(0, 5000).map(lambda size: b": " + b"z" * size + b'{"usage":{"total_tokens":1}}\n\n'),
    st.sampled_from([DONE, STOP, b": ping\n", b"\n", b'data: {"usage":\ndata: {"total_tokens":4}}\n\n']),
)
SIZES = st.lists(st.one_of(st.just(1), st.integers(1, 30), st.integers(1, 9000)), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(
    events=st.lists(EVENTS, max_size=12),
    end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    lost=st.integers(0, 60),
    sizes=SIZES,
    dialect=st.sampled_from(Dialect),
)
def test_cuts_change_nothing(
    events: list[bytes], end: bytes, lost: int, sizes: list[int], dialect: Dialect
) -> None:
    """Whole or cut anyhow, to its end or not: the same usage."""
    stream = b"".join(events)
    stream = stream[: max(0, len(stream) - lost)].replace(b"\n", end)
    whole = find_in_tail(dialect, stream, b"")
    assert scanned(dialect, cut(stream, sizes)) == whole
    assert scanned(dialect, cut(stream, [1])) == whole


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(ROUTES)), SIZES, st.integers(0, 400), st.booleans())
def test_the_mocks_streams(route: str, sizes: list[int], words: int, crlf: bool) -> None:
    """The routes of the mock, cut anyhow."""
    stream = mock_stream(route, mock.Behaviour(words=words), prompt="one two three")
    stream = stream.replace(b"\n", b"\r\n") if crlf else stream
    found = scanned(ROUTES[route], cut(stream, sizes))
    assert found is not None
    assert (found.completion_tokens, found.source) == (words, Source.REPORTED)
    assert found == find_in_tail(ROUTES[route], b"", stream)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.lists(
            st.sampled_from(
                [b'"usage"', b":", b"{", b"}", b'{"prompt_tokens":1', b"\n", b"\r", b"data:", b"[", b"\xff"]
            ),
            max_size=40,
        ).map(b"".join),
    ),
    st.sampled_from(Dialect),
)
@example(b'"usage":' + b"[" * 100_000, OPENAI)
@example(b'"usage":{"prompt_tokens":' + b"9" * 5000 + b"}}", OPENAI)
@example(b'"usage"' * 20_000, RESPONSES)
def test_nothing_raises(noise: bytes, dialect: Dialect) -> None:
    """Whatever an upstream sends."""
    for found in (
        find_in_tail(dialect, noise, noise),
        find_in_json(dialect, noise),
        scanned(dialect, [noise]),
    ):
        assert found is None or b'"prompt_tokens":1' in noise


# ── estimates ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("route", sorted(ROUTES))
@pytest.mark.parametrize("words", [10, 300])
def test_an_estimate_of_one_token_an_event(route: str, words: int) -> None:
    """A stream that stops after its words: about as many tokens, and flagged."""
    stream = mock_stream(route, mock.Behaviour(words=words, no_done=True), prompt="x")
    scanner = Scanner(ROUTES[route], expects_terminator=True)
    for piece in cut(stream, [211]):
        scanner.feed(piece)
    assert scanner.usage() is None
    guess = scanner.estimate(1234)
    assert guess.source is Source.ESTIMATED
    assert guess.completion_tokens == pytest.approx(words, rel=0.5, abs=6)
    if ROUTES[route] is not ANTHROPIC:
        assert guess.prompt_tokens == 1234


def test_an_estimate_of_many_tokens_an_event() -> None:
    """Gemini puts a paragraph into a chunk: four bytes are a token."""
    scanner = Scanner(OPENAI, expects_terminator=True)
    for _ in range(50):
        scanner.feed(chunk(choices=[{"delta": {"content": "word " * 40}}]))
    assert scanner.estimate(10).completion_tokens == pytest.approx(50 * 200 / 4, rel=0.1)


def test_an_estimate_keeps_what_was_reported() -> None:
    """Anthropic's prompt is known from the first event on."""
    scanner = Scanner(ANTHROPIC, expects_terminator=True)
    scanner.feed(message_start(input_tokens=5, cache_read_input_tokens=3, output_tokens=1))
    assert scanner.estimate(99) == Usage(8, 3, 0, 0, Source.ESTIMATED)


def test_an_estimate_of_silence() -> None:
    """Nothing but a role and comments came: no completion."""
    scanner = Scanner(OPENAI, expects_terminator=True)
    assert scanner.estimate(9) == Usage(9, 0, 0, 0, Source.ESTIMATED)
    scanner.feed(b": ping\n\n" + chunk(choices=[{"delta": {"role": "assistant", "content": ""}}]))
    assert scanner.estimate(9) == Usage(9, 0, 0, 0, Source.ESTIMATED)
