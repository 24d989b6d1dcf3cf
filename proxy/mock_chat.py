"""The mock's answers in OpenAI's first dialect: chat/completions, completions, embeddings, models."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from proxy.mock_ask import ARGUMENTS, Ask

CREATED = 1_700_000_000  # every answer's date: answers do not depend on the clock
VECTOR = (0.25, -0.5, 0.75, 1.0)  # every embedding; exact in binary
DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode
_VECTOR_BASE64 = base64.b64encode(struct.pack(f"<{len(VECTOR)}f", *VECTOR)).decode()


# -- chat/completions


def _openai_usage(ask: Ask) -> dict[str, int]:
    prompt, completion = ask.prompt_tokens(), ask.completion_tokens()
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _openai_head(ask: Ask, kind: str) -> dict[str, Any]:
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{prefix}-{ask.id}", "object": kind, "created": CREATED, "model": ask.body.model}


def _openai_tail(ask: Ask, kind: str, finish: bytes) -> Iterator[bytes]:
    """The end of a stream, which a stream that is not to be done lacks."""
    if ask.behaviour.no_done:
        return
    yield finish
    if ask.usage_asked:
        last = _openai_head(ask, kind) | {"choices": [], "usage": _openai_usage(ask)}
        yield b"data: %s\n\n" % _encode(last)
    yield DONE


def _tool_calls(name: str) -> list[dict[str, Any]]:
    function = {"name": name, "arguments": "".join(ARGUMENTS)}
    return [{"id": "call_mock", "type": "function", "function": function}]


def chat_json(ask: Ask) -> dict[str, Any]:
    tool = ask.tool
    message: dict[str, Any] = {"role": "assistant", "content": ask.text if tool is None else None}
    if tool is not None:
        message["tool_calls"] = _tool_calls(tool)
    finish = "stop" if tool is None else "tool_calls"
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    return _openai_head(ask, "chat.completion") | {"choices": [choice], "usage": _openai_usage(ask)}


def _tool_deltas(name: str) -> Iterator[bytes]:
    opening = _tool_calls(name)[0] | {"index": 0, "function": {"name": name, "arguments": ""}}
    yield _encode({"tool_calls": [opening]})
    for piece in ARGUMENTS:
        yield _encode({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})


def chat_events(ask: Ask) -> Iterator[bytes]:
    kind = "chat.completion.chunk"
    tool = ask.tool
    # Only the delta differs from chunk to chunk: what surrounds it is encoded once.
    before = b'data: %s,"choices":[{"index":0,"delta":' % _encode(_openai_head(ask, kind))[:-1]
    close = b'}],"usage":null}\n\n' if ask.usage_asked else b"}]}\n\n"
    after = b',"logprobs":null,"finish_reason":null' + close
    if tool is None:
        yield before + b'{"role":"assistant","content":"","refusal":null}' + after
        start, end = before + b'{"content":', b"}" + after
        for piece in ask.pieces():
            yield start + piece + end
    else:
        yield before + b'{"role":"assistant","content":null}' + after
        for delta in _tool_deltas(tool):
            yield before + delta + after
    reason = b"stop" if tool is None else b"tool_calls"
    yield from _openai_tail(
        ask, kind, before + b'{},"logprobs":null,"finish_reason":"' + reason + b'"' + close
    )


# -- completions


def text_json(ask: Ask) -> dict[str, Any]:
    choice = {"index": 0, "text": ask.text, "logprobs": None, "finish_reason": "stop"}
    return _openai_head(ask, "text_completion") | {"choices": [choice], "usage": _openai_usage(ask)}


def text_events(ask: Ask) -> Iterator[bytes]:
    kind = "text_completion"
    start = b'data: %s,"choices":[{"index":0,"text":' % _encode(_openai_head(ask, kind))[:-1]
    close = b'}],"usage":null}\n\n' if ask.usage_asked else b"}]}\n\n"
    end = b',"logprobs":null,"finish_reason":null' + close
    for piece in ask.pieces():
        yield start + piece + end
    yield from _openai_tail(ask, kind, start + b'"","logprobs":null,"finish_reason":"stop"' + close)


# -- embeddings, models


def embeddings_json(ask: Ask) -> dict[str, Any]:
    given = ask.body.input
    many = isinstance(given, list) and not all(isinstance(token, int) for token in given)
    vector: str | list[float] = _VECTOR_BASE64 if ask.body.encoding_format == "base64" else list(VECTOR)
    data = [
        {"object": "embedding", "index": index, "embedding": vector}
        for index in range(len(given) if many else 1)
    ]
    tokens = ask.prompt_tokens()
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": ask.body.model, "usage": usage}


def models_json(ask: Ask) -> dict[str, Any]:
    model = {"id": ask.body.model, "object": "model", "created": CREATED, "owned_by": "mock"}
    return {"object": "list", "data": [model]}
