"""Injected usage: asked for once, taken out exactly, and nothing else is touched or kept waiting."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import mock
from proxy.inject import LONGEST_EVENT, UsageChunkFilter, with_include_usage
from proxy.usage import Source, Usage
from tests.test_usage import DONE, SIZES, chunk, counts, cut, data, mock_stream

EXTRA = chunk(counts(5, 7), [])
CONTENT = chunk(None)


def sift(pieces: Iterable[bytes]) -> tuple[bytes, Usage | None]:
    """What is delivered, and what was taken out."""
    sieve = UsageChunkFilter()
    delivered = b"".join([sieve.feed(piece) for piece in pieces])
    return delivered + sieve.flush(), sieve.removed


# ── asking ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (b'{"stream":true}', b'{"stream":true,"stream_options":{"include_usage":true}}'),
        (
            b'{ "model": "m", "top_p": 1.50, "stream" : true, "messages": [ {"role":"user"} ] }',
            b'{ "model": "m", "top_p": 1.50, "stream" : true, "messages": [ {"role":"user"} ] '
            b',"stream_options":{"include_usage":true}}',
        ),
        (
            b'{"stream_options":{"include_obfuscation":false},"stream":true}',
            b'{"stream_options":{"include_obfuscation":false,"include_usage":true},"stream":true}',
        ),
        (
            b'{"stream":true,"stream_options":{"include_usage":false}}',
            b'{"stream":true,"stream_options":{"include_usage":true}}',
        ),
        (
            b'{"stream":true,"stream_options":{"include_usage": null, "x": "\xc3\xa9"}}',
            b'{"stream":true,"stream_options":{"include_usage":true,"x":"\xc3\xa9"}}',
        ),
        (
            b'{"x":"}","stream":true}\n\n',
            b'{"x":"}","stream":true,"stream_options":{"include_usage":true}}',
        ),
        (
            b'{ "x" : 1.50, "stream\\u005foptions": {"include_usage":false}, "stream":true}',
            b'{"x":1.50,"stream_options":{"include_usage":true},"stream":true}',
        ),
        (
            b'{"stream":true,"stream_options": null}',
            b'{"stream":true,"stream_options":{"include_usage":true}}',
        ),
    ],
)
def test_asking(body: bytes, sent: bytes) -> None:
    """The option is added; every other member has the bytes that it had, and the whole body if it can."""
    assert with_include_usage(body) == sent
    assert with_include_usage(sent) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"null",
        b'"stream"',
        b'{"model":"m"}',
        b'{"stream":false}',
        b'{"stream":null}',
        b'{"stream":1}',
        b'{"stream":"true"}',
        b'{"x":{"stream":true}}',
        b'{"stream":true,"stream_options":{"include_usage":true}}',
        b'{"stream":true,"stream_options":{"include_usage":"yes"}}',
        b'{"stream":true,"stream_options":[]}',
        b'{"stream":true,"stream_options":"all"}',
        b'{"stream":true,' + b"[" * 100_000,
        b'{"\xff":1,"stream":true',
    ],
)
def test_nothing_to_add(body: bytes) -> None:
    """No stream, asked already, or nothing that could be added to: the body goes as it is."""
    assert with_include_usage(body) is None


# ── taking out ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "event",
    [
        EXTRA,
        data({"usage": counts(5, 7), "choices": []}),
        EXTRA.replace(b'":', b'" : ').replace(b"[]", b"[ ]"),
        EXTRA.replace(b"data: ", b"data:"),
        b"event: message\nid: 4\n" + EXTRA,
        EXTRA[:-1] + b"retry: 5\n\n",
        EXTRA.replace(b',"usage":', b',\ndata: "usage":'),
        chunk(counts(5, 7, prompt_tokens_details={"cached_tokens": 0}), [], obfuscation="x" * 300),
    ],
    ids=["plain", "usage first", "blanks", "no blank", "fields", "field after", "two lines", "more members"],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
def test_the_extra_chunk_goes(event: bytes, end: bytes) -> None:
    """With its blank line, in one read or byte by byte."""
    before, after = CONTENT + CONTENT, DONE
    stream = (before + event + after).replace(b"\n", end)
    for size in (1, 2, 3, 50, len(stream)):
        delivered, removed = sift(cut(stream, [size]))
        assert delivered == (before + after).replace(b"\n", end)
        assert removed == Usage(5, 0, 7, 0, Source.REPORTED)


@pytest.mark.parametrize(
    "event",
    [
        CONTENT,
        chunk(counts(5, 7)),
        chunk(None, []),
        data({"choices": [], "prompt_filter_results": []}),
        data({"choices": [], "usage": 3}),
        data({"usage": counts(5, 7)}),
        data({"choices": None, "usage": counts(5, 7)}),
        data({"choices": [], "usage": counts(5, 7), "error": {"message": "x"}}),
        data({"choices": [], "usage": counts(5, 7), "x": "y" * LONGEST_EVENT}),
        data({"x": {"choices": [], "usage": counts(5, 7)}}),
        data({"choices": [{"delta": {"content": '"choices":[],"usage":{}'}}]}),
        EXTRA[:-4] + b"\n\n",
        b": " + EXTRA,
        b"x" + EXTRA,
        b"\n\n\n",
        b"data\n\n",
        b"event: ping\n\n",
        DONE,
    ],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
def test_everything_else_stays(event: bytes, end: bytes) -> None:
    """Azure's first chunk, Gemini's running total, errors, talk, noise."""
    stream = (CONTENT + event + CONTENT).replace(b"\n", end)
    for size in (1, 2, 3, 50, len(stream)):
        assert sift(cut(stream, [size])) == (stream, None)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
def test_comments_inside_it_stay(end: bytes) -> None:
    """A keep-alive before, between or after its lines is delivered."""
    first, second = EXTRA.split(b',"usage"')
    stream = b": a\n" + first + b",\n: b\n" + b'data: "usage"' + second[:-1] + b": c\n\n" + DONE
    stream = stream.replace(b"\n", end)
    for size in (1, 2, 3, 50, len(stream)):
        assert sift(cut(stream, [size]))[0] == (b": a\n: b\n: c\n" + DONE).replace(b"\n", end)


def test_what_was_taken_out() -> None:
    """The last one that says something; one without numbers goes as well."""
    sieve = UsageChunkFilter()
    assert sieve.removed is None
    assert sieve.feed(EXTRA + chunk(counts(5, 9), []) + chunk({}, [])) == b""
    assert sieve.removed == Usage(5, 0, 9, 0, Source.REPORTED)


# ── no waiting ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "part",
    [
        b": keep-ali",
        b"data: [DO",
        b"data: x",
        b'data: {"choices":[{',
        b'data: {"choices": [ 1',
        b'data: {"choices":n',
        b"\n",
        b"\r",
        CONTENT,
        CONTENT[:-1],
        CONTENT[:-10],
        EXTRA + DONE[:8],
        b"data: {" + b" " * LONGEST_EVENT,
    ],
)
def test_what_cannot_be_it_is_not_held(part: bytes) -> None:
    """As soon as the bytes say so, also in the middle of a line."""
    sieve = UsageChunkFilter()
    assert sieve.feed(CONTENT) == CONTENT
    assert sieve.feed(part) == part.removeprefix(EXTRA)
    assert sieve.flush() == b""


@pytest.mark.parametrize(
    "part", [b"d", b"data:", b"data: {", b'data: {"id":"c"', b'data: {"choices":[', b"id: 3\n"]
)
def test_what_may_be_it_is_held_and_given_back(part: bytes) -> None:
    """Until the next bytes decide, or the stream ends."""
    sieve = UsageChunkFilter()
    assert sieve.feed(part) == b""
    assert sieve.feed(b"") == b""
    assert sieve.flush() == part
    assert sieve.flush() == b""


def test_little_is_held() -> None:
    """An event that never says what it is goes through once it is too long for the chunk."""
    sieve = UsageChunkFilter()
    delivered = len(sieve.feed(b"data: {"))
    for number in range(1, 2000):
        delivered += len(sieve.feed(b" " * 16))
        assert 7 + 16 * number - delivered <= LONGEST_EVENT
    assert delivered == 7 + 16 * 1999


@pytest.mark.parametrize("size", [7, 1000, 10**6])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
def test_the_longest(size: int, end: bytes) -> None:
    """One byte decides, in every cut."""
    short = len(chunk(counts(1, 1), [], pad="").rstrip())
    for more, goes in ((-1, True), (0, True), (1, False)):
        event = chunk(counts(1, 1), [], pad="x" * (LONGEST_EVENT - short + more)).replace(b"\n", end)
        delivered, removed = sift(cut(event + event, [size]))
        assert delivered == (b"" if goes else event + event)
        assert (removed is not None) == goes


# ── any stream, any cut ──────────────────────────────────────────────────────────────────────────────────

EVENTS = st.sampled_from(
    [
        *(CONTENT, EXTRA, DONE, b": ping\n", b": ping\n\n", b"\n", b"id: 1\n", b"event: x\n", b"data: {"),
        *(
            chunk(None, []),
            chunk(counts(1, 1)),
            EXTRA[:-1],
            EXTRA[:-3],
            b"da",
            b"\xff",
            b'data: "choices":[1',
        ),
        *(EXTRA.replace(b":[]", b" :\ndata: [\n: c\ndata:]"), chunk(None, [{"text": "x" * 9000}])),
    ]
)


MOST_PIECES = 1000  # what smaller ones would show, `bytewise` does


def bytewise(stream: bytes) -> list[bytes]:
    """Byte by byte, but for long runs of one letter: inside them no byte decides anything, and the longest
    event has a test of its own."""
    return re.findall(rb"x{100,}|.", stream, re.DOTALL)


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=10), st.sampled_from([b"\n", b"\r\n", b"\r"]), SIZES)
def test_cuts_change_nothing(events: list[bytes], end: bytes, sizes: list[int]) -> None:
    """Whole, cut anyhow or byte by byte: the same bytes are delivered, the same usage was taken out."""
    stream = b"".join(events).replace(b"\n", end)
    whole = sift([stream])
    assert sift(cut(stream, [max(size, len(stream) // MOST_PIECES) for size in sizes])) == whole
    assert sift(bytewise(stream)) == whole


def digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([CONTENT, EXTRA, chunk(None, []), chunk(counts(1, 1)), b": ping\n\n", DONE])),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    SIZES,
)
def test_only_the_chunk_goes(events: list[bytes], end: bytes, sizes: list[int]) -> None:
    """The hash of what is delivered is that of everything but the extra chunk."""
    stream = b"".join(events).replace(b"\n", end)
    kept = [event.replace(b"\n", end) for event in events if event != EXTRA]
    assert digest([sift(cut(stream, sizes))[0]]) == digest(kept)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["/chat/completions", "/completions"]),
    SIZES,
    st.integers(0, 60),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
)
def test_the_mocks_streams(route: str, sizes: list[int], words: int, end: bytes, tool: bool) -> None:
    """A stream that was asked for usage is, after it, the one that was asked for none: but for the nulls."""
    tools = [{"type": "function", "function": {"name": "f"}}] if tool and route.startswith("/chat") else None
    behaviour = mock.Behaviour(words=words, tool=tool)
    stream = mock_stream(route, behaviour, tools=tools).replace(b"\n", end)
    delivered, removed = sift(cut(stream, sizes))
    unasked = mock_stream(route, behaviour, tools=tools, stream_options=None).replace(b"\n", end)
    assert delivered.replace(b',"usage":null', b"") == unasked
    assert removed is not None
    assert removed.completion_tokens == (len(mock.ARGUMENTS) if tools else words)
