"""While streams run, new requests wait here for their turn of the event loop: see `turnstile`.

Inside `observe` and `errors`: who leaves while it waits has its log line, and a drain its answer. Without
streams nobody is to be protected, and turns that are cut short cost a tenth of a short request.
"""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler

from proxy.context import CONTEXT


@web.middleware
async def turn(request: web.Request, handler: Handler) -> web.StreamResponse:
    core = request[CONTEXT].core
    if any(core.metrics.streams_active.values.values()):
        await core.turnstile.enter()
    return await handler(request)
