"""The allow-list: which methods and paths are proxied, and what their requests look like.

Everything that is not in `TABLE` is a 404: a caller can only reach the provider's inference and storage
routes, never its account administration. Matching is done on the raw path, before any decoding, so that
`%2e%2e`, `%2f` or `//` cannot turn one path into another between the check and the upstream.

Templates: `{id}` is one path segment, `{rest}` one to six of them, `{file}` one of `PAGE_FILES`.
"""

from __future__ import annotations

import re
from enum import StrEnum

import msgspec

from proxy.errors import Dialect


class Body(StrEnum):
    """What a route's requests carry."""

    NONE = "none"
    JSON = "json"
    FORM = (
        "form"  # multipart/form-data, not held but passed through; JSON as well, where the provider takes it
    )


class Model(StrEnum):
    """Whether a route's body names a model."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    NONE = "none"


class Endpoint(msgspec.Struct, frozen=True):
    """One row of the allow-list. `name` is the metric label `route`."""

    name: str
    methods: tuple[str, ...]
    body: Body
    model: Model
    dialect: Dialect = Dialect.OPENAI
    ours: bool = False  # answered here, not forwarded
    costs: bool = True  # spends a request of the caller's plan
    ends_with_terminator: bool = False  # an event stream of this route announces its own end
    asks: str = ""  # the path that is asked upstream; empty: the caller's own
    websocket: bool = False  # an upgrade, and nothing else


def _inference(name: str, dialect: Dialect = Dialect.OPENAI, *, streams: bool = True) -> Endpoint:
    return Endpoint(name, ("POST",), Body.JSON, Model.REQUIRED, dialect, ends_with_terminator=streams)


def _optional(name: str) -> Endpoint:
    return Endpoint(name, ("POST",), Body.JSON, Model.OPTIONAL)


def _stored(name: str, *methods: str, dialect: Dialect = Dialect.OPENAI) -> Endpoint:
    """Objects that the provider keeps: no model in the request, so they go to `default_upstream`."""
    return Endpoint(name, methods or ("GET", "POST", "DELETE"), Body.JSON, Model.NONE, dialect)


def _form(name: str, model: Model = Model.NONE) -> Endpoint:
    """An upload: a file, audio, images."""
    return Endpoint(name, ("POST",), Body.FORM, model)


def _ours(name: str) -> Endpoint:
    return Endpoint(name, ("GET", "HEAD"), Body.NONE, Model.NONE, ours=True, costs=False)


def _for_pages(name: str, *, streams: bool) -> Endpoint:
    """The browser API: a chat request that is made here."""
    return Endpoint(
        name,
        ("POST",),
        Body.JSON,
        Model.REQUIRED,
        ours=True,
        ends_with_terminator=streams,
        asks="/chat/completions",
    )


TABLE: tuple[Endpoint, ...] = (
    _inference("/v1/chat/completions"),
    _stored("/v1/chat/completions", "GET"),
    _stored("/v1/chat/completions/{rest}"),
    _inference("/v1/completions"),
    _inference("/v1/embeddings", streams=False),
    Endpoint(
        "/v1/responses",
        ("POST",),
        Body.JSON,
        Model.OPTIONAL,  # a stored prompt names the model on the provider's side
        Dialect.RESPONSES,
        ends_with_terminator=True,
    ),
    Endpoint("/v1/responses", ("GET",), Body.NONE, Model.OPTIONAL, Dialect.RESPONSES, websocket=True),
    Endpoint("/v1/realtime", ("GET",), Body.NONE, Model.OPTIONAL, websocket=True),
    _stored("/v1/responses/{rest}", dialect=Dialect.RESPONSES),
    _inference("/v1/messages", Dialect.ANTHROPIC),
    _inference("/v1/messages/count_tokens", Dialect.ANTHROPIC, streams=False),
    _ours("/v1/models"),
    _ours("/v1/models/{rest}"),
    _stored("/v1/models/{id}", "DELETE"),
    _ours("/v1/limits"),
    _ours("/v1/usage"),
    _optional("/v1/moderations"),
    _inference("/v1/rerank", streams=False),
    _optional("/v1/images/generations"),
    _form("/v1/images/edits", Model.OPTIONAL),
    _form("/v1/images/variations", Model.OPTIONAL),
    _inference("/v1/audio/speech", streams=False),
    _form("/v1/audio/transcriptions", Model.OPTIONAL),
    _form("/v1/audio/translations", Model.OPTIONAL),
    _form("/v1/audio/voices"),
    _form("/v1/audio/voice_consents"),
    _stored("/v1/audio/voice_consents", "GET"),
    _stored("/v1/audio/voice_consents/{id}"),
    _form("/v1/files"),
    _stored("/v1/files", "GET"),
    _stored("/v1/files/{rest}", "GET", "DELETE"),
    _stored("/v1/uploads"),
    _form("/v1/uploads/{id}/parts"),
    _stored("/v1/uploads/{id}/complete", "POST"),
    _stored("/v1/uploads/{id}/cancel", "POST"),
    _stored("/v1/batches"),
    _stored("/v1/batches/{rest}"),
    _stored("/v1/fine_tuning/{rest}"),
    _stored("/v1/vector_stores"),
    _stored("/v1/vector_stores/{rest}"),
    _stored("/v1/assistants"),
    _stored("/v1/assistants/{rest}"),
    _stored("/v1/threads"),
    _stored("/v1/threads/{rest}"),
    _for_pages("/api/chat/stream", streams=True),
    _for_pages("/api/chat", streams=False),
    _ours("/health"),
    _ours("/api/health/stream"),
    _ours("/"),
    _ours("/static/{file}"),
)

#: What `/static/{file}` stands for: a closed list, so that a path is never the name of a file.
PAGE_FILES = (
    "playground.css",
    "playground.js",
    "playground-figures.js",
    "playground-snippets.js",
    "stream-client.js",
    "use-chat-stream.js",
)

# One segment: unreserved and sub-delims of RFC 3986, and percent escapes that neither decode to a path
# separator, a dot, a percent sign nor a control character.
_SEGMENT = (
    r"(?!\.{1,2}(?:/|$))(?:[A-Za-z0-9._~:@!$&'()*+,;=-]|%(?!2[EeFf5]|5[Cc]|7[Ff])[2-9A-Fa-f][0-9A-Fa-f])+"
)
# A model's name may hold slashes, which SDKs send as %2F. Only our own /v1/models takes them.
_MODEL_NAME = r"[A-Za-z0-9._~:@!$&'()*+,;=/%-]+"


def _compile(endpoint: Endpoint) -> re.Pattern[str]:
    rest = _MODEL_NAME if endpoint.name == "/v1/models/{rest}" else rf"{_SEGMENT}(?:/{_SEGMENT}){{0,5}}"
    pattern = re.escape(endpoint.name)
    return re.compile(pattern.replace(r"\{id\}", _SEGMENT).replace(r"\{rest\}", rest))


_EXACT = {
    (method, endpoint.name): endpoint
    for endpoint in TABLE
    if "{" not in endpoint.name
    for method in endpoint.methods
}
# Applications may leave /v1 out of base_url (LiteLLM's quickstart does).
_EXACT.update(
    {
        (method, name.removeprefix("/v1")): endpoint
        for (method, name), endpoint in _EXACT.items()
        if name.startswith("/v1/")
    }
)
_EXACT.update(
    {
        (method, f"/static/{file}"): endpoint
        for endpoint in TABLE
        if endpoint.name == "/static/{file}"
        for method in endpoint.methods
        for file in PAGE_FILES
    }
)
_PATTERNS = [
    (_compile(endpoint), endpoint)
    for endpoint in TABLE
    if "{" in endpoint.name and endpoint.name != "/static/{file}"
]


def match(method: str, path: str) -> Endpoint | None:
    """The row for this method and raw path (without its query), or None for a 404."""
    found = _EXACT.get((method, path))
    if found is not None:
        return found
    full = path if path.startswith("/v1/") else f"/v1{path}"
    for pattern, endpoint in _PATTERNS:
        if method in endpoint.methods and pattern.fullmatch(full):
            return endpoint
    return None


def upstream_path(raw_path: str) -> str:
    """What is appended to an upstream's base_url: the path without its leading /v1, the query untouched."""
    return raw_path[3:] if raw_path.startswith("/v1/") else raw_path
