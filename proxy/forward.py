"""The attempts of one request: lease, send, wait for the first byte, commit, pipe.

Until `ctx.committed` an attempt may fail and another one be made; from the first byte of the upstream's
answer on there is only one way: to the end, or to a visible break. A heartbeat that was sent early
(`streams.commit_after`) fixes the status at 200 but is no commit: another attempt is still allowed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, web
from multidict import CIMultiDict

from proxy import answers, headers
from proxy.context import Context, Phase
from proxy.errors import (
    Draining,
    HeadraceError,
    Killed,
    Reason,
    UpstreamConnectFailed,
    UpstreamCut,
    UpstreamDeadline,
    UpstreamFailed,
    UpstreamInvalid,
    UpstreamStale,
    UpstreamTimeout,
)
from proxy.pipe import HEARTBEAT, TIMER_SLACK_S, Clocks, Pipe, break_off
from proxy.reshape import WHOLE_LIMIT, ReshapedPipe
from proxy.session import translate
from proxy.sse import Scanner
from proxy.usage import find_in_json
from proxy.wire import HELD_LIMIT, End

if TYPE_CHECKING:
    from proxy import schema
    from proxy.metrics import Metrics
    from proxy.reshape import Reshape
    from proxy.upstream import Exchange, Upstream

_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx buffers by default
}
#: Attempts whose caller has gone are no verdict on the upstream.
_CANCELLED = "cancelled"


#: Is there a slot for this upstream, at once?
MayAsk = Callable[["Upstream"], Awaitable[bool]]


async def _anybody(_: Upstream) -> bool:
    return True


class Job:
    """What is to be asked: the same for every attempt, but for the model's name."""

    __slots__ = ("bodies", "fields", "method", "path", "reshape", "wants_stream")

    def __init__(
        self,
        method: str,
        path: str,
        fields: bytes,
        bodies: Sequence[bytes],
        *,
        wants_stream: bool,
        reshape: Reshape | None = None,
    ) -> None:
        self.method = method
        self.path = path
        self.fields = fields
        self.bodies = bodies  # one per target
        self.wants_stream = wants_stream
        self.reshape = reshape  # None: the answer is passed on as it is


class Forwarding:
    """One request on its way through the upstreams."""

    def __init__(
        self, request: web.Request, ctx: Context, streams: schema.Streams, write_s: float, metrics: Metrics
    ) -> None:
        self._request = request
        self._ctx = ctx
        self._streams = streams
        self._write_s = write_s
        self._metrics = metrics
        self._response: web.StreamResponse | None = None
        self._pipe_now: Pipe | None = None
        self._reshape: Reshape | None = None
        self.may_ask: MayAsk = _anybody
        self._began_at = 0.0
        self._queued_until = 0.0
        self._total_at = 0.0

    async def run(self, job: Job, targets: Sequence[Upstream]) -> web.StreamResponse:
        """Returns when the last byte has gone to the caller; raises HeadraceError if nothing has."""
        ctx = self._ctx
        self._reshape = job.reshape
        self._queued_until = self._began_at = monotonic()
        self._total_at = self._began_at + targets[0].timeouts.total
        for upstream in targets:
            upstream.users += 1  # a reload must not close one that may still be asked
        try:
            return await self._attempts(job, targets)
        except HeadraceError as error:
            failure = error
        except asyncio.CancelledError:
            if ctx.stopped is None:
                raise  # the caller has left
            failure = _stopped(ctx.stopped)
        finally:
            for upstream in targets:
                upstream.users -= 1
        if self._response is None:
            raise failure
        return await self._break_off(failure)

    async def _attempts(self, job: Job, targets: Sequence[Upstream]) -> web.StreamResponse:
        """One upstream after the other while nothing was sent to any of them."""
        last: UpstreamFailed = UpstreamConnectFailed()
        for upstream, body in zip(targets, job.bodies, strict=True):
            if not await self.may_ask(upstream):
                continue
            try:
                return await self._fresh_if_stale(job, upstream, body)
            except UpstreamConnectFailed as error:
                last = error
        raise last

    async def _fresh_if_stale(self, job: Job, upstream: Upstream, body: bytes) -> web.StreamResponse:
        try:
            return await self._attempt(job, upstream, body)
        except UpstreamStale:
            return await self._attempt(job, upstream, body, fresh=True)

    async def _attempt(
        self, job: Job, upstream: Upstream, body: bytes, *, fresh: bool = False
    ) -> web.StreamResponse:
        ctx = self._ctx
        ctx.attempts += 1
        ctx.upstream = upstream.name
        ctx.phase = Phase.FIRST_BYTE
        exchange = upstream.exchange(job.method, job.path, job.fields, body)
        exchange.fresh = fresh
        upstream.in_flight += 1
        result = _CANCELLED
        try:
            await self._send(exchange)
            await self._first_byte(exchange, upstream, stream=job.wants_stream)
            response = await self._answer(exchange, upstream)
            result = self._result(exchange.status)
            return response
        except UpstreamFailed as error:
            result = error.result
            raise
        finally:
            exchange.close()
            upstream.in_flight -= 1
            self._metrics.upstream_attempts.add((upstream.name, result))

    def _result(self, status: int) -> str:
        """The attempt's label, once its answer has been delivered or broken off."""
        if status >= 500 or status == 429:
            return "status"
        reason = self._ctx.reason
        if reason in (Reason.UPSTREAM_STALL, Reason.DEADLINE):
            return "timeout"
        if reason is Reason.UPSTREAM_CUT:
            return "reset"
        return _CANCELLED if reason is Reason.CLIENT_GONE else "ok"

    # ── until the first byte ─────────────────────────────────────────────────────────────────────────────

    async def _send(self, exchange: Exchange) -> None:
        ctx = self._ctx
        try:
            await exchange.send()
        except Exception as error:
            raise translate(error) from error
        ctx.reached_upstream = True
        ctx.sent_at = monotonic()

    async def _first_byte(self, exchange: Exchange, upstream: Upstream, *, stream: bool) -> None:
        """Waits for the first byte of the body; meanwhile, and only for streams, keeps the caller warm."""
        ctx = self._ctx
        sent_at = ctx.sent_at or monotonic()
        first_byte_at = sent_at + upstream.timeouts.first_byte
        beat_at = self._queued_until + self._streams.commit_after
        beats = stream and self._streams.commit_after > 0
        while True:
            limit = min(first_byte_at, self._total_at)
            if await exchange.hold(1, min(limit, beat_at) if beats else limit):
                break
            now = monotonic() + TIMER_SLACK_S
            if now >= self._total_at:
                raise UpstreamDeadline
            if now >= first_byte_at:
                raise UpstreamTimeout
            if beats and now >= beat_at:
                if exchange.answered and not answers.is_event_stream(exchange.status, exchange.fields):
                    beats = False  # its head is here, and is no stream's: 200 would be a lie
                    continue
                await self._keep_warm(upstream)
                beat_at = now + (self._streams.heartbeat or math.inf)
        ctx.first_byte_at = monotonic()

    async def _keep_warm(self, upstream: Upstream) -> None:
        """Commits to 200 before the upstream has answered, so that no proxy on the way gives up."""
        if self._response is None:
            self._response = response = web.StreamResponse(headers=CIMultiDict(_STREAM_HEADERS))
            await self._prepare(response, upstream)
        self._metrics.heartbeats.add()
        await self._response.write(HEARTBEAT)

    async def _prepare(self, response: web.StreamResponse, upstream: Upstream) -> None:
        self._describe(response.headers, upstream)
        if response.content_length is None and self._request.version == HttpVersion11:
            response.enable_chunked_encoding()
        await response.prepare(self._request)
        self._ctx.status = response.status

    def _describe(self, fields: CIMultiDict[str], upstream: Upstream) -> None:
        """Our own fields on a proxied answer."""
        ctx = self._ctx
        fields["x-headrace-upstream"] = upstream.name
        fields["x-headrace-attempts"] = str(ctx.attempts)
        waited_ms = (ctx.queue_s or 0.0) * 1000
        upstream_ms = (monotonic() - (ctx.sent_at or monotonic())) * 1000
        fields["server-timing"] = f"queue;dur={waited_ms:.1f}, upstream;dur={upstream_ms:.1f}"

    def _passed_on(self, exchange: Exchange) -> CIMultiDict[str]:
        """The upstream's quota is shown only to callers without a plan of their own."""
        return CIMultiDict(headers.to_caller(exchange.fields, keep_ratelimit=self._ctx.principal is None))

    # ── the answer ───────────────────────────────────────────────────────────────────────────────────────

    async def _answer(self, exchange: Exchange, upstream: Upstream) -> web.StreamResponse:
        answers.refuse_unusable(exchange.status)
        if self._reshape is not None:
            self._reshape.check(exchange.status, exchange.fields)
        if answers.is_event_stream(exchange.status, exchange.fields):
            return await self._stream(exchange, upstream)
        if self._response is not None:
            raise answers.late_refusal(exchange.status)
        return await self._whole(exchange, upstream)

    async def _stream(self, exchange: Exchange, upstream: Upstream) -> web.StreamResponse:
        ctx = self._ctx
        ctx.streaming = True
        ctx.phase = Phase.STREAM
        expects = ctx.endpoint is not None and ctx.endpoint.ends_with_terminator
        encoded = headers.value_of(exchange.fields, b"content-encoding") is not None
        scanner = Scanner(ctx.dialect, expects_terminator=expects and not encoded)
        if self._response is None:
            fields = self._passed_on(exchange)
            fields.update(_STREAM_HEADERS | {"Content-Type": fields["Content-Type"]})
            response = web.StreamResponse(status=exchange.status, reason=exchange.reason, headers=fields)
            await self._prepare(response, upstream)
            self._response = response
        self._metrics.streams_active.add((upstream.name,), 1)
        try:
            return await self._pipe(exchange, upstream, scanner)
        finally:
            self._metrics.streams_active.add((upstream.name,), -1)

    async def _whole(self, exchange: Exchange, upstream: Upstream) -> web.StreamResponse:
        """An answer that is no stream: small ones are looked at and sent at once, large ones piped."""
        ctx = self._ctx
        ctx.phase = Phase.ANSWER
        await self._hold_small(exchange, upstream)
        body, end = exchange.taken()
        rewrite = None if self._reshape is None else self._reshape.rewrite
        if rewrite is not None and end is None:
            body, end = await self._hold_whole(exchange, upstream, body)
        fields = self._passed_on(exchange)
        if end is not None:
            if end is End.CUT:
                raise UpstreamCut
            body = answers.checked_body(exchange.status, body)
            ctx.usage = find_in_json(ctx.dialect, body) if b'"usage"' in body else None
            if rewrite is not None:
                body = rewrite(exchange.status, body)
            response = web.Response(status=exchange.status, reason=exchange.reason, body=body, headers=fields)
            self._describe(response.headers, upstream)
            ctx.committed = True
            ctx.chunks, ctx.bytes_out, ctx.status = 1, len(body), exchange.status
            ctx.reason = Reason.UPSTREAM_ERROR if exchange.status >= 500 else Reason.COMPLETE
            return response
        length = headers.value_of(exchange.fields, b"content-length")
        large = web.StreamResponse(status=exchange.status, reason=exchange.reason, headers=fields)
        if length is not None:
            large.content_length = int(length)
        await self._prepare(large, upstream)
        self._response = large
        return await self._pipe(exchange, upstream, None, body)

    async def _hold_small(self, exchange: Exchange, upstream: Upstream) -> None:
        idle_s = upstream.timeouts.idle
        while not await exchange.hold(HELD_LIMIT, min(exchange.last_at + idle_s, self._total_at)):
            now = monotonic() + TIMER_SLACK_S
            if now >= self._total_at:
                raise UpstreamDeadline
            if now >= exchange.last_at + idle_s:
                raise UpstreamTimeout

    async def _hold_whole(
        self, exchange: Exchange, upstream: Upstream, first: bytes
    ) -> tuple[bytes, End | None]:
        """For an answer that is rewritten, of whatever size."""
        body, end = bytearray(first), None
        while end is None:
            if len(body) > WHOLE_LIMIT:
                raise UpstreamInvalid
            exchange.resume()  # what it held was more than it keeps by itself
            try:
                await self._hold_small(exchange, upstream)
            except UpstreamInvalid:
                raise UpstreamCut from None  # it began well
            piece, end = exchange.taken()
            body += piece
        return bytes(body), end

    async def _pipe(
        self, exchange: Exchange, upstream: Upstream, scanner: Scanner | None, first: bytes = b""
    ) -> web.StreamResponse:
        ctx, response = self._ctx, self._response
        assert response is not None
        writer = await response.prepare(self._request)
        assert writer is not None
        clocks = Clocks(upstream.timeouts.idle, self._total_at, self._streams.heartbeat, self._write_s)
        parts = (ctx, self._request, response, writer, scanner, clocks)
        transform = None if self._reshape is None or scanner is None else self._reshape.transform
        self._pipe_now = pipe = Pipe(*parts) if transform is None else ReshapedPipe(transform, *parts)
        ctx.committed = True
        try:
            if first:
                await pipe.deliver(first)
            await pipe.run(exchange)
        finally:
            if scanner is not None:
                self._metrics.inter_chunk.merge((upstream.name,), pipe.gaps, pipe.gaps_s)
                ctx.usage = scanner.usage() or scanner.estimate(ctx.asked_tokens)
            if pipe.heartbeats:
                self._metrics.heartbeats.add((), pipe.heartbeats)
        return await self._conclude(pipe, exchange.status)

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
        if ctx.reason in (Reason.CLIENT_GONE, Reason.UPSTREAM_ERROR):
            return await self._abort()  # nobody is there, or the upstream has said itself what happened
        return await self._break_off(_after_commit(ctx.reason))

    async def _finish(self, rest: bytes) -> web.StreamResponse:
        """The end of the body; a caller that does not take it any more has left."""
        assert self._response is not None
        try:
            async with asyncio.timeout(self._write_s):
                await self._response.write_eof(rest)
        except TimeoutError:
            self._ctx.reason = Reason.CLIENT_GONE
            return await self._abort()
        return self._response

    async def _break_off(self, error: HeadraceError) -> web.StreamResponse:
        """The error event in the route's dialect if the stream is between two events, then the abort:
        never a clean end."""
        ctx = self._ctx
        ctx.reason = error.reason
        ctx.error_code = error.code
        if self._pipe_now is not None and not self._pipe_now.takes_event():
            return await self._abort()
        transport = self._request.transport
        if transport is not None and not transport.is_closing():
            assert self._response is not None
            event = error.event(ctx.dialect, ctx.request_id)
            transport.write(b"%x\r\n%b\r\n" % (len(event), event) if self._response.chunked else event)
        return await self._abort()

    async def _abort(self) -> web.StreamResponse:
        assert self._response is not None
        transport = self._request.transport
        if transport is not None:
            framed = self._response.chunked or self._response.content_length is not None
            await break_off(transport, framed=framed)
        return self._response


def _after_commit(reason: Reason) -> UpstreamFailed:
    if reason is Reason.UPSTREAM_STALL:
        return UpstreamTimeout()
    if reason is Reason.DEADLINE:
        return UpstreamDeadline()
    return UpstreamCut()


def _stopped(reason: Reason) -> HeadraceError:
    """A cancellation that carries a reason (drain, kill) becomes that error."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
    return Draining() if reason is Reason.DRAINED else Killed()
