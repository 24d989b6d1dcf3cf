"""The mock's answers in the dialects of named events: responses (OpenAI) and messages (Anthropic)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from proxy.mock_ask import Ask
from proxy.mock_chat import CREATED
from proxy.mock_providers import CACHED

_encode = msgspec.json.Encoder().encode


def event_of(name: str, data: dict[str, Any]) -> bytes:
    """A named event, whose data repeats the name."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _encode({"type": name, **data}))


# -- responses


def _response_usage(ask: Ask) -> dict[str, Any]:
    prompt, completion = ask.prompt_tokens(), ask.behaviour.words
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + completion,
    }


def _response_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def _response_item(ask: Ask, text: str | None) -> dict[str, Any]:
    status = "in_progress" if text is None else "completed"
    content = [] if text is None else [_response_part(text)]
    return {
        "id": f"msg_{ask.id}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def _response(ask: Ask, text: str | None) -> dict[str, Any]:
    """The response object: of a finished answer, or (no text) of one that only began."""
    return {
        "id": f"resp_{ask.id}",
        "object": "response",
        "created_at": CREATED,
        "status": "in_progress" if text is None else "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": ask.body.model,
        "output": [] if text is None else [_response_item(ask, text)],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": None if text is None else _response_usage(ask),
    }


def response_json(ask: Ask) -> dict[str, Any]:
    return _response(ask, ask.text)


def response_events(ask: Ask) -> Iterator[bytes]:
    item = {"item_id": f"msg_{ask.id}", "output_index": 0, "content_index": 0}
    yield event_of("response.created", {"response": _response(ask, None), "sequence_number": 0})
    opened = {"output_index": 0, "item": _response_item(ask, None), "sequence_number": 1}
    yield event_of("response.output_item.added", opened)
    yield event_of("response.content_part.added", item | {"part": _response_part(""), "sequence_number": 2})
    delta = item | {"logprobs": []}
    start = event_of("response.output_text.delta", delta)[:-3] + b',"sequence_number":'  # without its }\n\n
    number = 2
    for number, piece in enumerate(ask.pieces(), 3):
        yield b'%s%d,"delta":%s}\n\n' % (start, number, piece)
    if ask.behaviour.no_done:
        return
    text = ask.text
    ends: tuple[tuple[str, dict[str, Any]], ...] = (
        ("response.output_text.done", item | {"text": text, "logprobs": []}),
        ("response.content_part.done", item | {"part": _response_part(text)}),
        ("response.output_item.done", {"output_index": 0, "item": _response_item(ask, text)}),
        ("response.completed", {"response": _response(ask, text)}),
    )
    for name, data in ends:
        number += 1
        yield event_of(name, data | {"sequence_number": number})


# -- messages


def _message(ask: Ask, text: str | None) -> dict[str, Any]:
    output = 1 if text is None else ask.behaviour.words  # a stream opens with a preliminary count
    return {
        "id": f"msg_{ask.id}",
        "type": "message",
        "role": "assistant",
        "model": ask.body.model,
        "content": [] if text is None else [{"type": "text", "text": text}],
        "stop_reason": None if text is None else "end_turn",
        "stop_sequence": None,
        "usage": _message_usage(ask, output),
    }


def _message_usage(ask: Ask, output: int) -> dict[str, Any]:
    """Anthropic's own leaves what came from a cache out of the input, and repeats all at the end."""
    prompt = ask.prompt_tokens()
    if ask.behaviour.provider != "anthropic":
        return {"input_tokens": prompt, "output_tokens": output}
    cached = min(CACHED, prompt)
    cache = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": cached}
    tier = {"service_tier": "standard"}
    return {"input_tokens": prompt - cached, **cache, "output_tokens": output, **tier}


def message_json(ask: Ask) -> dict[str, Any]:
    return _message(ask, ask.text)


def message_events(ask: Ask) -> Iterator[bytes]:
    yield event_of("message_start", {"message": _message(ask, None)})
    yield event_of("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}})
    yield event_of("ping", {})
    start = (
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        b'"delta":{"type":"text_delta","text":'
    )
    for piece in ask.pieces():
        yield start + piece + b"}}\n\n"
    if ask.behaviour.no_done:
        return
    yield event_of("content_block_stop", {"index": 0})
    delta = {"stop_reason": "end_turn", "stop_sequence": None}
    usage: dict[str, Any] = {"output_tokens": ask.behaviour.words}
    if ask.behaviour.provider == "anthropic":
        usage = _message_usage(ask, ask.behaviour.words)
    yield event_of("message_delta", {"delta": delta, "usage": usage})
    yield event_of("message_stop", {})
