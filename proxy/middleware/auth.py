"""Who is asking. Open mode asks nobody; without it every caller needs a credential, bar a few public routes.

Every failure spends the address that it comes from, and so does every request that needs no credential: what
is left of that is looked at before any store is asked.
"""

from __future__ import annotations

from collections.abc import Awaitable
from time import time

from aiohttp import web
from aiohttp.hdrs import AUTHORIZATION
from aiohttp.typedefs import Handler
from multidict import istr

from proxy import handshake, identity
from proxy.context import CONTEXT, Context
from proxy.endpoints import Endpoint
from proxy.errors import HeadraceError, NotFound
from proxy.identity import Principal

#: Answered without a credential.
_PUBLIC = frozenset({"/health", "/api/health/stream", "/", "/static/{file}"})
#: Without a credential too, but on a plan: each address is a caller of its own.
_ANONYMOUS = frozenset({"/api/chat", "/api/chat/stream"})
_X_API_KEY, _API_KEY = istr("x-api-key"), istr("api-key")


@web.middleware
def auth(request: web.Request, handler: Handler) -> Awaitable[web.StreamResponse]:
    """No coroutine where nothing waits: it would stand between every turn of a stream and its handler."""
    ctx = request[CONTEXT]
    core, endpoint = ctx.core, ctx.endpoint
    if endpoint is None:
        raise NotFound  # before anybody's credential is looked at: there is nothing to protect
    authenticator = core.authenticator
    if authenticator is None or ctx.route in _PUBLIC:
        return handler(request)
    if ctx.route in _ANONYMOUS:
        return _anonymous(request, ctx, handler)
    try:
        credential = _credential(request, endpoint)
        principal = authenticator.known(credential, time())
        if principal is None:
            return _identify(request, ctx, handler, authenticator.identify(credential, time()))
        identity.check_address(principal, ctx.client_ip)
    except HeadraceError as error:
        return _refuse(ctx, error)
    ctx.principal = principal
    return handler(request)


async def _identify(
    request: web.Request, ctx: Context, handler: Handler, identified: Awaitable[Principal]
) -> web.StreamResponse:
    try:
        principal = await identified
        identity.check_address(principal, ctx.client_ip)
    except HeadraceError as error:
        return await _refuse(ctx, error)
    ctx.principal = principal
    return await handler(request)


async def _refuse(ctx: Context, error: HeadraceError) -> web.StreamResponse:
    await ctx.core.admission.spend_address(ctx.client_ip)
    raise error


def _credential(request: web.Request, endpoint: Endpoint) -> str | None:
    """Raises BadRequest: there are several."""
    fields = request.headers
    others = [*fields.getall(_X_API_KEY, ()), *fields.getall(_API_KEY, ())]
    if endpoint.websocket:
        # A page that opens a WebSocket can set no header field of its own.
        others += handshake.credentials(fields.getall("Sec-WebSocket-Protocol", ()))
    return identity.credential_of(fields.getall(AUTHORIZATION, ()), others)


async def _anonymous(request: web.Request, ctx: Context, handler: Handler) -> web.StreamResponse:
    api = ctx.core.config.browser_api
    if api is None:
        raise NotFound
    await ctx.core.admission.spend_address(ctx.client_ip)
    ctx.principal = Principal(name=f"ip:{ctx.client_ip}", key_id="", plan=api.plan)
    return await handler(request)
