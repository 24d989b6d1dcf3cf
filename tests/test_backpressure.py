"""A reader slower than its upstream holds the upstream back; memory does not grow, no byte is lost."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit.callers import Answer, Caller, chat
from tests.kit.headrace import command, settings_for, until
from tests.kit.lab import ALL, Way, both, everywhere, lab
from tests.kit.upstreams import DONE, END, HEAD, Call, chunk, scripted

pytestmark = pytest.mark.timeout(60)

READERS = 20
#: What each upstream wants to send; far more than all socket buffers on the way can hold.
PIECE = b"data: " + b"0123456789abcdef" * 4095 + b"0123456789\n\n"
PIECES = 320
TOTAL = PIECES * len(PIECE) + len(DONE)
#: 20 stopped readers may cost this much. Measured: about 13 MB; the streams together want to send 400 MB.
MOST_MB = 60
#: Below a segment of the loopback (64 KB) the kernel would send one every 0.2 s.
SMALL_BUFFER = 2**17


async def stop_watching(call: Call, watcher: asyncio.Task[None]) -> None:
    """The connection goes back to its server, which reads the next request from it."""
    if not call.writer.transport.is_closing():
        watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)


class Pump:
    """Sends the whole stream as fast as it is taken, and counts what it got rid of, per call."""

    def __init__(self, pieces: int = PIECES) -> None:
        self.pieces = pieces
        self.sent: dict[Call, int] = {}

    async def __call__(self, call: Call) -> None:
        sock = call.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**18)  # else it grows with what it is given
        watcher = asyncio.get_running_loop().create_task(call.watch())
        self.sent[call] = 0
        try:
            await call.send(HEAD)
            for _ in range(self.pieces):
                await call.send(chunk(PIECE))
                self.sent[call] += len(PIECE)
            await call.send(chunk(DONE) + END)
        finally:
            await stop_watching(call, watcher)

    @property
    def total(self) -> int:
        return sum(self.sent.values())

    async def stands_still(self, count: int) -> int:
        """Waits until nothing was sent for a quarter of a second; what was sent by then."""
        loop = asyncio.get_running_loop()
        seen, since = -1, loop.time()

        def still() -> bool:
            nonlocal seen, since
            if self.total != seen or len(self.sent) < count:
                seen, since = self.total, loop.time()
            return loop.time() > since + 0.25

        await until(still, 15.0, lambda: f"{len(self.sent)} calls, {self.total} bytes sent")
        return self.total


def expected() -> str:
    digest = hashlib.sha256()
    for _ in range(PIECES):
        digest.update(PIECE)
    digest.update(DONE)
    return digest.hexdigest()


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def stopped(port: int, stack: AsyncExitStack) -> Caller:
    """A reader that asks and then takes nothing from its socket."""
    caller = await stack.enter_async_context(await Caller.connect(port, receive_buffer=SMALL_BUFFER))
    caller.writer.transport.pause_reading()
    await caller.send(chat())
    return caller


async def digest_of(caller: Caller) -> tuple[str, int, bool]:
    """Reads everything that is left: its digest, its size, and whether it ended well."""
    caller.writer.transport.resume_reading()
    answer = await caller.head()
    assert answer.status == 200
    digest, size = hashlib.sha256(), 0
    piece = Answer()
    while data := await caller.piece(piece):
        digest.update(data)
        size += len(data)
        piece.body = b""
    return digest.hexdigest(), size, piece.clean


@asynccontextmanager
async def process(upstream_url: str, directory: Path) -> AsyncIterator[tuple[int, int]]:
    """Headrace as a process of its own, whose memory is its own: its pid and its port."""
    file = directory / "headrace.yaml"
    file.write_text(yaml.safe_dump(settings_for(upstream_url)))
    async with command("serve", "-c", str(file)) as headrace:
        port = int((await headrace.line(r"data\s+http://127\.0\.0\.1:(\d+)"))[1])
        yield headrace.process.pid, port


async def test_twenty_readers_that_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """20 x 20 MB wait in the upstream, not in our memory; resumed, every reader gets every byte."""
    pump = Pump()
    async with (
        scripted(pump) as upstream,
        process(upstream.url, tmp_path) as (pid, port),
        asyncio.timeout(50),
        AsyncExitStack() as stack,
    ):
        async with await Caller.connect(port) as first:  # everything that is loaded late is loaded now
            await first.send(chat())
            assert (await digest_of(first))[1:] == (TOTAL, True)
        pump.sent.clear()
        before = resident_mb(pid)
        callers = [await stopped(port, stack) for _ in range(READERS)]
        sent = await pump.stands_still(READERS)
        grown = resident_mb(pid) - before
        with capsys.disabled():
            print(f"\n{READERS} stopped readers: {grown:.1f} MB more, {sent / 2**20:.0f} MB sent in all")
        assert grown < MOST_MB
        assert all(taken < TOTAL * 3 / 4 for taken in pump.sent.values()), pump.sent.values()

        results = await asyncio.gather(*map(digest_of, callers))
        assert set(results) == {(expected(), TOTAL, True)}
        assert resident_mb(pid) - before < MOST_MB


@everywhere
async def test_stop_and_go(way: Way) -> None:
    """A reader that stops has its upstream paused; when it goes on, so does the upstream, to the end."""
    pump = Pump()
    async with lab(pump, way) as it, asyncio.timeout(25), AsyncExitStack() as stack:
        caller = await stopped(it.port, stack)
        assert await pump.stands_still(1) < TOTAL * 3 / 4
        assert await digest_of(caller) == (expected(), TOTAL, True)
        line = await it.ended("complete")
        assert line["bytes_out"] == TOTAL


@both
async def test_a_slow_reader_slows_its_upstream(way: Way) -> None:
    """What the upstream got rid of is never far ahead of what the reader took."""
    pump = Pump()
    async with lab(pump, way) as it, asyncio.timeout(25), AsyncExitStack() as stack:
        caller = await stopped(it.port, stack)
        ahead = await pump.stands_still(1)
        caller.writer.transport.resume_reading()
        answer = await caller.head()
        taken = 0
        while taken < TOTAL // 3:
            data = await caller.piece(answer)
            answer.body = b""
            taken += len(data)
            assert pump.total - taken < 2 * ahead + 2**22, (pump.total, taken, ahead)
        caller.reset()
        await it.ended("client_gone")


@both
async def test_one_stopped_reader_stops_no_other(way: Way) -> None:
    """While one reader has stopped, another one's stream runs to its end."""
    pump = Pump()
    async with lab(pump, way) as it, asyncio.timeout(25), AsyncExitStack() as stack:
        slow = await stopped(it.port, stack)
        await pump.stands_still(1)
        async with await Caller.connect(it.port) as quick:
            await quick.send(chat())
            assert await digest_of(quick) == (expected(), TOTAL, True)
        slow.reset()
        await it.headrace.quiet()
        reasons = [line["reason"] for line in it.headrace.log_lines()]
        assert reasons == ["complete", "client_gone"]


async def never_resumes(
    way: Way, request: bytes, script: Callable[[Call], Awaitable[None]], phase: str
) -> None:
    sections: dict[str, Any] = {"timeouts": {"write": 0.3}}
    async with (
        lab(script, way, **sections) as it,
        asyncio.timeout(15),
        await Caller.connect(it.port, receive_buffer=SMALL_BUFFER) as caller,
    ):
        caller.writer.transport.pause_reading()
        began = asyncio.get_running_loop().time()
        await caller.send(request)
        call = await it.called()
        async with asyncio.timeout(5):
            await call.gone.wait()
        took = asyncio.get_running_loop().time() - began
        assert 0.29 < took < 3.0
        await it.ended("client_gone")
        samples = await it.headrace.metrics()
        assert samples[f'headrace_client_disconnects_total{{phase="{phase}"}}'] == 1
        caller.writer.transport.resume_reading()
        answer = await caller.rest(await caller.head())
        assert not answer.clean
        assert b"[DONE]" not in answer.body
        assert b'"error"' not in answer.body


@pytest.mark.parametrize("way", ALL, ids=str)
async def test_a_reader_that_never_resumes(way: Way) -> None:
    """`timeouts.write` ends a reader that takes nothing: as one that has left, with a visible break."""
    await never_resumes(way, chat(), Pump(), "stream")


@both
async def test_a_reader_that_never_resumes_a_large_answer(way: Way) -> None:
    """The same for an answer that is no stream."""
    size = PIECES * len(PIECE)
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n".encode()

    async def script(call: Call) -> None:
        watcher = asyncio.get_running_loop().create_task(call.watch())
        try:
            await call.send(head)
            for _ in range(PIECES):
                await call.send(PIECE)
        finally:
            await stop_watching(call, watcher)

    await never_resumes(way, chat(stream=False), script, "answer")


@both
async def test_a_stopped_reader_is_no_stall(way: Way) -> None:
    """While the reader holds the stream back, the upstream's idle timer does not run against it."""
    pump = Pump()
    async with (
        lab(pump, way, upstream={"timeouts": {"idle": 0.2}}) as it,
        asyncio.timeout(25),
        AsyncExitStack() as stack,
    ):
        caller = await stopped(it.port, stack)
        began = asyncio.get_running_loop().time()
        await pump.stands_still(1)
        await until(lambda: asyncio.get_running_loop().time() > began + 0.6)
        assert not it.headrace.log_lines()
        assert await digest_of(caller) == (expected(), TOTAL, True)
        await it.ended("complete")
