"""Upstreams that speak WebSocket, by a script; callers are aiohttp's client or raw (`tests.kit.callers`)."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

from tests.kit.headrace import Headrace, running, settings_for
from tests.kit.lab import Lab


class Talk:
    """One session as the upstream sees it. `gone` is set when its script is over, however."""

    def __init__(self, request: web.Request, ws: web.WebSocketResponse) -> None:
        self.request = request
        self.ws = ws
        self.gone = asyncio.Event()
        self.close_reason = ""

    async def receive(self) -> Any:
        """The data of the next text or binary message."""
        message = await self.ws.receive()
        assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message
        return message.data

    async def until_closed(self) -> int | None:
        """Reads to the end; the code of the proxy's Close frame, None if there was none."""
        while True:
            message = await self.ws.receive()
            if message.type is aiohttp.WSMsgType.CLOSE:
                self.close_reason = message.extra or ""
                return message.data
            if message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                return None

    def raw(self, data: bytes) -> None:
        """Bytes on the connection, past the WebSocket."""
        assert self.request.transport is not None
        self.request.transport.write(data)

    def vanish(self, *, reset: bool = False) -> None:
        """Ends the connection without a Close frame."""
        transport = self.request.transport
        assert transport is not None
        if reset:
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


Script = Callable[[Talk], Awaitable[None]]
#: An ordinary answer in place of the upgrade, or None.
Answer = Callable[[web.Request], "web.StreamResponse | None"]


class Talking:
    """A WebSocket server; every opening is in `openings`, accepted or not."""

    def __init__(self, script: Script, answer: Answer, fields: Mapping[str, str], options: Any) -> None:
        self.script = script
        self.fields = fields
        self.answer = answer
        self.options = options
        self.url = ""
        self.port = 0
        self.openings: list[web.Request] = []
        self.talks: list[Talk] = []
        self.failures: list[BaseException] = []

    @property
    def calls(self) -> list[Talk]:
        return self.talks

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.openings.append(request)
        if (answer := self.answer(request)) is not None:
            return answer
        ws = web.WebSocketResponse(**{"max_msg_size": 0, "compress": False, **self.options})
        ws.headers.update(self.fields)
        await ws.prepare(request)
        talk = Talk(request, ws)
        self.talks.append(talk)
        try:
            await self.script(talk)
        except Exception as error:
            self.failures.append(error)
        finally:
            talk.gone.set()
        return ws


def _upgrade(_: web.Request) -> None:
    return None


@asynccontextmanager
async def talking(
    script: Script,
    *,
    tls: ssl.SSLContext | None = None,
    answer: Answer = _upgrade,
    fields: Mapping[str, str] = MappingProxyType({}),
    **options: Any,
) -> AsyncIterator[Talking]:
    """Runs the server; `fields` are in its 101, `options` go to its WebSocketResponse. A failure of the
    script fails the test."""
    upstream = Talking(script, answer, fields, options)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", upstream.serve)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    upstream.port = runner.addresses[0][1]
    upstream.url = f"{'https' if tls else 'http'}://{'localhost' if tls else '127.0.0.1'}:{upstream.port}/v1"
    try:
        yield upstream
    finally:
        await runner.cleanup()
    assert not upstream.failures, upstream.failures


@asynccontextmanager
async def sessions(script: Script, *, answer: Answer = _upgrade, **sections: Any) -> AsyncIterator[Lab]:
    """A Headrace whose model `m` may be spoken to, with such an upstream. `upstream` adds to the upstream's
    section; `tls`, `fields` and `options` are of its server; everything else is a top-level section."""
    sections.setdefault("models", {"m": {"upstreams": ["up"], "websocket": True}})
    options = sections.pop("options", {})
    server = {name: sections.pop(name) for name in ("tls", "fields") if name in sections}
    async with (
        talking(script, answer=answer, **server, **options) as upstream,
        running(settings_for(upstream.url, **sections)) as headrace,
    ):
        yield Lab(headrace, upstream)  # type: ignore[arg-type] # it has calls and a url as well


@asynccontextmanager
async def speaking(
    headrace: Headrace, path: str = "/v1/realtime?model=m", **options: Any
) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """A caller's session."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(URL(headrace.url + path, encoded=True), **{"max_msg_size": 0, **options}) as ws,
    ):
        yield ws


def handshake(path: str = "/v1/realtime?model=m", *fields: str, version: str = "1.1") -> bytes:
    """An opening handshake as bytes."""
    lines = [
        f"GET {path} HTTP/{version}",
        "Host: test",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        *fields,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def frame(opcode: int, payload: bytes) -> bytes:
    """A caller's frame of less than 126 bytes, masked with zeros (RFC 6455 section 5.3)."""
    assert len(payload) < 126
    return bytes([0x80 | opcode, 0x80 | len(payload), 0, 0, 0, 0]) + payload
