"""The request's body: read whole, bounded and timed, before anything waits.

Whole, because aiohttp sees neither FIN nor RST of a caller while an unread body pauses its reading; and a
retry needs it again. Bounded three ways: per body, over all bodies, in time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from proxy.core import Bodies
from proxy.errors import Refused


@asynccontextmanager
async def held_body(
    request: web.Request, bodies: Bodies, *, limit: int, timeout_s: float
) -> AsyncIterator[bytes]:
    """The body, counted against `bodies` for as long as it is held.

    Raises Refused 413 (before reading, if the declared length says so), 408, 400; Overloaded.
    """
    declared = request.content_length
    if declared is not None and declared > limit:
        raise Refused(413)
    reading = _Reading(bodies, limit)
    try:
        if request.content.is_eof():  # it came with the head: nothing to wait for
            reading.add(request.content.read_nowait())
        else:
            await _read(request, reading, timeout_s)
        yield b"".join(reading.pieces)
    finally:
        bodies.give_back(reading.size)


class _Reading:
    def __init__(self, bodies: Bodies, limit: int) -> None:
        self._bodies = bodies
        self._limit = limit
        self.size = 0
        self.pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        if self.size + len(piece) > self._limit:
            raise Refused(413)
        self._bodies.take(len(piece))
        self.size += len(piece)
        self.pieces.append(piece)


async def _read(request: web.Request, reading: _Reading, timeout_s: float) -> None:
    if "Expect" in request.headers and request.transport is not None:
        # aiohttp would say this before anybody has looked at the credential (see `no_expectation`).
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    try:
        async with asyncio.timeout(timeout_s):
            while piece := await request.content.readany():
                reading.add(piece)
    except TimeoutError:
        raise Refused(408) from None
    except RequestPayloadError:
        raise Refused(400) from None


async def no_expectation(request: web.Request) -> None:
    """aiohttp calls this for every Expect before the middlewares: the answer is ours to give later."""
