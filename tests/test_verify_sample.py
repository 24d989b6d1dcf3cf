"""`streams.verify_sample`: what came and what went are compared, on both data paths; what differs is told."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import structlog.testing

from proxy import deliver
from proxy.verify import VerifiedPipe, is_drawn
from tests.kit.callers import Answer, Caller, ask, chat
from tests.kit.headrace import until
from tests.kit.lab import Gate, Lab, Way, both, hold, lab, plays, response
from tests.kit.upstreams import DONE, END, HEAD, Call, Script, chunk, event

pytestmark = pytest.mark.timeout(60)

METRIC = "headrace_transparency_mismatch_total"
EVENT = "transparency_mismatch"
HEARTBEAT = b": headrace\n"
BARE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
#: With what could be taken for framing in it.
STREAM = event("one") + b"data: 5\r\ndata: 0\r\n\r\nid: 1\r\n\r\n" + event("é" * 900) + DONE
#: More than the sockets on the way hold.
LARGE = b"data: " + b"0123456789abcdef" * 16383 + b"0123456789\n\n"
COUNTS = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}\n\n'


class Stage:
    """A lab whose upstream plays another script for each request."""

    def __init__(self) -> None:
        self.lab: Lab
        self._script: Script = plays()

    async def play(self, call: Call) -> None:
        await self._script(call)

    def next(self, *steps: Any) -> None:
        self._script = plays(*steps)

    async def ask(self, *steps: Any, request: bytes | None = None) -> Answer:
        self.next(*steps)
        return await ask(self.lab.port, request or chat("Connection: close"))

    async def mismatches(self) -> float:
        return (await self.lab.headrace.metrics())[METRIC]


@asynccontextmanager
async def staged(way: Way, share: float = 1.0, **streams: Any) -> AsyncIterator[Stage]:
    stage = Stage()
    async with lab(stage.play, way, streams={"verify_sample": share, **streams}) as stage.lab:
        yield stage


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[VerifiedPipe]:
    """Every pipe that compares, as it is made."""
    found: list[VerifiedPipe] = []

    class Seen(VerifiedPipe):
        def __init__(self, *pipe: Any) -> None:
            super().__init__(*pipe)
            found.append(self)

    monkeypatch.setattr(deliver, "VerifiedPipe", Seen)
    return found


def sizes(verified: list[VerifiedPipe]) -> list[tuple[int, int]]:
    """Bytes that came and bytes that went, of each."""
    return [(pipe._came.size, pipe._out.went.size) for pipe in verified]


# ── nothing is found where nothing is wrong ──────────────────────────────────────────────────────────────


@both
async def test_whatever_the_chunks(way: Way, verified: list[VerifiedPipe]) -> None:
    """In pieces of any size, with and without framing on either side, compressed: all are compared, and the
    same. The metric is there before the first stream."""
    async with staged(way) as it:
        assert await it.mismatches() == 0
        for size in (1, 7, 600, len(STREAM)):
            parts = [chunk(STREAM[at : at + size]) for at in range(0, len(STREAM), size)]
            assert (await it.ask(HEAD, *parts, END)).body == STREAM
        assert (await it.ask(HEAD + chunk(STREAM) + END)).body == STREAM
        assert (await it.ask(BARE_HEAD, STREAM[:50], STREAM[50:], Call.close)).body == STREAM
        old = await it.ask(HEAD, chunk(STREAM), END, request=chat(version="1.0"))
        assert old.body == STREAM
        packed = gzip.compress(STREAM)
        encoded = HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
        assert (await it.ask(encoded, chunk(packed[:30]), chunk(packed[30:]), END)).body == packed
        await it.lab.headrace.quiet()
        assert {line["reason"] for line in it.lab.headrace.log_lines()} == {"complete"}
        assert sizes(verified) == [(len(STREAM),) * 2] * 7 + [(len(packed),) * 2]
        assert await it.mismatches() == 0


@both
async def test_heartbeats_are_no_difference(way: Way, verified: list[VerifiedPipe]) -> None:
    """Neither in the stream nor before it."""
    gate, later = Gate(), Gate()
    async with (
        staged(way, heartbeat=0.02, commit_after=0.02) as it,
        await Caller.connect(it.lab.port) as caller,
    ):
        it.next(gate, HEAD, chunk(STREAM[:-14]), later, chunk(DONE), END)
        async with asyncio.timeout(20):
            await caller.send(chat())
            answer = await caller.head()
            assert await caller.piece(answer) == HEARTBEAT
            gate.open()
            while STREAM[:-14] not in answer.body.replace(HEARTBEAT, b""):
                await caller.piece(answer)
            assert await caller.piece(answer) == HEARTBEAT
            later.open()
            await caller.rest(answer)
        assert answer.body.replace(HEARTBEAT, b"") == STREAM
        await it.lab.ended("complete")
        assert sizes(verified) == [(len(STREAM),) * 2]
        assert await it.mismatches() == 0


@both
async def test_a_slow_reader_is_no_difference(way: Way, verified: list[VerifiedPipe]) -> None:
    """Its upstream is paused on the way, and goes on."""
    count = 24
    async with (
        staged(way) as it,
        asyncio.timeout(30),
        await Caller.connect(it.lab.port, receive_buffer=2**17) as caller,
    ):
        caller.writer.transport.pause_reading()
        it.next(HEAD, *[chunk(LARGE)] * count, chunk(DONE), END)
        await caller.send(chat())
        if way.push:
            await until(lambda: bool(verified) and verified[0].blocked, 15.0)
        caller.writer.transport.resume_reading()
        answer = await caller.rest(await caller.head())
        assert answer.body == LARGE * count + DONE
        await it.lab.ended("complete")
        assert sizes(verified) == [(len(answer.body),) * 2]
        assert await it.mismatches() == 0


@both
async def test_who_leaves_is_no_difference(way: Way, verified: list[VerifiedPipe]) -> None:
    """A reader that has left got a part, or all of it; a broken stream has an end of ours."""
    async with staged(way) as it:
        async with await Caller.connect(it.lab.port) as caller:
            it.next(HEAD, chunk(event("a")), hold)
            await caller.send(chat())
            await caller.piece(await caller.head())
            caller.reset()
            await it.lab.ended("client_gone")
        async with await Caller.connect(it.lab.port) as caller:
            gate = Gate()
            it.next(HEAD, chunk(event("a")), gate, Call.close)
            await caller.send(chat())
            answer = await caller.head()
            await caller.piece(answer)
            gate.open()
            await caller.rest(answer)
            await it.lab.ended("upstream_cut", 2)
        async with await Caller.connect(it.lab.port) as caller:
            it.next(HEAD, chunk(STREAM), hold)
            await caller.send(chat())
            assert await caller.piece(await caller.head()) == STREAM
            caller.leave()  # with all that there is, as SDKs do
            await it.lab.ended("complete", 3)
        assert sizes(verified) == [(len(event("a")),) * 2] * 2 + [(len(STREAM),) * 2]
        assert await it.mismatches() == 0


# ── which are drawn ──────────────────────────────────────────────────────────────────────────────────────


def test_the_share() -> None:
    """None of 0, all of 1, else as the draw says."""
    assert [is_drawn(0.0, lambda: 0.0), is_drawn(1.0, lambda: 0.999)] == [False, True]
    assert [is_drawn(0.5, lambda: 0.499), is_drawn(0.5, lambda: 0.5)] == [True, False]


@both
async def test_what_is_changed_on_purpose_is_not_compared(way: Way, verified: list[VerifiedPipe]) -> None:
    """Usage that was injected, JSON that was wrapped; and what is no stream."""
    async with staged(way, usage="inject", wrap_json=True) as it:
        answer = await it.ask(HEAD, chunk(event("a") + COUNTS + DONE), END)
        assert answer.body == event("a") + DONE
        plain = b'{"choices":[{"index":0,"message":{"content":"a"},"finish_reason":"stop"}]}'
        assert (await it.ask(response(200, plain))).body.endswith(DONE)
        large = b'{"a":"%b"}' % (b"x" * 300_000)
        request = chat("Connection: close", stream=False)
        assert (await it.ask(response(200, large), request=request)).body == large
        await it.lab.headrace.quiet()
        assert verified == []
        assert await it.mismatches() == 0


@both
async def test_off(way: Way, verified: list[VerifiedPipe]) -> None:
    """By default nothing is compared, and the metric says so all the same."""
    async with staged(way, 0.0) as it:
        assert (await it.ask(HEAD, chunk(STREAM), END)).body == STREAM
        assert (verified, await it.mismatches()) == ([], 0)


# ── and it can fail ──────────────────────────────────────────────────────────────────────────────────────

#: What may happen to a piece on its way out.
DAMAGES: dict[str, Callable[[bytes], list[bytes]]] = {
    "changed": lambda piece: [piece.replace(b"two", b"tvo")],
    "lost": lambda piece: [] if b"two" in piece else [piece],
    "twice": lambda piece: [piece, piece] if b"two" in piece else [piece],
}


def damaged(damage: Callable[[bytes], list[bytes]]) -> type[VerifiedPipe]:
    """A pipe with a fault between what it is fed and what it gives away."""

    class Damaged(VerifiedPipe):
        def __init__(self, *pipe: Any) -> None:
            super().__init__(*pipe)
            write, send = self._write, self._send

            def write_damaged(frame: bytes) -> None:
                for piece in damage(frame):
                    write(piece)

            async def send_damaged(data: bytes) -> None:
                for piece in damage(data):
                    await send(piece)

            self._write, self._send = write_damaged, send_damaged

    return Damaged


@both
@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_difference_is_told(way: Way, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in the metric, and in the log with the request's id, both lengths and nothing of the content."""
    monkeypatch.setattr(deliver, "VerifiedPipe", damaged(DAMAGES[damage]))
    parts = [event("one"), event("two"), event("three") + DONE]
    async with staged(way) as it:
        with structlog.testing.capture_logs() as lines:
            async with await Caller.connect(it.lab.port) as caller:
                gate = Gate()
                it.next(HEAD, chunk(parts[0]), gate, chunk(parts[1]), 0.05, chunk(parts[2]), END)
                await caller.send(chat("x-request-id: the-one"))
                answer = await caller.head()
                await caller.piece(answer)
                gate.open()
                await caller.rest(answer)
            assert answer.body != b"".join(parts)
            line = await it.lab.ended("complete")
        assert line["request_id"] == "the-one"
        told = [each for each in lines if each["event"] == EVENT]
        assert told == [
            {
                "event": EVENT,
                "log_level": "error",
                "request_id": "the-one",
                "upstream": "up",
                "upstream_bytes": len(b"".join(parts)),
                "delivered_bytes": len(answer.body),
            }
        ]
        assert await it.mismatches() == 1


async def test_broken_framing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A length that is wrong is no byte of the upstream's, whoever reads over it."""

    def longer(frame: bytes) -> list[bytes]:
        return [b"0" + frame] if b"two" in frame else [frame]

    monkeypatch.setattr(deliver, "VerifiedPipe", damaged(longer))
    async with staged(Way(push=True)) as it:
        answer = await it.ask(HEAD, chunk(event("one")), chunk(event("two") + DONE), END)
        assert answer.body == event("one") + event("two") + DONE
        await it.lab.ended("complete")
        assert await it.mismatches() == 1
