"""A WebSocket session: messages passed on unchanged in both directions, until one side ends it.

- Text and binary messages, pings and pongs, the close code and its reason go through as they came. A message
  is sent on once it is whole (aiohttp reassembles fragments); nothing is compressed on either side, which
  OpenAI's SDKs ask for as well.
- Backpressure: a message is taken from one side when the one before it has been given to the other, so a
  session holds one message and aiohttp's read buffer (128 KiB) a direction.
- Sizes: a caller's message is a request body, `max_body_bytes`; an upstream's is at most
  `dial.UPSTREAM_MESSAGE`. A larger one ends the session (1009).
- Time: `timeouts.total` does not apply, sessions last as long as both sides like (OpenAI ends its own after
  60 minutes). Whoever says nothing for a quarter of the upstream's `timeouts.idle` is sent a ping of ours,
  whose pong goes no further. An upstream without any sign of life for `timeouts.idle` has stalled. A caller
  may be silent (some answer pings only while they read); if its host is gone, the ping makes TCP notice
  (`downstream`). A caller that does not take a message within `timeouts.write` has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING, Literal, NamedTuple

import aiohttp
from aiohttp import WSMsgType, web
from aiohttp.http_websocket import WSMessageTextBytes

from proxy import socket_events
from proxy.breakoff import break_off
from proxy.dial import CLOSE_S, UpstreamSocket
from proxy.errors import (
    Draining,
    HeadraceError,
    Killed,
    Reason,
    UpstreamCut,
    UpstreamInvalid,
    UpstreamTimeout,
)
from proxy.tasks import spawn

if TYPE_CHECKING:
    from proxy.context import Context

_OWN_PING = b"headrace"
#: Codes that no frame may carry (RFC 6455 section 7.4.1) and what is said instead; 0 is a frame without one.
_NOT_ON_THE_WIRE = {0: 1000, 1004: 1002, 1005: 1000, 1006: 1011, 1015: 1011}

CallerSocket = web.WebSocketResponse[Literal[False]]


# ── the connection of a caller ───────────────────────────────────────────────────────────────────────────


class Caller:
    """The WebSocket of a caller, and the connection below it."""

    def __init__(self, request: web.Request, socket: CallerSocket) -> None:
        self.socket = socket
        self._transport = request.transport

    async def close(self, code: int, text: str) -> None:
        """Nobody may be reading from it meanwhile: then the caller's own Close frame is waited for, and it
        reads ours before the connection ends (RFC 6455 section 7.1.1)."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.socket.close(code=code, message=text.encode())
        except TimeoutError:
            pass
        if self._transport is not None:
            await break_off(self._transport, framed=True)


# ── the session ──────────────────────────────────────────────────────────────────────────────────────────


class _How(Enum):
    CLOSED = "a Close frame"
    LOST = "the connection ended without one"
    INVALID = "what came was no WebSocket"


class _Side:
    """One end of the session."""

    __slots__ = ("pinged_at", "seen_at", "socket", "writing_since")

    def __init__(self, socket: CallerSocket | UpstreamSocket, now: float) -> None:
        self.socket = socket
        self.seen_at = now  # the last sign of life
        self.pinged_at = now
        self.writing_since: float | None = None  # a message to it is under way


class _Ended(NamedTuple):
    """Which side ended the session, and how; code 0 and no text without a Close frame."""

    side: _Side
    how: _How
    code: int = 0
    text: str = ""


class _Verdict(NamedTuple):
    """What the session ended for, and what each side is told."""

    reason: Reason
    code: int
    text: str
    error: HeadraceError | None = None  # ours: names the end in the log line


class Limits(NamedTuple):
    """Seconds: idle_s is the upstream's, write_s the caller's."""

    idle_s: float
    write_s: float

    @property
    def ping_s(self) -> float:
        return self.idle_s / 4


#: What goes on in place of a caller's message; raises HeadraceError for one that may not pass, which then
#: stays here and is answered with an error event.
Check = Callable[[bytes], bytes]
_Take = Callable[[bytes], Awaitable[bytes | None]]


class Tunnel:
    """Passes messages until one side ends the session, and then ends it on the other side as well."""

    def __init__(
        self, ctx: Context, caller: Caller, upstream: UpstreamSocket, limits: Limits, check: Check | None
    ) -> None:
        now = monotonic()
        self._ctx = ctx
        self._door = caller
        self._upstream_socket = upstream
        self._caller = _Side(caller.socket, now)
        self._upstream = _Side(upstream, now)
        self._limits = limits
        self._check = check
        self._up: asyncio.Task[_Ended]
        self._down: asyncio.Task[_Ended]

    async def run(self) -> None:
        """Returns with `ctx.reason` set. Raises CancelledError if the caller's connection is gone."""
        self._up = spawn(self._relay(self._caller, self._upstream, self._from_caller), "websocket up")
        self._down = spawn(self._relay(self._upstream, self._caller, self._from_upstream), "websocket down")
        try:
            await self._end(await self._watch())
        except asyncio.CancelledError:
            await self._interrupted()
        finally:
            self._up.cancel()
            self._down.cancel()

    async def _interrupted(self) -> None:
        """A cancellation that carries a reason (drain, kill), or the caller's connection is gone."""
        ctx = self._ctx
        if ctx.stopped is None:
            if ctx.reason is None:
                await self._end(await self._left())
            raise asyncio.CancelledError
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        if ctx.reason is None:
            await self._end(_stopped(ctx.stopped))

    # ── messages ─────────────────────────────────────────────────────────────────────────────────────────

    async def _relay(self, source: _Side, sink: _Side, take: _Take) -> _Ended:
        """One direction, to its end."""
        while True:
            message = await source.socket.receive()
            source.seen_at = monotonic()
            kind, data = message.type, message.data
            if kind not in _PASSED_ON:
                return _ended(source, message)
            if kind in (WSMsgType.TEXT, WSMsgType.BINARY):
                data = await take(data)
            if data is None or (kind is WSMsgType.PONG and data == _OWN_PING):
                continue
            sink.writing_since = monotonic()
            try:
                await sink.socket.send_frame(data, kind)
            except ConnectionError:
                return _Ended(sink, _How.LOST)
            sink.writing_since = None
            source.seen_at = monotonic()  # nobody was listening while we wrote

    async def _from_caller(self, data: bytes) -> bytes | None:
        self._ctx.bytes_in += len(data)
        if self._check is None:
            return data
        try:
            return self._check(data)
        except HeadraceError as error:
            event = socket_events.error_event(error, self._ctx.request_id)
            try:
                await self._caller.socket.send_frame(event, WSMsgType.TEXT)
            except ConnectionError:
                pass  # the next read will say so
            return None

    async def _from_upstream(self, data: bytes) -> bytes | None:
        ctx = self._ctx
        if ctx.first_byte_at is None:
            ctx.first_byte_at = monotonic()
        ctx.chunks += 1
        ctx.bytes_out += len(data)
        if (more := socket_events.used(data)) is not None:
            ctx.usage = socket_events.together(ctx.usage, more)
        return data

    # ── watching ─────────────────────────────────────────────────────────────────────────────────────────

    async def _watch(self) -> _Verdict:
        """Until one side ends the session or a timer does."""
        relays = {self._up, self._down}
        while True:
            wait_s = max(0.0, self._next_at() - monotonic())
            done, _ = await asyncio.wait(relays, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return self._verdict(await self._first_ended())
            now = monotonic()
            if (late := self._late(now)) is not None:
                return late
            for side in (self._caller, self._upstream):
                await self._ping(side, now)

    def _next_at(self) -> float:
        """When there is something to do if nothing happens until then."""
        limits, caller, upstream = self._limits, self._caller, self._upstream
        moments = [max(side.seen_at, side.pinged_at) + limits.ping_s for side in (caller, upstream)]
        if caller.writing_since is not None:
            moments.append(caller.writing_since + limits.write_s)
        else:
            moments.append(upstream.seen_at + limits.idle_s)
        if upstream.writing_since is not None:
            moments.append(upstream.writing_since + limits.idle_s)
        return min(moments)

    def _late(self, now: float) -> _Verdict | None:
        limits, caller, upstream = self._limits, self._caller, self._upstream
        if caller.writing_since is not None:
            if now >= caller.writing_since + limits.write_s:
                return _GONE
        elif now >= upstream.seen_at + limits.idle_s:  # one that waits for a slow caller is not heard
            return _failure(UpstreamTimeout())
        if upstream.writing_since is not None and now >= upstream.writing_since + limits.idle_s:
            return _failure(UpstreamTimeout())
        return None

    async def _ping(self, side: _Side, now: float) -> None:
        if now < max(side.seen_at, side.pinged_at) + self._limits.ping_s:
            return
        side.pinged_at = now
        if side.writing_since is not None:
            return  # it has enough to read
        try:
            async with asyncio.timeout(CLOSE_S):
                await side.socket.ping(_OWN_PING)
        except (ConnectionError, TimeoutError):
            pass  # the relays will see

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────

    async def _first_ended(self) -> _Ended:
        """What ended first. A write that failed tells less than what the other side may have said before it
        was gone: its own relay knows, or will in a moment."""
        for relay, other, sink in (
            (self._up, self._down, self._upstream),
            (self._down, self._up, self._caller),
        ):
            if relay.done() and relay.result().side is sink:
                await asyncio.wait({other}, timeout=CLOSE_S)
                return other.result() if other.done() else relay.result()
        return self._up.result() if self._up.done() else self._down.result()

    async def _left(self) -> _Verdict:
        """The caller's connection is gone; it may have said goodbye just before."""
        await asyncio.wait({self._up}, timeout=CLOSE_S)
        if not self._up.done() or self._up.result().side is not self._caller:
            return _GONE
        return self._verdict(self._up.result())

    def _verdict(self, ended: _Ended) -> _Verdict:
        if ended.side is self._caller:
            normal = ended.code in _NORMAL or ended.code >= 3000  # an application's own
            said = _Verdict(Reason.COMPLETE if normal else Reason.CLIENT_GONE, ended.code, ended.text)
            return said if ended.how is _How.CLOSED else _GONE
        if ended.how is _How.CLOSED:
            reason = Reason.COMPLETE if ended.code in _NORMAL else Reason.UPSTREAM_ERROR
            return _Verdict(reason, ended.code, ended.text)
        return _failure(UpstreamCut() if ended.how is _How.LOST else UpstreamInvalid())

    async def _end(self, verdict: _Verdict) -> None:
        """Both sides at once: a drain gives them one second. The caller's connection may end first, which
        cancels this task: the upstream hears its goodbye all the same."""
        self._ctx.reason = verdict.reason
        self._ctx.error_code = verdict.error.code if verdict.error is not None else None
        self._up.cancel()
        goodbye = spawn(self._close_upstream(verdict), "websocket goodbye")
        try:
            await asyncio.wait({self._up})
            await self._door.close(_on_the_wire(verdict.code), verdict.text)
        finally:
            await asyncio.wait({goodbye})

    async def _close_upstream(self, verdict: _Verdict) -> None:
        """The upstream learns nothing of our troubles but that the session is over."""
        code, text = (verdict.code, verdict.text) if verdict.error is None else (1001, "")
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._upstream_socket.close(code=_on_the_wire(code), message=text.encode())
        except TimeoutError:
            pass  # `Line.close` ends it


#: Close codes of a session that went well; 0 is a frame without one (1005).
_NORMAL = (0, 1000, 1001)
_PASSED_ON = frozenset({WSMsgType.TEXT, WSMsgType.BINARY, WSMsgType.PING, WSMsgType.PONG})
_GONE = _Verdict(Reason.CLIENT_GONE, 1001, "")


def _ended(source: _Side, message: aiohttp.WSMessage | WSMessageTextBytes) -> _Ended:
    if message.type is WSMsgType.CLOSE:
        return _Ended(source, _How.CLOSED, message.data, message.extra or "")
    invalid = message.type is WSMsgType.ERROR and isinstance(message.data, aiohttp.WebSocketError)
    return _Ended(source, _How.INVALID if invalid else _How.LOST)


def _failure(error: HeadraceError) -> _Verdict:
    return _Verdict(error.reason, 1011, error.message, error)


def _stopped(reason: Reason) -> _Verdict:
    if reason is Reason.DRAINED:
        return _Verdict(reason, 1001, "draining", Draining())
    return _Verdict(reason, 1008, Killed.message, Killed())


def _on_the_wire(code: int) -> int:
    code = _NOT_ON_THE_WIRE.get(code, code)
    return code if 1000 <= code < 5000 else 1002
