"""Requests that go upstream: the body, the model, what it may cost, a place, and then `forward`."""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.hdrs import CONTENT_TYPE
from multidict import istr

from proxy import accounting, browser_api, endpoints, headers, identity, tokens
from proxy.accounting import Bill
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
    ModelNotFound,
    NotFound,
    Refused,
)
from proxy.forward import Forwarding, nobody_available
from proxy.intake import HeldBody, here, in_turns
from proxy.peek import STEP_BYTES, Peek, peek, peeking
from proxy.reshape import Reshape, with_usage
from proxy.routing import Turns
from proxy.seat import Manner
from proxy.targets import unuse, use
from proxy.uploads import Upload, open_upload

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from proxy import schema
    from proxy.allotment import Allotment
    from proxy.identity import Principal
    from proxy.schema import Plan
    from proxy.seat import Seat
    from proxy.targets import Groups, Target


_JSON = "application/json"
_PRIORITY = istr("x-headrace-priority")
#: By these names: a member that is looked up in its class costs 0.1 us (Python 3.11).
_QUEUE, _NO_MODEL = Phase.QUEUE, Model.NONE


def proxy(request: web.Request, ctx: Context, endpoint: Endpoint) -> Awaitable[web.StreamResponse]:
    """The body, within its limits, then `forward_body`. What is awaited has to be awaited at once. (A plain
    call, for a coroutine in between costs 0.5 us, and each of its turns a little more.)"""
    core = ctx.core
    settings = core.config
    content_type = request.headers.get(CONTENT_TYPE)
    if content_type != _JSON:  # nearly always it is that, in this spelling
        if endpoint.body is Body.FORM and not _is_json(content_type or ""):
            return _proxy_form(request, ctx, endpoint)
        if content_type is not None and not _is_json(content_type):
            raise Refused(415, close=False)
    body = here(request, settings.max_body_bytes)
    if not body or len(body) > STEP_BYTES:
        return _proxy_in_turns(request, ctx, endpoint, body)
    ctx.bytes_in = len(body)
    return forward_body(request, ctx, endpoint, body, peek(body))


async def _proxy_in_turns(
    request: web.Request, ctx: Context, endpoint: Endpoint, body: bytes
) -> web.StreamResponse:
    """The same of a body that is large, or empty, or still on its way."""
    core = ctx.core
    settings = core.config
    with HeldBody(core.bodies, settings.max_body_bytes) as held:
        if body:
            held.count(len(body))
        else:
            body = await held.read(request, settings.timeouts.body)
        ctx.bytes_in = len(body)
        if len(body) > STEP_BYTES:
            asked = await in_turns(peeking(body))
        else:
            asked = peek(body) if body or endpoint.model is not _NO_MODEL else Peek()
    return await forward_body(request, ctx, endpoint, body, asked)


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
    """Model, route, a place at one of the upstreams, forward: of a body that was read from the caller or made
    here, and counts from here on against `bodies` (an upload counts itself). Raises NoUpstreamAvailable.

    reshape: what happens to the answer; None passes it on as it is.
    """
    core = ctx.core
    models, admission, bodies = core.config.models, core.admission, core.bodies
    size = len(body) if isinstance(body, bytes) else 0
    bodies.take(size)
    try:
        name, groups, allotment = _destination(core, ctx, endpoint, asked.model)
        entry = models.get(ctx.model or "")
        job, bill = _job(request, ctx, endpoint, (body, asked, reshape), (name, entry))
        waiting = accounting.open_bill(admission, ctx, allotment, entry, bill)
        if waiting is not None:
            await waiting
        seat = None
        use(groups)
        try:
            turns = Turns(groups, random.random)
            ranking = turns.ranking()
            if not ranking:
                raise nobody_available(turns)
            upstreams = [target.upstream for target in ranking]
            seat = admission.seat_at_once(ctx, allotment, upstreams)
            if seat is None:
                seat = await admission.seat_in_turn(ctx, allotment, upstreams, _manner(request, body))
            return await _forwarding(request, ctx, seat).run(job, turns, _seated_at(seat, ranking))
        finally:
            if seat is not None:
                seat.leave()
            unuse(groups)
            answered_by = models.get(ctx.model or "")
            waiting = accounting.settle(admission, ctx, bill, answered_by, sys.exception())
            if waiting is not None:
                await waiting
    finally:
        bodies.give_back(size)


def _destination(
    core: Core, ctx: Context, endpoint: Endpoint, name: str | None
) -> tuple[str | None, Groups, Allotment]:
    """The model's name as the caller wrote it, whom to ask, and what the caller may use. Raises
    ModelNotFound, ModelNotAllowed, BadRequest, InvalidCredential."""
    ctx.phase = _QUEUE
    if not name or endpoint.model is _NO_MODEL:
        name = _routed_otherwise(core, endpoint, name)
    try:
        ctx.model, groups = core.route(name)
    except ModelNotFound:
        ctx.model = "other"  # not configured, and labels are a closed set
        raise
    principal = ctx.principal
    if principal is None:
        return name, groups, core.admission.allotment(None, None)
    plan = _plan_for(core, principal, name)
    groups = _allowed(principal, groups) if principal.models else groups
    return name, groups, core.admission.allotment(principal, plan)


def _job(
    request: web.Request,
    ctx: Context,
    endpoint: Endpoint,
    question: tuple[bytes | Upload, Peek, Reshape | None],
    model: tuple[str | None, schema.Model | None],
) -> tuple[Job, Bill]:
    """What is asked, and what it may take at most."""
    body, asked, reshape = question
    name, entry = model
    output_tokens, hedge_after_s = 0, None
    if isinstance(body, bytes):
        ctx.asked_tokens = tokens.estimate_prompt(body)
        if entry is not None:
            allowed = asked.max_completion_tokens or asked.max_tokens or asked.max_output_tokens
            output_tokens = tokens.most_output(allowed, entry.max_output, asked.n)
            hedge_after_s = entry.hedge_after
        if asked.stream and ctx.core.config.streams.usage == "inject":
            body, reshape = with_usage(endpoint, body, reshape)
    job = Job(  # by position: by name, msgspec takes five times as long
        request.method,
        endpoint.asks or endpoints.upstream_path(request.raw_path),
        headers.to_upstream(request.raw_headers, ctx.request_id),
        body,
        name,
        asked.stream is True,
        reshape,
        hedge_after_s,
    )
    return job, Bill(ctx.asked_tokens + output_tokens)


def _forwarding(request: web.Request, ctx: Context, seat: Seat) -> Forwarding:
    core = ctx.core
    settings = core.config
    delivery = Delivery(request, ctx, settings.streams, settings.timeouts.write, core.metrics)
    return Forwarding(core, ctx, delivery, seat)


def _seated_at(seat: Seat, ranking: list[Target]) -> Target:
    """Whose slot it is; the best where none is held, because limits are only observed."""
    first, name = ranking[0], seat.upstream
    if name == first.upstream.name:
        return first
    return next((each for each in ranking if each.upstream.name == name), first)


def _allowed(principal: Principal, groups: Groups) -> Groups:
    """A caller's list of models holds for those that another one falls back to as well."""
    return tuple(
        [
            group
            for group in groups
            if group[0].fallback is None or identity.may_use_model(principal, group[0].fallback)
        ]
    )


def _plan_for(core: Core, principal: Principal, name: str | None) -> Plan:
    """The plan of a caller who may use this model. Raises ModelNotAllowed: with an allow-list routes without
    a model are not open either; InvalidCredential: a reload took the plan away while the body came."""
    if principal.models and (name is None or not identity.may_use_model(principal, name)):
        raise ModelNotAllowed
    plan = core.config.plans.get(principal.plan)
    if plan is None:
        raise InvalidCredential
    return plan


def _manner(request: web.Request, body: bytes | Upload) -> Manner:
    """A caller may say that it is in no hurry; an upload does not wait."""
    if not isinstance(body, bytes):
        return Manner.NOW
    said = request.headers.get(_PRIORITY)
    return Manner.WAIT if said is None or said.lower() != "low" else Manner.LOW


def _is_json(content_type: str) -> bool:
    """Only application/json in UTF-8: anything else a browser would send across origins without asking."""
    media_type, _, parameters = content_type.lower().partition(";")
    charset = parameters.partition("charset=")[2].strip(' "')
    return media_type.strip() == _JSON and charset in ("", "utf-8", "utf8")


def _routed_otherwise(core: Core, endpoint: Endpoint, named: str | None) -> str | None:
    """The model to route by where none is named or none has to be; None for `default_upstream`."""
    if endpoint.model is _NO_MODEL:
        # Stored objects may name a model (assistants); an unknown one there is the provider's matter.
        return named if named is not None and core.config.match_model(named) is not None else None
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
    if not _is_json(fields.get(CONTENT_TYPE, "")):
        raise Refused(415, close=False)
    streams = endpoint.ends_with_terminator
    content_only = streams and browser_api.wants_content(request.query.getall("format", []))
    with HeldBody(core.bodies, settings.max_body_bytes) as held:
        body = await held.read(request, settings.timeouts.body)
        ctx.bytes_in = len(body)
        question = browser_api.question(settings.browser_api, body, stream=streams, content_only=content_only)
    return await forward_body(request, ctx, endpoint, question.body, question.asked, question.reshape)
