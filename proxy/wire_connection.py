"""A connection of aiohttp's pool whose answers go to us: aiohttp's own C parser, and what it feeds.

All private names of aiohttp's connection and parser are in this file (the connector's are in `pool.py`).
`wire.self_check` tries them once at start.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import ClientSession, http_parser
from aiohttp.client_proto import ResponseHandler
from aiohttp.helpers import TimerNoop
from aiohttp.http_parser import HttpResponseParser
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

from proxy.chunked import MOST_OPENINGS, OPENINGS, is_chunk_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from proxy.wire import WireExchange

#: Some providers send more than 8 KiB of headers; beyond this an answer is invalid.
_MAX_HEAD_BYTES = 65536
#: What ends a connection's turn. libuv goes on reading, 32 times, from one whose reads fill its buffer of
#: 256,000 bytes: 8 MB of one answer before a chunk of another (15 ms p99 on a busy core, measured).
_LONG_READ = 2**17
#: StreamReader pauses its parser at twice this many bytes or a sixteenth as many chunks: more than one read
#: of the socket (256 KiB) can bring, because the first read of an answer still passes through it.
_PARSER_LIMIT = 2**20
#: Nobody reads from a body through aiohttp: there is nothing to time.
_NO_TIMER = TimerNoop()
#: What the parser tells of chunks.
_BEGUN, _ENDED = "(", ")"
_ONE_CHUNK = _BEGUN + _ENDED


class End(StrEnum):
    """How the bytes of an answer ended."""

    FRAMED = "framed"  # HTTP's own framing says that it is complete
    CLOSED = "closed"  # no framing, and the upstream closed in good order
    CUT = "cut"  # everything else


#: By this name: a member that is looked up in its class costs 0.1 us (Python 3.11), a global a twentieth.
_FRAMED = End.FRAMED


class Sink(Protocol):
    """Takes the bytes of an answer as they arrive."""

    @property
    def blocked(self) -> bool: ...

    def feed(self, data: bytes, start: int = 0) -> None:
        """start: 0, or `data` is exactly one chunk and what is in it begins there."""

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
        self._protocol.marks += _BEGUN  # type: ignore[attr-defined] # a WireConnection

    def end_http_chunk_receiving(self) -> None:
        self._protocol.marks += _ENDED  # type: ignore[attr-defined] # a WireConnection


class WireConnection(ResponseHandler):
    """A pooled connection. It serves one exchange at a time; between two it takes no bytes at all.

    used: it has lain in the pool, so it may have been closed there. served: it has been asked something.
    feed: of whoever takes the answer; a look through the exchange costs a tenth of all that Python does per
    read. marks: of the chunks whose beginnings and ends the parser saw in this read. between: it saw one
    chunk and nothing else, so it stands between two, and another read which is exactly one need not go
    through it.
    """

    __slots__ = (
        "_alarm",
        "_alarm_at",
        "between",
        "complete",
        "exchange",
        "feed",
        "made_at",
        "marks",
        "pieces",
        "served",
        "used",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.made_at = monotonic()
        self.used = False
        self.served = False
        self.exchange: WireExchange | None = None
        self.feed: Callable[[bytes, int], None] | None = None
        self.pieces: list[bytes] = []
        self.complete = False
        self.marks = ""
        self.between = False
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0

    def begin(self, exchange: WireExchange) -> None:
        """A parser for each answer (0.5 us): one that goes on would tell the last trailer of a chunked answer
        as the first field of the next, which is another caller's (aiohttp 3.14.5)."""
        self.exchange = exchange
        self.served = True
        self.complete = False
        self._parser = HttpResponseParser(
            self,
            self._loop,
            _PARSER_LIMIT,
            timer=_NO_TIMER,
            read_until_eof=True,
            auto_decompress=False,
            max_line_size=_MAX_HEAD_BYTES,
            max_field_size=_MAX_HEAD_BYTES,
        )

    def leave(self) -> bool:
        """The exchange has ended. Whether another may follow: nobody wishes the connection closed, and all
        that was sent is out of our hands."""
        self.exchange = None
        self.feed = None
        self.between = False
        self.pieces.clear()
        if self._reading_paused:
            self.resume_reading()
        transport = self.transport
        return not self._should_close and transport is not None and not transport.get_write_buffer_size()

    def ring_at(self, moment: float) -> None:
        """Then, or before, the exchange is told to look at the time (`time.monotonic`). A timer that is there
        already stays if it is early enough, for this exchange and for those that follow: nearly all end long
        before, and one that is made and cancelled for each costs 1 us."""
        if self._alarm is not None:
            if self._alarm_at <= moment:
                return
            self._alarm.cancel()
        self._alarm_at = moment
        self._alarm = self._loop.call_later(moment - monotonic(), self._ring)

    def _ring(self) -> None:
        self._alarm = None
        if self.exchange is not None:
            self.exchange.rang()

    def data_received(self, data: bytes) -> None:
        if self.between and (size := len(data)) < MOST_OPENINGS:
            # What the parser would say of it is known. It stays where it is: before the next chunk.
            lower, upper, start = OPENINGS[size]
            opening = data[:start]
            # A tuple of the two takes 50 ns more.
            if (opening == lower or opening == upper) and data[-2:] == b"\r\n":  # noqa: SIM109
                feed = self.feed
                feed(data, start)  # type: ignore[misc] # it is there
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
        self.marks = ""
        try:
            messages, upgraded, _ = self._parser.feed_data(data)  # type: ignore[union-attr] # set by begin
            if messages:
                self._took_heads(exchange, messages, upgraded)
        except Exception as error:  # the parser's own kinds, and what a broken one may raise
            fault = error
        over = self.complete or fault is not None
        if exchange.sink is not None:
            self._pass_on(exchange, exchange.sink, data)
        elif self.pieces and not over:  # else whoever waits is told of the end
            exchange.received()
        if over:
            self.between = False
            self._conclude(exchange, fault)

    def _pass_on(self, exchange: WireExchange, sink: Sink, data: bytes) -> None:
        """One write for everything that one read brought."""
        pieces = self.pieces
        # The parser's word alone is not enough: it can swallow the start of a chunk's head without a mark.
        self.between = self.marks == _ONE_CHUNK and len(pieces) == 1 and is_chunk_of(data, len(pieces[0]))
        if len(pieces) == 1:
            sink.feed(pieces.pop())
        elif pieces:
            body = b"".join(pieces)
            pieces.clear()
            sink.feed(body)
        if len(data) >= _LONG_READ and not self.complete:
            self.pause_reading()
            self._loop.call_soon(self._go_on, exchange)

    def _conclude(self, exchange: WireExchange, fault: Exception | None) -> None:
        if fault is not None:
            self.force_close()
        if self.complete:
            exchange.ended(_FRAMED)  # what follows a complete answer only costs the connection
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

    @property
    def drained(self) -> Callable[[], Awaitable[None]]:
        """Returns when there is room for more of a request."""
        return self._drain_helper

    def pause_reading(self) -> None:
        # Not the parser: it would keep a tail that nobody asks it for.
        self._reading_paused = True
        self._pause_transport_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        if self._reading_paused:  # the end of each answer comes by here, and nearly none was paused
            self._reading_paused = False
            self._resume_transport_reading()

    def connection_lost(self, exc: BaseException | None) -> None:
        exchange = self.exchange
        was_complete = self.complete
        if self._alarm is not None:
            self._alarm.cancel()  # it would keep all this for as long as an upstream may think
        super().connection_lost(exc)  # for a close-delimited body this feeds the end of file
        if exchange is not None and not was_complete:
            # The parser takes an RST for the end of a close-delimited body (measured on 3.14.5): only the
            # transport knows better.
            exchange.ended(End.CLOSED if self.complete and exc is None else End.CUT)


def forbid_silent_retry(session: ClientSession) -> None:
    """aiohttp sends idempotent requests a second time when a connection dies, even a fresh one (measured);
    whether something is tried again is decided in `forward.py` alone."""
    if hasattr(session, "_retry_connection"):
        session._retry_connection = False


def c_parser_loaded() -> bool:
    """The pure-Python parser has had several request-smuggling holes that the C one does not share."""
    return http_parser.HttpRequestParser is not http_parser.HttpRequestParserPy
