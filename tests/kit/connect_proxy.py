"""An outbound HTTP proxy: tunnels (RFC 9110 9.3.6), and requests in absolute form (RFC 9112 3.2.2)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit


class ConnectProxy:
    """`heads` are the heads that it was sent, without what went through a tunnel.

    refusal: the status line's rest with which every request is refused. `hang`: it never answers. `closes`:
    it closes instead.
    """

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.refusal = b""
        self.hang = False
        self.closes = False
        self.port = 0
        self.tunnels = 0
        self.gone = asyncio.Event()

    def url(self, user: str = "") -> str:
        return f"http://{user + '@' if user else ''}127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            if self.hang:
                await reader.read()
            elif self.closes:
                pass
            elif self.refusal:
                writer.write(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % self.refusal)
                await writer.drain()
            else:
                await self._pass_on(head, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            self.gone.set()

    async def _pass_on(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, target, _ = head.split(b" ", 2)
        there = urlsplit(target.decode() if method != b"CONNECT" else f"//{target.decode()}")
        up_reader, up_writer = await asyncio.open_connection(there.hostname, there.port)
        if method == b"CONNECT":
            self.tunnels += 1
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            up_writer.write(_in_origin_form(head))
        await asyncio.gather(_copy(reader, up_writer, self.heads), _copy(up_reader, writer, None))


def _in_origin_form(head: bytes) -> bytes:
    method, target, rest = head.split(b" ", 2)
    path = b"/" + target.split(b"/", 3)[3]
    lines = [line for line in rest.split(b"\r\n") if not line.lower().startswith(b"proxy-authorization:")]
    return b" ".join([method, path, b"\r\n".join(lines)])


async def _copy(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heads: list[bytes] | None
) -> None:
    """Bytes as they come; a further request on the same connection is put into origin form as well."""
    try:
        while data := await reader.read(65536):
            if heads is not None and b" http://" in data.partition(b"\r\n")[0]:
                heads.append(data.partition(b"\r\n\r\n")[0])
                data = _in_origin_form(data)
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def connect_proxy() -> AsyncIterator[ConnectProxy]:
    proxy = ConnectProxy()
    tasks: set[asyncio.Task[None]] = set()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(proxy.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
