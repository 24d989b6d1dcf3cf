"""The context is born: an id, a route, a start time."""

from __future__ import annotations

from time import monotonic

from aiohttp import hdrs, web
from multidict import istr

from proxy import endpoints, headers
from proxy.context import CONTEXT, Context
from proxy.core import Core

#: A field whose name is an `istr` is found without lowering the name first.
_OFFERED = istr("x-request-id")


def begin(request: web.Request, core: Core) -> Context:
    """Accepts a harmless id of the caller's, else mints one; sent back by `server.Server._on_prepare`."""
    # Each of them is a property in Python: whoever comes later reads them from the context.
    now, fields, method, path = monotonic(), request.headers, request.method, request.raw_path
    if "?" in path:
        path = path.partition("?")[0]
    chosen = headers.request_id(fields.get(_OFFERED))
    ctx = Context(chosen, endpoints.match(method, path), path, now)
    ctx.method, ctx.fields, ctx.task = method, fields, request.task
    ctx.core = core
    ctx.client_ip = headers.client_ip(
        request.remote or None, fields.getall(hdrs.X_FORWARDED_FOR, ()), core.config.trusted_networks
    )
    request[CONTEXT] = ctx
    return ctx
