"""Inputs that nobody would write, against readings of their own: what the tests of each module do not draw.

Few examples here, many more in `make test-all`; `make fuzz` looks for hours where these look for seconds.
Whatever was found stands in the tables: each row failed once.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy import config, headers
from proxy.endpoints import PAGE_FILES, TABLE, Endpoint, match
from proxy.errors import Dialect
from proxy.yamlstruct import ConfigError
from tests.fuzz.oracles import (
    DIALECTS,
    PEEK_NAMES,
    PEEK_VALUES,
    PEEK_WORDS,
    SCANNER_WORDS,
    check_events,
    check_json_tail,
    check_peek,
    check_scanner,
)

FEW = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(FEW, max_examples=2000)
OPENAI, ANTHROPIC, RESPONSES = Dialect.OPENAI, Dialect.ANTHROPIC, Dialect.RESPONSES

# ── streams ──────────────────────────────────────────────────────────────────────────────────────────────

SOUPS = st.lists(st.one_of(st.sampled_from(SCANNER_WORDS), st.binary(max_size=3)), max_size=40).map(b"".join)
SIZES = st.lists(st.one_of(st.just(1), st.integers(1, 30), st.integers(1, 9000)), min_size=1, max_size=4)
STREAMS = given(SOUPS, SIZES, st.sampled_from(DIALECTS), st.booleans())

FOUND_IN_STREAMS = [
    pytest.param(
        OPENAI,
        b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":""}]}\n\n' + b": x\n\n" * 1500,
        id="an empty finish_reason is none, once it is out of reach too",
    ),
    pytest.param(
        RESPONSES,
        b'data: {"type":"response.created","instructions":"%b","x":{"finish_reason": "error"}}\n\n'
        % (b"z" * 4200),
        id="a long repetition of the request is as little an error as a short one",
    ),
    pytest.param(
        OPENAI,
        b'data: {"usage":{"prompt_tokens":5,"completion_tokens":7}}\nid: %b\ndata: {' % (b"w" * 13000),
        id="a report in an event that goes on and is no JSON in the end is none",
    ),
]


@pytest.mark.parametrize(("dialect", "stream"), FOUND_IN_STREAMS)
@pytest.mark.parametrize("size", [1, 100, 4096])
def test_found_in_streams(dialect: Dialect, stream: bytes, size: int) -> None:
    check_scanner(stream, [size], dialect, True)


@FEW
@STREAMS
def test_streams(stream: bytes, sizes: list[int], dialect: Dialect, expects: bool) -> None:
    """Any bytes in any cut: the same answers, nothing forgotten on the way, and what is held has a bound."""
    check_scanner(stream, sizes, dialect, expects)
    check_json_tail(stream, sizes, dialect)
    check_events(stream, sizes)


@pytest.mark.slow
@MANY
@STREAMS
def test_many_streams(stream: bytes, sizes: list[int], dialect: Dialect, expects: bool) -> None:
    check_scanner(stream, sizes, dialect, expects)
    check_json_tail(stream, sizes, dialect)
    check_events(stream, sizes)


# ── JSON bodies ──────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """An object whose members route, or nearly; half of them with one byte that is not what it was."""
    members = draw(st.lists(st.tuples(st.sampled_from(PEEK_NAMES), st.sampled_from(PEEK_VALUES)), max_size=6))
    body = b"{" + b", ".join(name + value for name, value in members) + b"}"
    if draw(st.booleans()):
        at = draw(st.integers(0, len(body) - 1))
        body = body[:at] + draw(st.binary(max_size=2)) + body[at + draw(st.integers(0, 1)) :]
    return body


BODIES = given(st.one_of(bodies(), st.lists(st.sampled_from(PEEK_WORDS), max_size=20).map(b"".join)))


@settings(FEW, max_examples=300)
@BODIES
def test_bodies(body: bytes) -> None:
    """Refused exactly where the standard library's reading says so, else read as that reads it."""
    check_peek(body)


@pytest.mark.slow
@settings(MANY, max_examples=6000)
@BODIES
def test_many_bodies(body: bytes) -> None:
    check_peek(body)


# ── header fields ────────────────────────────────────────────────────────────────────────────────────────

FIELD_NAMES = st.one_of(
    st.sampled_from(sorted(headers.HOP_BY_HOP | headers.CREDENTIALS)).flatmap(
        lambda name: st.sampled_from([name, name.title(), name.replace(b"-", b"_"), name + b" ", b" " + name])
    ),
    st.text("aX-_!#$%&'*+.^`|~0: \t", min_size=1, max_size=8).map(str.encode),
)
FIELD_VALUES = st.one_of(
    st.sampled_from(
        [b"authorization", b"X-A, ,host", b"close,\tTE ", b'"x-a"', b"a\r\nX-Api-Key: k", b"a\nb", b"\x00"]
    ),
    st.binary(max_size=8),
)


async def parsed(lines: bytes) -> Sequence[tuple[bytes, bytes]] | None:
    """What aiohttp's parser, the one that callers meet, reads of these lines; None if it refuses them."""
    loop = asyncio.get_running_loop()
    parser = HttpRequestParser(BaseProtocol(loop), loop, 2**16)
    try:
        messages, _, _ = parser.feed_data(b"GET / HTTP/1.1\r\nHost: here\r\n" + lines + b"\r\n")
    except HttpProcessingError:
        return None
    return messages[0][0].raw_headers if messages else None


def check_fields(fields: list[tuple[bytes, bytes]]) -> None:
    """What crosses is read as it was read here, field by field, and holds nothing that has to stay."""
    raw = asyncio.run(parsed(b"".join(b"%b: %b\r\n" % field for field in fields)))
    if raw is None:
        return
    again = asyncio.run(parsed(headers.to_upstream(raw, "ours")))
    assert again is not None
    *crossed, ours = list(again)[1:]
    assert ours == (b"x-request-id", b"ours")
    named = [value for name, value in raw if name.lower() == b"connection"]
    hop = {option.strip().lower() for value in named for option in value.split(b",")}
    stays = headers.HOP_BY_HOP | headers.CREDENTIALS | hop | {b"host", b"content-length"}
    assert not {name.lower() for name, _ in crossed} & stays
    at = iter(raw)
    assert all(field in at for field in crossed)  # in order, byte by byte


FIELDS = given(st.lists(st.tuples(FIELD_NAMES, FIELD_VALUES), max_size=6))


@settings(FEW, max_examples=150)
@FIELDS
def test_fields(fields: list[tuple[bytes, bytes]]) -> None:
    check_fields(fields)


@pytest.mark.slow
@MANY
@FIELDS
def test_many_fields(fields: list[tuple[bytes, bytes]]) -> None:
    check_fields(fields)


# ── paths ────────────────────────────────────────────────────────────────────────────────────────────────

PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._~:@!$&'()*+,;=-")
HEX = frozenset("0123456789abcdefABCDEF")


def is_segment(text: str) -> bool:
    """RFC 3986 3.3, without what decodes to a separator, a dot, a percent sign or a control character."""
    if text in ("", ".", ".."):
        return False
    head, *escapes = text.split("%")
    for escape in escapes:
        if len(escape) < 2 or not set(escape[:2]) <= HEX:
            return False
        if chr(int(escape[:2], 16)) in "./\\%\x7f" or int(escape[:2], 16) < 0x20:
            return False
    return set("".join([head, *(escape[2:] for escape in escapes)])) <= PLAIN


def fits(endpoint: Endpoint, path: str) -> bool:
    """Does this path, with its /v1, follow the template?"""
    stem, _, slot = endpoint.name.partition("{")
    if not slot:
        return path == endpoint.name
    if endpoint.name == "/static/{file}":
        return path.removeprefix(stem) in PAGE_FILES and path.startswith(stem)
    name, _, end = slot.partition("}")
    if not path.startswith(stem) or not path.endswith(end):
        return False
    rest = path[len(stem) : len(path) - len(end)] if len(path) > len(stem) + len(end) else ""
    if endpoint.name == "/v1/models/{rest}":
        return bool(rest) and set(rest) <= PLAIN | {"%", "/"}
    segments = rest.split("/")
    return all(map(is_segment, segments)) and len(segments) <= (6 if name == "rest" else 1)


def expected(method: str, path: str) -> Endpoint | None:
    """The table, read once more without a regex: whole paths first, then templates in order."""
    rows = [endpoint for endpoint in TABLE if method in endpoint.methods]
    ways = [path] if path.startswith("/v1/") else [path, f"/v1{path}"]
    for endpoint in sorted(rows, key=lambda row: "{" in row.name and not row.name.startswith("/static/")):
        outside = not endpoint.name.startswith("/v1/")
        if any(fits(endpoint, way) for way in ways if outside or way.startswith("/v1/")):
            return endpoint
    return None


SEGMENT = st.one_of(
    st.sampled_from(["a", "..", ".", "", "a.b", "%2e", "%2F", "%5c", "%25", "%41", "%7f", "%1f", "%g0", "%"]),
    st.text("aé%2fF5cC.~ \\?#;=\n\x00", max_size=6),
)


@st.composite
def paths(draw: st.DrawFn) -> str:
    """A row of the table, its slots filled with anything, then perhaps changed in one place."""
    name = draw(st.sampled_from(TABLE)).name
    rest = "/".join(draw(st.lists(SEGMENT, max_size=7)))
    path = re.sub(r"\{\w+\}", lambda found: draw(SEGMENT) if found[0] == "{id}" else rest, name)
    path = draw(st.sampled_from([path, path.removeprefix("/v1"), path.upper(), f"/v1{path}"]))
    at = draw(st.integers(0, len(path)))
    return path[:at] + draw(st.sampled_from(["", "", "", "/", "//", "%2f", "\n", "."])) + path[at:]


PATHS = given(st.sampled_from(["GET", "HEAD", "POST", "DELETE", "PATCH", "get"]), paths())


@settings(FEW, max_examples=300)
@PATHS
def test_paths(method: str, path: str) -> None:
    """The table says the same of any path to a reader that knows no regex."""
    assert match(method, path) is expected(method, path)


@pytest.mark.slow
@settings(MANY, max_examples=6000)
@PATHS
def test_many_paths(method: str, path: str) -> None:
    assert match(method, path) is expected(method, path)


# ── configurations ───────────────────────────────────────────────────────────────────────────────────────

WHOLE: dict[str, Any] = {
    "listen": "127.0.0.1:8080",
    "admin": "unix:/a",
    "workers": "auto",
    "trusted_proxies": ["127.0.0.1", "10.0.0.0/8"],
    "admin_token": "${CANARY}",
    "max_body_bytes": 1000,
    "timeouts": {"header": 1, "keepalive": 4.5},
    "default_upstream": "b",
    "upstreams": {
        "a": {
            "base_url": "http://127.0.0.1:1/v1",
            "api_keys": ["${CANARY}", "k"],
            "headers": {"X-A": "b"},
            "query": {"api-version": "1"},
            "timeouts": {"idle": 8},
            "breaker": {"statuses": [500, 503]},
            "pool": {"keepalive": 0},
            "probe": {"path": "/models", "interval": 5},
        },
        "b": {"base_url": "mock:"},
    },
    "models": {
        "m": {
            "upstreams": ["a", {"name": "b", "model": "n", "weight": 2, "tier": 2}],
            "price": {"input": 2.5, "cached_input": 0.5, "output": 8},
            "fallback": ["n1"],
        },
        "n*": {"upstreams": ["b"]},
    },
    "plans": {"basic": {"requests_per_minute": 3, "burst": 1}, "own": {"budget_day": 5}},
    "auth": {
        "mode": "required",
        "pepper": "${CANARY}",
        "jwt": {"algorithms": ["HS256"], "secret": "${CANARY}${CANARY}", "issuer": "i", "audience": "u"},
    },
    "limits": {"mode": "observe", "queue": {"max_waiting": 2}, "per_ip": {"burst": 1}},
    "streams": {"heartbeat": 0, "usage": "inject", "on_disconnect": {"drain_for_usage": {"seconds": 3}}},
    "retry": {"attempts": 3, "statuses": [429, 503]},
    "cors": {"origins": ["https://app.example"]},
    "browser_api": {"model": "m", "plan": "anonymous"},
    "log": {"format": "text", "level": "debug"},
    "drain": 3,
}
ENVIRON = {"CANARY": "canary-of-the-fuzz-tests-0123456789"}


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is something, as keys and indices."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*here, key))


PLACES = list(places(WHOLE))
JUNK: st.SearchStrategy[Any] = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12)),
    st.sampled_from(["${CANARY}", "${NOPE}", "${file:/nowhere}", "${"]),
    st.sampled_from(["a", "m", "n*", "mock:", "http://[", "10/8", ["a", "a"], {"upstreams": None}]),
    st.sampled_from([-1, 0, 2**63, 10**400, 1e308, [], {}, [[]], {"": ""}, [None]]),
)


def replaced(value: Any, place: tuple[Any, ...], junk: Any) -> Any:
    if not place:
        return junk
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = replaced(value[place[0]], place[1:], junk)
    return copy


def wrong_with(text: str) -> ConfigError | None:
    try:
        config.describe_routes(config.parse(text, "FILE", ENVIRON))
    except ConfigError as error:
        return error
    return None


def check_config(place: tuple[Any, ...], junk: Any) -> None:
    """A Config whose routes can be told, or a ConfigError on one line that names a place and no secret."""
    error = wrong_with(json.dumps(replaced(WHOLE, place, junk)))
    if error is not None:
        assert error.path or not place
        assert "canary" not in str(error)
        assert str(error).isprintable()


CONFIGS = given(st.sampled_from(PLACES), JUNK)


def test_the_configuration_is_whole() -> None:
    """What is changed below was right before."""
    assert wrong_with(json.dumps(WHOLE)) is None


@pytest.mark.parametrize(
    "place",
    [
        ("default_upstream",),
        ("models", "m", "upstreams", 0),
        ("models", "m", "fallback", 0),
        ("browser_api", "model"),
        ("browser_api", "plan"),
    ],
    ids=repr,
)
def test_a_misplaced_secret_is_not_shown(place: tuple[Any, ...]) -> None:
    """Found: names that nothing has were shown as they stood in the environment."""
    error = wrong_with(json.dumps(replaced(WHOLE, place, "${CANARY}")))
    assert error is not None
    assert "unknown" in error.message
    assert "'${CANARY}'" in error.message
    assert "canary" not in str(error)


@settings(FEW, max_examples=60)
@CONFIGS
def test_configs(place: tuple[Any, ...], junk: Any) -> None:
    """One thing is wrong in an otherwise good file."""
    check_config(place, junk)


@pytest.mark.slow
@MANY
@CONFIGS
def test_many_configs(place: tuple[Any, ...], junk: Any) -> None:
    check_config(place, junk)
