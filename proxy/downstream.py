"""The listening side: aiohttp's server with connections of ours, and a cap on them.

At the cap the oldest idle connection makes room, else the new one is told 503.

If `self_check` finds a private name of aiohttp missing, its plain server is used: everything works but that
cap and what `downstream_connection` adds.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import Any

import msgspec
from aiohttp import StreamReader, web
from aiohttp.http import StreamWriter
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_urldispatcher import UrlMappingMatchInfo

from proxy import downstream_connection
from proxy.downstream_connection import Connection
from proxy.errors import HeadraceError

#: How long a refused caller may go on sending before it is cut off (aiohttp's default of 10 s is cheap for
#: an attacker; without any lingering the reset would destroy our answer, RFC 9112 9.6).
LINGER_S = 1.0
#: All that aiohttp's requests have; with others, they are left to its constructor.
_ATTRS = frozenset(
    {
        "_cache",
        "_client_max_fields",
        "_client_max_size",
        "_content_dict",
        "_content_type",
        "_headers",
        "_loop",
        "_match_info",
        "_message",
        "_method",
        "_payload",
        "_payload_writer",
        "_post",
        "_protocol",
        "_read_bytes",
        "_rel_url",
        "_state",
        "_stored_content_type",
        "_task",
        "_transport_peername",
        "_transport_sockname",
        "_transport_sslcontext",
        "_version",
    }
)


class Limits(msgspec.Struct, frozen=True):
    """max_connections: of this process; header_s, write_s: seconds for a whole head, and for a caller to take
    what is written."""

    max_connections: int
    header_s: float
    write_s: float


Handler = Callable[[Any], Awaitable[web.StreamResponse]]
#: Of a message, its body and the connection that they came by.
RequestFactory = Callable[[Any, StreamReader, Any], web.Request]
#: Told about every refusal that never reached the chain: status, code, request id, caller's address.
Refusal = Callable[[HeadraceError, str, str], None]


class Listener(web.Server):
    """Makes the connections, and knows which of them are idle (in the order in which they became so)."""

    def __init__(
        self, handler: Handler, factory: RequestFactory, limits: Limits, refused: Refusal, **kwargs: Any
    ) -> None:
        super().__init__(handler, **kwargs)
        self.factory = factory
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
        handler, match = straight(self.app) if len(routes) == 1 else (plain.request_handler, None)
        self.listener = Listener(
            handler,
            requests_of(self.app, match),
            self._limits,
            self._refused,
            handler_cancellation=plain.handler_cancellation,
            **plain._kwargs,
        )
        return self.listener


def straight(app: web.Application) -> tuple[Handler, UrlMappingMatchInfo]:
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
    return chain, match


class Request(web.Request):
    """aiohttp's, without what a usual request is not asked for: that is made when it is."""

    _payload_writer = cached_property(lambda self: StreamWriter(self._protocol, self._loop))
    _task = cached_property(lambda self: self._protocol._task_handler)
    _transport_sslcontext = cached_property(lambda self: self._protocol.ssl_context)
    _transport_peername = cached_property(lambda self: self._protocol.peername)
    _transport_sockname = cached_property(lambda self: self._protocol.sockname)


def requests_of(app: web.Application, match: UrlMappingMatchInfo | None) -> RequestFactory:
    """Makes the requests of one application; `match` if it is known of all.

    aiohttp's constructor, with the writer and the task that it wants, took 2 % of a short request.
    """
    loop = asyncio.get_running_loop()

    class Ours(Request):
        _loop = loop
        _match_info = match
        _client_max_size = app._client_max_size
        _client_max_fields = app._client_max_fields

    def general(message: Any, payload: StreamReader, connection: Any) -> web.Request:
        writer, task = StreamWriter(connection, loop), connection._task_handler
        return app._make_request(message, payload, connection, writer, task, Ours)

    def usual(message: Any, payload: StreamReader, connection: Any) -> web.Request:
        url = message.url
        if url.absolute:
            return general(message, payload, connection)
        request = new(Ours)
        request._message, request._protocol, request._payload = message, connection, payload
        request._headers = headers = message.headers
        request._method = method = message.method
        request._version = version = message.version
        request._rel_url = url
        # As if these properties had been asked for already, which they all are.
        request._cache = {
            "method": method,
            "version": version,
            "headers": headers,
            "raw_headers": message.raw_headers,
            "raw_path": message.path,
            "remote": connection.address,
            "keep_alive": not message.should_close,
            "content": payload,
        }
        request._state = {}
        return request

    new = object.__new__
    return usual if web.Request.ATTRS == _ATTRS else general


def self_check() -> bool:
    """Are the private names still there?"""
    return (
        downstream_connection.self_check()
        and "_match_info" in web.Request.ATTRS
        and hasattr(web.Application, "_make_request")
    )
