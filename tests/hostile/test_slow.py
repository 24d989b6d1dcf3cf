"""Slow attacks: 200 connections that dribble, while somebody who does nothing wrong is served.

Total deadlines end heads and bodies, however often a byte comes; a reader has to take what is written within
`timeouts.write`; who goes on sending after a refusal is cut off.
"""

from __future__ import annotations

import asyncio
import math
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from tests.hostile.inputs import CHAT, HOST, JSON, asks, raw
from tests.kit.callers import Caller, chat
from tests.kit.fleet import Fleet, fleet
from tests.kit.headrace import ROOT, settings_for, until
from tests.kit.lab import PLAIN, lab, plays, response
from tests.kit.upstreams import HEAD, Call, chunk, scripted

pytestmark = [pytest.mark.alone, pytest.mark.timeout(90)]

ATTACKERS = 200
DEADLINE_S = 1.0
#: A tenth of a second between two pieces: far more often than any idle timer would notice.
PACE_S = 0.1
SLACK = 5
TIMEOUTS = {"header": DEADLINE_S, "body": DEADLINE_S, "write": DEADLINE_S}
#: Below this the p99 of a few hundred requests is that of a machine that has other work too.
LEAST_MS = 50.0
#: Seconds between two arrivals: what is measured is the attack, not the burst of its connections.
ARRIVAL_S = 0.0025


async def pumps(call: Call) -> None:
    """As much of a stream as is taken, of 64 MB."""
    piece = chunk(b"data: " + b"x" * 65_536 + b"\n\n")
    sock = call.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**18)  # else it grows with what it is given
    await call.send(HEAD)
    for _ in range(1024):
        await call.send(piece)


async def received(caller: Caller) -> bytes:
    """Everything until the connection ends, also what came before a reset."""
    got = b""
    try:
        while piece := await caller.reader.read(65_536):
            got += piece
    except ConnectionResetError:
        pass
    return got


async def dribbles(port: int, start: bytes, piece: bytes) -> bytes:
    """Sends a piece now and then until the connection ends; what came back."""
    async with await Caller.connect(port) as caller:
        await caller.send(start)
        reading = asyncio.ensure_future(received(caller))
        while not reading.done():
            if not caller.writer.is_closing():
                caller.writer.write(piece)
            await asyncio.wait({reading}, timeout=PACE_S)
        return await reading


async def head(port: int, over: asyncio.Event) -> None:
    answer = await dribbles(port, f"{CHAT}\r\n{HOST}\r\nX-A: ".encode(), b"a")
    assert answer.startswith(b"HTTP/1.1 408 "), answer


async def body(port: int, over: asyncio.Event) -> None:
    answer = await dribbles(port, raw(CHAT, HOST, JSON, "Content-Length: 100000"), b" ")
    assert answer.startswith(b"HTTP/1.1 408 "), answer


async def chunks(port: int, over: asyncio.Event) -> None:
    answer = await dribbles(port, raw(CHAT, HOST, JSON, "Transfer-Encoding: chunked"), b"1\r\n \r\n")
    assert answer.startswith(b"HTTP/1.1 408 "), answer


async def read(port: int, over: asyncio.Event) -> None:
    """Takes a few bytes now and then. What the kernel holds for it outlives its request."""
    loop, got = asyncio.get_running_loop(), b""
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        await loop.sock_sendall(sock, chat(model="endless"))
        try:
            while not over.is_set() and (piece := await loop.sock_recv(sock, 500)):
                got += piece
                await asyncio.sleep(PACE_S)
        except ConnectionResetError:
            pass
    assert got.startswith(b"HTTP/1.1 200 ")
    assert b"[DONE]" not in got


@asynccontextmanager
async def good(port: int, took: list[float]) -> AsyncIterator[None]:
    """Somebody else asks meanwhile; at the end `took` has the milliseconds of each answer, sorted."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.hostile.good_caller", str(port)),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield
        async with asyncio.timeout(30):
            printed, _ = await process.communicate(b"")
        assert process.returncode == 0
        took.extend(map(float, printed.split()))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def p99(took: list[float]) -> float:
    return took[math.ceil(len(took) * 0.99) - 1]


Attack = Callable[[int, asyncio.Event], Awaitable[None]]


async def attacked(here: Fleet, attack: Attack) -> float:
    """Seconds from when all attackers were there until the last one was rid of."""
    over = asyncio.Event()
    attackers = []
    async with asyncio.timeout(60):
        for _ in range(ATTACKERS):
            attackers.append(asyncio.ensure_future(attack(here.port, over)))
            await asyncio.sleep(ARRIVAL_S)
        began_at = monotonic()
        await until(lambda: len(ends(here)) == ATTACKERS, 45, lambda: str(len(ends(here))))
        lasted_s = monotonic() - began_at
        over.set()
        await asyncio.gather(*attackers)
    return lasted_s


def settings(url: str) -> dict[str, Any]:
    whole = settings_for("mock:", timeouts=TIMEOUTS)
    whole["upstreams"]["far"] = {"base_url": url}
    whole["models"]["endless"] = {"upstreams": ["far"]}
    return whole


def ends(here: Fleet) -> list[str]:
    """Why the attackers' requests ended."""
    lines = here.logged("request")
    return [line["reason"] for line in lines if line["status"] != 200 or line["model"] == "endless"]


@pytest.mark.parametrize(
    "attack",
    [head, body, pytest.param(chunks, marks=pytest.mark.slow), read],
    ids=lambda attack: attack.__name__,
)
async def test_two_hundred(attack: Attack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All are rid of by the deadline, nothing of them is left, and the good caller hardly notices."""
    without: list[float] = []
    during: list[float] = []
    async with scripted(pumps) as upstream, fleet(tmp_path, settings(upstream.url)) as here:
        async with good(here.port, without):
            pass
        files = (await here.state())["fds"]
        async with good(here.port, during):
            lasted_s = await attacked(here, attack)
        await here.quiet()
        assert (await here.state())["fds"] <= files + 2
        assert set(ends(here)) == {"client_gone" if attack is read else "rejected"}
        assert len(upstream.calls) == (ATTACKERS if attack is read else 0)
    with capsys.disabled():
        print(
            f"\n{ATTACKERS} x slow {attack.__name__}: over in {lasted_s:.1f} s; p99 of a good caller"
            f" {p99(without):.1f} ms without, {p99(during):.1f} ms with ({len(during)} requests)"
        )
    assert lasted_s < SLACK * (DEADLINE_S + 1)
    assert p99(during) < 5 * max(p99(without), LEAST_MS)


async def test_who_goes_on_after_a_refusal_is_cut_off() -> None:
    """The answer can be read (RFC 9112 9.6), but nobody is listened to for long."""
    async with lab(plays(response(200, b"{}")), PLAIN[0], max_body_bytes=1000) as it:
        began_at = monotonic()
        async with asyncio.timeout(20):
            answer = await dribbles(it.port, asks(JSON, "Content-Length: 1000000"), b" ")
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert monotonic() - began_at < SLACK * 1.0  # downstream.LINGER_S
        assert it.upstream.connections == 0
        await until(lambda: it.headrace.server.state()["in_flight"] == 0)
