"""An upstream's whole answer on its way out: head and body as bytes, sent in one write.

What aiohttp does for an answer (two multi-dicts, a signal with three receivers, a writer) took a tenth of a
short request. Only the usual answer goes past it; whatever has rules of its own (another status, HEAD,
HTTP/1.0, a connection that ends, CORS) is a `web.Response` as before, and both carry the same fields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, web
from aiohttp.helpers import rfc822_formatted_time
from multidict import CIMultiDict

from proxy import headers

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter

    from proxy.attempt import WholeAnswer
    from proxy.context import Context


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
        and "Upgrade" not in request.headers
    )


class Ready(web.StreamResponse):
    """A whole answer. own: our own fields on it, as lines.

    replaces: do some of these take the place of the upstream's?
    """

    def __init__(self, ctx: Context, whole: WholeAnswer, own: str, *, replaces: bool) -> None:
        super().__init__(status=whole.status, reason=whole.reason)
        self._ctx = ctx
        self._whole = whole
        self._own = own
        self._replaces = replaces
        self._by_aiohttp: web.Response | None = None
        self._asked: web.BaseRequest | None = None

    @property
    def keep_alive(self) -> bool | None:
        return True if self._by_aiohttp is None else self._by_aiohttp.keep_alive

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Sends it. Raises ConnectionResetError if the caller has closed."""
        message = self._message(request)
        if message is None:
            self._by_aiohttp = self._usual_response()
            return await self._by_aiohttp.prepare(request)
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError
        transport.write(message)
        self._asked = request
        return request.writer

    async def write_eof(self, data: bytes = b"") -> None:
        if self._by_aiohttp is not None:
            await self._by_aiohttp.write_eof(data)
        elif self._asked is not None:
            await self._asked.writer.drain()

    def _message(self, request: web.BaseRequest) -> bytes | None:
        ctx, whole = self._ctx, self._whole
        status, body = whole.status, whole.body
        if status != 200 or whole.reason != "OK" or not body or self._replaces or not is_usual(request, ctx):
            return None
        lines = headers.lines_to_caller(whole.fields, keep_ratelimit=ctx.principal is None)
        if lines is None or b"\r\ncontent-type: " not in lines.lower():
            return None
        own = (
            f"\r\nContent-Length: {len(body)}\r\nDate: {rfc822_formatted_time()}"
            f"{fields_of_all(ctx)}{self._own}\r\n\r\n"
        )
        return b"".join((b"HTTP/1.1 200 OK", lines, own.encode(), body))

    def _usual_response(self) -> web.Response:
        ctx, whole = self._ctx, self._whole
        fields = CIMultiDict(headers.to_caller(whole.fields, keep_ratelimit=ctx.principal is None))
        fields.update(headers.pairs(self._own))
        return web.Response(status=whole.status, reason=whole.reason, body=whole.body, headers=fields)
