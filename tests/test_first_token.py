"""The time to the first token: of every dialect and provider, the first event with content, reasoning or a
tool call; not one with a role alone, and no comment."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.kit.callers import Answer, Caller, post
from tests.kit.headrace import until
from tests.kit.lab import Way, both, lab
from tests.kit.upstreams import END, HEAD, Call, chunk
from tests.test_providers import PROVIDERS, from_the_mock, headrace_for

pytestmark = pytest.mark.timeout(30)

TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}
ASKED = {"model": "m", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 9}
CHAT = {**ASKED, "messages": [{"role": "user", "content": "one two three"}]}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    **{provider: ("chat/completions", CHAT, f"provider={provider}") for provider in PROVIDERS},
    "a tool call": ("chat/completions", CHAT | TOOLS, "tool=true"),
    "crlf": ("chat/completions", CHAT, "crlf=true"),
    "comments": ("chat/completions", CHAT, "keepalive_comments=3"),
    "completions": ("completions", {**ASKED, "prompt": "one"}, ""),
    "responses": ("responses", {**ASKED, "input": "one"}, ""),
    "messages": ("messages", CHAT, ""),
    "messages of anthropic": ("messages", CHAT, "provider=anthropic"),
}


def shows_something(event: bytes) -> bool:
    """The same by parsing."""
    lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
    if not lines or b"[DONE]" in lines[0]:
        return False
    data = json.loads(lines[0])
    if data.get("type", "").endswith(".delta"):
        return True
    deltas = [each.get("delta", each) for each in data.get("choices", ())] + [data.get("delta", {})]
    shown = {name: value for delta in deltas if isinstance(delta, dict) for name, value in delta.items()}
    names = ("content", "reasoning", "reasoning_content", "text", "thinking", "partial_json", "tool_calls")
    return any(shown.get(name) for name in names)


async def events_of(case: str) -> list[bytes]:
    """What a mock of its own sends. What comes before an answer is held back until it begins."""
    path, body, faults = CASES[case]
    asked = post(f"/v1/{path}?api-version=1", body, f"x-mock: {faults}, words=3", "api-key: k")
    stream = (await from_the_mock(asked)).body
    end = b"\r\n\r\n" if b"\r" in stream else b"\n\n"
    events = [each + end for each in stream.split(end)[:-1]]
    begins = next(number for number, event in enumerate(events) if not event.startswith(b":"))
    return [b"".join(events[: begins + 1]), *events[begins + 1 :]]


class OneByOne:
    """An upstream that sends the next event when it is told to."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[bytes] = asyncio.Queue()

    async def __call__(self, call: Call) -> None:
        await call.send(HEAD)
        while event := await self.events.get():
            await call.send(chunk(event))
        await call.send(END)


@both
async def test_the_first_token_of_every_dialect(way: Way) -> None:
    """Event by event: there is one from the very event on in which parsing finds it."""
    before: dict[str, int] = {}
    script = OneByOne()
    async with lab(script, way) as it, asyncio.timeout(25), await Caller.connect(it.port) as caller:
        for count, (case, (path, body, _)) in enumerate(CASES.items(), 1):
            await caller.send(post(f"/v1/{path}", body))
            answer, shown, before[case] = Answer(), False, 0
            for number, event in enumerate(await events_of(case)):
                script.events.put_nowait(event)
                if number == 0:
                    await caller.head(answer)
                assert await caller.piece(answer) == event
                shown = shown or shows_something(event)
                before[case] += not shown
                [stream] = it.headrace.server.streams()
                assert (stream["ttft_s"] is not None) == shown, (case, event)
            script.events.put_nowait(b"")
            await caller.rest(answer)
            line = await it.ended("complete", count)
            assert line["ttft_ms"] >= line["ttfb_ms"], (case, line)
    assert before["openai"] == 1
    assert before["azure"] == 2
    assert before["responses"] == 3
    assert before["messages"] >= 2
    assert before["ollama"] == 0


@both
async def test_a_role_and_then_a_pause(way: Way) -> None:
    """The first byte is there, the first token is not."""
    async with headrace_for(way) as headrace, await Caller.connect(headrace.port) as caller:
        await caller.ask(post("/v1/chat/completions", CHAT, "x-mock: words=1, gap=0.3"))
        await until(lambda: len(headrace.log_lines()) == 1)
        [line] = headrace.log_lines()
    assert line["ttft_ms"] - line["ttfb_ms"] > 150, line  # the first may have been seen late


@both
async def test_a_stream_without_a_token_has_no_such_time(way: Way) -> None:
    async with headrace_for(way) as headrace, await Caller.connect(headrace.port) as caller:
        await caller.ask(post("/v1/chat/completions", CHAT, "x-mock: words=0"))
        await until(lambda: len(headrace.log_lines()) == 1)
        [line] = headrace.log_lines()
    assert line["ttfb_ms"] is not None
    assert line["ttft_ms"] is None
