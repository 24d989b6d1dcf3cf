"""The pool of upstream connections and the exchange on one of them: what is used again, and what never."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from proxy import wire, wire_connection
from tests.kit.callers import Answer, Caller, ask, chat, post
from tests.kit.headrace import until
from tests.kit.lab import Gate, Lab, Way, both, everywhere, hold, lab, plays, response
from tests.kit.upstreams import DONE, END, HEAD, Call, chunk, event

pytestmark = pytest.mark.timeout(30)

A, B = event("a"), event("b")
STREAM = HEAD + chunk(A + DONE) + END
SMALL = b'{"id":"x"}'


async def complete(it: Lab, request: bytes, times: int = 1) -> list[Answer]:
    """Requests one after the other, each after the connection of the one before is back."""
    answers = []
    for _ in range(times):
        answers.append(await ask(it.port, request))
        await it.headrace.quiet()
    return answers


# ── the self-check ───────────────────────────────────────────────────────────────────────────────────────


async def test_the_self_check_passes() -> None:
    """This aiohttp's private names mean what the wire thinks; else every stream test tests the public way."""
    assert wire.self_check(asyncio.get_running_loop()) is None
    assert wire_connection.c_parser_loaded()


@pytest.mark.parametrize("name", ["feed_data", "feed_eof"])
async def test_the_self_check_notices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser that feeds its body to something else is found before any stream is lost to it."""
    monkeypatch.delattr(wire_connection._Body, name)
    assert wire.self_check(asyncio.get_running_loop()) is not None


async def test_without_the_wire_it_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the self-check fails, a server that wanted to push pulls, and serves the same bytes."""
    monkeypatch.delattr(wire_connection._Body, "feed_data")
    async with lab(plays(STREAM), Way(push=True)) as it:
        answer = await ask(it.port, chat())
        assert (answer.body, answer.clean) == (A + DONE, True)
        await it.ended("complete")
        assert it.headrace.server._push is False


# ── used again, or not ───────────────────────────────────────────────────────────────────────────────────


@everywhere
@pytest.mark.parametrize("kind", ["stream", "length", "chunked", "error", "empty"])
async def test_a_framed_end_frees_the_connection(way: Way, kind: str) -> None:
    """After an answer that ended by its own framing the next request takes the same connection."""
    chunked = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw = {
        "stream": STREAM,
        "length": response(200, SMALL),
        "chunked": chunked + chunk(SMALL) + END,
        "error": response(500, SMALL),
        "empty": response(200, b""),
    }[kind]
    async with lab(plays(raw), way) as it:
        answers = await complete(it, chat(stream=kind == "stream"), 4)
        assert len({answer.body for answer in answers}) == 1
        assert all(answer.clean for answer in answers)
        assert len(it.upstream.calls) == 4
        assert it.upstream.connections == 1


#: How an answer can go wrong, and what is sent to the caller of it at most.
SPOILT: dict[str, Any] = {
    "fin": (HEAD + chunk(A), Call.close),
    "rst": (HEAD + chunk(A), Call.reset),
    "stall": (HEAD + chunk(A), hold),
    "no end": (HEAD + chunk(A + DONE), hold),
    "bad chunk": (HEAD + chunk(A) + b"zz\r\n", hold),
    "close": (STREAM.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n", 1),),
    "http/1.0": (b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + A + DONE, Call.close),
    "second answer": (STREAM + response(200, b"not asked for"),),
    "rubbish behind": (STREAM + b"rubbish\r\n\r\n",),
    "upgrade": (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", hold),
}


@both
@pytest.mark.parametrize("kind", SPOILT)
async def test_a_spoilt_connection_is_never_used_again(way: Way, kind: str) -> None:
    """A cut, a stall, extra bytes or a wish to close: the next request has a connection of its own."""
    first = plays(*SPOILT[kind])

    async def script(call: Call) -> None:
        if len(it.upstream.calls) == 1:
            await first(call)
        else:
            await call.send(HEAD + chunk(B + DONE) + END)

    async with lab(script, way, upstream={"timeouts": {"idle": 0.3}}) as it:
        spoilt = await ask(it.port, chat())
        assert b"not asked for" not in spoilt.body
        assert b"rubbish" not in spoilt.body
        await it.headrace.quiet()
        await until(lambda: _idle(it) == 0)
        answer = await ask(it.port, chat())
        assert (answer.status, answer.body, answer.clean) == (200, B + DONE, True)
        assert it.upstream.connections == 2


@everywhere
@pytest.mark.parametrize("spoils", [b"x", response(200, b"late"), b"HTTP/1.1 408 Timeout\r\n\r\n"])
async def test_bytes_on_an_idle_connection(way: Way, spoils: bytes) -> None:
    """What comes while nothing was asked closes the connection, and is nobody's answer."""
    gate = Gate()

    async def script(call: Call) -> None:
        await call.send(STREAM)
        if len(it.upstream.calls) == 1:
            await gate(call)
            await call.send(spoils)
            await call.watch()

    async with lab(script, way) as it:
        await complete(it, chat())
        assert it.headrace.state["upstream_idle"] == 1
        gate.open()
        async with asyncio.timeout(2):
            await it.upstream.calls[0].gone.wait()
        assert _idle(it) == 0
        answer = (await complete(it, chat()))[0]
        assert (answer.body, answer.clean) == (A + DONE, True)
        assert it.upstream.connections == 2


@both
async def test_an_upstream_that_closes_an_idle_connection(way: Way) -> None:
    """An idle connection that the upstream ends is forgotten, and nothing is sent on it."""
    gate = Gate()

    async def script(call: Call) -> None:
        await call.send(STREAM)
        if len(it.upstream.calls) == 1:
            await gate(call)
            call.close()

    async with lab(script, way) as it:
        await complete(it, chat())
        gate.open()
        await until(lambda: it.upstream.calls[0].writer.transport.is_closing())
        await until(lambda: _idle(it) == 0)
        assert (await complete(it, chat()))[0].body == A + DONE
        assert it.upstream.connections == 2


@everywhere
async def test_dead_connections_are_not_counted(way: Way) -> None:
    """`upstream_idle` counts connections that could serve a request; one that has ended is none."""
    gate = Gate()
    async with lab(plays(STREAM, gate, Call.close), way) as it:
        await complete(it, chat())
        assert it.headrace.state["upstream_idle"] == 1
        gate.open()
        await until(lambda: _idle(it) == 0)
        assert it.headrace.state["upstream_idle"] == 0


@both
async def test_side_by_side(way: Way) -> None:
    """Requests at the same time never share a connection; afterwards as many are idle, and are used again."""
    gate = Gate()
    async with lab(plays(gate, STREAM), way) as it:
        running = [asyncio.ensure_future(ask(it.port, chat())) for _ in range(10)]
        await it.called(10)
        assert it.upstream.connections == 10
        gate.open()
        assert {answer.body for answer in await asyncio.gather(*running)} == {A + DONE}
        await it.headrace.quiet()
        await complete(it, chat(), 5)
        assert it.upstream.connections == 10


@both
async def test_trailers_are_nobody_elses(way: Way) -> None:
    """What follows an answer's last chunk is no field of the next one on its connection."""
    trailers = STREAM.removesuffix(b"\r\n") + b"x-first: 1\r\nx-last: 2\r\n\r\n"

    async def script(call: Call) -> None:
        await call.send(trailers if len(it.upstream.calls) == 1 else STREAM)

    async with lab(script, way) as it:
        first, second = await complete(it, chat(), 2)
        assert it.upstream.connections == 1
        assert (first.body, second.body) == (A + DONE, A + DONE)
        assert not second.headers.keys() & {"x-first", "x-last"}


# ── pool.* ───────────────────────────────────────────────────────────────────────────────────────────────


@everywhere
async def test_max_age(way: Way) -> None:
    """A connection that is older than `pool.max_age` serves no further request."""
    # On a slow machine the last one becomes too old as well: then `keepalive` closes it.
    async with lab(plays(STREAM), way, upstream={"pool": {"max_age": 0.05, "keepalive": 0.5}}) as it:
        await complete(it, chat())
        born = time.monotonic()
        await until(lambda: time.monotonic() > born + 0.06)
        await complete(it, chat())
        assert it.upstream.connections == 2


@everywhere
async def test_max_age_at_the_end_of_an_answer(way: Way) -> None:
    """A connection that has become too old during its answer is closed after it, not kept."""
    async with lab(
        plays(HEAD, chunk(A), 0.1, chunk(DONE), END), way, upstream={"pool": {"max_age": 0.05}}
    ) as it:
        assert (await complete(it, chat()))[0].clean
        assert it.headrace.state["upstream_idle"] == 0


@both
async def test_young_connections_are_kept(way: Way) -> None:
    """Far below `pool.max_age` one connection does for all."""
    async with lab(plays(STREAM), way, upstream={"pool": {"max_age": 30}}) as it:
        await complete(it, chat(), 5)
        assert it.upstream.connections == 1


@both
async def test_no_keepalive(way: Way) -> None:
    """`pool.keepalive: 0` keeps no connection at all."""

    async def script(call: Call) -> None:
        await call.send(STREAM)
        await call.watch()

    async with lab(script, way, upstream={"pool": {"keepalive": 0}}) as it:
        await complete(it, chat(), 3)
        assert it.upstream.connections == 3
        async with asyncio.timeout(2):
            await asyncio.gather(*(call.gone.wait() for call in it.upstream.calls))
        assert it.headrace.state["upstream_idle"] == 0


@both
async def test_keepalive_ends(way: Way) -> None:
    """An idle connection is closed about `pool.keepalive` seconds after its last answer."""

    async def script(call: Call) -> None:
        await call.send(STREAM)
        await call.watch()

    async with lab(script, way, upstream={"pool": {"keepalive": 0.2}}) as it:
        await complete(it, chat())
        async with asyncio.timeout(2):
            await it.upstream.calls[0].gone.wait()
        await until(lambda: it.headrace.state["upstream_idle"] == 0)


# ── heads ────────────────────────────────────────────────────────────────────────────────────────────────

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nX-Interim: 1\r\n\r\n"


@everywhere
@pytest.mark.parametrize("interim", [CONTINUE, HINTS, CONTINUE + HINTS * 2], ids=["100", "103", "three"])
@pytest.mark.parametrize("together", [True, False])
async def test_interim_answers(way: Way, interim: bytes, together: bool) -> None:
    """Interim answers stop here; the real one behind them is the answer, and the connection stays good."""
    script = plays(interim + STREAM) if together else plays(interim, 0.02, STREAM)
    async with lab(script, way) as it:
        for answer in await complete(it, chat(), 2):
            assert (answer.status, answer.body, answer.clean) == (200, A + DONE, True)
            assert "x-interim" not in answer.headers
        assert it.upstream.connections == 1


@both
async def test_a_head_byte_by_byte(way: Way) -> None:
    """An answer that arrives in writes of one byte is the same answer."""

    async def script(call: Call) -> None:
        call.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(STREAM)):
            call.writer.write(STREAM[at : at + 1])
            await asyncio.sleep(0)
        await call.writer.drain()

    async with lab(script, way) as it:
        for answer in await complete(it, chat(), 2):
            assert (answer.status, answer.body, answer.clean) == (200, A + DONE, True)
        assert it.upstream.connections == 1


@both
async def test_an_answer_before_the_whole_request(way: Way) -> None:
    """An upstream that refuses a large body without reading it: its answer passes, its connection does not
    serve again."""
    refusal = response(413, b'{"error":{"message":"too large"}}')
    done, closed = asyncio.Event(), asyncio.Event()

    async def impatient(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(refusal)
        await done.wait()
        writer.close()
        closed.set()

    server = await asyncio.start_server(impatient, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with lab(plays(hold), way, upstream={"base_url": f"http://127.0.0.1:{port}/v1"}) as it:
        try:
            answer = await ask(it.port, chat(padding="x" * 16_000_000))
            assert answer.status == 413
            await it.ended("complete")
            assert _idle(it) == 0
        finally:
            done.set()
            server.close()
            async with asyncio.timeout(5):
                await closed.wait()


# ── large answers ────────────────────────────────────────────────────────────────────────────────────────


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@both
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_large_answer_is_piped(way: Way, framing: str) -> None:
    """64 MB that are no stream go through in pieces: whole, and never all at once in memory."""
    piece, count = b"0123456789abcdef" * 2**14, 256
    size = len(piece) * count
    fields = f"Content-Length: {size}" if framing == "length" else "Transfer-Encoding: chunked"
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{fields}\r\n\r\n".encode()

    async def script(call: Call) -> None:
        await call.send(head)
        for _ in range(count):
            await call.send(chunk(piece) if framing == "chunked" else piece)
        if framing == "chunked":
            await call.send(END)

    async with (
        lab(script, way) as it,
        asyncio.timeout(20),
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(chat(stream=False))
        answer = await caller.head()
        assert answer.headers.get("content-length") == (str(size) if framing == "length" else None)
        before = most = resident_mb()
        got = 0
        while got < size:
            if framing == "chunked":
                data = await caller.piece(Answer())
            else:
                data = await caller.reader.read(2**18)
            assert data
            phase = got % 16
            assert data[:16] == (b"0123456789abcdef" * 2)[phase : phase + 16][: len(data)]
            got += len(data)
            most = max(most, resident_mb())
        assert got == size
        assert most - before < 30, f"{before:.0f} MB grew to {most:.0f} MB"
        line = await it.ended("complete")
        assert line["bytes_out"] == size


@both
@pytest.mark.alone
@pytest.mark.parametrize("framing", [pytest.param("length", marks=pytest.mark.slow), "chunked"])
async def test_speech_for_a_slow_listener(way: Way, framing: str) -> None:
    """100 MB of audio for a reader that first takes nothing: the upstream has to wait, memory stays flat, and
    every byte arrives."""
    piece, count = random.Random(7).randbytes(2**20), 100
    size = len(piece) * count
    fields = f"Content-Length: {size}" if framing == "length" else "Transfer-Encoding: chunked"
    head = f"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\n{fields}\r\n\r\n".encode()
    sent = 0

    async def script(call: Call) -> None:
        nonlocal sent
        await call.send(head)
        for _ in range(count):
            await call.send(chunk(piece) if framing == "chunked" else piece)
            sent += len(piece)
        if framing == "chunked":
            await call.send(END)

    def stands_still() -> bool:
        nonlocal seen, since
        if sent != seen:
            seen, since = sent, time.monotonic()
        return time.monotonic() > since + 0.3

    async with (
        lab(script, way) as it,
        asyncio.timeout(25),
        await Caller.connect(it.port, receive_buffer=2**17) as caller,
    ):
        before = resident_mb()
        await caller.send(post("/v1/audio/speech", {"model": "m", "input": "x"}))
        seen, since = 0, time.monotonic()
        await until(stands_still, 15)
        assert 0 < sent < size / 2, "nobody held the upstream back"
        answer = await caller.head()
        assert answer.headers["content-type"] == "audio/mpeg"
        digest, most = hashlib.blake2b(), resident_mb()
        left = size
        while left:
            data = await (caller.piece(Answer()) if framing == "chunked" else caller.reader.read(2**18))
            assert data
            digest.update(data)
            left -= len(data)
            most = max(most, resident_mb())
        expected = hashlib.blake2b()
        for _ in range(count):
            expected.update(piece)
        assert digest.digest() == expected.digest()
        assert most - before < 40, f"{before:.0f} MB grew to {most:.0f} MB"
        if framing == "chunked":
            assert await caller.piece(Answer()) == b""
        line = await it.ended("complete")
        assert line["bytes_out"] == size


def _idle(it: Lab) -> int:
    core = it.headrace.server.core
    assert core is not None
    return core.upstreams["up"].connections()[1]
