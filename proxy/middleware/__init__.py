"""The stations that every request of the data listener passes, outermost first.

request_id, observe, errors, turn and guard are functions that `entrance` calls in this order: they only look,
and a coroutine for each of them cost 1 us of a short request and 0.5 KB of a stream. Those that may answer or
wait by themselves are middlewares of aiohttp: cors, auth, limits.
"""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.typedefs import Handler

from proxy.errors import Reason
from proxy.middleware import errors, guard, observe, request_id, turn
from proxy.middleware.auth import auth
from proxy.middleware.cors import cors
from proxy.middleware.limits import limits


@web.middleware
async def entrance(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Below here one just raises."""
    ctx = request_id.begin(request)
    core = ctx.core
    core.running.add(ctx)
    response: web.StreamResponse
    try:
        try:
            if turn.must_wait(core):
                await core.turnstile.enter()
            guard.check(request, ctx)
            response = await handler(request)
        except BaseException as error:
            response = errors.answer(ctx, error)
        observe.answered(ctx, response)
        return response
    except (asyncio.CancelledError, ConnectionError):  # of a write to a connection that has just closed
        ctx.reason = ctx.reason or Reason.CLIENT_GONE
        raise
    finally:
        observe.end(ctx, request)


#: The chain, in order (house rule: a middleware never imports another).
CHAIN = (entrance, cors, auth, limits)
