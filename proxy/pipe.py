"""Bytes from one upstream answer to one caller, and nothing else.

Push: the upstream connection's `data_received` calls `feed`, which writes to the caller's transport in the
same call; no task wakes. Pull: a loop awaits `deliver`. Per read both do one write and a few integers.

Everything that can go wrong is noticed here and named (`Ending`); what it means for the request is decided
once, in `verdict`. Timers are lazy: a read only stores its time, and the one timer of a stream, when it
fires, looks at that time and goes back to sleep (a timer restarted per read would cost 2 us each).
"""

from __future__ import annotations

import asyncio
from enum import StrEnum
from math import floor
from time import monotonic
from typing import TYPE_CHECKING, Protocol

import msgspec

from proxy.chunked import framed, inside
from proxy.errors import Reason
from proxy.metrics import GAP_UNITS_PER_SECOND, GAPS
from proxy.wire_connection import End

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp import web
    from aiohttp.abc import AbstractStreamWriter

    from proxy.context import Context
    from proxy.sse import Scanner
    from proxy.upstream import Exchange

#: One newline only: openai-python (3.52 and before) fails on a blank line after an event with an id.
HEARTBEAT = b": headrace\n"
#: How long bytes after the terminator are still delivered (contract 6.3).
GRACE_S = 0.1
#: uvloop's timers count whole milliseconds and may fire that much before their moment.
TIMER_SLACK_S = 0.002

#: Places in a row of `Clocks.gaps`; the sum is its last, but no negative index has a specialised instruction.
_GAP_OVERFLOW = len(GAPS)
_GAP_SUM = _GAP_OVERFLOW + 1
_QUOTE = 0x22


class Ending(StrEnum):
    """Why the bytes stopped. The first three are the upstream's doing (`wire_connection.End`)."""

    FRAMED = "framed"
    CLOSED = "closed"
    CUT = "cut"
    GRACE = "grace"  # the terminator has passed, and nothing more came
    STALL = "stall"
    DEADLINE = "deadline"
    SLOW_CALLER = "slow_caller"


class Clocks(msgspec.Struct, frozen=True):
    """The timers of one stream. Seconds; `total_at` is a moment of the loop's clock; 0 = off.

    gaps: the row of `metrics.inter_chunk` that counts gaps between reads. All streams have it in common, so
    it is at hand whenever one needs it: a list of its own for each cost 2 us a chunk with 400 of them.
    """

    idle_s: float
    total_at: float
    heartbeat_s: float
    write_s: float
    gaps: list[float]


class Taker(Protocol):
    """Takes an answer, pushed (`wire_connection.Sink`) or pulled."""

    @property
    def blocked(self) -> bool: ...

    @property
    def finished(self) -> bool: ...

    def feed(self, data: bytes, start: int = 0) -> None: ...

    async def deliver(self, data: bytes) -> None: ...

    def end(self, how: End) -> None: ...

    def next_at(self) -> float: ...

    async def tick_deliver(self) -> None: ...


class Pipe:
    """One answer on its way. `scanner` is None for what is not an event stream."""

    __slots__ = (
        "_beats_at",
        "_blocked",
        "_clocks",
        "_ctx",
        "_ending",
        "_exchange",
        "_framing",
        "_gaps",
        "_grace",
        "_last_at",
        "_looked",
        "_looks",
        "_loop",
        "_missed",
        "_resumed_at",
        "_scan",
        "_scanner",
        "_send",
        "_timer",
        "_transport",
        "_unsent",
        "_wake",
        "_write",
        "_writer",
        "heartbeats",
        "size",
        "writes",
    )

    def __init__(
        self,
        ctx: Context,
        request: web.Request,
        response: web.StreamResponse,
        writer: AbstractStreamWriter,
        scanner: Scanner | None,
        clocks: Clocks,
    ) -> None:
        assert request.transport is not None
        self._ctx = ctx
        self._transport = request.transport
        self._send: Callable[[bytes], Awaitable[None]] = response.write
        self._writer = writer
        # Every write goes out at once, and what the kernel does not take pauses the upstream. uvloop would
        # else keep writes until the end of its turn: all reads first, then all writes (6 % more CPU).
        self._transport.set_write_buffer_limits(high=0)
        self._write: Callable[[bytes], object] = self._transport.write
        self._unsent = self._transport.get_write_buffer_size
        self._gaps = clocks.gaps
        self._last_at = 0.0
        self._framing = response.chunked
        self._scanner = scanner
        self._scan: Callable[[bytes], object] | None = scanner.feed if scanner is not None else None
        self._clocks = clocks
        self._loop = asyncio.get_running_loop()
        self._exchange: Exchange | None = None
        self._ending: Ending | None = None
        self._missed = False  # the caller did not get what was read last
        self._wake: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._grace: float | None = None  # the moment at which it ends
        self._blocked = False
        self._resumed_at = self._beats_at = monotonic()
        self.heartbeats = 0
        self.size = 0
        self.writes = 0
        self._looks = 0  # reads that were more than the event before with another text,
        self._looked = 0  # and their bytes

    # ── the data path ────────────────────────────────────────────────────────────────────────────────────

    def feed(self, data: bytes, start: int = 0) -> None:
        """Push: one read of the upstream is one write to the caller.

        start: 0, or `data` is exactly one chunk and what is in it begins there.
        """
        # What a slot holds is called by a local name: for `self._write(data)` Python 3.11 has no specialised
        # instruction (150 of the processor's each).
        write, unsent = self._write, self._unsent
        try:
            if self._framing:
                write(data if start else framed(data))
            else:
                write(inside(data, start))
            if unsent() and not self._blocked:
                self._block()
        except RuntimeError:
            # uvloop, of a caller that has closed in this very turn: the cancellation is on its way
            return self._unheard(inside(data, start))
        # The gap is `_observe`'s, written out: a call costs a tenth of all that Python does per read.
        now = monotonic()
        if self.writes:
            gap = now - self._last_at
            slot = floor(gap * GAP_UNITS_PER_SECOND).bit_length()
            gaps = self._gaps
            gaps[slot if slot < _GAP_OVERFLOW else _GAP_OVERFLOW] += 1.0
            gaps[_GAP_SUM] += gap
        self._last_at = now
        self.writes += 1
        if start:
            scanner = self._scanner
            if scanner is not None and (shape := scanner.shape) is not None:
                # Mostly it is the event before with another text, and a text has no quote in it.
                head, begin, foot, end = shape
                size = len(data)
                begin += start
                end += size
                if (
                    begin <= end
                    and data[start:begin] == head
                    and data[end:] == foot
                    and _QUOTE not in data[begin:end]
                ):
                    self.size += size - start - 2
                    return
            data = data[start:-2]
        self.size += len(data)
        self._look(data, now)

    async def deliver(self, data: bytes) -> None:
        """Pull: the same through aiohttp's writer, which waits for a slow caller by itself."""
        self._observe(data)
        self._missed = True
        await self._write_patiently(data)
        self._missed = False

    def begin_with(self, head: bytes) -> None:
        """The first write takes it along. There has to be one before this turn of the loop ends."""
        write = self._write

        def first(data: bytes) -> None:
            self._write = write
            write(head + data)

        self._write = first

    def listen(self, feed: Callable[[bytes], object]) -> None:
        """For an answer that is no event stream: who hears its reads."""
        self._scan = feed

    def _unheard(self, data: bytes) -> None:
        """It did not reach the caller; the usage may be in it all the same."""
        self._missed = True
        if self._scan is not None:
            self._scan(data)

    def _observe(self, data: bytes) -> None:
        now = monotonic()
        if self.writes:
            gap = now - self._last_at
            slot = floor(gap * GAP_UNITS_PER_SECOND).bit_length()
            self._gaps[slot if slot < _GAP_OVERFLOW else _GAP_OVERFLOW] += 1.0
            self._gaps[_GAP_SUM] += gap
        self._last_at = now
        self.writes += 1
        self.size += len(data)
        self._look(data, now)

    def _look(self, data: bytes, now: float) -> None:
        self._looks += 1
        self._looked += len(data)
        if self._scan is not None and self._scan(data):
            self._landmark(now)

    def _landmark(self, now: float) -> None:
        scanner = self._scanner
        assert scanner is not None
        if self._ctx.first_token_at is None and scanner.first_token:
            self._ctx.first_token_at = now
        if scanner.terminated and self._grace is None:
            self._grace = now + GRACE_S
            self._arm()

    def end(self, how: End) -> None:
        """The upstream's side is over."""
        self._finish(Ending(how.value))

    # ── waiting ──────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, exchange: Exchange) -> None:
        """Returns when the answer is over, for whatever reason; cancelled when the caller leaves."""
        self._exchange = exchange
        try:
            if exchange.pushes:
                self._arm()
            await exchange.pump(self)
            if self._blocked and self._ending is None:
                await self._drain(exchange)  # the first bytes alone were too many
            while self._ending is None:
                self._wake = self._loop.create_future()
                await self._wake
                if self._blocked:
                    await self._drain(exchange)
        finally:
            self._exchange = None
            if self._ending is not Ending.FRAMED:
                exchange.pause()  # nothing more of it goes to the caller
            if self._timer is not None:
                self._timer.cancel()
            if self._scanner is not None and self.writes > self._looks:
                self._scanner.passed(self.writes - self._looks, self.size - self._looked)
            self._ctx.chunks = self.writes
            self._ctx.bytes_out = self.size

    @property
    def finished(self) -> bool:
        return self._ending is not None

    @property
    def blocked(self) -> bool:
        """Is the caller behind, so that nothing more may be fed?"""
        return self._blocked

    def _finish(self, ending: Ending) -> None:
        if self._ending is None:
            self._ending = ending
            self._notify()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _block(self) -> None:
        """The caller is slower than the upstream: stop reading until its buffer has drained."""
        assert self._exchange is not None
        self._blocked = True
        self._exchange.pause()
        self._notify()

    async def _drain(self, exchange: Exchange) -> None:
        try:
            async with asyncio.timeout(self._clocks.write_s):
                await self._writer.drain()
        except TimeoutError:
            self._finish(Ending.SLOW_CALLER)
            return
        self._blocked = False
        self._resumed_at = monotonic()  # the silence until now was ours, not the upstream's
        exchange.resume()
        self._arm()

    async def _write_patiently(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._clocks.write_s):
                await self._send(data)
        except TimeoutError:
            self._finish(Ending.SLOW_CALLER)

    # ── timers ───────────────────────────────────────────────────────────────────────────────────────────

    @property
    def last_at(self) -> float:
        """The moment from which the upstream is silent."""
        return max(self._last_at, self._resumed_at)

    @property
    def spoke_at(self) -> float:
        """The moment from which the caller has heard nothing but heartbeats."""
        return self.last_at

    def next_at(self) -> float:
        """The moment at which something may be due."""
        clocks = self._clocks
        if self._blocked:
            return clocks.total_at if self._grace is None else min(clocks.total_at, self._grace)
        moment = min(clocks.total_at, self.last_at + clocks.idle_s)
        if self._grace is not None:
            return min(moment, self._grace)
        if clocks.heartbeat_s and self._scanner is not None:
            # A beat that could not be sent (mid-event) must not make the timer fire again at once.
            moment = min(moment, max(self.spoke_at, self._beats_at) + clocks.heartbeat_s)
        return moment

    def _due(self) -> bool:
        """Ends the answer if a deadline has passed; True if a heartbeat should be sent now."""
        now = monotonic() + TIMER_SLACK_S
        clocks = self._clocks
        if self._grace is not None and now >= self._grace:
            self._finish(Ending.GRACE)
        elif now >= clocks.total_at:
            self._finish(Ending.DEADLINE)
        elif self._blocked:
            pass
        elif now >= self.last_at + clocks.idle_s:
            self._finish(Ending.STALL)
        elif self._beat_is_due(now):
            self._beats_at = now
            return self.takes_event()
        return False

    def _beat_is_due(self, now: float) -> bool:
        every_s = self._clocks.heartbeat_s
        if not every_s or self._scanner is None or self._grace is not None:
            return False
        return now >= max(self.spoke_at, self._beats_at) + every_s

    def _arm(self) -> None:
        if self._exchange is None or not self._exchange.pushes:
            return  # a pull loop asks `next_at` itself
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(max(0.0, self.next_at() - monotonic()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self._due():
            self.heartbeats += 1
            self._transport.write(framed(HEARTBEAT) if self._framing else HEARTBEAT)
        if self._ending is None:
            self._arm()

    async def tick_deliver(self) -> None:
        """Pull: the same when the wait for the next read ran out."""
        if self._due():
            self.heartbeats += 1
            await self._write_patiently(HEARTBEAT)

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────

    def told_all(self) -> bool:
        """Has the caller been given a stream to its terminator? SDKs leave then, without waiting for the end
        of the body (openai-python and openai-node, measured)."""
        return self._grace is not None and not self._missed and not self._blocked and not self.held()

    def verdict_of_told(self) -> Reason:
        """Of a stream that the caller left when it had it all."""
        assert self._scanner is not None
        return Reason.UPSTREAM_ERROR if self._scanner.in_band_error() else Reason.COMPLETE

    def verdict(self) -> Reason:
        """What the ending means (contract section 6, rules 2 and 3)."""
        ending = self._ending
        if ending is Ending.STALL:
            return Reason.UPSTREAM_STALL
        if ending is Ending.DEADLINE:
            return Reason.DEADLINE
        if ending is Ending.SLOW_CALLER:
            return Reason.CLIENT_GONE
        if self._scanner is None:
            return Reason.UPSTREAM_CUT if ending is Ending.CUT else Reason.COMPLETE
        if self._scanner.in_band_error():
            return Reason.UPSTREAM_ERROR
        if ending is Ending.GRACE or self._scanner.succeeded(framed=ending is Ending.FRAMED):
            return Reason.COMPLETE
        return Reason.UPSTREAM_CUT

    @property
    def gave_up(self) -> bool:
        """Did the caller not take what was sent?"""
        return self._ending is Ending.SLOW_CALLER

    @property
    def ended_well(self) -> bool:
        """Did the upstream itself end its answer in good order?"""
        return self._ending in (Ending.FRAMED, Ending.GRACE)

    def rest(self) -> bytes:
        """What is still to be sent after the last byte of an answer that ended well."""
        return b""

    def held(self) -> bytes:
        """What is still to be sent of an answer that ended otherwise: the start of an event."""
        return b""

    def takes_event(self) -> bool:
        """May a comment or an event of ours be added?"""
        return self._scanner is not None and self._scanner.at_boundary()
