"""The data listener at socket level: routes, framing, limits, what crosses in which direction.

The table of bad inputs is in tests/hostile.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from proxy import downstream
from proxy.endpoints import TABLE, Endpoint, Model
from proxy.errors import REFUSALS
from tests.kit.callers import Answer, Caller, ask, chat, post
from tests.kit.headrace import Headrace, running, settings_for, until
from tests.kit.upstreams import DONE, END, HEAD, Call, Scripted, chunk, event, scripted

pytestmark = pytest.mark.timeout(30)

OK = b'{"id":"x","object":"chat.completion","choices":[]}'
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


async def answer_ok(call: Call) -> None:
    """A stream if one was asked for, else a small JSON; each answer says how many requests came before."""
    try:
        stream = json.loads(call.body).get("stream") is True
    except (ValueError, AttributeError):
        stream = False
    if stream:
        await call.send(HEAD + chunk(event("hello")) + chunk(DONE) + END)
    else:
        await call.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (len(OK), OK)
        )


@asynccontextmanager
async def both(**sections: Any) -> AsyncIterator[tuple[Headrace, Scripted]]:
    """A Headrace before a scripted upstream that always answers."""
    async with (
        scripted(answer_ok) as upstream,
        running(settings_for(upstream.url, **sections)) as headrace,
    ):
        yield headrace, upstream


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Headrace, Scripted]]:
    async with both() as made:
        yield made


Pair = tuple[Headrace, Scripted]


def plain(*headers: str, path: str = "/v1/chat/completions", version: str = "1.1", **fields: Any) -> bytes:
    """A request for a whole answer."""
    return post(path, {"model": "m", "messages": [], **fields}, *headers, version=version)


def with_body(body: bytes, *headers: str) -> bytes:
    return post("/v1/chat/completions", body, *headers)


async def ended(caller: Caller) -> bool:
    """Does Headrace close this connection?"""
    try:
        async with asyncio.timeout(5):
            return await caller.reader.read(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


async def check_refusal(
    pair: Pair, answer: Answer, *, status: int | tuple[int, ...], code: str | None = None, echo: bytes = b""
) -> None:
    """The invariant of every refusal: one JSON error with ids, one log line, one count, nothing upstream."""
    headrace, upstream = pair
    statuses = (status,) if isinstance(status, int) else status
    assert answer.status in statuses, answer.body
    assert answer.headers["content-type"].startswith("application/json")
    document = answer.json()
    error = document["error"]
    if document.get("type") != "error":
        assert set(error) == {"message", "type", "param", "code"}
        expected = code or (REFUSALS[answer.status][0] if answer.status in REFUSALS else error["code"])
        assert error["code"] == expected
    chosen = answer.headers["x-request-id"]
    assert REQUEST_ID.fullmatch(chosen)
    assert answer.headers["request-id"] == chosen
    assert answer.headers["server"] == "headrace"
    assert answer.clean
    assert not echo or echo not in answer.body
    await until(lambda: len(headrace.log_lines()) == 1, describe=lambda: str(headrace.log_lines()))
    line = headrace.log_lines()[0]
    assert (line["request_id"], line["status"], line["error"]) == (chosen, answer.status, error["code"]) or (
        document.get("type") == "error"
    )
    assert line["reason"] == ("internal_error" if answer.status == 500 else line["reason"])
    counted = {
        name: value
        for name, value in (await headrace.metrics()).items()
        if name.startswith("headrace_requests_total") and f'code="{answer.status}"' in name
    }
    assert sum(counted.values()) == 1
    assert upstream.calls == []
    if echo:
        assert echo not in b"".join([*headrace.sink.lines, *headrace.sink._pending])
    await headrace.quiet()


async def refused(
    pair: Pair, request: bytes, *, status: int | tuple[int, ...], code: str | None = None, close: bool = False
) -> Answer:
    async with await Caller.connect(pair[0].port) as caller:
        async with asyncio.timeout(10):
            answer = await caller.ask(request)
            await check_refusal(pair, answer, status=status, code=code)
            if close:
                # The parser's refusals go out as HTTP/1.0, which needs no `Connection: close`.
                assert answer.headers.get("connection", "close").lower() == "close"
                assert await ended(caller)
    return answer


async def test_a_fault_of_our_own(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever breaks in here: 500, nothing of it is shown, the log says where; the next one is served."""
    with monkeypatch.context() as broken:
        broken.setattr(pair[0].server.core, "authenticator", "canary")
        async with await Caller.connect(pair[0].port) as caller, asyncio.timeout(10):
            answer = await caller.ask(plain())
        await check_refusal(pair, answer, status=500, code="internal_error", echo=b"canary")
    assert (await ask(pair[0].port, plain())).status == 200
    said: list[dict[str, Any]] = []

    def told() -> bool:  # by the log's own thread
        said.extend(json.loads(text) for text in capfd.readouterr().out.splitlines())
        return bool(said)

    await until(told)
    assert (said[0]["event"], said[0]["error"]) == ("internal_error", "AttributeError")
    assert said[0]["request_id"] == answer.headers["x-request-id"]
    assert re.search(r"middleware/auth\.py:\d+ identify$", said[0]["where"][-1])
    assert "no attribute" not in str(said)


async def test_aiohttps_own_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its private names have changed it serves by itself: requests, a reload, a drain."""
    monkeypatch.setattr(web.Request, "ATTRS", web.Request.ATTRS - {"_match_info"})
    async with both() as (headrace, upstream):
        server = headrace.server
        assert server._runner is not None
        assert server._runner.listener is None
        for _ in range(2):
            assert (await ask(headrace.port, plain())).status == 200
            await server.prepare(server.core.config)
            server.commit()
        await server.drain(5, asyncio.Event())
        assert len(upstream.calls) == 2
        await headrace.quiet()


# ── the allow-list ───────────────────────────────────────────────────────────────────────────────────────


def concrete(endpoint: Endpoint) -> str:
    name = endpoint.name.replace("{file}", "stream-client.js")
    return name.replace("{id}", "obj-1").replace("{rest}", "obj-1/part-2")


ROWS = [
    (endpoint, method)
    for endpoint in TABLE
    if not endpoint.asks and not endpoint.websocket
    for method in endpoint.methods
]


@pytest.mark.parametrize(
    ("endpoint", "method"), ROWS, ids=[f"{method} {endpoint.name}" for endpoint, method in ROWS]
)
async def test_every_row_is_served(pair: Pair, endpoint: Endpoint, method: str) -> None:
    """Each row of the table is answered, with and without /v1; the upstream sees its path below base_url."""
    headrace, upstream = pair
    path = concrete(endpoint)
    paths = [path, path.removeprefix("/v1")] if path.startswith("/v1/") else [path]
    if endpoint.name == "/v1/models/{rest}":
        paths = ["/v1/models/m", "/models/m"]
    for number, each in enumerate(paths, 1):
        if method == "POST":
            body = {"model": "m"} if endpoint.model is not Model.NONE else {}
            request = post(f"{each}?a=%20b", body)
        else:
            request = f"{method} {each}?a=%20b HTTP/1.1\r\nHost: test\r\n\r\n".encode()
        async with await Caller.connect(headrace.port) as caller:
            async with asyncio.timeout(10):
                await caller.send(request)
                answer = await caller.head()
                if method != "HEAD":
                    await caller.rest(answer)
        assert answer.status == 200, answer.body
        if endpoint.ours:
            assert upstream.calls == []
        else:
            assert len(upstream.calls) == number
            seen = upstream.calls[-1].head.split(b"\r\n")[0].decode()
            assert seen == f"{method} {path}?a=%20b HTTP/1.1"
    await until(lambda: len(headrace.log_lines()) == len(paths))
    assert {line["route"] for line in headrace.log_lines()} == {endpoint.name}
    assert {line["reason"] for line in headrace.log_lines()} == {"complete"}


UNKNOWN = [
    "/static/",
    "/static/playground.html",
    "/static/../__init__.py",
    "/static/%2e%2e/__init__.py",
    "/v1/static/playground.js",
    "/static/{file}",
    "/v1",
    "/v1/",
    "/v1/../admin",
    "/v1/%2e%2e/x",
    "/v1/files/..",
    "/v1/files/../models",
    "/v1/files/%2e%2e/%2e%2e/admin",
    "/v1/files/a%2fb",
    "/v1/files/a%2Fb",
    "/v1/files/a%5cb",
    "/v1/files/a%00b",
    "/v1/files/a%0d%0ab",
    "/v1/files/a%252fb",
    "/v1/files/a%",
    "/v1/files/a%zz",
    "/v1/files//b",
    "/v1/files/",
    "/v1//chat/completions",
    "/v1/chat/completions/",
    "/v1/chat/completions%20",
    "/V1/chat/completions",
    "/v1/v1/chat/completions",
    "/v1/chat/%63ompletions",
    "/v1/organization/admin_api_keys",
    "/v1/realtime",
    "/metrics",
    "/admin/streams",
    "/debug/state",
    "//evil.test/v1/models",
    "//evil.test/v1/chat/completions",
    "///v1/models",
    "/%5cevil",
    "/v1/models/../chat/completions",
    "/v1/chat/completions;x=1",
    "/v1/files/" + "/".join("abcdefgh"),
]


@pytest.mark.parametrize("path", UNKNOWN)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_unknown_paths(pair: Pair, method: str, path: str) -> None:
    """What is not in the table is a JSON 404; nothing is normalised into a match."""
    body = b'{"model":"m"}'
    request = (
        f"{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    answer = await refused(pair, request, status=404)
    assert answer.json()["error"]["code"] in ("not_found", "model_not_found")


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "DELETE", "GET"])
async def test_wrong_method(pair: Pair, method: str) -> None:
    """A known path with another method is no row of the table."""
    await refused(pair, f"{method} /v1/embeddings HTTP/1.1\r\nHost: test\r\n\r\n".encode(), status=404)


# ── request lines, Host, framing ─────────────────────────────────────────────────────────────────────────

BODY = b'{"model":"m"}'


def line(text: str, *fields: str, body: bytes = b"") -> bytes:
    return ("\r\n".join([text, *fields]) + "\r\n\r\n").encode("latin-1") + body


CHAT = "POST /v1/chat/completions HTTP/1.1"
JSON_TYPE = "Content-Type: application/json"
LENGTH = f"Content-Length: {len(BODY)}"


@pytest.mark.parametrize("version", ["HTTP/0.9", "HTTP/1.9", "HTTP/2.0", "HTTP/3.0"])
async def test_refusals_are_in_our_version(pair: Pair, version: str) -> None:
    """A status line never claims a version that we do not speak (RFC 9110 2.5)."""
    async with await Caller.connect(pair[0].port) as caller, asyncio.timeout(5):
        await caller.send(line(f"GET /v1/models {version}", "Host: t"))
        assert (await caller.reader.readuntil(b"\r\n")).startswith((b"HTTP/1.1 505 ", b"HTTP/1.1 400 "))


async def test_http_10(pair: Pair) -> None:
    """HTTP/1.0 without Host is served, unchunked."""
    answer = await ask(pair[0].port, line("POST /v1/chat/completions HTTP/1.0", JSON_TYPE, LENGTH, body=BODY))
    assert answer.status == 200
    assert answer.body == OK
    assert "transfer-encoding" not in answer.headers


@pytest.mark.parametrize("host", ["a", "a:80", "a.b:65535", "[::1]", "[::1]:8080", "127.0.0.1:1", "a-b_c.d"])
async def test_good_hosts(pair: Pair, host: str) -> None:
    """Any well-formed Host is fine: names are nginx's business."""
    answer = await ask(pair[0].port, line(CHAT, f"Host: {host}", JSON_TYPE, LENGTH, body=BODY))
    assert answer.status == 200


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
async def test_upgrade_is_declined(pair: Pair, upgrade: str) -> None:
    """An Upgrade on an ordinary request is served without one, and the connection ends."""
    async with await Caller.connect(pair[0].port) as caller:
        answer = await caller.ask(
            plain(f"Upgrade: {upgrade}", "Connection: Upgrade, X-Internal", "X-Internal: 1")
        )
        assert answer.status == 200
        assert answer.body == OK
        assert await ended(caller)
    head = pair[1].calls[0].head.lower()
    assert b"upgrade" not in head
    assert b"x-internal" not in head
    assert b"authorization: bearer upstream-secret" in head


@pytest.mark.parametrize("named", ["authorization", "content-length", "host", "x-request-id", "via"])
async def test_connection_cannot_remove_our_fields(pair: Pair, named: str) -> None:
    """`Connection: authorization` takes nothing away that we add."""
    answer = await ask(pair[0].port, plain(f"Connection: {named}"))
    assert answer.status == 200
    head = pair[1].calls[0].head.lower()
    for field in (
        b"authorization: bearer upstream-secret",
        b"content-length: ",
        b"host: ",
        b"x-request-id: ",
    ):
        assert head.count(b"\r\n" + field) == 1


async def test_chunked_body_and_trailers(pair: Pair) -> None:
    """A chunked body is re-framed with a length; extensions and trailers go nowhere."""
    body = b'5;ext="x"\r\n{"mod\r\n8\r\nel":"m"}\r\n0\r\nAuthorization: Bearer evil\r\nHost: evil\r\n\r\n'
    answer = await ask(
        pair[0].port, line(CHAT, "Host: t", JSON_TYPE, "Transfer-Encoding: chunked", body=body)
    )
    assert answer.status == 200
    seen = pair[1].calls[0]
    assert seen.body == BODY
    assert b"evil" not in seen.head
    assert b"chunked" not in seen.head.lower()


async def test_trailers_are_nobody_elses(pair: Pair) -> None:
    """aiohttp's parser tells the last trailer as the first field of the next request on the connection, so
    there is none: neither one that is sent after the answer nor one that came together with the trailers."""
    trailers = "0\r\nx-request-id: evil\r\n\r\n"
    chunked = line(
        CHAT,
        "Host: t",
        JSON_TYPE,
        "Transfer-Encoding: chunked",
        body=b"%x\r\n%b\r\n" % (len(BODY), BODY) + trailers.encode(),
    )
    following = line("GET /v1/models HTTP/1.1", "Host: t")
    for sent in (chunked, chunked + following):
        async with await Caller.connect(pair[0].port) as caller:
            answer = await caller.ask(sent)
            assert answer.status == 200
            assert answer.headers["connection"] == "close"
            assert await ended(caller)
    await pair[0].quiet()
    assert [entry["request_id"] != "evil" for entry in pair[0].log_lines()] == [True, True]
    assert len(pair[1].calls) == 2


async def test_a_chunk_that_is_none() -> None:
    """After a good one: aiohttp's parser does not tell whoever reads the body, the timer ends it."""
    async with both(timeouts={"body": 0.5}) as pair, await Caller.connect(pair[0].port) as caller:
        await caller.send(line(CHAT, "Host: t", JSON_TYPE, "Transfer-Encoding: chunked", body=b"1\r\n{\r\n"))
        await until(lambda: pair[0].state["buffered_bytes"] == 1)
        async with asyncio.timeout(10):
            await check_refusal(pair, await caller.ask(b"nonsense\r\n"), status=408)
        assert await ended(caller)


async def test_chunks_in_http_1_0(pair: Pair) -> None:
    """They are not in that version: where such a body ends is a matter of opinion (RFC 9112 6.1)."""
    await refused(
        pair,
        line(
            CHAT.replace("1.1", "1.0"), "Host: t", JSON_TYPE, "Transfer-Encoding: chunked", body=b"0\r\n\r\n"
        ),
        status=400,
        close=True,
    )


# ── Expect ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_100_continue_when_the_body_is_wanted(pair: Pair) -> None:
    """100 is said when the body is read, then the real answer comes."""
    async with await Caller.connect(pair[0].port) as caller:
        await caller.send(line(CHAT, "Host: t", JSON_TYPE, LENGTH, "Expect: 100-continue"))
        async with asyncio.timeout(5):
            assert await caller.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            await caller.send(BODY)
            answer = await caller.rest(await caller.head())
    assert (answer.status, answer.body) == (200, OK)
    assert b"expect" not in pair[1].calls[0].head.lower()


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (line(CHAT, "Host: t", JSON_TYPE, "Content-Length: 999999999", "Expect: 100-continue"), 413),
        (line("POST /v1/nothing HTTP/1.1", "Host: t", LENGTH, "Expect: 100-continue"), 404),
        (line(CHAT, "Host: t", "Content-Type: text/plain", LENGTH, "Expect: 100-continue"), 415),
        (line(CHAT, "Host: t", JSON_TYPE, "Content-Encoding: gzip", LENGTH, "Expect: 100-continue"), 415),
    ],
)
async def test_no_100_before_a_refusal(pair: Pair, request_head: bytes, status: int) -> None:
    """Who is refused by the head alone is never asked for the body."""
    await refused(pair, request_head, status=status)


# ── bodies ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "Application/JSON",
        "application/json;charset=UTF-8",
        "application/json; charset=utf-8",
    ],
)
async def test_json_content_types(pair: Pair, kind: str) -> None:
    """The spellings of JSON that callers use."""
    answer = await ask(pair[0].port, line(CHAT, "Host: t", f"Content-Type: {kind}", LENGTH, body=BODY))
    assert answer.status == 200


async def test_413_reaches_a_caller_that_still_sends() -> None:
    """The refusal is read even by a caller that goes on writing its large body."""
    async with both(max_body_bytes=1000) as pair, await Caller.connect(pair[0].port) as caller:
        body = b" " * 4_000_000
        sending = asyncio.ensure_future(
            caller.send(line(CHAT, "Host: t", JSON_TYPE, f"Content-Length: {len(body)}") + body)
        )
        async with asyncio.timeout(10):
            answer = await caller.rest(await caller.head())
            await asyncio.gather(sending, return_exceptions=True)
        await check_refusal(pair, answer, status=413)


async def test_body_of_exactly_the_limit() -> None:
    """The limit itself is allowed."""
    body = b'{"model":"m"}'.ljust(1000)
    async with both(max_body_bytes=1000) as (headrace, upstream):
        assert (await ask(headrace.port, with_body(body))).status == 200
        assert upstream.calls[0].body == body


@pytest.mark.parametrize("size", [0, 900, 1000, 1001, 1200], ids=str)
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_a_body_that_came_with_the_head_and_one_that_came_later(chunked: bool, size: int) -> None:
    """Both are judged alike, by the limit of each and by that of all, and both are given back."""
    body = BODY.ljust(size) if size else b""
    head = line(
        CHAT, "Host: t", JSON_TYPE, "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    )
    whole = b"%x\r\n%b\r\n0\r\n\r\n" % (size, body) if size else b"0\r\n\r\n"
    sent = whole if chunked else body
    async with both(max_body_bytes=1000, max_buffered_bytes=950) as (headrace, upstream):
        at_once = await ask(headrace.port, head + sent)
        async with await Caller.connect(headrace.port) as caller, asyncio.timeout(5):
            await caller.send(head)
            await asyncio.sleep(0.02)
            await caller.send(sent[:700])
            await asyncio.sleep(0.02)
            await caller.send(sent[700:])
            later = await caller.rest(await caller.head())
        assert at_once.status == later.status == {900: 200, 1000: 503}.get(size, 413 if size else 400)
        assert [call.body for call in upstream.calls] == [body] * (2 if size == 900 else 0)
        assert headrace.state["buffered_bytes"] == 0


async def test_all_bodies_over_their_limit() -> None:
    """Past max_buffered_bytes a request is told 503 overloaded; freed bytes serve the next one."""
    async with both(max_body_bytes=1000, max_buffered_bytes=1500) as pair:
        headrace, _ = pair
        async with await Caller.connect(headrace.port) as first:
            await first.send(
                line(CHAT, "Host: t", JSON_TYPE, "Content-Length: 1000") + b'{"model":"m"'.ljust(900)
            )
            await until(lambda: headrace.state["buffered_bytes"] == 900)
            answer = await ask(headrace.port, with_body(BODY.ljust(800)))
            assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
            assert int(answer.headers["retry-after"]) >= 1
            await first.send(b"}".ljust(100))
            async with asyncio.timeout(5):
                assert (await first.rest(await first.head())).status == 200
        assert (await ask(headrace.port, with_body(BODY.ljust(800)))).status == 200
        assert headrace.state["buffered_bytes"] == 0


async def test_body_dribble() -> None:
    """A body that does not come in time is 408, however often a byte of it comes."""
    async with both(timeouts={"body": 0.3}) as pair, await Caller.connect(pair[0].port) as caller:
        await caller.send(line(CHAT, "Host: t", JSON_TYPE, "Content-Length: 1000"))

        async def dribble() -> None:
            try:
                for _ in range(200):
                    await caller.send(b" ")
                    await asyncio.sleep(0.02)
            except ConnectionError:
                pass

        dribbling = asyncio.ensure_future(dribble())
        async with asyncio.timeout(3):
            answer = await caller.rest(await caller.head())
            await check_refusal(pair, answer, status=408, code="request_timeout")
            assert await ended(caller)
        dribbling.cancel()


@pytest.mark.parametrize(
    "start", [b"", b"POST /v1/chat", b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nX-A: "]
)
async def test_head_dribble(start: bytes) -> None:
    """A head that does not come in time is 408 if anything came, else a close."""
    async with both(timeouts={"header": 0.3}) as pair, await Caller.connect(pair[0].port) as caller:
        await caller.send(start)
        async with asyncio.timeout(3):
            raw = await caller.reader.read(-1)
        if start:
            assert raw.startswith(b"HTTP/1.1 408 ")
            assert b'"code":"request_timeout"' in raw
            await until(lambda: len(pair[0].log_lines()) == 1)
        else:
            assert raw == b""
        assert pair[1].calls == []


async def test_second_head_dribble() -> None:
    """The deadline counts for the second request of a connection too."""
    async with both(timeouts={"header": 0.3}) as pair, await Caller.connect(pair[0].port) as caller:
        assert (await caller.ask(plain())).status == 200
        await caller.send(b"POST /v1/chat/compl")
        async with asyncio.timeout(3):
            raw = await caller.reader.read(-1)
        assert raw.startswith(b"HTTP/1.1 408 ")
        assert len(pair[1].calls) == 1


async def test_idle_connections_end_by_keepalive_only() -> None:
    """Between two requests the header deadline does not count, the keep-alive time does."""
    async with (
        both(timeouts={"header": 0.2, "keepalive": 1}) as (headrace, _),
        await Caller.connect(headrace.port) as caller,
    ):
        loop = asyncio.get_running_loop()
        assert (await caller.ask(plain())).status == 200
        before = loop.time()
        async with asyncio.timeout(5):
            assert await caller.reader.read(-1) == b""
        assert loop.time() - before > 0.8


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_lone_surrogate_elsewhere(pair: Pair) -> None:
    """Neither is a lone surrogate that is not ours to read a crash: refused or passed on untouched."""
    body = b'{"model":"m","user":"\\ud800"}'
    answer = await ask(pair[0].port, with_body(body))
    assert answer.status in (200, 400)
    assert [call.body for call in pair[1].calls] == ([body] if answer.status == 200 else [])


@pytest.mark.parametrize("path", ["/v1/messages", "/messages"])
async def test_refusals_speak_the_dialect(pair: Pair, path: str) -> None:
    """On the Anthropic routes an error has Anthropic's shape."""
    answer = await ask(pair[0].port, post(path, b"[]"))
    assert answer.status == 400
    document = answer.json()
    assert document["type"] == "error"
    assert document["error"]["type"] == "invalid_request_error"
    assert document["request_id"] == answer.headers["request-id"]
    assert pair[1].calls == []


# ── request ids ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("offered", ["a", "A-b_c.9", "x" * 64])
async def test_request_id_accepted(pair: Pair, offered: str) -> None:
    """A harmless id is kept: back to the caller, up to the provider, into the log."""
    answer = await ask(pair[0].port, chat(f"X-Request-ID: {offered}"))
    assert answer.headers["x-request-id"] == answer.headers["request-id"] == offered
    assert f"x-request-id: {offered}\r\n".encode() in pair[1].calls[0].head
    await until(lambda: len(pair[0].log_lines()) == 1)
    assert pair[0].log_lines()[0]["request_id"] == offered


@pytest.mark.parametrize(
    "offered",
    ["", "x" * 65, "x" * 1000, "a b", "a%0d%0ab", "ü", "\U0001f600", "a;b", '"a"', "${jndi:ldap://x}"],
)
async def test_request_id_replaced(pair: Pair, offered: str) -> None:
    """Any other id is replaced, and appears nowhere."""
    answer = await ask(pair[0].port, chat(f"X-Request-ID: {offered}"))
    chosen = answer.headers["x-request-id"]
    assert REQUEST_ID.fullmatch(chosen)
    assert chosen != offered
    head = pair[1].calls[0].head
    assert head.count(b"x-request-id") == 1
    assert b"x-request-id: " + chosen.encode() in head
    await until(lambda: len(pair[0].log_lines()) == 1)
    assert pair[0].log_lines()[0]["request_id"] == chosen


async def test_request_ids_differ(pair: Pair) -> None:
    """Every request has its own."""
    async with await Caller.connect(pair[0].port) as caller:
        seen = {(await caller.ask(plain())).headers["x-request-id"] for _ in range(5)}
    assert len(seen) == 5


# ── what crosses ─────────────────────────────────────────────────────────────────────────────────────────

DROPPED = [
    "Connection: keep-alive, X-Named",
    "X-Named: gone",
    "Keep-Alive: timeout=5",
    "Proxy-Connection: keep-alive",
    "TE: trailers",
    "Trailer: X-T",
    "Proxy-Authorization: Basic gone",
    "Authorization: Bearer gone",
    "X-Api-Key: gone",
    "API-Key: gone",
    "x-goog-api-key: gone",
    "Cookie: session=gone",
    "X_Api_Key: gone",
    "X_Custom: gone",
    "Forwarded: for=gone",
    "X-Forwarded-For: 192.0.2.1",
    "X-Forwarded-Host: gone",
    "X-Forwarded-Proto: gone",
    "X-Forwarded-Port: 1",
    "X-Real-IP: 192.0.2.1",
    "Via: 1.1 gone",
    "OpenAI-Organization: gone",
    "OpenAI-Project: gone",
    "Accept-Encoding: gzip",
]


def fields_of(call: Call) -> list[tuple[str, str]]:
    lines = call.head.decode("latin-1").split("\r\n")[1:]
    return [
        (name.lower(), value.strip()) for name, _, value in (each.partition(":") for each in lines if each)
    ]


@pytest.mark.parametrize("push", [True, False], ids=["push", "pull"])
async def test_fields_that_do_not_cross(push: bool) -> None:
    """Hop-by-hop fields, credentials, and who the caller is stay here; ours come once each."""
    async with scripted(answer_ok) as upstream, running(settings_for(upstream.url), push=push) as headrace:
        assert (await ask(headrace.port, plain(*DROPPED))).status == 200
    fields = fields_of(upstream.calls[0])
    assert "gone" not in upstream.calls[0].head.decode("latin-1")
    names = [name for name, _ in fields]
    assert len(names) == len(set(names))
    assert set(names) == {
        "host",
        "via",
        "accept-encoding",
        "authorization",
        "content-type",
        "content-length",
        "x-request-id",
    }
    assert dict(fields)["authorization"] == "Bearer upstream-secret"
    assert dict(fields)["accept-encoding"] == "identity"
    assert dict(fields)["via"] == "1.1 headrace"
    assert dict(fields)["host"] == f"127.0.0.1:{upstream.port}"


@pytest.mark.parametrize("push", [True, False], ids=["push", "pull"])
async def test_fields_that_cross(push: bool) -> None:
    """Everything else arrives as it was written: case, order, repetition, odd values."""
    kept = [
        "User-Agent: OpenAI/Python 3.52.0",
        "Accept: application/json",
        "X-Stainless-Retry-Count: 0",
        "anthropic-version: 2026-10-21",
        "anthropic-beta: one",
        "anthropic-beta: two",
        "Idempotency-Key: abc",
        "X-Custom-Field:   spaced  inside   ",
        "x-mock: words=3, rst_after=2",
        "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "X-Empty:",
    ]
    async with scripted(answer_ok) as upstream, running(settings_for(upstream.url), push=push) as headrace:
        assert (await ask(headrace.port, plain(*kept))).status == 200
    fields = fields_of(upstream.calls[0])
    wanted = [(name.lower(), value.strip()) for name, _, value in (each.partition(":") for each in kept)]
    assert [field for field in fields if field in wanted] == wanted
    assert b"X-Custom-Field: spaced  inside" in upstream.calls[0].head


@pytest.mark.parametrize("push", [True, False], ids=["push", "pull"])
@pytest.mark.parametrize(
    "target",
    [
        "/files?limit=2&after=%7Bx%7D",
        "/files?q=a+b%20c&q=%C3%BC&q=&=&&",
        "/files?redirect=http://a/b?c=d",
        "/files?x=%2e%2e%2f%00",
        "/files?",
        "/files/a%20b%C3%BC~!$&'()*+,;=:@-._",
        "/files/%41",
    ],
)
async def test_paths_and_queries_are_untouched(push: bool, target: str) -> None:
    """Not a percent sign is decoded, encoded or normalised."""
    if not push and target.endswith("?"):
        return  # yarl, and so aiohttp's public client, drops an empty query
    async with scripted(answer_ok) as upstream, running(settings_for(upstream.url), push=push) as headrace:
        for prefix in ("/v1", ""):
            answer = await ask(headrace.port, line(f"GET {prefix}{target} HTTP/1.1", "Host: t"))
            assert answer.status == 200
    assert [call.head.split(b"\r\n")[0] for call in upstream.calls] == [
        f"GET /v1{target} HTTP/1.1".encode()
    ] * 2


@pytest.mark.parametrize(
    "body",
    [
        b'{ "model" : "m" ,\r\n\t"x":1.0e+5, "y":"\\u00e9\\/", "z":"\xc3\xa9", "a":{"model":"inner"} }\n',
        b'{"model":"m","x":1,"x":2,"stream":null}',
        b'{"\\u006dodel":"m","big":12345678901234567890.123456789012345678901234567890}',
        b'{"model":"m","pad":"' + b"p" * 300_000 + b'"}',
    ],
)
async def test_body_bytes_are_untouched(pair: Pair, body: bytes) -> None:
    """The bytes that arrive are the bytes that were sent."""
    assert (await ask(pair[0].port, with_body(body))).status == 200
    assert pair[1].calls[0].body == body


async def test_renaming_rewrites_only_the_model() -> None:
    """Where the upstream has another name for the model, every other member keeps its bytes."""
    models = {
        "m": {"upstreams": [{"name": "up", "model": "real/name \u00e9"}]},
        "same": {"upstreams": ["up"]},
    }
    body = b'{"a": 1.0e+5, "model":"m", "z":{"model": "m", "e":"\\u00e9"}, "big":12345678901234567890123}'
    async with both(models=models) as (headrace, upstream):
        assert (await ask(headrace.port, with_body(body))).status == 200
        assert (await ask(headrace.port, with_body(body.replace(b'"m"', b'"same"', 1)))).status == 200
        lines = headrace.log_lines()
    renamed, untouched = (call.body for call in upstream.calls)
    assert json.loads(renamed)["model"] == "real/name \u00e9"
    for piece in (b"1.0e+5", b'{"model": "m", "e":"\\u00e9"}', b"12345678901234567890123"):
        assert piece in renamed
    assert list(json.loads(renamed)) == ["a", "model", "z", "big"]
    assert untouched == body.replace(b'"m"', b'"same"', 1)
    assert {each["model"] for each in lines} <= {"m", "same"}


async def test_patterns() -> None:
    """Exact names win over patterns, the first pattern wins; the label is the configured name."""
    models = {
        "gpt-*": {"upstreams": [{"name": "up", "model": "pattern"}]},
        "gpt-4.1": {"upstreams": [{"name": "up", "model": "exact"}]},
    }
    async with both(models=models) as (headrace, upstream):
        for name in ("gpt-4.1", "gpt-5"):
            assert (await ask(headrace.port, with_body(json.dumps({"model": name}).encode()))).status == 200
        assert (await ask(headrace.port, with_body(b'{"model":"claude"}'))).status == 404
        await until(lambda: len(headrace.log_lines()) == 3)
        assert [each["model"] for each in headrace.log_lines()][:2] == ["gpt-4.1", "gpt-*"]
        metrics = await headrace.metrics()
        labels = {re.search(r'model="([^"]*)"', name)[1] for name in metrics if "requests_total{" in name}  # type: ignore[index]  # a document of any shape
        assert labels <= {"gpt-4.1", "gpt-*", "none", "other"}
    assert [json.loads(call.body)["model"] for call in upstream.calls] == ["exact", "pattern"]


@pytest.mark.parametrize(
    ("auth", "name", "value"),
    [
        ("bearer", "authorization", "Bearer canary-up"),
        ("x-api-key", "x-api-key", "canary-up"),
        ("api-key", "api-key", "canary-up"),
        ("none", None, None),
    ],
)
async def test_upstream_credential(auth: str, name: str | None, value: str | None) -> None:
    """Each style puts the upstream's key into its one field, and the caller's into none."""
    async with both(upstream={"api_key": "canary-up", "auth": auth}) as (headrace, upstream):
        request = plain("Authorization: Bearer canary-caller", "x-api-key: canary-caller")
        assert (await ask(headrace.port, request)).status == 200
    fields = fields_of(upstream.calls[0])
    found = [field for field in fields if field[0] in ("authorization", "x-api-key", "api-key")]
    assert found == ([(name, value)] if name else [])
    assert b"canary-caller" not in upstream.calls[0].head


RESPONSE = [
    "Content-Type: application/json",
    "X-Custom: kept",
    "X-Custom: twice",
    "X-Text: caf\u00e9",
    "openai-processing-ms: 12",
    "openai-version: 2020-10-01",
    "x-ratelimit-remaining-requests: 9",
    "Retry-After: 1.5",
    "x-request-id: upstream-id",
]
RESPONSE_GONE = [
    "Set-Cookie: gone=1",
    "Server: gone",
    "X-Powered-By: gone",
    "Alt-Svc: gone",
    "Strict-Transport-Security: gone",
    "OpenAI-Organization: gone",
    "OpenAI-Project: gone",
    "Connection: x-named",
    "X-Named: gone",
    "Keep-Alive: gone",
    "x-headrace-upstream: gone",
    "server-timing: gone",
]


@pytest.mark.parametrize("push", [True, False], ids=["push", "pull"])
@pytest.mark.parametrize("status", [200, 400, 429, 500])
async def test_answers_cross(push: bool, status: int) -> None:
    """Status, end-to-end fields and bytes come back as they are; the rest does not."""
    body = b'{"error" :{"message":"\\u00e9 as it is"}}' if status >= 400 else b'{"x": 1.0e+5}\n'

    async def script(call: Call) -> None:
        fields = "\r\n".join([*RESPONSE, *RESPONSE_GONE, f"Content-Length: {len(body)}"])
        head = f"HTTP/1.1 {status} Odd Reason\r\n{fields}\r\n".encode()
        await call.send(head + b"X-Old-Text: caf\xe9\r\n\r\n" + body)

    async with scripted(script) as upstream, running(settings_for(upstream.url), push=push) as headrace:
        async with await Caller.connect(headrace.port) as caller:
            await caller.send(plain())
            raw = await caller.reader.readuntil(b"\r\n\r\n")
            assert await caller.reader.readexactly(len(body)) == body
        await until(lambda: len(headrace.log_lines()) == 1)
        assert headrace.log_lines()[0]["reason"] == ("upstream_error" if status >= 500 else "complete")
    head = raw.decode()
    assert head.startswith(f"HTTP/1.1 {status} ")
    assert "gone" not in head
    lowered = head.lower()
    for kept in RESPONSE[1:-1]:
        assert f"\r\n{kept.lower()}\r\n" in lowered
    assert "\r\nx-old-text: caf\u00e9\r\n" in lowered  # not a byte is lost of what is not UTF-8
    assert lowered.count("\r\nx-request-id: ") == lowered.count("\r\nrequest-id: ") == 1
    assert "\r\nx-upstream-request-id: upstream-id\r\n" in lowered
    assert "\r\nx-headrace-upstream: up\r\n" in lowered
    assert "\r\nx-headrace-attempts: 1\r\n" in lowered
    assert re.search(r"\r\nserver-timing: queue;dur=[0-9.]+, upstream;dur=[0-9.]+\r\n", lowered)


async def test_stream_fields(pair: Pair) -> None:
    """Event streams say that nobody may buffer or change them."""
    answer = await ask(pair[0].port, chat())
    assert answer.status == 200
    assert answer.body == event("hello") + DONE
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-cache, no-transform"
    assert answer.clean


# ── keep-alive, pipelining, the cap ──────────────────────────────────────────────────────────────────────


async def test_keep_alive(pair: Pair) -> None:
    """Answers, streams, and errors of the application leave the connection usable."""
    async with await Caller.connect(pair[0].port) as caller, asyncio.timeout(10):
        statuses = []
        for request in (
            plain(),
            chat(),
            with_body(b"[]"),
            plain(path="/v1/nothing"),
            chat(),
            plain(model="x"),
        ):
            answer = await caller.ask(request)
            assert answer.clean
            statuses.append(answer.status)
    assert statuses == [200, 200, 400, 404, 200, 404]
    assert len(pair[1].calls) == 3
    assert pair[1].connections == 1


async def test_pipelining(pair: Pair) -> None:
    """Three requests in one write are answered in their order."""
    async with await Caller.connect(pair[0].port) as caller, asyncio.timeout(10):
        await caller.send(plain("x-request-id: 1") + chat("x-request-id: 2") + plain("x-request-id: 3"))
        answers = [await caller.rest(await caller.head()) for _ in range(3)]
    assert [answer.headers["x-request-id"] for answer in answers] == ["1", "2", "3"]
    assert [answer.body for answer in answers] == [OK, event("hello") + DONE, OK]
    assert all(answer.clean for answer in answers)
    assert len(pair[1].calls) == 3


async def test_more_pipelined_requests_than_are_held(pair: Pair) -> None:
    """At 32 that wait the connection is not read any more; it is again when half have been answered."""
    async with await Caller.connect(pair[0].port) as caller, asyncio.timeout(20):
        await caller.send(b"".join([plain(f"x-request-id: {number}") for number in range(100)]))
        for number in range(100):
            answer = await caller.rest(await caller.head())
            assert (answer.headers["x-request-id"], answer.body) == (str(number), OK)
    assert len(pair[1].calls) == 100


async def test_http_10_closes(pair: Pair) -> None:
    """A HTTP/1.0 caller gets its answer and the end of the connection."""
    async with await Caller.connect(pair[0].port) as caller, asyncio.timeout(5):
        answer = await caller.ask(chat(version="1.0"))
        assert answer.body == event("hello") + DONE
        assert await ended(caller)


async def test_connection_cap_makes_room() -> None:
    """At the cap the connection that is idle for longest is closed for a new one."""
    async with both(max_connections=3) as (headrace, _), AsyncExitStack() as stack:
        callers = []
        for _ in range(3):
            caller = await stack.enter_async_context(await Caller.connect(headrace.port))
            assert (await caller.ask(plain())).status == 200
            callers.append(caller)
        assert (await callers[0].ask(plain())).status == 200  # now the second is the oldest
        async with await Caller.connect(headrace.port) as newest:
            assert (await newest.ask(plain())).status == 200
            assert await ended(callers[1])
            for caller in (callers[0], callers[2]):
                assert (await caller.ask(plain())).status == 200


async def test_connection_cap_refuses() -> None:
    """At the cap with nobody idle a new connection is told 503 overloaded and closed."""
    release = asyncio.Event()

    async def script(call: Call) -> None:
        await release.wait()
        await answer_ok(call)

    async with scripted(script) as upstream:
        settings = settings_for(upstream.url, max_connections=2)
        async with running(settings) as headrace, AsyncExitStack() as stack:
            busy = [await stack.enter_async_context(await Caller.connect(headrace.port)) for _ in range(2)]
            for caller in busy:
                await caller.send(plain())
            await until(lambda: len(upstream.calls) == 2)
            async with await Caller.connect(headrace.port) as late, asyncio.timeout(5):
                answer = await late.rest(await late.head())
                assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
                assert answer.headers["connection"] == "close"
                assert REQUEST_ID.fullmatch(answer.headers["x-request-id"])
                assert "retry-after" in answer.headers
                assert await ended(late)
            assert [each["error"] for each in headrace.log_lines()] == ["overloaded"]
            release.set()
            for caller in busy:
                assert (await caller.rest(await caller.head())).status == 200
            assert (await ask(headrace.port, plain())).status == 200


async def test_half_sent_heads_are_not_idle_for_ever() -> None:
    """Connections that never finish a head cannot lock everybody out."""
    async with both(max_connections=2, timeouts={"header": 0.3}) as (headrace, _), AsyncExitStack() as stack:
        for _ in range(2):
            caller = await stack.enter_async_context(await Caller.connect(headrace.port))
            await caller.send(b"POST /v1/cha")
        async with asyncio.timeout(5):
            while True:
                try:
                    if (await ask(headrace.port, plain())).status == 200:
                        break
                except (asyncio.IncompleteReadError, ConnectionError):
                    pass


async def test_sixty_pipelined_requests_then_gone(pair: Pair) -> None:
    """A caller that pipelines sixty requests and leaves holds nothing for ever."""
    headrace, _ = pair
    caller = await Caller.connect(headrace.port)
    await caller.send(plain() * 60)
    caller.leave()
    await headrace.quiet()
    assert (await ask(headrace.port, plain())).status == 200


# ── every answer is counted, logged, and says who it is ──────────────────────────────────────────────────


async def test_no_answer_without_ids(pair: Pair) -> None:
    """Whatever is answered carries ids and makes exactly one log line and one count."""
    headrace, _ = pair
    requests = [
        plain(),
        chat(),
        line("GET /v1/models HTTP/1.1", "Host: t"),
        line("GET /health HTTP/1.1", "Host: t"),
        line("GET /api/health/stream HTTP/1.1", "Host: t"),
        line("GET /nothing HTTP/1.1", "Host: t"),
        line("GET /v1/models/nothing HTTP/1.1", "Host: t"),
        with_body(b"["),
        b"nonsense\r\n\r\n",
        line(CHAT, "Host: t", "Expect: x"),
    ]
    ids = []
    for request in requests:
        answer = await ask(headrace.port, request)
        assert answer.headers["x-request-id"] == answer.headers["request-id"]
        assert answer.headers["server"] == "headrace"
        ids.append(answer.headers["x-request-id"])
    await until(lambda: len(headrace.log_lines()) == len(requests))
    assert [each["request_id"] for each in headrace.log_lines()] == ids
    metrics = await headrace.metrics()
    assert sum(value for name, value in metrics.items() if "headrace_requests_total{" in name) == len(
        requests
    )


async def test_health(pair: Pair) -> None:
    """/health is one small object, /api/health/stream one event."""
    answer = await ask(pair[0].port, line("GET /health HTTP/1.1", "Host: t"))
    assert set(answer.json()) == {"status", "timestamp"}
    assert answer.json()["status"] == "ok"
    stream = await ask(pair[0].port, line("GET /api/health/stream HTTP/1.1", "Host: t"))
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.body.startswith(b"data: ")
    assert stream.body.count(b"\n\n") == 1
    assert stream.clean


async def canary_good(port: int) -> list[Answer]:
    secret = "Authorization: Bearer CALLERCANARY"
    return [
        await ask(port, plain(secret, "X-Api-Key: CALLERCANARY", "Cookie: a=CALLERCANARY")),
        await ask(port, chat(secret, "api-key: CALLERCANARY")),
        await ask(port, with_body(b"[]", secret)),
        await ask(port, plain(secret, path="/v1/nothing")),
        await ask(port, line(CHAT, "Host: t", secret + "\x01")),
        await ask(port, line("GET /v1/files?api-key=x HTTP/1.1", "Host: t", secret)),
    ]


@pytest.mark.parametrize("push", [True, False], ids=["push", "pull"])
@pytest.mark.parametrize("status", [200, 401, 403, 404, 500])
async def test_canaries(push: bool, status: int) -> None:
    """Neither credential is ever where it does not belong: upstream, caller, log, metrics."""

    async def script(call: Call) -> None:
        if status == 200:
            await answer_ok(call)
            return
        # Providers quote the key that they refuse.
        body = (
            b'{"error":{"message":"Incorrect API key provided: UPSTREAMCANARY"}}'
            if status in (401, 403)
            else OK
        )
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        await call.send(head.encode() + body)

    async with scripted(script) as upstream:
        settings = settings_for(upstream.url, upstream={"api_key": "UPSTREAMCANARY"})
        async with running(settings, push=push) as headrace:
            answers = await canary_good(headrace.port)
            await until(lambda: len(headrace.log_lines()) == len(answers))
            shown = "\n".join(await headrace.metrics()) + str(headrace.state)
            shown += b"".join([*headrace.sink.lines, *headrace.sink._pending]).decode()
    for answer in answers:
        text = str(answer.headers) + answer.body.decode()
        assert "UPSTREAMCANARY" not in text
        assert "CALLERCANARY" not in text
    assert "CANARY" not in shown
    assert len(upstream.calls) == 3
    for call in upstream.calls:
        assert b"CALLERCANARY" not in call.head + call.body
        assert call.head.count(b"UPSTREAMCANARY") == 1


async def test_queries_are_not_logged(pair: Pair) -> None:
    """A query string or a body may hold anything: neither is in the log."""
    await ask(
        pair[0].port, line("GET /v1/files?key=QUERYCANARY HTTP/1.1", "Host: t", "User-Agent: UACANARY\x1b")
    )
    await ask(pair[0].port, line("GET /v1/files?key=QUERYCANARY HTTP/1.1", "Host: t", "User-Agent: UACANARY"))
    await ask(pair[0].port, plain(user="BODYCANARY"))
    await ask(pair[0].port, plain(model="MODELCANARY"))
    await until(lambda: len(pair[0].log_lines()) == 4)
    assert b"CANARY" not in b"".join([*pair[0].sink.lines, *pair[0].sink._pending])


# ── who is calling ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("trusted", "forwarded", "seen"),
    [
        ([], "203.0.113.9", "127.0.0.1"),
        (["127.0.0.1"], "203.0.113.9", "203.0.113.9"),
        (["127.0.0.1"], "198.51.100.1, 203.0.113.9", "203.0.113.9"),
        (["127.0.0.1", "203.0.113.0/24"], "198.51.100.1, 203.0.113.9", "198.51.100.1"),
        (["127.0.0.1"], "nonsense", "127.0.0.1"),
    ],
)
async def test_client_ip(trusted: list[str], forwarded: str, seen: str) -> None:
    """X-Forwarded-For is believed only of trusted proxies."""
    async with both(trusted_proxies=trusted) as (headrace, _):
        await ask(headrace.port, plain(f"X-Forwarded-For: {forwarded}"))
        await until(lambda: len(headrace.log_lines()) == 1)
        assert headrace.log_lines()[0]["client_ip"] == seen


# ── upstream rubbish ─────────────────────────────────────────────────────────────────────────────────────

RUBBISH: dict[str, tuple[bytes, str]] = {
    "not http": (b"SSH-2.0-INSIDE\r\n\r\n", "upstream_invalid_response"),
    "switching": (
        b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        "upstream_invalid_response",
    ),
    "redirect": (
        b"HTTP/1.1 307 X\r\nLocation: http://INSIDE/\r\nContent-Length: 0\r\n\r\n",
        "upstream_invalid_response",
    ),
    "two lengths": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nContent-Length: 7\r\n\r\nINSIDE",
        "upstream_invalid_response",
    ),
    "length and chunked": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "upstream_invalid_response",
    ),
    "bad chunk": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nINSIDE\r\n",
        "upstream_invalid_response",
    ),
    "control character": (
        b"HTTP/1.1 200 OK\r\nX: INSIDE\x00\r\nContent-Length: 2\r\n\r\n{}",
        "upstream_invalid_response",
    ),
    "unauthorised": (
        b'HTTP/1.1 401 X\r\nContent-Length: 10\r\n\r\n{"INSIDE"}',
        "upstream_auth",
    ),
    "error in 200": (
        b'HTTP/1.1 200 OK\r\nContent-Type: text/json\r\nContent-Length: 20\r\n\r\n{"error":{"a":"b"}} ',
        "upstream_error",
    ),
}


@pytest.mark.parametrize("push", [True, False], ids=["push", "pull"])
@pytest.mark.parametrize("name", RUBBISH)
async def test_upstream_rubbish(name: str, push: bool) -> None:
    """What an upstream should not have said is a 502 that tells nothing of its inside."""
    raw, code = RUBBISH[name]

    async def script(call: Call) -> None:
        await call.send(raw)
        call.close()

    async with scripted(script) as upstream, running(settings_for(upstream.url), push=push) as headrace:
        answer = await ask(headrace.port, plain())
        assert (answer.status, answer.json()["error"]["code"]) == (502, code)
        assert b"INSIDE" not in answer.body + str(answer.headers).encode()
        assert str(upstream.port).encode() not in answer.body
        await headrace.quiet()
        assert [each["reason"] for each in headrace.log_lines()] == ["upstream_error"]


async def test_upstream_refuses_the_connection() -> None:
    """Nobody listens: 502, no address in the answer."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    try:
        async with running(settings_for(f"http://127.0.0.1:{port}/v1")) as headrace:
            answer = await ask(headrace.port, plain())
            assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_unreachable")
            assert str(port).encode() not in answer.body
            assert (answer.headers["x-headrace-upstream"], answer.headers["x-headrace-attempts"]) == (
                "up",
                "1",
            )
            await headrace.quiet()
    finally:
        sock.close()


async def test_requests_are_those_of_aiohttps_constructor() -> None:
    """What is left out is made when it is asked for; and a copy is aiohttp's."""

    async def handler(_: web.Request) -> web.StreamResponse:
        raise AssertionError("nobody asks")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    theirs = make_mocked_request("POST", "/v1/x?y=1", headers={"Host": "here", "Content-Type": "text/plain"})
    connection = theirs.protocol
    connection.address = theirs.remote  # type: ignore[attr-defined]
    make = downstream.requests_of(app, theirs.match_info)  # type: ignore[arg-type]
    for ours in (made := make(theirs._message, theirs.content, connection), made.clone()):
        for name in ("method", "version", "headers", "raw_headers", "raw_path", "remote", "keep_alive"):
            assert getattr(ours, name) == getattr(theirs, name), name
        for name in ("path", "host", "scheme", "query_string", "content_type", "url", "content", "protocol"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.writer is ours.writer
        assert ours.app is theirs.app
        assert (len(ours), ours.client_max_size) == (0, app._client_max_size)
