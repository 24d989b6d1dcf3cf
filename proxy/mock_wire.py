"""One answer of the mock on the wire, and every way in which it can go wrong there."""

from __future__ import annotations

import asyncio
import fcntl
import functools
import socket
import struct
import termios
from collections.abc import Callable, Iterable, Iterator

import msgspec
from aiohttp import hdrs, web

from proxy.mock_ask import NO_BODY, Ask, read_body
from proxy.mock_behaviour import Behaviour, Fault
from proxy.mock_chat import FAILURE
from proxy.mock_dialects import Dialect, anthropic_error
from proxy.mock_providers import PROVIDERS

HALF_PAUSE = 0.001  # between the two halves of an event
FLUSH = 1.0  # at most, before a reset
REDIRECT = "http://127.0.0.1:9/"
GARBAGE = b"SSH-2.0-OpenSSH\r\n"
UPGRADE = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
RST = struct.pack("ii", 1, 0)  # SO_LINGER on, zero seconds: closing resets

_encode = msgspec.json.Encoder().encode


class _CloseDelimited(web.StreamResponse):
    """A body that ends with its connection: what aiohttp itself does before a WebSocket's frames."""

    _length_check = False


def _broken(event: bytes) -> bytes:
    """The event, or the whole body, with half of its JSON."""
    head, mark, data = event.rpartition(b"data: ")
    half = head + mark + data[: len(data) // 2].rstrip(b"\n")
    return half + b"\n\n" if mark else half


def _dressed(events: Iterable[bytes], behaviour: Behaviour) -> Iterator[bytes]:
    for number, event in enumerate(events, 1):
        dressed = _broken(event) if number == behaviour.bad_json else event
        yield dressed.replace(b"\n", b"\r\n") if behaviour.crlf else dressed


class Exchange:
    """One request and the wire that its answer goes out on."""

    __slots__ = ("behaviour", "dialect", "headers", "id", "provider", "request")

    def __init__(self, request: web.Request, dialect: Dialect, behaviour: Behaviour, rid: str) -> None:
        self.request = request
        self.dialect = dialect
        self.behaviour = behaviour
        self.id = rid
        self.provider = PROVIDERS[behaviour.provider]
        self.headers = {"x-request-id": rid, hdrs.SERVER: "mock", **self.provider.headers}
        if dialect.anthropic:
            self.headers["request-id"] = rid
        if behaviour.big_header:
            self.headers["x-mock-big"] = "x" * behaviour.big_header

    async def answer(self, body: bytes) -> web.StreamResponse:
        """What the behaviour says, in the order in which a real server would go wrong."""
        behaviour = self.behaviour
        if behaviour.hang:
            await self._silence()
        if behaviour.ttfb:
            await asyncio.sleep(behaviour.ttfb)
        if behaviour.garbage or behaviour.upgrade or -1 in (behaviour.cut_after, behaviour.rst_after):
            return await self._no_http()
        if behaviour.redirect:
            self.headers[hdrs.LOCATION] = REDIRECT
            return await self.whole(302, b"{}")
        if behaviour.status != 200:
            if behaviour.retry_after is not None:
                self.headers[hdrs.RETRY_AFTER] = f"{behaviour.retry_after:.15g}"
            return await self.error(behaviour.status, f"status {behaviour.status} was asked for")
        if behaviour.error_body:
            return await self.whole(200, self._error(500, FAILURE))
        return await self._good_answer(body)

    async def _good_answer(self, body: bytes) -> web.StreamResponse:
        try:
            asked = read_body(body) if self.request.method == "POST" else NO_BODY
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return await self.error(400, f"the body is not a request: {error}")
        if (refusal := self._refusal(body)) is not None:
            return await self.error(*refusal)
        ask = Ask(self.id, asked, self.behaviour)
        if asked.stream and self.dialect.events is not None and not self.behaviour.plain_json:
            return await self._stream(self.dialect.events(ask), functools.partial(self.dialect.failure, ask))
        return await self.whole(200, _encode(self.dialect.json(ask)))

    def _refusal(self, body: bytes) -> tuple[int, str] | None:
        """What this provider does not take, and others do."""
        provider, request = self.provider, self.request
        if provider.needs_header and provider.needs_header not in request.headers:
            return 401, f"Access denied: no {provider.needs_header}"
        if provider.needs_query and provider.needs_query not in request.query:
            return 404, "Resource not found"
        if provider.refuses and body:
            for name in provider.refuses & msgspec.json.decode(body).keys():
                return 400, f'Invalid JSON payload received. Unknown name "{name}": Cannot find field.'
        return None

    def _error(self, status: int, message: str) -> bytes:
        if self.dialect.anthropic:
            return anthropic_error(status, message)
        return self.provider.error(status, message)

    async def error(self, status: int, message: str) -> web.StreamResponse:
        return await self.whole(status, self._error(status, message))

    async def whole(self, status: int, body: bytes) -> web.StreamResponse:
        """An answer of one piece."""
        if self.behaviour.bad_json == 1:
            body = _broken(body)
        self.headers[hdrs.CONTENT_TYPE] = self.provider.json_type
        if status == 200 and self.provider.blank and self._waits():
            response = self._open(status)
            await response.prepare(self.request)
            await self._wait(response, self.provider.blank)
            return await self._send(response, (body,), None)
        if self.behaviour.plain_body():
            whole = web.Response(status=status, headers=self.headers, body=body)
            await whole.prepare(self.request)
            await whole.write_eof()
            return whole
        response = self._open(status)
        if not self.behaviour.close_delimited:
            response.content_length = len(body)
        await response.prepare(self.request)
        return await self._send(response, (body,), None)

    def _waits(self) -> int:
        """How many signs of life come before the answer."""
        given = self.behaviour.keepalive_comments
        return self.provider.waits if given is None else given

    async def _wait(self, response: web.StreamResponse, sign: bytes) -> None:
        for _ in range(self._waits()):
            await self._write(response, self._line_ends(sign))
            await asyncio.sleep(self.behaviour.gap)

    async def _stream(self, events: Iterator[bytes], failure: Callable[[int], bytes]) -> web.StreamResponse:
        behaviour = self.behaviour
        self.headers[hdrs.CONTENT_TYPE] = self.provider.stream_type
        self.headers[hdrs.CACHE_CONTROL] = "no-cache"
        response = self._open(200)
        await response.prepare(self.request)
        await self._wait(response, self.provider.comment)
        if behaviour.crlf or behaviour.bad_json:
            events = _dressed(events, behaviour)
        return await self._send(response, events, failure)

    def _open(self, status: int) -> web.StreamResponse:
        if not self.behaviour.close_delimited:
            return web.StreamResponse(status=status, headers=self.headers)
        response = _CloseDelimited(status=status, headers=self.headers)
        response.force_close()
        return response

    async def _send(
        self,
        response: web.StreamResponse,
        events: Iterable[bytes],
        failure: Callable[[int], bytes] | None,
    ) -> web.StreamResponse:
        """The events, up to the point where the body is to go wrong."""
        gap = self.behaviour.gap
        stop, fault = self.behaviour.first_fault(failure is not None) or (-1, None)
        number = 0
        event = b""
        for event in events:
            if number == stop:
                break
            if number:
                await asyncio.sleep(gap)  # 0 too: it lets the loop flush, so that events are not merged
            await self._write(response, event)
            number += 1
        else:
            event = b""
        if fault is None or number != stop:
            await asyncio.sleep(self.behaviour.linger)
        elif not await self._go_wrong(response, fault, event):
            return response
        elif failure is not None:
            await self._write(response, self._line_ends(failure(number)))
        await response.write_eof()
        return response

    def _line_ends(self, event: bytes) -> bytes:
        return event.replace(b"\n", b"\r\n") if self.behaviour.crlf else event

    async def _go_wrong(self, response: web.StreamResponse, fault: Fault, event: bytes) -> bool:
        """Fail; true if the body is to end properly all the same."""
        if fault == "error":
            return True
        if fault == "stall":
            await self._silence()
        if self.behaviour.cut_mid_event and event:
            await response.write(event[: len(event) // 2])
        await self._drop(reset=fault == "rst")
        return False

    async def _write(self, response: web.StreamResponse, event: bytes) -> None:
        behaviour = self.behaviour
        if behaviour.one_byte:
            for at in range(len(event)):
                await response.write(event[at : at + 1])
                await asyncio.sleep(0)
        elif behaviour.half_events:
            half = len(event) // 2
            await response.write(event[:half])
            await asyncio.sleep(HALF_PAUSE)
            await response.write(event[half:])
        else:
            await response.write(event)

    async def _no_http(self) -> web.StreamResponse:
        """Bytes that are not an answer, or none at all."""
        transport = self._transport()
        if self.behaviour.upgrade:
            transport.write(UPGRADE)
            await self._silence()
        if self.behaviour.garbage:
            transport.write(GARBAGE)
        await self._drop(reset=self.behaviour.rst_after == -1)
        return web.Response()  # aiohttp wants one; the connection that would carry it is closed

    async def _silence(self) -> None:
        """Until the caller leaves: the runner cancels the handler then."""
        await asyncio.get_running_loop().create_future()

    async def _drop(self, reset: bool) -> None:
        """End the connection; nothing may be awaited after it, the handler would be taken for aborted."""
        transport = self._transport()
        if not reset:
            transport.close()
            return
        sock = transport.get_extra_info("socket")
        try:
            async with asyncio.timeout(FLUSH):
                await self._flush(transport, sock.fileno())
        except TimeoutError:
            pass  # a caller that does not read gets its reset all the same
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
        transport.abort()

    async def _flush(self, transport: asyncio.WriteTransport, fd: int) -> None:
        """Until the other side's kernel has it all: a reset throws away what is still queued on this one."""
        transport.set_write_buffer_limits(high=0)
        await self.request.writer.drain()
        while struct.unpack("i", fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)))[0]:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.001)

    def _transport(self) -> asyncio.WriteTransport:
        transport = self.request.transport
        if transport is None:
            raise ConnectionResetError("the caller left")
        return transport
