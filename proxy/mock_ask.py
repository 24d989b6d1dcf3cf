"""What a request asks the mock for, and the words that answer it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from proxy.mock_behaviour import Behaviour

TEXT = "the quick brown fox jumps over the lazy dog while seven wise owls watch from a tall old oak tree"
WORDS = tuple(TEXT.split())
ARGUMENTS = ('{"ci', 'ty":', '"Par', 'is"}')  # of a tool call, as they are streamed

_encode = msgspec.json.Encoder().encode
_FIRST = _encode(WORDS[0])
_LATER = tuple(_encode(" " + word) for word in WORDS)


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Body(msgspec.Struct):
    model: str = "mock"
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    messages: Any = None
    prompt: Any = None
    input: Any = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    encoding_format: str | None = None


read_body = msgspec.json.Decoder(Body).decode
NO_BODY = Body()


class Ask(NamedTuple):
    """A request that has been understood: all that the dialects need to answer it."""

    id: str
    body: Body
    behaviour: Behaviour

    @property
    def usage_asked(self) -> bool:
        options = self.body.stream_options
        return options is not None and bool(options.include_usage)

    @property
    def tool(self) -> str | None:
        """The name of the tool to call, if one is to be called."""
        tools, choice = self.body.tools, self.body.tool_choice
        named = isinstance(choice, dict) and "function" in choice
        if not tools or not (self.behaviour.tool or choice == "required" or named):
            return None
        function = tools[0].get("function") if isinstance(tools[0], dict) else None
        return str(function.get("name", "")) if isinstance(function, dict) else None

    @property
    def text(self) -> str:
        return "".join(msgspec.json.decode(piece, type=str) for piece in self.pieces())

    def pieces(self) -> Iterator[bytes]:
        """The words of the answer, each a JSON string, the blank before a word included."""
        count, big = self.behaviour.words, self.behaviour.big_event
        if count:
            yield _encode("x" * big) if big else _FIRST
        for number in range(1, count):
            yield _LATER[number % len(WORDS)]

    def prompt_tokens(self) -> int:
        body = self.body
        return sum(_count(value) for value in (body.messages, body.prompt, body.input))

    def completion_tokens(self) -> int:
        return len(ARGUMENTS) if self.tool is not None else self.behaviour.words


def _count(value: object) -> int:
    """The words of a text, wherever in a list of messages, parts or inputs it stands."""
    if isinstance(value, str):
        return len(value.split())
    if isinstance(value, list):
        return sum(_count(item) for item in value)
    if isinstance(value, dict):
        return _count(value.get("content")) + _count(value.get("text"))
    return 1 if isinstance(value, int) else 0  # a prompt may be a list of tokens
