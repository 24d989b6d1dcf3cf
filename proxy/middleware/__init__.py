"""The stations that every request of the data listener passes, outermost first.

They are functions that `entrance` calls in this order (house rule: none of them imports another). What has to
be waited for they hand back, which is rare: a coroutine for each of them cost 1 us of a short request and
0.5 KB of a stream, and as middlewares of aiohttp's each was called through a partial.
"""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from proxy.core import Core
from proxy.errors import Reason
from proxy.middleware import auth, cors, errors, guard, limits, observe, request_id, turn


def entrance(core: Core) -> Middleware:
    """What aiohttp calls around the handler. Below here one just raises.

    Made for a core: to find it in the application took three calls a request.
    """

    @web.middleware
    async def pass_through(request: web.Request, handler: Handler) -> web.StreamResponse:
        ctx = request_id.begin(request, core)
        core.running.add(ctx)
        response: web.StreamResponse
        try:
            try:
                if turn.must_wait(core):
                    await core.turnstile.enter()
                guard.check(request, ctx)
                if cors.is_preflight(request, ctx):
                    response = await cors.answer(request)
                else:
                    waiting = auth.identify(ctx)
                    if waiting is not None:
                        await waiting
                    waiting = limits.arrive(ctx)
                    if waiting is not None:
                        await waiting
                    response = await handler(request)
            except BaseException as error:
                response = errors.answer(ctx, error)
            observe.answered(ctx, response)
            return response
        except (asyncio.CancelledError, ConnectionError):  # of a write to a connection that has just closed
            ctx.reason = ctx.reason or Reason.CLIENT_GONE
            raise
        finally:
            observe.end(ctx)

    return pass_through
