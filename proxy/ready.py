"""The head of an upstream's answer as bytes; a whole answer, head and body, is sent in one write.

What aiohttp does for an answer (two multi-dicts, a signal with three receivers, a writer) took a tenth of a
short request. Only the usual answer goes past it; whatever has rules of its own (another status, HEAD,
HTTP/1.0, a connection that ends, CORS) is rendered by aiohttp as before, and both carry the same fields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec
from aiohttp import HttpVersion11, web
from aiohttp.hdrs import UPGRADE
from aiohttp.helpers import rfc822_formatted_time
from multidict import CIMultiDict

from proxy import headers
from proxy.chunked import LAST_CHUNK, framed

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine
    from typing import Any

    from aiohttp.abc import AbstractStreamWriter

    from proxy.attempt import WholeAnswer
    from proxy.context import Context
    from proxy.headers import RawHeaders


class Head(Protocol):
    """What an upstream has said before the body."""

    @property
    def status(self) -> int: ...
    @property
    def reason(self) -> str: ...
    @property
    def fields(self) -> RawHeaders: ...


class Own(msgspec.Struct, frozen=True, gc=False):
    """Fields of ours on one answer.

    lines: each with its line break before it. replaced: names, in lower case, that the upstream may have sent
    as well.
    """

    lines: str
    replaced: frozenset[bytes]


def fields_of_all(ctx: Context) -> str:
    """The fields that every answer of the data listener carries, as lines."""
    chosen = ctx.request_id
    return (
        f"\r\nServer: headrace\r\nx-request-id: {chosen}\r\nrequest-id: {chosen}"
        f"{headers.rate_limit(ctx.allowance)}"
    )


def is_usual(request: web.BaseRequest, ctx: Context) -> bool:
    """May an answer to it be rendered here? Else aiohttp and the receivers of `on_response_prepare` have
    something to add or to leave out."""
    core = ctx.core
    return (
        request.version == HttpVersion11
        and request.method != "HEAD"
        and request.keep_alive
        and not core.draining
        and not core.config.cors.origins
        and UPGRADE not in request.headers
    )


def rendered(
    request: web.BaseRequest, ctx: Context, head: Head, own: Own, body: bytes | None = None
) -> bytes | None:
    """A whole head and the body; no body: one comes in chunks. None: it is not for us to say, see
    `multidict_of`."""
    if head.status != 200 or head.reason != "OK" or not is_usual(request, ctx):
        return None
    lines = headers.lines_to_caller(head.fields, keep_ratelimit=ctx.principal is None, replaced=own.replaced)
    if lines is None or lines.lower().count(b"\r\ncontent-type: ") != 1:
        return None
    framing = "Transfer-Encoding: chunked" if body is None else f"Content-Length: {len(body)}"
    rest = f"\r\n{framing}\r\nDate: {rfc822_formatted_time()}{fields_of_all(ctx)}{own.lines}\r\n\r\n"
    return b"".join((b"HTTP/1.1 200 OK", lines, rest.encode(), body or b""))


def multidict_of(ctx: Context, head: Head, own: Own) -> CIMultiDict[str]:
    """The same fields for aiohttp, which adds the framing; `on_response_prepare` adds those of all answers.

    The upstream's quota is shown only to callers without a plan of their own.
    """
    fields = CIMultiDict(headers.to_caller(head.fields, keep_ratelimit=ctx.principal is None))
    fields.update(headers.pairs(own.lines))
    return fields


class Ready(web.StreamResponse):
    """A whole answer."""

    def __init__(self, ctx: Context, whole: WholeAnswer, own: Own) -> None:
        # Not aiohttp's: what that makes is looked at by nobody, as long as the answer is the usual one.
        self._ctx = ctx
        self._whole = whole
        self._own = own
        self._by_aiohttp: web.Response | None = None

    def __getattr__(self, name: str) -> Any:
        """What aiohttp's constructor sets. Whoever looks at that may change it, so aiohttp sends it then."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._plain(), name)

    def _plain(self) -> web.Response:
        if self._by_aiohttp is None:
            ctx, whole = self._ctx, self._whole
            fields = multidict_of(ctx, whole, self._own)
            self._by_aiohttp = web.Response(
                status=whole.status, reason=whole.reason, body=whole.body, headers=fields
            )
        return self._by_aiohttp

    @property
    def keep_alive(self) -> bool | None:
        return True if self._by_aiohttp is None else self._by_aiohttp.keep_alive

    def sent(self, request: web.BaseRequest) -> bool:
        """Sends it if it is a usual one. Raises ConnectionResetError if the caller has closed."""
        whole = self._whole
        if not whole.body or self._by_aiohttp is not None:
            return False
        answer = rendered(request, self._ctx, whole, self._own, whole.body)
        if answer is None:
            return False
        _open_transport(request).write(answer)
        return True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """For aiohttp. Sends it. Raises ConnectionResetError if the caller has closed."""
        return request.writer if self.sent(request) else await self._plain().prepare(request)

    async def write_eof(self, data: bytes = b"") -> None:
        if self._by_aiohttp is not None:
            await self._by_aiohttp.write_eof(data)


class Begun(web.StreamResponse):
    """An event stream whose head is rendered here; its chunks go past aiohttp's writer, or through it.

    head: what is still to be sent of it, before anything else. Raises ConnectionResetError if the caller has
    closed.
    """

    def __init__(self, request: web.BaseRequest, head: bytes, *, with_first: bool) -> None:
        """with_first: whoever writes the first bytes sends the head with them, in this very turn of the loop
        (a write of its own takes 17 us)."""
        super().__init__()
        self.enable_chunked_encoding()
        self._transport = _open_transport(request)
        self._way_out = writer = request.writer
        self._ended = False
        self.head = head
        writer.enable_chunking()
        writer.output_size += len(head)  # something has been sent: no other answer may follow
        if not with_first:
            self.head = b""
            self._transport.write(head)

    @property
    def keep_alive(self) -> bool | None:
        return True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return self._way_out

    def write(self, data: bytes | bytearray | memoryview) -> Coroutine[Any, Any, None]:
        return self._way_out.write(data)

    def ended(self, rest: bytes) -> bool:
        """Sends what is left and the end. False: the caller is behind; `write_eof` waits for it."""
        if self._transport.is_closing():
            raise ConnectionResetError
        self._ended = True
        self._transport.write((framed(rest) if rest else b"") + LAST_CHUNK)
        return not self._transport.get_write_buffer_size()

    def sent(self, _request: web.BaseRequest) -> bool:
        """Is nothing left to do for aiohttp?"""
        return self._ended

    async def write_eof(self, data: bytes = b"") -> None:
        if not self._ended:
            self.ended(data)
        await self._way_out.drain()


def _open_transport(request: web.BaseRequest) -> asyncio.Transport:
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError
    return transport
