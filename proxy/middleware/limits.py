"""The caller's request rate, decided from the head alone: before a byte of the body is read."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler

from proxy.context import CONTEXT


@web.middleware
async def limits(request: web.Request, handler: Handler) -> web.StreamResponse:
    ctx = request[CONTEXT]
    endpoint, principal = ctx.endpoint, ctx.principal
    if principal is not None and endpoint is not None and endpoint.costs:
        core = ctx.core
        plan = core.config.plans[principal.plan]
        await core.admission.arrive(ctx, principal.name, principal.plan, plan)
    return await handler(request)
