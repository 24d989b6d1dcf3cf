"""The admin listener: metrics, health, state. It shares nothing with the data listener's chain."""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from proxy.metrics import Counter, Histogram, render

State = Callable[[], dict[str, Any]]
Pages = Callable[[], Awaitable[list[Counter | Histogram]]]

#: Answered without a token even where one is needed: probes carry none.
_OPEN_PATHS = frozenset({"/healthz", "/readyz"})


def make_app(
    *,
    state: State,
    metrics: Callable[[], list[Counter | Histogram]],
    ready: Callable[[], bool],
    token: str | None,
) -> web.Application:
    """token: asked for on everything but the probes; None: not asked (loopback and unix only)."""

    @web.middleware
    async def authorised(request: web.Request, handler: Handler) -> web.StreamResponse:
        if token is not None and request.path not in _OPEN_PATHS:
            offered = request.headers.get("Authorization", "")
            if not hmac.compare_digest(offered.encode(), f"Bearer {token}".encode()):
                return _error(401, "invalid_admin_token", {"WWW-Authenticate": "Bearer"})
        try:
            return await handler(request)
        except web.HTTPException as refused:
            return _error(refused.status, "not_found" if refused.status == 404 else "bad_request", {})

    async def show_metrics(request: web.Request) -> web.Response:
        body, content_type = render(metrics(), request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def healthz(_: web.Request) -> web.Response:
        return _json(200, {"status": "ok"})

    async def readyz(_: web.Request) -> web.Response:
        return _json(200, {"status": "ready"}) if ready() else _json(503, {"status": "draining"})

    async def debug_state(_: web.Request) -> web.Response:
        return _json(200, state())

    app = web.Application(middlewares=[authorised])
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/debug/state", debug_state)
    return app


def open_files() -> int:
    """File descriptors of this process; the one that lists them is not counted."""
    return len(os.listdir("/proc/self/fd")) - 1


def _json(status: int, document: dict[str, Any]) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(document), content_type="application/json")


def _error(status: int, code: str, extra: dict[str, str]) -> web.Response:
    document = {
        "error": {"message": code.replace("_", " "), "type": "admin_error", "param": None, "code": code}
    }
    response = _json(status, document)
    response.headers.update(extra)
    return response
