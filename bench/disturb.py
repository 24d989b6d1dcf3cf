"""What disturbs in `bench.head_of_line`: callers that send or take much, and the upstream that they ask.

    python -m bench.disturb upstream                prints its port, and runs until it is ended
    python -m bench.disturb KIND PORT [KEY]         until SIGTERM; then prints what it has done as JSON

An upstream of its own, so that the one of the running streams is never what is late; and a source address of
its own (127.0.0.2), as of a stranger whom the limits per address meet alone.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import repeat

import uvloop

from bench.load import spread
from bench.upstream import plain_answer

#: What the proxy knows the upstream's model by.
MODEL = "disturbing"
_ADDRESS = "127.0.0.2"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_SIZE = re.compile(rb"size=(\d+)")
_LAST = b"0\r\n\r\n"
_EVENT = b'data: {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"word"}}]}\n\n'
_STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in (*repeat(_EVENT, 5), b"data: [DONE]\n\n"))
    + _LAST
)
#: Text as people and programs write it: quotes and line ends are escaped in JSON, and some of it is no ASCII.
_TEXT = 'A line of "text", as long as they are:\n\tGrüße aus Köln, 你好, and what else there is to say.\n'
#: As httpx makes it.
_BOUNDARY = "7b3e9a0c4d5f4e6d8a1b2c3d4e5f6071"
PROMPT_BYTES = 2 * 2**20
UPLOAD_BYTES = 100 * 2**20
ANSWER_BYTES = 10 * 2**20
FLOOD_CONNECTIONS = 200
NEW_PER_SECOND = 2000
_TICK_S = 0.005


# ── the upstream ─────────────────────────────────────────────────────────────────────────────────────────


class _Answering(asyncio.Protocol):
    """Takes a request of any size, and answers what its first bytes say: a stream, or so many bytes."""

    def __init__(self, answers: dict[int, bytes]) -> None:
        self._answers = answers
        self._head = b""
        self._left = 0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment] # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        if not self._left:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(self._head, 0, end + 2)
            self._left = (int(length[1]) if length else 0) + end + 4
            data = self._head
        elif len(self._head) < 2048:
            self._head += data[:2048]
        self._left -= len(data)
        if self._left <= 0:
            head, self._head, self._left = self._head, b"", 0
            self._transport.write(self._answer(head))

    def _answer(self, head: bytes) -> bytes:
        if b'"stream":true' in head:
            return _STREAM
        size = _SIZE.search(head, 0, 4096)
        wanted = int(size[1]) if size else 1024
        if wanted not in self._answers:
            self._answers[wanted] = plain_answer(wanted)
        return self._answers[wanted]


async def _serve() -> None:
    answers: dict[int, bytes] = {}
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Answering(answers), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# ── the callers ──────────────────────────────────────────────────────────────────────────────────────────


class Tally:
    """What came back: statuses, and nanoseconds to the first byte."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.first_ns: list[int] = []


class _Caller(asyncio.Protocol):
    """Sends one request after the other on its connection; `once`: one, then it closes."""

    def __init__(self, tally: Tally, request: Callable[[], Iterator[bytes]], *, once: bool = False) -> None:
        self._tally = tally
        self._request = request
        self._once = once
        self._parts: Iterator[bytes] = iter(())
        self._paused = False
        self._asked_ns = 0
        self._left = -1
        self._tail = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment] # uvloop's is no subclass
        self._ask()

    def _ask(self) -> None:
        self._tail, self._left = b"", -1
        self._asked_ns = time.monotonic_ns()
        self._parts = self._request()
        self._send()

    def _send(self) -> None:
        while not self._paused and (part := next(self._parts, None)) is not None:
            self._transport.write(part)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._send()

    def data_received(self, data: bytes) -> None:
        if self._left < 0:
            data = self._tail + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._tail = data
                return
            self._tally.statuses[data[9:12].decode()] += 1
            self._tally.first_ns.append(time.monotonic_ns() - self._asked_ns)
            length = _LENGTH.search(data, 0, end + 2)
            self._left = int(length[1]) if length else 1 << 60
            data, self._tail = data[end + 4 :], b""
        self._left -= len(data)
        self._tail = (self._tail + data)[-5:]
        if self._left <= 0 or (self._left > 1 << 50 and self._tail == _LAST):
            if self._once:
                self._transport.close()
            else:
                self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._tally.statuses["cut"] += 1


class Disturbance:
    """KIND by name; `start` begins it, and it goes on by itself."""

    def __init__(self, port: int, secret: str) -> None:
        self.tally = Tally()
        self._port = port
        self._secret = secret

    def head(self, path: str, size: int, kind: str = "application/json", secret: str = "") -> bytes:
        lines = [
            f"POST {path} HTTP/1.1",
            "Host: 127.0.0.1",
            f"Content-Type: {kind}",
            f"Authorization: Bearer {secret or self._secret}",
            f"Content-Length: {size}",
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n"

    def chat(self, text: str, *, stream: bool = False, secret: str = "") -> bytes:
        document = {"model": MODEL, "stream": stream, "messages": [{"role": "user", "content": text}]}
        body = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
        return self.head("/v1/chat/completions", len(body), secret=secret) + body

    async def call(self, request: Callable[[], Iterator[bytes]], *, once: bool = False) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(
                lambda: _Caller(self.tally, request, once=once),
                "127.0.0.1",
                self._port,
                local_addr=(_ADDRESS, 0),
            )
        except OSError:
            self.tally.statuses["no connection"] += 1

    async def repeat(self, request: bytes, connections: int = 1) -> None:
        for _ in range(connections):
            await self.call(lambda: iter((request,)))

    # ── by name ──────────────────────────────────────────────────────────────────────────────────────────

    async def prompts(self) -> None:
        """One caller sends prompts of 2 MB one after the other."""
        await self.repeat(self.chat(_TEXT * (PROMPT_BYTES // len(_TEXT.encode()))))

    async def streamed_prompts(self) -> None:
        """The same; the answers are streams."""
        await self.repeat(self.chat(_TEXT * (PROMPT_BYTES // len(_TEXT.encode())), stream=True))

    async def upload(self) -> None:
        """One caller uploads 100 MB of audio, and again."""
        before = (
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{MODEL}\r\n'
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        ).encode()
        after = f"\r\n--{_BOUNDARY}--\r\n".encode()
        piece = bytes(range(256)) * 1024
        size = len(before) + UPLOAD_BYTES + len(after)
        first = (
            self.head("/v1/audio/transcriptions", size, f"multipart/form-data; boundary={_BOUNDARY}") + before
        )

        def parts() -> Iterator[bytes]:
            yield first
            yield from repeat(piece, UPLOAD_BYTES // len(piece))
            yield after

        await self.call(parts)

    async def invalid_keys(self) -> None:
        """200 connections ask with a key that nobody has, each again as soon as it is refused."""
        await self.repeat(self.chat("Hello", secret="hr_0123456789ab_" + "x" * 43), FLOOD_CONNECTIONS)

    async def new_streams(self) -> None:
        """2,000 short streams a second, each on a new connection, whether the last have ended or not."""
        request = self.chat("Hello", stream=True)
        loop = asyncio.get_running_loop()
        began, opened = loop.time(), 0
        calls: set[asyncio.Task[None]] = set()
        while True:
            due = int((loop.time() - began) * NEW_PER_SECOND)
            while opened < due:
                opened += 1
                call = asyncio.ensure_future(self.call(lambda: iter((request,)), once=True))
                calls.add(call)
                call.add_done_callback(calls.discard)
            await asyncio.sleep(_TICK_S)

    async def download(self) -> None:
        """One caller takes plain answers of 10 MB one after the other."""
        await self.repeat(self.chat(f"Hello size={ANSWER_BYTES}"))


#: Method names, in the order of the table.
KINDS = ("prompts", "streamed_prompts", "upload", "invalid_keys", "new_streams", "download")


async def _disturb(kind: str, port: int, secret: str) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    disturbance = Disturbance(port, secret)
    began = time.monotonic()
    task = asyncio.ensure_future(getattr(disturbance, kind)())
    await ended.wait()
    task.cancel()
    tally = disturbance.tally
    seconds = time.monotonic() - began
    print(
        json.dumps({"seconds": seconds, "statuses": dict(tally.statuses), "ttfb": spread(tally.first_ns)}),
        flush=True,
    )


def main() -> None:
    kind = sys.argv[1]
    gc.freeze()
    if kind == "upstream":
        uvloop.run(_serve())
    elif kind in KINDS:
        uvloop.run(_disturb(kind, int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""))
    else:
        raise SystemExit(f"one of: upstream, {', '.join(KINDS)}")


if __name__ == "__main__":
    main()
