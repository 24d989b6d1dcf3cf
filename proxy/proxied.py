"""Requests that go upstream: the body, the model, what it may cost, a place, and then `forward`."""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING

from aiohttp import web

from proxy import accounting, browser_api, endpoints, headers, identity, tokens
from proxy.attempt import Job
from proxy.context import CONTEXT, Context, Phase
from proxy.core import Core
from proxy.deliver import Delivery
from proxy.endpoints import Body, Endpoint, Model
from proxy.errors import (
    BadRequest,
    Draining,
    InvalidCredential,
    ModelNotAllowed,
    NotFound,
    Refused,
)
from proxy.forward import Forwarding, nobody_available
from proxy.intake import HeldBody, in_turns
from proxy.peek import STEP_BYTES, Peek, peek, peeking
from proxy.reshape import Reshape, with_usage
from proxy.routing import Turns
from proxy.seat import Manner
from proxy.targets import in_use
from proxy.uploads import Upload, open_upload

if TYPE_CHECKING:
    from proxy import schema
    from proxy.identity import Principal
    from proxy.schema import Plan
    from proxy.targets import Groups


async def proxy(request: web.Request, ctx: Context, endpoint: Endpoint) -> web.StreamResponse:
    """The body, within its limits, then `forward_body`."""
    core = ctx.core
    settings = core.config
    if endpoint.body is Body.FORM and not _is_json(request.headers.get("Content-Type", "")):
        return await _proxy_form(request, ctx, endpoint)
    if not _is_json(request.headers.get("Content-Type", "application/json")):
        raise Refused(415, close=False)
    held = HeldBody(core.bodies, settings.max_body_bytes)
    try:
        body = held.here(request) or await held.read(request, settings.timeouts.body)
        ctx.bytes_in = len(body)
        return await forward_body(request, ctx, endpoint, body, await _read_fields(endpoint, body))
    finally:
        held.release()


async def _proxy_form(request: web.Request, ctx: Context, endpoint: Endpoint) -> web.StreamResponse:
    """A body that is not held: it goes upstream as it comes."""
    core, fields = ctx.core, request.headers
    if ctx.principal is None:  # a page can send forms without asking first, and here nobody asks for a key
        origins = core.config.cors.origins
        browser_api.check_origin(fields.getall("Origin", ()), fields.getall("Host", ()), origins)
    upload = await open_upload(request, ctx, core)
    try:
        return await forward_body(request, ctx, endpoint, upload, Peek(model=upload.model))
    finally:
        await upload.close()


async def forward_body(
    request: web.Request,
    ctx: Context,
    endpoint: Endpoint,
    body: bytes | Upload,
    asked: Peek,
    reshape: Reshape | None = None,
) -> web.StreamResponse:
    """Model, route, forward: of a body that was read from the caller or made here.

    reshape: what happens to the answer; None passes it on as it is.
    """
    core = ctx.core
    settings = core.config
    ctx.phase = Phase.QUEUE
    name = _model_name(core, endpoint, asked)
    ctx.model = None if name is None else "other"  # until it is known to be configured: a closed set
    ctx.model, groups = core.route(name)
    _check_model(ctx.principal, name)
    plan = _plan_of(core, ctx.principal)
    entry = settings.models.get(ctx.model)
    output_tokens = 0
    manner = Manner.NOW
    if isinstance(body, bytes):
        ctx.asked_tokens = tokens.estimate_prompt(body)
        output_tokens = _most_output(entry, asked)
        manner = Manner.LOW if _is_low(request) else Manner.WAIT
        if asked.stream and settings.streams.usage == "inject":
            body, reshape = with_usage(endpoint, body, reshape)
    bill = await accounting.open_bill(core.admission, ctx, plan, entry, output_tokens)
    try:
        job = Job(
            method=request.method,
            path=endpoint.asks or endpoints.upstream_path(request.raw_path),
            fields=headers.to_upstream(request.raw_headers)
            + b"x-request-id: %b\r\n" % ctx.request_id.encode(),
            body=body,
            model=name,
            wants_stream=bool(asked.stream),
            reshape=reshape,
            hedge_after_s=entry.hedge_after if entry is not None and isinstance(body, bytes) else None,
        )
        groups = _allowed(ctx.principal, groups)
        return await _ask(request, job, groups, manner)
    finally:
        answered_by = settings.models.get(ctx.model or "")
        await accounting.settle(core.admission, ctx, bill, answered_by, sys.exception())


async def _ask(request: web.Request, job: Job, groups: Groups, manner: Manner) -> web.StreamResponse:
    """Waits for a place at one of the upstreams, and goes there. Raises NoUpstreamAvailable."""
    ctx = request[CONTEXT]
    core = ctx.core
    turns = Turns(groups, random.random)
    ranking = turns.ranking()
    if not ranking:
        raise nobody_available(turns)
    plan = _plan_of(core, ctx.principal)
    upstreams = [target.upstream for target in ranking]
    with in_use(groups):
        seat = core.admission.seat_at_once(ctx, plan, upstreams)
        if seat is None:
            seat = await core.admission.seat_in_turn(ctx, plan, upstreams, manner)
        with seat:
            first = next((each for each in ranking if each.upstream.name == seat.upstream), ranking[0])
            settings = core.config
            delivery = Delivery(request, ctx, settings.streams, settings.timeouts.write, core.metrics)
            return await Forwarding(core, ctx, delivery, seat).run(job, turns, first)


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


def _most_output(entry: schema.Model | None, asked: Peek) -> int:
    if entry is None:
        return 0
    allowed = asked.max_completion_tokens or asked.max_tokens or asked.max_output_tokens
    return tokens.most_output(allowed, entry.max_output, asked.n)


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


def _is_low(request: web.Request) -> bool:
    """A caller may say that it is in no hurry."""
    return request.headers.get("x-headrace-priority", "").lower() == "low"


def _is_json(content_type: str) -> bool:
    """Only application/json in UTF-8: anything else a browser would send across origins without asking."""
    media_type, _, parameters = content_type.lower().partition(";")
    charset = parameters.partition("charset=")[2].strip(' "')
    return media_type.strip() == "application/json" and charset in ("", "utf-8", "utf8")


async def _read_fields(endpoint: Endpoint, body: bytes) -> Peek:
    if not body and endpoint.model is Model.NONE:
        return Peek()
    return peek(body) if len(body) <= STEP_BYTES else await in_turns(peeking(body))


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
    ctx = request[CONTEXT]
    core = ctx.core
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
        body = held.here(request) or await held.read(request, settings.timeouts.body)
        ctx.bytes_in = len(body)
        question = browser_api.question(settings.browser_api, body, stream=streams, content_only=content_only)
        return await forward_body(request, ctx, endpoint, question.body, question.asked, question.reshape)
    finally:
        held.release()
