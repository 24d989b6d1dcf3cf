"""The caller's request rate, decided from the head alone: before a byte of the body is read."""

from __future__ import annotations

from collections.abc import Awaitable

from aiohttp import web
from aiohttp.typedefs import Handler

from proxy.context import CONTEXT


@web.middleware
def limits(request: web.Request, handler: Handler) -> Awaitable[web.StreamResponse]:
    """No coroutine: it would stand between every turn of a stream and its handler."""
    ctx = request[CONTEXT]
    endpoint, principal = ctx.endpoint, ctx.principal
    if principal is not None and endpoint is not None and endpoint.costs:
        core = ctx.core
        waiting = core.admission.arrive(ctx, principal, core.config.plans[principal.plan])
        if waiting is not None:
            return _first(waiting, handler, request)
    return handler(request)


async def _first(waiting: Awaitable[None], handler: Handler, request: web.Request) -> web.StreamResponse:
    await waiting
    return await handler(request)
