"""Uploads on their way to an upstream: whole, held back, bounded, timed, left alone, answered early."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import socket
import ssl
import struct
import termios
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import cast

import pytest

from proxy import schema
from proxy.errors import UpstreamStale
from proxy.form import WINDOW_BYTES
from proxy.upstream import Upstream
from tests.kit.callers import Caller
from tests.kit.headrace import until
from tests.kit.lab import authority, response, server_context
from tests.kit.uploads import BOUNDARY, Door, Receipt, chunked, door, form, head, part, receiving

pytestmark = pytest.mark.timeout(30)

both = pytest.mark.parametrize("push", [True, False], ids=["push", "pull"])
#: Contract section 6, rule 4.
WITHIN_S = 1.0
DONE = response(200, b'{"id":"file-1"}')
#: More than all socket buffers on the way can hold.
MUCH = 32 * 2**20


async def takes_all(call: Receipt) -> None:
    await call.all()
    await call.send(DONE)


class Stubborn:
    """A script that neither reads nor answers until it is told to read."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()

    async def __call__(self, call: Receipt) -> None:
        transport = cast(asyncio.Transport, call.writer.transport)  # uvloop's is no subclass
        transport.pause_reading()  # StreamReader reads ahead
        await self.reads.wait()
        transport.resume_reading()
        await takes_all(call)


def is_closed(sock: socket.socket) -> bool:
    """Has the other side closed or reset this connection? CLOSE_WAIT is 8, CLOSE 7 (linux/tcp_states.h)."""
    if sock.fileno() < 0:
        return True
    state: int = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state in (7, 8)


def unsent(caller: Caller) -> int:
    """Bytes that the caller's kernel still holds."""
    raw = fcntl.ioctl(caller.writer.get_extra_info("socket").fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
    return int(struct.unpack("i", raw)[0])


def quiet(it: Door) -> bool:
    """Is nothing left of any upload: no handler, no task, no counted byte, nobody watched?"""
    if any(upload._incoming._gone is not None for upload in it.uploads):
        return False
    tasks = {task.get_name() for task in asyncio.all_tasks()}
    return not it.running and not it.core.bodies.held and not tasks & {"upload", "upstream request"}


async def was_cut(call: Receipt, stubborn: Stubborn, *, push: bool) -> None:
    """The upstream never sees an end: at once, over the public way when it reads again."""
    if push:
        await until(lambda: is_closed(call.writer.get_extra_info("socket")), WITHIN_S)
    stubborn.reads.set()
    async with asyncio.timeout(5):
        await call.gone.wait()
    assert not call.whole


async def fill(caller: Caller) -> int:
    """Sends until nobody takes any more; how much that was."""
    sent, piece = 0, b"x" * 2**18
    caller.writer.transport.set_write_buffer_limits(high=0)
    while sent < MUCH:
        caller.writer.write(piece)
        sent += len(piece)
        try:
            await asyncio.wait_for(caller.writer.drain(), 0.3)
        except TimeoutError:
            break
    return sent


# ── whole ────────────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("size", [0, 1, 1000, WINDOW_BYTES - 400, WINDOW_BYTES, 3_000_000])
async def test_unchanged(push: bool, framing: str, size: int) -> None:
    """Every byte arrives, framed as the caller framed it; what was in the window whole has a length."""
    body = form(size)
    async with receiving(takes_all) as upstream, door(upstream.url, push=push) as it:
        async with await Caller.connect(it.port) as caller:
            for _ in range(2):
                if framing == "length":
                    answer = await caller.ask(head(len(body)) + body)
                else:
                    answer = await caller.ask(head(None) + chunked(body))
                assert (answer.status, answer.body) == (200, b'{"id":"file-1"}')
        call = upstream.calls[-1]
        assert call.body == body
        known = framing == "length" or len(body) < WINDOW_BYTES
        assert call.fields.get("content-length") == (str(len(body)) if known else None)
        assert call.fields.get("transfer-encoding") == (None if known else "chunked")
        assert call.fields["content-type"] == f"multipart/form-data; boundary={BOUNDARY}"
        assert it.contexts[-1].bytes_in == len(body)
        assert upstream.connections == 1
        await until(lambda: quiet(it))


@both
async def test_byte_by_byte(push: bool) -> None:
    """The cuts between reads do not matter."""
    body = form(300)
    async with receiving(takes_all) as upstream, door(upstream.url, push=push) as it:
        async with await Caller.connect(it.port) as caller:
            caller.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await caller.send(head(len(body)))
            for at in range(len(body)):
                await caller.send(body[at : at + 1])
                await asyncio.sleep(0)
            assert (await caller.rest(await caller.head())).status == 200
        assert upstream.calls[0].body == body


@both
async def test_no_body(push: bool) -> None:
    async with receiving(takes_all) as upstream, door(upstream.url, push=push) as it:
        async with await Caller.connect(it.port) as caller:
            assert (await caller.ask(head(0))).status == 200
        assert upstream.calls[0].fields["content-length"] == "0"
        assert it.uploads[0].model is None


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("name", ["a", "a-much-longer-name", "ü"])
@pytest.mark.parametrize(("size", "framing"), [(100, "length"), (500_000, "length"), (500_000, "chunked")])
async def test_another_name(push: bool, name: str, size: int, framing: str) -> None:
    """The upstream's own name for the model is in the form, and the length fits."""
    body, expected = form(size), form(size, model=name)
    async with receiving(takes_all) as upstream, door(upstream.url, push=push, model=name) as it:
        async with await Caller.connect(it.port) as caller:
            raw = head(len(body)) + body if framing == "length" else head(None) + chunked(body)
            assert (await caller.ask(raw)).status == 200
        assert it.uploads[0].model == "m"
        call = upstream.calls[0]
        assert call.body == expected
        if framing == "length":
            assert call.fields["content-length"] == str(len(expected))


@both
async def test_a_model_behind_the_window(push: bool) -> None:
    """Not looked for: the form goes as it is."""
    body = form(WINDOW_BYTES, last=True)
    async with receiving(takes_all) as upstream, door(upstream.url, push=push, model="other") as it:
        async with await Caller.connect(it.port) as caller:
            assert (await caller.ask(head(len(body)) + body)).status == 200
        assert it.uploads[0].model is None
        assert upstream.calls[0].body == body


@both
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_second_model_behind_the_window(push: bool, framing: str) -> None:
    """A caller that may use one model cannot slip in another one: no upstream gets a whole form."""
    body = part("model", b"m") + part("file", b"x" * 300_000) + part("model", b"dear") + part("a", b"b" * 99)
    async with receiving(takes_all) as upstream, door(upstream.url, push=push) as it:
        async with await Caller.connect(it.port) as caller:
            raw = head(len(body)) + body if framing == "length" else head(None) + chunked(body)
            answer = await caller.ask(raw)
            assert (answer.status, answer.body) == (400, b"duplicate_key")
        await until(lambda: quiet(it))
        async with asyncio.timeout(5):
            for call in upstream.calls:
                await call.gone.wait()
                assert not call.whole


@both
@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 415),
        ("multipart/mixed; boundary=a", 415),
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=other", 400),
        (f"multipart/form-data; boundary={BOUNDARY}\r\nContent-Type: text/plain", 400),
    ],
)
async def test_no_form(push: bool, content_type: str, status: int) -> None:
    """Refused before any upstream is asked."""
    body = form(10)
    async with receiving(takes_all) as upstream, door(upstream.url, push=push) as it:
        async with await Caller.connect(it.port) as caller:
            assert (await caller.ask(head(len(body), content_type=content_type) + body)).status == status
        assert upstream.connections == 0
        await until(lambda: quiet(it))


# ── bounds ───────────────────────────────────────────────────────────────────────────────────────────────


@both
async def test_declared_too_large(push: bool) -> None:
    """413 before a byte of it is read, and no 100 Continue."""
    async with (
        receiving(takes_all) as upstream,
        door(upstream.url, push=push, max_upload_bytes=100_000) as it,
        await Caller.connect(it.port) as caller,
    ):
        answer = await caller.ask(head(100_001, "Expect: 100-continue"))
        assert (answer.status, answer.body) == (413, b"request_too_large")
        assert upstream.connections == 0


@both
@pytest.mark.parametrize("over", [0, 1])
async def test_too_large_without_a_length(push: bool, over: int) -> None:
    """413 as soon as it passes the limit; the upstream never gets the end."""
    body = form(500_000)
    async with (
        receiving(takes_all) as upstream,
        door(upstream.url, push=push, max_upload_bytes=len(body) - over) as it,
        await Caller.connect(it.port) as caller,
    ):
        answer = await caller.ask(head(None) + chunked(body))
        assert answer.status == (413 if over else 200)
        await until(lambda: quiet(it))
        if over:
            async with asyncio.timeout(5):
                await upstream.calls[0].gone.wait()
            assert not upstream.calls[0].whole


@both
async def test_all_bodies_together(push: bool) -> None:
    """The window counts among the held bodies, the rest does not; without room for it 503."""
    body = form(1_000_000)
    async with (
        receiving(takes_all) as upstream,
        door(upstream.url, push=push, max_buffered_bytes=WINDOW_BYTES) as it,
    ):
        async with await Caller.connect(it.port) as caller:
            assert (await caller.ask(head(len(body)) + body)).status == 200
        await until(lambda: quiet(it))
        it.core.bodies.take(1)
        async with await Caller.connect(it.port) as caller:
            answer = await caller.ask(head(len(body)) + body)
            assert (answer.status, answer.body) == (503, b"overloaded")
        assert it.core.bodies.held == 1
        assert upstream.connections == 1


@both
@pytest.mark.parametrize("sent", [0, 300, 200_000])
async def test_no_progress(push: bool, sent: int) -> None:
    """408 after `timeouts.body` without a byte, before or behind the window."""
    body = form(300_000)
    async with (
        receiving(takes_all) as upstream,
        door(upstream.url, push=push, timeouts={"body": 0.2}) as it,
        await Caller.connect(it.port) as caller,
    ):
        answer = await caller.ask(head(len(body)) + body[:sent])
        assert (answer.status, answer.body) == (408, b"request_timeout")
        await until(lambda: quiet(it))
        assert len(upstream.calls) == (sent > WINDOW_BYTES)
        assert not any(call.whole for call in upstream.calls)


@both
@pytest.mark.alone
async def test_slow_but_steady(push: bool) -> None:
    """Three times as long as `timeouts.body` and as `first_byte`, but never silent for as long: not cut."""
    body = form(300_000)
    step = len(body) // 15
    async with (
        receiving(takes_all) as upstream,
        door(
            upstream.url, push=push, timeouts={"body": 0.5}, upstream={"timeouts": {"first_byte": 0.5}}
        ) as it,
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(head(len(body)))
        for at in range(0, len(body), step):
            await caller.send(body[at : at + step])
            await asyncio.sleep(0.1)
        assert (await caller.rest(await caller.head())).status == 200
        assert upstream.calls[0].body == body


@both
async def test_a_caller_slower_than_the_first_byte_timer(push: bool) -> None:
    """The pause is the caller's: the upstream owes nothing yet."""
    body = form(300_000)
    async with (
        receiving(takes_all) as upstream,
        door(upstream.url, push=push, upstream={"timeouts": {"first_byte": 0.1}}) as it,
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(head(len(body)) + body[:200_000])
        await asyncio.sleep(0.4)
        await caller.send(body[200_000:])
        assert (await caller.rest(await caller.head())).status == 200


@both
async def test_an_upstream_that_takes_nothing(push: bool) -> None:
    """It owes progress: 504 after `first_byte` without any."""
    stubborn = Stubborn()
    async with (
        receiving(stubborn) as upstream,
        door(upstream.url, push=push, upstream={"timeouts": {"first_byte": 0.3}}) as it,
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(head(MUCH) + form(1000)[:-50])
        filling = asyncio.ensure_future(fill(caller))
        answer = await caller.rest(await caller.head())
        assert (answer.status, answer.body) == (504, b"upstream_timeout")
        await until(lambda: bool(upstream.calls))
        filling.cancel()
        await asyncio.gather(filling, return_exceptions=True)
        await until(lambda: quiet(it))
        await was_cut(upstream.calls[0], stubborn, push=push)


@both
async def test_a_broken_body(push: bool) -> None:
    """A chunk that is none, behind the window. aiohttp's parser does not tell who reads the body, so it ends
    with the timer; the upstream gets no end."""
    body = chunked(form(200_000), 100_000)[:150_000]
    async with (
        receiving(takes_all) as upstream,
        door(upstream.url, push=push, timeouts={"body": 0.3}) as it,
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(head(None) + body)
        await until(lambda: bool(upstream.calls))
        await caller.send(b"x" * 100_000)
        answer = await caller.rest(await caller.head())
        assert answer.status == 408
        await until(lambda: quiet(it))
        async with asyncio.timeout(5):
            await upstream.calls[0].gone.wait()
        assert not upstream.calls[0].whole


@both
async def test_expect(push: bool) -> None:
    """A caller that asks first is told to go on, once."""
    body = form(200_000)
    async with (
        receiving(takes_all) as upstream,
        door(upstream.url, push=push) as it,
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(head(len(body), "Expect: 100-continue"))
        assert await caller.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await caller.send(body)
        assert (await caller.rest(await caller.head())).status == 200
        assert upstream.calls[0].body == body
        assert "expect" not in upstream.calls[0].fields


# ── backpressure ─────────────────────────────────────────────────────────────────────────────────────────


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@both
async def test_held_back(push: bool) -> None:
    """While the upstream takes nothing, little is taken from the caller; then everything arrives."""
    stubborn = Stubborn()
    total = MUCH + 2**20
    first = part("model", b"m") + f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="f"\r\n\r\n'.encode()

    async with (
        receiving(stubborn) as upstream,
        door(upstream.url, push=push) as it,
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(head(total) + first)
        sent = len(first) + await fill(caller)
        assert sent < MUCH, "nobody held the caller back"
        taken = it.contexts[0].bytes_in
        await asyncio.sleep(0.1)
        assert it.contexts[0].bytes_in == taken
        assert it.core.bodies.held <= WINDOW_BYTES
        stubborn.reads.set()
        piece = b"y" * 2**18
        while sent < total:
            await caller.send(piece[: total - sent])
            sent += min(len(piece), total - sent)
        assert (await caller.rest(await caller.head())).status == 200
        assert upstream.calls[0].received == total


# An upload takes the same way in, however it goes on: the three others are for test-all.
@pytest.mark.alone
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("push", "framing"),
    [
        pytest.param(True, "length", id="push-length"),
        *(
            pytest.param(push, framing, id=f"{name}-{framing}", marks=pytest.mark.slow)
            for push, name, framing in (
                (True, "push", "chunked"),
                (False, "pull", "length"),
                (False, "pull", "chunked"),
            )
        ),
    ],
)
async def test_512_megabytes(push: bool, framing: str) -> None:
    """The largest upload that is allowed: every byte, and no more memory than a small one."""
    size = 2**29
    digests = [hashlib.blake2b(), hashlib.blake2b()]

    async def digest(call: Receipt) -> None:
        while data := await call.piece():
            digests[0].update(data)
        await call.send(DONE)

    file_head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n'.encode()
    pieces = [part("model", b"m") + file_head, f"\r\n--{BOUNDARY}--\r\n".encode()]
    piece = bytes(range(256)) * 1024
    left = size - sum(map(len, pieces))
    async with (
        receiving(digest) as upstream,
        door(upstream.url, push=push) as it,
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(head(size if framing == "length" else None))
        before = most = resident_mb()

        async def send(data: bytes) -> None:
            digests[1].update(data)
            await caller.send(data if framing == "length" else b"%x\r\n%b\r\n" % (len(data), data))

        await send(pieces[0])
        while left:
            data = piece[: min(left, len(piece))]
            await send(data)
            left -= len(data)
            most = max(most, resident_mb())
        await send(pieces[1])
        if framing == "chunked":
            await caller.send(b"0\r\n\r\n")
        assert (await caller.rest(await caller.head())).status == 200
        assert upstream.calls[0].received == size == it.contexts[0].bytes_in
        assert digests[0].digest() == digests[1].digest()
        assert most - before < 30, f"{before:.0f} MB grew to {most:.0f} MB"


# ── callers that leave ───────────────────────────────────────────────────────────────────────────────────


leaves = pytest.mark.parametrize("leave", [Caller.leave, Caller.reset], ids=["fin", "rst"])
Leave = Callable[[Caller], None]


@both
@leaves
@pytest.mark.parametrize("sent", [300, 200_000])
async def test_leaving_while_it_flows(push: bool, leave: Leave, sent: int) -> None:
    """The upstream has its connection closed at once and never sees an end."""
    body = form(400_000)
    async with receiving(takes_all) as upstream, door(upstream.url, push=push) as it:
        async with await Caller.connect(it.port) as caller:
            await caller.send(head(len(body)) + body[:sent])
            await until(lambda: bool(it.contexts) and it.contexts[0].bytes_in == sent)
            if sent > WINDOW_BYTES:
                await until(lambda: bool(upstream.calls))
            leave(caller)
            async with asyncio.timeout(WITHIN_S):
                for call in upstream.calls:
                    await call.gone.wait()
        await until(lambda: quiet(it))
        assert it.cancelled == 1
        assert not any(call.whole for call in upstream.calls)
        assert len(upstream.calls) == (sent > WINDOW_BYTES)


@both
@leaves
async def test_leaving_while_it_is_held_back(push: bool, leave: Leave) -> None:
    """Nobody reads from the caller, so the loop sees neither FIN nor RST: it is noticed all the same."""
    stubborn = Stubborn()
    async with receiving(stubborn) as upstream, door(upstream.url, push=push) as it:
        async with await Caller.connect(it.port) as caller:
            await caller.send(head(MUCH) + form(WINDOW_BYTES)[:-50])
            await until(lambda: bool(it.uploads and upstream.calls))
            transport = await paused(it, caller)
            # Nothing of it may be left in the caller's kernel: a FIN behind bytes that we have no room for
            # is not sent.
            await until(lambda: unsent(caller) == 0)
            assert not transport.is_reading()
            leave(caller)
            await until(lambda: quiet(it), WITHIN_S)
        assert it.cancelled == 1
        await was_cut(upstream.calls[0], stubborn, push=push)


async def paused(it: Door, caller: Caller) -> asyncio.ReadTransport:
    """Sends small pieces until the listener has stopped reading."""
    transport = it.uploads[0]._incoming._request.transport
    assert transport is not None
    for _ in range(MUCH // 16384):
        if not transport.is_reading():
            break
        await caller.send(b"x" * 16384)
        await asyncio.sleep(0)
    return transport


# ── early answers ────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("size", [300_000, MUCH])
async def test_an_answer_before_the_whole_body(push: bool, size: int) -> None:
    """A refusal passes while the body is still being sent; the connection does not serve again."""
    gates = [asyncio.Event(), asyncio.Event()]

    async def refuses(call: Receipt) -> None:
        if len(upstream.calls) == 1:
            await call.send(response(413, b"too large"))
            gates[0].set()
            await call.watch()
            call.close()
        else:
            await takes_all(call)

    async with receiving(refuses) as upstream, door(upstream.url, push=push) as it:
        async with await Caller.connect(it.port) as caller:
            await caller.send(head(size) + form(150_000)[:-50])
            await gates[0].wait()
            answer = await caller.rest(await caller.head())
            assert (answer.status, answer.body) == (413, b"too large")
        await until(lambda: quiet(it))
        async with asyncio.timeout(WITHIN_S):
            await upstream.calls[0].gone.wait()
        body = form(100)
        async with await Caller.connect(it.port) as caller:
            assert (await caller.ask(head(len(body)) + body)).status == 200
        assert upstream.connections == 2


@pytest.mark.parametrize("how", [Receipt.close, Receipt.reset])
async def test_a_refusal_and_a_close_at_once(how: Callable[[Receipt], None]) -> None:
    """An upstream that answers and closes with bytes unread resets the connection: a write to it would
    destroy the answer that is already here."""

    async def refuses(call: Receipt) -> None:
        await call.piece()
        call.writer.write(response(401, b"no"))
        how(call)

    body = form(8_000_000)
    async with receiving(refuses) as upstream, door(upstream.url, push=True) as it:
        for _ in range(20):
            async with await Caller.connect(it.port) as caller:
                asking = asyncio.ensure_future(caller.send(head(len(body)) + body))
                answer = await caller.rest(await caller.head())
                assert (answer.status, answer.body) == (401, b"no")
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
        assert len(upstream.calls) == 20
        await until(lambda: quiet(it))


class Trap:
    """An upload whose second piece comes after `spring` was called, without the loop having run since."""

    length = 2_000_000
    waiting = False

    def __init__(self, spring: Callable[[], None]) -> None:
        self._spring = spring
        self.given = 0

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        for at in range(self.length // 1000):
            if at == 1:
                self._spring()
            self.given += 1000
            yield b"x" * 1000


class Peer:
    """An upstream whose socket the test itself holds: what it does is done when the call returns."""

    def __init__(self) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.listener.setblocking(False)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self.sock: socket.socket | None = None

    async def accept(self) -> None:
        self.sock, _ = await asyncio.get_running_loop().sock_accept(self.listener)

    async def head(self) -> None:
        assert self.sock is not None
        await asyncio.get_running_loop().sock_recv(self.sock, 2**16)

    def send(self, data: bytes) -> None:
        assert self.sock is not None
        assert self.sock.send(data) == len(data)

    def reset(self) -> None:
        assert self.sock is not None
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


@asynccontextmanager
async def peer() -> AsyncIterator[tuple[Peer, Upstream]]:
    it = Peer()
    upstream = Upstream("up", schema.Upstream(base_url=it.url), it.url, push=True)
    try:
        yield it, upstream
    finally:
        await upstream.close()
        it.listener.close()
        if it.sock is not None:
            it.sock.close()


async def test_an_answer_and_a_reset_before_a_write() -> None:
    """Both are in our kernel and the loop has not looked: the next piece is not written before it has."""
    async with peer() as (it, upstream):

        def refuse() -> None:
            it.send(response(413, b"too large"))
            it.reset()

        exchange = upstream.exchange("POST", "/files", b"", trap := Trap(refuse))
        accepting = asyncio.ensure_future(it.accept())
        await exchange.send()
        await accepting
        try:
            assert await exchange.hold(100, monotonic() + 5)
            assert (exchange.status, exchange.taken()[0]) == (413, b"too large")
            assert trap.given <= 2000
        finally:
            exchange.close()


async def test_a_pooled_connection_that_has_died() -> None:
    """Nothing of the body is given to it, so another connection may still get all of it."""
    async with peer() as (it, upstream):
        first = upstream.exchange("POST", "/files", b"", b"")
        accepting = asyncio.ensure_future(it.accept())
        await first.send()
        await accepting
        await it.head()
        it.send(response(200, b"ok"))
        assert await first.hold(2, monotonic() + 5)
        assert await first.hold(3, monotonic() + 5)
        first.close()
        exchange = upstream.exchange("POST", "/files", b"", trap := Trap(lambda: None))
        it.reset()
        await exchange.send()
        try:
            assert exchange.reused
            with pytest.raises(UpstreamStale):
                await exchange.hold(1, monotonic() + 5)
            assert trap.given == 0
        finally:
            exchange.close()


@both
async def test_an_answer_that_grows_with_the_body(push: bool) -> None:
    """A success that begins early does not end the upload."""

    async def echoes(call: Receipt) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        while data := await call.piece():
            await call.send(data)

    body = form(1_000_000)
    async with receiving(echoes) as upstream, door(upstream.url, push=push) as it:
        async with await Caller.connect(it.port) as caller:
            answer = await caller.ask(head(len(body)) + body)
            assert (answer.status, answer.body) == (200, body)
        assert upstream.calls[0].whole


# ── over TLS ─────────────────────────────────────────────────────────────────────────────────────────────


async def connect(port: int) -> Caller:
    """A caller that believes the tests' authority."""
    context = ssl.create_default_context()
    authority().configure_trust(context)
    return Caller(*await asyncio.open_connection("localhost", port, ssl=context))


@both
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_tls_on_both_sides(push: bool, framing: str) -> None:
    """Whole, and answered early, as without."""
    refusing = asyncio.Event()

    async def script(call: Receipt) -> None:
        if refusing.is_set():
            await call.send(response(413, b"too large"))
            await call.watch()
        else:
            await takes_all(call)

    body = form(3_000_000)
    raw = head(len(body)) + body if framing == "length" else head(None) + chunked(body)
    with authority().cert_pem.tempfile() as ca_file:
        async with (
            receiving(script, tls=server_context()) as upstream,
            door(upstream.url, push=push, upstream={"ca_file": ca_file}, tls=server_context()) as it,
        ):
            async with await connect(it.port) as caller:
                assert (await caller.ask(raw)).status == 200
            assert upstream.calls[0].body == body
            refusing.set()
            async with await connect(it.port) as caller:
                await caller.send(raw[:200_000])
                answer = await caller.rest(await caller.head())
                assert (answer.status, answer.body) == (413, b"too large")
            await until(lambda: quiet(it))
            async with asyncio.timeout(WITHIN_S):
                await upstream.calls[1].gone.wait()


@both
async def test_leaving_over_tls_while_it_is_held_back(push: bool) -> None:
    stubborn = Stubborn()
    async with (
        receiving(stubborn) as upstream,
        door(upstream.url, push=push, tls=server_context()) as it,
        await connect(it.port) as caller,
    ):
        await caller.send(head(MUCH) + form(WINDOW_BYTES)[:-50])
        await until(lambda: bool(it.uploads and upstream.calls))
        await paused(it, caller)
        await until(lambda: unsent(caller) == 0)
        caller.reset()
        await until(lambda: quiet(it), WITHIN_S)
        assert it.cancelled == 1
        await was_cut(upstream.calls[0], stubborn, push=push)


# ── more than one upstream ───────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_the_next_upstream(push: bool, framing: str) -> None:
    """One that cannot be reached has got nothing: the form goes to the next one, whole."""
    body = form(1_000_000)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody else gets the port
        dead = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        async with receiving(takes_all) as upstream, door(dead, upstream.url, push=push, model="x") as it:
            async with await Caller.connect(it.port) as caller:
                raw = head(len(body)) + body if framing == "length" else head(None) + chunked(body)
                assert (await caller.ask(raw)).status == 200
            assert upstream.calls[0].body == form(1_000_000, model="x")
            assert not it.uploads[0].replayable


@both
@pytest.mark.parametrize("size", [100, 300_000])
async def test_never_a_second_time(push: bool, size: int) -> None:
    """Of an upload that an upstream has begun to read, no other one gets a byte."""

    async def dies(call: Receipt) -> None:
        await call.piece()
        call.reset()

    body = form(size)
    async with (
        receiving(dies) as first,
        receiving(takes_all) as second,
        door(first.url, second.url, push=push) as it,
        await Caller.connect(it.port) as caller,
    ):
        answer = await caller.ask(head(len(body)) + body)
        assert (answer.status, answer.body) == (502, b"upstream_unreachable")
        assert not it.uploads[0].replayable
        assert (len(first.calls), second.connections) == (1, 0)
        await until(lambda: quiet(it))
