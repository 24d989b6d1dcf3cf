"""A request body that is sent piece by piece, while its answer may already be coming.

Never more than one piece and a full send buffer are held: the next piece is asked for when the upstream has
taken enough. An upstream that refuses says so at once and need not read the rest, so the answer is looked for
before every piece: a write to a connection that the upstream has closed would destroy what it sent before
(uvloop closes a transport whose write fails, and drops what it has not read; RFC 9112 9.6).
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from time import monotonic
from typing import Protocol

from proxy.chunked import framed
from proxy.errors import HeadraceError
from proxy.tasks import spawn

#: From this status on the rest of the body is of no use to the upstream (RFC 9112 9.5).
_REFUSED = 400


class Source(Protocol):
    """A body that comes piece by piece. `pieces` raises HeadraceError when the body cannot be had whole."""

    @property
    def length(self) -> int | None:
        """Bytes, if that is known before they are here."""

    @property
    def waiting(self) -> bool:
        """Is the next piece still to come, so that nobody but the caller holds it up?"""

    def pieces(self) -> AsyncGenerator[bytes, None]: ...


class Answering(Protocol):
    """The exchange that the body belongs to."""

    answered: bool
    status: int

    def failed(self, fault: Exception) -> None: ...


def framing(length: int | None) -> bytes:
    """The header line that says where a body ends."""
    return b"Transfer-Encoding: chunked\r\n" if length is None else b"Content-Length: %d\r\n" % length


class Sender:
    """Sends one Source on one connection."""

    __slots__ = ("_exchange", "_last_at", "_source", "_task", "_transport", "done")

    def __init__(self, source: Source, exchange: Answering) -> None:
        self._source = source
        self._exchange = exchange
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._last_at = monotonic()
        self.done = False  # the whole body is written, or in the transport's buffer

    @property
    def last_at(self) -> float:
        """The moment since which it is the upstream that is waited for."""
        return monotonic() if self._source.waiting else self._last_at

    def start(self, transport: asyncio.Transport, drain: Callable[[], Awaitable[None]]) -> None:
        """drain: waits while the transport's buffer is above its limit."""
        self._transport = transport
        self._task = spawn(self._run(transport, drain), "upload")

    def stop(self) -> None:
        """Nothing more is written. Never blocks.

        The rest of a body that has no end is not worth sending: without a reset the upstream, if it is slow,
        would learn of the end only behind all that the kernel holds for it.
        """
        if self._task is not None:
            self._task.cancel()
        if not self.done and self._transport is not None and not self._transport.is_closing():
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def _run(self, transport: asyncio.Transport, drain: Callable[[], Awaitable[None]]) -> None:
        try:
            await self._send(transport, drain)
        except HeadraceError as error:
            self._exchange.failed(error)
        except OSError:
            pass  # the connection has ended: it tells the exchange itself

    async def _send(self, transport: asyncio.Transport, drain: Callable[[], Awaitable[None]]) -> None:
        chunked = self._source.length is None
        pieces = self._source.pieces()
        try:
            if not await self._wanted(transport):
                return  # a pooled connection that is dead already: nothing of the body was given away
            async for piece in pieces:
                if not await self._wanted(transport):
                    return
                transport.write(framed(piece) if chunked else piece)
                await drain()
                self._last_at = monotonic()
        finally:
            await pieces.aclose()
        if chunked:
            transport.write(b"0\r\n\r\n")
        self.done = True

    async def _wanted(self, transport: asyncio.Transport) -> bool:
        """Lets the loop read what the upstream has sent so far, and looks at it."""
        exchange = self._exchange
        while not exchange.answered and not transport.is_closing():
            poll = select.poll()
            poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
            if not poll.poll(0):
                return True
            await asyncio.sleep(0)
        return not transport.is_closing() and exchange.status < _REFUSED
