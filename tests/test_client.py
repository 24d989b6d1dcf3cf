"""The Python client: before a real Headrace with a mock's faults, and servers that do what a test says."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import client_exchange
from proxy.client import Category, ChatError, Client, Limits, Retry, Stream, Timeouts
from proxy.client_errors import Head, retry_after_s
from proxy.client_events import LONGEST_EVENT, DeltaReader, EventReader
from proxy.client_limits import TokenBucket
from tests.kit.headrace import ROOT, Headrace, running, until
from tests.kit.lab import Gate, Step, Way, hold, lab, plays, response
from tests.kit.upstreams import DONE, END, HEAD, Call, Script, chunk, event, scripted

pytestmark = [pytest.mark.timeout(60), pytest.mark.asyncio(loop_scope="module")]

HI = [{"role": "user", "content": "hi"}]
A, B = event("a"), event("b")
OK = Head(200, {"x-request-id": "id-1"})
STOP = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
QUICK = Retry(base_s=0.001)
ONCE = Retry(attempts=1)


def says(*events: bytes) -> Script:
    """A stream that is sent whole."""
    return plays(HEAD, *(chunk(data) for data in events), END)


def refuses(status: int, *fields: str, body: bytes = b'{"error":{"message":"no"}}') -> Script:
    return plays(response(status, body, *fields))


def in_turn(*scripts: Script) -> Script:
    """Answers each request by the next of these, the last one again and again."""
    left = list(scripts)

    async def script(call: Call) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(call)

    return script


async def heard(stream: Stream) -> tuple[str, ChatError | None]:
    """The text, and the failure behind it."""
    text = ""
    try:
        async with stream:
            async for delta in stream:
                text += delta.content
    except ChatError as error:
        return text, error
    return text, None


async def ask(url: str, retry: Retry = QUICK, **fields: Any) -> tuple[str, ChatError | None]:
    async with Client(url, retry=retry, timeouts=fields.pop("timeouts", None)) as client:
        return await heard(client.stream(model="m", messages=HI, **fields))


# ── an event stream in any chunking ──────────────────────────────────────────────────────────────────────


def cut(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """Pieces of these sizes, over and over."""
    pieces, at, number = [], 0, 0
    while at < len(data):
        pieces.append(data[at : at + sizes[number % len(sizes)]])
        at += sizes[number % len(sizes)]
        number += 1
    return pieces


NOISE = (
    "",
    ": headrace",
    ":",
    "retry: 10",
    "unknown: x",
    "id: 7",
    "event: message",
    "event: ping\ndata: {}\n",
)
contents = st.one_of(
    st.text(max_size=8), st.sampled_from(["水車", "🌊", "\u2028", "a\nb", "data: x", "\ufeff"])
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """A stream's bytes, and the text of its deltas."""
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    text, said = draw(st.sampled_from(["", "\ufeff"])), []
    for content in draw(st.lists(contents, max_size=5)):
        said.append(content)
        document = json.dumps({"choices": [{"delta": {"content": content}}]}, ensure_ascii=False, indent=1)
        lines = [draw(st.sampled_from(NOISE)), *(f"data: {line}" for line in document.split("\n")), "", ""]
        text += "\n".join(lines).replace("\n", end)
    return (text + f"data:[DONE]{end}{end}").encode(), said


@settings(max_examples=60, deadline=None)
@given(streams(), st.lists(st.integers(1, 40), min_size=1, max_size=5))
async def test_any_chunking_gives_the_same_deltas(stream: tuple[bytes, list[str]], sizes: list[int]) -> None:
    """Line ends of all kinds, comments, data of several lines, characters cut in two, a byte order mark."""
    data, said = stream
    for pieces in ([data], cut(data, [1]), cut(data, sizes)):
        reader = DeltaReader(OK)
        assert [delta.content for piece in pieces for delta in reader.feed(piece)] == said
        assert reader.over


async def test_every_place_for_two_cuts() -> None:
    data = "\ufeff: c\r\ndata: 水\r\ndata:车\r\rdata: x\n\nevent: e\n\ndata\n\n".encode()
    expected = EventReader().feed(data)
    assert [(each.name, each.data) for each in expected] == [
        ("message", "水\n车"),
        ("message", "x"),
        ("message", ""),
    ]
    for first in range(len(data)):
        for second in range(first, len(data)):
            reader = EventReader()
            pieces = (data[:first], data[first:second], data[second:])
            assert [each for piece in pieces for each in reader.feed(piece)] == expected, (first, second)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r", b"\r\r", b"\n\r", b"\r\n\n"])
async def test_an_event_is_there_with_its_last_byte(end: bytes) -> None:
    """A CR ends a line by itself; an LF that comes later belongs to it."""
    reader = EventReader()
    assert reader.feed(b"data: a" + end[:-1]) == []
    assert [each.data for each in reader.feed(end[-1:])] == ["a"]
    assert [each.data for each in reader.feed(b"\ndata: b\n\n")] == ["b"]
    assert reader.end() == []


async def test_an_event_has_a_largest_size_and_a_stream_has_none() -> None:
    piece = b"x" * 2**20
    for line in (piece, b"data: " + piece + b"\n"):
        reader = EventReader()
        for _ in range(LONGEST_EVENT // 2**20 - 1):
            assert reader.feed(line) == []
        with pytest.raises(ChatError, match="too large"):
            reader.feed(line * 2)
    reader = EventReader()
    for _ in range(LONGEST_EVENT // 2**20 + 2):
        assert len(reader.feed(b"data: " + piece + b"\n\n")) == 1


WHOLE: list[tuple[tuple[bytes, ...], str | None]] = [
    ((A, DONE), None),
    ((A, b"data: [DONE]"), None),
    ((A, STOP), None),
    ((A, STOP[:-2]), None),
    ((A, b"event: ping\ndata: {}\n\n", b"data:\n\n", DONE), None),
    ((A, DONE, b"data: after\n\n"), None),
    ((A,), "truncated"),
    ((A, B[:20]), "truncated"),
    ((A, b'data: {"cho\n\n', DONE), "parse"),
    ((A, b"data: 7\n\n", DONE), "parse"),
    ((A, b"data: [7]\n\n", DONE), "parse"),
    ((A, b'data: {"choices":[7]}\n\n', DONE), "parse"),
    ((A, b'data: {"error":{"message":"m","type":"server_error"}}\n\n'), "server"),
    ((A, b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n'), "server"),
    ((A, b'event: error\ndata: {"message":"flat"}\n\n'), "server"),
    ((A, b'data: {"object":"error","message":"vLLM"}\n\n'), "server"),
    ((A, b'data: {"error":"text"}\n\n'), "server"),
    ((A, b'data: {"error":{"type":"rate_limit_error"}}\n\n'), "rate_limit"),
    ((A, b'data: {"error":{"code":"upstream_timeout","type":"server_error"}}\n\n'), "timeout"),
    ((A, b'data: {"error":{"type":"authentication_error"}}\n\n'), "auth"),
    ((A, b'data: {"error":{"type":"invalid_request_error"}}\n\n'), "request"),
]


@pytest.mark.parametrize(("parts", "category"), WHOLE)
async def test_what_counts_as_a_whole_answer(parts: tuple[bytes, ...], category: str | None) -> None:
    """And what came before the failure is delivered, in one read or in many."""
    for pieces in ([b"".join(parts)], list(parts)):
        reader, text, found = DeltaReader(OK), "", None
        try:
            for piece in pieces:
                for delta in reader.feed(piece):
                    text += delta.content
            for delta in () if reader.over else reader.end(framed=True):
                text += delta.content
        except ChatError as error:
            found = error
        assert text == "a"
        assert (found and found.category) == category
        assert found is None or (found.status, found.request_id) == (200, "id-1")


async def test_a_break_after_finish_reason_is_a_break() -> None:
    """Without the framing's word only the terminator says that an answer is whole."""
    reader = DeltaReader(OK)
    assert len(list(reader.feed(A + STOP))) == 2
    with pytest.raises(ChatError, match="before the answer was complete"):
        list(reader.end(framed=False))


# ── before a real Headrace ───────────────────────────────────────────────────────────────────────────────


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def headrace() -> AsyncIterator[Headrace]:
    sections = {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "auth": {"mode": "open"},
        "upstreams": {"mock": {"base_url": "mock:", "breaker": {"failures": 1000}}},
        "models": {"m": {"upstreams": ["mock"]}},
        "retry": {"attempts": 1},
    }
    async with running(sections) as started:
        yield started
        await started.quiet()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(headrace: Headrace) -> AsyncIterator[Client]:
    async with Client(headrace.base_url, retry=ONCE) as made:
        yield made


FIVE = "the quick brown fox jumps"
FAULTS = [
    ("words=5", None, FIVE, 200),
    ("words=5, half_events", None, FIVE, 200),
    ("words=5, one_byte, crlf", None, FIVE, 200),
    ("words=5, keepalive_comments=3", None, FIVE, 200),
    ("words=5, close_delimited", None, FIVE, 200),
    ("words=5, plain_json", None, FIVE, 200),
    ("status=400", "request", "", 400),
    ("status=401", "server", "", 502),  # the upstream's key is none of the caller's business
    ("status=429, retry_after=7", "rate_limit", "", 429),
    ("status=503", "server", "", 503),
    ("garbage", "server", "", 502),
    ("redirect", "server", "", 502),
    ("rst_after=-1", "server", "", 502),
    ("error_after=4", "server", "the quick brown", 200),
    ("cut_after=4", "server", "the quick brown", 200),
    ("rst_after=4", "server", "the quick brown", 200),
    ("no_done, words=3", "server", "the quick brown", 200),
    ("cut_after=4, cut_mid_event", "truncated", "the quick brown", 200),
    ("bad_json=4", "parse", "the quick", 200),
]


@pytest.mark.parametrize(("faults", "category", "text", "status"), FAULTS, ids=[row[0] for row in FAULTS])
async def test_every_fault_has_its_category(
    client: Client, faults: str, category: str | None, text: str, status: int
) -> None:
    """Nothing that came is lost, however the connection ended behind it."""
    stream = client.stream(model="m", messages=HI, headers={"x-mock": faults})
    said, error = await heard(stream)
    assert said == text
    assert stream.request_id == stream.headers["x-request-id"]
    if error is None:
        assert category is None
        assert stream.finish_reason == "stop"
        assert stream.usage == {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}
    else:
        assert (error.category, error.status, error.partial) == (category, status, bool(text))
        assert error.request_id == stream.request_id
        assert error.retry_after_s == (7 if "retry_after" in faults else None)


async def test_answers_of_one_piece(client: Client) -> None:
    """Through Headrace, with its failures; a body that is no completion is none."""
    answer = await client.complete(model="m", messages=HI, headers={"x-mock": "words=5"})
    assert (answer.content, answer.finish_reason) == (FIVE, "stop")
    assert answer.usage == answer.document["usage"]
    assert answer.request_id
    for faults, category in [("error_body", "server"), ("rst_after=0", "server")]:
        with pytest.raises(ChatError) as caught:
            await client.complete(model="m", messages=HI, headers={"x-mock": faults})
        assert caught.value.category == category
    with pytest.raises(ChatError) as caught:
        await client.complete(model="nobody", messages=HI)
    assert (caught.value.category, caught.value.code, caught.value.retryable) == (
        "request",
        "model_not_found",
        False,
    )
    bodies = {b'{"x":1}': "parse", b"null": "parse", b'{"error":{"message":"m"}}': "server", b"[]": "parse"}
    for body, category in bodies.items():
        async with scripted(plays(response(200, body))) as server:
            _, error = await ask(server.url, ONCE)
            assert error is not None
            assert error.category == category
    async with scripted(plays(response(200, b"<html>", content_type="text/html"))) as server:
        _, error = await ask(server.url)
        assert error is not None
        assert error.category == "parse"


# ── failures, and second tries ───────────────────────────────────────────────────────────────────────────

STATUSES = [
    *((400, "request", 1), (401, "auth", 1), (403, "auth", 1), (404, "request", 1), (302, "request", 1)),
    *((408, "timeout", 3), (409, "request", 3), (413, "request", 1), (422, "request", 1)),
    *((429, "rate_limit", 3), (500, "server", 3), (502, "server", 3), (503, "server", 3)),
    *((504, "timeout", 3), (529, "server", 3)),
]


async def test_statuses() -> None:
    """Category, what the server said, and whether it was asked again."""
    body = b'{"error":{"message":"no","type":"t","param":"p","code":"c"}}'
    rows = [(status, category, asked, "X: y") for status, category, asked in STATUSES]
    rows += [(429, "rate_limit", 1, "x-should-retry: false"), (400, "request", 3, "x-should-retry: true")]
    for status, category, asked, field in rows:
        script = refuses(status, "X-Request-ID: id-1", "Location: /elsewhere", field, body=body)
        async with scripted(script) as server:
            _, error = await ask(server.url)
            assert error is not None
            assert (error.category, error.status, len(server.calls)) == (category, status, asked), field
            assert (str(error), error.type, error.param, error.code) == ("no", "t", "p", "c")
            assert (error.request_id, error.retryable, error.partial) == ("id-1", asked > 1, False)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>Bad Gateway</html>", "The server answered with status 502."),
        (b"\xff", "The server answered with status 502."),
        (b'[{"error":{"code":400,"message":"Gemini\'s","status":"INVALID_ARGUMENT"}}]', "Gemini's"),
        (b'{"type":"error","error":{"type":"api_error","message":"Anthropic\'s"}}', "Anthropic's"),
        (b'{"object":"error","message":"vLLM\'s"}', "vLLM's"),
        (b'{"error":"text"}', "text"),
    ],
)
async def test_errors_in_other_shapes(body: bytes, message: str) -> None:
    async with scripted(refuses(502, body=body)) as server:
        _, error = await ask(server.url, ONCE)
        assert str(error) == message


SHORT = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
BROKEN: dict[str, tuple[Script, str, int | None]] = {
    "no HTTP": (plays(b"SSH-2.0-other\r\n\r\n"), "parse", None),
    "half a JSON answer": (plays(SHORT % b"200 OK", Call.close), "truncated", 200),
    "half a refusal": (plays((SHORT % b"403 No")[:-1], Call.close), "auth", 403),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_answers_that_break(name: str) -> None:
    """Of a refusal the status alone says enough."""
    script, category, status = BROKEN[name]
    async with scripted(script) as server:
        text, error = await ask(server.url, ONCE)
    assert error is not None
    assert (text, error.category, error.status) == ("", category, status)


async def test_what_is_tried_again() -> None:
    """Every failure that may pass, as long as nothing was delivered; and nothing after that."""
    soon = Timeouts(first_byte_s=0.5, idle_s=0.5)
    failures: list[tuple[Script, str]] = [
        (refuses(503), "server"),
        (plays(Call.close), "network"),
        (says(b'data: {"error":{"message":"m","type":"server_error"}}\n\n'), "server"),
        (says(b": headrace\n"), "truncated"),
        (plays(HEAD, chunk(b": headrace\n"), Call.close), "truncated"),
        (plays(HEAD, chunk(b": headrace\n"), hold), "timeout"),
        (hold, "timeout"),
    ]

    async def again(failure: Script, category: str) -> None:
        async with scripted(in_turn(failure, says(A, DONE))) as server:
            assert await ask(server.url, timeouts=soon) == ("a", None), category
            assert len(server.calls) == 2, category

    async def once(failure: Script, category: str) -> None:
        async with scripted(failure) as server:
            _, error = await ask(server.url, ONCE, timeouts=soon)
            assert error is not None
            assert (error.category, error.retryable, error.partial) == (category, True, False)

    async def too_late(category: str, *end: Step) -> None:
        async with scripted(plays(HEAD, chunk(A), *end)) as server:
            text, error = await ask(server.url, timeouts=soon)
            assert error is not None
            assert (text, error.category, error.partial, len(server.calls)) == ("a", category, True, 1)

    await asyncio.gather(
        *(again(*row) for row in failures),
        *(once(*row) for row in failures),
        *(too_late(*row) for row in (("truncated", END), ("truncated", Call.reset), ("timeout", hold))),
    )


async def test_nobody_there() -> None:
    async with scripted(hold) as server:
        url = server.url
    _, error = await ask(url)
    assert error is not None
    assert (error.category, error.status, error.request_id) == ("network", None, None)


async def test_comments_are_signs_of_life() -> None:
    steps = [step for _ in range(12) for step in (chunk(b": headrace\n"), 0.05)]
    async with scripted(plays(HEAD, *steps, chunk(A + DONE), END)) as server:
        assert await ask(server.url, ONCE, timeouts=Timeouts(idle_s=0.5)) == ("a", None)


async def test_never_sooner_than_the_server_says() -> None:
    """And later than all others who were told the same; a wait that is too long is the caller's to decide."""
    for fields in (("Retry-After: 0.1",), ("retry-after-ms: 100", "Retry-After: 9")):
        at: list[float] = []

        def note(_call: Call, at: list[float] = at) -> None:
            at.append(asyncio.get_running_loop().time())

        refused = plays(note, response(429, b"{}", *fields))
        async with scripted(in_turn(refused, plays(note, HEAD, chunk(A + DONE), END))) as server:
            assert await ask(server.url, Retry(base_s=0.1, rng=lambda: 0.5)) == ("a", None)
        assert at[1] - at[0] >= 0.145
    async with scripted(refuses(429, "Retry-After: 61")) as server:
        _, error = await ask(server.url)
        assert error is not None
        assert (error.retry_after_s, error.retryable, len(server.calls)) == (61, True, 1)


async def test_back_off() -> None:
    """Full jitter under a bound that doubles up to a limit."""
    error = ChatError(Category.SERVER, "")
    for share, expected in [(0.0, [0, 0, 0, 0, None]), (0.5, [1, 2, 2.5, 2.5, None])]:
        retry = Retry(attempts=5, base_s=2, max_s=5, rng=lambda share=share: share)
        assert [retry.wait_s(error, attempt) for attempt in range(1, 6)] == expected
    assert Retry(rng=lambda: 0.0, attempts=10**6).wait_s(error, 10**5) == 0
    error.retry_after_s = 60
    assert Retry(rng=lambda: 0.5).wait_s(error, 1) == 60.25
    assert Retry().wait_s(ChatError(Category.REQUEST, ""), 1) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "Sat, 21 Nov 2026 12:01:00 GMT"}, 60),
        ({"retry-after": "Sat, 21 Nov 2026 11:00:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "Sat, 99 Nov 99999 12:01:00 GMT"}, None),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "x", "retry-after": "9"}, 9),
    ],
)
async def test_retry_after_in_all_its_forms(fields: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(fields, 1_795_262_400) == expected


async def test_what_came_before_a_break_is_read() -> None:
    """Even if the reader comes when the connection has long been gone: aiohttp alone would keep it back."""
    told = b'data: {"error":{"message":"m","type":"server_error"}}\n\n'
    async with (
        scripted(plays(HEAD, chunk(A), chunk(B), chunk(told), Call.close)) as server,
        aiohttp.ClientSession() as session,
        session.post(server.url) as answer,
    ):
        await until(lambda: answer.content.exception() is not None)
        deltas = client_exchange._deltas_of(answer, OK, 1.0)
        assert [(await anext(deltas)).content, (await anext(deltas)).content] == ["a", "b"]
        with pytest.raises(ChatError) as caught:
            await anext(deltas)
        assert caught.value.category == "server"
    assert client_exchange._unread(object()) == b""  # type: ignore[arg-type]  # an aiohttp without the method


async def test_after_the_terminator_the_connection_is_used_again() -> None:
    """A body whose end does not come is not waited for."""
    async with (
        scripted(plays(HEAD, chunk(A + DONE), 0.01, END)) as server,
        Client(server.url, "secret") as client,
    ):
        for _ in range(3):
            assert await heard(client.stream(model="m", messages=HI)) == ("a", None)
        assert server.connections == 1
        head = server.calls[0].head.lower()
        assert head.startswith(b"post /v1/chat/completions http/1.1\r\n")
        assert b"\r\nauthorization: bearer secret\r\n" in head
        assert b"x-headrace-priority" not in head
        sent = {"stream": True, "stream_options": {"include_usage": True}, "model": "m", "messages": HI}
        assert json.loads(server.calls[0].body) == sent
        low = client.stream(model="m", messages=[], priority=-1, stream_options=None, top_p=1)
        assert await heard(low) == ("a", None)
        assert b"\r\nx-headrace-priority: low\r\n" in server.calls[-1].head.lower()
        sent = {"stream": True, "stream_options": None, "model": "m", "messages": [], "top_p": 1}
        assert json.loads(server.calls[-1].body) == sent
    for more in (hold, chunk(b": more\n\n")):
        async with scripted(plays(HEAD, chunk(A + DONE), 0.01, more, END)) as server:
            assert await ask(server.url) == ("a", None)


async def test_text_in_parts_and_a_last_event_without_its_end() -> None:
    """Some models give a list of parts; not all servers write the last blank line."""
    parts = b'data: {"choices":[{"delta":{"content":[{"type":"text","text":"b"},{"type":"x"},7]}}]}\n\n'
    async with scripted(says(STOP, A, parts[:-2])) as server:
        assert await ask(server.url) == ("ab", None)


async def test_a_client_that_asks_nothing() -> None:
    await Client("http://127.0.0.1:1").aclose()


# ── leaving ──────────────────────────────────────────────────────────────────────────────────────────────


async def breaks(client: Client) -> None:
    async with client.stream(model="m", messages=HI) as stream:
        async for _ in stream:
            break


async def breaks_without_a_block(client: Client) -> None:
    async for _ in client.stream(model="m", messages=HI):
        break


async def is_cancelled(client: Client) -> None:
    reading = asyncio.Event()

    async def read() -> None:
        async with client.stream(model="m", messages=HI) as stream:
            async for _ in stream:
                reading.set()

    task = asyncio.get_running_loop().create_task(read())
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def closes(client: Client) -> None:
    """From another task than the one that reads."""
    stream = client.stream(model="m", messages=HI)
    task = asyncio.get_running_loop().create_task(heard(stream))
    await until(lambda: bool(stream.headers))
    await stream.aclose()
    _, error = await task
    assert error is not None
    assert (error.category, error.retryable) == ("aborted", False)


async def closes_between_two_reads(client: Client) -> None:
    stream = client.stream(model="m", messages=HI)
    assert (await anext(stream)).content == "a"
    await stream.aclose()
    await stream.aclose()
    with pytest.raises(ChatError) as caught:  # not the end: the answer is not whole
        await anext(stream)
    assert (caught.value.category, caught.value.partial) == ("aborted", True)


async def test_whoever_leaves_ends_it_upstream() -> None:
    """By break, cancellation or close, each within the second of the contract."""
    ways: list[Callable[[Client], Awaitable[None]]] = [
        *(breaks, breaks_without_a_block, is_cancelled, closes, closes_between_two_reads)
    ]
    async with lab(plays(HEAD, chunk(A), hold), Way(push=True)) as it, Client(it.headrace.base_url) as client:
        for count, leaves in enumerate(ways, 1):
            await leaves(client)
            call = await it.called(count)
            async with asyncio.timeout(1.0):
                await call.gone.wait()
            assert (await it.line(count))["reason"] == "client_gone", leaves.__name__
        assert client.limits.in_flight == 0


async def test_closing_the_client_reaches_everybody() -> None:
    """Who waits for its turn, for a head, for another attempt, for the next delta, or does something else."""
    script = in_turn(refuses(503, "Retry-After: 30"), hold, plays(HEAD, chunk(A), hold))
    async with scripted(script) as server:
        client = Client(server.url, limits=Limits(max_in_flight=4))
        tasks = []
        for count in range(1, 4):
            tasks.append(asyncio.get_running_loop().create_task(heard(client.stream(model="m", messages=HI))))
            await until(lambda count=count: len(server.calls) == count)
        idle = client.stream(model="m", messages=HI)
        assert (await anext(idle)).content == "a"
        tasks.append(asyncio.get_running_loop().create_task(heard(client.stream(model="m", messages=HI))))
        await until(lambda: client.limits.waiting == 1)
        unread = client.stream(model="m", messages=HI)
        await client.aclose()
        late = client.stream(model="m", messages=HI)
        ends = await asyncio.gather(*tasks, heard(idle), heard(unread), heard(late))
        assert [error and error.category for _, error in ends] == ["aborted"] * 7
        assert (client.limits.in_flight, client.limits.waiting) == (0, 0)
        assert len(server.calls) == 4


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.5, 6000),
    st.integers(1, 20),
    st.lists(st.floats(0, 30), min_size=1, max_size=60),
)
async def test_the_bucket_keeps_its_rate(rate: float, burst: int, gaps: list[float]) -> None:
    """Never more than rate and burst in a minute, and whoever waits as long as it says gets one."""
    bucket, now, taken = TokenBucket(rate, burst), 0.0, []
    for gap in gaps:
        now += gap
        wait_s = bucket.take(now)
        if wait_s > 0:
            now += wait_s
            assert bucket.take(now) == 0
        taken.append(now)
        assert sum(at > now - 60 for at in taken) <= rate + burst + 1e-6
    assert TokenBucket(rate, burst).take(now) == 0


async def test_turns_go_by_priority() -> None:
    """Then by arrival; who leaves the queue costs nobody a place; a second attempt goes before all."""
    limits, order, gate = Limits(max_in_flight=1), [], asyncio.Event()
    loop = asyncio.get_running_loop()

    async def work(name: str, priority: int) -> None:
        async with limits.turn(priority):
            order.append(name)
            await gate.wait()
            await limits.again()

    names = {"first": 0, "b": 0, "leaves": 7, "c": 0, "low": -1, "high": 5}
    tasks = {name: loop.create_task(work(name, priority)) for name, priority in names.items()}
    await until(lambda: limits.waiting == 5)
    assert limits.in_flight == 1
    tasks.pop("leaves").cancel()
    gate.set()
    await asyncio.gather(*tasks.values())
    assert order == ["first", "high", "b", "c", "low"]
    assert (limits.in_flight, limits.waiting) == (0, 0)


async def test_granted_and_cancelled_at_once() -> None:
    """The place that nobody takes goes to the next."""
    limits, loop = Limits(max_in_flight=1), asyncio.get_running_loop()

    async def work() -> str:
        async with limits.turn():
            return "done"

    async with limits.turn():
        unlucky, lucky = loop.create_task(work()), loop.create_task(work())
        await until(lambda: limits.waiting == 2)
    unlucky.cancel()  # it has been granted, and has not run since
    assert await lucky == "done"
    with pytest.raises(asyncio.CancelledError):
        await unlucky
    assert limits.in_flight == 0


async def test_the_clock_says_when_it_goes_on() -> None:
    """`requests_per_minute` after a burst, by a clock that is given."""
    now, went = [0.0], Counter[str]()
    limits = Limits(requests_per_minute=6000, burst=2, clock=lambda: now[0])

    async def work() -> None:
        async with limits.turn():
            went["on"] += 1

    tasks = [asyncio.get_running_loop().create_task(work()) for _ in range(4)]
    await until(lambda: limits.waiting == 2 and went["on"] == 2)
    await asyncio.sleep(0.03)  # three of its intervals, which the clock does not know of
    assert went["on"] == 2
    now[0] = 0.01
    await until(lambda: went["on"] == 3)
    now[0] = 1.0
    await asyncio.gather(*tasks)
    for wrong in ({"max_in_flight": 0}, {"burst": 0}, {"requests_per_minute": 0}):
        with pytest.raises(ValueError, match="above 0"):
            Limits(**wrong)  # type: ignore[arg-type]  # the wrong kind is meant


async def test_limits_hold_for_requests() -> None:
    """So many at once, second attempts within the rate; a pause keeps its place."""
    limits, gates = Limits(max_in_flight=2), [Gate() for _ in range(6)]
    free = iter(gates)
    open_ones: list[Gate] = []
    peak = 0

    async def script(call: Call) -> None:
        nonlocal peak
        gate = next(free)
        open_ones.append(gate)
        peak = max(peak, len(open_ones))
        await gate(call)
        open_ones.remove(gate)
        await says(A, DONE)(call)

    async with scripted(script) as server, Client(server.url, limits=limits) as client:
        answers = [
            asyncio.get_running_loop().create_task(heard(client.stream(model="m", messages=HI)))
            for _ in range(6)
        ]
        for count, gate in enumerate(gates, 1):
            await until(lambda count=count: len(server.calls) == min(count + 1, 6))
            assert len(open_ones) <= 2
            gate.open()
        assert await asyncio.gather(*answers) == [("a", None)] * 6
        assert peak == 2
    seen: list[tuple[str, float]] = []

    def note(call: Call) -> None:
        seen.append((json.loads(call.body)["model"], asyncio.get_running_loop().time()))

    refused = plays(note, response(429, b"{}", "retry-after-ms: 1"))
    script_of_two = in_turn(refused, plays(note, HEAD, chunk(A + DONE), END))
    async with (
        scripted(script_of_two) as server,
        Client(server.url, limits=Limits(1, 600), retry=QUICK) as client,
    ):
        begun = asyncio.get_running_loop().time()
        streams = [client.stream(model=name, messages=HI) for name in ("x", "y")]
        assert await asyncio.gather(*map(heard, streams)) == [("a", None)] * 2
        assert [model for model, _ in seen] == ["x", "x", "y"]
        assert seen[2][1] - begun >= 0.19
        assert [stream.attempts for stream in streams] == [2, 1]


# ── the example ──────────────────────────────────────────────────────────────────────────────────────────


async def batch(*words: str, cwd: Path) -> tuple[int | None, str]:
    """The example with a terminal for its bar: how it ended, and what the terminal shows."""
    master, slave = os.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(ROOT / "docs" / "examples" / "batch.py"), *words),
            cwd=cwd,
            stderr=slave,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HEADRACE_KEY": "any"},
        )
        async with asyncio.timeout(30):
            code = await process.wait()
        return code, os.read(master, 65536).decode()
    finally:
        os.close(master)
        os.close(slave)


async def test_the_batch_example(headrace: Headrace, tmp_path: Path) -> None:
    """It asks each prompt once, shows how far it is, and goes on where something failed."""
    rows: list[dict[str, Any]] = [{"id": str(number), "prompt": "hi"} for number in range(5)]
    rows += [{"id": "own", "messages": HI, "temperature": 0}, {"id": "bad", "prompt": "x", "model": "nobody"}]
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    words = (str(prompts), str(answers), "--url", headrace.base_url, "--model", "m", "--at-once", "3")
    before = len(headrace.log_lines())
    code, shown = await batch(*words, cwd=tmp_path)
    assert code == 1, shown
    assert "bad: request: " in shown
    assert "[##############################] 7/7, 1 failed, 0 s left" in shown
    assert shown.rstrip().endswith("6 answered, 1 failed")
    rows[-1]["model"] = "m"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    code, shown = await batch(*words, "--per-minute", "6000", cwd=tmp_path)
    assert code == 0, shown
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(row["id"] for row in found) == sorted(row["id"] for row in rows)
    assert all(row["content"].startswith("the quick") and row["finish_reason"] == "stop" for row in found)
    assert len(headrace.log_lines()) - before == len(rows) + 1
