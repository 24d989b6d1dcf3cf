"""docs/errors.md: every error code, from `proxy/errors.py` and the places that raise a BadRequest."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import proxy
from docs.markdown import code, table
from proxy import errors
from proxy.errors import Dialect, HeadraceError

#: When a caller sees a code, and what helps. One line a code: with none too many and none missing.
_WHEN = {
    "bad_request": "Not well-formed HTTP, a field of a wrong type, a form or a handshake that is none.",
    "invalid_json": "The body is no JSON object, or not plain JSON.",
    "duplicate_key": "A field that routes, authorises or bills stands in the body twice.",
    "missing_model": "The route needs a `model`.",
    "invalid_messages": "`messages` of the browser API.",
    "ambiguous_credentials": "Two different credentials: send one.",
    "invalid_api_key": "None, or unknown, malformed, expired, revoked: one body for all of them.",
    "expired_token": "A JWT that was valid: get another one.",
    "invalid_token": "A JWT with a wrong signature, issuer, audience or an unknown plan.",
    "model_not_allowed": "Not among the key's `models`; for such a key, routes without a model too.",
    "ip_not_allowed": "The caller is not in the key's networks. Behind a proxy: `trusted_proxies`.",
    "origin_not_allowed": "The page's origin is not in `cors.origins`.",
    "not_found": "No such path, or a part that is turned off (browser API, playground).",
    "model_not_found": "No entry of `models` has this name, and no pattern fits.",
    "method_not_allowed": "CONNECT, TRACE.",
    "request_timeout": "The head took longer than `timeouts.header`, or the body than `timeouts.body`.",
    "length_required": "Only from the nginx edge.",
    "request_too_large": "`max_body_bytes`, `max_upload_bytes`.",
    "uri_too_long": "A request line of more than 8 KiB.",
    "unsupported_media_type": "Not `application/json` in UTF-8, compressed, or a form that is not multipart.",
    "expectation_failed": "An `Expect` other than `100-continue`.",
    "misdirected_request": "Only from the nginx edge.",
    "upgrade_required": "`/v1/realtime` without a WebSocket handshake.",
    "headers_too_large": "A header field of more than 16 KiB, or too many of them.",
    "rate_limit_exceeded": "Requests a minute: of the caller, its plan, the model, the address.",
    "tokens_limit_exceeded": "Tokens a minute: of the caller or the model.",
    "too_many_in_flight": "`plans.NAME.max_in_flight`. Callers do not wait for their own slots.",
    "budget_exceeded": "A budget of the key or the plan; `x-headrace-budget-reset` says when it begins anew.",
    "internal_error": "A bug of Headrace. The log has the traceback under the request id.",
    "not_implemented": "A transfer coding other than `chunked`.",
    "http_version_not_supported": "Anything but HTTP/1.0 and HTTP/1.1.",
    "upstream_error": "The provider failed, reported an error with status 200, or ended a stream early.",
    "upstream_unreachable": "No connection, or it died before a byte of the answer.",
    "upstream_invalid_response": "A redirect, no HTTP, a body that breaks its own framing.",
    "upstream_auth": "The provider answered 401 or 403 to Headrace's own credential: look at `api_key`.",
    "overloaded": "Full: the queue, `max_connections`, `max_buffered_bytes`; the store is away and "
    "`on_store_failure` is `closed`; or an operator stopped it (then with `x-should-retry: false`).",
    "queue_timeout": "No slot within `limits.queue.max_wait`.",
    "draining": "The server is shutting down. Another one, or the same after its restart, answers.",
    "no_upstream_available": "All upstreams of the model are ejected or unhealthy.",
    "upstream_timeout": "No first byte within `first_byte`, silence longer than `idle`, or `total` is over.",
}

#: What constructors ask for.
_SAMPLES: dict[str, Any] = {"retry_after_s": 1, "resets_at": ""}

_HEAD = """# Errors

{generated}

What an upstream answers passes as it is, status and body. The codes here are Headrace's own: `error.code` in
the body, `error` in the [log line](metrics.md#the-log-line).

*Again*: what the OpenAI and Anthropic SDKs do by themselves. They repeat 408, 409, 429 and 5xx, after the
answer's *Retry-After* if it has one, unless it has `x-should-retry: false`. Headrace adds that field to a 5xx
after two attempts that ended in a 5xx of the upstream: it has tried for the caller.

*Reason*: how the request is [counted](life-of-a-request.md#how-a-request-ends).
"""

_SHAPES = """## Shapes

On OpenAI's paths, and everywhere else:

```json
{openai}
```

On `/v1/messages` and what is below it:

```json
{anthropic}
```

After a stream has begun an error can have no status any more. Between two events the reader gets one last
event, then the connection is broken off, never ended cleanly:

```
{openai_event}
```

on OpenAI's paths, and with `event: error` before it on `/v1/responses` and `/v1/messages`:

```
{anthropic_event}
```

## Of the admin listener

| Status | Code | When |
|---|---|---|
| 400 | `bad_request` | The order cannot be carried out; `message` says why. |
| 400 | `reload_failed` | The new configuration is wrong; the old one stays. |
| 401 | `invalid_admin_token` | `admin_token` is set or needed, and is not this one. |
| 404 | `not_found` | No such path, key or stream. |
| 409 | `restart_failed` | A restart is under way, or the new generation did not start. |
"""


class Row(NamedTuple):
    """One way to come to a code."""

    status: int
    code: str
    message: str
    reason: str
    headers: frozenset[str]


def page(generated: str) -> str:
    """Raises LookupError if the codes and their explanations are not the same."""
    found = codes()
    if found.keys() != _WHEN.keys():
        raise LookupError(f"explained and raised differ: {sorted(found.keys() ^ _WHEN.keys())}")
    titles = ("Status", "Code", "Again", "Reason", "When", "Message")
    rows = [_cells(rows) for rows in sorted(found.values(), key=lambda rows: (rows[0].status, rows[0].code))]
    return "\n".join([_HEAD.format(generated=generated), *table(titles, rows), "", _shapes()])


def codes() -> dict[str, list[Row]]:
    """Every code that a caller can see, with all ways to it."""
    found: dict[str, list[Row]] = {}
    for row in (*_of_classes(), *_of_http(), *_of_bad_requests()):
        rows = found.setdefault(row.code, [])
        if row not in rows:
            rows.append(row)
    return found


def _of_classes() -> Iterator[Row]:
    made: list[type[HeadraceError]] = [HeadraceError]
    for kind in made:
        # Others are the data path's own words.
        made += [each for each in kind.__subclasses__() if each.__module__ == errors.__name__]
        if kind in (errors.Refused, errors.BadRequest):  # a code for each status, and for each place
            continue
        needed = [each for each in inspect.signature(kind).parameters if each in _SAMPLES]
        error = kind(*(_SAMPLES[each] for each in needed))
        # The root stands for what nobody caught; what is said of a budget holds its date.
        reason = errors.Internal.reason if kind is HeadraceError else kind.reason
        message = "" if kind is errors.BudgetExceeded else error.message
        yield Row(kind.status, kind.code, message, reason.value, frozenset(map(str.lower, error.headers)))


def _of_http() -> Iterator[Row]:
    for status, (name, message) in errors.REFUSALS.items():
        yield Row(status, name, message, errors.Reason.REJECTED.value, frozenset())


@functools.cache
def _of_bad_requests() -> tuple[Row, ...]:
    """The codes that stand as literals where a BadRequest is made."""
    found = []
    for file in sorted(Path(proxy.__file__).parent.rglob("*.py")):
        text = file.read_text()
        for node in ast.walk(ast.parse(text)) if "BadRequest(" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "BadRequest":
                names = [each.value for each in ast.walk(node.args[0]) if isinstance(each, ast.Constant)]
                found += [
                    Row(400, str(name), "", errors.Reason.REJECTED.value, frozenset()) for name in names
                ]
    return tuple(found)


def _cells(rows: list[Row]) -> list[str]:
    first = rows[0]
    messages = dict.fromkeys(row.message for row in rows if row.message)
    reasons = dict.fromkeys(code(row.reason) for row in rows)
    said = " / ".join(messages) if len(rows) < 4 else first.message
    return [str(first.status), code(first.code), _again(first), ", ".join(reasons), _WHEN[first.code], said]


def _again(row: Row) -> str:
    if "x-should-retry" in row.headers:
        return "no"
    if row.status in (408, 409, 429) or row.status >= 500:
        return "yes, after *Retry-After*" if "retry-after" in row.headers else "yes"
    return "no"


def _shapes() -> str:
    example = errors.TooManyInFlight(1.0)
    cut = errors.UpstreamCut()
    return _SHAPES.format(
        openai=example.body(Dialect.OPENAI, "req_1").decode(),
        anthropic=example.body(Dialect.ANTHROPIC, "req_1").decode(),
        openai_event=cut.event(Dialect.OPENAI, "req_1").decode().strip(),
        anthropic_event=cut.event(Dialect.ANTHROPIC, "req_1").decode().strip(),
    )
