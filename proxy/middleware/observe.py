"""The one place that measures: counts a request in, and at its end writes its metrics and its log line.

`finally` covers the whole stream, because a handler of aiohttp returns after the last byte.
"""

from __future__ import annotations

import asyncio
from time import monotonic, time

from aiohttp import web
from aiohttp.typedefs import Handler

from proxy import headers
from proxy.accounting import row_of
from proxy.context import CONTEXT, Context
from proxy.core import Core
from proxy.errors import Reason
from proxy.log import RequestLine, timestamp
from proxy.pricing import PICOS_PER_USD, format_picos
from proxy.usage import Source

#: nginx's code for "the caller closed the connection"; only in logs and metrics, never on the wire.
_CLIENT_CLOSED = 499


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    ctx = request[CONTEXT]
    core = ctx.core
    core.metrics.requests_in_flight.add((ctx.route,), 1)
    core.running.add(ctx)
    try:
        response = await handler(request)
        if ctx.status == 0:
            ctx.status = response.status
        if ctx.reason is None:
            ctx.reason = Reason.COMPLETE
        return response
    except asyncio.CancelledError:
        ctx.reason = ctx.reason or Reason.CLIENT_GONE
        raise
    except ConnectionError:
        ctx.reason = ctx.reason or Reason.CLIENT_GONE  # a write to a connection that has just closed
        raise
    finally:
        core.running.discard(ctx)
        core.metrics.requests_in_flight.add((ctx.route,), -1)
        _settle(core, ctx, request)


def _settle(core: Core, ctx: Context, request: web.Request) -> None:
    ended_at = monotonic()
    reason = ctx.reason or Reason.INTERNAL_ERROR
    if reason is Reason.CLIENT_GONE:
        ctx.status = ctx.status or _CLIENT_CLOSED
        core.metrics.client_disconnects.add((ctx.phase.value,))
    _count(core, ctx, reason, ended_at)
    line = _line(ctx, request.method, reason, ended_at)
    line.trace_id = headers.trace_id(request.headers.get("traceparent"))
    core.request_log.write(line)


def _count(core: Core, ctx: Context, reason: Reason, ended_at: float) -> None:
    metrics, started_at = core.metrics, ctx.started_at
    upstream = ctx.upstream or "none"
    model = ctx.model or "none"
    metrics.requests.add((ctx.route, model, upstream, str(ctx.status), reason.value))
    metrics.request_duration.observe((ctx.route, upstream), ended_at - started_at)
    metrics.response_bytes.add((), ctx.bytes_out)
    if ctx.sent_at is not None:
        metrics.overhead.observe((), ctx.sent_at - started_at - (ctx.queue_s or 0.0))
    if ctx.first_byte_at is not None:
        metrics.time_to_first_byte.observe((upstream,), ctx.first_byte_at - started_at)
    if ctx.first_token_at is not None:
        metrics.time_to_first_token.observe((model, upstream), ctx.first_token_at - started_at)
    if ctx.reached_upstream:
        _enter(core, ctx, reason, ended_at - started_at)


def _enter(core: Core, ctx: Context, reason: Reason, duration_s: float) -> None:
    """Into the ledger, and the counters that are proved against it."""
    row = row_of(ctx, reason, time(), duration_s)
    core.ledger.add(row)
    if row.usage_source == Source.UNKNOWN:
        return
    tokens = core.metrics.tokens
    tokens.add((row.model, "prompt"), row.prompt_tokens)
    tokens.add((row.model, "cached"), row.cached_tokens)
    tokens.add((row.model, "completion"), row.completion_tokens)
    tokens.add((row.model, "reasoning"), row.reasoning_tokens)
    if row.cost_picos is not None:
        core.metrics.cost_usd.add((row.model,), row.cost_picos / PICOS_PER_USD)


def _line(ctx: Context, method: str, reason: Reason, ended_at: float) -> RequestLine:
    known = None if ctx.usage is None or ctx.usage.source is Source.UNKNOWN else ctx.usage
    principal, started_at = ctx.principal, ctx.started_at
    return RequestLine(
        ts=timestamp(),
        level="info",
        event="request",
        request_id=ctx.request_id,
        key_id=(principal.key_id or None) if principal is not None else None,
        plan=None if principal is None else principal.plan,
        method=method,
        route=ctx.route,
        model=ctx.model,
        upstream=ctx.upstream,
        attempts=ctx.attempts,
        status=ctx.status,
        reason=reason.value,
        queue_ms=None if ctx.queue_s is None else round(ctx.queue_s * 1000, 3),
        ttfb_ms=_ms_between(started_at, ctx.first_byte_at),
        ttft_ms=_ms_between(started_at, ctx.first_token_at),
        duration_ms=round((ended_at - started_at) * 1000, 3),
        chunks=ctx.chunks,
        bytes_in=ctx.bytes_in,
        bytes_out=ctx.bytes_out,
        prompt_tokens=None if known is None else known.prompt_tokens,
        completion_tokens=None if known is None else known.completion_tokens,
        usage_source=None if ctx.usage is None else ctx.usage.source,
        cost_usd=None if ctx.cost_picos is None else format_picos(ctx.cost_picos),
        client_ip=ctx.client_ip,
        error=ctx.error_code,
    )


def _ms_between(start: float, moment: float | None) -> float | None:
    return None if moment is None else round((moment - start) * 1000, 3)
