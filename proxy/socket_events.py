"""What the messages of a WebSocket session say: the model asked for, the usage reported, our own errors.

A session of the Responses API names its model in each `response.create`, beside the type
(openai-python, `types/responses/responses_client_event.py`); some servers take it inside `response`, as the
Realtime API would. Both places are read; a message that could be read in two ways is refused (see `peek`).
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from proxy.errors import BadRequest, Dialect, HeadraceError
from proxy.peek import peek, with_model
from proxy.usage import KEY, Counts, Source, Usage

#: json takes 50 ms for this much, on the event loop.
_STRICT_BYTES = 2**20
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
#: The one event that ends a response carries its usage: Realtime's, then the Responses API's.
_ENDS_RESPONSE = frozenset({"response.done", "response.completed", "response.incomplete", "response.failed"})


def asked_model(message: bytes) -> str | None:
    """The model that a caller's message names, None if it names none. Raises BadRequest."""
    outer = peek(message).model
    nested = _nested(message)
    inner = None if nested is None else peek(nested).model
    if outer is not None and inner is not None and outer != inner:
        raise BadRequest("duplicate_key", "The message names two models.", param="model")
    return outer if outer is not None else inner


def rewritten(message: bytes, model: str) -> bytes:
    """A message that names a model, with another one's name; every other member keeps its own bytes."""
    nested = _nested(message)
    if nested is not None and peek(nested).model is not None:
        members = _members.decode(message)
        members["response"] = msgspec.Raw(with_model(nested, model))
        message = msgspec.json.encode(members)
    return with_model(message, model) if peek(message).model is not None else message


def _nested(message: bytes) -> bytes | None:
    """The `response` object of a message. Two of them are refused, however their keys are spelt."""
    found = _members.decode(message).get("response")
    if found is None:
        return None
    if len(message) > _STRICT_BYTES:
        raise BadRequest(
            "bad_request", "A message of this size may have no nested response.", param="response"
        )
    outermost: list[list[tuple[str, Any]]] = []
    try:
        json.loads(message, object_pairs_hook=outermost.append)  # the last call is the outermost object's
    except (ValueError, RecursionError):
        raise BadRequest("invalid_json", "The message is not plain JSON.") from None
    if [name for name, _ in outermost[-1]].count("response") > 1:
        raise BadRequest("duplicate_key", "The field 'response' is given more than once.", param="response")
    raw = bytes(found)
    return raw if raw.startswith(b"{") else None


# ── usage ───────────────────────────────────────────────────────────────────────────────────────────────


class _Counts(Counts):
    """The Realtime API writes `token_details` where all others write `tokens_details`."""

    input_token_details: Any = None
    output_token_details: Any = None


class _Response(msgspec.Struct):
    usage: _Counts | None = None


class _Event(msgspec.Struct):
    type: str = ""
    response: _Response | None = None


_event = msgspec.json.Decoder(_Event)


def used(message: bytes) -> Usage | None:
    """What an upstream's message reports for a response that it ends; None for all other messages."""
    if KEY not in message:
        return None
    try:
        event = _event.decode(message)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    if event.type not in _ENDS_RESPONSE or event.response is None or event.response.usage is None:
        return None
    counts = event.response.usage
    counts.input_tokens_details = counts.input_tokens_details or counts.input_token_details
    counts.output_tokens_details = counts.output_tokens_details or counts.output_token_details
    report = counts.report(Dialect.RESPONSES)
    return None if report is None else report.usage()


def together(so_far: Usage | None, more: Usage) -> Usage:
    """Each response of a session is billed for itself: their usage adds up."""
    if so_far is None:
        return more
    return Usage(
        so_far.prompt_tokens + more.prompt_tokens,
        so_far.cached_tokens + more.cached_tokens,
        so_far.completion_tokens + more.completion_tokens,
        so_far.reasoning_tokens + more.reasoning_tokens,
        Source.REPORTED,
    )


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────


def error_event(error: HeadraceError, request_id: str) -> bytes:
    """OpenAI's error event: the body of an ordinary error with a type and its status."""
    return b'{"type":"error","status":%d,%b' % (error.status, error.body(Dialect.OPENAI, request_id)[1:])
