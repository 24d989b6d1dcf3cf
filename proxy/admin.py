"""The admin listener: metrics, health, state. It shares nothing with the data listener's chain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from proxy import admin_guard
from proxy.errors import OperationError
from proxy.key_commands import UnknownKey
from proxy.metrics import Counter, Histogram, render
from proxy.yamlstruct import ConfigError


class Operations(Protocol):
    """What the admin listener needs of the process that holds it."""

    def ready(self) -> bool: ...

    async def state(self) -> dict[str, Any]: ...

    async def page(self) -> Iterable[Counter | Histogram]: ...

    async def streams(self) -> list[dict[str, Any]]: ...

    async def kill(self, stream_id: str) -> bool: ...

    async def reload(self) -> None: ...

    async def restart(self) -> int: ...


class Part(Protocol):
    """Routes that are described elsewhere."""

    def add_routes(self, router: web.UrlDispatcher) -> None: ...


#: Answered without a token even where one is needed: probes carry none.
_OPEN_PATHS = frozenset({"/healthz", "/readyz"})
#: Answered under any name where no token is needed: by programs only, which find this machine as they like.
_ANY_HOST = frozenset({*_OPEN_PATHS, "/metrics"})
_CODES = {404: "not_found", 503: "overloaded"}


def make_app(operations: Operations, parts: Iterable[Part], *, token: str | None) -> web.Application:
    """token: asked for on everything but the probes; None: not asked (loopback and unix only)."""

    @web.middleware
    async def authorised(request: web.Request, handler: Handler) -> web.StreamResponse:
        if (refusal := _refusal(request, token)) is not None:
            return refusal
        try:
            return await handler(request)
        except UnknownKey as refused:
            return _error(404, "not_found", {}, str(refused))
        except OperationError as refused:
            return _error(400, "bad_request", {}, str(refused))
        except web.HTTPException as refused:
            again = {
                name: refused.headers[name] for name in ("Retry-After", "Allow") if name in refused.headers
            }
            return _error(refused.status, _CODES.get(refused.status, "bad_request"), again)

    app = web.Application(middlewares=[authorised])
    routes = _Routes(operations)
    app.router.add_get("/metrics", routes.metrics)
    app.router.add_get("/healthz", routes.healthz)
    app.router.add_get("/readyz", routes.readyz)
    app.router.add_get("/debug/state", routes.debug_state)
    app.router.add_get("/admin/streams", routes.streams)
    app.router.add_delete("/admin/streams/{id}", routes.kill)
    for part in parts:
        part.add_routes(app.router)
    app.router.add_post("/admin/reload", routes.reload)
    app.router.add_post("/admin/restart", routes.restart)
    return app


class _Routes:
    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    async def metrics(self, request: web.Request) -> web.Response:
        body, content_type = render(await self._operations.page(), request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def healthz(self, _: web.Request) -> web.Response:
        return _json(200, {"status": "ok"})

    async def readyz(self, _: web.Request) -> web.Response:
        ready = self._operations.ready()
        return _json(200, {"status": "ready"}) if ready else _json(503, {"status": "draining"})

    async def debug_state(self, _: web.Request) -> web.Response:
        return _json(200, await self._operations.state())

    async def streams(self, _: web.Request) -> web.Response:
        streams = await self._operations.streams()
        number_the_queue(streams)
        return _json(200, {"streams": streams})

    async def kill(self, request: web.Request) -> web.Response:
        if await self._operations.kill(request.match_info["id"]):
            return _json(200, {"killed": request.match_info["id"]})
        return _error(404, "not_found", {})

    async def reload(self, _: web.Request) -> web.Response:
        try:
            await self._operations.reload()
        except (ConfigError, OperationError) as refused:
            return _error(400, "reload_failed", {}, str(refused))
        return _json(200, {"reloaded": True})

    async def restart(self, _: web.Request) -> web.Response:
        try:
            pid = await self._operations.restart()
        except (ConfigError, OperationError) as refused:
            return _error(409, "restart_failed", {}, str(refused))
        return _json(200, {"pid": pid})


def _refusal(request: web.Request, token: str | None) -> web.Response | None:
    """Why this request is not even looked at."""
    if token is None:
        over_tcp = request.transport is not None and isinstance(
            request.transport.get_extra_info("sockname"), tuple
        )
        if over_tcp and request.path not in _ANY_HOST and not admin_guard.host_is_local(request.host):
            why = "without a token this listener answers to its address and to localhost only"
            return _error(403, "host_not_allowed", {}, why)
    elif request.path not in _OPEN_PATHS and not admin_guard.token_offered(request.headers, token):
        challenge = admin_guard.challenge(request.headers)
        return _error(401, "invalid_admin_token", {"WWW-Authenticate": challenge})
    if admin_guard.from_elsewhere(request.method, request.headers):
        return _error(403, "origin_not_allowed", {}, "a page of another origin asks")
    return None


def number_the_queue(streams: list[dict[str, Any]]) -> None:
    """`queue_place`: 1 for whoever waits longest, over all workers and plans; None for who does not wait. The
    order of arrival, not of service: plans share the queue by weight, and a full upstream is passed by."""
    waiting = sorted((each for each in streams if each["phase"] == "queue"), key=lambda each: -each["age_s"])
    for stream in streams:
        stream["queue_place"] = None
    for place, stream in enumerate(waiting, 1):
        stream["queue_place"] = place


def _json(status: int, document: dict[str, Any]) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(document), content_type="application/json")


def _error(status: int, code: str, extra: dict[str, str], message: str = "") -> web.Response:
    document = {
        "error": {
            "message": message or code.replace("_", " "),
            "type": "admin_error",
            "param": None,
            "code": code,
        }
    }
    response = _json(status, document)
    response.headers.update(extra)
    return response
