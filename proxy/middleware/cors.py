"""Which web pages may read our answers (WHATWG Fetch, "CORS protocol"), with aiohttp-cors.

The library answers preflights and writes the fields; it looks up its options through an adapter of ours,
at the moment of a request, so that a reload changes them. What it leaves out is added here: the same on
paths without a route of their own (ours all go through one), `Vary: Origin` on every answer, and nothing
reflected that is no field name. There is never `*` and never a credential in the browser's sense: the keys
of this API are in headers that a page has to set itself.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import hdrs, web
from aiohttp_cors import CorsConfig, ResourceOptions
from aiohttp_cors.abc import AbstractRouterAdapter

from proxy.context import CORE, Context
from proxy.core import Core
from proxy.errors import Refused
from proxy.schema import Cors

_METHODS = ("GET", "POST", "DELETE")
#: Fields that a page may read beyond the few that every page may.
EXPOSED = (
    "x-request-id",
    "request-id",
    *(
        f"x-ratelimit-{what}-{unit}"
        for what in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens")
    ),
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
    "x-headrace-upstream",
    "x-headrace-attempts",
    "x-upstream-request-id",
)
_FIELD_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")

Options = Mapping[str, ResourceOptions]
Preflight = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Adapter(AbstractRouterAdapter):
    """What aiohttp-cors asks about a request: one set of options, the configuration's, for every path."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._section: Cors | None = None
        self._options: Options = {}
        self.preflight: Preflight | None = None

    def add_preflight_handler(self, routing_entity: Any, handler: Preflight, webview: bool = False) -> None:
        self.preflight = handler

    def set_config_for_routing_entity(self, routing_entity: Any, config: Any) -> None:
        pass  # there is nothing of one path alone

    def is_preflight_request(self, request: web.Request) -> bool:
        fields = request.headers
        return (
            request.method == hdrs.METH_OPTIONS
            and hdrs.ORIGIN in fields
            and hdrs.ACCESS_CONTROL_REQUEST_METHOD in fields
        )

    def is_cors_enabled_on_request(self, request: web.Request) -> bool:
        return bool(self.options())

    async def get_preflight_request_config(
        self, preflight_request: web.Request, origin: str, requested_method: str
    ) -> Options:
        if requested_method not in _METHODS:
            raise KeyError
        return self.get_non_preflight_request_config(preflight_request)

    def get_non_preflight_request_config(self, request: web.Request) -> Options:
        # Of two Origin fields the library reads the first: whoever sends two is no browser.
        return self.options() if len(request.headers.getall(hdrs.ORIGIN, ())) == 1 else {}

    def options(self) -> Options:
        """By origin; made again when a reload has replaced the section."""
        section = self._core.config.cors
        if section is not self._section:
            options = ResourceOptions(  # type: ignore[no-untyped-call] # it has no types
                allow_credentials=False, expose_headers=EXPOSED, allow_headers="*", max_age=section.max_age
            )
            self._section, self._options = section, dict.fromkeys(section.origins, options)
        return self._options


_ADAPTER: web.AppKey[_Adapter] = web.AppKey("cors", _Adapter)


def attach(app: web.Application, route: web.AbstractRoute) -> None:
    """Makes every answer of the application carry its fields; `route` is the one that takes all paths."""
    app[_ADAPTER] = adapter = _Adapter(app[CORE])
    app.on_response_prepare.append(_vary)
    CorsConfig(app, router_adapter=adapter).add(route)


async def _vary(request: web.Request, response: web.StreamResponse) -> None:
    """A cache must not show one origin's answer to another. The library leaves this to its users."""
    if not request.app[_ADAPTER].options():
        return
    given = response.headers.getall(hdrs.VARY, [])
    if not any(name.strip().lower() in ("origin", "*") for line in given for name in line.split(",")):
        response.headers[hdrs.VARY] = ", ".join([*given, "Origin"])


def is_preflight(request: web.Request, ctx: Context) -> bool:
    """One that pages of the configuration may make: `answer` is for it."""
    if ctx.method != hdrs.METH_OPTIONS:
        return False
    adapter = request.app[_ADAPTER]
    return adapter.is_preflight_request(request) and bool(adapter.options())


async def answer(request: web.Request) -> web.StreamResponse:
    """Before anybody asks for a key, and nothing of it goes upstream."""
    adapter = request.app[_ADAPTER]
    assert adapter.preflight is not None
    try:
        response = await adapter.preflight(request)
    except web.HTTPForbidden:
        raise Refused(403, close=False) from None  # its text quotes the request
    _name_what_is_allowed(request, response)
    return response


def _name_what_is_allowed(request: web.Request, response: web.StreamResponse) -> None:
    """All methods, so that a browser asks once a path; of the asked fields, those that are field names."""
    response.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = ", ".join(_METHODS)
    response.headers.popall(hdrs.ACCESS_CONTROL_ALLOW_HEADERS, None)
    lines = request.headers.getall(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, [])
    asked = {name.strip().lower() for line in lines for name in line.split(",")}
    names = sorted(name for name in asked if _FIELD_NAME.fullmatch(name))
    if names:
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = ", ".join(names)
