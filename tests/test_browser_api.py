"""The browser API: a page without a key asks the configured model, and nothing more than that."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import event as event_of
from hypothesis import strategies as st

from proxy import browser_api, schema
from proxy.browser_api import ContentOnly
from proxy.errors import BadRequest, ModelNotAllowed, UpstreamInvalid
from proxy.sse_events import LONGEST_EVENT, EventReader, UnreadableError
from tests.kit.callers import Answer, Caller, ask, everything, post
from tests.kit.lab import PLAIN, Gate, Lab, LoopThread, Way, both, hold, lab, last_event, plays, response
from tests.kit.upstreams import DONE, END, HEAD, chunk, event

CHAT, STREAM, CONTENT = "/api/chat", "/api/chat/stream", "/api/chat/stream?format=content"
BOTH_ROUTES = pytest.mark.parametrize("path", [CHAT, STREAM])
API: dict[str, Any] = {"browser_api": {"model": "m", "max_tokens": 100, "temperature": 0.5}}
WAY = PLAIN[0]
HI = {"role": "user", "content": "hi"}
QUESTION = {"messages": [HI]}
A, B = event("a"), event("b")
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
FINISHED = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
COMPLETION = {
    "id": "x",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hé"}, "finish_reason": "stop"}],
    "usage": USAGE,
}
WHOLE = plays(response(200, json.dumps(COMPLETION).encode()))
SHORT = plays(HEAD + chunk(A + DONE) + END)
FAILED = b'data: {"error":{"message":"upstream says no","type":"x","param":null,"code":"y"}}\n\n'


def content(text: str) -> bytes:
    return f'data: {{"content": {json.dumps(text, ensure_ascii=False)}}}\n\n'.encode()


async def asked(it: Lab, count: int = 1) -> dict[str, Any]:
    """What the upstream was asked."""
    document = json.loads((await it.called(count)).body)
    assert isinstance(document, dict)
    return document


# ── the two routes ───────────────────────────────────────────────────────────────────────────────────────


@both
async def test_a_stream_is_unchanged(way: Way) -> None:
    """The upstream's chunks byte by byte, through /chat/completions, under a route of its own."""
    events = b": comment\n\n" + ROLE + A + B + FINISHED + DONE
    async with lab(plays(HEAD + chunk(events[:30]), chunk(events[30:]) + END), way, **API) as it:
        answer = await ask(it.port, post(f"{STREAM}?a=b", QUESTION))
        assert (answer.status, answer.body, answer.clean) == (200, events, True)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-headrace-upstream"] == "up"
        assert (await it.called()).head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
        line = await it.ended("complete")
        assert (line["route"], line["model"], line["status"]) == ("/api/chat/stream", "m", 200)


@both
async def test_a_whole_answer_is_content_and_usage(way: Way) -> None:
    async with lab(WHOLE, way, **API) as it:
        answer = await ask(it.port, post(CHAT, QUESTION))
        assert answer.status == 200
        assert answer.json() == {"content": "hé", "usage": USAGE}
        assert answer.headers["content-type"] == "application/json"
        assert (await asked(it))["stream"] is False
        line = await it.ended("complete")
        assert (line["route"], line["bytes_out"]) == ("/api/chat", len(answer.body))


@both
async def test_content_only(way: Way) -> None:
    """Text alone, each chunk at once; what has none (role, usage, finish) gives no event."""
    gate = Gate()
    usage = b'data: {"choices":[],"usage":{"total_tokens":1}}\n\n'
    script = plays(HEAD + chunk(b": hello\n\n" + ROLE + A), gate, chunk(FINISHED + usage + B + DONE) + END)
    async with lab(script, way, **API) as it, await Caller.connect(it.port) as caller:
        await caller.send(post(CONTENT, QUESTION))
        answer = await caller.head()
        assert await caller.piece(answer) == content("a")
        gate.open()
        await caller.rest(answer)
        assert answer.body == content("a") + content("b") + DONE
        assert answer.clean
        assert answer.headers["content-type"].startswith("text/event-stream")
        line = await it.ended("complete")
        assert line["bytes_out"] == len(answer.body)


async def test_what_the_model_is_asked() -> None:
    """The known fields, the configured model and temperature; what a page adds stays here."""
    extra = {
        "n": 50,
        "tools": [],
        "user": "x",
        "stream": "no",
        "stream_options": 7,
        "max_completion_tokens": 9,
    }
    messages = [
        {"role": "system", "content": "be brief", "cache_control": {"a": 1}},
        {"role": "user", "content": [{"type": "text", "text": "ü", "x": 1.50}], "name": "ann"},
    ]
    async with lab(SHORT, WAY, **API) as it:
        await ask(
            it.port, post(STREAM, {"messages": messages, **extra}, "Cookie: a=b", "Authorization: Bearer k")
        )
        assert await asked(it) == {
            "model": "m",
            "messages": [{"role": "system", "content": "be brief"}, messages[1]],
            "stream": True,
            "temperature": 0.5,
            "max_tokens": 100,
        }
        head = (await it.called()).head
        assert b"Authorization: Bearer upstream-secret" in head
        assert b"Cookie" not in head
        assert b"Bearer k\r\n" not in head


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({"model": "m"}, {}),
        ({"model": None, "temperature": None, "max_tokens": None}, {}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 2}, {"temperature": 2}),
        ({"temperature": 1.25}, {"temperature": 1.25}),
        ({"max_tokens": 1}, {"max_tokens": 1}),
        ({"max_tokens": 101}, {"max_tokens": 100}),
        ({"max_tokens": 10**30}, {"max_tokens": 100}),
    ],
)
async def test_optional_fields(sent: dict[str, Any], expected: dict[str, Any]) -> None:
    """Taken as they are within the configuration's bounds."""
    async with lab(SHORT, WAY, **API) as it:
        assert (await ask(it.port, post(STREAM, {**QUESTION, **sent}))).status == 200
        document = await asked(it)
        usual = {"model": "m", "temperature": 0.5, "max_tokens": 100, **expected}
        assert {name: document[name] for name in usual} == usual


async def test_the_model_may_have_another_name_upstream() -> None:
    """It is routed like any other request."""
    models = {"m": {"upstreams": [{"name": "up", "model": "real"}]}}
    async with lab(SHORT, WAY, models=models, **API) as it:
        assert (await ask(it.port, post(STREAM, QUESTION))).status == 200
        assert (await asked(it))["model"] == "real"


@BOTH_ROUTES
async def test_not_configured(path: str) -> None:
    """There is no such path then; a reload is not needed to say so."""
    async with lab(SHORT, WAY) as it:
        answer = await ask(it.port, post(path, QUESTION))
        assert (answer.status, answer.json()["error"]["code"]) == (404, "not_found")


@BOTH_ROUTES
@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "PUT"])
async def test_only_post(path: str, method: str) -> None:
    async with lab(SHORT, WAY, **API) as it, await Caller.connect(it.port) as caller:
        await caller.send(f"{method} {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        assert (await caller.head()).status == 404


# ── who may ask ──────────────────────────────────────────────────────────────────────────────────────────


@BOTH_ROUTES
@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("https://app.example", 200),
        ("http://test", 200),
        ("https://test", 200),  # behind a TLS proxy
        ("http://TEST", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("", 403),
        ("http://test:81", 403),
        ("http://test.evil.example", 403),
        ("http://test@evil.example", 403),
        ("http://[", 403),
        ("test", 403),
    ],
)
async def test_origins(path: str, origin: str | None, status: int) -> None:
    """A listed page, a page of this very host, or no page at all; refused before the body is looked at."""
    script = WHOLE if path == CHAT else SHORT
    async with lab(script, WAY, cors={"origins": ["https://app.example"]}, **API) as it:
        fields = [] if origin is None else [f"Origin: {origin}"]
        answer = await ask(it.port, post(path, QUESTION, *fields))
        assert answer.status == status
        if status == 403:
            assert answer.json()["error"]["code"] == "origin_not_allowed"
            assert "access-control-allow-origin" not in answer.headers
            assert it.upstream.calls == []
            await it.ended("rejected")


async def test_without_a_list_only_our_own_pages_may_ask() -> None:
    async with lab(SHORT, WAY, **API) as it:
        assert (await ask(it.port, post(STREAM, QUESTION, "Origin: http://test"))).status == 200
        assert (await ask(it.port, post(STREAM, QUESTION, "Origin: https://app.example"))).status == 403
        two = post(STREAM, QUESTION, "Origin: http://test", "Origin: https://evil.example")
        assert (await ask(it.port, two)).status == 403


@BOTH_ROUTES
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_only_json(path: str, kind: str) -> None:
    """What a browser sends across origins without a preflight is refused."""
    async with lab(SHORT, WAY, **API) as it:
        request = post(path, QUESTION).replace(b"application/json", kind.encode())
        assert (await ask(it.port, request)).status == 415
        without = post(path, QUESTION).replace(b"Content-Type: application/json\r\n", b"")
        assert (await ask(it.port, without)).status == 415
        assert it.upstream.calls == []


# ── what a page may say ──────────────────────────────────────────────────────────────────────────────────

ROLES = "is not one of system, user, assistant, developer and tool"
SHAPE = "is neither a string nor a list"
NO_LIST = "is not a list with at least one message"
TEMPERATURE = "is not a number from 0 to 2"
TOKENS = "is not a whole number above 0"
BAD_MESSAGES: list[tuple[Any, str, str]] = [
    ({}, "messages", "is missing"),
    ({"messages": None}, "messages", NO_LIST),
    ({"messages": "hi"}, "messages", NO_LIST),
    ({"messages": {}}, "messages", NO_LIST),
    ({"messages": []}, "messages", NO_LIST),
    ({"messages": ["hi"]}, "messages[0]", "is not an object"),
    ({"messages": [HI, None]}, "messages[1]", "is not an object"),
    ({"messages": [HI, [HI]]}, "messages[1]", "is not an object"),
    ({"messages": [HI, {"role": "user"}]}, "messages[1].content", "is missing"),
    ({"messages": [{}]}, "messages[0].role", "is missing"),
    ({"messages": [HI, HI, {"content": "x"}]}, "messages[2].role", "is missing"),
    ({"messages": [{**HI, "role": "root"}]}, "messages[0].role", ROLES),
    ({"messages": [{**HI, "role": "` - at `$.x`"}]}, "messages[0].role", ROLES),
    ({"messages": [{**HI, "role": "USER"}]}, "messages[0].role", ROLES),
    ({"messages": [{**HI, "role": None}]}, "messages[0].role", ROLES),
    ({"messages": [{**HI, "role": ["user"]}]}, "messages[0].role", ROLES),
    ({"messages": [{**HI, "content": None}]}, "messages[0].content", SHAPE),
    ({"messages": [HI, {**HI, "content": 1}]}, "messages[1].content", SHAPE),
    ({"messages": [{**HI, "content": {}}]}, "messages[0].content", SHAPE),
    ({"messages": [{**HI, "content": True}]}, "messages[0].content", SHAPE),
    ({"messages": [{**HI, "name": 1}]}, "messages[0].name", "is not a string"),
]
BAD_FIELDS: list[tuple[Any, str, str]] = [
    ({"temperature": -0.1}, "temperature", TEMPERATURE),
    ({"temperature": 2.1}, "temperature", TEMPERATURE),
    ({"temperature": "1"}, "temperature", TEMPERATURE),
    ({"temperature": True}, "temperature", TEMPERATURE),
    ({"max_tokens": 0}, "max_tokens", TOKENS),
    ({"max_tokens": -1}, "max_tokens", TOKENS),
    ({"max_tokens": 1.5}, "max_tokens", TOKENS),
    ({"max_tokens": "9"}, "max_tokens", TOKENS),
    ({"model": 7}, "model", "is not a string"),
]


async def refused(it: Lab, path: str, document: Any, status: int = 400) -> dict[str, Any]:
    answer = await ask(it.port, post(path, document))
    assert answer.status == status, answer.body
    assert it.upstream.calls == []
    error = answer.json()["error"]
    assert isinstance(error, dict)
    return error


@BOTH_ROUTES
@pytest.mark.parametrize(("document", "param", "wrong"), BAD_MESSAGES)
async def test_bad_messages_are_named(path: str, document: Any, param: str, wrong: str) -> None:
    async with lab(SHORT, WAY, **API) as it:
        error = await refused(it, path, document)
        assert error["code"] == "invalid_messages"
        assert (error["param"], error["message"]) == (param, f"{param} {wrong}")
        await it.ended("rejected")


@BOTH_ROUTES
@pytest.mark.parametrize(("document", "param", "wrong"), BAD_FIELDS)
async def test_bad_fields_are_named(path: str, document: Any, param: str, wrong: str) -> None:
    async with lab(SHORT, WAY, **API) as it:
        error = await refused(it, path, {**QUESTION, **document})
        assert error["code"] == "bad_request"
        assert (error["param"], error["message"]) == (param, f"{param} {wrong}")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"null",
        b'"messages"',
        b'{"messages":[{"role":"user","content":"\xff"}]}',
        b'{"messages":[{"role":"user","content":["\xff"]}]}',
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"messages":[{"role":"user","content":' + b"[" * 100_000,
        b'{"messages":[{"role":"user","content":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
        b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' + b'{"a":' * 100_000,
    ],
    ids=range(13),
)
async def test_bad_json(body: bytes) -> None:
    """Never a 500, however deep or broken."""
    async with lab(SHORT, WAY, **API) as it:
        error = await refused(it, CHAT, body)
        assert error["code"] in ("invalid_json", "invalid_messages")


async def test_too_many_messages() -> None:
    """One that is large is no reason to refuse, a million small ones are."""
    async with lab(SHORT, WAY, **API) as it:
        error = await refused(it, CHAT, {"messages": [HI] * 100_000})
        assert (error["code"], error["param"]) == ("invalid_messages", "messages")
        assert (
            await ask(it.port, post(STREAM, {"messages": [{**HI, "content": "x" * 4_000_000}]}))
        ).status == 200
        assert (await ask(it.port, post(STREAM, {"messages": [HI] * 10_000}))).status == 200


async def test_another_model_is_not_allowed() -> None:
    models = {"m": {"upstreams": ["up"]}, "dear": {"upstreams": ["up"]}}
    async with lab(SHORT, WAY, models=models, **API) as it:
        for model in ("dear", "unknown", "", "M", "m ", "x" * 300):
            error = await refused(it, STREAM, {**QUESTION, "model": model}, 403)
            assert (error["code"], error["param"]) == ("model_not_allowed", "model")


async def test_an_unknown_format_is_refused() -> None:
    async with lab(SHORT, WAY, **API) as it:
        for query in ("format=", "format=text", "format=content&format=content"):
            error = await refused(it, f"{STREAM}?{query}", QUESTION)
            assert error["param"] == "format"


async def test_a_large_body_is_refused() -> None:
    async with lab(SHORT, WAY, max_body_bytes=1000, **API) as it:
        await refused(it, CHAT, {"messages": [{**HI, "content": "x" * 1000}]}, 413)


# ── answers that go wrong ────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"{}",
        b"[]",
        b'{"choices":[]}',
        b'{"choices":[{}]}',
        b'{"choices":[{"message":7}]}',
        b'{"choices":{}}',
        b"[" * 100_000,
        b"\xff",
    ],
    ids=range(10),
)
async def test_a_whole_answer_that_is_none(way: Way, body: bytes) -> None:
    """502, not an answer without content."""
    async with lab(plays(response(200, body)), way, **API) as it:
        answer = await ask(it.port, post(CHAT, QUESTION))
        assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_invalid_response")
        await it.ended("upstream_error")


@both
async def test_the_upstreams_errors_pass(way: Way) -> None:
    """Its refusal verbatim; a 200 that is an error is none; its 401 is not the page's matter."""
    body = b'{"error":{"message":"slow down","type":"x","param":null,"code":"rate_limit"}}'
    for path in (CHAT, STREAM, CONTENT):
        for status, upstream, expected in (
            (429, response(429, body, "Retry-After: 7"), body),
            (400, response(400, body), body),
            (502, response(200, body), None),
            (502, response(401, body), None),
        ):
            async with lab(plays(upstream), way, **API) as it:
                answer = await ask(it.port, post(path, QUESTION))
                assert answer.status == status
                assert answer.body == expected or (expected is None and b"slow" not in answer.body)


@both
@pytest.mark.parametrize(
    ("path", "upstream"),
    [
        (CHAT, HEAD + chunk(A + DONE) + END),
        (CHAT, response(200, b"\x1f\x8b", "Content-Encoding: gzip")),
        (
            CONTENT,
            HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n") + chunk(b"\x1f\x8b") + END,
        ),
    ],
    ids=["stream", "gzip", "gzip-stream"],
)
async def test_what_cannot_be_read_is_not_passed_on(way: Way, path: str, upstream: bytes) -> None:
    """An event stream where none was asked for, and codings that were not asked for either."""
    async with lab(plays(upstream), way, **API) as it:
        answer = await ask(it.port, post(path, QUESTION))
        assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_invalid_response")


@both
@pytest.mark.parametrize("size", [70_000, 1_000_000])
async def test_a_large_whole_answer(way: Way, size: int) -> None:
    """Larger than what is held of other answers: it is still rewritten as a whole."""
    text = "é" * (size // 2)
    choices = [{"message": {"content": text}}]
    async with lab(plays(response(200, json.dumps({"choices": choices}).encode())), way, **API) as it:
        answer = await ask(it.port, post(CHAT, QUESTION))
        assert answer.json() == {"content": text, "usage": None}
        await it.ended("complete")


@both
async def test_an_endless_whole_answer(way: Way) -> None:
    """What is held has a bound."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99999999\r\n\r\n"
    async with lab(plays(head, b"x" * 6_000_000, hold), way, **API) as it:
        answer = await ask(it.port, post(CHAT, QUESTION))
        assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_invalid_response")
        await it.headrace.quiet()


@both
async def test_a_whole_answer_that_is_cut(way: Way) -> None:
    for size in (10, 100_000):
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 200000\r\n\r\n"
        async with lab(plays(head + b" " * size, 0.1, lambda call: call.close()), way, **API) as it:
            answer = await ask(it.port, post(CHAT, QUESTION))
            assert answer.status == 502
            await it.ended("upstream_cut")


@both
@pytest.mark.parametrize("path", [STREAM, CONTENT])
@pytest.mark.parametrize("cut", [b"", A[:30]], ids=["between", "inside"])
async def test_a_broken_stream_ends_visibly(way: Way, path: str, cut: bytes) -> None:
    """The error event and an abort, no [DONE]; content is between two events even if the upstream is not."""
    # The public way loses what comes together with the end (aiohttp's reader drops it), so that comes later.
    script = plays(HEAD + chunk(A) + (chunk(cut) if cut else b""), 0.1, lambda call: call.close())
    async with lab(script, way, **API) as it:
        answer = await everything(it.port, post(path, QUESTION))
        assert answer.status == 200
        assert not answer.clean
        assert b"[DONE]" not in answer.body
        if path == CONTENT:
            assert answer.body.startswith(content("a") + b'data: {"error":')
        if path == CONTENT or not cut:
            assert last_event(answer)["error"]["code"] == "upstream_error"
        else:
            assert answer.body == A + cut
        await it.ended("upstream_cut")


@both
@pytest.mark.parametrize("failure", [FAILED, b"event: error\ndata: overloaded\n\n"], ids=["object", "named"])
async def test_the_upstreams_error_event_passes(way: Way, failure: bytes) -> None:
    """As it is, with nothing behind it that would look like success."""
    async with lab(plays(HEAD + chunk(A + failure + B) + END), way, **API) as it:
        answer = await ask(it.port, post(CONTENT, QUESTION))
        assert answer.body == content("a") + failure
        await it.ended("upstream_error")


@both
@pytest.mark.parametrize("garbage", [b"data: {\n\n", b"data: \xff\n\n", b"data: [1]\n\n"])
async def test_a_stream_of_no_chunks(way: Way, garbage: bytes) -> None:
    """What cannot be read is no reason to leave something out: the stream ends as a broken one."""
    async with lab(plays(HEAD + chunk(A), 0.05, chunk(garbage), hold), way, **API) as it:
        answer = await everything(it.port, post(CONTENT, QUESTION))
        assert not answer.clean
        assert answer.body.startswith(content("a"))
        assert last_event(answer)["error"]["code"] == "upstream_error"
        await it.ended("upstream_cut")


@both
@pytest.mark.parametrize(
    "ending",
    [DONE, b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]\r\n\r\n", FINISHED, FINISHED[:-2]],
    ids=["whole", "bare", "line", "crlf", "framed", "framed-bare"],
)
async def test_every_good_end_is_done(way: Way, ending: bytes) -> None:
    """Providers end their streams in several ways; a page sees one."""
    async with lab(plays(HEAD + chunk(A + ending) + END), way, **API) as it:
        answer = await ask(it.port, post(CONTENT, QUESTION))
        assert (answer.body, answer.clean) == (content("a") + DONE, True)
        await it.ended("complete")


@both
async def test_an_upstream_that_goes_on_after_done(way: Way) -> None:
    """The grace after the terminator is the same as for any stream."""
    async with lab(plays(HEAD + chunk(A + DONE), hold), way, **API) as it:
        answer = await ask(it.port, post(CONTENT, QUESTION))
        assert (answer.body, answer.clean) == (content("a") + DONE, True)
        await it.ended("complete")


# ── time, leaving, slowness ──────────────────────────────────────────────────────────────────────────────


@both
async def test_heartbeats_while_nothing_is_said(way: Way) -> None:
    """Silence towards the page counts, also while the upstream thinks aloud or is inside an event."""
    thought = b'data: {"choices":[{"index":0,"delta":{"reasoning_content":"hm"}}]}\n\n'
    steps: list[Any] = [HEAD + chunk(A)]
    for _ in range(16):
        steps += [chunk(thought), 0.05]
    steps += [chunk(B[:20]), 0.5, chunk(B[20:] + DONE) + END]
    async with lab(plays(*steps), way, streams={"heartbeat": 0.2}, **API) as it:
        answer = await ask(it.port, post(CONTENT, QUESTION))
        assert answer.clean
        pieces = answer.body.split(b": headrace\n")
        assert b"".join(pieces) == content("a") + content("b") + DONE
        assert len(pieces) - 1 >= 3
        assert all(piece == b"" or piece.endswith(b"\n\n") for piece in pieces)
        await it.ended("complete")


@both
async def test_a_stall_ends_visibly(way: Way) -> None:
    timeouts = {"timeouts": {"idle": 0.3}}
    async with lab(plays(HEAD + chunk(A + B[:9]), hold), way, upstream=timeouts, **API) as it:
        answer = await everything(it.port, post(CONTENT, QUESTION))
        assert not answer.clean
        assert answer.body.startswith(content("a"))
        assert last_event(answer)["error"]["code"] == "upstream_timeout"
        await it.ended("upstream_stall")


@both
@pytest.mark.parametrize("path", [CHAT, STREAM, CONTENT])
async def test_a_page_that_leaves(way: Way, path: str) -> None:
    """The upstream is let go within a second."""
    start = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{" if path == CHAT else HEAD + chunk(A)
    async with lab(plays(start, hold), way, **API) as it:
        caller = await Caller.connect(it.port)
        await caller.send(post(path, QUESTION))
        call = await it.called()
        if path != CHAT:
            await caller.head()
        caller.leave()
        async with asyncio.timeout(5):
            await call.gone.wait()
        await it.ended("client_gone")


@both
async def test_a_page_that_reads_slowly_holds_the_upstream_back(way: Way) -> None:
    """Through the transform as without it, and nothing is lost."""
    text, count = "0123456789" * 6000, 200
    sent = 0

    async def script(call: Any) -> None:
        nonlocal sent
        await call.send(HEAD)
        for _ in range(count):
            await call.send(chunk(event(text)))
            sent += 1
        await call.send(chunk(DONE) + END)

    async with lab(script, way, **API) as it:
        async with await Caller.connect(it.port, receive_buffer=2**14) as caller:
            await caller.send(post(CONTENT, QUESTION))
            answer = await caller.head()
            before = -1
            while before != sent or sent == 0:  # until the upstream has been stopped
                before = sent
                await asyncio.sleep(0.3)
            assert sent < count
            async with asyncio.timeout(20):
                await caller.rest(answer)
        assert answer.body == content(text) * count + DONE
        await it.ended("complete")


async def test_an_old_caller_without_chunks() -> None:
    """HTTP/1.0: the same bytes, ended by the close."""
    async with lab(plays(HEAD + chunk(A), chunk(FINISHED) + END), WAY, **API) as it:
        answer = await ask(it.port, post(CONTENT, QUESTION, version="1.0"))
        assert answer.body == content("a") + DONE


# ── any shape, any cut ───────────────────────────────────────────────────────────────────────────────────

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
ROLE_NAMES = st.sampled_from(["system", "user", "assistant", "developer", "tool"])
GOOD = st.fixed_dictionaries(
    {"role": ROLE_NAMES, "content": st.text() | st.lists(JSON, max_size=3)},
    optional={"x": JSON},
)
ODD = st.fixed_dictionaries(
    {}, optional={"role": ROLE_NAMES | JSON, "content": JSON, "name": JSON, "x": JSON}
)
PAGES = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(GOOD | ODD | JSON, max_size=4) | JSON,
        "model": st.just("m") | JSON,
        "temperature": st.floats(0, 2) | JSON,
        "max_tokens": st.integers(1) | JSON,
        "n": JSON,
        "stream": JSON,
    },
)
SECTION = schema.BrowserApi(model="m", max_tokens=100)


@settings(max_examples=400)
@given(PAGES | JSON, st.booleans())
@example({"messages": [{"role": "user", "content": "1" * 5000}]}, True)
@example({"messages": [{"role": "user", "content": ["model", {"model": 1, "stream": 2}]}]}, True)
def test_a_question_is_read_or_refused(page: Any, stream: bool) -> None:
    """Nothing but a named refusal; what is asked is never more than the configuration allows."""
    try:
        made = browser_api.question(SECTION, json.dumps(page).encode(), stream=stream)
    except ModelNotAllowed:
        event_of("another model")
        return
    except BadRequest:
        event_of("refused")
        return
    event_of("read")
    document = json.loads(made.body)
    assert set(document) == {"model", "messages", "stream", "temperature", "max_tokens"}
    assert (document["model"], document["stream"]) == ("m", stream)
    assert 1 <= document["max_tokens"] <= 100
    assert 0 <= document["temperature"] <= 2
    assert [message["content"] for message in document["messages"]] == [
        message["content"] for message in page["messages"]
    ]
    assert (made.asked.model, made.asked.stream) == ("m", stream)


class Bench:
    """One Headrace for many examples."""

    def __init__(self) -> None:
        self._thread = LoopThread()
        self._stack = AsyncExitStack()
        self.lab = self._thread.run(self._stack.enter_async_context(lab(WHOLE, WAY, **API)))

    def ask(self, request: bytes) -> Answer:
        return self._thread.run(ask(self.lab.port, request))

    def close(self) -> None:
        self._thread.run(self._stack.aclose())
        self._thread.close()


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PAGES)
def test_no_page_makes_us_fail(bench: Bench, page: Any) -> None:
    """The same over a socket: an answer, 400 or 403, never a 500."""
    answer = bench.ask(post(CHAT, page))
    assert answer.status in (200, 400, 403)
    assert answer.json()


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(each, len(data)) for each in at), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


@given(st.lists(st.text(), max_size=6), LINE_ENDS, st.lists(st.integers(0, 900), max_size=20))
@example(["a", "é\u2028\r\n"], b"\r\n", [1, 2, 3])
def test_content_does_not_depend_on_the_cuts(texts: list[str], line_end: bytes, at: list[int]) -> None:
    """Nor on the kind of line ends; empty text gives no event."""
    chunks = [json.dumps({"choices": [{"delta": {"content": text}}]}).encode() for text in texts]
    stream = b"".join(b"id: 1%bdata: %b%b%b" % (line_end, each, line_end, line_end) for each in chunks)
    stream += b"data: [DONE]" + line_end * 2
    transform = ContentOnly()
    out = b"".join(transform.feed(piece) for piece in cut(stream, at)) + transform.flush()
    found = [msgspec.json.decode(each[6:]) for each in out.split(b"\n\n") if each and b"[DONE]" not in each]
    assert found == [{"content": text} for text in texts if text]
    assert out.endswith(DONE)
    assert out.count(b"[DONE]") == 1 + sum("[DONE]" in text for text in texts)


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=9))
@example(b"data: 1\n\r\n\r\rdata: 2\r\r\n", [9, 10, 11])
def test_events_do_not_depend_on_the_cuts(data: bytes, at: list[int]) -> None:
    """Any bytes: the same data whole and in pieces."""

    def read(pieces: list[bytes]) -> list[bytes]:
        reader = EventReader()
        events = [event for piece in pieces for event in reader.feed(piece)] + [reader.rest()]
        return [found for each in events if (found := browser_api.data_of(each))]

    assert read(cut(data, at)) == read([data])


def test_an_event_without_end_is_none() -> None:
    """Memory has a bound."""
    reader = EventReader()
    reader.feed(b"data: " + b"x" * (LONGEST_EVENT - 6))
    with pytest.raises(UnreadableError):
        reader.feed(b"x")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"content": None}, ""),
        ({}, ""),
        ({"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "a"}, 7]}, "a"),
        ({"content": [{"text": None}, {"text": "a"}, {"text": "b"}]}, "ab"),
        ({"content": 7}, ""),
    ],
)
def test_content_is_always_text(said: dict[str, Any], text: str) -> None:
    """A page need not look what type it has."""
    whole = browser_api.content_and_usage(200, json.dumps({"choices": [{"message": said}]}).encode())
    assert json.loads(whole) == {"content": text, "usage": None}
    delta = b"data: " + json.dumps({"choices": [{"delta": said}]}).encode() + b"\n\n"
    assert ContentOnly().feed(delta) == (content(text) if text else b"")


def test_errors_are_not_rewritten() -> None:
    assert browser_api.content_and_usage(500, b"oops") == b"oops"
    with pytest.raises(UpstreamInvalid):
        browser_api.content_and_usage(200, b"oops")


# ── without a key, on a plan ─────────────────────────────────────────────────────────────────────────────


async def test_where_it_is_off_nobody_asks(tmp_path: Path) -> None:
    """As with any path that is not there; no key is asked for, and no address is charged."""
    async with lab(SHORT, WAY, auth={"mode": "required", "database": f"sqlite:{tmp_path}/keys.db"}) as it:
        for path in (STREAM, CHAT):
            answer = await ask(it.port, post(path, QUESTION))
            assert (answer.status, answer.json()["error"]["code"]) == (404, "not_found")
        assert it.upstream.calls == []


async def test_an_address_is_a_caller(tmp_path: Path) -> None:
    """Where keys are required none is asked for here; the plan is the configured one, for each address."""
    sections = {
        "auth": {"mode": "required", "database": f"sqlite:{tmp_path}/keys.db"},
        "plans": {"pages": {"requests_per_minute": 1, "burst": 2}},
        "browser_api": {"model": "m", "plan": "pages"},
        "cors": {"origins": ["https://app.example"]},
    }
    async with lab(SHORT, WAY, **sections) as it:
        request = post(STREAM, QUESTION, "Origin: https://app.example")
        for left in ("1", "0"):
            answer = await ask(it.port, request)
            assert (answer.status, answer.headers["x-ratelimit-remaining-requests"]) == (200, left)
        refusal = await ask(it.port, request)
        assert (refusal.status, refusal.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert refusal.headers["access-control-allow-origin"] == "https://app.example"
        assert int(refusal.headers["retry-after"]) >= 1
        other = post(STREAM, QUESTION, "X-Forwarded-For: 192.0.2.7")
        assert (await ask(it.port, other)).status == 200
        assert len(it.upstream.calls) == 3
        assert (await it.line(4))["plan"] == "pages"
