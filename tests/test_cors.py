"""CORS: pages of the listed origins may read every answer, all others none, and preflights ask nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy import config
from tests.kit.callers import Answer, Caller, ask, chat, post
from tests.kit.headrace import settings_for
from tests.kit.lab import PLAIN, Lab, Way, both, lab, plays, response
from tests.kit.upstreams import DONE, END, HEAD, chunk, event

APP, DEV = "https://app.example", "http://localhost:3000"
CORS = {"origins": [APP, DEV], "max_age": 600}
OPEN: dict[str, Any] = {"cors": CORS, "browser_api": {"model": "m"}}
STREAM = plays(HEAD + chunk(event("a") + DONE) + END)
WAY = PLAIN[0]
#: What a page has to be able to read: contract section 4, and what SDKs decide by.
EXPOSED = {
    "x-request-id",
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
    "x-headrace-upstream",
    "x-headrace-attempts",
    *(f"x-ratelimit-{a}-{b}" for a in ("limit", "remaining", "reset") for b in ("requests", "tokens")),
}
STRANGERS = [
    "https://evil.example",
    "null",
    "*",
    "",
    "https://app.example.evil.example",
    "https://app.example:443",
    "https://app.example/",
    "http://app.example",
    "https://APP.example",
    "https://evil.example https://app.example",
    "https://app.example, https://evil.example",
    "localhost:3000",
]


def get(path: str, *fields: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: test", *fields, "", ""]).encode()


def preflight(path: str, origin: str, *fields: str, method: str = "POST") -> bytes:
    asked = f"Access-Control-Request-Method: {method}"
    return get(path, f"Origin: {origin}", asked, *fields, method="OPTIONS")


def cors_of(answer: Answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


def readable(answer: Answer, origin: str = APP) -> None:
    """The page of this origin may read it, with the fields that it needs; a cache keeps it apart."""
    fields = cors_of(answer)
    assert fields.pop("access-control-allow-origin") == origin
    exposed = {name.strip() for name in fields.pop("access-control-expose-headers").split(",")}
    assert exposed >= EXPOSED
    assert "*" not in exposed
    assert fields == {}  # no credentials, nothing of a preflight
    assert answer.headers["vary"] == "Origin"


def unreadable(answer: Answer) -> None:
    assert cors_of(answer) == {}
    assert answer.headers["vary"] == "Origin"


def with_keys(tmp_path: Path) -> dict[str, Any]:
    return {**OPEN, "auth": {"mode": "required", "database": f"sqlite:{tmp_path}/keys.db"}}


# ── preflights ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/v1/chat/completions", "POST"),
        ("/chat/completions", "POST"),
        ("/v1/messages", "POST"),
        ("/v1/files/file-1", "DELETE"),
        ("/v1/models", "GET"),
        ("/api/chat", "POST"),
        ("/api/chat/stream?format=content", "POST"),
        ("/health", "GET"),
        ("/nowhere", "GET"),
        ("/v1/%2e%2e/admin", "POST"),
    ],
)
async def test_preflight(tmp_path: Path, path: str, method: str) -> None:
    """It needs no key, is answered here for every path, and nothing of it goes upstream."""
    async with lab(STREAM, WAY, **with_keys(tmp_path)) as it:
        request = preflight(path, APP, "Access-Control-Request-Headers: authorization", method=method)
        answer = await ask(it.port, request)
        assert answer.status == 200
        assert answer.body == b""
        assert cors_of(answer) == {
            "access-control-allow-origin": APP,
            "access-control-allow-methods": "GET, POST, DELETE",
            "access-control-allow-headers": "authorization",
            "access-control-max-age": "600",
        }
        assert answer.headers["vary"] == "Origin"
        assert answer.headers["x-request-id"]
        line = await it.ended("complete")
        assert (line["method"], line["status"], line["attempts"]) == ("OPTIONS", 200, 0)
        assert it.upstream.calls == []


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        (None, None),
        ("", None),
        ("Authorization, Content-Type", "authorization, content-type"),
        ("x-stainless-os,x-stainless-lang , X-Api-Key", "x-api-key, x-stainless-lang, x-stainless-os"),
        ("a b, c:d, <e>, \t, ok", "ok"),
        ("content-type, content-type", "content-type"),
        ('"quoted"', None),
    ],
)
async def test_only_field_names_are_reflected(asked: str | None, allowed: str | None) -> None:
    """Whatever a page wants to send, as long as it is the name of a field."""
    async with lab(STREAM, WAY, **OPEN) as it:
        fields = [] if asked is None else [f"Access-Control-Request-Headers: {asked}"]
        answer = await ask(it.port, preflight("/v1/chat/completions", APP, *fields))
        assert answer.status == 200
        assert answer.headers.get("access-control-allow-headers") == allowed


@pytest.mark.parametrize("origin", STRANGERS)
async def test_preflight_of_a_stranger(origin: str) -> None:
    """403 in our own shape, quoting nothing, and without a field that a browser would take for a yes."""
    async with lab(STREAM, WAY, **OPEN) as it:
        answer = await ask(it.port, preflight("/v1/chat/completions", origin))
        assert answer.status == 403
        assert answer.json()["error"]["code"] == "origin_not_allowed"
        assert b"example" not in answer.body
        unreadable(answer)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "post", "*", "GET, POST", ""])
async def test_preflight_for_another_method(method: str) -> None:
    """Three methods are all that this API has."""
    async with lab(STREAM, WAY, **OPEN) as it:
        answer = await ask(it.port, preflight("/v1/chat/completions", APP, method=method))
        assert answer.status == 403
        unreadable(answer)


@pytest.mark.parametrize(
    "fields",
    [(), (f"Origin: {APP}",), ("Access-Control-Request-Method: POST",)],
    ids=["nothing", "origin", "method"],
)
async def test_other_options_requests(fields: tuple[str, ...]) -> None:
    """OPTIONS that is no preflight stays what it was: nothing at this path."""
    async with lab(STREAM, WAY, **OPEN) as it:
        answer = await ask(it.port, get("/v1/chat/completions", *fields, method="OPTIONS"))
        assert answer.status == 404
        assert it.upstream.calls == []


async def test_a_dangerous_preflight_is_still_refused() -> None:
    """The guard stands before it."""
    async with lab(STREAM, WAY, **OPEN) as it:
        request = preflight("/v1/chat/completions", APP).replace(b"Host: test", b"Host: a b")
        assert (await ask(it.port, request)).status == 400


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("origin", [APP, DEV])
async def test_streams_are_readable(way: Way, origin: str) -> None:
    """The page of either origin is answered with its own, never with a list or a star."""
    async with lab(STREAM, way, **OPEN) as it:
        answer = await ask(it.port, chat(f"Origin: {origin}"))
        assert answer.status == 200
        assert answer.body == event("a") + DONE
        readable(answer, origin)
        await it.ended("complete")


async def refused(it: Lab, request: bytes, status: int) -> None:
    answer = await ask(it.port, request)
    assert answer.status == status, answer.body
    assert answer.headers["x-request-id"]
    readable(answer)


async def test_errors_are_readable() -> None:
    """Of every kind: a page that cannot read an error can only say that something failed."""
    origin, path = f"Origin: {APP}", "/v1/chat/completions"
    failing = plays(response(200, b"{", "Content-Encoding: gzip"), lambda call: call.close())
    async with lab(failing, WAY, max_body_bytes=1000, **OPEN) as it:
        await refused(it, get("/nowhere", origin), 404)
        await refused(it, get(path, origin, method="PUT"), 404)
        await refused(it, chat(origin, model="unknown"), 404)
        await refused(it, post(path, b"{", origin), 400)
        await refused(it, get("//x", origin), 404)
        await refused(it, post(path, b"{}", origin, "Content-Encoding: gzip"), 415)
        await refused(it, post(path, b"x" * 1001, origin), 413)
        await refused(it, post(path, b"{}", origin, "Expect: 99"), 417)
        await refused(it, post("/api/chat", {}, origin), 400)
        question = {"messages": [{"role": "user", "content": "hi"}]}
        await refused(it, post("/api/chat", question, origin), 502)


async def test_a_missing_key_is_readable(tmp_path: Path) -> None:
    async with lab(STREAM, WAY, **with_keys(tmp_path)) as it:
        await refused(it, chat(f"Origin: {APP}"), 401)
        await refused(it, chat(f"Origin: {APP}", "Authorization: Bearer hr_x_y"), 401)


@pytest.mark.parametrize("path", ["/health", "/api/health/stream", "/v1/models"])
async def test_our_own_answers_are_readable(path: str) -> None:
    async with lab(STREAM, WAY, **OPEN) as it:
        readable(await ask(it.port, get(path, f"Origin: {APP}")))


@both
@pytest.mark.parametrize("origin", [*STRANGERS, None])
async def test_strangers_are_served_and_read_nothing(way: Way, origin: str | None) -> None:
    """CORS is no access control: the request goes on, only its answer is unreadable to that page."""
    async with lab(STREAM, way, **OPEN) as it:
        fields = [] if origin is None else [f"Origin: {origin}"]
        answer = await ask(it.port, chat(*fields))
        assert answer.status == 200
        assert answer.body == event("a") + DONE
        unreadable(answer)
        missing = await ask(it.port, get("/nowhere", *fields))
        assert missing.status == 404
        unreadable(missing)


async def test_two_origin_fields_are_no_origin() -> None:
    """No browser sends two; the listed one must not vouch for the other, in either order."""
    async with lab(STREAM, WAY, **OPEN) as it:
        for pair in ((APP, "https://evil.example"), ("https://evil.example", APP), (APP, APP)):
            fields = [f"Origin: {origin}" for origin in pair]
            unreadable(await ask(it.port, chat(*fields)))
            answer = await ask(it.port, preflight("/health", pair[0], fields[1]))
            assert answer.status == 403
            unreadable(answer)


@both
async def test_upstreams_have_no_say(way: Way) -> None:
    """Their own CORS fields are dropped, their Vary is kept, and they never learn the page's origin."""
    body = b'{"choices":[]}'
    fields = (
        "Access-Control-Allow-Origin: *",
        "Access-Control-Allow-Credentials: true",
        "Access-Control-Expose-Headers: *",
        "Access-Control-Allow-Methods: PUT",
        "Access-Control-Allow-Headers: *",
        "Access-Control-Max-Age: 9",
        "Vary: Accept-Encoding",
    )
    async with lab(plays(response(200, body, *fields)), way, **OPEN) as it:
        answer = await ask(it.port, chat(f"Origin: {APP}", stream=False))
        assert answer.body == body
        assert answer.headers["vary"] == "Accept-Encoding, Origin"
        answer.headers["vary"] = "Origin"
        readable(answer)
        assert b"app.example" not in (await it.called()).head
        stranger = await ask(it.port, chat("Origin: https://evil.example", stream=False))
        assert cors_of(stranger) == {}


@pytest.mark.parametrize("given", ["Origin", "accept, ORIGIN", "*"])
async def test_vary_is_not_doubled(given: str) -> None:
    async with lab(plays(response(200, b"{}", f"Vary: {given}")), WAY, **OPEN) as it:
        answer = await ask(it.port, chat(stream=False))
        assert answer.headers["vary"] == given


# ── off, and reload ──────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("sections", [{}, {"cors": {}}, {"cors": {"origins": []}}], ids=str)
async def test_off_is_off(way: Way, sections: dict[str, Any]) -> None:
    """Without origins there is no trace of CORS, and a preflight finds nothing."""
    allowing = plays(response(200, b"{}", "Access-Control-Allow-Origin: *"))
    async with lab(allowing, way, **sections) as it:
        for request, status in (
            (chat(f"Origin: {APP}", stream=False), 200),
            (get("/nowhere", f"Origin: {APP}"), 404),
            (preflight("/v1/chat/completions", APP), 404),
        ):
            answer = await ask(it.port, request)
            assert answer.status == status
            assert cors_of(answer) == {}
            assert "vary" not in answer.headers


async def reload(it: Lab, **sections: Any) -> None:
    text = yaml.safe_dump(settings_for(it.upstream.url, **sections))
    await it.headrace.server.prepare(config.parse(text, "test.yaml", {}))
    it.headrace.server.commit()


async def test_reload_changes_the_list() -> None:
    """For preflights and answers alike, also on connections that stay open."""
    async with lab(STREAM, WAY, **OPEN) as it, await Caller.connect(it.port) as caller:
        readable(await caller.ask(chat(f"Origin: {APP}")))
        await reload(it, cors={"origins": ["https://new.example"], "max_age": 1})
        unreadable(await caller.ask(chat(f"Origin: {APP}")))
        readable(await caller.ask(chat("Origin: https://new.example")), "https://new.example")
        assert (await caller.ask(preflight("/health", APP))).status == 403
        answer = await caller.ask(preflight("/health", "https://new.example"))
        assert answer.headers["access-control-max-age"] == "1"
        await reload(it)
        answer = await caller.ask(chat("Origin: https://new.example"))
        assert cors_of(answer) == {}
        assert "vary" not in answer.headers
        await reload(it, **OPEN)
        readable(await caller.ask(chat(f"Origin: {APP}")))
