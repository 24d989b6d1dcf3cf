"""WebSocket sessions from the caller's side: `GET /v1/realtime` and `GET /v1/responses`.

Opt-in per model (`models.x.websocket`); everything else is as for any request: credential, rates, slots (held
for the whole session), end reasons, one log line.

`/v1/realtime` names its model in the query, so the upstream is connected first: what goes wrong until then is
an ordinary JSON error. A Responses session names its model in its first message, which only comes after the
upgrade: there an error is an event, and then a Close frame.

A session without a model (a transcription session, a call that already runs, a stored prompt) goes to
`default_upstream`, if WebSockets were allowed for one of the models there.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, WSMsgType, web
from multidict import CIMultiDict

from proxy import accounting, browser_api, endpoints, handshake, headers, identity, socket_events, tokens
from proxy.context import Context, Phase
from proxy.core import Core
from proxy.dial import CLOSE_S, Dialer, Line, Opening
from proxy.endpoints import Endpoint
from proxy.errors import (
    BadRequest,
    Dialect,
    Draining,
    HeadraceError,
    InvalidCredential,
    Killed,
    ModelNotAllowed,
    NotFound,
    Reason,
    Refused,
    UpgradeRequired,
)
from proxy.forward import nobody_available
from proxy.peek import peek
from proxy.routing import Turns
from proxy.seat import Manner
from proxy.usage import Source, Usage
from proxy.websocket import Caller, CallerSocket, Check, Limits, Tunnel

if TYPE_CHECKING:
    from proxy import schema
    from proxy.schema import Plan
    from proxy.targets import Groups, Target

#: What aiohttp needs to upgrade. All other fields stay out of it: it logs the subprotocols that it does not
#: select, and a credential may be among them.
_HANDSHAKE = ("Host", "Origin", "Connection", "Upgrade", "Sec-WebSocket-Key", "Sec-WebSocket-Version")
_PROTOCOLS = "Sec-WebSocket-Protocol"


async def websocket(request: web.Request, ctx: Context, endpoint: Endpoint) -> web.StreamResponse:
    """A whole session. Raises HeadraceError until the upgrade."""
    core = ctx.core
    if not any(entry.websocket for entry in core.config.models.values()):
        raise NotFound
    session = _Session(request, ctx, core)
    session.check(endpoint)
    if endpoint.dialect is Dialect.RESPONSES:
        return await session.by_message()
    return await session.by_query()


class _Session:
    def __init__(self, request: web.Request, ctx: Context, core: Core) -> None:
        self._request = request
        self._ctx = ctx
        self._core = core
        self._caller: Caller
        self._offered = handshake.passed_on(request.headers.getall(_PROTOCOLS, ()))

    def check(self, endpoint: Endpoint) -> None:
        """Is it an opening handshake, and of a page that may ask?"""
        request, fields = self._request, self._request.headers
        if fields.get("Upgrade", "").strip().lower() != "websocket":
            raise NotFound if endpoint.dialect is Dialect.RESPONSES else UpgradeRequired
        values = [value for name in _HANDSHAKE for value in fields.getall(name, ())]
        if (
            request.version != HttpVersion11
            or request.can_read_body
            or not all(value.isascii() for value in values)
            or not web.WebSocketResponse().can_prepare(self._bare_request(None))
        ):
            raise BadRequest("bad_request", "The WebSocket handshake is malformed.")
        # No CORS protocol protects a WebSocket: any page may open one, and only the server looks at `Origin`.
        listed = self._core.config.cors.origins
        browser_api.check_origin(fields.getall("Origin", ()), fields.getall("Host", ()), listed)

    # ── the two routes ───────────────────────────────────────────────────────────────────────────────────

    async def by_query(self) -> web.StreamResponse:
        """Realtime: the upstream first, then the upgrade."""
        path = self._request.raw_path
        name = handshake.asked_model(path)
        if name is None and not handshake.names_its_session(path):
            raise BadRequest("missing_model", "The parameter 'model' is missing.", param="model")
        async with self._line(name, b"") as (line, target):
            await self._upgrade(line.socket.protocol, line, target)
            await self._converse(line, None)
        return self._caller.socket

    async def by_message(self) -> web.StreamResponse:
        """Responses: the upgrade first, because the model comes in a message."""
        del self._offered[1:]  # what is selected before the upstream is known is all that it may select
        await self._upgrade(next(iter(self._offered), None))
        try:
            first = await self._first_message()
            if first is not None:
                await self._ask(first)
        except HeadraceError as error:
            await self._refuse(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._ctx.stopped is None or task is None:
                raise
            task.uncancel()
            await self._refuse(Draining() if self._ctx.stopped is Reason.DRAINED else Killed())
        return self._caller.socket

    async def _ask(self, first: bytes) -> None:
        name = socket_events.asked_model(first)
        async with self._line(name, first) as (line, target):

            def check(message: bytes) -> bytes:
                named = socket_events.asked_model(message)
                if named is None:
                    return message
                if named != name:
                    text = "A session keeps the model that it began with."
                    raise BadRequest("bad_request", text, param="model")
                return message if target.model is None else socket_events.rewritten(message, target.model)

            try:
                await line.socket.send_frame(check(first), WSMsgType.TEXT)
            except ConnectionError:
                pass  # the session will find it ended, and say how
            await self._converse(line, check)

    async def _first_message(self) -> bytes | None:
        """None: the caller has ended the session before. Raises Refused."""
        socket = self._caller.socket
        try:
            async with asyncio.timeout(self._core.config.timeouts.body):
                message = await socket.receive()
                while message.type in (WSMsgType.PING, WSMsgType.PONG):
                    if message.type is WSMsgType.PING:
                        await socket.pong(message.data)
                    message = await socket.receive()
        except TimeoutError:
            raise Refused(408) from None
        if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
            said_goodbye = message.type is WSMsgType.CLOSE
            self._ctx.reason = Reason.COMPLETE if said_goodbye else Reason.CLIENT_GONE
            await self._caller.close(1000, "")
            return None
        data: bytes = message.data
        self._ctx.bytes_in += len(data)
        return data

    # ── the caller ───────────────────────────────────────────────────────────────────────────────────────

    def _bare_request(self, protocol: str | None) -> web.Request:
        """The request with the fields of its handshake alone."""
        fields = CIMultiDict(
            (name, value) for name in _HANDSHAKE for value in self._request.headers.getall(name, ())
        )
        if protocol is not None:
            fields[_PROTOCOLS] = protocol
        return self._request.clone(headers=fields)

    async def _upgrade(
        self, protocol: str | None, line: Line | None = None, target: Target | None = None
    ) -> None:
        ctx = self._ctx
        socket: CallerSocket = web.WebSocketResponse(
            timeout=CLOSE_S,
            autoclose=False,
            autoping=False,
            protocols=() if protocol is None else (protocol,),
            compress=False,
            max_msg_size=self._core.config.max_body_bytes
            + 1,  # aiohttp refuses what is as large as its limit
            decode_text=False,
        )
        if line is not None and target is not None:
            if target.fallback is not None:
                socket.headers["x-headrace-model"] = target.fallback
            socket.headers["x-headrace-upstream"] = line.upstream.name
            socket.headers["x-headrace-attempts"] = str(ctx.attempts)
            passed = headers.to_caller(line.fields, keep_ratelimit=False)
            socket.headers.extend([field for field in passed if field[0] == "x-upstream-request-id"])
        await socket.prepare(self._bare_request(protocol))
        ctx.status = socket.status
        ctx.committed = True
        self._caller = Caller(self._request, socket)

    async def _refuse(self, error: HeadraceError) -> None:
        """After the upgrade: an event says why, then the session ends."""
        ctx = self._ctx
        ctx.reason, ctx.error_code = error.reason, error.code
        try:
            async with asyncio.timeout(CLOSE_S):
                event = socket_events.error_event(error, ctx.request_id)
                await self._caller.socket.send_frame(event, WSMsgType.TEXT)
        except (ConnectionError, TimeoutError):
            pass
        await self._caller.close(_close_code(error), error.message)

    async def _converse(self, line: Line, check: Check | None) -> None:
        ctx, settings = self._ctx, self._core.config
        ctx.phase = Phase.STREAM
        ctx.streaming = True
        active = self._core.metrics.streams_active
        active.add((line.upstream.name,), 1)
        limits = Limits(line.upstream.timeouts.idle, settings.timeouts.write)
        try:
            await Tunnel(ctx, self._caller, line.socket, limits, check).run()
        finally:
            active.add((line.upstream.name,), -1)

    # ── the upstream ─────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _line(self, name: str | None, first: bytes) -> AsyncIterator[tuple[Line, Target]]:
        """A connection to an upstream, with everything that a request has to have for it; all of it is given
        back at the end of the block."""
        ctx, core = self._ctx, self._core
        ctx.phase = Phase.QUEUE
        groups = self._groups(name)
        plan = self._plan()
        entry = core.config.models.get(ctx.model or "")
        ctx.asked_tokens = tokens.estimate_prompt(first)
        allotment = core.admission.allotment(ctx.principal, plan)
        bill = accounting.Bill(ctx.asked_tokens + _most_output(entry, first))
        waiting = accounting.open_bill(core.admission, ctx, allotment, entry, bill)
        if waiting is not None:
            await waiting
        opened = False
        try:
            turns = Turns(groups, random.random)
            ranking = turns.ranking()
            if not ranking:
                raise nobody_available(turns)
            upstreams = [target.upstream for target in ranking]
            seat = core.admission.seat_at_once(ctx, allotment, upstreams)
            if seat is None:
                seat = await core.admission.seat_in_turn(ctx, allotment, upstreams, self._manner())
            with seat:
                place = next((each for each in ranking if each.upstream.name == seat.upstream), ranking[0])
                attempt = await Dialer(core, ctx, seat, self._opening).dial(turns, place)
                opened = True
                try:
                    yield attempt.line, attempt.target
                finally:
                    await attempt.close(ctx.reason)
        finally:
            if not opened:
                ctx.usage = Usage(source=Source.ESTIMATED)  # nobody was asked for anything
            answered_by = core.config.models.get(ctx.model or "")
            waiting = accounting.settle(core.admission, ctx, bill, answered_by, sys.exception())
            if waiting is not None:
                await waiting

    def _groups(self, name: str | None) -> Groups:
        """Whom to ask. Raises ModelNotFound, ModelNotAllowed; NotFound: the model's sessions are not opened
        to callers."""
        ctx, core = self._ctx, self._core
        models = core.config.models
        ctx.model = None if name is None else "other"  # until it is known to be configured: a closed set
        ctx.model, groups = core.route(name)
        principal = ctx.principal
        if principal is not None and principal.models:
            if name is None:
                raise ModelNotAllowed
            identity.check_model(principal, name)
        if name is None:
            served = {
                target.name for entry in models.values() if entry.websocket for target in entry.upstreams
            }
            if core.config.default_upstream not in served:
                raise NotFound("There are no WebSocket sessions without a model.", param="model")
            return groups
        if not models[ctx.model].websocket:
            raise NotFound("This model has no WebSocket sessions.", param="model")
        return tuple(group for group in groups if self._may_stand_in(group[0]))

    def _may_stand_in(self, target: Target) -> bool:
        """The model that another one falls back to has to be open to the caller as well."""
        principal = self._ctx.principal
        if target.label is None or not self._core.config.models[target.label].websocket:
            return False
        return (
            target.fallback is None or principal is None or identity.may_use_model(principal, target.fallback)
        )

    def _plan(self) -> Plan | None:
        """Raises InvalidCredential: a reload took the plan away."""
        try:
            return self._core.plan_of(self._ctx.principal)
        except KeyError:
            raise InvalidCredential from None

    def _manner(self) -> Manner:
        low = self._request.headers.get("x-headrace-priority", "").lower() == "low"
        return Manner.LOW if low else Manner.WAIT

    def _opening(self, target: Target) -> Opening:
        path = self._request.raw_path
        if target.model is not None and handshake.asked_model(path) is not None:
            path = handshake.with_model(path, target.model)
        lines = headers.to_upstream(self._request.raw_headers, self._ctx.request_id).split(b"\r\n")
        pairs = (line.partition(b": ") for line in lines if line)
        fields = [
            (name.decode(), value.decode("utf-8", "surrogateescape"))
            for name, _, value in pairs
            if not name.lower().startswith(b"sec-websocket-")
        ]
        return Opening(endpoints.upstream_path(path), fields, self._offered)


def _most_output(entry: schema.Model | None, first: bytes) -> int:
    """Tokens of one response; what the whole session used is settled at its end."""
    if entry is None:
        return 0
    allowed = peek(first).max_output_tokens if first else None
    return tokens.most_output(allowed, entry.max_output, None)


def _close_code(error: HeadraceError) -> int:
    """RFC 6455 section 7.4.1: going away, internal error, policy violation."""
    if isinstance(error, Draining):
        return 1001
    return 1011 if error.status >= 500 and not isinstance(error, Killed) else 1008
