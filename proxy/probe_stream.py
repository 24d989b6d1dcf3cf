"""GET /api/health/stream: events that cost nothing and that anybody may ask for, to test a public chain.

Without a query it is one event. With `events`, `gap`, `silence`, `heartbeat` or `padding` it is a stream with
a known rhythm, for `headrace doctor`: each event says when it was sent, so that whoever receives it can tell
what the chain in between did to it. These may last for minutes and need no credential: their length is
bounded, and so is their number.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Annotated

import msgspec
from aiohttp import web

from proxy.context import CONTEXT, CORE, Context, Phase
from proxy.core import Core
from proxy.errors import BadRequest, Overloaded

_FIELDS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}
#: Streams of this route at once, in one process; past it 503. A doctor needs three.
_AT_ONCE = 8
#: How often a running one looks whether the process is to end: the drain does not wait for it.
_LOOK_S = 0.5


class Rhythm(msgspec.Struct, frozen=True, kw_only=True):
    """How a stream is paced. Seconds; `silence` comes before the last event, with a comment every `heartbeat`
    seconds (0: none); `padding` bytes of comment follow each event."""

    events: Annotated[int, msgspec.Meta(ge=1, le=30)] = 1
    gap: Annotated[float, msgspec.Meta(ge=0, le=5)] = 0.0
    silence: Annotated[float, msgspec.Meta(ge=0, le=300)] = 0.0
    heartbeat: Annotated[float, msgspec.Meta(ge=0, le=300)] = 0.0
    padding: Annotated[int, msgspec.Meta(ge=0, le=16384)] = 0


_ONE_EVENT = Rhythm()
_BOUNDS = "events: 1 to 30; gap: 0 to 5 s; silence and heartbeat: 0 to 300 s; padding: 0 to 16384 bytes."


async def answer(request: web.Request) -> web.StreamResponse:
    """The route. Raises BadRequest, Overloaded."""
    core, ctx = request.app[CORE], request[CONTEXT]
    rhythm = _rhythm(request)
    if rhythm != _ONE_EVENT and sum(each.route == ctx.route for each in core.running) > _AT_ONCE:
        raise Overloaded
    response = web.StreamResponse(headers={**_FIELDS, "x-headrace-probe": "1"})
    await response.prepare(request)
    if request.method != "HEAD":
        ctx.committed = ctx.streaming = True
        ctx.phase, ctx.status = Phase.STREAM, response.status
        try:
            await _play(response, rhythm, core, ctx)
        except asyncio.CancelledError:
            ctx.reason = ctx.stopped  # killed; None: the caller has left
            raise
    await response.write_eof()
    return response


def _rhythm(request: web.Request) -> Rhythm:
    try:
        return msgspec.convert(dict(request.query), Rhythm, strict=False)
    except msgspec.ValidationError:
        raise BadRequest("bad_request", _BOUNDS) from None


async def _play(response: web.StreamResponse, rhythm: Rhythm, core: Core, ctx: Context) -> None:
    for number in range(1, rhythm.events + 1):
        if number == rhythm.events and rhythm.silence:
            await _keep_silent(response, rhythm, core)
        elif number > 1:
            await _wait(rhythm.gap, core)
        data = _event(number, rhythm, ctx)
        ctx.chunks += 1
        ctx.bytes_out += len(data)
        await response.write(data)
        if core.draining:
            return


def _event(number: int, rhythm: Rhythm, ctx: Context) -> bytes:
    now = monotonic()
    document = {"status": "ok", "event": number, "clock": now, "sent_s": now - ctx.started_at}
    padding = b": %b\n" % (b"." * rhythm.padding) if rhythm.padding else b""
    return b"data: " + msgspec.json.encode(document) + b"\n" + padding + b"\n"


async def _keep_silent(response: web.StreamResponse, rhythm: Rhythm, core: Core) -> None:
    ends_at = monotonic() + rhythm.silence
    while (left := ends_at - monotonic()) > 0 and not core.draining:
        await _wait(min(left, rhythm.heartbeat or left), core)
        if rhythm.heartbeat and monotonic() < ends_at:
            await response.write(b": headrace\n")


async def _wait(seconds: float, core: Core) -> None:
    ends_at = monotonic() + seconds
    # One of eight looks at a level; an event would have to be set by every drain.
    while (left := ends_at - monotonic()) > 0 and not core.draining:  # noqa: ASYNC110 - rare, and bounded
        await asyncio.sleep(min(left, _LOOK_S))
