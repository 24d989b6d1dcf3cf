"""The mock's routes: how each answers whole, as a stream, and with an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec

from proxy.mock_ask import Ask
from proxy.mock_chat import chat_events, chat_json, embeddings_json, models_json, text_events, text_json
from proxy.mock_events import event_of, message_events, message_json, response_events, response_json

FAILURE = "the mock upstream failed as asked"
_ERROR_TYPES = {  # status: the type of the error, in both dialects
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}

_encode = msgspec.json.Encoder().encode


def error_of(anthropic: bool, status: int, message: str) -> dict[str, Any]:
    if anthropic:
        kind = _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _chat_failure(number: int) -> bytes:
    return b"data: %s\n\n" % _encode(error_of(False, 500, FAILURE))


def _response_failure(number: int) -> bytes:
    # Flat, as the real API sends it; the SDK hands it on as an event.
    data = {"code": "server_error", "message": FAILURE, "param": None, "sequence_number": number}
    return event_of("error", data)


def _message_failure(number: int) -> bytes:
    return event_of("error", error_of(True, 529, FAILURE))


class Dialect(NamedTuple):
    """How a route answers: whole, as a stream (if it can), and with an error inside the stream."""

    json: Callable[[Ask], dict[str, Any]]
    events: Callable[[Ask], Iterator[bytes]] | None = None
    failure: Callable[[int], bytes] = _chat_failure
    anthropic: bool = False


ROUTES: dict[tuple[str, str], Dialect] = {
    ("POST", "/chat/completions"): Dialect(chat_json, chat_events),
    ("POST", "/completions"): Dialect(text_json, text_events),
    ("POST", "/embeddings"): Dialect(embeddings_json),
    ("POST", "/responses"): Dialect(response_json, response_events, _response_failure),
    ("POST", "/messages"): Dialect(message_json, message_events, _message_failure, anthropic=True),
    ("GET", "/models"): Dialect(models_json),
}
#: How a path is answered that is no route.
UNKNOWN = Dialect(models_json)
