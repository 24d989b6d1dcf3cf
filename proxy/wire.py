"""One HTTP/1.1 exchange on a connection of aiohttp's pool, below `ClientSession`.

Why not `ClientSession.request`: it costs 110 to 180 us a request and wakes a task for every read (measured;
see README, "Benchmarks"). Here the pool, TLS, DNS and happy eyeballs stay TCPConnector's, framing
and its checks stay the C parser's, and only the object that the parser feeds is ours: body bytes go from
`data_received` straight to a sink, without waking a task.

All private names of aiohttp's connection and parser are in this file (the connector's are in `pool.py`).
`self_check` tries them once at start; if one has changed its meaning, `upstream.py` uses the public way
instead. The stream tests run over both.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from aiohttp import ClientSession, http_parser
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection as PooledConnection
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

from proxy.chunked import MOST_OPENINGS, OPENINGS
from proxy.errors import HeadraceError, UpstreamInvalid, UpstreamStale, UpstreamUnreachable
from proxy.headers import RawHeaders, value_of
from proxy.sender import Sender, Source

if TYPE_CHECKING:
    from proxy.pool import Pool

#: Bytes of a body that may wait for somebody to take them before the upstream is paused.
HELD_LIMIT = 65536
#: Some providers send more than 8 KiB of headers; beyond this an answer is invalid.
_MAX_HEAD_BYTES = 65536
#: Above this, copying the body behind the head costs more than a second write.
_JOIN_LIMIT = 65536
#: What ends a connection's turn. libuv goes on reading, 32 times, from one whose reads fill its buffer of
#: 256,000 bytes: 8 MB of one answer before a chunk of another (15 ms p99 on a busy core, measured).
_LONG_READ = 2**17
#: StreamReader pauses its parser at twice this many bytes or a sixteenth as many chunks: more than one read
#: of the socket (256 KiB) can bring, because the first read of an answer still passes through it.
_PARSER_LIMIT = 2**20


class End(StrEnum):
    """How the bytes of an answer ended."""

    FRAMED = "framed"  # HTTP's own framing says that it is complete
    CLOSED = "closed"  # no framing, and the upstream closed in good order
    CUT = "cut"  # everything else


class Sink(Protocol):
    """Takes the bytes of an answer as they arrive."""

    @property
    def blocked(self) -> bool: ...

    def feed(self, data: bytes, chunk: bytes = b"") -> None:
        """`chunk`: what came, if that was exactly one chunk with these bytes in it."""

    def end(self, how: End) -> None: ...


class _Body(StreamReader):
    """What the C parser feeds instead of a StreamReader.

    The parser makes the reader itself, so its class is replaced once the head is there; `__slots__` is empty
    because only classes of one layout can replace each other.
    """

    __slots__ = ()

    def feed_data(self, data: bytes, size: int = 0) -> bool:
        self._protocol.pieces.append(data)  # type: ignore[attr-defined] # a WireConnection
        return False

    def feed_eof(self) -> None:
        self._eof = True
        self._protocol.complete = True  # type: ignore[attr-defined] # a WireConnection

    def set_exception(self, exc: BaseException, exc_cause: BaseException | None = None) -> None:
        pass  # the parser raises the same error out of feed_data

    def begin_http_chunk_receiving(self) -> None:
        self._protocol.in_chunk = True  # type: ignore[attr-defined] # a WireConnection

    def end_http_chunk_receiving(self) -> None:
        self._protocol.in_chunk = False  # type: ignore[attr-defined] # a WireConnection


class WireConnection(ResponseHandler):
    """A pooled connection. It serves one exchange at a time; between two it takes no bytes at all.

    used: it has lain in the pool, so it may have been closed there. served: it has been asked something.
    in_chunk: the parser has begun a chunk whose end it has not seen, or may have. between: it has seen one
    end and nothing behind it, so that a read which is exactly one chunk need not go through it.
    """

    __slots__ = ("between", "complete", "exchange", "in_chunk", "made_at", "pieces", "served", "used")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.made_at = monotonic()
        self.used = False
        self.served = False
        self.exchange: WireExchange | None = None
        self.pieces: list[bytes] = []
        self.complete = False
        self.in_chunk = True
        self.between = False

    def begin(self, exchange: WireExchange) -> None:
        self.exchange = exchange
        self.served = True
        self.complete = False
        self.in_chunk = True
        self.set_response_params(
            read_until_eof=True,
            auto_decompress=False,
            read_bufsize=_PARSER_LIMIT,
            max_line_size=_MAX_HEAD_BYTES,
            max_field_size=_MAX_HEAD_BYTES,
        )

    def data_received(self, data: bytes) -> None:
        if self.between and (size := len(data)) < MOST_OPENINGS:
            # What the parser would say of it is known. It stays where it is: before the next chunk.
            opening, start = OPENINGS[size]
            if data.startswith(opening) and data.endswith(b"\r\n"):
                self.exchange.sink.feed(data[start:-2], data)  # type: ignore[union-attr] # both are there
                return
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            self._received_between(data)
            return
        if not exchange.answered:
            exchange.touched = True
        fault: Exception | None = None
        try:
            messages, upgraded, _ = self._parser.feed_data(data)  # type: ignore[union-attr] # set by begin
            if messages:
                self._took_heads(exchange, messages, upgraded)
        except Exception as error:  # the parser's own kinds, and what a broken one may raise
            fault = error
        pieces = self.pieces
        if pieces:
            sink = exchange.sink
            if sink is None:
                exchange.received()
            else:
                # One write for everything that one read brought.
                if len(pieces) == 1:
                    sink.feed(pieces.pop())
                else:
                    body = b"".join(pieces)
                    pieces.clear()
                    sink.feed(body)
                if len(data) >= _LONG_READ and not self.complete:
                    self.pause_reading()
                    self._loop.call_soon(self._go_on, exchange)
        if fault is not None or self.complete:
            self.between = False
            self._conclude(exchange, fault)
        else:
            # A chunk's head ends with a line feed too, but then its chunk has begun.
            self.between = not self.in_chunk and exchange.sink is not None and data.endswith(b"\n")

    def _conclude(self, exchange: WireExchange, fault: Exception | None) -> None:
        if fault is not None:
            self.force_close()
        if self.complete:
            exchange.ended(End.FRAMED)  # what follows a complete answer only costs the connection
        elif fault is not None:
            exchange.failed(fault)

    def _go_on(self, exchange: WireExchange) -> None:
        """Others had their turn."""
        if self.exchange is exchange and not exchange.paused:
            self.resume_reading()

    def _received_between(self, data: bytes) -> None:
        """Bytes that answer no request: a connection in this state must not be used again (RFC 9112 9.2)."""
        if self._parser is not None and not self.served:
            super().data_received(data)  # aiohttp itself asks an outbound proxy for a tunnel
            return
        self.force_close()
        if self.transport is not None:
            self.transport.close()

    def _took_heads(
        self, exchange: WireExchange, messages: list[tuple[Any, StreamReader]], upgraded: bool
    ) -> None:
        for message, payload in messages:
            if 100 <= message.code < 200 and message.code != 101:
                continue  # interim answers stop here (RFC 9110 15.2)
            if exchange.answered:
                self.force_close()  # a second answer to one request
                return
            if message.should_close or upgraded:
                self.force_close()
            exchange.took_head(message)
            self._take_over(payload)

    def _take_over(self, payload: StreamReader) -> None:
        """From here on the parser feeds us; what it already fed in this call is moved over."""
        if payload is EMPTY_PAYLOAD:
            self.complete = True
            return
        self.pieces.extend(payload._buffer)
        self.complete = payload._eof
        payload.__class__ = _Body

    def pause_reading(self) -> None:
        # Not the parser: it would keep a tail that nobody asks it for.
        self._pause_transport_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        self._resume_transport_reading()

    def connection_lost(self, exc: BaseException | None) -> None:
        exchange = self.exchange
        was_complete = self.complete
        super().connection_lost(exc)  # for a close-delimited body this feeds the end of file
        if exchange is not None and not was_complete:
            # The parser takes an RST for the end of a close-delimited body (measured on 3.14.5): only the
            # transport knows better.
            exchange.ended(End.CLOSED if self.complete and exc is None else End.CUT)


class WireExchange:
    """One request and its answer."""

    pushes: ClassVar[bool] = True
    __slots__ = (
        "_body",
        "_connection",
        "_end",
        "_fault",
        "_head",
        "_pool",
        "_protocol",
        "_sender",
        "_sent_at",
        "_waiter",
        "_wanted",
        "answered",
        "fields",
        "framed",
        "fresh",
        "last_at",
        "paused",
        "reason",
        "reused",
        "sink",
        "status",
        "touched",
    )

    def __init__(self, pool: Pool, head: bytes, body: bytes | Source) -> None:
        self._pool = pool
        self._head = head
        self._body = body
        self._connection: PooledConnection | None = None
        self._protocol: WireConnection | None = None
        self._sender: Sender | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._wanted = 1
        self._end: End | None = None
        self._fault: Exception | None = None
        self.sink: Sink | None = None
        self.answered = False
        self.touched = False  # a byte of an answer has come
        self.reused = False
        self.fresh = False
        self.paused = False  # by whoever takes the answer
        self.last_at = self._sent_at = monotonic()
        self.status = 0
        self.reason = ""
        self.fields: RawHeaders = ()
        self.framed = False

    # ── called by the attempt ────────────────────────────────────────────────────────────────────────────

    async def send(self) -> None:
        """Takes a connection and writes the whole request, of an upload the head: the rest follows by itself.
        Raises aiohttp's connection errors."""
        connection = await self._pool.acquire(fresh=self.fresh)
        protocol = connection.protocol
        assert isinstance(protocol, WireConnection)
        assert protocol.transport is not None
        self._connection = connection
        self._protocol = protocol
        self.reused = protocol.used
        protocol.used = True
        protocol.begin(self)
        self._sent_at = monotonic()
        head, body = self._head, self._body
        self._head = self._body = b""
        if not isinstance(body, bytes):
            protocol.transport.write(head)
            self._sender = Sender(body, self)
            self._sender.start(protocol.transport, protocol._drain_helper)
        elif len(body) <= _JOIN_LIMIT:
            protocol.transport.write(head + body)
        else:
            protocol.transport.write(head)
            protocol.transport.write(body)

    @property
    def asked_at(self) -> float:
        """Since when the upstream owes something: an answer, or to take more of an upload."""
        return self._sent_at if self._sender is None else self._sender.last_at

    async def hold(self, size: int, until: float) -> bool:
        """Waits until `size` bytes of the body are here, or its end; False if `until` (a moment of
        `time.monotonic`) came first. May be cancelled and called again."""
        self._wanted = size
        if self._end is None and self._held() < size and not await self._wait(until):
            return False
        if not self.answered:
            raise self._no_answer()
        if self._end is End.CUT and not self._held():
            raise UpstreamInvalid
        return True

    def _no_answer(self) -> HeadraceError:
        if isinstance(self._fault, HeadraceError):
            return self._fault  # the caller's: its body cannot be had
        if self._fault is not None:
            return UpstreamInvalid()
        return UpstreamStale() if self.reused and not self.touched else UpstreamUnreachable()

    async def _wait(self, until: float) -> bool:
        """A bare timer: asyncio.timeout costs 8 us more, once or twice a request."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(max(0.0, until - monotonic()), self._wake)
        try:
            self._waiter = loop.create_future()
            await self._waiter
        finally:
            self._waiter = None
            timer.cancel()
        return self._end is not None or self._held() >= self._wanted

    def look(self) -> tuple[bytes, End | None]:
        """The bytes that are here, and the end if it is known."""
        assert self._protocol is not None
        pieces = self._protocol.pieces
        return pieces[0] if len(pieces) == 1 else b"".join(pieces), self._end

    def taken(self) -> tuple[bytes, End | None]:
        """The same; the bytes are now the caller's."""
        assert self._protocol is not None
        held = self.look()
        self._protocol.pieces.clear()
        return held

    async def pump(self, sink: Sink) -> None:
        """Hands everything to the sink, from the very call in which it arrives; returns at once."""
        body, end = self.taken()
        self.sink = sink
        if body:
            sink.feed(body)
        if end is not None:
            sink.end(end)
        elif not sink.blocked:
            self.resume()

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
        connection, protocol, sender = self._connection, self._protocol, self._sender
        self.sink = None
        if sender is not None:
            sender.stop()
        if connection is None or protocol is None:
            return
        self._connection = self._protocol = None
        protocol.exchange = None
        protocol.between = False
        protocol.pieces.clear()
        unsent = protocol.transport is None or protocol.transport.get_write_buffer_size() > 0
        if sender is not None and not sender.done:
            unsent = True
        if self._end is End.FRAMED and not unsent and not self._pool.too_old(protocol):
            protocol.resume_reading()
            connection.release()
        else:
            protocol.abort()  # close() would wait for a TLS goodbye or for a full send buffer
            connection.close()

    # ── called by the connection ─────────────────────────────────────────────────────────────────────────

    def took_head(self, message: Any) -> None:
        self.answered = True
        self.status = message.code
        self.reason = message.reason
        self.fields = message.raw_headers
        self.framed = bool(message.chunked) or value_of(message.raw_headers, b"content-length") is not None

    def received(self) -> None:
        """Bytes came that nobody takes yet."""
        self.last_at = monotonic()
        protocol = self._protocol
        assert protocol is not None
        held = self._held()
        if held >= HELD_LIMIT:
            protocol.pause_reading()
        if held >= self._wanted:
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
        self.ended(End.CUT)

    def _held(self) -> int:
        pieces = self._protocol.pieces if self._protocol is not None else ()
        return len(pieces[0]) if len(pieces) == 1 else sum(map(len, pieces))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Probe:
    """A sink for the self-check."""

    def __init__(self) -> None:
        self.data = b""
        self.how: End | None = None
        self.blocked = False

    def feed(self, data: bytes, chunk: bytes = b"") -> None:
        self.data += data

    def end(self, how: End) -> None:
        self.how = how


_CHECK_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def self_check(loop: asyncio.AbstractEventLoop) -> str | None:
    """Feeds a canned answer to a connection; None if every private name still means what it did, else why."""
    try:
        connection = WireConnection(loop)
        if not asyncio.iscoroutinefunction(connection._drain_helper):
            return "a connection's buffer is waited for differently"
        exchange = WireExchange(None, b"", b"")  # type: ignore[arg-type] # no pool: nothing is acquired
        exchange._protocol = connection
        connection.begin(exchange)
        connection.data_received(_CHECK_HEAD + b"2\r\nab\r\n")
        probe = _Probe()
        probe.feed(exchange.taken()[0])
        exchange.sink = probe
        connection.data_received(b"2\r\ncd\r\n1\r\ne\r\n")
        between = connection.between
        connection.data_received(b"1\r\nf\r\n")
        middle = probe.data
        connection.data_received(b"6\r\n")
        if not between or connection.between:
            return "the parser tells differently where a chunk begins and ends"
        connection.data_received(b"1\r\nf\r\n\r\n0\r\n\r\n")
    except Exception as error:
        return f"{type(error).__name__}"
    whole = b"abcdef1\r\nf\r\n"
    if (exchange.status, middle, probe.data, probe.how) != (200, whole[:6], whole, End.FRAMED):
        return "the parser feeds its payload differently"
    return None


def forbid_silent_retry(session: ClientSession) -> None:
    """aiohttp sends idempotent requests a second time when a connection dies, even a fresh one (measured);
    whether something is tried again is decided in `forward.py` alone."""
    if hasattr(session, "_retry_connection"):
        session._retry_connection = False


def c_parser_loaded() -> bool:
    """The pure-Python parser has had several request-smuggling holes that the C one does not share."""
    return http_parser.HttpRequestParser is not http_parser.HttpRequestParserPy
