"""The shipped edge configuration: a real nginx in front of real Headrace processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.kit.callers import Answer, Caller, ask, chat, post
from tests.kit.fleet import Fleet, fleet
from tests.kit.headrace import settings_for, until
from tests.kit.lab import Gate, hold, plays, response
from tests.kit.nginx import Nginx, authority, edge, replaced, trusting
from tests.kit.uploads import Receipt, form, head, receiving
from tests.kit.upstreams import DONE, END, HEAD, Call, Script, Scripted, chunk, event, scripted
from tests.kit.websockets import Talk, talking

pytestmark = pytest.mark.timeout(60)

#: Contract section 6, rule 4.
WITHIN_S = 1.0
COUNT = 5
SHORT = plays(HEAD + chunk(event("a")), chunk(DONE) + END)
#: HTTP/1.0 and buffering: what holds a stream back until its end, unless it says that it must not be.
LUMPING = {
    "    proxy_http_version 1.1;": "    proxy_http_version 1.0;",
    "    proxy_buffering off;": "    proxy_buffering on;",
}
OPENAI_ERROR = {"message", "type", "param", "code"}


class Chain:
    """A provider, Headrace nodes and the edge."""

    def __init__(self, nginx: Nginx, nodes: list[Fleet], upstream: Scripted) -> None:
        self.nginx = nginx
        self.nodes = nodes
        self.upstream = upstream

    async def ask(self, request: bytes) -> Answer:
        """One request on a connection of its own."""
        async with await self.nginx.connect() as caller, asyncio.timeout(20):
            return await caller.ask(request)

    async def called(self, count: int = 1) -> Call:
        await until(lambda: len(self.upstream.calls) >= count)
        return self.upstream.calls[-1]

    async def lines(self, count: int = 1) -> list[dict[str, Any]]:
        """The request lines of all nodes, once there are so many."""
        await until(lambda: len(self._lines()) >= count)
        assert len(self._lines()) == count
        return self._lines()

    def _lines(self) -> list[dict[str, Any]]:
        return [line for node in self.nodes for line in node.logged("request")]

    async def edge_line(self, request_id: str) -> dict[str, Any]:
        """nginx's line of this request; it writes a second late."""
        await until(lambda: any(line["request_id"] == request_id for line in self.nginx.logged()))
        (line,) = (line for line in self.nginx.logged() if line["request_id"] == request_id)
        return line


@asynccontextmanager
async def chain(
    tmp_path: Path, script: Script, *, count: int = 1, vary: Mapping[str, str] | None = None, **sections: Any
) -> AsyncIterator[Chain]:
    """With one node, both of the edge's addresses are its own."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(scripted(script))
        nodes = []
        for number in range(count):
            folder = tmp_path / f"node{number}"
            folder.mkdir()
            settings = settings_for(upstream.url, **sections)
            nodes.append(await stack.enter_async_context(fleet(folder, settings)))
        ports = [nodes[0].port, nodes[-1].port]
        nginx = await stack.enter_async_context(edge(tmp_path, ports, vary=vary))
        yield Chain(nginx, nodes, upstream)


def stepwise(gates: list[Gate]) -> Script:
    """Each event waits for its gate, the end for the last one."""
    *steps, last = gates
    events = [step for number, gate in enumerate(steps) for step in (gate, chunk(event(str(number))))]
    return plays(HEAD, *events, last, chunk(DONE) + END)


@asynccontextmanager
async def nobody() -> AsyncIterator[int]:
    """A port that refuses connections, and that nobody else can have meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


# ── streams ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_change_has_to_be_one() -> None:
    """The kit notices a place that the shipped file does not have, or has twice."""
    assert replaced("listen 443; x", {"443": "8443"}) == "listen 8443; x"
    for text in ("listen 80;", "443 443"):
        with pytest.raises(AssertionError, match="times in the shipped file"):
            replaced(text, {"443": "8443"})


async def test_events_are_not_lumped(tmp_path: Path) -> None:
    """Each event is here before the provider may send the next one."""
    *gates, last = every = [Gate() for _ in range(COUNT + 1)]
    async with (
        chain(tmp_path, stepwise(every)) as it,
        asyncio.timeout(20),
        await it.nginx.connect() as caller,
    ):
        await caller.send(chat())
        answer: Answer | None = None
        for number, gate in enumerate(gates):
            gate.open()
            answer = answer or await caller.head()
            assert await caller.piece(answer) == event(str(number))
        assert answer is not None
        last.open()
        await caller.rest(answer)
        assert answer.clean
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        assert answer.headers["x-headrace-upstream"] == "up"


@pytest.mark.parametrize("vary", [None, LUMPING], ids=["as shipped", "buffering on, HTTP/1.0"])
async def test_streams_over_http2(tmp_path: Path, vary: dict[str, str] | None) -> None:
    """An HTTP/2 client gets each event before the next one is sent; with buffering left on as well, because
    of the X-Accel-Buffering of the answer."""
    *gates, last = every = [Gate() for _ in range(COUNT + 1)]
    async with chain(tmp_path, stepwise(every), vary=vary) as it, asyncio.timeout(30), curl(it) as process:
        output = process.stdout
        assert output is not None
        for number, gate in enumerate(gates):
            gate.open()
            assert await output.readexactly(len(event("0"))) == event(str(number))
        last.open()
        assert await output.read() == DONE + b"HTTP/2 200"


@asynccontextmanager
async def curl(it: Chain) -> AsyncIterator[asyncio.subprocess.Process]:
    """Debian's curl, which writes a stream that it asks for over HTTP/2, then its version and status."""
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed: apt-get install curl")
    document = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    with authority().cert_pem.tempfile() as ca:
        process = await asyncio.create_subprocess_exec(
            *(program, "--disable", "--silent", "--show-error", "--no-buffer", "--http2", "--cacert", ca),
            *("--noproxy", "*", "--write-out", "HTTP/%{http_version} %{http_code}"),
            *("--json", json.dumps(document), f"https://localhost:{it.nginx.port}/v1/chat/completions"),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()


async def test_x_accel_buffering_is_what_does_it(tmp_path: Path) -> None:
    """With buffering on, a stream that carries the field is here at once; the same one without is not."""
    gate = Gate()
    bare = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
    marked = bare + b"X-Accel-Buffering: no\r\n\r\n"

    async def script(call: Call) -> None:
        await plays(marked if b"/marked" in call.head else bare + b"\r\n", event("a"), gate, event("b"))(call)
        call.close()

    async with (
        scripted(script) as node,
        edge(tmp_path, [node.port] * 2, vary=LUMPING) as nginx,
        asyncio.timeout(20),
        await nginx.connect() as plain,
        await nginx.connect() as other,
    ):
        await plain.send(get("/plain"))
        await until(lambda: len(node.calls) == 1)
        await other.send(get("/marked"))
        assert await other.piece(await other.head()) == event("a")
        # The plain one was sent before that; now it would be here if it came at all.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await plain.reader.readuntil(event("a"))
        gate.open()
        assert (await plain.rest(await plain.head())).body == event("a") + event("b")


# ── leaving ──────────────────────────────────────────────────────────────────────────────────────────────


def closes(caller: Caller) -> None:
    """FIN, as httpx, Node and curl do: without waiting for the other side's goodbye. nginx does not look into
    the TLS of a caller that it has nothing to read from: whoever only says goodbye inside it (asyncio's own
    close) stays until it really goes."""
    caller.writer.transport.abort()


@pytest.mark.alone
@pytest.mark.parametrize("steps", [(hold,), (HEAD, chunk(event("a")), hold)], ids=["waiting", "streaming"])
async def test_a_leaving_reader_stops_the_provider(tmp_path: Path, steps: tuple[Any, ...]) -> None:
    """Five times: the provider's request is closed within a second, and the log says why."""
    async with chain(tmp_path, plays(*steps)) as it, asyncio.timeout(40):
        for number in range(1, COUNT + 1):
            async with await it.nginx.connect() as caller:
                await caller.send(chat())
                call = await it.called(number)
                if len(steps) > 1:
                    await caller.piece(await caller.head())
                (Caller.reset if number % 2 else closes)(caller)
                async with asyncio.timeout(WITHIN_S):
                    await call.gone.wait()
        lines = await it.lines(COUNT)
        assert [line["reason"] for line in lines] == ["client_gone"] * COUNT
        await it.nodes[0].quiet()


@pytest.mark.alone
async def test_a_leaving_reader_over_http2(tmp_path: Path) -> None:
    """The same with a client that goes in the middle of an HTTP/2 stream."""
    script = plays(HEAD, chunk(event("a")), hold)
    async with chain(tmp_path, script) as it, asyncio.timeout(20), curl(it) as process:
        assert process.stdout is not None
        await process.stdout.readexactly(len(event("a")))
        process.kill()
        async with asyncio.timeout(WITHIN_S):
            await it.upstream.calls[0].gone.wait()
        assert [line["reason"] for line in await it.lines()] == ["client_gone"]


# ── nodes ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_connect_failures_go_to_the_other_node(tmp_path: Path) -> None:
    """A node that refuses connections costs nobody a request, and no request arrives twice."""
    async with (
        nobody() as dead,
        scripted(SHORT) as upstream,
        fleet(tmp_path, settings_for(upstream.url)) as node,
        edge(tmp_path, [dead, node.port]) as nginx,
    ):
        for _ in range(6):
            async with await nginx.connect() as caller, asyncio.timeout(10):
                answer = await caller.ask(chat())
            assert (answer.status, answer.clean) == (200, True)
        assert len(upstream.calls) == 6
        await until(lambda: len(nginx.logged()) == 6)
        assert any(line["node_status"] == "502, 200" for line in nginx.logged())


async def test_both_nodes_are_used(tmp_path: Path) -> None:
    """least_conn: of requests that last, each node gets its half."""
    async with chain(tmp_path, plays(HEAD, chunk(event("a")), hold), count=2) as it, asyncio.timeout(30):
        callers = []
        for _ in range(6):
            callers.append(await it.nginx.connect())
            await callers[-1].send(chat())
            await callers[-1].piece(await callers[-1].head())
        running = [len(await node.streams()) for node in it.nodes]
        for caller in callers:
            caller.reset()
    assert running == [3, 3]


async def test_a_killed_node_repeats_nothing(tmp_path: Path) -> None:
    """The node that has a POST dies: the caller is told, and the other node never sees it."""
    async with chain(tmp_path, hold_call, count=2) as it, asyncio.timeout(30):
        async with await it.nginx.connect() as caller:
            await caller.send(chat("x-request-id: once"))
            await it.called()
            (busy,) = [node for node in it.nodes if await node.streams()]
            os.kill(busy.pid, signal.SIGKILL)
            answer = await caller.rest(await caller.head())
        check_error(answer, 502, "upstream_unreachable")
        assert answer.headers["x-request-id"] == "once"
        assert len(it.upstream.calls) == 1
        # The other one takes all that comes now.
        (left,) = [node for node in it.nodes if node is not busy]
        it.upstream.script = SHORT
        for _ in range(4):
            assert (await it.ask(chat())).clean
        await until(lambda: len(left.logged("request")) == 4)


async def hold_call(call: Call) -> None:
    await call.watch()


@pytest.mark.parametrize(("method", "count"), [("POST", 1), ("GET", 2)])
async def test_what_is_sent_twice(tmp_path: Path, method: str, count: int) -> None:
    """A node that breaks off after it has read a request: a POST ends there, a GET is asked again."""

    async def breaks(call: Call) -> None:
        call.reset()

    async with (
        scripted(breaks) as one,
        scripted(breaks) as other,
        edge(tmp_path, [one.port, other.port]) as nginx,
    ):
        request = chat() if method == "POST" else get("/v1/models")
        async with await nginx.connect() as caller, asyncio.timeout(10):
            answer = await caller.ask(request)
    check_error(answer, 502, "upstream_unreachable")
    assert len(one.calls) + len(other.calls) == count


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────


def get(path: str, *fields: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: test", *fields, "", ""]).encode()


def check_error(answer: Answer, status: int, code: str) -> None:
    """JSON in OpenAI's shape, with an id."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error.keys() == OPENAI_ERROR
    assert error["code"] == code
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answer.headers["x-request-id"])
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


ERRORS: dict[str, tuple[bytes, int, str]] = {
    "no node": (chat(), 502, "upstream_unreachable"),
    "no node, GET": (get("/v1/models"), 502, "upstream_unreachable"),
    "no HTTP": (b"GARBAGE\r\n\r\n", 400, "bad_request"),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400, "bad_request"),
    "a later HTTP": (b"GET / HTTP/9.1\r\nHost: t\r\n\r\n", 505, "http_version_not_supported"),
    "TRACE": (get("/", method="TRACE"), 405, "method_not_allowed"),
    "coding": (get("/", "Transfer-Encoding: gzip", method="POST"), 501, "not_implemented"),
    "long target": (get("/" + "a" * 20_000), 414, "uri_too_long"),
    "long field": (get("/", "X: " + "a" * 20_000), 431, "headers_too_large"),
    "large": (get("/v1/x", f"Content-Length: {2**25 + 1}", method="POST"), 413, "request_too_large"),
    "large form": (get("/v1/files", f"Content-Length: {2**29 + 1}", method="POST"), 413, "request_too_large"),
    "the error page": (get("/.headrace/error"), 404, "not_found"),
    "metrics": (get("/metrics"), 404, "not_found"),
    "admin": (get("/admin/streams?x=1"), 404, "not_found"),
    "admin, kill": (get("/admin/streams/1-1", method="DELETE"), 404, "not_found"),
    "admin, escaped": (get("/v1/../%61dmin/keys"), 404, "not_found"),
    "admin, slashes": (get("//admin//keys"), 404, "not_found"),
    "admin, capitals": (get("/ADMIN/keys"), 404, "not_found"),
    "debug": (get("/debug/state"), 404, "not_found"),
    "probe": (get("/readyz"), 404, "not_found"),
}


async def test_error_pages(tmp_path: Path) -> None:
    """Whatever nginx itself has to say is JSON with a request id; both nodes are down."""
    async with nobody() as one, nobody() as other, edge(tmp_path, [one, other]) as nginx:
        for name, (request, status, code) in ERRORS.items():
            async with await nginx.connect() as caller, asyncio.timeout(10):
                answer = await caller.ask(request)
            try:
                check_error(answer, status, code)
            except AssertionError as error:
                raise AssertionError(f"{name}: {answer.status} {answer.body!r}") from error
            assert ("retry-after" in answer.headers) == (status == 502), name


async def test_error_pages_for_anthropic(tmp_path: Path) -> None:
    """On its routes the shape is Anthropic's, with the caller's own id in the body."""
    document = {"model": "m", "messages": []}
    async with nobody() as one, nobody() as other, edge(tmp_path, [one, other]) as nginx:
        for path in ("/v1/messages", "/messages/count_tokens"):
            async with await nginx.connect() as caller, asyncio.timeout(10):
                answer = await caller.ask(post(path, document, "x-request-id: mine"))
            assert answer.status == 502
            assert answer.json() == {
                "type": "error",
                "error": {"type": "api_error", "message": "The service cannot be reached, retry shortly."},
                "request_id": "mine",
            }
            assert answer.headers["request-id"] == "mine"


async def test_errors_of_others_pass(tmp_path: Path) -> None:
    """A provider's error and Headrace's own are not replaced by pages of the edge."""
    async with chain(tmp_path, plays(response(503, b'{"error":{"message":"busy"}}'))) as it:
        provider = await it.ask(chat())
        assert (provider.status, provider.body) == (503, b'{"error":{"message":"busy"}}')
        ours = await it.ask(chat(model="unknown"))
        check_error(ours, 404, "model_not_found")


async def test_too_many_connections(tmp_path: Path) -> None:
    """Past the limit of an address: 429 in JSON; a place that comes free can be taken."""
    vary = {"limit_conn headrace_callers 512;": "limit_conn headrace_callers 2;"}
    async with (
        chain(tmp_path, plays(HEAD, chunk(event("a")), hold), vary=vary) as it,
        asyncio.timeout(20),
        await it.nginx.connect() as one,
        await it.nginx.connect() as two,
    ):
        for caller in (one, two):
            await caller.send(chat())
            await caller.piece(await caller.head())
        refused = await it.ask(chat())
        check_error(refused, 429, "too_many_in_flight")
        assert refused.headers["retry-after"] == "1"
        one.reset()
        await it.upstream.calls[0].gone.wait()
        it.upstream.script = SHORT
        async with asyncio.timeout(5):
            while (await it.ask(chat())).status == 429:
                await asyncio.sleep(0.01)


async def test_plain_http_is_refused(tmp_path: Path) -> None:
    """Neither served nor redirected: a key that was sent in the clear must not work."""
    async with nobody() as one, nobody() as other, edge(tmp_path, [one, other]) as nginx:
        answer = await ask(nginx.ports[1], chat("Authorization: Bearer canary"))
    check_error(answer, 400, "bad_request")
    assert "location" not in answer.headers


# ── what the node is told ────────────────────────────────────────────────────────────────────────────────


async def test_one_id_everywhere(tmp_path: Path) -> None:
    """The caller's id, or the edge's, is in the answer, in both logs, and at the provider; an id that could
    do harm is in none of them."""
    async with chain(tmp_path, SHORT) as it, asyncio.timeout(30):
        chosen = [
            (await it.ask(chat(*fields))).headers["x-request-id"]
            for fields in (
                ("x-request-id: own.id-1",),
                (),
                ('x-request-id: a"b',),
                ("x-request-id: " + "a" * 65,),
            )
        ]
        assert chosen[0] == "own.id-1"
        assert len(set(chosen)) == 4
        assert all(re.fullmatch("[0-9a-f]{32}", minted) for minted in chosen[1:])
        assert [line["request_id"] for line in await it.lines(4)] == chosen
        sent = [re.search(rb"(?i)\r\nx-request-id: ([^\r]*)", call.head) for call in it.upstream.calls]
        assert [found and found[1].decode() for found in sent] == chosen
        line = await it.edge_line("own.id-1")
        body = it.nodes[0].logged("request")[0]
        assert (line["status"], line["whole"], line["protocol"]) == (200, "OK", "HTTP/1.1")
        assert (line["method"], line["path"]) == ("POST", "/v1/chat/completions")
        assert line["bytes_out"] >= body["bytes_out"] > 0


async def test_the_log_tells_no_secrets(tmp_path: Path) -> None:
    """Neither queries nor credentials, also of requests that get an error page; the method stays its own."""
    async with nobody() as one, nobody() as other, edge(tmp_path, [one, other]) as nginx:
        fields = ("Authorization: Bearer canary", "x-api-key: canary", "x-request-id: here")
        async with await nginx.connect() as caller, asyncio.timeout(10):
            await caller.ask(chat(*fields, path="/v1/chat/completions?key=canary"))
        await until(lambda: len(nginx.logged()) == 1)
        (line,) = nginx.logged()
    assert (line["request_id"], line["method"], line["status"]) == ("here", "POST", 502)
    assert line["path"] == "/v1/chat/completions"
    assert "canary" not in json.dumps(line)


async def test_who_calls(tmp_path: Path) -> None:
    """Headrace sees the caller's address; what the caller says about it is not believed."""
    async with chain(tmp_path, SHORT) as it, asyncio.timeout(20):
        for address in ("127.0.0.2", "127.0.0.3"):
            async with await it.nginx.connect(source=address) as caller:
                assert (await caller.ask(chat("X-Forwarded-For: 192.0.2.1"))).status == 200
        assert [line["client_ip"] for line in await it.lines(2)] == ["127.0.0.2", "127.0.0.3"]


async def test_connections_to_the_node_are_kept(tmp_path: Path) -> None:
    """Requests of many callers share a few connections to a node."""

    async def counts(call: Call) -> None:
        await call.send(response(200, b"{}"))

    async with scripted(counts) as node, edge(tmp_path, [node.port] * 2) as nginx:
        for _ in range(20):
            async with await nginx.connect() as caller, asyncio.timeout(10):
                assert (await caller.ask(chat())).status == 200
        assert len(node.calls) == 20
        # One for each of nginx's workers and each address.
        assert node.connections <= 2 * (os.cpu_count() or 1)


async def test_websockets(tmp_path: Path) -> None:
    """An upgrade passes where Headrace has WebSockets; elsewhere the node is not even asked for one."""

    async def node(call: Call) -> None:
        if b"upgrade: websocket" not in call.head.lower():
            return await call.send(response(200, b"{}"))
        await call.send(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        with suppress(asyncio.IncompleteReadError):
            while True:
                await call.send((await call.reader.readexactly(4)).upper())

    fields = ("Connection: Upgrade", "Upgrade: websocket")
    async with scripted(node) as upstream, edge(tmp_path, [upstream.port] * 2) as nginx:
        for path in ("/v1/realtime?model=m", "/v1/responses", "/realtime"):
            async with await nginx.connect() as caller, asyncio.timeout(10):
                await caller.send(get(path, *fields))
                assert (await caller.head()).status == 101
                for word in (b"ping", b"pong"):
                    await caller.send(word)
                    assert await caller.reader.readexactly(4) == word.upper()
        for path, upgrade in (
            ("/v1/chat/completions", "websocket"),
            ("/v1/responses", "h2c"),
            ("/", "websocket"),
        ):
            async with await nginx.connect() as caller, asyncio.timeout(10):
                answer = await caller.ask(get(path, "Connection: Upgrade", f"Upgrade: {upgrade}"))
            assert answer.status == 200
            head_lines = upstream.calls[-1].head.lower()
            assert b"\r\nupgrade:" not in head_lines
            assert b"\r\nconnection:" not in head_lines


async def test_a_session_through_the_edge(tmp_path: Path) -> None:
    """A WebSocket of an SDK's kind through nginx and Headrace to a provider; its end arrives as well."""

    async def echo(talk: Talk) -> None:
        for _ in range(3):
            await talk.ws.send_str(await talk.receive())
        await talk.until_closed()

    models = {"m": {"upstreams": ["up"], "websocket": True}}
    async with (
        talking(echo) as upstream,
        fleet(tmp_path, settings_for(upstream.url, models=models)) as node,
        edge(tmp_path, [node.port] * 2) as nginx,
        asyncio.timeout(20),
        aiohttp.ClientSession() as session,
    ):
        url = f"https://localhost:{nginx.port}/v1/realtime?model=m"
        async with session.ws_connect(url, ssl=trusting(), headers={"x-request-id": "talk"}) as ws:
            for text in ("one", "x" * 100_000, "three"):
                await ws.send_str(text)
                assert await ws.receive_str() == text
        await upstream.talks[0].gone.wait()
        await until(lambda: len(node.logged("request")) == 1)
        (line,) = node.logged("request")
        assert (line["request_id"], line["status"], line["reason"]) == ("talk", 101, "complete")


# ── uploads ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_uploads_are_not_stored(tmp_path: Path) -> None:
    """The provider has the first megabytes of a form before the caller sends the rest; 24 MB arrive whole."""
    body = form(24 << 20)
    half = len(body) // 2
    seen = asyncio.Event()

    async def takes(receipt: Receipt) -> None:
        pieces = []
        while data := await receipt.piece():
            pieces.append(data)
            if receipt.received >= half // 2:
                seen.set()
        receipt.body = b"".join(pieces)
        await receipt.send(response(200, b'{"id":"file-1"}'))

    async with (
        receiving(takes) as upstream,
        fleet(tmp_path, settings_for(upstream.url)) as node,
        edge(tmp_path, [node.port] * 2) as nginx,
        await nginx.connect() as caller,
        asyncio.timeout(30),
    ):
        await caller.send(head(len(body)) + body[:half])
        await seen.wait()
        await caller.send(body[half:])
        answer = await caller.rest(await caller.head())
        assert (answer.status, answer.json()) == (200, {"id": "file-1"})
        assert upstream.calls[0].body == body


async def test_prompts_are_taken_whole_first(tmp_path: Path) -> None:
    """A slow caller holds no place at a node: it is asked once the body is complete."""
    request = chat()
    async with chain(tmp_path, SHORT) as it, asyncio.timeout(20), await it.nginx.connect() as slow:
        await slow.send(request[:-5])
        for _ in range(3):
            assert (await it.ask(chat())).clean
        assert await it.nodes[0].streams() == []
        await slow.send(request[-5:])
        assert (await slow.rest(await slow.head())).clean
