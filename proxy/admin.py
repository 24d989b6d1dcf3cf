"""The admin listener: metrics, health, state. It shares nothing with the data listener's chain."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import Any, Protocol

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

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


def make_app(operations: Operations, parts: Iterable[Part], *, token: str | None) -> web.Application:
    """token: asked for on everything but the probes; None: not asked (loopback and unix only)."""

    @web.middleware
    async def authorised(request: web.Request, handler: Handler) -> web.StreamResponse:
        if token is not None and request.path not in _OPEN_PATHS:
            offered = request.headers.get("Authorization", "")
            wanted = f"Bearer {token}".encode()
            if not hmac.compare_digest(offered.encode("utf-8", "surrogateescape"), wanted):
                return _error(401, "invalid_admin_token", {"WWW-Authenticate": "Bearer"})
        try:
            return await handler(request)
        except UnknownKey as refused:
            return _error(404, "not_found", {}, str(refused))
        except OperationError as refused:
            return _error(400, "bad_request", {}, str(refused))
        except web.HTTPException as refused:
            return _error(refused.status, "not_found" if refused.status == 404 else "bad_request", {})

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
        _number_the_queue(streams)
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


def _number_the_queue(streams: list[dict[str, Any]]) -> None:
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
