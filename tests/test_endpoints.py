"""The allow-list as a rule: what is in it, and that no spelling sneaks past it."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy import endpoints
from proxy.endpoints import TABLE, Body, Model
from proxy.errors import Dialect


def example_of(name: str) -> str:
    return name.replace("{id}", "a-1").replace("{rest}", "a-1/b.c").replace("{file}", "playground.js")


@pytest.mark.parametrize("endpoint", TABLE, ids=[f"{'+'.join(row.methods)} {row.name}" for row in TABLE])
def test_every_row_matches_itself(endpoint: endpoints.Endpoint) -> None:
    """With and without /v1; only for its own methods."""
    path = example_of(endpoint.name)
    for method in endpoint.methods:
        found = endpoints.match(method, path)
        assert found is not None
        assert found.name == endpoint.name
        if path.startswith("/v1/"):
            assert endpoints.match(method, path.removeprefix("/v1")) == found
    for method in ("OPTIONS", "TRACE", "CONNECT", "get", ""):
        assert endpoints.match(method, path) is None
    # `guard` lets every row pass without a look at its path.
    for other in (f"/{path}", path[1:], f"http://host{path}", f"*{path}"):
        assert not [method for method in endpoint.methods if endpoints.match(method, other)]


def test_rows_are_unique() -> None:
    """No method and template stands twice, so the order of the table does not decide by accident."""
    rows = [(method, endpoint.name) for endpoint in TABLE for method in endpoint.methods]
    assert len(rows) == len(set(rows))


def test_dialects() -> None:
    """The error shape follows the route."""
    for method, path, dialect in (
        ("POST", "/v1/messages", Dialect.ANTHROPIC),
        ("POST", "/messages/count_tokens", Dialect.ANTHROPIC),
        ("POST", "/v1/responses", Dialect.RESPONSES),
        ("GET", "/responses/resp_1/input_items", Dialect.RESPONSES),
        ("POST", "/v1/chat/completions", Dialect.OPENAI),
    ):
        found = endpoints.match(method, path)
        assert found is not None
        assert found.dialect is dialect


def test_streams_that_announce_their_end() -> None:
    """Exactly the four routes of contract 6.3 need a terminator, and the one that asks such a route."""
    names = {endpoint.name for endpoint in TABLE if endpoint.ends_with_terminator and not endpoint.asks}
    assert names == {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
    for name in names:
        found = endpoints.match("POST", name)
        assert found is not None
        assert found.model in (Model.REQUIRED, Model.OPTIONAL)


def test_forms() -> None:
    """Exactly the uploads of OpenAI's API are forms; audio and images may name a model, files never do."""
    forms = {row.name: row for row in TABLE if row.body is Body.FORM}
    assert {name for name, row in forms.items() if row.model is Model.OPTIONAL} == {
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/images/edits",
        "/v1/images/variations",
    }
    assert {name for name, row in forms.items() if row.model is Model.NONE} == {
        "/v1/audio/voice_consents",
        "/v1/audio/voices",
        "/v1/files",
        "/v1/uploads/{id}/parts",
    }
    for name, row in forms.items():
        assert row.methods == ("POST",)
        assert endpoints.match("POST", example_of(name).removeprefix("/v1")) is row
    for method, path in (("GET", "/v1/files"), ("GET", "/v1/files/file-1/content"), ("POST", "/v1/uploads")):
        found = endpoints.match(method, path)
        assert found is not None
        assert found.body is Body.JSON


@pytest.mark.parametrize(
    "path",
    [
        "",
        "//",
        "/static/",
        "/static/playground.html",
        "/static/../endpoints.py",
        "/static/%2e%2e/endpoints.py",
        "/static/{file}",
        "/v1/static/playground.js",
        "/v1/static/{file}",
        "/v1",
        "/v1/",
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/v1/files/.",
        "/v1/files/..",
        "/v1/files/a/..",
        "/v1/files/../a",
        "/v1/files/%2e",
        "/v1/files/%2E%2e",
        "/v1/files/a%2f..%2fb",
        "/v1/files/a%5Cb",
        "/v1/files/a%00",
        "/v1/files/a%0a",
        "/v1/files/a%1F",
        "/v1/files/a%7f",
        "/v1/files/a%25",
        "/v1/files/a%2",
        "/v1/files/a%g0",
        "/v1/files/a\\b",
        "/v1/files/a b",
        "/v1/files/a#b",
        "/v1/files/a?b",
        "/v1/files/a\n",
        "/v1/files/ä",
        "/v1/files/a/b/c/d/e/f/g",
        "/v1/v1/models",
        "/V1/models",
        "/v1/Models",
        "/v1/models\n",
        "/v1/organization/users",
        "/admin/keys",
        "/metrics",
        "v1/models",
        "http://evil/v1/models",
    ],
)
def test_nothing_else_matches(path: str) -> None:
    """Neither traversal nor encoding, case or extra slashes lead into the table."""
    for method in ("GET", "POST", "DELETE", "HEAD"):
        found = endpoints.match(method, path)
        assert found is None or (found.ours and path in ("/v1/models/",))


SEGMENTS = st.one_of(
    st.sampled_from(
        ["..", ".", "%2e", "%2E%2E", "%2f", "%5c", "%00", "%25", "", "a", "files", "v1", "models"]
    ),
    st.text("ab.%2efF05cC/\\\n ?#", max_size=8),
)


@given(st.sampled_from(["GET", "POST", "DELETE"]), st.lists(SEGMENTS, max_size=7))
@example("GET", ["v1", "files", "..%2f"])
def test_a_match_is_what_it_looks_like(method: str, segments: list[str]) -> None:
    """What is forwarded means the same to a server that decodes and normalises as to one that does not."""
    path = "/" + "/".join(segments)
    found = endpoints.match(method, path)
    if found is None or found.ours:
        return
    assert re.fullmatch(r"[\x21-\x7e]+", path)
    decoded = unquote(path)
    assert decoded.count("/") == path.count("/")
    assert not {".", "..", ""} & set(decoded.split("/")[1:])
    assert not re.search(r"[\x00-\x1f\x7f\\]", decoded)
    assert unquote(decoded) == decoded or "%" not in decoded


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("/v1/chat/completions", "/chat/completions"),
        ("/chat/completions", "/chat/completions"),
        ("/v1/files?a=/v1/b&c=%20", "/files?a=/v1/b&c=%20"),
        ("/v1/files/v1/x", "/files/v1/x"),
    ],
)
def test_upstream_path(raw: str, expected: str) -> None:
    """The leading /v1 is base_url's; nothing else changes."""
    assert endpoints.upstream_path(raw) == expected
