"""The answer on its way to the caller: the head, the bytes, the end.

`ctx.committed` turns true with the first upstream byte to the caller: before it another attempt may be made,
after it there is only the end, or a visible break. A heartbeat that was sent early (`streams.commit_after`)
fixes the status at 200 but is no commit.
"""

from __future__ import annotations

import asyncio
import random
from time import monotonic
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, web
from multidict import CIMultiDict

from proxy import answers, headers, ready
from proxy.attempt import WholeAnswer
from proxy.breakoff import break_off as end_visibly
from proxy.chunked import framed
from proxy.context import Context, Phase
from proxy.drain_usage import drain_for_usage
from proxy.endpoints import Model
from proxy.errors import (
    HeadraceError,
    Reason,
    UpstreamCut,
    UpstreamDeadline,
    UpstreamFailed,
    UpstreamInvalid,
    UpstreamTimeout,
)
from proxy.hold import hold_small, hold_whole
from proxy.pipe import HEARTBEAT, Clocks, Pipe
from proxy.ready import Own
from proxy.reshape import WHOLE_LIMIT, Reshape, ReshapedPipe
from proxy.tap import Tap
from proxy.usage import find_in_json
from proxy.verify import VerifiedPipe, is_drawn
from proxy.wire_connection import End
from proxy.wrap import wrap

if TYPE_CHECKING:
    from proxy import schema
    from proxy.metrics import Metrics
    from proxy.reshape import Rewrite
    from proxy.targets import Target
    from proxy.upstream import Exchange, Upstream
    from proxy.usage import Usage

_EVENT_STREAM = "text/event-stream; charset=utf-8"
#: On every event stream: nobody may change it, and nginx, which buffers by default, may not keep it back.
_STREAM_LINES = "\r\nCache-Control: no-cache, no-transform\r\nX-Accel-Buffering: no"
_STREAM_NAMES = frozenset({b"cache-control", b"x-accel-buffering"})
_NO_NAMES: frozenset[bytes] = frozenset()
#: By these names: a member that is looked up in its class costs 0.1 us (Python 3.11), a global a twentieth.
_CUT, _ANSWER, _STREAM = End.CUT, Phase.ANSWER, Phase.STREAM
_COMPLETE, _UPSTREAM_ERROR, _NO_MODEL = Reason.COMPLETE, Reason.UPSTREAM_ERROR, Model.NONE

#: Between the error event and the break: Chromium drops what it has not read when both come at once (23 of 60
#: streams, measured; Node and Python none).
_LAST_WORDS_S = 0.03


class Delivery:
    """One request's answer. Nothing is sent before there is something to send."""

    __slots__ = (
        "_ctx",
        "_metrics",
        "_pipe_now",
        "_request",
        "_response",
        "_streams",
        "_target",
        "_write_s",
        "reshape",
        "total_at",
        "wraps",
    )

    def __init__(
        self,
        request: web.Request,
        ctx: Context,
        streams: schema.Streams,
        write_s: float,
        metrics: Metrics,
    ) -> None:
        self._request = request
        self._ctx = ctx
        self._streams = streams
        self._write_s = write_s
        self._metrics = metrics
        self._response: web.StreamResponse | None = None
        self._pipe_now: Pipe | None = None
        self._target: Target
        self.reshape: Reshape | None = None
        self.wraps = False  # plain JSON is delivered as a stream
        self.total_at = 0.0  # the deadline over all attempts

    @property
    def started(self) -> bool:
        """Has the caller been told 200?"""
        return self._response is not None

    @property
    def _upstream(self) -> Upstream:
        return self._target.upstream

    @property
    def _idle_s(self) -> float:
        return self._upstream.timeouts.idle

    # ── before the first byte ────────────────────────────────────────────────────────────────────────────

    async def keep_warm(self, target: Target) -> None:
        """Commits to 200 before the upstream has answered, so that no proxy on the way gives up."""
        self._target = target
        if self._response is None:
            fields = CIMultiDict(headers.pairs(self._own(200, streamed=True).lines))
            fields["Content-Type"] = _EVENT_STREAM
            self._response = response = web.StreamResponse(headers=fields)
            await self._prepare(response)
        self._metrics.heartbeats.add()
        await self._response.write(HEARTBEAT)

    async def _prepare(self, response: web.StreamResponse) -> None:
        self._ctx.goes_out_by(self._request.transport)
        if response.content_length is None and self._request.version == HttpVersion11:
            response.enable_chunked_encoding()
        await response.prepare(self._request)
        self._ctx.status = response.status

    def _own(self, status: int, *, streamed: bool = False) -> Own:
        """Our own fields on a proxied answer."""
        ctx, target = self._ctx, self._target
        fallback, queue_s, sent_at = target.fallback, ctx.queue_s, ctx.sent_at
        waited_ms = f"{queue_s * 1000:.1f}" if queue_s else "0.0"
        upstream_ms = f"{(monotonic() - sent_at) * 1000:.1f}" if sent_at else "0.0"
        lines = (
            f"\r\nx-headrace-upstream: {target.upstream.name}\r\nx-headrace-attempts: {ctx.attempts}"
            f"\r\nserver-timing: queue;dur={waited_ms}, upstream;dur={upstream_ms}"
        )
        replaced = _NO_NAMES
        if streamed:
            lines += _STREAM_LINES
            replaced = _STREAM_NAMES
        if fallback is not None:
            lines += f"\r\nx-headrace-model: {fallback}"
            replaced |= {b"x-headrace-model"}
        if status >= 500 and ctx.given_up:
            lines += "\r\nx-should-retry: false"
            replaced |= {b"x-should-retry"}
        return Own(lines, replaced)

    # ── the answer ───────────────────────────────────────────────────────────────────────────────────────

    def at_once(self, exchange: Exchange, target: Target) -> web.StreamResponse | None:
        """`answer` of what is passed on as it is, and came in one piece: most short ones. None: another."""
        self._target = target
        body, end = exchange.look()
        if end is None or end is _CUT or self._response is not None or self.wraps or self.reshape is not None:
            return None
        if answers.is_event_stream(exchange.status, exchange.fields):
            return None
        return self._passed(exchange, body)

    async def answer(self, exchange: Exchange, target: Target) -> web.StreamResponse:
        """Passes it on. Raises UpstreamFailed as long as nothing has been."""
        self._target = target
        if self.reshape is not None:
            self.reshape.check(exchange.status, exchange.fields)
        if answers.is_event_stream(exchange.status, exchange.fields):
            return await self._stream(exchange)
        if self.wraps and exchange.status < 300 and _may_be_held(exchange):
            return await self._wrapped(exchange)
        if self._response is not None:
            raise answers.late_refusal(exchange.status)
        return await self._whole(exchange)

    def pass_on(self, whole: WholeAnswer, target: Target) -> web.StreamResponse:
        """An answer that was held whole, and is not tried again."""
        self._target = target
        return self._at_once(whole)

    async def _stream(self, exchange: Exchange) -> web.StreamResponse:
        ctx = self._ctx
        ctx.streaming = True
        ctx.phase = _STREAM
        await self._begin_stream(exchange)
        self._metrics.streams_active.add((self._upstream.name,), 1)
        try:
            return await self._pipe(exchange, self._tap(exchange, streamed=True))
        finally:
            self._metrics.streams_active.add((self._upstream.name,), -1)

    async def _begin_stream(self, exchange: Exchange, content_type: str = "") -> None:
        """content_type: empty for the upstream's own."""
        if self._response is not None:
            return
        ctx, request, own = self._ctx, self._request, self._own(exchange.status, streamed=True)
        head = None
        if not content_type:
            head = ready.rendered(request, ctx, exchange, own)
        if head is not None:
            ctx.goes_out_by(request.transport)
            # What pushes and has something begins with that, and a pipe that reshapes may keep it.
            with_first = exchange.pushes and self.reshape is None and bool(exchange.look()[0])
            ctx.status = exchange.status
            self._response = ready.Begun(request, head, with_first=with_first)
            return
        fields = ready.multidict_of(ctx, exchange, own)
        fields["Content-Type"] = content_type or fields["Content-Type"]
        response = web.StreamResponse(status=exchange.status, reason=exchange.reason, headers=fields)
        await self._prepare(response)
        response.headers.clear()  # 3 KiB for as long as the stream lives, and sent
        self._response = response

    async def _wrapped(self, exchange: Exchange) -> web.StreamResponse:
        """An answer that is no stream, to a caller that asked for one."""
        ctx = self._ctx
        ctx.phase = _ANSWER
        await hold_small(exchange, self._idle_s, self.total_at)
        body, end = exchange.taken()
        if end is None:
            body, end = await hold_whole(exchange, body, self._idle_s, self.total_at)
        if end is _CUT:
            raise UpstreamCut
        body = answers.checked_body(exchange.status, body)
        ctx.usage = self._usage_of(body)
        events = wrap(ctx.dialect, body)
        if events is None:
            if self._response is not None:
                raise UpstreamInvalid
            return self._at_once(WholeAnswer(exchange.status, exchange.reason, exchange.fields, body))
        await self._begin_stream(exchange, _EVENT_STREAM)
        ctx.committed = True
        ctx.chunks, ctx.bytes_out, ctx.reason = 1, len(events), Reason.COMPLETE
        return await self._finish(events)

    async def _whole(self, exchange: Exchange) -> web.StreamResponse:
        """An answer that is no stream: small ones are looked at and sent at once, large ones piped."""
        ctx = self._ctx
        ctx.phase = _ANSWER
        await hold_small(exchange, self._idle_s, self.total_at)
        body, end = exchange.taken()
        rewrite = None if self.reshape is None else self.reshape.rewrite
        if rewrite is not None and end is None:
            body, end = await hold_whole(exchange, body, self._idle_s, self.total_at)
        if end is not None:
            if end is _CUT:
                raise UpstreamCut
            return self._passed(exchange, body, rewrite)
        fields = ready.multidict_of(ctx, exchange, self._own(exchange.status))
        length = headers.value_of(exchange.fields, b"content-length")
        large = web.StreamResponse(status=exchange.status, reason=exchange.reason, headers=fields)
        if length is not None:
            large.content_length = int(length)
        await self._prepare(large)
        self._response = large
        return await self._pipe(exchange, self._tap(exchange, streamed=False), body)

    def _passed(self, exchange: Exchange, body: bytes, rewrite: Rewrite | None = None) -> web.StreamResponse:
        """An answer that is here whole."""
        status = exchange.status
        body = answers.checked_body(status, body)
        self._ctx.usage = self._usage_of(body)
        if rewrite is not None:
            body = rewrite(status, body)
        return self._at_once(WholeAnswer(status, exchange.reason, exchange.fields, body))

    def _tap(self, exchange: Exchange, *, streamed: bool) -> Tap:
        return Tap(self._ctx, exchange.fields, streamed=streamed, observes=self._observes(streamed=streamed))

    def _observes(self, *, streamed: bool) -> bool:
        """Is a usage in such an answer told, and this request's own? That of a stored object was another's,
        and has been counted then."""
        endpoint = self._ctx.endpoint
        if endpoint is None or self._streams.usage == "off" or self._request.method != "POST":
            return False
        return streamed or endpoint.model is not _NO_MODEL

    def _usage_of(self, body: bytes) -> Usage | None:
        """Of a whole answer; None: unknown."""
        return find_in_json(self._ctx.dialect, body) if self._observes(streamed=False) else None

    def _at_once(self, whole: WholeAnswer) -> web.StreamResponse:
        ctx, status = self._ctx, whole.status
        ctx.phase = _ANSWER
        ctx.committed = True
        ctx.chunks, ctx.bytes_out, ctx.status = 1, len(whole.body), status
        ctx.reason = _UPSTREAM_ERROR if status >= 500 else _COMPLETE
        return ready.Ready(ctx, whole, self._own(status))

    async def _pipe(self, exchange: Exchange, tap: Tap, first: bytes = b"") -> web.StreamResponse:
        ctx = self._ctx
        self._pipe_now = ctx.pipe = pipe = await self._pipe_for(exchange, tap)
        exchange.fields = ()  # read, and a KiB for as long as the stream lives
        ctx.committed = True
        try:
            await self._run(pipe, exchange, first)
            if pipe.gave_up:
                await self._abort()
                await self._hear_out(exchange, tap)
        except (asyncio.CancelledError, ConnectionError):
            if ctx.stopped is None and pipe.told_all():
                ctx.reason = pipe.verdict_of_told()
            elif ctx.left_at is None:
                await self._hear_out(exchange, tap)
            raise
        finally:
            ctx.usage = tap.usage()
        return await self._conclude(pipe, exchange.status)

    async def _pipe_for(self, exchange: Exchange, tap: Tap) -> Pipe:
        response = self._response
        assert response is not None
        writer = await response.prepare(self._request)
        assert writer is not None
        inter_chunk = self._metrics.inter_chunk
        gaps = inter_chunk.row((self._upstream.name,)) if self._ctx.streaming else inter_chunk.new_row()
        clocks = Clocks(self._idle_s, self.total_at, self._streams.heartbeat, self._write_s, gaps)
        parts = (self._ctx, self._request, response, writer, tap.scanner, clocks)
        transform = None
        if self.reshape is not None and tap.scanner is not None:
            transform = self.reshape.transform_of(exchange.fields)
        pipe: Pipe
        if transform is not None:
            pipe = ReshapedPipe(transform, *parts)
        elif self._ctx.streaming and is_drawn(self._streams.verify_sample, random.random):
            pipe = VerifiedPipe(self._metrics, *parts)
        else:
            pipe = Pipe(*parts)
        if tap.scanner is None and tap.feed is not None:
            pipe.listen(tap.feed)
        if isinstance(response, ready.Begun) and response.head:
            pipe.begin_with(response.head)
            response.head = b""
        return pipe

    async def _run(self, pipe: Pipe, exchange: Exchange, first: bytes) -> None:
        try:
            if first:
                await pipe.deliver(first)
            await pipe.run(exchange)
        finally:
            if pipe.heartbeats:
                self._metrics.heartbeats.add((), pipe.heartbeats)

    async def _hear_out(self, exchange: Exchange, tap: Tap) -> None:
        """The caller has left."""
        await drain_for_usage(self._ctx.core, self._ctx, exchange, tap, self.total_at)

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────

    async def _conclude(self, pipe: Pipe, status: int) -> web.StreamResponse:
        ctx, response = self._ctx, self._response
        assert response is not None
        ctx.reason = pipe.verdict()
        if ctx.reason is Reason.COMPLETE or (ctx.reason is Reason.UPSTREAM_ERROR and pipe.ended_well):
            if ctx.reason is Reason.COMPLETE and status >= 500:
                ctx.reason = Reason.UPSTREAM_ERROR
            rest = pipe.rest()
            ctx.bytes_out += len(rest)
            return await self._finish(rest)
        if ctx.reason is Reason.CLIENT_GONE:
            return await self._abort()
        if ctx.reason is Reason.UPSTREAM_ERROR:
            self._write_raw(pipe.held())  # the upstream has said itself what happened
            return await self._abort()
        return await self.break_off(_after_commit(ctx.reason))

    async def _finish(self, rest: bytes) -> web.StreamResponse:
        """The end of the body; a caller that does not take it any more has left."""
        response = self._response
        assert response is not None
        try:
            if isinstance(response, ready.Begun) and response.ended(rest):
                return response  # nearly always; a timeout alone takes 13 us
            async with asyncio.timeout(self._write_s):
                await response.write_eof(rest)
        except TimeoutError:
            self._ctx.reason = Reason.CLIENT_GONE
            return await self._abort()
        except ConnectionError:
            if rest:
                self._ctx.reason = Reason.CLIENT_GONE
            raise
        return response

    async def break_off(self, error: HeadraceError) -> web.StreamResponse:
        """The error event in the route's dialect if the stream is between two events, then the abort:
        never a clean end."""
        ctx, pipe = self._ctx, self._pipe_now
        if ctx.left_at is not None:
            return await self._abort()  # it was ended while it was read on for nobody
        ctx.reason = error.reason
        ctx.error_code = error.code
        held = b"" if pipe is None else pipe.held()
        if held:
            self._write_raw(held)
        elif pipe is None or pipe.takes_event():
            self._write_raw(error.event(ctx.dialect, ctx.request_id))
            await asyncio.sleep(_LAST_WORDS_S)
        return await self._abort()

    def _write_raw(self, data: bytes) -> None:
        """Past aiohttp's writer: nobody may wait any more."""
        transport = self._request.transport
        if data and transport is not None and not transport.is_closing():
            assert self._response is not None
            transport.write(framed(data) if self._response.chunked else data)

    async def _abort(self) -> web.StreamResponse:
        assert self._response is not None
        transport = self._request.transport
        if transport is not None:
            framed = self._response.chunked or self._response.content_length is not None
            await end_visibly(transport, framed=framed)
        return self._response


def _may_be_held(exchange: Exchange) -> bool:
    """Not if it says that it is too large; one that does not say so is found invalid when it is."""
    return int(headers.value_of(exchange.fields, b"content-length") or 0) <= WHOLE_LIMIT


def _after_commit(reason: Reason) -> UpstreamFailed:
    if reason is Reason.UPSTREAM_STALL:
        return UpstreamTimeout()
    if reason is Reason.DEADLINE:
        return UpstreamDeadline()
    return UpstreamCut()
