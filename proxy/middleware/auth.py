"""Who is asking. Open mode asks nobody; without it every caller needs a credential, bar a few public routes.

Every failure spends the address that it comes from, and so does every request that needs no credential: what
is left of that is looked at before any store is asked.
"""

from __future__ import annotations

from time import time

from aiohttp import web
from aiohttp.typedefs import Handler

from proxy import handshake, identity
from proxy.context import CONTEXT, Context
from proxy.core import Core
from proxy.errors import HeadraceError, NotFound
from proxy.identity import Principal

#: Answered without a credential.
_PUBLIC = frozenset({"/health", "/api/health/stream", "/", "/static/{file}"})
#: Without a credential too, but on a plan: each address is a caller of its own.
_ANONYMOUS = frozenset({"/api/chat", "/api/chat/stream"})


@web.middleware
async def auth(request: web.Request, handler: Handler) -> web.StreamResponse:
    ctx = request[CONTEXT]
    core = ctx.core
    if ctx.endpoint is None:
        raise NotFound  # before anybody's credential is looked at: there is nothing to protect
    if core.authenticator is not None and ctx.route not in _PUBLIC:
        ctx.principal = await _identify(request, ctx, core)
    return await handler(request)


async def _identify(request: web.Request, ctx: Context, core: Core) -> Principal:
    if ctx.route in _ANONYMOUS:
        api = core.config.browser_api
        if api is None:
            raise NotFound
        await core.admission.spend_address(ctx.client_ip)
        return Principal(name=f"ip:{ctx.client_ip}", key_id="", plan=api.plan)
    fields = request.headers
    try:
        others = [*fields.getall("x-api-key", ()), *fields.getall("api-key", ())]
        if ctx.endpoint is not None and ctx.endpoint.websocket:
            # A page that opens a WebSocket can set no header field of its own.
            others += handshake.credentials(fields.getall("Sec-WebSocket-Protocol", ()))
        credential = identity.credential_of(fields.getall("Authorization", ()), others)
        assert core.authenticator is not None
        principal = await core.authenticator.identify(credential, time())
        identity.check_address(principal, ctx.client_ip)
    except HeadraceError:
        await core.admission.spend_address(ctx.client_ip)
        raise
    return principal
