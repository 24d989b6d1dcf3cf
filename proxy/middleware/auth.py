"""Who is asking. Open mode asks nobody; without it every caller needs a key, and no key exists yet."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler

from proxy.context import CONTEXT, CORE
from proxy.errors import InvalidCredential

#: Answered without a credential.
_PUBLIC = frozenset({"/health", "/api/health/stream"})


@web.middleware
async def auth(request: web.Request, handler: Handler) -> web.StreamResponse:
    ctx = request[CONTEXT]
    if request.app[CORE].config.auth.mode != "open" and ctx.route not in _PUBLIC:
        raise InvalidCredential
    return await handler(request)
