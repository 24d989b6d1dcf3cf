"""What the data listener's routes do: forward, or answer by themselves."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec
from aiohttp import web

from proxy import browser_api, endpoints, headers, identity, tokens
from proxy.admission import Manner, Reservation
from proxy.attempt import Job
from proxy.context import CONTEXT, CORE, Context, Phase
from proxy.core import Core
from proxy.deliver import Delivery
from proxy.endpoints import Endpoint, Model
from proxy.errors import (
    BadRequest,
    Draining,
    InvalidCredential,
    ModelNotAllowed,
    ModelNotFound,
    NotFound,
    Refused,
)
from proxy.forward import Forwarding, nobody_available
from proxy.intake import HeldBody
from proxy.peek import Peek, peek
from proxy.reshape import Reshape
from proxy.routing import Turns

if TYPE_CHECKING:
    from proxy.identity import Principal
    from proxy.schema import Plan
    from proxy.targets import Groups


async def dispatch(request: web.Request) -> web.StreamResponse:
    """Every path comes here: the allow-list decides, not aiohttp's router."""
    ctx = request[CONTEXT]
    endpoint = ctx.endpoint
    if endpoint is None:
        raise NotFound
    if endpoint.ours:
        return await _OURS[endpoint.name](request)
    if request.app[CORE].refusing:
        raise Draining
    return await proxy(request, ctx, endpoint)


async def proxy(request: web.Request, ctx: Context, endpoint: Endpoint) -> web.StreamResponse:
    """The body, within its limits, then `forward_body`."""
    core = request.app[CORE]
    settings = core.config
    if not _is_json(request.headers.get("Content-Type", "application/json")):
        raise Refused(415, close=False)
    held = HeldBody(core.bodies, settings.max_body_bytes)
    try:
        body = await held.read(request, settings.timeouts.body)
        ctx.bytes_in = len(body)
        return await forward_body(request, ctx, endpoint, body, _read_fields(endpoint, body))
    finally:
        held.release()


async def forward_body(
    request: web.Request,
    ctx: Context,
    endpoint: Endpoint,
    body: bytes,
    asked: Peek,
    reshape: Reshape | None = None,
) -> web.StreamResponse:
    """Model, route, forward: of a body that was read from the caller or made here.

    reshape: what happens to the answer; None passes it on as it is.
    """
    core = request.app[CORE]
    settings = core.config
    ctx.phase = Phase.QUEUE
    name = _model_name(core, endpoint, asked)
    ctx.model = None if name is None else "other"  # until it is known to be configured: a closed set
    ctx.model, groups = core.route(name)
    _check_model(ctx.principal, name)
    plan = _plan_of(core, ctx.principal)
    ctx.asked_tokens = tokens.estimate_prompt(body)
    reservation = await _reserve(core, ctx, plan, asked)
    try:
        entry = settings.models.get(ctx.model)
        job = Job(
            method=request.method,
            path=endpoint.asks or endpoints.upstream_path(request.raw_path),
            fields=headers.to_upstream(request.raw_headers)
            + b"x-request-id: %b\r\n" % ctx.request_id.encode(),
            body=body,
            model=name,
            wants_stream=bool(asked.stream),
            reshape=reshape,
            hedge_after_s=None if entry is None else entry.hedge_after,
        )
        groups = _allowed(ctx.principal, groups)
        return await _ask(request, job, groups, Manner.LOW if _is_low(request) else Manner.WAIT)
    finally:
        await core.admission.settle(reservation, ctx.used_tokens())


async def _ask(request: web.Request, job: Job, groups: Groups, manner: Manner) -> web.StreamResponse:
    """Waits for a place at one of the upstreams, and goes there. Raises NoUpstreamAvailable."""
    core, ctx = request.app[CORE], request[CONTEXT]
    turns = Turns(groups, random.random)
    ranking = turns.ranking()
    if not ranking:
        raise nobody_available(turns)
    plan = _plan_of(core, ctx.principal)
    upstreams = [target.upstream for target in ranking]
    async with core.admission.seat(ctx, plan, upstreams, manner) as seat:
        first = next((each for each in ranking if each.upstream.name == seat.upstream), ranking[0])
        settings = core.config
        delivery = Delivery(request, ctx, settings.streams, settings.timeouts.write, core.metrics)
        return await Forwarding(core, ctx, delivery, seat).run(job, groups, turns, first)


def _allowed(principal: Principal | None, groups: Groups) -> Groups:
    """A caller's list of models holds for those that another one falls back to as well."""
    if principal is None or not principal.models or len(groups) == 1:
        return groups
    allowed = [
        group
        for group in groups
        if group[0].fallback is None or identity.may_use_model(principal, group[0].fallback)
    ]
    return tuple(allowed)


def _plan_of(core: Core, principal: Principal | None) -> Plan | None:
    """Raises InvalidCredential: a reload took the plan away while the body came."""
    try:
        return core.plan_of(principal)
    except KeyError:
        raise InvalidCredential from None


def _check_model(principal: Principal | None, name: str | None) -> None:
    """Raises ModelNotAllowed; a caller with an allow-list may not use routes without a model either."""
    if principal is None or not principal.models:
        return
    if name is None or not identity.may_use_model(principal, name):
        raise ModelNotAllowed


async def _reserve(core: Core, ctx: Context, plan: Plan | None, asked: Peek) -> Reservation:
    """What the model's limits and the caller's tokens have to say, before anything waits."""
    entry = core.config.models.get(ctx.model or "")
    if entry is None:
        return Reservation()
    assert ctx.model is not None
    await core.admission.take_model_request(ctx.model, entry)
    if entry.tokens_per_minute is None and (plan is None or plan.tokens_per_minute is None):
        return Reservation()
    allowed = asked.max_completion_tokens or asked.max_tokens or asked.max_output_tokens
    wanted = tokens.reservation(ctx.asked_tokens, allowed, entry.max_output, asked.n)
    return await core.admission.reserve_tokens(ctx, plan, (ctx.model, entry), wanted)


def _is_low(request: web.Request) -> bool:
    """A caller may say that it is in no hurry."""
    return request.headers.get("x-headrace-priority", "").lower() == "low"


def _is_json(content_type: str) -> bool:
    """Only application/json in UTF-8: anything else a browser would send across origins without asking."""
    media_type, _, parameters = content_type.lower().partition(";")
    charset = parameters.partition("charset=")[2].strip(' "')
    return media_type.strip() == "application/json" and charset in ("", "utf-8", "utf8")


def _read_fields(endpoint: Endpoint, body: bytes) -> Peek:
    if not body and endpoint.model is Model.NONE:
        return Peek()
    return peek(body)


def _model_name(core: Core, endpoint: Endpoint, asked: Peek) -> str | None:
    """The model to route by, or None for `default_upstream`."""
    if endpoint.model is Model.NONE:
        # Stored objects may name a model (assistants); an unknown one there is the provider's matter.
        known = asked.model is not None and core.config.match_model(asked.model) is not None
        return asked.model if known else None
    if asked.model:
        return asked.model
    if endpoint.model is Model.OPTIONAL:
        return None
    raise BadRequest("missing_model", "The field 'model' is missing.", param="model")


async def browser_chat(request: web.Request) -> web.StreamResponse:
    """A page's question: from here on a chat request like any other."""
    core, ctx = request.app[CORE], request[CONTEXT]
    settings, endpoint = core.config, ctx.endpoint
    if settings.browser_api is None or endpoint is None:
        raise NotFound
    if core.refusing:
        raise Draining
    fields = request.headers
    browser_api.check_origin(fields.getall("Origin", ()), fields.getall("Host", ()), settings.cors.origins)
    if not _is_json(fields.get("Content-Type", "")):
        raise Refused(415, close=False)
    streams = endpoint.ends_with_terminator
    content_only = streams and browser_api.wants_content(request.query.getall("format", []))
    held = HeldBody(core.bodies, settings.max_body_bytes)
    try:
        body = await held.read(request, settings.timeouts.body)
        ctx.bytes_in = len(body)
        question = browser_api.question(settings.browser_api, body, stream=streams, content_only=content_only)
        return await forward_body(request, ctx, endpoint, question.body, question.asked, question.reshape)
    finally:
        held.release()


# ── answered here ────────────────────────────────────────────────────────────────────────────────────────


def _model_object(core: Core, name: str) -> dict[str, Any]:
    """OpenAI's and Anthropic's fields in one object: both SDKs read it."""
    entry = core.config.models[name]
    created = datetime.fromtimestamp(core.started_at, UTC)
    return {
        "id": name,
        "object": "model",
        "created": int(core.started_at),
        "owned_by": entry.upstreams[0].name,
        "type": "model",
        "display_name": name,
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
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
    left = await core.admission.left(principal.name, plan)
    return _json({"object": "limits", "plan": principal.plan, "priority": plan.priority, **left})


async def health(_request: web.Request) -> web.Response:
    return _json({"status": "ok", "timestamp": datetime.now(UTC).isoformat()})


async def health_stream(request: web.Request) -> web.StreamResponse:
    """One event, so that a public chain can be tested without spending anything."""
    fields = {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache, no-transform",
        "X-Accel-Buffering": "no",
    }
    response = web.StreamResponse(headers=fields)
    await response.prepare(request)
    if request.method != "HEAD":
        now = monotonic()
        await response.write(b"data: " + msgspec.json.encode({"status": "ok", "clock": now}) + b"\n\n")
    await response.write_eof()
    return response


def _json(document: dict[str, Any]) -> web.Response:
    return web.Response(body=msgspec.json.encode(document), content_type="application/json")


_OURS = {
    "/api/chat/stream": browser_chat,
    "/api/chat": browser_chat,
    "/v1/models": list_models,
    "/v1/models/{rest}": show_model,
    "/v1/limits": limits,
    "/health": health,
    "/api/health/stream": health_stream,
}
