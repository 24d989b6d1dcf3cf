"""The mock's answers in OpenAI's first dialect: chat/completions, completions, embeddings, models."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from proxy.mock_ask import ARGUMENTS, Ask
from proxy.mock_providers import PROVIDERS, THOUGHTS, Provider, data

CREATED = 1_700_000_000  # every answer's date: answers do not depend on the clock
VECTOR = (0.25, -0.5, 0.75, 1.0)  # every embedding; exact in binary
DONE = b"data: [DONE]\n\n"
FAILURE = "the mock upstream failed as asked"

_encode = msgspec.json.Encoder().encode
_VECTOR_BASE64 = base64.b64encode(struct.pack(f"<{len(VECTOR)}f", *VECTOR)).decode()


def _provider(ask: Ask) -> Provider:
    return PROVIDERS[ask.behaviour.provider]


def _head(ask: Ask, kind: str) -> dict[str, Any]:
    """What every answer and every chunk begins with."""
    provider = _provider(ask)
    prefix = provider.prefix or ("chatcmpl" if kind.startswith("chat") else "cmpl")
    head = {"id": f"{prefix}-{ask.id}", "object": kind, "created": CREATED, "model": ask.body.model}
    return head | dict(provider.head)


def _whole(ask: Ask, kind: str, content: dict[str, Any], finish: str) -> dict[str, Any]:
    provider = _provider(ask)
    choice = {"index": 0, **content, **provider.choice, "finish_reason": finish}
    return _head(ask, kind) | {"choices": [choice], "usage": _usage(ask), **provider.last}


def _usage(ask: Ask, answer: int | None = None) -> dict[str, Any]:
    """Of the whole answer, or of its first so many words."""
    provider = _provider(ask)
    spent = ask.completion_tokens() if answer is None else answer
    return provider.usage(ask.prompt_tokens(), spent, provider.thoughts)


def _members(members: Mapping[str, Any]) -> bytes:
    """Further members of an object that is being written by hand."""
    return b"".join(b",%b:%b" % (_encode(name), _encode(value)) for name, value in members.items())


class _Chunks:
    """The chunks of one stream: what surrounds that which differs is encoded once."""

    def __init__(self, ask: Ask, kind: str, member: bytes) -> None:
        self._ask = ask
        self._provider = provider = _provider(ask)
        self._head = _head(ask, kind)
        self._before = b'data: %b,"choices":[{"index":0,"%b":' % (_encode(self._head)[:-1], member)
        self._choice = _members(provider.choice)
        #: Does every chunk say what was used so far?
        self.counts = provider.reports == "each" and ask.usage_asked
        self._null = b',"usage":null' if provider.reports == "asked" and ask.usage_asked else b""
        self._after = self._choice + b',"finish_reason":null}]' + self._null + b"}\n\n"

    def before(self, start: bytes = b"") -> bytes:
        return self._before + start

    def after(self, spent: int = 0) -> bytes:
        """What follows the delta; `spent`: the words so far, for those who count on every chunk."""
        if not self.counts:
            return self._after
        usage = _encode(_usage(self._ask, spent))
        return self._choice + b',"finish_reason":null}],"usage":' + usage + b"}\n\n"

    def preface(self) -> Iterator[bytes]:
        if self._provider.preface is not None:
            yield data(self._provider.preface)

    def end(self, content: bytes, finish: str) -> Iterator[bytes]:
        """The end of a stream, which a stream that is not to be done lacks."""
        ask, provider = self._ask, self._provider
        if ask.behaviour.no_done:
            return
        apart = provider.reports == "always" or (provider.reports == "asked" and ask.usage_asked)
        inside = provider.reports == "finish" or self.counts
        more = _members({"usage": _usage(ask)} if inside else {}) + _members({} if apart else provider.last)
        reason = b',"finish_reason":"%b"}]' % finish.encode()
        yield self._before + content + self._choice + reason + self._null + more + b"}\n\n"
        if apart:
            yield data(self._head | {"choices": [], "usage": _usage(ask), **provider.last})
        yield DONE


def failure(ask: Ask, number: int) -> bytes:
    """An error inside a stream."""
    kind = "text_completion" if ask.body.prompt is not None else "chat.completion.chunk"
    return _provider(ask).failure(_head(ask, kind), FAILURE)


# -- chat/completions


def _tool_calls(name: str) -> list[dict[str, Any]]:
    function = {"name": name, "arguments": "".join(ARGUMENTS)}
    return [{"id": "call_mock", "type": "function", "function": function}]


def chat_json(ask: Ask) -> dict[str, Any]:
    provider, tool = _provider(ask), ask.tool
    message: dict[str, Any] = {"role": "assistant", "content": ask.text if tool is None else None}
    message |= provider.message
    if provider.thinks:
        message[provider.thinks] = "".join(THOUGHTS)
    if tool is not None:
        message["tool_calls"] = _tool_calls(tool)
    return _whole(ask, "chat.completion", {"message": message}, "stop" if tool is None else "tool_calls")


def _tool_deltas(name: str) -> Iterator[bytes]:
    opening = _tool_calls(name)[0] | {"index": 0, "function": {"name": name, "arguments": ""}}
    yield _encode({"tool_calls": [opening]})
    for piece in ARGUMENTS:
        yield _encode({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})


def _deltas_before(provider: Provider, tool: str | None) -> Iterator[bytes]:
    """The role, and what the model thinks."""
    role = {"role": "assistant"} if provider.opening is None else {}
    if provider.opening is not None:
        calls_tool = {"role": "assistant", "content": None}
        yield _encode(provider.opening if tool is None else calls_tool)
    for thought in THOUGHTS if provider.thinks else ():
        yield _encode(role | {"content": None, provider.thinks: thought})


def chat_events(ask: Ask) -> Iterator[bytes]:
    provider, tool = _provider(ask), ask.tool
    chunks = _Chunks(ask, "chat.completion.chunk", b"delta")
    yield from chunks.preface()
    for delta in _deltas_before(provider, tool):
        yield chunks.before(delta) + chunks.after()
    if tool is None:
        start = chunks.before(b'{"content":' if provider.opening else b'{"role":"assistant","content":')
        end = b"}" + chunks.after()
        for number, piece in enumerate(ask.pieces(), 1):
            yield start + piece + (b"}" + chunks.after(number) if chunks.counts else end)
    else:
        for number, delta in enumerate(_tool_deltas(tool)):
            yield chunks.before(delta) + chunks.after(number)
    last = b"{}" if provider.opening else b'{"role":"assistant","content":""}'
    yield from chunks.end(last, "stop" if tool is None else "tool_calls")


# -- completions


def text_json(ask: Ask) -> dict[str, Any]:
    return _whole(ask, "text_completion", {"text": ask.text}, "stop")


def text_events(ask: Ask) -> Iterator[bytes]:
    chunks = _Chunks(ask, "text_completion", b"text")
    for number, piece in enumerate(ask.pieces(), 1):
        yield chunks.before(piece) + chunks.after(number)
    yield from chunks.end(b'""', "stop")


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
