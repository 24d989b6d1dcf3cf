"""One exchange through aiohttp's public client: slower than `wire`, and independent of aiohttp's inside."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator
from time import monotonic
from typing import TYPE_CHECKING, ClassVar

import aiohttp
from yarl import URL

from proxy.errors import (
    HeadraceError,
    UpstreamConnectFailed,
    UpstreamFailed,
    UpstreamInvalid,
    UpstreamUnreachable,
)
from proxy.headers import RawHeaders, value_of
from proxy.sender import Source, framing
from proxy.tasks import spawn
from proxy.wire_connection import End

if TYPE_CHECKING:
    from proxy.pipe import Taker


class SessionExchange:
    """See `upstream.Exchange`."""

    pushes: ClassVar[bool] = False

    def __init__(
        self, session: aiohttp.ClientSession, method: str, url: URL, lines: bytes, body: bytes | Source
    ) -> None:
        self._session = session
        self._method = method
        self._url = url
        self._lines = lines
        self._body = body
        self._opening: asyncio.Task[None] | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._held = b""
        self._end: End | None = None
        self._fault: Exception | None = None
        self._reset = False
        self.reused = False
        self.fresh = False
        self.answered = False
        self.last_at = self._took_at = monotonic()
        self._sending = False  # an upload that is not complete
        self.status = 0
        self.reason = ""
        self.fields: RawHeaders = ()
        self._framed = False

    def send_now(self) -> bool:
        """Starts the request; aiohttp gives no sign between "sent" and "answered"."""
        self._took_at = monotonic()
        self._opening = spawn(self._try_open(), "upstream request")
        return True

    async def send(self) -> None:
        self.send_now()

    @property
    def asked_at(self) -> float:
        if not isinstance(self._body, bytes) and self._body.waiting:
            return monotonic()  # nobody but the caller holds it up
        return self._took_at

    async def _try_open(self) -> None:
        try:
            await self._open()
        except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
            self._fault = self._fault or error  # what made the body end is the reason

    async def _pieces(self, source: Source) -> AsyncGenerator[bytes, None]:
        """An upload, no faster than aiohttp's writer takes it."""
        self._sending = True
        pieces = source.pieces()
        try:
            async for piece in pieces:
                yield piece
                self._took_at = monotonic()
        except HeadraceError as error:
            self._fault = error
            raise
        finally:
            await pieces.aclose()
        self._sending = False

    async def _open(self) -> None:
        body = self._body
        lines = self._lines.replace(framing(None), b"")  # aiohttp writes this one itself
        headers = [
            (name.decode(), value.decode("utf-8", "surrogateescape"))
            for name, _, value in (line.partition(b": ") for line in lines.split(b"\r\n") if line)
        ]
        self._response = response = await self._session.request(
            self._method,
            self._url,
            headers=headers,
            data=_payload(body) if isinstance(body, bytes) else self._pieces(body),
            allow_redirects=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )
        self.answered = True
        self.status = response.status
        self.reason = response.reason or ""
        self.fields = response.raw_headers
        if response.connection is not None and response.connection.protocol is not None:
            closed = response.connection.protocol.closed
            if closed is not None:
                closed.add_done_callback(self._lost)
        chunked = (value_of(self.fields, b"transfer-encoding") or b"").lower() == b"chunked"
        self._framed = chunked or value_of(self.fields, b"content-length") is not None

    def _lost(self, closed: asyncio.Future[None]) -> None:
        """aiohttp takes a reset for the end of a body without framing, and leaves a reader waiting for ever
        when a chunk's framing is broken: what the connection itself reports is the truth."""
        self._reset = not closed.cancelled() and closed.exception() is not None
        assert self._response is not None
        content = self._response.content
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("connection lost"))

    async def hold(self, size: int, until: float) -> bool:
        assert self._opening is not None
        try:
            async with asyncio.timeout_at(until):
                await asyncio.shield(self._opening)
                while self._fault is None and self._end is None and len(self._held) < size:
                    self._held += await self._read()
        except TimeoutError:
            return False
        if isinstance(self._fault, HeadraceError):
            raise self._fault
        if self._fault is not None:
            raise translate(self._fault) from None  # its text may hold an outbound proxy's password
        if self._end is End.CUT and not self._held:
            raise UpstreamInvalid
        return True

    def here(self, size: int) -> bool:
        return self._fault is None and len(self._held) >= size

    async def arrival(self, size: int, until: float) -> None:
        await self.hold(size, until)

    async def _read(self) -> bytes:
        """The next bytes, or b"" with `_end` set; a cancelled call loses nothing (readany keeps its data)."""
        assert self._response is not None
        try:
            data = await self._response.content.readany()
        except (aiohttp.ClientError, OSError):
            self._end = End.CUT
            return b""
        self.last_at = monotonic()
        if not data:
            unframed = End.CUT if self._reset else End.CLOSED
            self._end = End.FRAMED if self._framed else unframed
        return data

    def look(self) -> tuple[bytes, End | None]:
        return self._held, self._end

    def taken(self) -> tuple[bytes, End | None]:
        held, self._held = self._held, b""
        return held, self._end

    async def pump(self, sink: Taker) -> None:
        data, end = self.taken()
        while True:
            if data:
                await sink.deliver(data)
            if end is not None:
                sink.end(end)
            if sink.finished:
                return
            try:
                async with asyncio.timeout_at(sink.next_at()):
                    data = await self._read()
            except TimeoutError:
                data = b""
                await sink.tick_deliver()
            end = self._end

    def pause(self) -> None:
        pass  # awaiting `deliver` is the pause: nobody reads meanwhile

    def resume(self) -> None:
        pass

    def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
        if self._response is not None:
            if self._end is End.FRAMED and not self._sending:
                self._response.release()
            else:
                self._response.close()


#: No connection, or no tunnel through the outbound proxy: the upstream has seen nothing.
_BEFORE_SENDING = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientHttpProxyError,
    TimeoutError,
    KeyError,  # aiohttp 3.14.5: its address was forgotten while it waited for another's question to DNS
)


def _payload(body: bytes) -> bytes | io.BytesIO | None:
    """aiohttp warns of large bytes: it writes them in one go. A file is written in pieces."""
    return io.BytesIO(body) if len(body) > 2**20 else body or None


def translate(error: BaseException) -> UpstreamFailed:
    """aiohttp's client errors in our terms: was anything sent, and was the answer HTTP at all?"""
    if isinstance(error, UpstreamFailed):
        return error
    if isinstance(error, _BEFORE_SENDING):
        return UpstreamConnectFailed()
    if isinstance(error, aiohttp.ClientResponseError):
        return UpstreamInvalid()
    if isinstance(error, (aiohttp.ClientError, OSError)):
        return UpstreamUnreachable()
    return UpstreamInvalid()
