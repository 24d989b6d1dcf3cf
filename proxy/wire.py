"""One HTTP/1.1 exchange on a connection of aiohttp's pool, below `ClientSession`.

Why not `ClientSession.request`: it costs 110 to 180 us a request and wakes a task for every read (measured;
see README, "Benchmarks"). Here the pool, TLS, DNS and happy eyeballs stay TCPConnector's, framing
and its checks stay the C parser's, and only the object that the parser feeds is ours (`wire_connection`):
body bytes go from `data_received` straight to a sink, without waking a task.

`self_check` tries all that at start; if a private name of aiohttp has changed its meaning, `upstream.py` uses
the public way instead. The stream tests run over both.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from proxy.chunked import inside
from proxy.errors import HeadraceError, UpstreamInvalid, UpstreamStale, UpstreamUnreachable
from proxy.headers import RawHeaders
from proxy.sender import Sender, Source
from proxy.wire_connection import End, Sink, WireConnection

if TYPE_CHECKING:
    from proxy.pool import Pool

#: uvloop's timers count whole milliseconds and may fire that much before their moment.
_EARLY_S = 0.002
#: Bytes of a body that may wait for somebody to take them before the upstream is paused.
HELD_LIMIT = 65536
#: By these names: a member that is looked up in its class costs 0.1 us (Python 3.11), a global a twentieth.
_FRAMED, _CUT = End.FRAMED, End.CUT


class WireExchange(msgspec.Struct, eq=False):
    """One request and its answer. (A Struct for its many defaults, which cost 0.1 us so and 0.3 written out.)

    _head: what is sent first, a small body with it.
    """

    pushes: ClassVar[bool] = True

    _pool: Pool
    _head: bytes
    _body: bytes | Source
    _protocol: WireConnection | None = None
    _sender: Sender | None = None
    _waiter: asyncio.Future[None] | None = None
    _wanted: int = 0
    _until: float = 0.0
    _sent_at: float = 0.0
    _end: End | None = None
    _fault: Exception | None = None
    sink: Sink | None = None
    answered: bool = False
    touched: bool = False  # a byte of an answer has come
    reused: bool = False
    fresh: bool = False
    paused: bool = False  # by whoever takes the answer
    last_at: float = 0.0
    status: int = 0
    reason: str = ""
    fields: RawHeaders = ()

    __repr__ = object.__repr__  # a Struct's own would show the credential

    # ── called by the attempt ────────────────────────────────────────────────────────────────────────────

    def send_now(self) -> bool:
        """`send` on a connection that lies idle; False: there is none, and nothing has been done."""
        now = monotonic()
        if self.fresh or (protocol := self._pool.take_idle(now)) is None:
            return False
        self._send_on(protocol, now)
        return True

    async def send(self) -> None:
        """Takes a connection and writes the whole request, of an upload the head: the rest follows by itself.
        Raises UpstreamConnectFailed."""
        self._send_on(await self._pool.acquire(fresh=self.fresh), monotonic())

    def _send_on(self, protocol: WireConnection, now: float) -> None:
        transport = protocol.transport
        assert transport is not None
        self._protocol = protocol
        self.reused = protocol.used
        protocol.used = True
        protocol.begin(self)
        self.last_at = self._sent_at = now
        transport.write(self._head)
        body = self._body
        self._head = self._body = b""
        if not isinstance(body, bytes):
            self._sender = Sender(body, self)
            self._sender.start(transport, protocol.drained)
        elif body:
            transport.write(body)

    @property
    def asked_at(self) -> float:
        """Since when the upstream owes something: an answer, or to take more of an upload."""
        return self._sent_at if self._sender is None else self._sender.last_at

    async def hold(self, size: int, until: float) -> bool:
        if self.here(size):
            return True
        await self.arrival(size, until)
        return self.here(size)

    def here(self, size: int) -> bool:
        if self._end is None:
            return self._held() >= size
        if not self.answered:
            raise self._no_answer()
        if self._end is _CUT and not self._held():
            raise UpstreamInvalid
        return True

    def arrival(self, size: int, until: float) -> asyncio.Future[None]:
        self._wanted, self._until = size, until
        assert self._protocol is not None
        self._protocol.ring_at(until)
        new_future = self._pool.new_future
        self._waiter = waiter = new_future()
        if self._end is not None:
            self._wake()
        return waiter

    def _no_answer(self) -> HeadraceError:
        if isinstance(self._fault, HeadraceError):
            return self._fault  # the caller's: its body cannot be had
        if self._fault is not None:
            return UpstreamInvalid()
        return UpstreamStale() if self.reused and not self.touched else UpstreamUnreachable()

    def look(self) -> tuple[bytes, End | None]:
        """The bytes that are here, and the end if it is known."""
        assert self._protocol is not None
        pieces = self._protocol.pieces
        return pieces[0] if len(pieces) == 1 else b"".join(pieces), self._end

    def taken(self) -> tuple[bytes, End | None]:
        """The same; the bytes are now the caller's."""
        assert self._protocol is not None
        pieces = self._protocol.pieces
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return body, self._end

    async def pump(self, sink: Sink) -> None:
        """Hands everything to the sink, from the very call in which it arrives; returns at once."""
        body, end = self.taken()
        self.give_to(sink)
        if body:
            sink.feed(body)
        if end is not None:
            sink.end(end)
        elif not sink.blocked:
            self.resume()

    def give_to(self, sink: Sink) -> None:
        """From now on what comes is the sink's, from the very call in which it comes."""
        assert self._protocol is not None
        self.sink = sink
        self._protocol.feed = sink.feed

    def pause(self) -> None:
        self.paused = True
        if self._protocol is not None:
            self._protocol.pause_reading()

    def resume(self) -> None:
        self.paused = False
        if self._protocol is not None:
            self._protocol.resume_reading()

    def close(self) -> None:
        """Gives the connection back if request and answer are complete, else ends it. Never blocks."""
        protocol, sender = self._protocol, self._sender
        self.sink = None
        if sender is not None:
            sender.stop()
        if protocol is None:
            return
        self._protocol = None
        again = protocol.leave() and self._end is _FRAMED and (sender is None or sender.done)
        self._pool.give_back(protocol, again=again)

    # ── called by the connection ─────────────────────────────────────────────────────────────────────────

    def rang(self) -> None:
        """The moment until which somebody waits may have come."""
        if self._waiter is None:
            return
        if monotonic() < self._until - _EARLY_S:
            assert self._protocol is not None
            self._protocol.ring_at(self._until)
        else:
            self._wake()

    def took_head(self, message: Any) -> None:
        self.answered = True
        self.status = message.code
        self.reason = message.reason
        self.fields = message.raw_headers

    def received(self) -> None:
        """Bytes came that nobody takes yet."""
        self.last_at = monotonic()
        held = self._held()
        if held >= HELD_LIMIT:
            assert self._protocol is not None
            self._protocol.pause_reading()
        if self._waiter is not None and held >= self._wanted:
            self._wake()

    def ended(self, how: End) -> None:
        if self._end is not None:
            return
        self._end = how
        if self.sink is not None:
            self.sink.end(how)
        self._wake()

    def failed(self, fault: Exception) -> None:
        self._fault = fault
        self.ended(_CUT)

    def _held(self) -> int:
        pieces = self._protocol.pieces if self._protocol is not None else ()
        return len(pieces[0]) if len(pieces) == 1 else sum(map(len, pieces))

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():  # it may have been cancelled
            waiter.set_result(None)


class _Probe:
    """A sink for the self-check."""

    def __init__(self) -> None:
        self.data = b""
        self.how: End | None = None
        self.blocked = False

    def feed(self, data: bytes, start: int = 0) -> None:
        self.data += inside(data, start)

    def end(self, how: End) -> None:
        self.how = how


_CHECK_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def self_check(loop: asyncio.AbstractEventLoop) -> str | None:
    """Feeds a canned answer to a connection; None if every private name still means what it did, else why."""
    try:
        connection = WireConnection(loop)
        if not asyncio.iscoroutinefunction(connection.drained):
            return "a connection's buffer is waited for differently"
        exchange = WireExchange(None, b"", b"")  # type: ignore[arg-type] # no pool: nothing is acquired
        exchange._protocol = connection
        connection.begin(exchange)
        connection.data_received(_CHECK_HEAD + b"2\r\nab\r\n")
        probe = _Probe()
        probe.feed(exchange.taken()[0])
        exchange.give_to(probe)
        connection.data_received(b"2\r\ncd\r\n1\r\ne\r\n")
        connection.data_received(b"1\r\nf\r\n")
        between = connection.between
        connection.data_received(b"1\r\ng\r\n")
        middle = probe.data
        connection.data_received(b"6\r\n")
        if not between or connection.between:
            return "the parser tells differently where a chunk begins and ends"
        connection.data_received(b"1\r\nf\r\n\r\n0\r\n\r\n")
    except Exception as error:
        return f"{type(error).__name__}"
    whole = b"abcdefg1\r\nf\r\n"
    if (exchange.status, middle, probe.data, probe.how) != (200, whole[:7], whole, End.FRAMED):
        return "the parser feeds its payload differently"
    return None
