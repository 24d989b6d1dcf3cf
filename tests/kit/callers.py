"""Raw callers: what is on the wire, without a client library in between."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any


def post(path: str, document: Any, *headers: str, version: str = "1.1") -> bytes:
    """A whole request as bytes."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: test", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def chat(*headers: str, version: str = "1.1", path: str = "/v1/chat/completions", **fields: Any) -> bytes:
    """A streaming chat request for the model `m`; fields override."""
    document = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}], **fields}
    return post(path, document, *headers, version=version)


class Answer:
    """A parsed answer. `clean`: HTTP's framing says that it is whole."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.clean = False
        self.reset = False

    def json(self) -> Any:
        return json.loads(self.body)


class Caller:
    """One connection to Headrace."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int, *, receive_buffer: int | None = None) -> Caller:
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        except BaseException:
            sock.close()
            raise
        reader, writer = await asyncio.open_connection(sock=sock, limit=2**16)
        return cls(reader, writer)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, answer: Answer | None = None) -> Answer:
        """Reads the status line and the header fields (names in lower case)."""
        answer = answer or Answer()
        raw = await self.reader.readuntil(b"\r\n\r\n")
        status, *lines = raw.decode("latin-1").split("\r\n")
        answer.status = int(status.split(" ")[1])
        answer.headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
        }
        return answer

    async def piece(self, answer: Answer) -> bytes:
        """One chunk of a chunked answer; b"" is the last one."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        data = await self.reader.readexactly(size)
        await self.reader.readexactly(2)
        answer.body += data
        answer.clean = size == 0
        return data

    async def rest(self, answer: Answer) -> Answer:
        """The body to its end, however it ends."""
        try:
            if answer.headers.get("transfer-encoding") == "chunked":
                while await self.piece(answer):
                    pass
            elif "content-length" in answer.headers:
                answer.body += await self.reader.readexactly(int(answer.headers["content-length"]))
                answer.clean = True
            else:
                answer.body += await self.reader.read(-1)
                answer.clean = True
        except asyncio.IncompleteReadError as cut:
            answer.body += cut.partial
        except ConnectionResetError:
            answer.reset = True
        return answer

    async def ask(self, request: bytes) -> Answer:
        """Sends a request and reads its whole answer; 5 tests of 6 need no more."""
        await self.send(request)
        return await self.rest(await self.head())

    def leave(self) -> None:
        """FIN."""
        self.writer.close()

    def reset(self) -> None:
        """RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()


async def ask(port: int, request: bytes) -> Answer:
    """One request on a connection of its own."""
    async with await Caller.connect(port) as caller:
        async with asyncio.timeout(20):
            return await caller.ask(request)


async def everything(port: int, request: bytes) -> Answer:
    """Like `ask`, below asyncio's streams: bytes that came before a reset are not lost."""
    loop = asyncio.get_running_loop()
    raw, was_reset = b"", False
    with socket.socket() as sock:
        sock.setblocking(False)
        async with asyncio.timeout(20):
            await loop.sock_connect(sock, ("127.0.0.1", port))
            await loop.sock_sendall(sock, request)
            try:
                while data := await loop.sock_recv(sock, 65536):
                    raw += data
            except ConnectionResetError:
                was_reset = True
    reader = asyncio.StreamReader(limit=2**20)
    reader.feed_data(raw)
    reader.feed_eof()
    parser = Caller(reader, None)  # type: ignore[arg-type] # nothing is written
    answer = await parser.rest(await parser.head())
    answer.reset = was_reset
    answer.clean = answer.clean and not was_reset
    return answer
