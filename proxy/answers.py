"""What an upstream's answer is, before a byte of it is passed on.

Answers pass verbatim, with four exceptions (contract section 5): redirects, 401 and 403 (they speak of our
credential, and may quote it), a 200 whose whole JSON is an error, and Gemini's array of errors.
"""

from __future__ import annotations

from typing import Any

import msgspec

from proxy.errors import HeadraceError, UpstreamFailed, UpstreamInBand, UpstreamInvalid, UpstreamRefusedUs
from proxy.headers import RawHeaders, value_of
from proxy.preamble import leading

#: The members that an error document may have besides `error`.
_AROUND_ERROR = frozenset(
    {"error", "type", "object", "request_id", "status", "code", "message", "detail", "param", "user_id"}
)
#: An error document starts with its error: enough to look at before parsing a whole answer.
_LOOK_BYTES = 256


def refuse_unusable(status: int) -> None:
    """Raises for what is never passed on."""
    if status in (401, 403):
        raise UpstreamRefusedUs
    if status < 200 or (300 <= status < 400 and status != 304):
        raise UpstreamInvalid


def is_event_stream(status: int, fields: RawHeaders) -> bool:
    content_type = value_of(fields, b"content-type")
    if content_type is None or content_type[:16] == b"application/json":  # nearly every other
        return False
    media_type = content_type.partition(b";")[0]
    return 200 <= status < 300 and media_type.strip().lower() == b"text/event-stream"


def late_refusal(status: int) -> HeadraceError:
    """The upstream answered something else than a stream after 200 was already promised."""
    return UpstreamInvalid() if status < 400 else UpstreamFailed()


def checked_body(status: int, body: bytes) -> bytes:
    """The body to pass on; raises UpstreamInBand for an error that calls itself a success."""
    at = leading(body)  # DeepSeek sends a blank line every few seconds while a request is queued
    if body.find(b'"error"', at, at + _LOOK_BYTES) < 0:
        return body
    if status < 300 and body.startswith((b"{", b"["), at):
        document = _decoded(body)
        if isinstance(document, list) and len(document) == 1:
            [document] = document
        if isinstance(document, dict) and _is_error(document):
            raise UpstreamInBand
    elif status >= 400 and body.startswith(b"[", at):
        return _from_array(body)
    return body


def _is_error(document: dict[str, Any]) -> bool:
    """Flat errors (`{"object": "error", "message": …}`) are vLLM's."""
    named = document.get("error") or document.get("object") == "error"
    return bool(named) and document.keys() <= _AROUND_ERROR


def _from_array(body: bytes) -> bytes:
    """Gemini: `[{"error": {"code": 400, "message": …, "status": "INVALID…"}}]`; SDKs want an object."""
    document = _decoded(body)
    if not (isinstance(document, list) and document and isinstance(document[0], dict)):
        return body
    error = document[0].get("error")
    if not isinstance(error, dict):
        return body
    kind = str(error.get("status", "upstream_error")).lower()
    shaped = {"message": str(error.get("message", "")), "type": kind, "param": None, "code": kind}
    return msgspec.json.encode({"error": shaped})


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
