"""Who is asking. Open mode asks nobody; without it every caller needs a credential, bar a few public routes.

Every failure spends the address that it comes from, and so does every request that needs no credential: what
is left of that is looked at before any store is asked.
"""

from __future__ import annotations

from collections.abc import Awaitable
from time import time

from aiohttp.hdrs import AUTHORIZATION
from multidict import istr

from proxy import handshake, identity
from proxy.context import Context
from proxy.endpoints import Endpoint
from proxy.errors import HeadraceError, NotFound
from proxy.identity import Principal

#: Answered without a credential.
_PUBLIC = frozenset({"/health", "/api/health/stream", "/", "/static/{file}"})
#: Without a credential too, but on a plan: each address is a caller of its own.
_ANONYMOUS = frozenset({"/api/chat", "/api/chat/stream"})
_X_API_KEY, _API_KEY = istr("x-api-key"), istr("api-key")


def identify(ctx: Context) -> Awaitable[None] | None:
    """Sets `ctx.principal`. What it returns has to be waited for first; that and a refusal may raise
    whatever `Authenticator.identify` and `identity` raise."""
    endpoint, authenticator = ctx.endpoint, ctx.core.authenticator
    if endpoint is None:
        raise NotFound  # before anybody's credential is looked at: there is nothing to protect
    if authenticator is None:
        return None
    if endpoint.ours:  # upstream goes nothing without a credential
        if ctx.route in _PUBLIC:
            return None
        if ctx.route in _ANONYMOUS:
            return _anonymous(ctx)
    try:
        credential, now = _credential(ctx, endpoint), time()
        principal = authenticator.known(credential, now)
        if principal is None:
            return _identified(ctx, authenticator.identify(credential, now))
        if principal.networks:
            identity.check_address(principal, ctx.client_ip)
    except HeadraceError as error:
        return _refuse(ctx, error)
    ctx.principal = principal
    return None


async def _identified(ctx: Context, identified: Awaitable[Principal]) -> None:
    try:
        principal = await identified
        identity.check_address(principal, ctx.client_ip)
    except HeadraceError as error:
        await _refuse(ctx, error)
    else:
        ctx.principal = principal


async def _refuse(ctx: Context, error: HeadraceError) -> None:
    await ctx.core.admission.spend_address(ctx.client_ip)
    raise error


def _credential(ctx: Context, endpoint: Endpoint) -> str | None:
    """Raises BadRequest: there are several."""
    fields = ctx.fields
    others = [*fields.getall(_X_API_KEY, ()), *fields.getall(_API_KEY, ())]
    if endpoint.websocket:
        # A page that opens a WebSocket can set no header field of its own.
        others += handshake.credentials(fields.getall("Sec-WebSocket-Protocol", ()))
    return identity.credential_of(fields.getall(AUTHORIZATION, ()), others)


async def _anonymous(ctx: Context) -> None:
    api = ctx.core.config.browser_api
    if api is None:
        raise NotFound
    await ctx.core.admission.spend_address(ctx.client_ip)
    ctx.principal = Principal(name=f"ip:{ctx.client_ip}", key_id="", plan=api.plan)
