"""One caller's connection: aiohttp's, with what it lacks.

- what its parser refuses gets our JSON, an id, a log line and a count (its own answer quotes the input,
  and its log the whole header line);
- a total deadline for a request's head;
- requests are answered in its own task;
- TCP_USER_TIMEOUT, so that a caller that vanished without a FIN is noticed in 30 s, not in two hours;
- TCP_NOTSENT_LOWAT, so that a slow reader is noticed before the kernel has taken megabytes for it.

Private names of aiohttp's connection are in this file; `self_check` tells whether they are there.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any, cast

from aiohttp import HttpVersion10, HttpVersion11, http_exceptions, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.web_protocol import _PAYLOAD_ACCESS_ERROR, ERROR, RequestHandler, _ErrInfo

from proxy import headers
from proxy.errors import Dialect, HeadraceError, Overloaded, Refused
from proxy.ready import Begun, Ready

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from proxy.downstream import Listener

    Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

#: Linux also ends a connection whose reader is merely slow (a closed window) after this, so it is never less
#: than `timeouts.write` and some slack.
_USER_TIMEOUT_S = 30.0
_USER_TIMEOUT_SLACK_S = 5.0
#: What the kernel may hold for a reader beyond what is on its way (tcp(7)): without this it is up to 4 MB
#: (tcp_wmem), and 200 slow readers were given 840 MB before the first was noticed. Measured: 260 MB.
_UNSENT_BYTES = 2**17
_VERSIONS = (HttpVersion11, HttpVersion10)
#: aiohttp calls what it cannot parse HTTP/1.0, and would answer in kind.
_UNPARSED = ERROR._replace(version=HttpVersion11)
#: Private names of aiohttp's connection that are used below.
_SLOTS = frozenset(
    {
        "_messages",
        "_waiter",
        "_current_request",
        "_request_in_progress",
        "_handler_waiter",
        "_paused",
        "_request_handler",
        "_task_handler",
        "_keepalive",
        "_keepalive_handle",
        "_keepalive_timeout",
        "_next_keepalive_close_time",
        "_lingering_time",
        "_close",
        "_force_close",
        "_msg_queue_resume_size",
        "_parser",
        "_reading_paused",
        "_buffer_paused",
    }
)
#: `super()` is an object more with every read.
_parse = RequestHandler.data_received
_METHODS = (
    "connection_made",
    "data_received",
    "resume_reading",
    "start",
    "handle_error",
    "force_close",
    "_handle_request",
    "_make_error_handler",
    "_drain_helper",
    "_process_keepalive",
    "_resume_reading_if_drained",
)


class Connection(RequestHandler):
    """One caller's connection."""

    __slots__ = ("_counted", "_head_timer", "_listener", "_received", "address", "fresh")

    def __init__(self, listener: Listener, **kwargs: Any) -> None:
        super().__init__(listener, **kwargs)
        self._listener = listener
        self._counted = False
        self._received = False
        self.address: str | None = None  # as `request.remote` has it
        self.fresh = True  # no request has come yet
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        listener = self._listener
        transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        if not listener.make_room():
            error = Overloaded()
            listener.refused(error, headers.request_id(None), _peer(transport))
            transport.write(_raw(error))
            transport.close()
            return
        listener.open += 1
        listener.idle[self] = None
        self._counted = True
        super().connection_made(transport)
        name = self.peername
        self.address = None if name is None else str(name[0] if isinstance(name, tuple) else name)
        _tune(transport, listener.limits.write_s)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        if not self._counted:
            return
        _parse(self, data)
        if self._messages or self._current_request is not None:
            self._listener.idle.pop(self, None)
            self.fresh = False
            if self._received or self._head_timer is not None:
                self._head_done()
        elif self._head_timer is None and self._waiter is not None and not self._waiter.done():
            self._received = True
            self._expect_head()
        else:
            self._received = True

    def resume_reading(self, resume_parser: bool = True) -> None:
        """aiohttp asks for this once a body has been read, and parses nothing again: 4 % of a short request's
        bytecodes. Whatever waits to be parsed has paused something."""
        if self._reading_paused or self._buffer_paused:
            super().resume_reading(resume_parser)

    async def start(self) -> None:
        """Answers this connection's requests, one after another, in its own task.

        aiohttp makes a task for each request, so that each has context variables of its own. Nothing here has
        any, and starting a task and waking up from its end took two more turns of the event loop: 3 % to 8 %
        of a short request's CPU, most of it the kernel's. What cancels a request cancels the connection, as
        it did: the one waited for the other, and ended with it.
        """
        while not self._force_close:
            message, payload = await self._next()
            if not await self._answered(message, payload) or not self._keepalive or self._close:
                break
            if not self._force_close:
                self._expect_next()
        if not self._force_close:
            self._task_handler = None
            if self.transport is not None:
                self.transport.close()

    async def _next(self) -> tuple[Any, Any]:
        if not self._messages:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        message = self._messages.popleft()
        if self._parser is not None:
            self._parser.message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()
        return message

    async def _answered(self, message: Any, payload: Any) -> bool:
        """False: the caller has left. What goes wrong here ends the connection."""
        request, handler = self._asked(message, payload)
        self._request_in_progress = True  # a shutdown waits for it
        self._current_request = request
        try:
            try:
                response = await handler(request)
            except Exception as error:
                await self._by_aiohttp(request, error)
            else:
                self._current_request = None
                # The usual answer: aiohttp's way took 2 % of a short request, and adds nothing to it.
                if isinstance(response, (Ready, Begun)) and response.sent(request):
                    self._keepalive = True
                    if self._paused:
                        await self._drain_helper()
                else:
                    await self._by_aiohttp(request, response)
            if self.transport is not None and not self._messages:
                self._listener.idle[self] = None
            if not payload.at_eof():
                await self._forbid(payload)
        except ConnectionError:
            return False
        except Exception as error:
            self.log_exception("Unhandled exception", exc_info=error)
            self.force_close()
        except BaseException:
            self.force_close()
            raise
        finally:
            self._over(request)
        return True

    def _asked(self, message: Any, payload: Any) -> tuple[web.BaseRequest, Handler]:
        handler, listener = self._request_handler, self._listener
        assert handler is not None
        listener.requests_count += 1
        if not isinstance(message, _ErrInfo) and message.version not in _VERSIONS:
            # llhttp lets HTTP/0.9 and HTTP/2.0 pass, and aiohttp would answer in kind (measured).
            message = _ErrInfo(status=505, exc=_UnknownVersion(), message="")
        if isinstance(message, _ErrInfo):
            request = listener.factory(_UNPARSED, payload, self)
            request._match_info = None  # its answer is nobody's but `handle_error`'s
            return request, self._make_error_handler(message)
        if message.chunked and not message.should_close:
            # A chunked request is its connection's last: aiohttp 3.14.5 takes the last trailer for the first
            # field of the next request (measured), which behind a proxy may be another caller's.
            message = message._replace(should_close=True)
        return listener.factory(message, payload, self), handler

    def _over(self, request: web.BaseRequest) -> None:
        self._current_request = None
        self._request_in_progress = False
        if self._handler_waiter is not None and not self._handler_waiter.done():
            self._handler_waiter.set_result(None)
        request._task = None  # type: ignore[assignment] # it breaks a cycle, as aiohttp does

    async def _by_aiohttp(self, request: web.BaseRequest, outcome: web.StreamResponse | Exception) -> None:
        """Sends what a handler has answered or raised. Raises ConnectionError: the caller has left."""

        async def handler(_: web.BaseRequest) -> web.StreamResponse:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        response, reset = await self._handle_request(request, None, handler)
        if reset:
            raise ConnectionResetError
        self._keepalive = bool(response.keep_alive)

    async def _forbid(self, payload: Any) -> None:
        """What nobody has read of a body is read by nobody."""
        if not payload.is_eof():
            await self._linger(payload)
        payload.set_exception(_PAYLOAD_ACCESS_ERROR)

    async def _linger(self, payload: Any) -> None:
        """Reads what a refused caller still sends, for a while: a reset would destroy our answer."""
        if not self._force_close:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._lingering_time):
                    while not payload.is_eof():
                        await payload.readany()
        if not payload.is_eof() and not self._force_close:
            self.close()

    def _expect_next(self) -> None:
        now = self._loop.time()
        self._next_keepalive_close_time = closes_at = now + self._keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(closes_at, self._process_keepalive)

    def eof_received(self) -> None:
        """A caller that has sent FIN has left. With bytes it does not take, a close would wait for it."""
        super().eof_received()
        if self._current_request is not None and self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        if not self._counted:
            return
        self._counted = False
        self._listener.open -= 1
        self._listener.idle.pop(self, None)
        self._head_done()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The parser's refusals, and what went wrong outside the chain. Nothing of `message` is shown:
        it quotes the request."""
        if request.writer.output_size > 0 or isinstance(exc, ConnectionError):
            raise ConnectionError("an answer was under way, or its caller has left")
        error = HeadraceError() if status == 500 else Refused(_status_of(exc))
        chosen = headers.request_id(None)
        self._listener.refused(error, chosen, request.remote or "")
        response = web.Response(
            status=error.status,
            body=error.body(Dialect.OPENAI, chosen),
            content_type="application/json",
            headers={"x-request-id": chosen, "request-id": chosen, "Server": "headrace"},
        )
        response.force_close()
        return response

    def _expect_head(self) -> None:
        self._head_timer = self._loop.call_later(self._listener.limits.header_s, self._head_late)

    def _head_done(self) -> None:
        self._received = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        transport = self.transport
        if transport is None:
            return
        if self._received:
            error = Refused(408)
            self._listener.refused(error, headers.request_id(None), _peer(transport))
            transport.write(_raw(error))
        self.force_close()


class _UnknownVersion(Exception):
    """A request line with a version that we do not speak."""


def _status_of(exc: BaseException | None) -> int:
    """aiohttp answers 400 for everything; what HTTP has own codes for is told apart here."""
    if isinstance(exc, _UnknownVersion):
        return 505
    if isinstance(exc, http_exceptions.LineTooLong):
        # It quotes what was too long: the target of a request line begins with a slash, no field name does.
        return 414 if "b'/" in str(exc) or "b'http" in str(exc) else 431
    return 431 if "Too many headers" in str(exc) else 400


def _peer(transport: asyncio.BaseTransport) -> str:
    name = transport.get_extra_info("peername")
    return str(name[0]) if isinstance(name, tuple) else ""


def _raw(error: HeadraceError) -> bytes:
    """A whole answer as bytes, for connections that never get as far as a request object."""
    chosen = headers.request_id(None)
    body = error.body(Dialect.OPENAI, chosen)
    extra = "".join(f"{name}: {value}\r\n" for name, value in error.headers.items())
    head = (
        f"HTTP/1.1 {error.status} {error.code}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\nServer: headrace\r\n"
        f"x-request-id: {chosen}\r\nrequest-id: {chosen}\r\n{extra}\r\n"
    )
    return head.encode() + body


def _tune(transport: asyncio.BaseTransport, write_s: float) -> None:
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        limit_s = max(_USER_TIMEOUT_S, write_s + _USER_TIMEOUT_SLACK_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limit_s * 1000))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)


def self_check() -> bool:
    """Are the private names still there?"""
    slots = {*RequestHandler.__slots__, *BaseProtocol.__slots__}
    return slots >= _SLOTS and all(hasattr(RequestHandler, name) for name in _METHODS)
