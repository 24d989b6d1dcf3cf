"""What retries and failover give: the share of requests that succeed, and what an upstream's fault costs.

    python -m bench.retries [REQUESTS]

First part: three upstreams of equal weight, asked through Headrace, through nginx (`proxy_next_upstream`) and
directly in turn. Each aborts the TLS handshake of a share of its connections (a
connect failure: nothing was sent) and answers a share of its requests with 503. No connection is kept, so
that every attempt connects. Second part: a first tier that refuses, answers 503, or accepts nothing, in front
of a healthy second one; the time to the first byte beside a healthy first tier, while the breaker is still
closed and once it is open. All shares are drawn from a seeded generator. `retry` is the default one.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import socket
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import trustme
import uvloop
import yaml

#: Of connects that fail, and of answers that are 503: a tenth of the attempts together, and a tenth each.
SHARES = (0.05, 0.1)
CONNECT_S = 0.3
FIRST_TIER_ROUNDS = 5
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_EVENTS = (b'data: {"choices":[{"delta":{"content":"word"}}]}\n\n', b"data: [DONE]\n\n")
_REFUSAL = b"HTTP/1.1 503 Unavailable\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
_ASK = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}


class Upstream:
    """Answers with two events. hits: requests it has read; aborted: connections it ended in the handshake."""

    def __init__(self, seed: int, *, aborts: float = 0.0, refuses: float = 0.0) -> None:
        self._random = random.Random(seed)
        self._aborts = aborts
        self._refuses = refuses
        self.hits = 0
        self.aborted = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
        await reader.readexactly(length)
        self.hits += 1
        if self._random.random() < self._refuses:
            writer.write(_REFUSAL)
        else:
            writer.write(_ANSWER + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in _EVENTS))
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def accept(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        """Takes connections one by one, so that a share of them can be ended before their handshake."""
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        running: set[asyncio.Task[None]] = set()
        while True:
            connection, _ = await loop.sock_accept(sock)
            if self._random.random() < self._aborts:
                self.aborted += 1
                connection.close()
                continue
            task = asyncio.ensure_future(self._handshake(connection, context))
            running.add(task)
            task.add_done_callback(running.discard)

    async def _handshake(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()

        def served(to: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Awaitable[None]:
            return self.serve(to, writer)

        protocol = asyncio.StreamReaderProtocol(reader, served)
        try:
            await loop.connect_accepted_socket(lambda: protocol, connection, ssl=context)
        except OSError:
            connection.close()


@asynccontextmanager
async def headrace(settings: dict[str, Any]) -> AsyncIterator[str]:
    """`headrace serve` as a process of its own; its URL."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "headrace.yaml"
        ports = [_free_port(), _free_port()]
        listeners = {"listen": f"127.0.0.1:{ports[0]}", "admin": f"127.0.0.1:{ports[1]}"}
        common = {**listeners, "auth": {"mode": "open"}, "log": {"file": f"{folder}/log"}}
        file.write_text(yaml.safe_dump({**common, **settings}))
        quiet = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "proxy", "serve", "-c", str(file), stdout=quiet, stderr=quiet
        )
        url = f"http://127.0.0.1:{ports[0]}"
        try:
            await _until_up(url)
            yield url
        finally:
            process.terminate()
            await process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _until_up(url: str) -> None:
    async with aiohttp.ClientSession() as session, asyncio.timeout(20):
        while True:
            try:
                async with session.get(f"{url}/health"):
                    return
            except OSError:
                await asyncio.sleep(0.05)


async def ask(session: aiohttp.ClientSession, url: str) -> tuple[bool, int, float]:
    """Was it a whole answer, how many attempts, milliseconds to the first byte."""
    began = time.perf_counter()
    try:
        async with session.post(f"{url}/v1/chat/completions", json=_ASK) as response:
            first = await response.content.readany()
            first_ms = (time.perf_counter() - began) * 1000
            body = first + await response.read()
            attempts = int(response.headers.get("x-headrace-attempts", 0))
            return response.status == 200 and body.endswith(_EVENTS[1]), attempts, first_ms
    except aiohttp.ClientError:
        return False, 0, (time.perf_counter() - began) * 1000


# ── the share that succeeds ──────────────────────────────────────────────────────────────────────────────


async def success_rate(requests: int, share: float, peer: str = "headrace") -> dict[str, Any]:
    """peer: headrace, nginx or direct."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    upstreams = [Upstream(seed, aborts=share, refuses=share) for seed in (1, 2, 3)]
    accepting, ports = [], []
    async with AsyncExitStack() as stack:
        ca_file = stack.enter_context(authority.cert_pem.tempfile())
        for upstream in upstreams:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
            accepting.append(asyncio.ensure_future(upstream.accept(listener, context)))
            ports.append(listener.getsockname()[1])
        urls = await stack.enter_async_context(BETWEEN[peer](ports, ca_file))
        outcomes = await _many(urls, requests, ssl.create_default_context(cafile=ca_file))
        for task in accepting:
            task.cancel()
    attempts = [tries for _, tries, _ in outcomes]
    return {
        "peer": peer,
        "share": share,
        "requests": requests,
        "succeeded": sum(whole for whole, _, _ in outcomes),
        "success_percent": round(100 * sum(whole for whole, _, _ in outcomes) / requests, 2),
        "attempts_per_request": round(sum(attempts) / requests, 3),
        "upstream_hits_per_request": round(sum(each.hits for each in upstreams) / requests, 3),
        "connects_aborted": sum(each.aborted for each in upstreams),
    }


@asynccontextmanager
async def _through_headrace(ports: list[int], ca_file: str) -> AsyncIterator[list[str]]:
    entries = {
        f"u{number}": {
            "base_url": f"https://localhost:{port}",
            "ca_file": ca_file,
            "pool": {"keepalive": 0},
            "breaker": {"failures": 1000},
        }
        for number, port in enumerate(ports)
    }
    async with headrace({"upstreams": entries, "models": {"m": {"upstreams": list(entries)}}}) as url:
        yield [url]


_NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log crit;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxied;
  upstream u {{ {servers} }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass https://u; proxy_buffering off; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_ssl_trusted_certificate {ca_file}; proxy_ssl_verify on;
      proxy_ssl_name localhost; proxy_ssl_server_name on;
      proxy_next_upstream error timeout http_503 non_idempotent; proxy_next_upstream_tries 3;
    }}
  }}
}}
"""


@asynccontextmanager
async def _through_nginx(ports: list[int], ca_file: str) -> AsyncIterator[list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        servers = " ".join(f"server localhost:{each} max_fails=0;" for each in ports)
        file = Path(folder) / "nginx.conf"
        file.write_text(_NGINX.format(folder=folder, port=port, servers=servers, ca_file=ca_file))
        process = await asyncio.create_subprocess_exec("nginx", "-c", str(file), "-e", f"{folder}/error.log")
        try:
            await _until_up(f"http://127.0.0.1:{port}")
            yield [f"http://127.0.0.1:{port}"]
        finally:
            process.terminate()
            await process.wait()


@asynccontextmanager
async def _directly(ports: list[int], ca_file: str) -> AsyncIterator[list[str]]:
    yield [f"https://localhost:{port}" for port in ports]


#: What is between the callers and the upstreams; each gives the URLs that are asked in turn.
BETWEEN = {"headrace": _through_headrace, "nginx": _through_nginx, "direct": _directly}


async def _many(urls: list[str], requests: int, trusted: ssl.SSLContext) -> list[tuple[bool, int, float]]:
    places = asyncio.Semaphore(20)

    async def one(session: aiohttp.ClientSession, url: str) -> tuple[bool, int, float]:
        async with places:
            return await ask(session, url)

    # As through a proxy that keeps no connection, each attempt connects.
    connector = aiohttp.TCPConnector(limit=0, ssl=trusted, force_close=len(urls) > 1)
    async with aiohttp.ClientSession(connector=connector) as session:
        return await asyncio.gather(*[one(session, urls[number % len(urls)]) for number in range(requests)])


# ── what a fault of the first tier costs ─────────────────────────────────────────────────────────────────


@asynccontextmanager
async def healthy() -> AsyncIterator[str]:
    async with _served(Upstream(1)) as url:
        yield url


@asynccontextmanager
async def answers_503() -> AsyncIterator[str]:
    async with _served(Upstream(1, refuses=1.0)) as url:
        yield url


@asynccontextmanager
async def _served(upstream: Upstream) -> AsyncIterator[str]:
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@asynccontextmanager
async def refuses() -> AsyncIterator[str]:
    with socket.socket() as held:  # bound, and nobody listens
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@asynccontextmanager
async def blackhole() -> AsyncIterator[str]:
    """A listener whose backlog is full: the kernel drops what else wants to connect."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(address)
            fillers.append(filler)
        yield f"http://127.0.0.1:{address[1]}"
        for filler in fillers:
            filler.close()


FIRST_TIERS: dict[str, Callable[[], Any]] = {
    "healthy": healthy,
    "refuses": refuses,
    "answers 503": answers_503,
    "blackholes": blackhole,
}


async def first_byte(first_tier: str) -> dict[str, Any]:
    """Medians in milliseconds. The default breaker opens with the fifth failure."""
    async with FIRST_TIERS[first_tier]() as first, healthy() as second:
        settings = {
            "upstreams": {
                "first": {
                    "base_url": first,
                    "timeouts": {"connect": CONNECT_S},
                    "breaker": {"cool_down": 60},
                },
                "second": {"base_url": second},
            },
            "models": {"m": {"upstreams": ["first", {"name": "second", "tier": 2}]}},
        }
        async with headrace(settings) as url, aiohttp.ClientSession() as session:
            closed = [(await ask(session, url))[2] for _ in range(FIRST_TIER_ROUNDS)]
            opened = [(await ask(session, url))[2] for _ in range(20)]
    return {
        "first_tier": first_tier,
        "breaker_closed_ms": round(statistics.median(closed), 2),
        "breaker_open_ms": round(statistics.median(opened), 2),
    }


async def main(requests: int) -> None:
    peers = [peer for peer in BETWEEN if peer != "nginx" or shutil.which("nginx")]
    rates = [await success_rate(requests, share, peer) for peer in peers for share in SHARES]
    tiers = [await first_byte(name) for name in FIRST_TIERS]
    for rate in rates:
        percent = f"{rate['share']:.0%}"
        print(
            f"{rate['peer']}: three upstreams, {percent} of connects fail, {percent} of answers are 503: "
            f"{rate['success_percent']} % of {requests} requests succeed with {rate['attempts_per_request']} "
            f"attempts each, of which {rate['upstream_hits_per_request']} reach an upstream"
        )
    print(f"\ntime to first byte, ms (connect timeout {CONNECT_S} s)   breaker closed   open")
    for tier in tiers:
        name = f"first tier {tier['first_tier']}"
        print(f"  {name:<31}{tier['breaker_closed_ms']:>28}{tier['breaker_open_ms']:>7}")
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    document = {"cpus": os.cpu_count(), "python": sys.version.split()[0], "rates": rates, "first_byte": tiers}
    (results / "retries.json").write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3000))
