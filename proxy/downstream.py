"""The listening side: aiohttp's server with connections of ours, and a cap on them.

At the cap the oldest idle connection makes room, else the new one is told 503.

If `self_check` finds a private name of aiohttp missing, its plain server is used: everything works but that
cap and what `downstream_connection` adds.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_urldispatcher import UrlMappingMatchInfo

from proxy import downstream_connection
from proxy.downstream_connection import Connection
from proxy.errors import HeadraceError

#: How long a refused caller may go on sending before it is cut off (aiohttp's default of 10 s is cheap for
#: an attacker; without any lingering the reset would destroy our answer, RFC 9112 9.6).
LINGER_S = 1.0


class Limits(msgspec.Struct, frozen=True):
    """max_connections: of this process; header_s, write_s: seconds for a whole head, and for a caller to take
    what is written."""

    max_connections: int
    header_s: float
    write_s: float


Handler = Callable[[Any], Awaitable[web.StreamResponse]]
RequestFactory = Callable[..., web.BaseRequest]
#: Told about every refusal that never reached the chain: status, code, request id, caller's address.
Refusal = Callable[[HeadraceError, str, str], None]


class Listener(web.Server):
    """Makes the connections, and knows which of them are idle (in the order in which they became so)."""

    def __init__(
        self, handler: Handler, factory: RequestFactory, limits: Limits, refused: Refusal, **kwargs: Any
    ) -> None:
        super().__init__(handler, request_factory=factory, **kwargs)
        self.limits = limits
        self.refused = refused
        self.open = 0
        self.idle: dict[Connection, None] = {}

    def __call__(self) -> RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)

    def make_room(self) -> bool:
        """Is there room for one more? Closes the oldest idle connection if that helps."""
        if self.open < self.limits.max_connections:
            return True
        oldest = next(iter(self.idle), None)
        if oldest is None:
            return False
        del self.idle[oldest]
        oldest.force_close()
        return True

    def close_idle(self, *, fresh: bool) -> None:
        """Kept connections; `fresh`: those as well on which nothing was asked yet."""
        for connection in list(self.idle):
            if fresh or not connection.fresh:
                connection.force_close()
                del self.idle[connection]

    def has_fresh(self) -> bool:
        """Is there a caller that has connected and whose first request is still on its way?"""
        return any(connection.fresh for connection in self.idle)


class Runner(web.AppRunner):
    """AppRunner whose server is a Listener."""

    def __init__(self, app: web.Application, limits: Limits, refused: Refusal, **kwargs: Any) -> None:
        super().__init__(app, **kwargs)
        self._limits = limits
        self._refused = refused
        self.listener: Listener | None = None

    async def _make_server(self) -> web.Server:
        plain = await super()._make_server()
        if not self_check():
            return plain
        routes = self.app.router.routes()
        self.listener = Listener(
            straight(self.app) if len(routes) == 1 else plain.request_handler,
            plain.request_factory,
            self._limits,
            self._refused,
            handler_cancellation=plain.handler_cancellation,
            **plain._kwargs,
        )
        return self.listener


def straight(app: web.Application) -> Handler:
    """The middlewares around the handler of the application's one route, as `Application._handle` would call
    them, without looking for a route among one: that took 20 us of each request (measured). Its look at
    `Expect` is missed by nobody (`intake.no_expectation`)."""
    [route] = app.router.routes()
    match = UrlMappingMatchInfo({}, route)
    match.add_app(app)
    match.freeze()
    chain = route.handler
    for middleware in reversed(app.middlewares):
        chain = functools.partial(middleware, handler=chain)

    def handle(request: web.Request) -> Awaitable[web.StreamResponse]:
        request._match_info = match
        return chain(request)

    return handle


def self_check() -> bool:
    """Are the private names still there?"""
    return downstream_connection.self_check() and "_match_info" in web.Request.ATTRS
