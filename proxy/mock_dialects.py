"""The mock's routes: how each answers whole, as a stream, and with an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec

from proxy.mock_ask import Ask
from proxy.mock_chat import (
    FAILURE,
    chat_events,
    chat_json,
    embeddings_json,
    failure,
    models_json,
    text_events,
    text_json,
)
from proxy.mock_events import event_of, message_events, message_json, response_events, response_json
from proxy.mock_providers import error_type

_encode = msgspec.json.Encoder().encode


def anthropic_error(status: int, message: str) -> bytes:
    return _encode({"type": "error", "error": {"type": error_type(status, "api_error"), "message": message}})


def _response_failure(ask: Ask, number: int) -> bytes:
    # Flat, as the real API sends it; the SDK hands it on as an event.
    flat = {"code": "server_error", "message": FAILURE, "param": None, "sequence_number": number}
    return event_of("error", flat)


def _message_failure(ask: Ask, number: int) -> bytes:
    return b"event: error\ndata: %b\n\n" % anthropic_error(529, FAILURE)


class Dialect(NamedTuple):
    """How a route answers: whole, as a stream (if it can), and with an error inside the stream."""

    json: Callable[[Ask], dict[str, Any]]
    events: Callable[[Ask], Iterator[bytes]] | None = None
    failure: Callable[[Ask, int], bytes] = failure
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
