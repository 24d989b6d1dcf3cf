"""Streams: what arrives is what was sent, at once, and it ends for a stated reason. Over both data paths."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.kit.callers import Answer, Caller, ask, chat, everything, post
from tests.kit.headrace import until
from tests.kit.lab import (
    ALL,
    Gate,
    Lab,
    LoopThread,
    Way,
    both,
    everywhere,
    hold,
    lab,
    last_event,
    plays,
    response,
)
from tests.kit.upstreams import DONE, END, HEAD, Call, Script, chunk, event

pytestmark = pytest.mark.timeout(90)

#: A body without framing ends when the connection does.
BARE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
HEARTBEAT = b": headrace\n"
FINISHED = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
A, B = event("a"), event("b")

CHAT, COMPLETIONS, MESSAGES, RESPONSES = "chat/completions", "completions", "messages", "responses"
ROUTES = (CHAT, COMPLETIONS, MESSAGES, RESPONSES)
TERMINATOR = {
    CHAT: DONE,
    COMPLETIONS: DONE,
    MESSAGES: b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    RESPONSES: b'event: response.completed\ndata: {"type":"response.completed","response":{}}\n\n',
}
PIECE = {
    CHAT: A,
    COMPLETIONS: b'data: {"choices":[{"index":0,"text":"a","finish_reason":null}]}\n\n',
    MESSAGES: b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"a"}}\n\n',
    RESPONSES: (
        b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"a"}\n\n'
    ),
}


def streaming(route: str, *headers: str, version: str = "1.1") -> bytes:
    return chat(*headers, version=version, path=f"/v1/{route}")


def is_error_event(route: str, answer: Answer, code: str) -> None:
    """The last event is the error, in the dialect of its route."""
    document = last_event(answer)
    named = answer.body[:-2].rpartition(b"\n\n")[2].startswith(b"event: error\n")
    assert b"[DONE]" not in answer.body
    if route == MESSAGES:
        assert named
        assert document["type"] == "error"
        assert document["error"]["type"] == ("timeout_error" if code == "upstream_timeout" else "api_error")
        assert document["request_id"] == answer.headers["x-request-id"]
    else:
        assert named == (route == RESPONSES)
        assert document["error"]["code"] == code
        assert document["error"]["type"] == "server_error"


# ── byte identity ────────────────────────────────────────────────────────────────────────────────────────

LINE_TEXT = st.text(st.characters(exclude_characters="\r\n", exclude_categories=("Cs",)), max_size=30)
LINES = st.one_of(
    LINE_TEXT.map("data: {}".format),
    LINE_TEXT.map("data:{}".format),
    LINE_TEXT.map(": {}".format),
    LINE_TEXT.map("id: {}".format),
    st.sampled_from(["event: x", "data", "retry: 10", 'data: {"delta":{"content":"[DONE]"}}', ":"]),
    st.integers(1, 100_000).map(lambda size: "data: " + "é" * (size // 2)),
)


class Stream(bytes):
    """Bytes whose repr stays short."""

    def __repr__(self) -> str:
        return super().__repr__() if len(self) < 2000 else f"<{len(self)} bytes: {self[:500]!r}>"


@st.composite
def event_streams(draw: st.DrawFn) -> Stream:
    """A whole event stream with one kind of line end and its terminator."""
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    events = draw(st.lists(st.lists(LINES, max_size=4), max_size=6))
    text = "".join("".join(line + end for line in lines) + end for lines in events)
    return Stream((text + f"data: [DONE]{end}{end}").encode())


class Plan:
    """What the upstream sends next: the stream, cut into chunks, and the whole again cut into writes."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s
        self.writes: list[bytes] = []
        self.framed = True

    def set(self, stream: bytes, sizes: list[int], writes: list[int], *, framed: bool) -> None:
        """The terminator stays in one piece: after it the rest has to come within 100 ms."""
        at = stream.rindex(b"data: [DONE]")
        pieces = [*cut(stream[:at], sizes), stream[at:]] if self.pause_s else list(cut(stream, sizes))
        wrap = chunk if framed else bytes
        raw = [wrap(piece) for piece in pieces]
        last = [raw.pop() + END * framed] if self.pause_s else [END * framed]
        self.writes = [*cut((HEAD if framed else BARE_HEAD) + b"".join(raw), writes), *last]
        self.framed = framed

    async def script(self, call: Call) -> None:
        framed = self.framed  # the next example may have begun when this script ends
        framed = self.framed  # of this answer: the next plan may come before our last pause is over
        for piece in self.writes:
            if call.writer.is_closing():
                return
            call.writer.write(piece)
            await asyncio.sleep(self.pause_s)  # a turn of the loop: uvloop joins what one turn writes
        if not framed:
            call.close()


def cut(data: bytes, sizes: list[int], most: int = 400) -> Iterator[bytes]:
    """Pieces of these sizes, over and over; larger ones where that would be more than `most` pieces."""
    least = len(data) // most
    at = 0
    for number in range(len(data)):
        if at >= len(data):
            return
        size = max(sizes[number % len(sizes)], least)
        yield data[at : at + size]
        at += size


class Bench:
    """A lab in a thread of its own, for all examples of a test."""

    def __init__(self, way: Way, pause_s: float = 0.0, **sections: Any) -> None:
        self.plan = Plan(pause_s)
        self._thread = LoopThread()
        self._stack = AsyncExitStack()
        self.lab: Lab = self._thread.run(
            self._stack.enter_async_context(lab(self.plan.script, way, **sections))
        )

    def ask(self) -> Answer:
        return self._thread.run(ask(self.lab.port, chat("Connection: close")))

    def close(self) -> None:
        self._thread.run(self._stack.aclose())
        self._thread.close()


#: As `everywhere`.
WAYS = [*ALL[:-1], pytest.param(ALL[-1], marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=WAYS, ids=str)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(request.param)
    yield made
    made.close()


@pytest.fixture(scope="module", params=WAYS, ids=str)
def beating(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """The same with an upstream that pauses longer than the heartbeat."""
    made = Bench(request.param, 0.004, streams={"heartbeat": 0.002})
    yield made
    made.close()


SIZES = st.lists(st.one_of(st.just(1), st.integers(1, 20), st.integers(1, 20_000)), min_size=1, max_size=5)
quietly = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


@quietly
@given(stream=event_streams(), sizes=SIZES, writes=SIZES, framed=st.booleans())
@example(stream=b"data: [DONE]\n\n", sizes=[1], writes=[1], framed=True)
@example(stream=b"data: [DONE]\r\r", sizes=[1], writes=[1], framed=False)
@example(
    stream=Stream(b"data: " + b"x" * 100_000 + b"\n\n" + DONE), sizes=[200_000], writes=[200_000], framed=True
)
def test_bytes_arrive_as_they_were_sent(
    bench: Bench, stream: bytes, sizes: list[int], writes: list[int], framed: bool
) -> None:
    """Whatever the events and however they are cut: what arrives is what was sent, and it ends well."""
    bench.plan.set(stream, sizes, writes, framed=framed)
    answer = bench.ask()
    assert answer.body == stream
    assert answer.clean


@settings(quietly, max_examples=12)
@given(stream=event_streams(), sizes=SIZES, framed=st.booleans())
def test_heartbeats_are_all_that_is_added(
    beating: Bench, stream: bytes, sizes: list[int], framed: bool
) -> None:
    """With heartbeats forced, the rest is what was sent, and none of them is inside an event."""
    beating.plan.set(stream, list(sizes), [max(len(stream) // 12, 1)], framed=framed)
    answer = beating.ask()
    pieces = answer.body.split(HEARTBEAT)
    assert b"".join(pieces) == stream
    assert answer.clean
    before = b""
    for piece in pieces[:-1]:
        before += piece
        # A stream may start with a blank line.
        assert (b"\n" + before).endswith((b"\n\n", b"\n\r\n", b"\r\r")), before[-40:]


def test_heartbeats_were_forced(beating: Bench) -> None:
    """The test before this one did see heartbeats."""
    stream = b"".join(event(f"{number}") for number in range(8)) + DONE
    beating.plan.set(stream, [len(A)], [len(chunk(A))], framed=True)
    assert HEARTBEAT in beating.ask().body


# ── at once ──────────────────────────────────────────────────────────────────────────────────────────────


@everywhere
async def test_no_lump(way: Way) -> None:
    """Each of 50 events is sent only after the caller has received the one before."""
    received: asyncio.Queue[None] = asyncio.Queue()

    async def script(call: Call) -> None:
        await call.send(HEAD)
        for number in range(50):
            await call.send(chunk(event(f"word{number}")))
            await received.get()
        await call.send(chunk(DONE) + END)

    async with lab(script, way) as it, asyncio.timeout(20), await Caller.connect(it.port) as caller:
        await caller.send(chat())
        answer = await caller.head()
        for number in range(50):
            assert await caller.piece(answer) == event(f"word{number}")
            received.put_nowait(None)
        await caller.rest(answer)
        assert answer.clean
        line = await it.ended("complete")
        assert line["chunks"] == 51
        assert line["bytes_out"] == len(answer.body)


async def test_the_first_event_comes_with_the_head() -> None:
    """Pushed, they are one write: one segment, says the caller's kernel (tcpi_data_segs_in, linux/tcp.h)."""
    it_comes = lab(plays(HEAD + chunk(A), hold), Way(push=True))
    async with it_comes as it, await Caller.connect(it.port) as caller:
        await caller.send(chat())
        answer = await caller.head()
        assert await caller.piece(answer) == A
        info = caller.writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
        assert struct.unpack_from("=I", info, 152) == (1,)
        caller.reset()
        await it.ended("client_gone")


@both
async def test_the_head_crosses(way: Way) -> None:
    """End-to-end fields pass, hop-by-hop fields and what tells of the provider do not, ours are added."""
    head = HEAD.replace(
        b"\r\n\r\n",
        b"\r\nX-Request-Id: up-1\r\nSet-Cookie: a=b\r\nServer: nginx\r\nAlt-Svc: h3\r\n"
        b"Keep-Alive: timeout=5\r\n"
        b"Connection: keep-alive, x-hop\r\nX-Hop: 1\r\nOpenAI-Organization: org\r\nOpenAI-Version: 2020\r\n"
        b"Strict-Transport-Security: max-age=1\r\nCache-Control: private\r\n"
        b"X-RateLimit-Limit-Requests: 9\r\n\r\n",
    )
    async with lab(plays(head, chunk(DONE), END), way) as it:
        answer = await ask(it.port, chat("x-request-id: mine"))
        fields = answer.headers
        assert (answer.status, answer.clean) == (200, True)
        assert fields["content-type"] == "text/event-stream"
        assert fields["x-accel-buffering"] == "no"
        assert fields["cache-control"] == "no-cache, no-transform"
        assert fields["x-headrace-upstream"] == "up"
        assert fields["x-headrace-attempts"] == "1"
        assert fields["server-timing"].startswith("queue;dur=")
        assert fields["x-upstream-request-id"] == "up-1"
        assert fields["x-request-id"] == fields["request-id"] == "mine"
        assert fields["openai-version"] == "2020"
        assert fields["x-ratelimit-limit-requests"] == "9"
        dropped = {"set-cookie", "alt-svc", "keep-alive", "x-hop", "openai-organization"}
        assert not dropped & fields.keys()
        assert "strict-transport-security" not in fields
        assert fields["server"] == "headrace"


@both
async def test_the_request_crosses(way: Way) -> None:
    """The body is unchanged, the credential is the upstream's, the request id and Via are there."""
    request = chat("Authorization: Bearer callers-own", "x-api-key: callers-own", "Cookie: a=b", "x-mine: 1")
    async with lab(plays(HEAD, chunk(DONE), END), way) as it:
        await ask(it.port, request)
        call = await it.called()
        head = call.head.lower()
        assert call.body == request.partition(b"\r\n\r\n")[2]
        assert head.startswith(b"post /v1/chat/completions http/1.1\r\n")
        assert b"authorization: bearer upstream-secret\r\n" in head
        assert b"callers-own" not in head
        assert b"cookie" not in head
        assert b"x-mine: 1\r\n" in head
        assert b"x-request-id: req_" in head
        assert head.count(b"content-length:") == 1


# ── what a whole stream is ───────────────────────────────────────────────────────────────────────────────


@everywhere
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("framed", [True, False], ids=["framed", "bare"])
async def test_a_terminator_completes(way: Way, route: str, framed: bool) -> None:
    """A stream that has its terminator is complete, with HTTP framing and without."""
    stream = PIECE[route] + TERMINATOR[route]
    script = plays(HEAD, chunk(stream), END) if framed else plays(BARE_HEAD, stream, Call.close)
    async with lab(script, way) as it:
        answer = await ask(it.port, streaming(route))
        assert answer.body == stream
        assert answer.clean
        await it.ended("complete")


@both
@pytest.mark.parametrize(
    "terminator", [b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]\n\n", b"data: [DONE]\r\n\r\n"]
)
async def test_done_in_all_its_spellings(way: Way, terminator: bytes) -> None:
    """[DONE] counts with and without its blank line, whatever the line end."""
    async with lab(plays(BARE_HEAD, A + terminator, Call.close), way) as it:
        answer = await ask(it.port, chat())
        assert answer.body == A + terminator
        assert answer.clean
        await it.ended("complete")


@both
@pytest.mark.parametrize("kind", ["completed", "failed", "incomplete"])
async def test_responses_end_in_three_ways(way: Way, kind: str) -> None:
    """response.completed, .failed and .incomplete are all terminators."""
    stream = b'event: response.%b\ndata: {"type":"response.%b"}\n\n' % (kind.encode(), kind.encode())
    async with lab(plays(BARE_HEAD, stream, Call.close), way) as it:
        answer = await ask(it.port, streaming(RESPONSES))
        assert answer.body == stream
        assert answer.clean
        await it.ended("complete")


@both
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
async def test_a_finish_reason_and_a_framed_end(way: Way, route: str) -> None:
    """Providers that send no [DONE]: a framed end behind a finish_reason is complete."""
    async with lab(plays(HEAD, chunk(PIECE[route]), chunk(FINISHED), END), way) as it:
        answer = await ask(it.port, streaming(route))
        assert answer.body == PIECE[route] + FINISHED
        assert answer.clean
        await it.ended("complete")


@everywhere
@pytest.mark.parametrize("route", ROUTES)
async def test_a_framed_end_without_terminator_is_a_cut(way: Way, route: str) -> None:
    """Neither terminator nor finish_reason: the framed end is not believed."""
    async with lab(plays(HEAD, chunk(PIECE[route]), END), way) as it:
        answer = await ask(it.port, streaming(route))
        assert answer.body.startswith(PIECE[route])
        assert not answer.clean
        is_error_event(route, answer, "upstream_error")
        await it.ended("upstream_cut")


@everywhere
@pytest.mark.parametrize("tail", [A, FINISHED], ids=["nothing", "finish_reason"])
async def test_a_bare_end_needs_the_terminator(way: Way, tail: bytes) -> None:
    """Without framing the end of the connection says nothing, so only the terminator does."""
    async with lab(plays(BARE_HEAD, tail, Call.close), way) as it:
        answer = await ask(it.port, chat())
        assert not answer.clean
        is_error_event(CHAT, answer, "upstream_error")
        await it.ended("upstream_cut")


@both
async def test_other_routes_need_no_terminator(way: Way) -> None:
    """On a route whose streams have no terminator a framed end is a success."""
    async with lab(plays(HEAD, chunk(b"data: 1\n\n"), END), way) as it:
        answer = await ask(
            it.port, post("/v1/images/generations", {"model": "m", "stream": True, "prompt": "x"})
        )
        assert answer.body == b"data: 1\n\n"
        assert answer.clean
        await it.ended("complete")


@pytest.mark.alone
@everywhere
@pytest.mark.parametrize("route", ROUTES)
async def test_silence_after_the_terminator(way: Way, route: str) -> None:
    """An upstream that never closes holds nobody up: 100 ms after the terminator the answer is complete."""
    stream = PIECE[route] + TERMINATOR[route]
    async with lab(plays(HEAD, chunk(stream), hold), way) as it:
        began = time.monotonic()
        answer = await ask(it.port, streaming(route))
        assert time.monotonic() - began < 0.5
        assert answer.body == stream
        assert answer.clean
        await it.ended("complete")
        async with asyncio.timeout(1):
            await (await it.called()).gone.wait()


@both
@pytest.mark.parametrize(
    ("route", "text"),
    [
        (CHAT, b'data: {"choices":[{"delta":{"content":"data: [DONE]"},"finish_reason":null}]}\n\n'),
        (CHAT, b'data: {"choices":[{"delta":{"content":"\\n\\ndata: [DONE]\\n\\n"}}]}\n\n'),
        (MESSAGES, b'data: {"type":"content_block_delta","delta":{"text":"event: message_stop"}}\n\n'),
        (RESPONSES, b'data: {"type":"response.output_text.delta","delta":"response.completed"}\n\n'),
    ],
)
async def test_talk_of_a_terminator_is_none(way: Way, route: str, text: bytes) -> None:
    """A model that writes about the terminator does not end its stream: more may come, and a cut is one."""
    gate = Gate()
    script = plays(HEAD, chunk(text), gate, chunk(PIECE[route]), END)
    async with lab(script, way) as it, asyncio.timeout(10), await Caller.connect(it.port) as caller:
        await caller.send(streaming(route))
        answer = await caller.head()
        await caller.piece(answer)
        await asyncio.sleep(0.25)  # longer than the grace after a real terminator
        gate.open()
        await caller.rest(answer)
        assert answer.body.startswith(text + PIECE[route])
        assert not answer.clean
        await it.ended("upstream_cut")


@both
async def test_bytes_after_the_terminator(way: Way) -> None:
    """What the upstream still says after [DONE] is delivered."""
    tail = b": bye\n\n"
    script = plays(HEAD, chunk(A + DONE), 0.01, chunk(tail), END)
    async with lab(script, way) as it:
        answer = await ask(it.port, chat())
        assert answer.body == A + DONE + tail
        assert answer.clean
        await it.ended("complete")


@both
async def test_an_empty_stream_is_a_cut(way: Way) -> None:
    """A framed end without any byte is no complete answer."""
    async with lab(plays(HEAD, END), way) as it:
        answer = await ask(it.port, chat())
        assert not answer.clean or answer.status >= 500
        assert (await it.line())["reason"] == "upstream_cut"


# ── death in the middle ──────────────────────────────────────────────────────────────────────────────────


async def trickle(call: Call) -> None:
    """Events for as long as the proxy wants them."""
    while not call.writer.is_closing():
        await call.send(chunk(B))
        await asyncio.sleep(0.02)


def garbage(call: Call) -> Any:
    return call.send(b"this is no chunk size\r\n\r\n")


DEATHS: dict[str, tuple[Any, str, str]] = {
    "fin": (Call.close, "upstream_cut", "upstream_error"),
    "rst": (Call.reset, "upstream_cut", "upstream_error"),
    "garbage": (garbage, "upstream_cut", "upstream_error"),
    "stall": (hold, "upstream_stall", "upstream_timeout"),
    "deadline": (trickle, "deadline", "upstream_timeout"),
}


def short_timers(death: str) -> dict[str, float]:
    return {"stall": {"idle": 0.3}, "deadline": {"total": 0.5}}.get(death, {})


async def dies(
    way: Way, death: str, route: str, first: bytes, head: bytes = HEAD
) -> tuple[Answer, dict[str, Any]]:
    """The upstream sends `first` and dies once the caller has it."""
    how, reason, _ = DEATHS[death]
    gate = Gate()
    sent = chunk(first) if head is HEAD else first
    script = plays(head, sent, gate, how)
    timers = {"timeouts": short_timers(death)}
    async with (
        lab(script, way, upstream=timers) as it,
        asyncio.timeout(10),
        await Caller.connect(it.port) as caller,
    ):
        began = time.monotonic()
        await caller.send(streaming(route))
        answer = await caller.head()
        while len(answer.body) < len(first):
            await caller.piece(answer)
        gate.open()
        await caller.rest(answer)
        assert time.monotonic() - began < 2.5
        return answer, await it.ended(reason)


def deaths() -> Iterator[Any]:
    """Of each way and route every death for chats, and every route over one way; the rest is for test-all."""
    for way in ALL:
        for death in DEATHS:
            for route in ROUTES:
                seldom = way == ALL[-1] or (route != CHAT and way != ALL[0])
                marks = [pytest.mark.slow] if seldom else []
                yield pytest.param(way, death, route, id=f"{death}-{route}-{way}", marks=marks)


@pytest.mark.parametrize(("way", "death", "route"), list(deaths()))
async def test_a_death_is_visible(way: Way, death: str, route: str) -> None:
    """Between two events: the error event in the dialect of the route, no [DONE], no clean end."""
    answer, line = await dies(way, death, route, PIECE[route])
    assert not answer.clean
    assert answer.body.startswith(PIECE[route])
    is_error_event(route, answer, DEATHS[death][2])
    assert line["status"] == 200
    assert line["error"] == DEATHS[death][2]


@everywhere
@pytest.mark.parametrize("death", [name for name in DEATHS if name != "deadline"])
async def test_a_death_inside_an_event(way: Way, death: str) -> None:
    """Inside an event nothing is added: only the abort tells."""
    half = A + B[:20]
    answer, _ = await dies(way, death, CHAT, half)
    assert not answer.clean
    assert answer.body == half


@everywhere
@pytest.mark.parametrize("death", ["rst", "fin", "stall"])
async def test_a_death_without_framing(way: Way, death: str) -> None:
    """A close-delimited body that ends without its terminator was cut, by RST as by FIN."""
    answer, _ = await dies(way, death, CHAT, A, BARE_HEAD)
    assert not answer.clean
    is_error_event(CHAT, answer, DEATHS[death][2])


@both
@pytest.mark.parametrize("death", ["fin", "rst", "garbage"])
async def test_a_death_after_the_terminator(way: Way, death: str) -> None:
    """What happens to the connection after the terminator is no concern of the caller."""
    async with lab(plays(HEAD, chunk(A + DONE), 0.02, DEATHS[death][0]), way) as it:
        answer = await ask(it.port, chat())
        assert answer.body == A + DONE
        assert answer.clean
        await it.ended("complete")


@both
@pytest.mark.parametrize("death", ["fin", "rst", "stall"])
async def test_http_1_0_callers_see_a_reset(way: Way, death: str) -> None:
    """Without chunked framing only a reset tells a cut from an end."""
    script = plays(HEAD, chunk(A), 0.05, DEATHS[death][0])
    async with lab(script, way, upstream={"timeouts": short_timers(death)}) as it:
        answer = await everything(it.port, chat(version="1.0"))
        assert "transfer-encoding" not in answer.headers
        assert answer.reset
        assert answer.body.startswith(A)
        is_error_event(CHAT, answer, DEATHS[death][2])
        await it.ended(DEATHS[death][1])


@both
async def test_http_1_0_callers_see_a_whole_stream(way: Way) -> None:
    """The same caller gets a plain end when the stream is whole."""
    async with lab(plays(HEAD, chunk(A), chunk(DONE), END), way) as it:
        answer = await everything(it.port, chat(version="1.0"))
        assert "transfer-encoding" not in answer.headers
        assert not answer.reset
        assert answer.body == A + DONE
        await it.ended("complete")


@both
async def test_an_error_inside_the_stream(way: Way) -> None:
    """An error event of the upstream and a framed end: bytes unchanged, but the reason says it."""
    said = b'data: {"error":{"message":"overloaded","type":"server_error"}}\n\n'
    async with lab(plays(HEAD, chunk(A), chunk(said), END), way) as it:
        answer = await ask(it.port, chat())
        assert answer.body == A + said
        assert answer.clean
        await it.ended("upstream_error")


@both
async def test_an_error_inside_the_stream_and_a_break(way: Way) -> None:
    """The upstream has said itself what happened: nothing is added, and it does not look whole."""
    said = b'data: {"error":{"message":"overloaded","type":"server_error"}}\n\n'
    async with lab(plays(HEAD, chunk(A), chunk(said), 0.05, Call.close), way) as it:
        answer = await everything(it.port, chat())
        assert (answer.body, answer.clean) == (A + said, False)
        await it.ended("upstream_error")


@both
async def test_a_stream_with_a_bad_status(way: Way) -> None:
    """It passes as it is; complete it is not."""
    long = b": x\n" * 50_000  # more than is held of an answer that is no stream's
    for body in (A + DONE, long):
        async with lab(plays(HEAD.replace(b"200 OK", b"500 No"), chunk(body), END), way) as it:
            answer = await ask(it.port, chat())
            assert (answer.status, answer.body, answer.clean) == (500, body, True)
            await it.ended("upstream_error")


@both
async def test_an_error_inside_a_message_stream(way: Way) -> None:
    """Anthropic's error event is one too."""
    said = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"x"}}\n\n'
    async with lab(plays(HEAD, chunk(PIECE[MESSAGES]), chunk(said), END), way) as it:
        answer = await ask(it.port, streaming(MESSAGES))
        assert answer.body == PIECE[MESSAGES] + said
        await it.ended("upstream_error")


# ── before the first byte ────────────────────────────────────────────────────────────────────────────────


async def refused(it: Lab, request: bytes, status: int, code: str, reason: str = "upstream_error") -> Answer:
    """Asks, and checks the one JSON error."""
    answer = await ask(it.port, request)
    assert (answer.status, answer.clean) == (status, True), answer.body
    assert answer.headers["content-type"].startswith("application/json")
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert str(it.upstream.port) not in answer.body.decode()
    line = await it.ended(reason)
    assert line["error"] == code
    return answer


@contextmanager
def refusing_port() -> Iterator[int]:
    """Bound, so that nobody else gets it meanwhile, and not listening: connects are refused."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@both
@pytest.mark.parametrize("stream", [True, False])
async def test_nobody_listens(way: Way, stream: bool) -> None:
    """A refused connection is 502 upstream_unreachable."""
    with refusing_port() as port:
        async with lab(plays(), way, upstream={"base_url": f"http://127.0.0.1:{port}/v1"}) as it:
            answer = await refused(it, chat(stream=stream), 502, "upstream_unreachable")
            assert answer.headers["x-headrace-attempts"] == "1"


@everywhere
@pytest.mark.parametrize("how", [Call.close, Call.reset], ids=["fin", "rst"])
@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_an_upstream_that_hangs_up(way: Way, how: Any, method: str) -> None:
    """It accepts, reads and closes: 502, and it was asked exactly once."""
    request = chat() if method == "POST" else b"GET /v1/files HTTP/1.1\r\nHost: test\r\n\r\n"
    async with lab(plays(how), way) as it:
        await refused(it, request, 502, "upstream_unreachable")
        assert len(it.upstream.calls) == 1


@everywhere
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("head", [b"", HEAD], ids=["silent", "head only"])
async def test_no_first_byte(way: Way, stream: bool, head: bytes) -> None:
    """No byte of a body in time is 504, and the upstream is let go."""
    async with lab(plays(head, hold), way, upstream={"timeouts": {"first_byte": 0.5}}) as it:
        await refused(it, chat(stream=stream), 504, "upstream_timeout", "upstream_stall")
        async with asyncio.timeout(1):
            await (await it.called()).gone.wait()


@both
async def test_the_total_deadline_before_the_first_byte(way: Way) -> None:
    """The total deadline counts from the start, and names itself."""
    async with lab(plays(hold), way, upstream={"timeouts": {"total": 0.3}}) as it:
        await refused(it, chat(), 504, "upstream_timeout", "deadline")


NOT_HTTP = {
    "ssh": b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
    "noise": b"\x00\x01\x02\xff\xfe garbage\r\n\r\n",
    "switching": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
    "bad length": b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\n{}",
    "length and chunked": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "redirect": b"HTTP/1.1 302 Found\r\nLocation: http://inside.example/\r\nContent-Length: 0\r\n\r\n",
    "bad first chunk": HEAD + b"zz\r\n",
}


@everywhere
@pytest.mark.parametrize("raw", NOT_HTTP.values(), ids=NOT_HTTP.keys())
async def test_rubbish(way: Way, raw: bytes) -> None:
    """What is not a usable answer is 502, and nothing of it is shown."""
    async with lab(plays(raw, hold), way) as it:
        answer = await refused(it, chat(), 502, "upstream_invalid_response")
        for word in (b"SSH", b"inside.example", b"garbage", b"zz"):
            assert word not in answer.body
        assert "location" not in answer.headers
        assert len(it.upstream.calls) == 1


@both
async def test_a_very_long_field(way: Way) -> None:
    """A field of 20 kB either passes or is a 502 that says nothing."""
    raw = response(200, b'{"ok":true}', "x-long: " + "y" * 20_000)
    async with lab(plays(raw), way) as it:
        async with await Caller.connect(it.port) as caller:
            answer = await caller.ask(chat(stream=False))
        assert answer.status in (200, 502)
        assert b"yyyy" not in answer.body
        assert answer.clean


@both
@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_credential_is_ours(way: Way, status: int) -> None:
    """401 and 403 speak of our key: their body, which may quote it, is nowhere to be found."""
    secret = "sk-canary-0123456789"
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {secret}"}}).encode()
    async with lab(plays(response(status, body, f"x-note: {secret}")), way) as it:
        answer = await refused(it, chat(stream=False), 502, "upstream_auth")
        assert secret not in answer.body.decode()
        assert secret not in str(answer.headers)
        assert secret not in str(it.headrace.sink.lines)
        assert secret not in str(it.headrace.log_lines())


@both
@pytest.mark.parametrize("stream", [True, False])
async def test_a_success_that_is_an_error(way: Way, stream: bool) -> None:
    """A 200 whose whole JSON is an error object is 502."""
    async with lab(plays(response(200, b'{"error":{"message":"x","code":500}}')), way) as it:
        await refused(it, chat(stream=stream), 502, "upstream_error")


@both
async def test_an_answer_with_an_error_member_passes(way: Way) -> None:
    """A response object has `"error": null`, or one that failed its error among other members."""
    for body in (b'{"id":"r","error":null,"output":[]}', b'{"id":"r","error":{"code":"x"},"output":[]}'):
        async with lab(plays(response(200, body)), way) as it:
            answer = await ask(it.port, post("/v1/responses", {"model": "m"}))
            assert (answer.status, answer.body) == (200, body)
            await it.ended("complete")


@both
@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, "complete"),
        (404, "complete"),
        (429, "complete"),
        (500, "upstream_error"),
        (529, "upstream_error"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_errors_pass_verbatim(way: Way, status: int, reason: str, stream: bool) -> None:
    """Every other status passes: body, Retry-After, reason."""
    body = b'{"error":{"message":"m","type":"t","param":null,"code":"c"} }'
    async with lab(plays(response(status, body, "Retry-After: 7", "retry-after-ms: 6500")), way) as it:
        answer = await ask(it.port, chat(stream=stream))
        assert (answer.status, answer.body, answer.clean) == (status, body, True)
        assert answer.headers["retry-after"] == "7"
        assert answer.headers["retry-after-ms"] == "6500"
        assert (await it.ended(reason))["status"] == status


@both
async def test_an_array_of_errors_becomes_an_object(way: Way) -> None:
    """Gemini wraps its error in an array, where no SDK looks."""
    body = b'[{"error":{"code":400,"message":"Bad thing","status":"INVALID_ARGUMENT"}}]\n'
    async with lab(plays(response(400, body)), way) as it:
        answer = await ask(it.port, chat())
        assert answer.status == 400
        error = answer.json()["error"]
        assert error["message"] == "Bad thing"
        assert error["code"] == "invalid_argument"
        await it.ended("complete")


@both
async def test_errors_in_the_shape_of_messages(way: Way) -> None:
    """On /v1/messages our errors have Anthropic's shape."""
    async with lab(plays(Call.close), way) as it:
        answer = await ask(it.port, streaming(MESSAGES))
        assert answer.status == 502
        document = answer.json()
        assert document["type"] == "error"
        assert document["error"]["type"] == "api_error"
        assert document["request_id"] == answer.headers["request-id"]
        await it.ended("upstream_error")


# ── heartbeats, and the early 200 ────────────────────────────────────────────────────────────────────────


@pytest.mark.alone
@everywhere
async def test_heartbeats_in_silence(way: Way) -> None:
    """A silent upstream: comments at the event boundary; afterwards the stream goes on."""
    gate = Gate()
    script = plays(HEAD, chunk(A), gate, chunk(B + DONE), END)
    async with (
        lab(script, way, streams={"heartbeat": 0.05}) as it,
        asyncio.timeout(10),
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(chat())
        answer = await caller.head()
        assert await caller.piece(answer) == A
        began = time.monotonic()
        for _ in range(4):
            assert await caller.piece(answer) == HEARTBEAT
        assert 0.15 < time.monotonic() - began < 1.0
        gate.open()
        await caller.rest(answer)
        assert answer.body.replace(HEARTBEAT, b"") == A + B + DONE
        assert answer.clean
        await it.ended("complete")
        assert (await it.headrace.metrics())["headrace_heartbeats_total"] >= 4


@both
async def test_no_heartbeat_inside_an_event(way: Way) -> None:
    """Half an event and silence: nothing is added, however long it takes."""
    script = plays(HEAD, chunk(A + B[:10]), 0.3, chunk(B[10:] + DONE), END)
    async with lab(script, way, streams={"heartbeat": 0.02}) as it:
        answer = await ask(it.port, chat())
        assert answer.body == A + B + DONE
        assert answer.clean


@both
async def test_no_heartbeat_while_events_flow(way: Way) -> None:
    """A heartbeat is for silence only."""

    async def script(call: Call) -> None:
        await call.send(HEAD)
        for _ in range(60):
            await call.send(chunk(A))
            await asyncio.sleep(0.015)
        await call.send(chunk(DONE) + END)

    async with lab(script, way, streams={"heartbeat": 0.4}) as it:
        answer = await ask(it.port, chat())
        assert answer.body == A * 60 + DONE


@both
async def test_heartbeats_off(way: Way) -> None:
    """`heartbeat: 0` sends none."""
    script = plays(HEAD, chunk(A), 0.3, chunk(DONE), END)
    async with lab(script, way, streams={"heartbeat": 0}) as it:
        answer = await ask(it.port, chat())
        assert answer.body == A + DONE
        assert answer.clean
        await it.ended("complete")


@both
async def test_heartbeats_do_not_hide_a_stall(way: Way) -> None:
    """Our own comments are not the upstream's bytes: its idle timer goes on."""
    script = plays(HEAD, chunk(A), hold)
    async with lab(script, way, streams={"heartbeat": 0.05}, upstream={"timeouts": {"idle": 0.4}}) as it:
        answer = await ask(it.port, chat())
        assert HEARTBEAT in answer.body
        is_error_event(CHAT, answer, "upstream_timeout")
        await it.ended("upstream_stall")


EARLY = {"commit_after": 0.1, "heartbeat": 0.05}


async def committed(it: Lab, caller: Caller, request: bytes) -> Answer:
    """Sends, and reads the early 200 and two comments."""
    await caller.send(request)
    answer = await caller.head()
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    assert await caller.piece(answer) == HEARTBEAT
    assert await caller.piece(answer) == HEARTBEAT
    return answer


@everywhere
async def test_commit_then_events(way: Way) -> None:
    """An upstream that thinks for long: 200 and comments first, then its events."""
    gate = Gate()
    script = plays(gate, HEAD, chunk(A + DONE), END)
    async with (
        lab(script, way, streams=EARLY) as it,
        asyncio.timeout(10),
        await Caller.connect(it.port) as caller,
    ):
        answer = await committed(it, caller, chat())
        gate.open()
        await caller.rest(answer)
        assert answer.body.replace(HEARTBEAT, b"") == A + DONE
        assert answer.clean
        await it.ended("complete")


LATE: dict[str, tuple[Any, str, str]] = {
    "500": (response(500, b'{"error":{"message":"secret inside"}}'), "upstream_error", "upstream_error"),
    "429": (response(429, b'{"error":{"message":"secret inside"}}'), "upstream_error", "upstream_error"),
    "401": (response(401, b'{"error":{"message":"secret inside"}}'), "upstream_auth", "upstream_error"),
    "json": (response(200, b'{"id":"secret inside"}'), "upstream_invalid_response", "upstream_error"),
    "fin": (Call.close, "upstream_unreachable", "upstream_error"),
    "stall": (hold, "upstream_timeout", "upstream_stall"),
}


@both
@pytest.mark.parametrize(
    ("route", "late"),
    [
        *((CHAT, late) for late in LATE),
        *((MESSAGES, late) for late in ("500", "stall")),
        *(pytest.param(MESSAGES, late, marks=pytest.mark.slow) for late in ("429", "401", "json", "fin")),
    ],
)
async def test_commit_then_something_else(way: Way, late: str, route: str) -> None:
    """After the early 200 every failure is an error event and an abort."""
    step, code, reason = LATE[late]
    gate = Gate()
    async with (
        lab(plays(gate, step), way, streams=EARLY, upstream={"timeouts": {"first_byte": 0.8}}) as it,
        asyncio.timeout(10),
        await Caller.connect(it.port) as caller,
    ):
        answer = await committed(it, caller, streaming(route))
        gate.open()
        await caller.rest(answer)
        assert not answer.clean
        assert b"secret inside" not in answer.body
        answer.body = answer.body.replace(HEARTBEAT, b"")
        is_error_event(route, answer, code)
        assert (await it.ended(reason))["status"] == 200


@both
@pytest.mark.parametrize(
    ("streams", "stream"),
    [(EARLY, False), ({"commit_after": 0, "heartbeat": 0.05}, True)],
    ids=["no stream asked for", "off"],
)
async def test_no_commit(way: Way, streams: dict[str, float], stream: bool) -> None:
    """A request that is no stream, or `commit_after: 0`: the status stays the upstream's."""
    script = plays(0.4, response(503, b"{}"))
    async with lab(script, way, streams=streams) as it:
        answer = await ask(it.port, chat(stream=stream))
        assert (answer.status, answer.body) == (503, b"{}")
        await it.ended("upstream_error")


# ── answers that are no streams ──────────────────────────────────────────────────────────────────────────

BIG = json.dumps(
    {"object": "list", "data": [{"embedding": [number / 7 for number in range(60_000)]}]}
).encode()
SMALL = b'{"id":"x","choices":[]}'
JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED_JSON = JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BARE_JSON = JSON_HEAD + b"Connection: close\r\n\r\n"


@everywhere
@pytest.mark.parametrize("body", [SMALL, BIG], ids=["small", "1 MB"])
@pytest.mark.parametrize("framing", ["length", "chunked", "bare"])
async def test_whole_answers(way: Way, body: bytes, framing: str) -> None:
    """A JSON answer arrives intact, however it was framed."""
    scripts: dict[str, Script] = {
        "length": plays(response(200, body)),
        "chunked": plays(CHUNKED_JSON, *map(chunk, cut(body, [1000])), END),
        "bare": plays(BARE_JSON, body, Call.close),
    }
    async with lab(scripts[framing], way) as it:
        answer = await ask(it.port, chat(stream=False))
        assert answer.status == 200
        assert answer.body == body
        assert answer.clean
        assert answer.headers["content-type"] == "application/json"
        line = await it.ended("complete")
        assert line["bytes_out"] == len(body)


@everywhere
@pytest.mark.parametrize("body", [SMALL, BIG], ids=["small", "1 MB"])
@pytest.mark.parametrize(
    ("framing", "how"),
    [
        ("length", Call.close),
        ("length", Call.reset),
        ("chunked", Call.close),
        ("chunked", Call.reset),
        ("bare", Call.reset),  # by FIN it ends as it should
    ],
    ids=["length-fin", "length-rst", "chunked-fin", "chunked-rst", "bare-rst"],
)
async def test_a_cut_answer(way: Way, body: bytes, framing: str, how: Any) -> None:
    """A body that was cut is a 502 or a visible break, never a short answer that looks whole."""
    half = body[: len(body) // 2]
    starts = {
        "length": response(200, body)[: -len(body)] + half,
        "chunked": CHUNKED_JSON + chunk(half),
        "bare": BARE_JSON + half,
    }
    async with lab(plays(starts[framing], 0.1, how), way) as it:
        answer = await ask(it.port, chat(stream=False))
        if answer.status == 502:
            assert answer.clean
            assert answer.json()["error"]["code"] == "upstream_error"
        else:
            assert not answer.clean
            assert body.startswith(answer.body)
        await it.ended("upstream_cut")


@everywhere
async def test_a_bare_answer_over_http_1_0(way: Way) -> None:
    """A large answer without length to an HTTP/1.0 caller that is cut ends with a reset."""
    script = plays(CHUNKED_JSON, chunk(BIG[:500_000]), 0.1, Call.close)
    async with lab(script, way) as it:
        answer = await everything(it.port, chat(stream=False, version="1.0"))
        assert answer.reset
        await it.ended("upstream_cut")


@both
async def test_a_stalled_answer(way: Way) -> None:
    """Half a JSON answer and silence: 504."""
    script = plays(response(200, SMALL)[:-5], hold)
    async with lab(script, way, upstream={"timeouts": {"idle": 0.3}}) as it:
        await refused(it, chat(stream=False), 504, "upstream_timeout", "upstream_stall")


@both
@pytest.mark.parametrize("status", [204, 304])
async def test_answers_without_a_body(way: Way, status: int) -> None:
    """A status that has no body gets none."""
    raw = f"HTTP/1.1 {status} Nothing\r\nETag: x\r\n\r\n".encode()
    async with lab(plays(raw), way) as it, asyncio.timeout(5), await Caller.connect(it.port) as caller:
        await caller.send(b"DELETE /v1/files/f1 HTTP/1.1\r\nHost: test\r\n\r\n")
        answer = await caller.head()
        assert answer.status == status
        assert answer.headers.get("etag") == "x"
        await caller.send(b"DELETE /v1/files/f2 HTTP/1.1\r\nHost: test\r\n\r\n")
        assert (await caller.head()).status == status  # nothing of a body was in between


@both
@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("GET /v1/files?purpose=a%20b&x=%E2%82%AC+1&&y", "GET /v1/files?purpose=a%20b&x=%E2%82%AC+1&&y"),
        ("DELETE /v1/files/file-%41b?z=%2F..", "DELETE /v1/files/file-%41b?z=%2F.."),
        ("GET /responses/resp_1?include[]=x", "GET /v1/responses/resp_1?include[]=x"),
        ("DELETE /v1/models/ft:gpt:a%20b", "DELETE /v1/models/ft:gpt:a%20b"),
    ],
)
async def test_targets_are_untouched(way: Way, line: str, target: str) -> None:
    """Query strings and percent-encoding reach the upstream as the caller wrote them."""
    async with lab(plays(response(200, b"{}")), way) as it:
        answer = await ask(it.port, f"{line} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        assert (answer.status, answer.body) == (200, b"{}")
        call = await it.called()
        assert call.head.split(b"\r\n")[0].decode() == f"{target} HTTP/1.1"
        await it.ended("complete")


@both
async def test_many_requests_on_one_connection(way: Way) -> None:
    """A caller's connection is good for one answer after the other, streams and others."""

    async def script(call: Call) -> None:
        if b'"stream": true' in call.body:
            await call.send(HEAD + chunk(A + DONE) + END)
        else:
            await call.send(response(200, SMALL))

    async with lab(script, way) as it, asyncio.timeout(10), await Caller.connect(it.port) as caller:
        for number in range(6):
            answer = await caller.ask(chat(stream=number % 2 == 0))
            assert answer.clean
            assert answer.body == (A + DONE if number % 2 == 0 else SMALL)
        await until(lambda: len(it.headrace.log_lines()) == 6)
        assert {line["reason"] for line in it.headrace.log_lines()} == {"complete"}
        assert it.upstream.connections == 1
