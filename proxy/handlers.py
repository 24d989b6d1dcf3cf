"""What the data listener's routes do: forward, or answer by themselves."""

from __future__ import annotations

from datetime import UTC, datetime
from time import time
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec
from aiohttp import web

from proxy import budgets, identity, playground, pricing, probe_stream, proxied, realtime
from proxy.context import CONTEXT, CORE
from proxy.core import Core
from proxy.errors import (
    Draining,
    ModelNotFound,
    NotFound,
    Overloaded,
)
from proxy.ledger_read import LedgerFailed
from proxy.schema import MOCK_URL

if TYPE_CHECKING:
    from proxy.ledger_row import Spent


async def dispatch(request: web.Request) -> web.StreamResponse:
    """Every path comes here: the allow-list decides, not aiohttp's router."""
    ctx = request[CONTEXT]
    endpoint = ctx.endpoint
    if endpoint is None:
        raise NotFound
    if endpoint.ours:
        return await _OURS[endpoint.name](request)
    if ctx.core.refusing:
        raise Draining
    if endpoint.websocket:
        ctx.goes_out_by(request.transport)
        return await realtime.websocket(request, ctx, endpoint)
    return await proxied.proxy(request, ctx, endpoint)


# ── answered here ────────────────────────────────────────────────────────────────────────────────────────


def _model_object(core: Core, name: str) -> dict[str, Any]:
    """OpenAI's and Anthropic's fields in one object: both SDKs read it."""
    entry = core.config.models[name]
    created = datetime.fromtimestamp(core.started_at, UTC)
    only_mock = all(core.config.upstreams[each.name].base_url == MOCK_URL for each in entry.upstreams)
    return {
        "id": name,
        "object": "model",
        "created": int(core.started_at),
        "owned_by": entry.upstreams[0].name,
        "type": "model",
        "display_name": name,
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        **({"mock": True} if only_mock else {}),  # a page may offer its faults
    }


async def list_models(request: web.Request) -> web.Response:
    core = request.app[CORE]
    # A pattern is not a model that can be asked for by its name.
    names = [name for name in core.config.models if "*" not in name and "?" not in name]
    principal = request[CONTEXT].principal
    if principal is not None:
        names = [name for name in names if identity.may_use_model(principal, name)]
    document = {
        "object": "list",
        "data": [_model_object(core, name) for name in names],
        "has_more": False,
        "first_id": names[0] if names else None,
        "last_id": names[-1] if names else None,
    }
    return _json(document)


async def show_model(request: web.Request) -> web.Response:
    core = request.app[CORE]
    raw = request.raw_path.partition("?")[0]
    name = unquote(raw.removeprefix("/v1").removeprefix("/models/"))
    principal = request[CONTEXT].principal
    hidden = principal is not None and not identity.may_use_model(principal, name)
    if hidden or core.config.match_model(name) is None:
        raise ModelNotFound
    if name in core.config.models:
        return _json(_model_object(core, name))
    pattern, _ = core.config.match_model(name) or (name, None)
    return _json({**_model_object(core, pattern), "id": name, "display_name": name})


async def limits(request: web.Request) -> web.Response:
    """What the caller has left: asking costs nothing."""
    core, principal = request.app[CORE], request[CONTEXT].principal
    plan = core.plan_of(principal)
    if principal is None or plan is None:
        return _json({"object": "limits", "plan": None})
    left = await core.admission.left(principal, plan)
    return _json({"object": "limits", "plan": principal.plan, "priority": plan.priority, **left})


async def usage(request: web.Request) -> web.Response:
    """What the caller has spent today and this month (UTC), and what is left of its budgets."""
    core, principal = request.app[CORE], request[CONTEXT].principal
    plan = core.plan_of(principal)
    if principal is None or plan is None:
        return _json({"object": "usage", "plan": None})
    now = time()
    units: dict[str, Any] = {}
    try:
        for name, begins_at in zip(("day", "month"), budgets.begins_of(now), strict=True):
            units[name] = _spent(await core.ledger.usage_of(principal.name, begins_at))
    except LedgerFailed:
        raise Overloaded from None
    for name, left in zip(units, await core.admission.budgets_left(principal, plan), strict=True):
        units[name]["budget"] = left
    return _json({"object": "usage", "plan": principal.plan, **units})


def _spent(spent: Spent) -> dict[str, Any]:
    document = msgspec.structs.asdict(spent)
    picos = document.pop("cost_picos")
    return {**document, "cost_usd": pricing.format_usd(pricing.usd(picos))}


async def health(_request: web.Request) -> web.Response:
    return _json({"status": "ok", "timestamp": datetime.now(UTC).isoformat()})


def _json(document: dict[str, Any]) -> web.Response:
    return web.Response(body=msgspec.json.encode(document), content_type="application/json")


_OURS = {
    "/api/chat/stream": proxied.browser_chat,
    "/api/chat": proxied.browser_chat,
    "/v1/models": list_models,
    "/v1/models/{rest}": show_model,
    "/v1/limits": limits,
    "/v1/usage": usage,
    "/": playground.serve,
    "/static/{file}": playground.serve,
    "/health": health,
    "/api/health/stream": probe_stream.answer,
}
