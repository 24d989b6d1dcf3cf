"""Uploads: forms as bytes, upstreams that read a body as slowly as they like, and a listener that passes
uploads to one upstream without anything in between."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic
from typing import Any

import yaml
from aiohttp import web

from proxy import config, log
from proxy.context import Context
from proxy.core import Core
from proxy.endpoints import match
from proxy.errors import HeadraceError, UpstreamFailed, UpstreamTimeout
from proxy.intake import no_expectation
from proxy.metrics import Metrics
from proxy.session import translate
from proxy.uploads import Upload, open_upload
from proxy.upstream import Upstream
from tests.kit.headrace import ListSink, settings_for
from tests.kit.upstreams import Call

BOUNDARY = "headrace-test"
_END = f"--{BOUNDARY}--\r\n".encode()


def part(name: str, value: bytes, more: str = "") -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + value + b"\r\n"


def form(size: int, *, model: str | None = "m", last: bool = False) -> bytes:
    """A form whose file is `size` bytes; the model before or behind it."""
    pattern = bytes(range(256)) * (size // 256 + 1)
    parts = [part("file", pattern[:size], '; filename="a.bin"')]
    if model is not None:
        parts.insert(1 if last else 0, part("model", model.encode()))
    return b"".join(parts) + _END


def head(
    length: int | None, *headers: str, path: str = "/v1/files", content_type: str | None = None
) -> bytes:
    """The head of an upload; without a length it is chunked."""
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    kind = content_type or f"multipart/form-data; boundary={BOUNDARY}"
    lines = [f"POST {path} HTTP/1.1", "Host: test", f"Content-Type: {kind}", framing, *headers, "", ""]
    return "\r\n".join(lines).encode()


def chunked(body: bytes, size: int = 50_000) -> bytes:
    """The same bytes in HTTP's chunks."""
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


class Receipt(Call):
    """A request whose body the script reads, piece by piece or not at all."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer)
        self.fields: dict[str, str] = {}
        self.received = 0
        self.left: int | None = 0  # None: chunked
        self.whole = False

    async def read(self) -> None:
        self.head = await self.reader.readuntil(b"\r\n\r\n")
        for line in self.head.decode().split("\r\n")[1:]:
            name, _, value = line.partition(":")
            self.fields[name.lower()] = value.strip()
        if "content-length" in self.fields:
            self.left = int(self.fields["content-length"])
        elif "transfer-encoding" in self.fields:
            assert self.fields["transfer-encoding"] == "chunked"
            self.left = None

    async def piece(self) -> bytes:
        """The next bytes, b"" at the end. Raises IncompleteReadError when it was cut off."""
        if self.left is None:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        else:
            data = await self.reader.read(min(self.left, 2**18))
            if self.left and not data:
                raise asyncio.IncompleteReadError(b"", self.left)
            self.left -= len(data)
        self.received += len(data)
        self.whole = not data
        return data

    async def all(self) -> bytes:
        """The whole body."""
        pieces = []
        while data := await self.piece():
            pieces.append(data)
        self.body = b"".join(pieces)
        return self.body


Script = Callable[[Receipt], Awaitable[None]]


class Receiver:
    """A server that hands every request to the script as soon as its head is there."""

    def __init__(self) -> None:
        self.calls: list[Receipt] = []
        self.connections = 0
        self.failures: list[BaseException] = []
        self.url = ""

    async def serve(self, script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while not writer.is_closing():
                call = Receipt(reader, writer)
                await call.read()
                self.calls.append(call)
                try:
                    await script(call)
                except (asyncio.IncompleteReadError, ConnectionError):
                    call.gone.set()
                    raise
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception as error:
            self.failures.append(error)
        finally:
            writer.close()


@asynccontextmanager
async def receiving(script: Script, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """Runs the script's server; a failure inside the script fails the test."""
    receiver = Receiver()
    tasks: set[asyncio.Task[None]] = set()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(receiver.serve(script, reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=tls)
    place = "https://localhost" if tls else "http://127.0.0.1"
    receiver.url = f"{place}:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield receiver
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert not receiver.failures, receiver.failures


class Door:
    """Takes uploads and asks the upstreams in turn, until one can be reached."""

    def __init__(self, core: Core, upstreams: list[Upstream], model: str | None) -> None:
        self.core = core
        self.upstreams = upstreams
        self.port = 0
        self.model = model  # that the upstreams want to hear
        self.uploads: list[Upload] = []
        self.contexts: list[Context] = []
        self.running = 0
        self.cancelled = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        ctx = Context("r", match("POST", request.path), request.path, monotonic())
        self.contexts.append(ctx)
        self.running += 1
        try:
            return await self._pass_on(request, ctx)
        except HeadraceError as error:
            return web.Response(status=error.status, text=error.code)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _pass_on(self, request: web.Request, ctx: Context) -> web.StreamResponse:
        upload = await open_upload(request, ctx, self.core)
        self.uploads.append(upload)
        try:
            for upstream in self.upstreams[:-1]:
                try:
                    return await self._ask(request, upstream, upload)
                except UpstreamFailed:
                    if not upload.replayable:
                        raise
            return await self._ask(request, self.upstreams[-1], upload)
        finally:
            await upload.close()
            await self._linger(request)

    async def _linger(self, request: web.Request) -> None:
        """As aiohttp does after an answer to half a request: somebody who still reads would be in its way."""
        try:
            async with asyncio.timeout(0):
                await request.content.readany()
        except (TimeoutError, OSError):
            pass

    async def _ask(self, request: web.Request, upstream: Upstream, upload: Upload) -> web.StreamResponse:
        body = upload if self.model is None else upload.with_model(self.model)
        fields = b"Content-Type: %b\r\n" % request.headers["Content-Type"].encode()
        exchange = upstream.exchange("POST", "/files", fields, body)
        try:
            try:
                await exchange.send()
            except Exception as error:
                raise translate(error) from error
            limit_s = upstream.timeouts.first_byte
            while not await exchange.hold(1, exchange.asked_at + limit_s):
                if monotonic() >= exchange.asked_at + limit_s:
                    raise UpstreamTimeout
            data, end = exchange.taken()
            while end is None:
                exchange.resume()
                assert await exchange.hold(1, monotonic() + 10)
                piece, end = exchange.taken()
                data += piece
            return web.Response(status=exchange.status, body=data)
        finally:
            exchange.close()

    async def close(self) -> None:
        for upstream in self.upstreams:
            await upstream.close()


@asynccontextmanager
async def door(
    *urls: str,
    push: bool,
    model: str | None = None,
    upstream: dict[str, Any] | None = None,
    tls: ssl.SSLContext | None = None,
    **sections: Any,
) -> AsyncIterator[Door]:
    """A listener in front of these upstreams."""
    document = settings_for(urls[0], upstream=upstream or {}, **sections)
    settings = config.parse(yaml.safe_dump(document), "test.yaml", {})
    sink = ListSink()
    core = Core(settings, {}, Metrics("0"), log.RequestLog(sink, text=False, enabled=False), 0.0)
    upstreams = [Upstream("up", settings.upstreams["up"], url, push=push) for url in urls]
    it = Door(core, upstreams, model)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", it.handle, expect_handler=no_expectation)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        auto_decompress=False,
        lingering_time=1.0,
        shutdown_timeout=1.0,
    )
    async with AsyncExitStack() as stack:
        stack.callback(sink.close)
        stack.push_async_callback(it.close)
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        it.port = runner.addresses[0][1]
        yield it
