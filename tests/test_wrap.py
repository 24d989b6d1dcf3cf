"""Plain JSON as a stream: read by the real SDKs' own stream readers, and found complete by our own."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx2
import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import mock
from proxy.errors import Dialect
from proxy.sse import Scanner
from proxy.usage import find_in_json
from proxy.wrap import wrap

OPENAI, ANTHROPIC, RESPONSES = Dialect.OPENAI, Dialect.ANTHROPIC, Dialect.RESPONSES
ASK: list[Any] = [{"role": "user", "content": "one two three"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ROUTES = {
    "/chat/completions": OPENAI,
    "/completions": OPENAI,
    "/responses": RESPONSES,
    "/messages": ANTHROPIC,
}


def answer_of(route: str, **body: Any) -> bytes:
    """What the mock answers without a stream."""
    asked = msgspec.convert({"model": "m", "messages": ASK, "input": "one", **body}, mock.Body)
    return msgspec.json.encode(mock.ROUTES["POST", route].json(mock.Ask("0", asked, mock.NORMAL)))


def served(stream: bytes | None) -> httpx2.MockTransport:
    """A transport on which every request is answered with this stream."""
    assert stream is not None
    return httpx2.MockTransport(
        lambda _: httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=stream)
    )


def client(stream: bytes | None) -> openai.OpenAI:
    return openai.OpenAI(
        api_key="k", base_url="http://test/v1", http_client=httpx2.Client(transport=served(stream))
    )


def claude(stream: bytes | None) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        api_key="k", base_url="http://test", http_client=httpx2.Client(transport=served(stream))
    )


def data_of(stream: bytes | None) -> list[Any]:
    """The JSON of every event but [DONE]."""
    assert stream is not None
    lines = [line[6:] for line in stream.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


# ── read by the SDKs ─────────────────────────────────────────────────────────────────────────────────────


def test_chat() -> None:
    """One chunk with the whole message and its usage, read as it is and through the stream helper."""
    stream = wrap(OPENAI, answer_of("/chat/completions"))
    with client(stream) as sdk:
        chunks = list(sdk.chat.completions.create(model="m", messages=ASK, stream=True))
        assert [chunk.object for chunk in chunks] == ["chat.completion.chunk"]
        [choice] = chunks[0].choices
        assert choice.delta.content == " ".join(mock.WORDS[n % len(mock.WORDS)] for n in range(20))
        assert (choice.delta.role, choice.finish_reason) == ("assistant", "stop")
        assert chunks[0].usage is not None
        assert chunks[0].usage.completion_tokens == 20
        with sdk.chat.completions.stream(model="m", messages=ASK) as reader:
            final = reader.get_final_completion()
    assert final.choices[0].message.content == choice.delta.content
    assert final.usage is not None


def test_tool_calls() -> None:
    """Tool calls get the index that a chunk has."""
    stream = wrap(OPENAI, answer_of("/chat/completions", tools=TOOLS, tool_choice="required"))
    with client(stream) as sdk, sdk.chat.completions.stream(model="m", messages=ASK, tools=TOOLS) as reader:
        final = reader.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    [call] = final.choices[0].message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("weather", '{"city":"Paris"}')
    assert data_of(stream)[0]["choices"][0]["delta"]["tool_calls"][0]["index"] == 0


def test_completions() -> None:
    """The object of a whole answer is the chunk of a stream."""
    body = answer_of("/completions", prompt="one")
    with client(wrap(OPENAI, body)) as sdk:
        chunks = list(sdk.completions.create(model="m", prompt="one", stream=True))
    assert [chunk.to_dict() for chunk in chunks] == [json.loads(body)]


def test_responses() -> None:
    """Two events, which the stream helper puts together."""
    stream = wrap(RESPONSES, answer_of("/responses"))
    with client(stream) as sdk:
        events = list(sdk.responses.create(model="m", input="one", stream=True))
        assert [event.type for event in events] == ["response.created", "response.completed"]
        with sdk.responses.stream(model="m", input="one") as reader:
            final = reader.get_final_response()
    assert final.output_text.startswith("the quick")
    assert final.usage is not None
    assert final.usage.output_tokens == 20


@pytest.mark.parametrize("status", ["failed", "incomplete"])
def test_responses_that_did_not_complete(status: str) -> None:
    """The last event says how it ended."""
    body = json.loads(answer_of("/responses")) | {"status": status}
    assert data_of(wrap(RESPONSES, json.dumps(body).encode()))[-1]["type"] == f"response.{status}"


def test_messages() -> None:
    """Every kind of block comes through anthropic's stream helper as it was in the answer."""
    body = json.loads(answer_of("/messages")) | {
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "abc"},
            {"type": "text", "text": "Hello", "citations": None},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris", "n": [1, 2.50]}},
            {"type": "redacted_thinking", "data": "xyz"},
        ],
        "stop_reason": "tool_use",
        "usage": {"input_tokens": 3, "output_tokens": 20, "cache_read_input_tokens": 7},
    }
    stream = wrap(ANTHROPIC, json.dumps(body, indent=2).encode())
    with claude(stream) as sdk, sdk.messages.stream(model="m", max_tokens=9, messages=ASK) as reader:
        shown = "".join(reader.text_stream)
        final = reader.get_final_message()
    assert shown == "Hello"
    assert [block.to_dict() for block in final.content] == body["content"]
    assert final.stop_reason == "tool_use"
    assert (final.usage.output_tokens, final.usage.cache_read_input_tokens) == (20, 7)


# ── as our own scanner sees it ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("route", ROUTES)
def test_complete_with_the_same_usage(route: str) -> None:
    """Terminated, at a boundary, something to show, no error, and what the plain answer reported."""
    dialect, body = ROUTES[route], answer_of(route, prompt="one two")
    stream = wrap(dialect, body)
    assert stream is not None
    scanner = Scanner(dialect, expects_terminator=True)
    scanner.feed(stream)
    assert scanner.terminated
    assert scanner.at_boundary()
    assert scanner.first_token
    assert not scanner.in_band_error()
    assert scanner.usage() == find_in_json(dialect, body)
    assert scanner.usage() is not None


def test_numbers_and_layout() -> None:
    """What is not looked at keeps its own bytes; line ends of the layout do not end the event."""
    body = (
        b'\n\n{ "id": "x",\r\n "big": 12345678901234567890123, "price": 1.50, "odd": 1e400,\n'
        b' "choices": [ {"index":0,\n"message": {"role":"assistant","content":"a\\nb"} } ] }\n'
    )
    assert wrap(OPENAI, body) == (
        b'data: {"id":"x","big":12345678901234567890123,"price":1.50,"odd":1e400,'
        b'"choices":[{"index":0,"delta":{"role":"assistant","content":"a\\nb"}}],'
        b'"object":"chat.completion.chunk"}\n\ndata: [DONE]\n\n'
    )


def test_several_choices() -> None:
    """Each choice has its delta, and keeps its other members."""
    choices = [
        {"index": n, "message": {"content": str(n)}, "logprobs": None, "finish_reason": "stop"}
        for n in (0, 1)
    ]
    [chunk] = data_of(wrap(OPENAI, json.dumps({"choices": choices}).encode()))
    assert chunk["choices"] == [
        {"index": n, "delta": {"content": str(n)}, "logprobs": None, "finish_reason": "stop"} for n in (0, 1)
    ]


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"[]",
        b"null",
        b"{}",
        b'{"choices":[]}',
        b'{"choices":{}}',
        b'{"choices":[1]}',
        b'{"choices":[{"message":1}]}',
        b'{"choices":[{"message":{"tool_calls":[1]}}]}',
        b'{"object":"list","data":[{"embedding":[1]}]}',
        b'{"object":"response","status":"queued"}',
        b'{"object":"response","status":["completed"]}',
        b'{"type":"message_batch"}',
        b'{"type":"message","content":[1]}',
        b'{"choices":[{"message":{"content":"\xff"}}]',
        b'{"a":' * 100_000,
    ],
)
def test_what_is_not_wrapped(dialect: Dialect, body: bytes) -> None:
    """What has no stream is left alone."""
    assert wrap(dialect, body) is None


@given(st.sampled_from(list(Dialect)), st.binary(max_size=60))
def test_never_raises(dialect: Dialect, body: bytes) -> None:
    """Any bytes."""
    wrap(dialect, body)


VALUE = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.just("message") | st.just("completed"),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "tool_calls", "type", "content", "status", "object", "input", "text"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(st.sampled_from(list(Dialect)), VALUE, st.sampled_from([None, 1]))
def test_any_json(dialect: Dialect, value: object, indent: int | None) -> None:
    """Whatever is wrapped is a terminated stream whose every event is JSON."""
    stream = wrap(dialect, json.dumps(value, indent=indent).encode())
    if stream is not None:
        assert data_of(stream)
        scanner = Scanner(dialect, expects_terminator=True)
        scanner.feed(stream)
        assert scanner.terminated
