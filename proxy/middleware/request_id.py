"""The context is born: an id, a route, a start time."""

from __future__ import annotations

from time import monotonic

from aiohttp import web
from aiohttp.typedefs import Handler

from proxy import endpoints, headers
from proxy.context import CONTEXT, CORE, Context


@web.middleware
async def request_id(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Accepts a harmless id of the caller's, else mints one; sent back by `server.Server._on_prepare`."""
    now = monotonic()
    chosen = headers.request_id(request.headers.get("x-request-id"))
    path = request.raw_path.partition("?")[0]
    ctx = Context(chosen, endpoints.match(request.method, path), path, now)
    ctx.core = core = request.app[CORE]
    ctx.client_ip = headers.client_ip(
        request.remote or None, request.headers.getall("x-forwarded-for", ()), core.config.trusted_networks
    )
    request[CONTEXT] = ctx
    return await handler(request)
