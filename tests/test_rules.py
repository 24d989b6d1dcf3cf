"""Rules across modules: what a caller may write, what crosses the proxy, what an upstream may answer.

The tables of single rule modules have files of their own; here are the promises that several keep together.
"""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy import answers, headers
from proxy.endpoints import TABLE, match, upstream_path
from proxy.errors import (
    BadRequest,
    Dialect,
    HeadraceError,
    UpstreamCut,
    UpstreamFailed,
    UpstreamInBand,
    UpstreamInvalid,
    UpstreamRefusedUs,
    UpstreamTimeout,
)
from proxy.peek import Peek, peek

# ── peek ─────────────────────────────────────────────────────────────────────────────────────────────────

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
ROUTING = list(Peek.__struct_fields__)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b"")
@example(b"{" * 100_000)
@example(b"[" * 100_000)
@example(b'{"model":' * 5_000)
@example(b'{"model":"\\ud800"}')
@example(b'{"model":"\xff"}')
@example(b'\xef\xbb\xbf{"model":"m"}')
@example(b'{"n":' + b"9" * 5_000 + b"}")
@example(b'{"x":1e' + b"9" * 5_000 + b"}")
@example(b'{"\\u006dodel":"a","model":"b"}')
def test_peek_never_fails_otherwise(body: bytes) -> None:
    """Any bytes are a Peek or a BadRequest of the contract's codes."""
    try:
        found = peek(body)
    except BadRequest as error:
        refusal = error
    else:
        assert isinstance(found, Peek)
        assert isinstance(json.loads(body), dict)
        return
    assert refusal.status == 400
    assert refusal.code in {"invalid_json", "duplicate_key", "bad_request"}


def spellings(name: str) -> list[str]:
    """A key as it may be written in JSON: plain, one letter escaped (either case of hex), all escaped."""
    all_escaped = "".join(f"\\u{ord(letter):04x}" for letter in name)
    return [
        name,
        f"\\u{ord(name[0]):04x}{name[1:]}",
        f"{name[:-1]}\\u{ord(name[-1]):04X}",
        all_escaped,
    ]


@pytest.mark.parametrize("name", ROUTING)
def test_duplicates_are_found_in_any_spelling(name: str) -> None:
    """A second key that routes, authorises or bills is refused, however either of the two is spelt."""
    value = {"model": '"m"', "stream": "true"}.get(name, "1")
    for first in spellings(name):
        for second in spellings(name):
            for colon in (":", " \n:\t"):
                body = f'{{"{first}"{colon}{value},"x":[{{}}],"{second}"{colon}{value}}}'
                with pytest.raises(BadRequest) as refused:
                    peek(body.encode())
                assert (refused.value.code, refused.value.param) == ("duplicate_key", name), body


@pytest.mark.parametrize("name", ROUTING)
def test_an_escaped_key_counts(name: str) -> None:
    """One key in an escaped spelling is that key."""
    value = {"model": '"m"', "stream": "true"}.get(name, "1")
    for spelling in spellings(name):
        assert getattr(peek(f'{{"{spelling}":{value}}}'.encode()), name) == json.loads(value)


@pytest.mark.parametrize(
    "body",
    [
        '{"model":"m","tools":[{"model":"x"},{"model":"y"}]}',
        '{"model":"m","text":"\\"model\\": \\"model\\": "}',
        '{"model":"m","Model":"x","MODEL":"y","models":"z"}',
        '{"model":"m","metadata":{"model":"x","stream":true}}',
        '{"metadata":{"model":"x","model":"y"},"model":"m"}',
    ],
)
def test_keys_elsewhere_are_no_duplicates(body: str) -> None:
    """Only keys of the outermost object count, and only exactly."""
    assert peek(body.encode()).model == "m"


# ── headers ──────────────────────────────────────────────────────────────────────────────────────────────

NAMES = st.sampled_from(sorted(headers.HOP_BY_HOP | headers.CREDENTIALS)) | st.from_regex(
    rb"[A-Za-z0-9_-]{1,12}", fullmatch=True
)
VALUES = st.from_regex(rb"[!-~]{0,12}", fullmatch=True) | NAMES


@given(st.lists(st.tuples(NAMES.flatmap(lambda n: st.sampled_from([n, n.title(), n.upper()])), VALUES)))
@example([(b"Connection", b"x-mine, close"), (b"X-Mine", b"1")])
@example([(b"X_Api_Key", b"1"), (b"x-api_key", b"2")])
def test_nothing_forbidden_goes_upstream(fields: list[tuple[bytes, bytes]]) -> None:
    """No hop-by-hop field, none that Connection names, no credential and no underscore survives."""
    named = {
        option.strip().lower()
        for name, value in fields
        if name.lower() == b"connection"
        for option in value.split(b",")
    }
    lines = headers.to_upstream(fields).split(b"\r\n")
    assert lines.pop() == b""
    left = [line.partition(b": ")[0].lower() for line in lines]
    for name in left:
        assert name not in headers.HOP_BY_HOP | headers.CREDENTIALS | named
        assert b"_" not in name
    kept = [line.partition(b": ") for line in lines]
    assert [(name, value) for name, _, value in kept] == [
        field for field in fields if field[0].lower() in left
    ]


TRUSTED = [ipaddress.ip_network("127.0.0.1"), ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1")]


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", ["192.0.2.7"], "192.0.2.7"),
        ("127.0.0.1", ["192.0.2.66, 192.0.2.7"], "192.0.2.7"),  # the left one is the caller's own claim
        ("127.0.0.1", ["192.0.2.7, 10.1.2.3"], "192.0.2.7"),
        ("127.0.0.1", ["192.0.2.7", "10.1.2.3, 10.9.9.9"], "192.0.2.7"),
        ("127.0.0.1", ["10.1.2.3"], "10.1.2.3"),
        ("127.0.0.1", ["192.0.2.7, unknown"], "127.0.0.1"),
        ("127.0.0.1", ["192.0.2.7, , 10.1.2.3"], "10.1.2.3"),
        ("127.0.0.1", ["2001:db8::7"], "2001:db8::7"),
        ("::1", ["192.0.2.7"], "192.0.2.7"),
        ("192.0.2.1", ["192.0.2.7"], "192.0.2.1"),
        (None, ["192.0.2.7"], "192.0.2.7"),  # a unix socket: only this machine's own proxy writes to it
        ("", ["192.0.2.7"], "192.0.2.7"),  # the same, as aiohttp reports it
        (None, [], "unix"),
        ("", [], "unix"),
    ],
)
def test_client_ip(peer: str | None, forwarded: list[str], expected: str) -> None:
    """The right-most hop that is not ours, and X-Forwarded-For only from a trusted peer."""
    assert headers.client_ip(peer, forwarded, TRUSTED) == expected


# ── endpoints ────────────────────────────────────────────────────────────────────────────────────────────

ROWS = [(method, endpoint) for endpoint in TABLE for method in endpoint.methods]


@pytest.mark.parametrize(("method", "endpoint"), ROWS, ids=lambda part: getattr(part, "name", part))
def test_rows_match_with_and_without_v1(method: str, endpoint: Any) -> None:
    """A row is found under its path, and under the same path without /v1; both lead to one upstream path."""
    path = endpoint.name.replace("{id}", "abc-1").replace("{rest}", "abc-1")
    assert match(method, path) is endpoint
    if path.startswith("/v1/"):
        assert match(method, path[3:]) is endpoint
        assert upstream_path(path) == upstream_path(path[3:]) == path[3:]
    assert match("PATCH", path) is None


TAILS = ["", "/", "/abc", "/abc/def"]
TRICKS = [
    *("/..", "/.", "/%2e%2e", "/%2E%2e", "/.%2e", "/a/../b", "/a%2fb", "/a%2Fb", "/a%5cb", "/a%252fb"),
    *("//", "/a//b", "/a%00", "/a%0d%0aX:1", "/a%", "/a%zz", "/a;/../b", "/a/b/c/d/e/f/g"),
    *("/a\\b", "/a b", "/a?b", "/a#b", "/ä", "/\x00", "/a\n"),
]
STEMS = sorted({endpoint.name.partition("/{")[0] for endpoint in TABLE if not endpoint.ours})


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_hostile_paths_never_match(stem: str, method: str) -> None:
    """Dots, slashes and controls, plain or escaped, match no row that is forwarded; the name of a model in
    our own GET /v1/models/… may hold slashes, because it goes nowhere."""

    def forwarded(path: str) -> bool:
        found = match(method, path)
        return found is not None and not found.ours

    for trick in TRICKS:
        for tail in TAILS:
            for path in (f"{stem}{trick}{tail}", f"{stem[3:]}{trick}{tail}", f"/v1{stem}{trick}{tail}"):
                assert not forwarded(path), path
    for path in (f"/{stem}", f"{stem}/", stem.upper(), f"/v2{stem[3:]}", f"/v1{stem}", f"x{stem}"):
        assert not forwarded(path), path


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────


def leaves(kind: type[HeadraceError]) -> list[type[HeadraceError]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in leaves(child))]


UPSTREAM_ERRORS = leaves(UpstreamFailed)


@pytest.mark.parametrize("kind", UPSTREAM_ERRORS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dialect", list(Dialect))
def test_events_are_the_body_as_an_event(kind: type[UpstreamFailed], dialect: Dialect) -> None:
    """The event's data is the body; it is named `error` but for OpenAI's chat, and is one event."""
    error = kind()
    body, event = error.body(dialect, "req_1"), error.event(dialect, "req_1")
    named = b"" if dialect is Dialect.OPENAI else b"event: error\n"
    assert event == named + b"data: " + body + b"\n\n"
    assert event.count(b"\n\n") == 1
    assert b"\n" not in body
    document = json.loads(body)
    if dialect is Dialect.ANTHROPIC:
        assert document.keys() == {"type", "error", "request_id"}
        assert document["error"].keys() == {"type", "message"}
        assert document["type"] == "error"
    else:
        assert document.keys() == {"error"}
        assert document["error"].keys() == {"message", "type", "param", "code"}
        assert document["error"]["code"] == error.code


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────


def test_which_statuses_pass() -> None:
    """401 and 403 speak of our credential, 1xx and redirects are no answers; everything else passes."""
    refused: dict[int, type[HeadraceError]] = {}
    for status in range(100, 600):
        try:
            answers.refuse_unusable(status)
        except HeadraceError as error:
            refused[status] = type(error)
    no_answers = {status for status in range(100, 400) if status < 200 or (status >= 300 and status != 304)}
    assert refused == {
        **dict.fromkeys(no_answers, UpstreamInvalid),
        401: UpstreamRefusedUs,
        403: UpstreamRefusedUs,
    }


IN_BAND = [
    b'{"error":{"message":"no"}}',
    b' \n{"error": {"message": "no", "type": "x", "code": 1}}\n',
    b'{"error":"no"}',
    b'{"type":"error","error":{"type":"overloaded_error","message":"no"},"request_id":"r"}',
    b'{"object":"error","error":{"message":"no"}}',
    b'{"status":"failed","error":{"message":"' + b"x" * 10_000 + b'"}}',
]
NO_ERROR = [
    b'{"error":null,"id":"resp_1","output":[]}',  # a good answer of /v1/responses
    b'{"error":null}',
    b'{"error":{}}',
    b'{"id":"x","choices":[{"message":{"content":"{\\"error\\":1}"}}],"error":{"message":"late"}}',
    b'{"content":"error"}',
    b'["error"]',
    b'"error"',
    b'{"error":',
    b'{"error":"\xff"}',
    b'{"error":' + b"[" * 100_000,
    b"error",
    b"",
]


@pytest.mark.parametrize("body", IN_BAND)
def test_an_error_that_calls_itself_a_success(body: bytes) -> None:
    """A 200 whose whole JSON is an error is refused; under an error's status it passes as it is."""
    with pytest.raises(UpstreamInBand):
        answers.checked_body(200, body)
    for status in (400, 429, 500):
        assert answers.checked_body(status, body) == body


@pytest.mark.parametrize("body", NO_ERROR)
@pytest.mark.parametrize("status", [200, 201, 400, 500])
def test_what_only_looks_like_an_error(body: bytes, status: int) -> None:
    """Everything else passes byte for byte."""
    assert answers.checked_body(status, body) == body


def test_gemini_array() -> None:
    """Gemini's array of errors becomes the object that SDKs read; its text and its status stay."""
    body = b'[{"error": {"code": 400, "message": "bad \\u00fc", "status": "INVALID_ARGUMENT"}}]\n'
    assert json.loads(answers.checked_body(400, body)) == {
        "error": {
            "message": "bad ü",
            "type": "invalid_argument",
            "param": None,
            "code": "invalid_argument",
        }
    }
    for other in (
        b'[{"error": 1}]',
        b'["error", {"error":{}}]',
        b'[{"error":{"message":"x"}',
        b'[[{"error":{}}]]',
    ):
        assert answers.checked_body(400, other) == other
    assert answers.checked_body(200, body) == body


@given(st.integers(200, 599), st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
@example(400, b'[{"error":{"message":"\\ud800","status":"x"}}]')
@example(400, b'[{"error":{"message":[1e400],"status":{}}}]')
def test_any_answer_passes_or_is_an_error_of_ours(status: int, body: bytes) -> None:
    """No body of an upstream raises anything else than UpstreamInBand."""
    try:
        assert isinstance(answers.checked_body(status, body), bytes)
    except UpstreamInBand:
        assert status < 300


@pytest.mark.parametrize(
    ("status", "content_type", "expected"),
    [
        (200, b"text/event-stream", True),
        (200, b"Text/Event-Stream; charset=utf-8", True),
        (206, b"text/event-stream", True),
        (500, b"text/event-stream", False),
        (200, b"application/json", False),
        (200, b"text/event-streams", False),
        (200, b"text/plain; x=text/event-stream", False),
        (200, None, False),
    ],
)
def test_event_streams(status: int, content_type: bytes | None, expected: bool) -> None:
    """A stream is a success whose media type says so."""
    fields = [] if content_type is None else [(b"Content-Type", content_type)]
    assert answers.is_event_stream(status, fields) is expected


def test_late_refusals_are_upstream_errors() -> None:
    """What comes after an early 200 ends as an error of the upstream, whatever its status was."""
    for status in range(200, 600):
        error = answers.late_refusal(status)
        assert isinstance(error, UpstreamFailed)
        assert not isinstance(error, (UpstreamCut, UpstreamTimeout))
        assert isinstance(error, UpstreamInvalid) == (status < 400)
