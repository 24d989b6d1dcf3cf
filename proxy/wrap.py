"""`streams.wrap_json`: an answer of plain JSON to a request that asked for a stream, as the shortest stream
of its dialect that the SDKs read.

- chat/completions: one chunk, each choice's `message` as its `delta`, usage kept; then `[DONE]`.
- completions: the object itself is a chunk; then `[DONE]`.
- responses: `response.created`, because SDKs want it first, and `response.completed` (or failed, incomplete),
  which holds everything.
- messages: what the API sends for a message whose blocks each come in one piece.

Everything else has no stream that could be made from it and is not wrapped. Members that are not looked at
keep their own bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import Raw

from proxy.errors import Dialect

Members = dict[str, Raw]

_encode = msgspec.json.Encoder().encode
_members = msgspec.json.Decoder(Members).decode
_list = msgspec.json.Decoder(list[Members]).decode
_MALFORMED = (msgspec.DecodeError, ValueError, RecursionError)
_DONE = b"data: [DONE]\n\n"
#: Line ends inside JSON are only layout, inside an event they would end its data.
_ONE_LINE = bytes.maketrans(b"\r\n", b"  ")
_NULL = Raw(b"null")
#: A finished response's status -> its last event.
_LAST = {status: f"response.{status}" for status in ("completed", "failed", "incomplete")}
#: Of a message's block: the member that streams, the delta that carries it, its JSON before it has come.
_DELTAS = {
    "text": ("text", "text_delta", b'""'),
    "thinking": ("thinking", "thinking_delta", b'""'),
    "tool_use": ("input", "input_json_delta", b"{}"),
}


def wrap(dialect: Dialect, body: bytes) -> bytes | None:
    """The stream, to its terminator; None for an answer that is none of the above. Never raises."""
    try:
        members = _members(body)
        return b"".join(_WRAPS[dialect](members)) or None
    except _MALFORMED:
        return None


def _event(value: object, name: str = "") -> bytes:
    head = b"event: %b\n" % name.encode() if name else b""
    return b"%bdata: %b\n\n" % (head, _encode(value).translate(_ONE_LINE))


def _text(members: Members, name: str) -> str:
    """A member that is a plain string; else nothing."""
    value = msgspec.json.decode(members[name]) if name in members else ""
    return value if isinstance(value, str) else ""


# ── chat/completions, completions ────────────────────────────────────────────────────────────────────────


def _completion(members: Members) -> Iterator[bytes]:
    choices = _list(members.get("choices", b"[]"))
    if any("message" in choice for choice in choices):
        members["object"] = Raw(b'"chat.completion.chunk"')
        members["choices"] = Raw(_encode([_with_delta(choice) for choice in choices]))
    elif not any("text" in choice for choice in choices):
        return
    yield _event(members)
    yield _DONE


def _with_delta(choice: Members) -> Members:
    """The choice of a chunk."""
    return {"delta" if name == "message" else name: _indexed(name, value) for name, value in choice.items()}


def _indexed(name: str, value: Raw) -> Raw:
    """In a chunk tool calls are numbered: SDKs put their pieces together by that."""
    if name != "message":
        return value
    delta = _members(value)
    if bytes(delta.get("tool_calls", _NULL)).startswith(b"["):
        calls = _list(delta["tool_calls"])
        numbered = [{"index": Raw(b"%d" % index)} | call for index, call in enumerate(calls)]
        delta["tool_calls"] = Raw(_encode(numbered))
    return Raw(_encode(delta))


# ── responses ────────────────────────────────────────────────────────────────────────────────────────────


def _response(members: Members) -> Iterator[bytes]:
    last = _LAST.get(_text(members, "status"))
    if last is None or _text(members, "object") != "response":
        return  # one that runs in the background has no end yet
    begun = {"status": Raw(b'"in_progress"'), "output": Raw(b"[]"), "usage": _NULL}
    for number, (name, response) in enumerate((("response.created", members | begun), (last, members))):
        yield _event({"type": name, "response": response, "sequence_number": number}, name)


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────


def _message(members: Members) -> Iterator[bytes]:
    if _text(members, "type") != "message":
        return
    begun = {"content": Raw(b"[]"), "stop_reason": _NULL, "stop_sequence": _NULL}
    yield _named("message_start", message=members | begun)
    for index, block in enumerate(_list(members.get("content", b"[]"))):
        yield from _block(index, block)
    ended = {name: members.get(name, _NULL) for name in ("stop_reason", "stop_sequence")}
    yield _named("message_delta", delta=ended, usage=members.get("usage", _NULL))
    yield _named("message_stop")


def _block(index: int, block: Members) -> Iterator[bytes]:
    member, delta, empty = _DELTAS.get(_text(block, "type"), ("", "", b""))
    if member not in block:
        yield _named("content_block_start", index=index, content_block=block)
    else:
        yield _named("content_block_start", index=index, content_block=block | {member: Raw(empty)})
        yield _named("content_block_delta", index=index, delta=_delta(delta, member, block[member]))
    yield _named("content_block_stop", index=index)


def _delta(kind: str, member: str, value: Raw) -> dict[str, Any]:
    if kind == "input_json_delta":
        return {"type": kind, "partial_json": bytes(value).decode()}
    return {"type": kind, member: value}


def _named(name: str, **data: Any) -> bytes:
    return _event({"type": name, **data}, name)


_WRAPS: dict[Dialect, Callable[[Members], Iterator[bytes]]] = {
    Dialect.OPENAI: _completion,
    Dialect.RESPONSES: _response,
    Dialect.ANTHROPIC: _message,
}
