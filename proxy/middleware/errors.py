"""Turns what is raised below into the one JSON error that the caller gets. Below here one just raises."""

from __future__ import annotations

import asyncio
import traceback

import structlog
from aiohttp import web

from proxy.context import Context
from proxy.errors import Draining, HeadraceError, Internal, Killed, NotFound, Reason, Refused, UpstreamFailed


def answer(ctx: Context, error: BaseException) -> web.Response:
    """To a request that `error` has ended. Raises it again where there is nobody to tell, or no way to."""
    if isinstance(error, HeadraceError):
        return respond(ctx, error)
    if isinstance(error, asyncio.CancelledError):
        # Drain and kill cancel with a reason, in any phase; without one the caller has left.
        if ctx.stopped is None or ctx.committed:
            raise error
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        return respond(ctx, Draining() if ctx.stopped is Reason.DRAINED else Killed())
    if isinstance(error, web.HTTPException):
        # aiohttp's own router, for the few paths that reach it.
        return respond(ctx, NotFound() if error.status == 404 else Refused(error.status))
    if isinstance(error, ConnectionError) or not isinstance(error, Exception):
        raise error
    structlog.get_logger().error(
        "internal_error", request_id=ctx.request_id, error=type(error).__name__, where=_where(error)
    )
    if ctx.committed:
        raise error
    return respond(ctx, Internal())


def _where(error: BaseException) -> list[str]:
    """The traceback, `FILE:LINE FUNCTION`, outermost first; no message, for it may quote a body."""
    return [
        f"{frame.f_code.co_filename}:{line} {frame.f_code.co_qualname}"
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]


def respond(ctx: Context, error: HeadraceError) -> web.Response:
    """An answer of our own, in the route's dialect."""
    ctx.reason = _reason_of(ctx, error)
    ctx.error_code = error.code
    response = web.Response(
        status=error.status,
        body=error.body(ctx.dialect, ctx.request_id),
        headers={
            "Content-Type": "application/json",
            "Cache-Control": "no-store",
            **error.headers,
        },
    )
    if isinstance(error, UpstreamFailed):
        response.headers["x-headrace-upstream"] = ctx.upstream or "none"
        response.headers["x-headrace-attempts"] = str(ctx.attempts)
        if ctx.given_up:
            response.headers["x-should-retry"] = "false"
    if isinstance(error, Refused) and error.close:
        response.force_close()
    ctx.bytes_out = len(response.body or b"")  # type: ignore[arg-type] # bytes, as set above
    return response


def _reason_of(ctx: Context, error: HeadraceError) -> Reason:
    """`rejected` says that nobody was asked. What is refused later, in the middle of an upload, is an answer
    below 500 that is delivered whole (contract section 6, rule 2)."""
    if error.reason is Reason.REJECTED and ctx.attempts:
        return ctx.reason or Reason.COMPLETE
    return error.reason
