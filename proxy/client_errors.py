"""Why there is no (whole) answer: the categories of the browser client, with the same rules.

network     no answer at all: DNS, connection, TLS
auth        401 or 403
rate_limit  429
server      any other 5xx, and an error that the stream itself tells
timeout     408 or 504, or silence longer than this client waits
parse       an answer that is no chat completion
aborted     the stream or the client was closed while somebody read
truncated   the stream ended before its terminator
request     any other status: the same request will fail again
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from email.utils import mktime_tz, parsedate_tz
from enum import StrEnum
from typing import Any, NamedTuple


class Category(StrEnum):
    """See the table above."""

    NETWORK = "network"
    AUTH = "auth"
    RATE_LIMIT = "rate_limit"
    SERVER = "server"
    TIMEOUT = "timeout"
    PARSE = "parse"
    ABORTED = "aborted"
    TRUNCATED = "truncated"
    REQUEST = "request"


_PASSING = frozenset(
    {Category.NETWORK, Category.RATE_LIMIT, Category.SERVER, Category.TIMEOUT, Category.TRUNCATED}
)
_DECIMAL = re.compile(r"\s*[0-9]+(\.[0-9]+)?\s*")
#: Types and codes of errors in a stream, whose status has been 200 since long.
_TOLD = (
    (re.compile("rate_?limit|too_many", re.I), Category.RATE_LIMIT),
    (re.compile("authentication|permission|invalid_api_key", re.I), Category.AUTH),
    (re.compile("timeout", re.I), Category.TIMEOUT),
    (re.compile("invalid_request|not_found", re.I), Category.REQUEST),
)


class Head(NamedTuple):
    """The head of an answer; `headers` are found in any case."""

    status: int
    headers: Mapping[str, str]

    @property
    def request_id(self) -> str | None:
        """What to ask the operator about."""
        return self.headers.get("x-request-id") or self.headers.get("request-id")


class Said(NamedTuple):
    """What a server says of its error."""

    message: str | None = None
    type: str | None = None
    param: str | None = None
    code: str | None = None


class ChatError(Exception):
    """Every failure of this client.

    status, request_id: of the answer, if there was one.
    type, param, code: of the server's `error` object.
    retryable: whether asking again may help.
    retry_after_s: seconds, if the server says when.
    partial: whether a part of the answer had been delivered.
    """

    def __init__(
        self,
        category: Category,
        message: str,
        *,
        head: Head | None = None,
        said: Said | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.category = category
        self.message = message
        self.status = head.status if head else None
        self.request_id = head.request_id if head else None
        self.type, self.param, self.code = said[1:] if said else (None, None, None)
        self.retryable = category in _PASSING if retryable is None else retryable
        self.retry_after_s: float | None = None
        self.partial = False


def aborted() -> ChatError:
    return ChatError(Category.ABORTED, "The request was stopped.")


def silent(head: Head | None = None) -> ChatError:
    return ChatError(Category.TIMEOUT, "The server was silent for too long.", head=head)


def truncated(head: Head) -> ChatError:
    return ChatError(Category.TRUNCATED, "The stream ended before the answer was complete.", head=head)


def unreadable(head: Head | None) -> ChatError:
    return ChatError(Category.PARSE, "The answer is not a chat completion.", head=head)


def refusal(head: Head, body: bytes, wall_now: float) -> ChatError:
    """An answer with a status that is none of success. `wall_now`: seconds since the epoch."""
    said = said_in(decoded(body)) or Said()
    should = head.headers.get("x-should-retry")
    usual = head.status in (408, 409, 429) or head.status >= 500
    error = ChatError(
        _category_of(head.status),
        said.message or f"The server answered with status {head.status}.",
        head=head,
        said=said,
        retryable=should == "true" or (should != "false" and usual),
    )
    error.retry_after_s = retry_after_s(head.headers, wall_now)
    return error


def told(said: Said, head: Head) -> ChatError:
    """An error inside of an answer that began well."""
    names = f"{said.type or ''} {said.code or ''}"
    category = next((found for pattern, found in _TOLD if pattern.search(names)), Category.SERVER)
    return ChatError(category, said.message or "The stream ended with an error.", head=head, said=said)


def _category_of(status: int) -> Category:
    if status in (401, 403):
        return Category.AUTH
    if status == 429:
        return Category.RATE_LIMIT
    if status in (408, 504):
        return Category.TIMEOUT
    return Category.SERVER if status >= 500 else Category.REQUEST


def said_in(document: Any) -> Said | None:
    """The error in a body or event, in the shapes of OpenAI, Anthropic, Gemini and vLLM; None: it is none."""
    whole = document[0] if isinstance(document, list) and document else document
    if not isinstance(whole, dict):
        return None
    flat = whole if whole.get("type") == "error" or whole.get("object") == "error" else None
    found = whole.get("error") or flat
    if not found:
        return None
    if not isinstance(found, dict):
        return Said(str(found))
    return Said(*(_text(found.get(name)) for name in Said._fields))


def _text(value: Any) -> str | None:
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def decoded(data: str | bytes) -> Any:
    """None if it is not JSON: a `null` says as little."""
    try:
        return json.loads(data)
    except ValueError:  # UnicodeDecodeError is one
        return None


def retry_after_s(headers: Mapping[str, str], wall_now: float) -> float | None:
    """Seconds from `retry-after-ms`, else from `Retry-After` (a number or an HTTP date); None: neither says.

    The milliseconds win, as in OpenAI's SDKs. `wall_now`: seconds since the epoch."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is not None or not text:
        return seconds
    try:
        fields = parsedate_tz(text)
        return None if fields is None else max(0.0, mktime_tz(fields) - wall_now)
    except (ValueError, TypeError, OverflowError):  # what a server may write into a date
        return None


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and _DECIMAL.fullmatch(text) else None
