"""The request's body: read whole, bounded and timed, before anything waits.

Whole, because aiohttp sees neither FIN nor RST of a caller while an unread body pauses its reading; and a
retry needs it again. Bounded three ways: per body, over all bodies, in time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TypeVar

from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from proxy.core import Bodies
from proxy.errors import Refused

_Result = TypeVar("_Result")


def here(request: web.Request, limit: int) -> bytes:
    """All of a body if it came with the head, as nearly always; empty: `HeldBody.read` has to wait for it.
    Raises Refused 413."""
    content = request.content
    if not content.is_eof():
        return b""
    body = content.read_nowait()
    if len(body) > limit:
        raise Refused(413)
    return body


class HeldBody:
    """A body that counts against `bodies` while it is read and looked at, until the end of the block.
    Raises Refused 413, 408, 400; Overloaded."""

    __slots__ = ("_bodies", "_limit", "size")

    def __init__(self, bodies: Bodies, limit: int) -> None:
        self._bodies = bodies
        self._limit = limit
        self.size = 0

    async def read(self, request: web.Request, timeout_s: float) -> bytes:
        """All of it, waiting up to `timeout_s` seconds for what is not here."""
        declared = request.content_length
        if declared is not None and declared > self._limit:
            raise Refused(413)  # before a byte of it is read
        pieces: list[bytes] = []
        if request.content.is_eof():
            pieces.append(request.content.read_nowait())
            self.count(len(pieces[0]))
        else:
            await self._wait(request, timeout_s, pieces)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def __enter__(self) -> HeldBody:
        return self

    def __exit__(self, *_: object) -> None:
        self._bodies.give_back(self.size)
        self.size = 0

    def count(self, size: int) -> None:
        """So much more of it is here."""
        if self.size + size > self._limit:
            raise Refused(413)
        self._bodies.take(size)
        self.size += size

    async def _wait(self, request: web.Request, timeout_s: float, pieces: list[bytes]) -> None:
        if "Expect" in request.headers and request.transport is not None:
            # aiohttp would say this before anybody has looked at the credential (see `no_expectation`).
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(timeout_s):
                while piece := await request.content.readany():
                    self.count(len(piece))
                    pieces.append(piece)
        except TimeoutError:
            raise Refused(408) from None
        except RequestPayloadError:
            raise Refused(400) from None


async def in_turns(steps: Generator[None, None, _Result]) -> _Result:
    """Work on a large body, one step in a turn of the event loop: running streams come between them.

    Not in a thread: the decoder and the regex engine keep the interpreter's lock, and a loop that wants it
    back from a thread waits up to 5 ms each time (sys.getswitchinterval).
    """
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _Result = end.value
            return result
        await asyncio.sleep(0)


async def no_expectation(request: web.Request) -> None:
    """aiohttp calls this for every Expect before the middlewares: the answer is ours to give later."""
