"""Rows 2, 10, 16 and 17: nobody answers, an event has no end, a caller leaves in its head or vanishes."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from time import monotonic

import pytest

from tests.kit.callers import Answer, Caller, ask, chat
from tests.kit.fleet import fleet, resident
from tests.kit.headrace import settings_for, until
from tests.kit.lab import Lab, Way, both, hold, lab, plays, response
from tests.kit.upstreams import DONE, END, HEAD, Call, chunk, scripted

FIRST_BYTE_S = 0.5
PIECE = b"x" * 65_536
PIECES = 160  # 10 MB


@pytest.mark.alone
@both
@pytest.mark.parametrize("accepts", [True, False])
async def test_a_blackhole(way: Way, accepts: bool) -> None:
    """504 when `first_byte` is over, at most a tenth later (here five times that), and the connection is not
    kept. Where nobody accepts, the kernel has taken connection and request."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        base_url = {} if accepts else {"base_url": f"http://127.0.0.1:{listener.getsockname()[1]}/v1"}
        upstream = {**base_url, "timeouts": {"first_byte": FIRST_BYTE_S}}
        async with lab(plays(hold), way, upstream=upstream) as it:
            began_at = monotonic()
            answer = await ask(it.port, chat())
            took_s = monotonic() - began_at
            assert (answer.status, answer.json()["error"]["code"]) == (504, "upstream_timeout")
            assert FIRST_BYTE_S <= took_s < FIRST_BYTE_S * 1.5
            await it.ended("upstream_stall")
            assert it.headrace.state["upstream_idle"] == 0


async def endless_line(call: Call) -> None:
    await call.send(HEAD + chunk(b"data: "))
    for _ in range(PIECES):
        await call.send(chunk(PIECE))
    await call.send(chunk(b"\n\n" + DONE) + END)


@pytest.mark.alone
@pytest.mark.timeout(60)
async def test_ten_megabytes_without_a_newline(tmp_path: Path) -> None:
    """Passed on as it comes, in flat memory: nothing waits for the end of the line, and nothing is scanned
    twice."""
    sent = b"data: " + PIECE * PIECES + b"\n\n" + DONE
    async with scripted(endless_line) as upstream, fleet(tmp_path, settings_for(upstream.url)) as here:
        assert (await ask(here.port, chat())).clean  # what is loaded late is loaded now
        before, began_at = resident(here.pid), monotonic()
        async with await Caller.connect(here.port) as caller:
            await caller.send(chat())
            answer, digest, most = await caller.head(), hashlib.sha256(), 0
            piece = Answer()
            while data := await caller.piece(piece):
                digest.update(data)
                most = max(most, resident(here.pid))
        took_s = monotonic() - began_at
        assert (answer.status, piece.clean) == (200, True)
        assert digest.digest() == hashlib.sha256(sent).digest()
        assert took_s < 5 * 2.0
        assert most - before < 8 * 2**20
        await until(lambda: len(here.logged("request")) == 2)
        assert here.logged("request")[-1]["reason"] == "complete"
        await here.quiet()


@both
@pytest.mark.parametrize("how", [Caller.leave, Caller.reset], ids=["fin", "rst"])
@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/com", b"POST /v1/files HTTP/1.1\r\nHost: t\r\nX-A"])
async def test_a_caller_that_leaves_in_its_head(way: Way, how: object, sent: bytes) -> None:
    """There is no request yet: nothing is told of it, nothing is kept, and nobody is asked."""
    assert callable(how)
    async with lab(plays(hold), way) as it:
        before = await connections(it, 0)
        caller = await Caller.connect(it.port)
        await caller.send(sent)
        await connections(it, 1)
        how(caller)
        assert await connections(it, 0) == before
        assert it.headrace.log_lines() == []
        assert it.upstream.connections == 0


async def connections(it: Lab, count: int) -> int:
    """Waits until so many callers are connected."""
    runner = it.headrace.server._runner
    assert runner is not None
    listener = runner.listener
    assert listener is not None
    await until(lambda: listener.open == count)
    return listener.open


@pytest.mark.parametrize(("write_s", "limit_ms"), [(60, 65_000), (5, 30_000)])
async def test_what_the_kernel_is_told(write_s: float, limit_ms: int) -> None:
    """A caller that vanishes without a FIN is given up by the kernel, never before `timeouts.write` has ended
    it (only a lost network would show that); and it takes no more than 128 KB ahead for a slow reader."""
    async with (
        lab(plays(response(200, b"{}")), Way(push=True), timeouts={"write": write_s}) as it,
        await Caller.connect(it.port) as caller,
    ):
        assert (await caller.ask(chat(stream=False))).status == 200
        runner = it.headrace.server._runner
        assert runner is not None
        assert runner.listener is not None
        (connection,) = runner.listener.connections
        assert connection.transport is not None
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == limit_ms
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 2**17
