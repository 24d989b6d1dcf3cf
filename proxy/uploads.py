"""The body of an upload: taken from the caller no faster than the upstream takes it.

Its first 64 KiB are held, because its model is looked for there, and so that a second upstream can be asked
when the first could not even be reached. Everything behind them goes straight through: memory is this window
and the buffers of two sockets, whatever the size.

While the upstream is slow nobody reads from the caller, and neither FIN nor RST of it is seen by the loop
(measured on asyncio and uvloop). So the socket itself is asked, by an epoll set of its own. What even that
cannot see is a FIN that stands behind bytes for which our kernel has no room.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from proxy import form
from proxy.errors import Refused

if TYPE_CHECKING:
    from proxy.context import Context
    from proxy.core import Bodies, Core
    from proxy.form import Field, FormScan


async def open_upload(request: web.Request, ctx: Context, core: Core) -> Upload:
    """Reads the window and finds the form's model. `close` is owed.

    Raises Refused 415, 413, 408, 400; BadRequest for a form that is none or names two models; Overloaded.
    """
    settings = core.config
    types = request.headers.getall("Content-Type", ())
    if len(types) != 1 or not form.is_form(types[0]):
        raise Refused(415, close=False)
    scan = form.FormScan(form.boundary_of(types[0]))
    declared = request.content_length
    if declared is not None and declared > settings.max_upload_bytes:
        raise Refused(413)  # before a byte of it is read
    incoming = _Incoming(request, ctx, settings.max_upload_bytes, settings.timeouts.body)
    window = _Window(core.bodies)
    try:
        while window.room and (piece := await incoming.read(window.room)):
            window.add(piece)
            scan.feed(piece)
        if scan.model is not None:
            incoming.scan = scan  # a second model may still come
        incoming.watch()
    except BaseException:
        window.release()
        raise
    return Upload(incoming, window, len(window.data) if incoming.finished else declared, scan.model)


class Upload:
    """One form. Implements `sender.Source`. length: bytes, None if the caller did not say."""

    __slots__ = ("_data", "_field", "_incoming", "_window", "length", "model")

    def __init__(self, incoming: _Incoming, window: _Window, length: int | None, field: Field | None) -> None:
        self._incoming = incoming
        self._window = window
        self._data = window.data  # its first bytes, as they go upstream
        self._field = field
        self.length = length
        self.model = None if field is None else field.value

    @property
    def replayable(self) -> bool:
        """True until its first byte was given away: after that nobody else is asked (contract section 6)."""
        return not self._incoming.given

    @property
    def waiting(self) -> bool:
        """Is it the caller whom everybody waits for?"""
        return self._incoming.waiting

    def with_model(self, name: str) -> Upload:
        """The same form under another model name; of one without a model, itself."""
        if self._field is None or name == self.model:
            return self
        other = Upload(self._incoming, self._window, self.length, self._field)
        other._data = form.with_model(self._data, self._field, name)
        if other.length is not None:
            other.length += len(other._data) - len(self._data)
        return other

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The window, then the rest as it comes. Once; again only while `replayable`.

        Raises Refused 413, 408, 400, and BadRequest for a second model.
        """
        assert self.replayable
        self._incoming.given = True
        if self._data:
            yield self._data
        while piece := await self._incoming.read():
            yield piece

    async def close(self) -> None:
        """Leaves the caller's body alone, once whoever reads it has been told to stop. Idempotent."""
        self._window.release()
        await self._incoming.close()


class _Window:
    """The bytes that are held, counted among all bodies. Raises Overloaded."""

    __slots__ = ("_bodies", "_counted", "data")

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._counted = 0
        self.data = b""

    @property
    def room(self) -> int:
        return form.WINDOW_BYTES - len(self.data)

    def add(self, piece: bytes) -> None:
        self._bodies.take(len(piece))
        self._counted += len(piece)
        self.data += piece

    def release(self) -> None:
        self._bodies.give_back(self._counted)
        self._counted = 0


class _Incoming:
    """The caller's side: bounded, timed by its progress, watched."""

    __slots__ = (
        "_ctx",
        "_gone",
        "_limit",
        "_reading",
        "_request",
        "_size",
        "_timeout_s",
        "finished",
        "given",
        "scan",
        "waiting",
    )

    def __init__(self, request: web.Request, ctx: Context, limit: int, timeout_s: float) -> None:
        self._request = request
        self._ctx = ctx
        self._limit = limit
        self._timeout_s = timeout_s
        self._size = 0
        self._gone: _Hangup | None = None
        self._reading = (
            asyncio.Lock()
        )  # aiohttp allows one reader; an attempt that was ended may still be one
        self.scan: FormScan | None = None
        self.given = False
        self.waiting = False
        self.finished = request.content.at_eof()
        if not request.content.is_eof() and "Expect" in request.headers and request.transport is not None:
            # aiohttp would say this before anybody has looked at the credential (`intake.no_expectation`).
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def read(self, most: int = -1) -> bytes:
        """The next bytes, b"" at the end."""
        async with self._reading:
            piece = await self._next(most)
        self._size += len(piece)
        self._ctx.bytes_in = self._size
        if self._size > self._limit:
            raise Refused(413)
        if self.scan is not None:
            self.scan.feed(piece)
        if self._request.content.at_eof():
            self.finished = True
            self._unwatch()
        return piece

    async def _next(self, most: int) -> bytes:
        content = self._request.content
        self.waiting = True
        try:
            async with asyncio.timeout(self._timeout_s):
                return await (content.readany() if most < 0 else content.read(most))
        except TimeoutError:
            raise Refused(408) from None
        except (RequestPayloadError, OSError, RuntimeError):
            raise Refused(400) from None  # its framing is broken, or the connection is lost
        finally:
            self.waiting = False

    def watch(self) -> None:
        if self.finished or self._request.transport is None:
            return
        try:
            self._gone = _Hangup(self._request.transport)
        except OSError:
            pass  # no descriptor left for it: the caller is served all the same

    def _unwatch(self) -> None:
        if self._gone is not None:
            self._gone.close()
            self._gone = None

    async def close(self) -> None:
        self._unwatch()
        async with self._reading:
            pass


class _Hangup:
    """Aborts a caller's connection once the caller has left, also while nobody reads from it.

    The loop takes care of the rest: a lost connection cancels its request. EPOLLRDHUP stands for a FIN,
    EPOLLERR and EPOLLHUP, which are always reported, for a reset.
    """

    __slots__ = ("_epoll", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._epoll = select.epoll()
        self._epoll.register(transport.get_extra_info("socket").fileno(), select.EPOLLRDHUP)
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._left)

    def _left(self) -> None:
        self.close()
        self._transport.abort()

    def close(self) -> None:
        if not self._epoll.closed:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
