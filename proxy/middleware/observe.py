"""The one place that measures: at a request's end, its metrics, its row and its log line.

Before `end` lies the whole stream, because a handler of aiohttp returns after the last byte.
"""

from __future__ import annotations

from time import monotonic, time

import structlog
from aiohttp import web
from multidict import istr

from proxy import headers
from proxy.accounting import row_of
from proxy.context import Context
from proxy.core import Core
from proxy.errors import Reason
from proxy.log import RequestLine, timestamp
from proxy.outcome import Outcome
from proxy.pricing import format_picos
from proxy.usage import Source

# A look into an Enum takes Python 3.11 0.1 us.
_UNKNOWN, _COMPLETE, _CLIENT_GONE = Source.UNKNOWN, Reason.COMPLETE, Reason.CLIENT_GONE
_TRACEPARENT = istr("traceparent")
#: nginx's code for "the caller closed the connection"; only in logs and metrics, never on the wire.
_CLIENT_CLOSED = 499


def answered(ctx: Context, response: web.StreamResponse) -> None:
    """What nobody below has said about the answer."""
    if ctx.status == 0:
        ctx.status = response.status
    if ctx.reason is None:
        ctx.reason = _COMPLETE


def end(ctx: Context) -> None:
    """However it ended."""
    core, task = ctx.core, ctx.task
    assert task is not None
    if not core.ended:
        # Not by `get_running_loop`, which asks the kernel for the process's number.
        task.get_loop().call_soon(_settle_all, core)
    core.ended.append(ctx)
    ctx.end(monotonic())


def _settle_all(core: Core) -> None:
    """In the next turn of the loop, before it reads anything new: nobody can ask for the figures sooner. The
    answers go out first, and what has ended together is settled together (3 % of a short request: the second
    finds the code in the processor's caches)."""
    ended, core.ended = core.ended, []
    wall_offset_s = time() - monotonic()
    for ctx in ended:
        core.running.discard(ctx)
        try:
            _settle(core, ctx, wall_offset_s)
        except Exception as error:  # the others' lines do not depend on it
            structlog.get_logger().error(
                "internal_error", request_id=ctx.request_id, error=type(error).__name__
            )


def _settle(core: Core, ctx: Context, wall_offset_s: float) -> None:
    reason = ctx.reason or Reason.INTERNAL_ERROR
    if reason is _CLIENT_GONE:
        ctx.status = ctx.status or _CLIENT_CLOSED
        core.metrics.client_disconnects.add((ctx.phase.value,))
    outcome = core.metrics.outcome(ctx.route, ctx.model, ctx.upstream, ctx.status, reason)
    _count(outcome, ctx)
    if ctx.reached_upstream:
        row = row_of(ctx, outcome, wall_offset_s)
        core.ledger.add(row)
        if ctx.usage is not None and ctx.usage.source is not _UNKNOWN:
            outcome.spend(row)
    if core.request_log.enabled:
        core.request_log.write(_line(ctx, outcome, wall_offset_s))


def _count(outcome: Outcome, ctx: Context) -> None:
    started_at = ctx.started_at
    outcome.requests += 1
    outcome.bytes_out += ctx.bytes_out
    outcome.duration.observe(ctx.ended_at - started_at)
    if ctx.sent_at is not None:
        outcome.overhead.observe(ctx.sent_at - started_at - (ctx.queue_s or 0.0))
    if ctx.first_byte_at is not None:
        outcome.first_byte.observe(ctx.first_byte_at - started_at)
    if ctx.first_token_at is not None:
        outcome.first_token.observe(ctx.first_token_at - started_at)


def _line(ctx: Context, outcome: Outcome, wall_offset_s: float) -> RequestLine:
    principal, usage, started_at = ctx.principal, ctx.usage, ctx.started_at
    known = None if usage is None or usage.source is _UNKNOWN else usage
    # By position, in the order of the fields: by name, msgspec took 1.4 us instead of 0.25.
    return RequestLine(
        timestamp(ctx.ended_at + wall_offset_s),
        "info",
        "request",
        ctx.request_id,
        None if principal is None else principal.key_id or None,
        None if principal is None else principal.plan,
        ctx.method,
        ctx.route,
        ctx.model,
        ctx.upstream,
        ctx.attempts,
        ctx.status,
        outcome.reason,
        None if ctx.queue_s is None else _ms(ctx.queue_s),
        None if ctx.first_byte_at is None else _ms(ctx.first_byte_at - started_at),
        None if ctx.first_token_at is None else _ms(ctx.first_token_at - started_at),
        _ms(ctx.ended_at - started_at),
        ctx.chunks,
        ctx.bytes_in,
        ctx.bytes_out,
        None if known is None else known.prompt_tokens,
        None if known is None else known.completion_tokens,
        None if usage is None else usage.source,
        None if ctx.cost_picos is None else format_picos(ctx.cost_picos),
        ctx.client_ip,
        ctx.error_code,
        headers.trace_id(ctx.fields.get(_TRACEPARENT)),
    )


def _ms(seconds: float) -> float:
    """Exact to a microsecond; `round` to digits costs more than twice as much."""
    return round(seconds * 1e6) / 1000
