"""Ends that are decided here: kills, timers after backpressure, resets for callers without framing."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
import trustme

from tests.kit.callers import Caller, ask, chat, everything, post
from tests.kit.headrace import running, settings_for, until
from tests.kit.lab import Lab, Way, both, hold, lab, plays
from tests.kit.upstreams import DONE, END, HEAD, Call, chunk, event, scripted

A = event("a")


async def kill_the_only_one(it: Lab) -> None:
    (stream,) = it.headrace.server.streams()
    assert it.headrace.server.kill(stream["id"])


@both
async def test_a_kill_inside_an_event(way: Way) -> None:
    """Half an event is never followed by an event of ours: only the abort."""
    async with lab(plays(HEAD + chunk(A + A[:20]), hold), way) as it, asyncio.timeout(10):
        caller = await Caller.connect(it.port)
        await caller.send(chat())
        answer = await caller.head()
        await caller.piece(answer)
        await kill_the_only_one(it)
        await caller.rest(answer)
        assert answer.body == A + A[:20]
        assert not answer.clean
        await it.ended("killed")
        caller.leave()


@both
async def test_a_kill_between_events(way: Way) -> None:
    """Between two events the caller is told."""
    async with lab(plays(HEAD + chunk(A), hold), way) as it, asyncio.timeout(10):
        caller = await Caller.connect(it.port)
        await caller.send(chat())
        answer = await caller.head()
        await caller.piece(answer)
        await kill_the_only_one(it)
        await caller.rest(answer)
        assert b'"error"' in answer.body
        assert not answer.clean
        await it.ended("killed")
        caller.leave()


@both
async def test_a_kill_inside_a_json_answer(way: Way) -> None:
    """A long JSON answer that is killed stays short: nothing of ours fills its length up."""
    body = json.dumps({"x": "y" * 200_000}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with lab(plays(head + body[:150_000], hold), way) as it, asyncio.timeout(10):
        caller = await Caller.connect(it.port)
        await caller.send(chat(stream=False))
        answer = await caller.head()
        await until(lambda: bool(it.headrace.server.streams()[0]["phase"] == "answer"))
        await kill_the_only_one(it)
        await caller.rest(answer)
        assert not answer.clean
        assert body.startswith(answer.body)
        await it.ended("killed")
        caller.leave()


async def test_timers_go_on_after_backpressure() -> None:
    """A reader that was slow for a while does not switch the idle timer off."""
    flood = event("x" * 60_000)

    async def script(call: Call) -> None:
        await call.send(HEAD)
        for _ in range(150):
            await call.send(chunk(flood))
        await hold(call)

    settings = {"upstream": {"timeouts": {"idle": 0.5, "total": 60}}}
    async with lab(script, Way(push=True), **settings) as it, asyncio.timeout(20):
        caller = await Caller.connect(it.port, receive_buffer=131_072)
        await caller.send(chat())
        await until(lambda: it.headrace.state["streams"] == 1)
        await until(lambda: any(ctx.phase == "stream" for ctx in it.headrace.server.core.running))
        await asyncio.sleep(0.7)  # longer than idle: the silence is the reader's
        assert it.headrace.state["streams"] == 1
        answer = await caller.rest(await caller.head())
        assert not answer.clean
        await it.ended("upstream_stall")
        caller.leave()


async def test_a_slow_reader_without_framing_gets_a_reset() -> None:
    """HTTP/1.0: even if the reader is behind when the stream breaks, its end is no clean one."""
    flood = event("x" * 60_000)
    async with lab(plays(HEAD, *[chunk(flood)] * 8, Call.close), Way(push=True)) as it, asyncio.timeout(20):
        answer = await everything(it.port, chat(version="1.0"))
        assert answer.reset
        await it.ended("upstream_cut")


@both
async def test_a_json_answer_that_trickles(way: Way) -> None:
    """Blank lines before a JSON body (DeepSeek's keep-alive) keep the idle timer quiet."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    steps = [part for _ in range(6) for part in (chunk(b"\n"), 0.15)]
    script = plays(head, *steps, chunk(b'{"id":"x"}'), END)
    async with lab(script, way, upstream={"timeouts": {"idle": 0.5}}) as it:
        answer = await ask(it.port, chat(stream=False))
        assert answer.status == 200
        assert answer.body.strip() == b'{"id":"x"}'
        await it.ended("complete")


@both
async def test_an_error_before_the_terminator(way: Way) -> None:
    """An in-band error counts although [DONE] follows and the upstream stays open."""
    said = b'data: {"error":{"message":"no","type":"server_error"}}\n\n'
    async with lab(plays(HEAD, chunk(A), chunk(said), chunk(DONE), hold), way) as it:
        answer = await ask(it.port, chat())
        assert answer.body == A + said + DONE
        assert answer.clean
        await it.ended("upstream_error")


async def test_stale_connections_in_a_row() -> None:
    """The second attempt never draws another connection from the pool."""
    requests = 0

    async def script(call: Call) -> None:
        nonlocal requests
        requests += 1
        if requests > 3 and call.writer in old:
            call.reset()
            return
        if requests <= 3:
            old.append(call.writer)
            await gate.wait()
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")

    old: list[object] = []
    gate = asyncio.Event()
    async with lab(script, Way(push=True), retry={"attempts": 2}) as it, asyncio.timeout(10):
        asked = asyncio.gather(*(ask(it.port, chat(stream=False)) for _ in range(3)))
        await until(lambda: requests == 3)
        gate.set()
        await asked
        assert it.headrace.state["upstream_idle"] == 3
        answer = await ask(it.port, chat(stream=False))
        assert answer.status == 200
        assert answer.headers["x-headrace-attempts"] == "2"


async def test_without_open_mode_nobody_passes() -> None:
    """`auth.mode: required` is the default: as long as there are no keys, everybody gets the one 401."""
    async with scripted(hold) as upstream:
        settings = settings_for(upstream.url, auth={"mode": "required"})
        async with running(settings) as headrace:
            for request in (chat(), chat("Authorization: Bearer hr_x_y"), post("/v1/messages", {})):
                answer = await ask(headrace.port, request)
                assert answer.status == 401
                assert answer.headers["www-authenticate"] == "Bearer"
            assert (await ask(headrace.port, b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")).status == 200
        assert not upstream.calls


async def test_silent_tls_callers_are_timed() -> None:
    """A TLS handshake that does not happen ends with `timeouts.header`."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    with (
        certificate.cert_chain_pems[0].tempfile() as cert,
        certificate.private_key_pem.tempfile() as key,
    ):
        settings = settings_for("mock:", tls={"cert": cert, "key": key}, timeouts={"header": 0.3})
        async with running(settings) as headrace, asyncio.timeout(5):
            caller = await Caller.connect(headrace.port)
            assert await caller.reader.read() == b""
            caller.leave()


@both
async def test_a_reset_waits_for_who_still_reads(way: Way) -> None:
    """HTTP/1.0, and all of it in the kernel when the stream breaks: a reset at once would take it back."""
    events = b"".join(event(f"{number:05} {'x' * 80}") for number in range(300))
    loop, raw = asyncio.get_running_loop(), bytearray()
    async with lab(plays(HEAD, chunk(events), 0.05, Call.close), way) as it, asyncio.timeout(10):
        with socket.socket() as sock:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(sock, ("127.0.0.1", it.port))
            await loop.sock_sendall(sock, chat(version="1.0"))
            raw += await loop.sock_recv(sock, 1000)
            await asyncio.sleep(0.3)  # it is behind, and the stream has broken
            was_reset = False
            while not was_reset:
                try:
                    raw += await loop.sock_recv(sock, 65536) or pytest.fail("a clean end")
                except ConnectionResetError:
                    was_reset = True
        assert events in raw
        await it.ended("upstream_cut")
