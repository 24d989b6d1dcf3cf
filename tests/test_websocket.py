"""WebSocket sessions over real sockets: who may open one, what passes, and how it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import WSMsgType, web
from openai.types.responses import ResponsesClientEventParam

from tests.kit.callers import Caller, ask
from tests.kit.connect_proxy import connect_proxy
from tests.kit.headrace import Headrace, running, settings_for, until
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.lab import Lab, authority, server_context
from tests.kit.websockets import Talk, frame, handshake, sessions, speaking, talking

pytestmark = pytest.mark.timeout(60)

#: A reader that leaves closes the upstream within this (contract 6.4); five times the slack.
WITHIN_S = 5.0
DONE = (
    '{"type":"response.done","event_id":"e","response":{"object":"realtime.response","usage":{"total_tokens":15,'
    '"input_tokens":10,"output_tokens":5,"input_token_details":{"cached_tokens":4},"output_token_details":{}}}}'
)
COMPLETED = (
    '{"type":"response.completed","sequence_number":9,"response":{"id":"r","usage":{"input_tokens":7,'
    '"input_tokens_details":{"cached_tokens":0},"output_tokens":3,"output_tokens_details":{"reasoning_tokens":1},'
    '"total_tokens":10},"user":null}}'
)
REALTIME = "/v1/realtime?model=m"
RESPONSES = "/v1/responses"


async def echo(talk: Talk) -> None:
    """Sends back what comes."""
    async for message in talk.ws:
        await talk.ws.send_frame(
            message.data.encode() if message.type is WSMsgType.TEXT else message.data, message.type
        )


async def listen(talk: Talk) -> None:
    talk.code = await talk.until_closed()


def create(model: str | None = "m", **fields: Any) -> str:
    return json.dumps({"type": "response.create", **({} if model is None else {"model": model}), **fields})


async def code_of(ws: aiohttp.ClientWebSocketResponse) -> tuple[int | None, str]:
    """Reads to the Close frame: its code and reason. The client must not close by itself."""
    message = await ws.receive(timeout=20)
    while message.type not in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.ERROR):
        message = await ws.receive(timeout=20)
    return message.data, message.extra


async def error_of(ws: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
    """The next message, which has to be an error event."""
    event = await ws.receive_json(timeout=20)
    assert event["type"] == "error", event
    return event["error"] | {"http": event["status"]}


# ── what passes ──────────────────────────────────────────────────────────────────────────────────────────


async def test_messages_pass_unchanged() -> None:
    """Text and binary, both ways, and one log line that counts them."""
    async with sessions(echo) as it:
        async with speaking(it.headrace) as ws:
            for text in ("{}", '{"a":  "\\u00e9é"}', "", "x" * 300_000):
                await ws.send_str(text)
                assert await ws.receive_str() == text
            await ws.send_bytes(bytes(range(256)) * 500)
            assert await ws.receive_bytes() == bytes(range(256)) * 500
            samples = await it.headrace.metrics()
            assert samples['headrace_streams_active{upstream="up"}'] == 1
            assert it.headrace.state["streams"] == it.headrace.state["permits"] == 1
        line = await it.ended("complete")
    size = 2 + 18 + 300_000 + 128_000
    assert (line["bytes_in"], line["bytes_out"], line["chunks"]) == (size, size, 5)
    assert (line["method"], line["route"], line["model"], line["upstream"]) == (
        "GET",
        "/v1/realtime",
        "m",
        "up",
    )
    assert (line["status"], line["attempts"], line["error"]) == (101, 1, None)
    assert line["ttfb_ms"] > 0


async def test_attempt_is_counted() -> None:
    """A session is one attempt, counted at its end, and no stream is active after it."""
    async with sessions(echo) as it:
        async with speaking(it.headrace):
            await it.called()
        await it.ended("complete")
        samples = await it.headrace.metrics()
    assert samples['headrace_upstream_attempts_total{result="ok",upstream="up"}'] == 1
    assert samples['headrace_streams_active{upstream="up"}'] == 0


@pytest.mark.parametrize("path", ["/v1/realtime", "/realtime"])
async def test_what_the_upstream_sees(path: str) -> None:
    """Its own credential, the operator's fields and query, the caller's query and end-to-end fields; nothing
    of the caller's handshake or credential."""
    extra = {"headers": {"X-Mine": "operator"}, "query": {"api-version": "1"}}
    fields = {
        "Authorization": "Bearer caller-key",
        "OpenAI-Beta": "realtime=v1",
        "OpenAI-Organization": "org",
        "X-Mine": "caller",
        "Cookie": "a=b",
    }
    async with sessions(listen, upstream=extra) as it:
        async with speaking(it.headrace, f"{path}?model=m&x=%20&y", headers=fields, compress=15) as ws:
            assert ws.compress == 0
        await it.ended("complete")
        request = it.upstream.talks[0].request
    seen = {name.lower(): value for name, value in request.headers.items()}
    assert request.raw_path == "/v1/realtime?model=m&x=%20&y&api-version=1"
    assert seen["authorization"] == "Bearer upstream-secret"
    assert (seen["openai-beta"], seen["x-mine"], seen["via"]) == ("realtime=v1", "operator", "1.1 headrace")
    assert seen["x-request-id"].startswith("req_")
    assert not {"cookie", "openai-organization", "origin", "sec-websocket-extensions"} & seen.keys()
    assert "caller-key" not in str(seen)
    assert all(len(request.headers.getall(name)) == 1 for name in request.headers)


async def test_head_of_the_answer() -> None:
    """The 101 says who answers, under which ids; `Connection` is still an upgrade."""

    fields = {"x-request-id": "up-1", "Set-Cookie": "a=b", "openai-organization": "o"}
    async with (
        sessions(listen, fields=fields) as it,
        await Caller.connect(it.port) as caller,
        asyncio.timeout(20),
    ):
        await caller.send(handshake(REALTIME, "x-request-id: mine"))
        head = (await caller.head()).headers
        assert (head["x-request-id"], head["request-id"]) == ("mine", "mine")
        assert head["x-upstream-request-id"] == "up-1"
        assert (head["x-headrace-upstream"], head["x-headrace-attempts"]) == ("up", "1")
        assert (head["connection"].lower(), head["upgrade"]) == ("upgrade", "websocket")
        assert head["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        assert head["server"] == "headrace"
        assert not {"sec-websocket-extensions", "sec-websocket-protocol", "content-length"} & head.keys()
        assert not {"set-cookie", "openai-organization"} & head.keys()
        await caller.send(frame(8, b"\x03\xe8"))
        await it.ended("complete")


async def test_mapped_model() -> None:
    """Realtime rewrites the name in the query, once, and leaves all else alone."""
    models = {"m-*": {"upstreams": [{"name": "up", "model": "real/1 x"}], "websocket": True}}
    async with sessions(listen, models=models) as it:
        async with speaking(it.headrace, "/v1/realtime?a=model&model=m-1&b=%7e"):
            pass
        line = await it.ended("complete")
        assert it.upstream.talks[0].request.raw_path == "/v1/realtime?a=model&model=real%2F1%20x&b=%7e"
        assert line["model"] == "m-*"


async def test_large_messages() -> None:
    """32 MiB up, which is what a body may have, and 48 MiB down."""
    up, down = bytes(32 * 2**20), bytes(48 * 2**20)

    async def script(talk: Talk) -> None:
        assert await talk.receive() == up
        await talk.ws.send_bytes(down)
        await talk.until_closed()

    async with sessions(script) as it:
        async with speaking(it.headrace) as ws:
            await ws.send_bytes(up)
            assert await ws.receive_bytes(timeout=40) == down
        line = await it.ended("complete")
        assert (line["bytes_in"], line["bytes_out"]) == (len(up), len(down))


async def test_too_large_a_message() -> None:
    """A caller's message beyond `max_body_bytes` ends the session, and the upstream hears of it."""
    async with sessions(listen, max_body_bytes=1000) as it:
        async with speaking(it.headrace, autoclose=False) as ws:
            await ws.send_bytes(bytes(1001))
            assert (await code_of(ws))[0] == 1009
        await it.ended("client_gone")
        talk = it.upstream.talks[0]
        assert talk.code == 1001


async def test_pings_pass() -> None:
    """Both ways, with their payload; each side's pong comes from the other side."""
    seen: list[tuple[WSMsgType, bytes]] = []

    async def script(talk: Talk) -> None:
        message = await talk.ws.receive()
        seen.append((message.type, message.data))
        await talk.ws.pong(b"up-pong")
        await talk.ws.ping(b"up-ping")
        message = await talk.ws.receive()
        seen.append((message.type, message.data))
        await talk.until_closed()

    async with sessions(script, options={"autoping": False}) as it:
        async with speaking(it.headrace, autoping=False) as ws:
            await ws.ping(b"down-ping")
            got = [await ws.receive(timeout=20) for _ in range(2)]
            await ws.pong(b"down-pong")
            await until(lambda: len(seen) == 2)
        await it.ended("complete")
    assert [(each.type, bytes(each.data)) for each in got] == [
        (WSMsgType.PONG, b"up-pong"),
        (WSMsgType.PING, b"up-ping"),
    ]
    assert seen == [(WSMsgType.PING, b"down-ping"), (WSMsgType.PONG, b"down-pong")]


async def test_subprotocol_is_the_upstreams_choice() -> None:
    """What the upstream selects of what the caller offered is what the caller is told."""
    async with sessions(listen, options={"protocols": ("two", "one")}) as it:
        async with speaking(it.headrace, protocols=("zero", "one", "two")) as ws:
            assert ws.protocol == "one"
        assert it.upstream.openings[0].headers["Sec-WebSocket-Protocol"] == "zero,one,two"
        async with speaking(it.headrace, protocols=("zero",)) as ws:
            assert ws.protocol is None
        await it.ended("complete", 2)


async def test_tls_upstream() -> None:
    """A private CA vouches for the upstream; without it the connection is refused."""
    with authority().cert_pem.tempfile() as ca_file:
        async with (
            sessions(echo, tls=server_context(), upstream={"ca_file": ca_file}) as it,
            speaking(it.headrace) as ws,
        ):
            await ws.send_str("hi")
            assert await ws.receive_str() == "hi"
    async with sessions(echo, tls=server_context()) as it:
        answer = await ask(it.port, handshake())
        assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_unreachable")


# ── who may open one ─────────────────────────────────────────────────────────────────────────────────────


async def refused(
    it: Lab, request: bytes, status: int, code: str, reason: str = "rejected"
) -> dict[str, Any]:
    """The opening is answered with an ordinary error, and no session was opened upstream."""
    before = len(it.headrace.log_lines())
    async with asyncio.timeout(20):
        answer = await ask(it.port, request)
    assert (answer.status, answer.json()["error"]["code"]) == (status, code), answer.body
    assert answer.headers["x-request-id"]
    assert answer.headers["connection"] == "close"
    line = await it.line(before + 1)
    assert (line["status"], line["reason"], line["error"]) == (status, reason, code)
    await it.headrace.quiet()
    return answer.json()["error"]


CLOSED = {"m": {"upstreams": ["up"]}, "open": {"upstreams": ["up"], "websocket": True}}


async def test_only_for_models_that_opted_in() -> None:
    """Another model is not found, before the upgrade."""
    async with sessions(listen, models=CLOSED) as it:
        error = await refused(it, handshake(REALTIME), 404, "not_found")
        assert error["param"] == "model"
        await refused(it, handshake("/v1/realtime?model=nobody"), 404, "model_not_found")
        assert it.upstream.openings == []


@pytest.mark.parametrize("path", [REALTIME, RESPONSES])
async def test_nobody_opted_in(path: str) -> None:
    """Then there is no such path, with or without an upgrade."""
    async with sessions(listen, models={"m": {"upstreams": ["up"]}}) as it:
        await refused(it, handshake(path), 404, "not_found")
        answer = await ask(it.port, f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        assert (answer.status, answer.json()["error"]["code"]) == (404, "not_found")


async def test_without_an_upgrade() -> None:
    """Realtime says that it needs one; a plain GET of responses is what it was; a POST is not upgraded."""
    async with sessions(listen) as it:
        answer = await ask(it.port, b"GET /v1/realtime?model=m HTTP/1.1\r\nHost: test\r\n\r\n")
        assert (answer.status, answer.headers["upgrade"]) == (426, "websocket")
        answer = await ask(it.port, b"GET /v1/responses HTTP/1.1\r\nHost: test\r\n\r\n")
        assert (answer.status, answer.json()["error"]["code"]) == (404, "not_found")
        await refused(it, handshake(REALTIME).replace(b"websocket", b"h2c"), 426, "upgrade_required")
        await refused(it, handshake(REALTIME).replace(b"GET", b"POST"), 404, "not_found")
        assert it.upstream.openings == []


BROKEN = {
    "version": (b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Version: 99"),
    "no key": (b"Sec-WebSocket-Key", b"X"),
    "short key": (b"dGhlIHNhbXBsZSBub25jZQ==", b"eA=="),
    "no base64": (b"dGhlIHNhbXBsZSBub25jZQ==", b"x"),
    "not ascii": (b"dGhlIHNhbXBsZSBub25jZQ==", b"\xc3\xa9"),
    "http/1.0": (b"HTTP/1.1", b"HTTP/1.0"),
    "no connection": (b"Connection: Upgrade", b"Connection: keep-alive"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_broken_handshakes(name: str) -> None:
    """A 400 in JSON, before anybody is asked."""
    async with sessions(listen) as it:
        answer = await ask(it.port, handshake().replace(*BROKEN[name]))
        assert (answer.status, answer.json()["error"]["code"]) == (400, "bad_request")
        assert it.upstream.openings == []


QUERIES = {
    "/v1/realtime": "missing_model",
    "/v1/realtime?model=": "missing_model",
    "/v1/realtime?model=m&model=x": "duplicate_key",
    "/v1/realtime?model=m&Mod%65l=x": "duplicate_key",
    "/v1/realtime?a=b;model=x&model=m": "duplicate_key",
    "/v1/realtime?a=b;model=m": "duplicate_key",
    "/v1/realtime?model=m&deployment=x": "bad_request",
    "/v1/realtime?model=" + "m" * 300: "bad_request",
}


@pytest.mark.parametrize("path", QUERIES)
async def test_model_of_the_query(path: str) -> None:
    """It has to be there, and can be read in one way only."""
    async with sessions(listen) as it:
        error = await refused(it, handshake(path), 400, QUERIES[path])
        assert error["param"] in ("model", "deployment")


@pytest.mark.parametrize("query", ["intent=transcription", "call_id=rtc_1"])
async def test_session_without_a_model(query: str) -> None:
    """It goes to `default_upstream`, if a model there has opted in."""
    async with sessions(listen) as it:
        async with speaking(it.headrace, f"/v1/realtime?{query}"):
            await it.called()
        line = await it.ended("complete")
        assert (line["model"], line["upstream"]) == ("none", "up")
    others = {
        "up": {"base_url": "http://127.0.0.1:9/v1"},
        "other": {"base_url": "http://127.0.0.1:9/v1"},
    }
    models = {"m": {"upstreams": ["other"], "websocket": True}}
    async with sessions(listen, models=models, upstreams=others, default_upstream="up") as it:
        await refused(it, handshake(f"/v1/realtime?{query}"), 404, "not_found")


async def test_credentials(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A key in the header or among the subprotocols; neither is passed on, echoed or logged."""
    caplog.set_level(logging.DEBUG)
    key = await make_key(tmp_path)
    page = ("realtime", f"openai-insecure-api-key.{key}", "openai-project.p")
    async with sessions(listen, auth=auth_section(tmp_path), options={"protocols": ("realtime",)}) as it:
        async with speaking(it.headrace, headers={"Authorization": f"Bearer {key}"}) as ws:
            assert ws.protocol is None
        async with speaking(it.headrace, protocols=page) as ws:
            assert ws.protocol == "realtime"
        async with speaking(it.headrace, protocols=page[1:]) as ws:
            assert ws.protocol is None
        await it.ended("complete", 3)
        lines = it.headrace.log_lines()
        heads = [str(request.headers) for request in it.upstream.openings]
        assert [request.headers.get("Sec-WebSocket-Protocol") for request in it.upstream.openings] == [
            None,
            "realtime",
            None,
        ]
    assert not any(key in text or key.split("_", 2)[2] in text for text in [*heads, str(lines), caplog.text])
    assert {line["key_id"] for line in lines} == {key.split("_")[1]}


@pytest.mark.parametrize("path", [REALTIME, RESPONSES])
async def test_bad_credentials(tmp_path: Path, path: str) -> None:
    """No key, a wrong one, two: an ordinary error before the upgrade. The subprotocol is none elsewhere."""
    key = await make_key(tmp_path)
    offer = f"Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.{key}"
    async with sessions(listen, auth=auth_section(tmp_path)) as it:
        await refused(it, handshake(path), 401, "invalid_api_key")
        await refused(it, handshake(path, offer.replace(key, key[:-2] + "xx")), 401, "invalid_api_key")
        await refused(it, handshake(path, offer, "x-api-key: other"), 400, "ambiguous_credentials")
        answer = await ask(it.port, f"GET /v1/models HTTP/1.1\r\nHost: t\r\n{offer}\r\n\r\n".encode())
        assert answer.status == 401
        assert it.upstream.openings == []


async def test_models_of_a_key(tmp_path: Path) -> None:
    """A caller with an allow-list uses these models only, and no session without one."""
    key = bearer(await make_key(tmp_path, models=["other"]))
    async with sessions(listen, auth=auth_section(tmp_path)) as it:
        await refused(it, handshake(REALTIME, key), 403, "model_not_allowed")
        await refused(it, handshake("/v1/realtime?intent=transcription", key), 403, "model_not_allowed")


async def test_origin() -> None:
    """A page has to be listed or served from here; SDKs send no origin."""
    cors = {"origins": ["https://app.example"]}
    async with sessions(listen, cors=cors) as it:
        await refused(it, handshake(REALTIME, "Origin: https://evil.example"), 403, "origin_not_allowed")
        await refused(it, handshake(RESPONSES, "Origin: null"), 403, "origin_not_allowed")
        for number, origin in enumerate(("https://app.example", it.headrace.url), 3):
            async with speaking(it.headrace, origin=origin):
                pass
            await it.ended("complete", number)
        assert all("Origin" not in request.headers for request in it.upstream.openings)


# ── what it takes ────────────────────────────────────────────────────────────────────────────────────────


async def test_request_rate(tmp_path: Path) -> None:
    """An opening spends one request of the caller's plan."""
    plans = {"small": {"requests_per_minute": 1, "burst": 1}}
    key = await make_key(tmp_path, plan="small")
    async with sessions(listen, auth=auth_section(tmp_path), plans=plans) as it:
        async with speaking(it.headrace, headers={"x-api-key": key}) as ws:
            assert ws._response.headers["x-ratelimit-remaining-requests"] == "0"
        await it.ended("complete")
        await refused(it, handshake(REALTIME, bearer(key)), 429, "rate_limit_exceeded")


async def test_rate_and_tokens_of_a_model(tmp_path: Path) -> None:
    """A model's own rate counts sessions; tokens are settled with what a session reports."""
    models = {"m": {"upstreams": ["up"], "websocket": True, "tokens_per_minute": 20, "max_output": 1}}

    async def script(talk: Talk) -> None:
        await talk.ws.send_str(DONE)
        await talk.until_closed()

    async with sessions(script, models=models) as it:
        async with speaking(it.headrace) as ws:
            await ws.receive()
        await it.ended("complete")
        async with speaking(it.headrace) as ws:
            await ws.receive()
        line = await it.ended("complete", 2)
        assert (line["prompt_tokens"], line["completion_tokens"]) == (10, 5)
        await refused(it, handshake(REALTIME), 429, "tokens_limit_exceeded")
        assert it.headrace.state["reservations"] == 0


async def test_own_slots(tmp_path: Path) -> None:
    """A session holds its caller's slot to its end."""
    plans = {"small": {"max_in_flight": 1}}
    key = await make_key(tmp_path, plan="small")
    async with sessions(listen, auth=auth_section(tmp_path), plans=plans) as it:
        async with speaking(it.headrace, headers={"x-api-key": key}):
            await it.called()
            answer = await ask(it.port, handshake(REALTIME, bearer(key)))
            assert (answer.status, answer.json()["error"]["code"]) == (429, "too_many_in_flight")
        await until(lambda: len(it.headrace.log_lines()) == 2)
        await it.headrace.quiet()
        async with speaking(it.headrace, headers={"x-api-key": key}):
            pass


async def test_waits_for_the_upstreams_slot() -> None:
    """The second session is opened when the first has ended."""
    async with (
        sessions(echo, upstream={"max_in_flight": 1}, limits={"queue": {"max_wait": 40}}) as it,
        speaking(it.headrace) as first,
    ):
        await it.called()
        async with aiohttp.ClientSession() as session:
            waiting = asyncio.ensure_future(session.ws_connect(f"{it.headrace.url}{REALTIME}"))
            await until(lambda: it.headrace.state["queued"] == 1)
            assert len(it.upstream.openings) == 1
            await first.close()
            async with asyncio.timeout(20):
                second = await waiting
            await second.send_str("hi")
            assert await second.receive_str() == "hi"
            await second.close()
        await it.ended("complete", 2)


# ── how it ends ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("code", "reason"),
    [(1000, "complete"), (1001, "complete"), (4001, "complete"), (1011, "client_gone")],
)
async def test_caller_closes(code: int, reason: str) -> None:
    """Its code and reason reach the upstream, and it is answered."""
    async with sessions(listen) as it:
        async with speaking(it.headrace) as ws:
            await it.called()
            await ws.close(code=code, message=b"so long")
            assert ws.close_code == code
        await it.ended(reason)
        talk = it.upstream.talks[0]
        assert (talk.code, talk.close_reason) == (code, "so long")


@pytest.mark.parametrize(
    ("code", "reason"),
    [(1000, "complete"), (1001, "complete"), (1011, "upstream_error"), (3000, "upstream_error")],
)
async def test_upstream_closes(code: int, reason: str) -> None:
    """Its last message, its code and its reason reach the caller."""

    async def script(talk: Talk) -> None:
        await talk.ws.send_str("last")
        await talk.ws.close(code=code, message=b"session expired")

    async with sessions(script) as it:
        async with speaking(it.headrace, autoclose=False) as ws:
            assert await ws.receive_str() == "last"
            assert await code_of(ws) == (code, "session expired")
        await it.ended(reason)


async def test_close_without_a_code() -> None:
    """1005 may not be sent: the other side is told 1000."""
    async with sessions(listen) as it:
        async with await Caller.connect(it.port) as caller:
            await caller.send(handshake())
            await caller.head()
            await caller.send(frame(8, b""))
            assert await caller.reader.readexactly(4) == b"\x88\x02\x03\xe8"
            assert await caller.reader.read() == b""
        await it.ended("complete")
        assert it.upstream.talks[0].code == 1000


@pytest.mark.alone
@pytest.mark.parametrize("leave", [Caller.leave, Caller.reset], ids=["fin", "rst"])
async def test_caller_vanishes(leave: Callable[[Caller], None]) -> None:
    """Without a Close frame: the upstream is told at once."""
    async with sessions(listen) as it, await Caller.connect(it.port) as caller:
        await caller.send(handshake())
        await caller.head()
        talk = await it.called()
        leave(caller)
        async with asyncio.timeout(WITHIN_S):
            await talk.gone.wait()
        line = await it.ended("client_gone")
        assert talk.code == 1001
        assert line["status"] == 101
        samples = await it.headrace.metrics()
        assert samples['headrace_client_disconnects_total{phase="stream"}'] == 1
        assert samples['headrace_upstream_attempts_total{result="cancelled",upstream="up"}'] == 1


async def test_caller_says_goodbye_and_hangs_up() -> None:
    """A Close frame whose answer is not waited for is a goodbye all the same."""
    async with sessions(listen) as it, await Caller.connect(it.port) as caller:
        await caller.send(handshake())
        await caller.head()
        talk = await it.called()
        caller.writer.write(frame(1, b"last") + frame(8, b"\x03\xe8bye"))
        caller.leave()
        await it.ended("complete")
        assert (talk.code, talk.close_reason) == (1000, "bye")


async def test_caller_breaks_the_protocol() -> None:
    """A frame that is none: told 1002, and the upstream is told that the session is over."""
    async with sessions(listen) as it, await Caller.connect(it.port) as caller:
        await caller.send(handshake())
        await caller.head()
        await caller.send(b"\xff\xff\xff\xff")
        assert (await caller.reader.readexactly(4))[2:] == b"\x03\xea"
        await it.ended("client_gone")
        assert it.upstream.talks[0].code == 1001


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
async def test_upstream_vanishes(reset: bool) -> None:
    """Never a clean end: 1011 with a reason."""

    async def script(talk: Talk) -> None:
        await talk.ws.send_str("half")
        await talk.receive()
        talk.vanish(reset=reset)

    async with sessions(script) as it:
        async with speaking(it.headrace, autoclose=False) as ws:
            assert await ws.receive_str() == "half"
            await ws.send_str("go")
            code, text = await code_of(ws)
            assert code == 1011
            assert "ended the answer" in text
        line = await it.ended("upstream_cut")
        assert line["error"] == "upstream_error"
        samples = await it.headrace.metrics()
        assert samples['headrace_upstream_attempts_total{result="reset",upstream="up"}'] == 1


async def test_upstream_breaks_the_protocol() -> None:
    """What is no frame is not passed on."""

    async def script(talk: Talk) -> None:
        talk.raw(b"\xff\xff\xff\xff")
        await talk.until_closed()

    async with sessions(script) as it:
        async with speaking(it.headrace, autoclose=False) as ws:
            assert (await code_of(ws))[0] == 1011
        line = await it.ended("upstream_error")
        assert line["error"] == "upstream_invalid_response"


@pytest.mark.alone
@pytest.mark.parametrize("path", [REALTIME, RESPONSES])
async def test_drain(path: str) -> None:
    """At the end of the drain the caller is told 1001, and so is the upstream."""
    async with sessions(listen) as it:
        async with speaking(it.headrace, path, autoclose=False) as ws:
            if path == RESPONSES:
                await ws.send_str(create())
            talk = await it.called()
            draining = asyncio.ensure_future(it.headrace.server.drain(0.1, asyncio.Event()))
            assert await code_of(ws) == (1001, "draining")
            await draining
        line = await it.ended("drained")
        assert (line["status"], line["error"]) == (101, "draining")
        await until(talk.gone.is_set)
        assert talk.code == 1001


@pytest.mark.alone
async def test_drain_of_those_who_do_not_listen() -> None:
    """A caller and an upstream that answer no Close frame hold up nothing: the line is written in time."""

    async def script(talk: Talk) -> None:
        await asyncio.Event().wait()

    async with sessions(script) as it, await Caller.connect(it.port) as caller:
        await caller.send(handshake())
        await caller.head()
        await it.called()
        await it.headrace.server.drain(0.1, asyncio.Event())
        assert [line["reason"] for line in it.headrace.log_lines()] == ["drained"]


async def test_kill() -> None:
    """DELETE /admin/streams/ID ends a session: 1008."""
    async with sessions(listen) as it:
        async with speaking(it.headrace, autoclose=False) as ws, aiohttp.ClientSession() as admin:
            talk = await it.called()
            async with admin.get(f"{it.headrace.admin_url}/admin/streams") as answer:
                (stream,) = (await answer.json())["streams"]
            assert (stream["route"], stream["phase"]) == ("/v1/realtime", "stream")
            async with admin.delete(f"{it.headrace.admin_url}/admin/streams/{stream['id']}") as answer:
                assert answer.status < 300
            code, text = await code_of(ws)
            assert (code, text) == (1008, "The request was stopped by the operator.")
        await it.ended("killed")
        await until(talk.gone.is_set)
        assert talk.code == 1001


# ── openings that the upstream declines ──────────────────────────────────────────────────────────────────


def with_status(status: int, **fields: str) -> Callable[[web.Request], web.Response]:
    return lambda _: web.Response(status=status, text="secret of the upstream", headers=fields)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, "upstream_auth"),
        (403, "upstream_auth"),
        (404, "upstream_error"),
        (429, "upstream_error"),
        (500, "upstream_error"),
        (200, "upstream_invalid_response"),
    ],
)
async def test_upstream_declines(status: int, code: str) -> None:
    """An ordinary error before our own upgrade; its text is not passed on."""
    async with sessions(listen, answer=with_status(status)) as it:
        error = await refused(it, handshake(REALTIME), 502, code, "upstream_error")
        assert "secret" not in str(error)
        assert len(it.upstream.openings) == 1


async def test_redirects_are_not_followed() -> None:
    """They would carry the credential elsewhere."""
    async with talking(listen) as other:
        there = with_status(302, Location=f"{other.url}/realtime?model=m")
        async with sessions(listen, answer=there) as it:
            await refused(it, handshake(REALTIME), 502, "upstream_invalid_response", "upstream_error")
        assert other.openings == []


async def test_nobody_listens() -> None:
    """Connection refused is a 502, and the only attempt."""
    nowhere = {"base_url": "http://127.0.0.1:9/v1"}
    async with sessions(listen, upstream=nowhere) as it:
        await refused(it, handshake(REALTIME), 502, "upstream_unreachable", "upstream_error")
        samples = await it.headrace.metrics()
        assert samples['headrace_upstream_attempts_total{result="connect_error",upstream="up"}'] == 1


async def test_upstream_dies_in_the_opening() -> None:
    """Once: aiohttp's own silent second attempt does not happen."""

    def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with sessions(listen, answer=answer) as it:
        await refused(it, handshake(REALTIME), 502, "upstream_unreachable", "upstream_error")
        assert len(it.upstream.openings) == 1


async def test_upstream_does_not_answer_the_opening() -> None:
    """first_byte is how long it may take."""
    with socket.create_server(("127.0.0.1", 0)) as hole:  # connections are made, and never looked at
        settings = settings_for(
            f"http://127.0.0.1:{hole.getsockname()[1]}/v1",
            upstream={"timeouts": {"connect": 0.1, "first_byte": 0.1}},
            models={"m": {"upstreams": ["up"], "websocket": True}},
        )
        async with running(settings) as headrace:
            answer = await ask(headrace.port, handshake())
            assert (answer.status, answer.json()["error"]["code"]) == (504, "upstream_timeout")
            assert headrace.log_lines()[0]["reason"] == "upstream_stall"
            await headrace.quiet()


@pytest.mark.parametrize("first", ["refuses", "answers 503"])
async def test_next_upstream(first: str) -> None:
    """Who declines with a status of `retry.statuses`, or cannot be reached, is followed by the next."""
    async with talking(listen, answer=with_status(503)) as busy, talking(echo) as good:
        bad = busy.url if first == "answers 503" else "http://127.0.0.1:9/v1"
        settings = settings_for(
            bad,
            upstreams={"bad": {"base_url": bad}, "good": {"base_url": good.url}},
            models={"m": {"upstreams": ["bad", {"name": "good", "tier": 2}], "websocket": True}},
            retry={"attempts": 3},
        )
        async with running(settings) as headrace:
            it = Lab(headrace, good)  # type: ignore[arg-type]  # a part of it is enough
            async with speaking(headrace) as ws:
                assert ws._response.headers["x-headrace-upstream"] == "good"
                assert ws._response.headers["x-headrace-attempts"] == "2"
                await ws.send_str("hi")
                assert await ws.receive_str() == "hi"
            line = await it.ended("complete")
            assert (line["attempts"], line["upstream"]) == (2, "good")


async def test_next_upstream_without_a_slot() -> None:
    """A session that fails over waits for no slot either."""
    async with talking(echo) as good:
        settings = settings_for(
            good.url,
            upstreams={
                "bad": {"base_url": "http://127.0.0.1:9/v1"},
                "good": {"base_url": good.url, "max_in_flight": 1},
            },
            models={
                "m": {"upstreams": ["bad", {"name": "good", "tier": 2}], "websocket": True},
                "good": {"upstreams": ["good"], "websocket": True},
            },
            retry={"attempts": 3},
        )
        async with running(settings) as headrace:
            it = Lab(headrace, good)  # type: ignore[arg-type]  # a part of it is enough
            async with speaking(headrace, "/v1/realtime?model=good"):
                answer = await ask(it.port, handshake(REALTIME))
                assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_unreachable")
                assert answer.headers["x-headrace-attempts"] == "1"
            await it.ended("complete", 2)
            assert len(good.openings) == 1


@pytest.mark.parametrize("opted_in", [True, False])
async def test_fallback(opted_in: bool) -> None:
    """Another model stands in, under its own name, if it has opted in as well."""
    async with talking(echo) as good:
        settings = settings_for(
            good.url,
            upstreams={"bad": {"base_url": "http://127.0.0.1:9/v1"}, "good": {"base_url": good.url}},
            models={
                "m": {"upstreams": ["bad"], "websocket": True, "fallback": ["other"]},
                "other": {"upstreams": ["good"], "websocket": opted_in},
            },
            retry={"attempts": 3},
        )
        async with running(settings) as headrace:
            it = Lab(headrace, good)  # type: ignore[arg-type]  # a part of it is enough
            if not opted_in:
                await refused(it, handshake(REALTIME), 502, "upstream_unreachable", "upstream_error")
                assert good.openings == []
                return
            async with speaking(headrace) as ws:
                assert ws._response.headers["x-headrace-model"] == "other"
            async with speaking(headrace, RESPONSES) as ws:
                await ws.send_str(create())
                assert await ws.receive_str() == create("other").replace(" ", "")
            line = await it.ended("complete", 2)
            assert (line["model"], line["upstream"], line["attempts"]) == ("other", "good", 2)
            assert good.openings[0].raw_path == "/v1/realtime?model=other"


async def test_through_an_outbound_proxy() -> None:
    """A TLS upstream behind a proxy: in a tunnel, with the proxy's own credential outside of it."""
    with authority().cert_pem.tempfile() as ca_file:
        async with connect_proxy() as proxy:
            extra = {"ca_file": ca_file, "proxy": proxy.url("user:word")}
            async with sessions(echo, tls=server_context(), upstream=extra) as it:
                async with speaking(it.headrace) as ws:
                    await ws.send_str("hi")
                    assert await ws.receive_str() == "hi"
                await it.ended("complete")
                assert "Proxy-Authorization" not in it.upstream.openings[0].headers
            assert proxy.tunnels == 1
            assert b"Proxy-Authorization: Basic " in proxy.heads[0]


async def test_next_credential() -> None:
    """A credential that is refused rests; the same upstream is asked with the next one."""
    seen: list[str] = []

    def answer(request: web.Request) -> web.Response | None:
        seen.append(request.headers["Authorization"])
        return web.Response(status=401) if seen[-1] == "Bearer one" else None

    keys = {"api_key": "", "api_keys": ["one", "two"]}
    async with sessions(echo, answer=answer, upstream=keys, retry={"attempts": 3}) as it:
        for _ in range(2):
            async with speaking(it.headrace):
                pass
        await it.ended("complete", 2)
    assert seen == ["Bearer one", "Bearer two", "Bearer two"]


async def test_breaker() -> None:
    """Sessions that are cut open the upstream's breaker; then there is nobody to ask."""

    async def script(talk: Talk) -> None:
        talk.vanish()

    breaker = {"failures": 2, "cool_down": 60}
    async with sessions(script, upstream={"breaker": breaker}) as it:
        for number in range(1, 3):
            async with speaking(it.headrace, autoclose=False) as ws:
                await code_of(ws)
            await it.ended("upstream_cut", number)
        answer = await ask(it.port, handshake())
        assert (answer.status, answer.json()["error"]["code"]) == (503, "no_upstream_available")
        assert 1 <= int(answer.headers["retry-after"]) <= 60


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.alone
async def test_quiet_sessions_live() -> None:
    """Nobody says anything for many times `idle`, and `total` is over as well: pongs are enough."""
    async with sessions(echo, upstream={"timeouts": {"idle": 0.5, "total": 1}}) as it:
        async with speaking(it.headrace) as ws:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2):
                    await ws.receive()  # the library answers our pings
            await ws.send_str("still")
            assert await ws.receive_str() == "still"
        await it.ended("complete")


@pytest.mark.alone
async def test_silent_caller() -> None:
    """A caller that answers no ping, because it is not reading, is left alone."""
    async with sessions(echo, upstream={"timeouts": {"idle": 0.4}}) as it:
        async with speaking(it.headrace, autoping=False) as ws:
            await asyncio.sleep(1.2)
            await ws.send_str("still")
            message = await ws.receive()
            while message.type is WSMsgType.PING:
                assert message.data == b"headrace"
                message = await ws.receive()
            assert message.data == "still"
        await it.ended("complete")


@pytest.mark.alone
async def test_stalled_upstream() -> None:
    """No message and no pong for `idle`: the session ends with 1011."""

    async def script(talk: Talk) -> None:
        await asyncio.Event().wait()  # does not even read

    async with sessions(script, upstream={"timeouts": {"idle": 0.4}}) as it:
        async with speaking(it.headrace, autoclose=False) as ws:
            code, text = await code_of(ws)
            assert (code, text) == (1011, "The model provider did not answer in time.")
        line = await it.ended("upstream_stall")
        assert line["error"] == "upstream_timeout"
        samples = await it.headrace.metrics()
        assert samples['headrace_upstream_attempts_total{result="timeout",upstream="up"}'] == 1


@pytest.mark.alone
async def test_caller_that_does_not_read() -> None:
    """Holds back the upstream, in little memory; after `timeouts.write` it has left."""
    sent = 0

    async def script(talk: Talk) -> None:
        nonlocal sent
        try:
            while True:
                await talk.ws.send_bytes(bytes(65536))
                sent += 65536
        except ConnectionError:
            pass

    settings = {"timeouts": {"write": 2}, "upstream": {"timeouts": {"idle": 0.5}}}
    async with sessions(script, **settings) as it:
        async with await Caller.connect(it.port, receive_buffer=4096) as caller:
            await caller.send(handshake())
            await caller.head()
            await asyncio.sleep(1)
            assert sent < 32 * 2**20  # what the kernel's buffers take, and no more
            line = await it.ended("client_gone")
        assert line["duration_ms"] >= 2000
        assert line["bytes_out"] < 32 * 2**20


@pytest.mark.alone
@pytest.mark.parametrize("talks", [False, True])
async def test_upstream_that_does_not_read(talks: bool) -> None:
    """Holds back the caller; after `idle` it has stalled, even if it goes on to talk."""

    async def script(talk: Talk) -> None:
        while talks:
            await talk.ws.send_str("still here")
            await asyncio.sleep(0.1)
        await asyncio.Event().wait()

    async with sessions(script, upstream={"timeouts": {"idle": 1}}) as it:
        async with speaking(it.headrace, autoclose=False) as ws:

            async def send() -> None:
                try:
                    while True:
                        await ws.send_bytes(bytes(65536))
                except ConnectionError:
                    pass

            sending = asyncio.ensure_future(send())
            assert (await code_of(ws))[0] == 1011
            sending.cancel()
        line = await it.ended("upstream_stall")
        assert line["bytes_in"] < 16 * 2**20


# ── /v1/responses ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/v1/responses", "/responses?x=1"])
async def test_responses(path: str) -> None:
    """The model of the first message finds the upstream, and the message is sent on as it came."""
    first = create(input="é", instructions="a  b")
    async with sessions(echo) as it:
        async with speaking(it.headrace, path) as ws:
            await ws.ping()
            await ws.pong()
            for message in (first, create(input="2"), '{"type":"response.cancel"}'):
                await ws.send_str(message)
                assert await ws.receive_str() == message
        line = await it.ended("complete")
        assert it.upstream.talks[0].request.raw_path == f"/v1{path.removeprefix('/v1')}"
    assert (line["route"], line["model"], line["upstream"]) == ("/v1/responses", "m", "up")
    assert line["bytes_in"] == line["bytes_out"]
    assert line["chunks"] == 3


async def test_responses_mapped_model() -> None:
    """Every message that names the model is rewritten; where it is, and nothing else."""
    models = {"m": {"upstreams": [{"name": "up", "model": "real"}], "websocket": True}}
    async with sessions(echo, models=models) as it:
        async with speaking(it.headrace, RESPONSES) as ws:
            for message, expected in (
                (
                    '{"type":"response.create","model":"m","top_p":1.0}',
                    '{"type":"response.create","model":"real","top_p":1.0}',
                ),
                ('{"type":"response.create"}', '{"type":"response.create"}'),
                (
                    '{"type":"response.create","model":"m","input":"%s"}' % ("x" * 2**21),
                    '{"type":"response.create","model":"real","input":"%s"}' % ("x" * 2**21),
                ),
                ('{"response":{"model":"m","a":[1, 2]}}', '{"response":{"model":"real","a":[1, 2]}}'),
                (
                    '{"model":"m","response":{"model":"m"}}',
                    '{"model":"real","response":{"model":"real"}}',
                ),
            ):
                await ws.send_str(message)
                assert await ws.receive_str() == expected
        await it.ended("complete")


WRONG = {
    create("other"): "bad_request",
    '{"response":{"model":"other"}}': "bad_request",
    '{"model":"m","response":{"model":"other"}}': "duplicate_key",
    '{"model":"m","model":"other"}': "duplicate_key",
    '{"model":"m","mod\\u0065l":"other"}': "duplicate_key",
    '{"response":{"model":"m"},"response":{"model":"other"}}': "duplicate_key",
    '{"response":{"model":"m"},"respons\\u0065":{"model":"other"}}': "duplicate_key",
    '{"response":{"model":"m","model":"other"}}': "duplicate_key",
    '{"model":"m","pad":"%s","response":{"model":"m"}}' % ("x" * 2**20): "bad_request",
    "[]": "invalid_json",
    "{": "invalid_json",
    "": "invalid_json",
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("binary", [False, True])
async def test_responses_keep_their_model(message: str, binary: bool) -> None:
    """A session cannot change to a model that nobody has authorised: the message stays here, an event says
    so, and the session goes on."""
    async with sessions(echo) as it:
        async with speaking(it.headrace, RESPONSES) as ws:
            await ws.send_str(create())
            await ws.receive_str()
            await (ws.send_bytes(message.encode()) if binary else ws.send_str(message))
            error = await error_of(ws)
            assert (error["code"], error["http"]) == (WRONG[message], 400)
            await ws.send_str(create(input="again"))
            assert await ws.receive_str() == create(input="again")
        line = await it.ended("complete")
        assert line["chunks"] == 2


@pytest.mark.parametrize(
    ("message", "status", "code"),
    [
        (create("closed"), 404, "not_found"),
        (create("nobody"), 404, "model_not_found"),
        (create(model=7), 400, "bad_request"),
        ("{", 400, "invalid_json"),
    ],
)
async def test_responses_refused(message: str, status: int, code: str) -> None:
    """After the upgrade an error is an event, and then 1008."""
    models = {"m": {"upstreams": ["up"], "websocket": True}, "closed": {"upstreams": ["up"]}}
    async with sessions(listen, models=models) as it:
        async with speaking(it.headrace, RESPONSES, autoclose=False) as ws:
            await ws.send_str(message)
            error = await error_of(ws)
            assert (error["http"], error["code"]) == (status, code)
            assert (await code_of(ws))[0] == 1008
        line = await it.ended("rejected")
        assert (line["status"], line["error"]) == (101, code)
        assert it.upstream.openings == []


async def test_responses_of_a_key(tmp_path: Path) -> None:
    """The allow-list of a key holds for the model of the first message; without a model it is refused too."""
    key = await make_key(tmp_path, models=["other"])
    async with sessions(listen, auth=auth_section(tmp_path)) as it:
        for message in (create(), create(None)):
            async with speaking(it.headrace, RESPONSES, headers={"x-api-key": key}, autoclose=False) as ws:
                await ws.send_str(message)
                assert (await error_of(ws))["code"] == "model_not_allowed"
                assert (await code_of(ws))[0] == 1008


async def test_responses_with_a_subprotocol(tmp_path: Path) -> None:
    """A page needs one of its own to be selected, before anybody knows the upstream; not its credential."""
    key = await make_key(tmp_path)
    offered = (f"openai-insecure-api-key.{key}", "realtime", "other")
    async with sessions(echo, auth=auth_section(tmp_path), options={"protocols": ("other",)}) as it:
        async with speaking(it.headrace, RESPONSES, protocols=offered) as ws:
            assert ws.protocol == "realtime"
            await ws.send_str(create())
            assert await ws.receive_str() == create()
        await it.ended("complete")
        assert it.upstream.openings[0].headers["Sec-WebSocket-Protocol"] == "realtime"


async def test_responses_without_a_model() -> None:
    """A stored prompt names its model at the provider: `default_upstream`, and no model later on."""
    async with sessions(echo) as it:
        async with speaking(it.headrace, RESPONSES) as ws:
            await ws.send_str(create(None, prompt={"id": "p"}))
            assert await ws.receive_str() == create(None, prompt={"id": "p"})
            await ws.send_str(create())
            assert (await error_of(ws))["code"] == "bad_request"
        line = await it.ended("complete")
        assert line["model"] == "none"


async def test_responses_upstream_fails() -> None:
    """An event with the error that a request would get, then 1011."""
    async with sessions(listen, answer=with_status(403)) as it:
        async with speaking(it.headrace, RESPONSES, autoclose=False) as ws:
            await ws.send_str(create())
            assert (await error_of(ws))["code"] == "upstream_auth"
            assert (await code_of(ws))[0] == 1011
        line = await it.ended("upstream_error")
        assert line["attempts"] == 1


async def test_responses_caller_says_nothing() -> None:
    """For `timeouts.body`; it holds no slot meanwhile."""
    async with sessions(listen, timeouts={"body": 0.2}) as it:
        async with speaking(it.headrace, RESPONSES, autoclose=False) as ws:
            assert it.headrace.state["permits"] == 0
            assert (await error_of(ws))["code"] == "request_timeout"
            assert (await code_of(ws))[0] == 1008
        await it.ended("rejected")


@pytest.mark.parametrize(("payload", "reason"), [(b"\x03\xe8", "complete"), (None, "client_gone")])
async def test_responses_caller_leaves_first(payload: bytes | None, reason: str) -> None:
    """Before it has asked for anything."""
    async with sessions(listen) as it, await Caller.connect(it.port) as caller:
        await caller.send(handshake(RESPONSES))
        await caller.head()
        if payload is not None:
            await caller.send(frame(8, payload))
            assert await caller.reader.readexactly(4) == b"\x88\x02" + payload
        caller.leave()
        await it.ended(reason)
        assert it.upstream.openings == []


@pytest.mark.alone
async def test_responses_drained_while_queued() -> None:
    """A session that waits for a slot after its upgrade is told as well."""
    limits = {"queue": {"max_wait": 40}}
    async with (
        sessions(listen, upstream={"max_in_flight": 1}, limits=limits) as it,
        speaking(it.headrace, autoclose=False) as first,
        speaking(it.headrace, RESPONSES, autoclose=False) as second,
    ):
        await it.called()
        await second.send_str(create())
        await until(lambda: it.headrace.state["queued"] == 1)
        draining = asyncio.ensure_future(it.headrace.server.drain(0.1, asyncio.Event()))
        assert (await error_of(second))["code"] == "draining"
        assert (await code_of(second))[0] == 1001
        assert (await code_of(first))[0] == 1001
        await draining
        assert {line["reason"] for line in it.headrace.log_lines()} == {"drained"}


# ── usage ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "event", "expected"), [(REALTIME, DONE, (20, 10)), (RESPONSES, COMPLETED, (14, 6))]
)
async def test_usage_adds_up(path: str, event: str, expected: tuple[int, int]) -> None:
    """Every response of a session is billed for itself; what merely mentions usage is not counted."""
    others = (
        '{"type":"response.created","response":{"usage":null}}',
        '{"type":"conversation.item.created","text":"\\"usage\\": 5"}',
        '{"type":"response.done","response":{"usage":"none"}}',
        '{"type":"response.in_progress","response":{"usage":{"input_tokens":99,"output_tokens":99}}}',
        '{"type":"error","usage":{"input_tokens":99,"output_tokens":99}}',
        '{"usage"',
    )

    async def script(talk: Talk) -> None:
        for each in (*others, event, *others, event):
            await talk.ws.send_str(each)
        await talk.ws.close()

    async with sessions(script) as it:
        async with speaking(it.headrace, path, autoclose=False) as ws:
            if path == RESPONSES:
                await ws.send_str(create())
            assert (await code_of(ws))[0] == 1000
        line = await it.ended("complete")
    assert (line["prompt_tokens"], line["completion_tokens"]) == expected
    assert (line["usage_source"], line["chunks"]) == ("reported", 14)


async def test_cost() -> None:
    """Every response at the model's price; an opening that is declined costs nothing."""
    models = {
        "m": {"upstreams": ["up"], "websocket": True, "price": {"input": 1, "cached_input": 0.5, "output": 2}}
    }

    async def script(talk: Talk) -> None:
        await talk.ws.send_str(DONE)
        await talk.ws.send_str(DONE)
        await talk.ws.close()

    async with sessions(script, models=models) as it:
        async with speaking(it.headrace, autoclose=False) as ws:
            await code_of(ws)
        line = await it.ended("complete")
        assert line["cost_usd"] == "0.000036"  # 2 * (6 * 1 + 4 * 0.5 + 5 * 2) / 1e6
    async with sessions(script, models=models, answer=with_status(500)) as it:
        async with speaking(it.headrace, RESPONSES, autoclose=False) as ws:
            await ws.send_str(create())
            await code_of(ws)
        line = await it.ended("upstream_error")
        assert (line["prompt_tokens"], line["completion_tokens"], line["cost_usd"]) == (0, 0, "0.00")


async def test_many_sessions() -> None:
    """A hundred at once, half of them left without a word; nothing is left behind."""
    everybody = asyncio.Barrier(100)

    async def one(headrace: Headrace, number: int) -> None:
        async with await Caller.connect(headrace.port) as caller:
            await caller.send(handshake())
            await caller.head()
            await caller.send(frame(1, b"%d" % number))
            text = b"%d" % number
            assert await caller.reader.readexactly(2 + len(text)) == bytes([0x81, len(text)]) + text
            await everybody.wait()
            if number % 2:
                caller.reset()
            else:
                await caller.send(frame(8, b"\x03\xe8"))
                assert await caller.reader.readexactly(4) == b"\x88\x02\x03\xe8"

    async with sessions(echo) as it, asyncio.timeout(40):
        await asyncio.gather(*(one(it.headrace, number) for number in range(100)))
        await until(lambda: len(it.headrace.log_lines()) == 100)
        await it.headrace.quiet()
        reasons = [line["reason"] for line in it.headrace.log_lines()]
        assert sorted(reasons) == ["client_gone"] * 50 + ["complete"] * 50
        await until(lambda: all(talk.gone.is_set() for talk in it.upstream.talks))


# ── OpenAI's SDK ─────────────────────────────────────────────────────────────────────────────────────────


async def speak_realtime(talk: Talk) -> None:
    await talk.ws.send_str('{"type":"session.created","event_id":"e","session":{"type":"realtime"}}')
    event = json.loads(await talk.receive())
    assert event["type"] == "response.create"
    await talk.ws.send_str('{"type":"response.output_text.delta","event_id":"e","delta":"hi"}')
    await talk.ws.send_str(DONE)
    await talk.until_closed()


def clients(headrace: Headrace) -> dict[str, Any]:
    return {"base_url": headrace.base_url, "api_key": "caller-key", "max_retries": 0}


async def test_sdk_realtime() -> None:
    """client.realtime.connect, async."""
    async with sessions(speak_realtime) as it:
        async with (
            openai.AsyncOpenAI(**clients(it.headrace)) as client,
            client.realtime.connect(model="m") as connection,
        ):
            await connection.response.create()
            kinds = []
            async for event in connection:
                kinds.append(event.type)
                if event.type == "response.done":
                    break
        line = await it.ended("complete")
    assert kinds == ["session.created", "response.output_text.delta", "response.done"]
    assert (line["prompt_tokens"], line["completion_tokens"]) == (10, 5)


async def test_sdk_realtime_sync() -> None:
    """client.realtime.connect, in a thread."""

    def work(headrace: Headrace) -> list[str]:
        with (
            openai.OpenAI(**clients(headrace)) as client,
            client.realtime.connect(model="m") as connection,
        ):
            connection.response.create()
            return [connection.recv().type for _ in range(3)]

    async with sessions(speak_realtime) as it:
        kinds = await asyncio.to_thread(work, it.headrace)
        await it.ended("complete")
    assert kinds == ["session.created", "response.output_text.delta", "response.done"]


async def speak_responses(talk: Talk) -> None:
    for number in range(2):
        event = json.loads(await talk.receive())
        assert (event["type"], event["model"], event["input"]) == ("response.create", "m", f"{number}")
        await talk.ws.send_str('{"type":"response.output_text.delta","sequence_number":1,"delta":"hi"}')
        await talk.ws.send_str(COMPLETED)
    await talk.until_closed()


async def test_sdk_responses() -> None:
    """client.responses.connect: two responses in one session."""
    async with sessions(speak_responses) as it:
        async with (
            openai.AsyncOpenAI(**clients(it.headrace)) as client,
            client.responses.connect() as connection,
        ):
            kinds = []
            for number in range(2):
                asked: ResponsesClientEventParam = {
                    "type": "response.create",
                    "model": "m",
                    "input": f"{number}",
                }
                await connection.send(asked)
                kinds += [(await connection.recv()).type for _ in range(2)]
        line = await it.ended("complete")
    assert kinds == ["response.output_text.delta", "response.completed"] * 2
    assert (line["prompt_tokens"], line["completion_tokens"]) == (14, 6)


async def test_sdk_refusal() -> None:
    """A model that has not opted in: the SDK's own exception, with our status."""
    async with sessions(listen, models=CLOSED) as it, openai.AsyncOpenAI(**clients(it.headrace)) as client:
        with pytest.raises(Exception, match="404"):
            async with client.realtime.connect(model="m"):
                pass
