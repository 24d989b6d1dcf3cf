"""The load generator of the bench: one epoll loop that asks, reads and times. Prints one JSON object.

    python -m bench.load PORT --streams 400 --requests 400 --events 150 --gap-ms 24
    python -m bench.load PORT --short --streams 32 --seconds 2

Times are microseconds: `ttfb` from the request to the first event (or the first byte of a plain answer),
`late` from an event's departure upstream to its arrival here, `gap` the difference between two events'
distance here and upstream. A generator that is itself late shows in the figures of `direct`.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import resource
import select
import socket
import time
from typing import Any

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_BUFFER = 1 << 18
_DIGITS = 19
_LAST = b"0\r\n\r\n"
_EVENT_END = b"\n\n\r\n"
#: What may be cut: a time has 21 bytes, _LAST has 5.
_LONGEST = 20


class _Connection:
    __slots__ = (
        "asked_ns",
        "body_left",
        "events",
        "head",
        "last_left_ns",
        "last_ns",
        "rest",
        "sock",
        "unsent",
    )

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.unsent = b""
        self.begin(0)

    def begin(self, now_ns: int) -> None:
        self.asked_ns = now_ns
        self.head = False  # the answer's head is here
        self.body_left = -1  # bytes; -1 in an answer without a length
        self.events = 0
        self.last_ns = 0
        self.last_left_ns = 0
        self.rest = b""  # what came may go on with the next read


class Load:
    """request: the bytes of every request; events: how many its answer has, 0 for a plain one."""

    def __init__(self, port: int, request: bytes, events: int) -> None:
        self._address = ("127.0.0.1", port)
        self._request = request
        self._events = events
        self._epoll = select.epoll()
        self._open: dict[int, _Connection] = {}
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._asked = 0
        self._active = 0
        self._until_ns = 0
        self._most = 0
        self.ttfb: list[int] = []
        self.late: list[int] = []
        self.gap: list[int] = []
        self.whole: list[int] = []
        self.failed: dict[str, int] = {}
        self.first_refusal = ""

    def run(self, streams: int, requests: int, seconds: float, ramp_s: float) -> float:
        """Seconds that it took. Each connection asks again until `requests` or `seconds` are through."""
        connections = [self._connect() for _ in range(streams)]
        began = time.monotonic_ns()
        self._most = requests or 1 << 60
        self._until_ns = began + int(seconds * 1e9) if seconds else 1 << 62
        hard_stop = (self._until_ns if seconds else began) + 120_000_000_000
        started = 0
        while started < len(connections) or self._active:
            now = time.monotonic_ns()
            share = min(1.0, (now - began) / 1e9 / ramp_s) if ramp_s else 1.0
            while started < max(1, int(share * len(connections))) and started < len(connections):
                self._ask(connections[started])
                started += 1
            if now > hard_stop:
                self._count("unfinished", self._active)
                break
            self._turn(0.0005 if started < len(connections) else 0.1)
        took_s = (time.monotonic_ns() - began) / 1e9
        for connection in self._open.values():
            connection.sock.close()
        self._epoll.close()
        return took_s

    def _turn(self, wait_s: float) -> None:
        for descriptor, mask in self._epoll.poll(wait_s, 256):
            connection = self._open[descriptor]
            if mask & select.EPOLLOUT:
                self._flush(connection)
            if mask & ~select.EPOLLOUT:
                self._read(connection)

    def _connect(self) -> _Connection:
        sock = socket.create_connection(self._address, 20)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        connection = self._open[sock.fileno()] = _Connection(sock)
        return connection

    def _ask(self, connection: _Connection) -> None:
        if self._asked >= self._most or time.monotonic_ns() >= self._until_ns:
            return
        self._asked += 1
        self._active += 1
        connection.begin(time.monotonic_ns())
        connection.unsent = self._request
        self._flush(connection)

    def _flush(self, connection: _Connection) -> None:
        try:
            sent = connection.sock.send(connection.unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # the next read says it
        was_blocked = len(connection.unsent) < len(self._request)
        connection.unsent = connection.unsent[sent:]
        if connection.unsent:
            self._epoll.modify(connection.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
        elif was_blocked:
            self._epoll.modify(connection.sock.fileno(), select.EPOLLIN)

    # ── answers ──────────────────────────────────────────────────────────────────────────────────────────

    def _read(self, connection: _Connection) -> None:
        try:
            size = connection.sock.recv_into(self._view)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        now = time.monotonic_ns()
        if not size:
            return self._gone(connection)
        if not connection.asked_ns:
            return  # nothing was asked: a late farewell
        if connection.head and not connection.rest:
            data: bytes | bytearray = self._buffer
        else:
            data = connection.rest + self._buffer[:size]
            size = len(data)
            connection.rest = b""
        start = 0
        if not connection.head:
            start = self._head(connection, bytes(data[:size]), now)
            if start < 0:
                return
        self._body(connection, data, start, size, now)

    def _head(self, connection: _Connection, data: bytes, now: int) -> int:
        """Where the body begins; -1 while the head is not whole."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            connection.rest = data
            return -1
        connection.head = True
        if data[9:12] != b"200":
            self._count("status " + data[9:12].decode())
            self.first_refusal = self.first_refusal or data[:600].decode("latin-1")
        if length := _LENGTH.search(data, 0, end + 2):
            connection.body_left = int(length[1])
        if not self._events:
            self.ttfb.append(now - connection.asked_ns)
        return end + 4

    def _body(
        self, connection: _Connection, data: bytes | bytearray, start: int, size: int, now: int
    ) -> None:
        seen = self._find_events(connection, data, start, size, now) if self._events else start
        if connection.body_left >= 0:
            connection.body_left -= size - start
            if connection.body_left <= 0:
                self._done(connection, now)
        elif data.endswith(_LAST, start, size):
            self._done(connection, now)
        elif not data.endswith(_EVENT_END, start, size):
            # Cut anywhere: a time or the end of the answer may be on both sides.
            connection.rest = bytes(data[max(seen, size - _LONGEST) : size])

    def _find_events(
        self, connection: _Connection, data: bytes | bytearray, start: int, size: int, now: int
    ) -> int:
        """Behind the last one."""
        end = start
        at = data.find(b"@T", start, size)
        while at >= 0 and at + 2 + _DIGITS <= size:
            end = at + 2 + _DIGITS
            left = int(data[at + 2 : end])
            self.late.append(now - left)
            if connection.events:
                self.gap.append(abs(now - connection.last_ns - left + connection.last_left_ns))
            else:
                self.ttfb.append(now - connection.asked_ns)
            connection.events += 1
            connection.last_ns = now
            connection.last_left_ns = left
            at = data.find(b"@T", end, size)
        return end

    def _done(self, connection: _Connection, now: int) -> None:
        if connection.events != self._events:
            self._count("wrong number of events")
        self.whole.append(now - connection.asked_ns)
        self._active -= 1
        connection.asked_ns = 0
        self._ask(connection)

    def _gone(self, connection: _Connection) -> None:
        """Closed by the other side: an answer without a length ends so, everything else is cut."""
        del self._open[connection.sock.fileno()]
        connection.sock.close()
        if not connection.asked_ns:
            return
        self._active -= 1
        self._count("cut")
        if time.monotonic_ns() < self._until_ns and self._asked < self._most:
            self._ask(self._connect())

    def _count(self, what: str, number: int = 1) -> None:
        self.failed[what] = self.failed.get(what, 0) + number


def build_request(arguments: argparse.Namespace) -> bytes:
    text = f"Hello n={arguments.events} gap={arguments.gap_ms} size={arguments.size}"
    document: dict[str, Any] = {
        "model": arguments.model,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant." + "x" * arguments.pad},
            {"role": "user", "content": text},
        ],
    }
    if not arguments.short:
        document["stream"] = True
    body = json.dumps(document, separators=(",", ":")).encode()
    lines = [
        f"POST {arguments.path} HTTP/1.1",
        f"Host: 127.0.0.1:{arguments.port}",
        "Content-Type: application/json",
        *arguments.header,
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def spread(values_ns: list[int]) -> dict[str, float]:
    """Microseconds."""
    if not values_ns:
        return {}
    values_ns.sort()
    last = len(values_ns) - 1
    return {
        "p50": values_ns[last // 2] / 1000,
        "p99": values_ns[int(last * 0.99)] / 1000,
        "p999": values_ns[int(last * 0.999)] / 1000,
        "max": values_ns[-1] / 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="the load generator of the bench")
    parser.add_argument("port", type=int)
    parser.add_argument("--streams", type=int, default=1, help="connections, each with one request at a time")
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument(
        "--ramp", type=float, default=0, metavar="SECONDS", help="until the last one has begun"
    )
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--gap-ms", type=int, default=20)
    parser.add_argument("--short", action="store_true", help="plain answers instead of streams")
    parser.add_argument("--size", type=int, default=1024, help="bytes of a plain answer")
    parser.add_argument("--pad", type=int, default=0, help="more bytes in every request")
    parser.add_argument("--header", action="append", default=[])
    parser.add_argument("--model", default="mock-model")
    parser.add_argument("--path", default="/v1/chat/completions")
    arguments = parser.parse_args()
    load = Load(arguments.port, build_request(arguments), 0 if arguments.short else arguments.events)
    gc.disable()  # nothing here makes cycles
    took_s = load.run(arguments.streams, arguments.requests, arguments.seconds, arguments.ramp)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "requests": len(load.whole),
                "events": len(load.late),
                "seconds": took_s,
                "failed": load.failed,
                "refusal": load.first_refusal,
                "ttfb": spread(load.ttfb),
                "late": spread(load.late),
                "gap": spread(load.gap),
                "whole": spread(load.whole),
                "own_cpu_s": used.ru_utime + used.ru_stime,
            }
        )
    )


if __name__ == "__main__":
    main()
