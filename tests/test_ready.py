"""An answer rendered in one pass is the one that aiohttp renders; whatever is unusual is left to aiohttp."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request

from proxy import ready
from proxy.attempt import WholeAnswer
from proxy.context import Context
from tests.kit.callers import Answer, Caller, chat
from tests.kit.headrace import running, settings_for, until
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.upstreams import DONE, END, Call, chunk, event, scripted

pytestmark = pytest.mark.timeout(30)

BODY = b'{"id":"x","object":"chat.completion","choices":[]}'
#: What providers send: fields that cross, change their name, or are dropped, and one that is repeated.
FIELDS = [
    "X-Custom: kept",
    "X-Custom: twice",
    "X-Empty: ",
    "x-request-id: upstream-id",
    "x-ratelimit-remaining-requests: 9",
    "Cache-Control: private",
    "Connection: keep-alive",
    "Server: gone",
    "Set-Cookie: gone=1",
    "Date: gone",
]


def answering(
    *fields: str, status: str = "200 OK", body: bytes = BODY, kind: str = "application/json"
) -> Any:
    """Streams have the type of a stream, and their bytes in chunks."""

    async def script(call: Call) -> None:
        framing = f"Content-Length: {len(body)}"
        sent = body
        if b'"stream":true' in call.body.replace(b" ", b""):
            framing, sent = "Transfer-Encoding: chunked", chunk(event("hello")) + chunk(DONE) + END
        of = "text/event-stream" if framing.startswith("T") else kind
        lines = [f"HTTP/1.1 {status}", *([f"Content-Type: {of}"] if of else []), *fields, framing, "", ""]
        await call.send("\r\n".join(lines).encode("latin-1") + sent)

    return script


async def head_and_body(caller: Caller, request: bytes) -> tuple[list[str], Answer]:
    """The lines of the head, sorted, without what differs between two requests."""
    await caller.send(request)
    raw = await caller.reader.readuntil(b"\r\n\r\n")
    first, *lines = raw.decode().split("\r\n")[:-2]
    answer = Answer()
    answer.status = int(first.split(" ")[1])
    answer.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    varies = re.compile(r"(?i)date: .* GMT|server-timing: queue;dur=\d+\.\d, upstream;dur=\d+\.\d")
    same = [varies.sub("varies", line) for line in lines]
    figure = re.compile(r"(x-ratelimit-(?:remaining|reset)-\w+: )\d+(m?s|$)")
    return [first, *sorted(figure.sub(r"\1n", line) for line in same)], answer


def refuse(*_: object) -> Any:
    raise AssertionError("this one goes past aiohttp")


@pytest.fixture(params=[False, True], ids=["whole", "stream"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def test_both_ways_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """Line by line, with a plan's figures, on one connection; and the bytes of the body."""
    key = await make_key(tmp_path, plan="small")
    plans = {"small": {"requests_per_minute": 60, "tokens_per_minute": 90000}}
    request = chat(bearer(key), "x-request-id: mine", stream=stream)
    async with scripted(answering(*FIELDS)) as upstream:
        settings = settings_for(upstream.url, plans=plans, auth=auth_section(tmp_path))
        async with running(settings) as headrace, await Caller.connect(headrace.port) as caller:
            with monkeypatch.context() as patch:
                patch.setattr(ready, "CIMultiDict", refuse)
                fast, answer = await head_and_body(caller, request)
                whole = await caller.rest(answer)
            with monkeypatch.context() as patch:
                patch.setattr(ready, "is_usual", lambda *_: False)
                slow, answer = await head_and_body(caller, request)
                again = await caller.rest(answer)
            await until(lambda: len(headrace.log_lines()) == 2)
            lines = headrace.log_lines()
    assert fast == slow
    assert "x-ratelimit-remaining-tokens" in whole.headers
    assert (
        (whole.body, whole.clean)
        == (again.body, again.clean)
        == (event("hello") + DONE if stream else BODY, True)
    )
    for name in ("status", "reason", "bytes_out", "chunks"):
        assert lines[0][name] == lines[1][name], name


UNUSUAL = {
    "1.0": (chat(stream=False, version="1.0"), []),
    "1.0 kept": (chat("Connection: keep-alive", stream=False, version="1.0"), []),
    "close": (chat("Connection: close", stream=False), []),
    "upgrade": (chat("Connection: upgrade", "Upgrade: foo", stream=False), []),
    "latin-1": (chat(stream=False), ["X-Text: caf\xe9"]),
    "two ids": (chat(stream=False), ["request-id: upstream-id", "x-request-id: upstream-id"]),
    "named": (chat(stream=False), ["Connection: x-custom", "X-Custom: gone"]),
}


@pytest.mark.parametrize("name", UNUSUAL)
async def test_what_is_unusual(name: str) -> None:
    """It is answered all the same, by the rules of its own."""
    request, fields = UNUSUAL[name]
    async with scripted(answering(*fields)) as upstream, running(settings_for(upstream.url)) as headrace:
        caller = await Caller.connect(headrace.port)
        async with caller, asyncio.timeout(5):
            answer = await caller.ask(request)
            assert (answer.status, answer.body, answer.clean) == (200, BODY, True)
            kept = name in ("1.0 kept", "latin-1", "two ids", "named")
            assert answer.headers.get("connection") == {"1.0 kept": "keep-alive"}.get(name) if kept else True
            assert answer.headers["x-headrace-upstream"] == "up"
            assert answer.headers["server"] == "headrace"
            if kept:
                assert (await caller.ask(request)).body == BODY
            else:
                assert await caller.reader.read() == b""
    assert answer.headers.get("x-text") == ("caf\xc3\xa9" if name == "latin-1" else None)
    assert answer.headers.get("x-upstream-request-id") == ("upstream-id" if name == "two ids" else None)
    assert "x-custom" not in answer.headers


@pytest.mark.parametrize(
    ("status", "body", "kind", "expected"),
    [
        ("200 OK", b"", "text/plain", ("200", "0", "text/plain")),
        ("200 OK", b"x", "", ("200", "1", "application/octet-stream")),
        ("201 Created", b"x", "text/plain", ("201", "1", "text/plain")),
        ("204 No Content", b"", "", ("204", None, None)),
        ("200 Fine", b"x", "text/plain", ("200", "1", "text/plain")),
        ("404 Not Found", b"{}", "application/json", ("404", "2", "application/json")),
    ],
)
async def test_other_answers(status: str, body: bytes, kind: str, expected: tuple[str, ...]) -> None:
    """Whatever is no 200 with a typed body has aiohttp's framing and type; the connection stays."""
    script = answering(status=status, body=body, kind=kind)
    async with scripted(script) as upstream, running(settings_for(upstream.url)) as headrace:
        caller = await Caller.connect(headrace.port)
        async with caller, asyncio.timeout(5):
            for _ in range(2):
                head, answer = await head_and_body(caller, chat(stream=False))
                if body:
                    assert await caller.reader.readexactly(len(body)) == body
    assert head[0] == f"HTTP/1.1 {status}"
    found = answer.headers.get("content-length"), answer.headers.get("content-type")
    assert (str(answer.status), *found) == expected


async def test_an_answer_that_is_looked_at() -> None:
    """Then it is aiohttp's, as it is and with what may have been changed."""
    ctx = Context("mine", None, "/v1/chat/completions", 0.0)
    whole = WholeAnswer(200, "OK", ((b"Content-Type", b"text/plain"), (b"Server", b"gone")), b"x")
    answer = ready.Ready(ctx, whole, ready.Own("\r\nx-headrace-attempts: 1", frozenset()))
    assert (answer.status, answer.reason, answer.prepared, answer.keep_alive) == (200, "OK", False, None)
    assert dict(answer.headers) == {
        "Content-Type": "text/plain",
        "x-headrace-attempts": "1",
    }
    answer.headers["Vary"] = "Origin"
    assert answer.headers["Vary"] == "Origin"
    assert not answer.sent(make_mocked_request("GET", "/"))
    assert not hasattr(answer, "__http_exception__")
    with pytest.raises(AttributeError):
        answer.nothing  # noqa: B018 # the look is the test
