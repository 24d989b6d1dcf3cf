"""The upstream of the bench: answers by rote from one epoll loop, so that it is never what is measured.

    python -m bench.upstream [--tls CERT KEY]     prints its port, and runs until it is ended

Not `headrace mock`: that one can fail in a hundred ways and costs as much as a proxy. The body of a request
says what it wants, anywhere in it: `n=EVENTS gap=MS` for a stream, `size=BYTES` for a plain answer. An event
is 200 bytes, one HTTP chunk and one write; it carries the time at which it left, as `@T` and 19 digits.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import select
import socket
import ssl
import time

_WANTED = re.compile(rb"n=(\d+) gap=(\d+)")
_SIZE = re.compile(rb"size=(\d+)")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_STREAMS = re.compile(rb'"stream": ?true')
_BLOCKED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"x-request-id: mock-0001\r\ntransfer-encoding: chunked\r\n\r\n"
)
_COMMON = b'{"id":"chatcmpl-mock000000000001","object":"chat.completion.chunk","created":1700000000,'
_USAGE = b'"usage":{"prompt_tokens":12,"completion_tokens":150,"total_tokens":162}'


def _framed(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


_EVENT = (
    b"data: "
    + _COMMON
    + b'"model":"mock-model","choices":[{"index":0,"delta":{"content":"@T%019d tok"},'
    + b'"finish_reason":null}]}\n\n'
)
_CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT % 0), _EVENT)
_END = (
    _framed(
        b"data: "
        + _COMMON
        + b'"model":"mock-model","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    )
    + _framed(b"data: " + _COMMON + b'"model":"mock-model","choices":[],' + _USAGE + b"}\n\n")
    + _framed(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)
#: Events that a stream without a gap sends at a time, so that others get their turn.
_BURST = 8


def plain_answer(size: int) -> bytes:
    """Head and body of an answer whose body has about `size` bytes."""
    document = {
        "id": "chatcmpl-mock000000000001",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "mock-model",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 12, "completion_tokens": 150, "total_tokens": 162},
    }
    missing = max(0, size - len(json.dumps(document)))
    document["choices"][0]["message"]["content"] = ("lorem ipsum dolor " * (missing // 18 + 1))[:missing]  # type: ignore[index]  # a document of any shape
    body = json.dumps(document).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-request-id: mock-0001\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


class _Connection:
    __slots__ = ("gap_ms", "left", "received", "sock", "streaming", "unsent")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""
        self.unsent = b""
        self.streaming = False
        self.left = 0  # events still to send
        self.gap_ms = 0


class Upstream:
    """One loop over all connections, and a wheel of milliseconds for the events that are due."""

    def __init__(self, listener: socket.socket, context: ssl.SSLContext | None = None) -> None:
        self._listener = listener
        self._context = context
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._wheel: dict[int, list[_Connection]] = {}
        self._tick = time.monotonic_ns() // 1_000_000
        self._eager: list[_Connection] = []  # streams without a gap
        self._answers = {1024: plain_answer(1024)}
        self._begun = 0
        listener.setblocking(False)
        self._epoll.register(listener.fileno(), select.EPOLLIN)

    def run(self) -> None:
        while True:
            self._read_all()
            self._send_due()
            eager, self._eager = self._eager, []
            for connection in eager:
                self._burst(connection)

    def _read_all(self) -> None:
        wait_s = 0.0 if self._eager else 0.02
        if self._wheel and wait_s:
            # 25 µs early: a wake-up takes about as long.
            wait_s = max(0.0, (min(self._wheel) * 1_000_000 - time.monotonic_ns()) / 1e9 - 25e-6)
        for descriptor, mask in self._epoll.poll(min(wait_s, 0.02), 512):
            if descriptor == self._listener.fileno():
                self._accept()
            elif mask & select.EPOLLOUT:
                self._flush(self._connections[descriptor])
            else:
                self._read(self._connections[descriptor])

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context:
                sock = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            self._connections[sock.fileno()] = _Connection(sock)
            self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _close(self, connection: _Connection) -> None:
        connection.left = -1  # what the wheel still holds of it is void
        self._connections.pop(connection.sock.fileno(), None)
        connection.sock.close()

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────

    def _read(self, connection: _Connection) -> None:
        while True:  # TLS may hold more than one record
            try:
                data = connection.sock.recv(65536)
            except _BLOCKED:
                return
            except OSError:
                data = b""
            if not data:
                return self._close(connection)
            connection.received += data
            if not connection.streaming:
                self._answer_all(connection)
            if self._context is None or connection.left < 0:
                return

    def _answer_all(self, connection: _Connection) -> None:
        while connection.received and not connection.streaming and connection.left >= 0:
            size = _request_size(connection.received)
            if size is None:
                return
            request, connection.received = connection.received[:size], connection.received[size:]
            self._answer(connection, request)

    def _answer(self, connection: _Connection, request: bytes) -> None:
        if not _STREAMS.search(request):
            wanted = _SIZE.search(request)
            size = int(wanted[1]) if wanted else 1024
            if size not in self._answers:
                self._answers[size] = plain_answer(size)
            self._send(connection, self._answers[size])
            return
        found = _WANTED.search(request)
        connection.left, connection.gap_ms = (int(found[1]), int(found[2])) if found else (100, 0)
        connection.streaming = True
        if not self._send(connection, _HEAD):
            return
        if not connection.gap_ms:
            self._eager.append(connection)
            return
        # The first event at once; then each stream has a place of its own within the gap.
        self._begun += 1
        self._emit(connection, 1 + self._begun * 7919 % connection.gap_ms)

    # ── events ───────────────────────────────────────────────────────────────────────────────────────────

    def _send_due(self) -> None:
        now = time.monotonic_ns() // 1_000_000
        while self._tick < now:
            self._tick += 1
            for connection in self._wheel.pop(self._tick, ()):
                if connection.left >= 0:
                    self._emit(connection, connection.gap_ms)

    def _emit(self, connection: _Connection, next_ms: int) -> None:
        if not connection.left:
            return self._end(connection)
        connection.left -= 1
        if self._send(connection, _CHUNK % time.monotonic_ns()):
            self._wheel.setdefault(self._tick + next_ms, []).append(connection)

    def _burst(self, connection: _Connection) -> None:
        for _ in range(_BURST):
            if connection.left < 0:
                return
            if not connection.left:
                return self._end(connection)
            connection.left -= 1
            if not self._send(connection, _CHUNK % time.monotonic_ns()):
                return
        self._eager.append(connection)

    def _end(self, connection: _Connection) -> None:
        connection.streaming = False
        if self._send(connection, _END):
            self._answer_all(connection)

    def _send(self, connection: _Connection, data: bytes) -> bool:
        """Whether all of it went out; otherwise the rest waits, or the connection is closed."""
        try:
            sent = connection.sock.send(data)
        except _BLOCKED:
            sent = 0
        except OSError:
            self._close(connection)
            return False
        if sent == len(data):
            return True
        connection.unsent += data[sent:]
        self._epoll.modify(connection.sock.fileno(), select.EPOLLOUT)
        return False

    def _flush(self, connection: _Connection) -> None:
        data, connection.unsent = connection.unsent, b""
        if not self._send(connection, data):
            return
        self._epoll.modify(connection.sock.fileno(), select.EPOLLIN)
        if not connection.streaming:
            self._answer_all(connection)
        elif connection.gap_ms:
            self._wheel.setdefault(self._tick + connection.gap_ms, []).append(connection)
        else:
            self._eager.append(connection)


def _request_size(data: bytes) -> int | None:
    """Bytes of the first request in here; None while it is not whole."""
    head = data.find(b"\r\n\r\n")
    if head < 0:
        return None
    if length := _LENGTH.search(data, 0, head + 2):
        size = head + 4 + int(length[1])
        return size if len(data) >= size else None
    if _CHUNKED.search(data, 0, head + 2):
        end = data.find(b"0\r\n\r\n", head + 4)
        return None if end < 0 else end + 5
    return head + 4


def main() -> None:
    parser = argparse.ArgumentParser(description="the upstream of the bench")
    parser.add_argument("--tls", nargs=2, metavar=("CERT", "KEY"))
    arguments = parser.parse_args()
    context = None
    if arguments.tls:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*arguments.tls)
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(listener.getsockname()[1], flush=True)
    gc.disable()  # nothing here makes cycles
    Upstream(listener, context).run()


if __name__ == "__main__":
    main()
