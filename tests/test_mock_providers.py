"""The quirks of providers that the mock imitates: what is on its wire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, get_args

import aiohttp
import anthropic
import openai
import pytest

from proxy import mock
from proxy.mock_behaviour import ProviderName
from tests.kit.headrace import command
from tests.test_mock import ASK, PING, chunks_of, events_of, fetch, raw, split

pytestmark = pytest.mark.timeout(20)

PROVIDERS: tuple[str, ...] = get_args(ProviderName)
WITH_USAGE = PING | {"stream_options": {"include_usage": True}}
WHOLE = {"model": "m", "messages": ASK}
#: What Azure insists on; nobody else minds.
PATH = "/v1/chat/completions?api-version=2024-10-21"


@pytest.fixture
async def upstream() -> AsyncIterator[mock.RunningMock]:
    running = await mock.start()
    yield running
    await running.close()


def documents(body: bytes) -> list[Any]:
    """The JSON of each event."""
    return [json.loads(event[6:]) for event in events_of(body) if event.startswith("data: {")]


async def stream_of(
    upstream: mock.RunningMock, provider: str, more: str = "", body: Any = WITH_USAGE
) -> bytes:
    status, _, answer = await asked(upstream, f"provider={provider}, words=2, {more}", body)
    assert status == 200, answer
    return answer


async def asked(upstream: mock.RunningMock, fault: str, body: Any) -> tuple[int, Any, bytes]:
    headers = {"x-mock": fault, "api-key": "k"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"http://127.0.0.1:{upstream.port}{PATH}", data=json.dumps(body), headers=headers
        ) as got,
    ):
        return got.status, got.headers, await got.read()


# -- every provider


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_the_sdk_reads_it(upstream: mock.RunningMock, provider: str) -> None:
    """Whatever a provider adds, the text arrives in the SDK, whole and streamed, and ends for a reason."""
    async with openai.AsyncOpenAI(
        base_url=upstream.url,
        api_key="k",
        max_retries=0,
        default_headers={"x-mock": f"provider={provider}, words=3", "api-key": "k"},
        default_query={"api-version": "2024-10-21"},
    ) as sdk:
        whole = await sdk.chat.completions.create(model="m", messages=ASK)
        stream = await sdk.chat.completions.create(
            model="m", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        text = await sdk.completions.create(model="m", prompt="one", stream=True)
        texts = [chunk async for chunk in text]
    assert whole.choices[0].message.content == "the quick brown"
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == "the quick brown"
    assert choices[-1].finish_reason == "stop"
    reports = [chunk.usage for chunk in chunks if chunk.usage]
    assert whole.usage is not None
    assert reports[-1] == whole.usage
    assert "".join(chunk.choices[0].text for chunk in texts if chunk.choices) == "the quick brown"


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_an_error_in_the_sdk(upstream: mock.RunningMock, provider: str) -> None:
    """Every error body is JSON and says what was asked for."""
    status, headers, body = await asked(upstream, f"provider={provider}, status=429, retry_after=7", WHOLE)
    assert (status, headers["Retry-After"]) == (429, "7")
    assert b"status 429 was asked for" in body
    assert json.loads(body)


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_tools(upstream: mock.RunningMock, provider: str) -> None:
    """A tool call is one with everybody."""
    tools = [{"type": "function", "function": {"name": "weather"}}]
    body = PING | {"tools": tools, "tool_choice": "required"}
    chunks = documents(await stream_of(upstream, provider, body=body))
    calls = [call for c in chunks for o in c["choices"] for call in o["delta"].get("tool_calls", ())]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city":"Paris"}'
    assert "tool_calls" in [o["finish_reason"] for c in chunks for o in c["choices"]]


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_an_end_without_an_end(upstream: mock.RunningMock, provider: str) -> None:
    """no_done takes finish_reason and terminator from every provider."""
    body = await stream_of(upstream, provider, "no_done")
    assert b"[DONE]" not in body
    assert b'"stop"' not in body


async def test_a_provider_that_nobody_knows(upstream: mock.RunningMock) -> None:
    """A 400 that names it, as for every field."""
    status, _, body = await fetch(upstream, "provider=skynet")
    assert status == 400
    assert "skynet" in json.loads(body)["error"]["message"]


async def test_the_command() -> None:
    """`headrace mock --provider` sets it for the whole server."""
    async with command("mock", "--port", "0", "--provider", "gemini", "--status", "429") as process:
        found = await process.line(r"mock upstream at (\S+)")
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{found[1]}/chat/completions", json=WHOLE) as answer,
        ):
            assert (await answer.json())[0]["error"]["status"] == "RESOURCE_EXHAUSTED"


# -- one by one


@pytest.mark.parametrize(
    ("provider", "sign", "count"),
    [
        ("deepseek", ": keep-alive", 3),
        ("openrouter", ": OPENROUTER PROCESSING", 2),
        ("openai", ": keep-alive", 0),
    ],
)
async def test_signs_of_life_in_a_stream(
    upstream: mock.RunningMock, provider: str, sign: str, count: int
) -> None:
    """So many comments before the first event, or as many as are asked for."""
    for more, expected in (("", count), ("keepalive_comments=5", 5), ("keepalive_comments=0", 0)):
        events = events_of(await stream_of(upstream, provider, more))
        assert events[:expected] == [sign] * expected
        assert events[expected].startswith("data: ")


@pytest.mark.parametrize("provider", ["deepseek", "openrouter"])
async def test_signs_of_life_before_a_body(upstream: mock.RunningMock, provider: str) -> None:
    """Blank lines, each at once; then the JSON."""
    received, _ = await raw(upstream, f"provider={provider}, keepalive_comments=4, cut_after=1", WHOLE)
    head, body = split(received)
    *blanks, answer = chunks_of(body)
    assert b"content-length" not in head.lower()
    assert len(blanks) == 4
    assert all(not blank.strip() and b"\n" in blank for blank in blanks)
    assert json.loads(answer)["object"] == "chat.completion"


async def test_signs_of_life_are_spaced_by_the_gap(upstream: mock.RunningMock) -> None:
    """A caller sees the first blank line long before the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
    request = json.dumps(WHOLE).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-mock: provider=deepseek, gap=30\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(request), request)
    )
    await reader.readuntil(b"\r\n\r\n")
    assert await reader.readexactly(6) == b"1\r\n\n\r\n"
    assert upstream.record.active == 1
    writer.close()


async def test_no_signs_of_life_before_an_error(upstream: mock.RunningMock) -> None:
    """A request that is refused has not been queued."""
    _, _, body = await asked(upstream, "provider=deepseek, status=400", WHOLE)
    assert body.startswith(b"{")


async def test_deepseek(upstream: mock.RunningMock) -> None:
    """Thoughts in reasoning_content; usage, asked for or not, in the chunk with the finish_reason."""
    for asked_for in (PING, WITH_USAGE):
        chunks = documents(await stream_of(upstream, "deepseek", body=asked_for))
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Let me think"
        assert [chunk.get("usage", {}).get("completion_tokens") for chunk in chunks] == [None] * 6 + [5]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        hit, miss = (chunks[-1]["usage"][f"prompt_cache_{what}_tokens"] for what in ("hit", "miss"))
        assert (hit, miss) == (2, 1)


async def test_gemini(upstream: mock.RunningMock) -> None:
    """Usage on every chunk, growing; no chunk for the role alone; thoughts only in the total."""
    chunks = documents(await stream_of(upstream, "gemini"))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 2]
    assert {chunk["choices"][0]["delta"]["role"] for chunk in chunks} == {"assistant"}
    assert chunks[-1]["usage"] == {"completion_tokens": 2, "prompt_tokens": 3, "total_tokens": 8}
    assert not any("usage" in chunk for chunk in documents(await stream_of(upstream, "gemini", body=PING)))


async def test_gemini_fails_beside_its_events(upstream: mock.RunningMock) -> None:
    """An error inside a stream is no event, but JSON over several lines."""
    body = await stream_of(upstream, "gemini", "error_after=1")
    _, event, failure = body.partition(b"}\n\n")
    assert event
    assert json.loads(failure)["error"]["status"] == "UNAVAILABLE"


async def test_gemini_refuses_what_it_does_not_know(upstream: mock.RunningMock) -> None:
    """An array, laid out over lines, with a number for its code."""
    status, headers, body = await asked(upstream, "provider=gemini", WHOLE | {"parallel_tool_calls": True})
    assert (status, headers["Content-Type"]) == (400, "application/json; charset=UTF-8")
    assert body.startswith(b'[\n  {\n    "error": {\n      "code": 400,')
    [document] = json.loads(body)
    assert document["error"]["status"] == "INVALID_ARGUMENT"
    assert "parallel_tool_calls" in document["error"]["message"]


async def test_azure(upstream: mock.RunningMock) -> None:
    """A first chunk without choices; nothing without api-version and api-key."""
    chunks = documents(await stream_of(upstream, "azure"))
    assert chunks[0]["choices"] == []
    assert chunks[0]["prompt_filter_results"]
    assert chunks[1]["choices"][0]["content_filter_results"]
    path = "/openai/deployments/gpt/chat/completions"
    assert (await fetch(upstream, "provider=azure", WHOLE, path))[0] == 401
    headers = {"x-mock": "provider=azure", "api-key": "k"}
    async with aiohttp.ClientSession(headers=headers) as session:
        url = f"http://127.0.0.1:{upstream.port}{path}"
        async with session.post(url, json=WHOLE) as answer:
            assert (answer.status, await answer.json()) == (
                404,
                {"error": {"code": "404", "message": "Resource not found"}},
            )
        async with session.post(url, params={"api-version": "2024-10-21"}, json=WHOLE) as answer:
            assert answer.status == 200


async def test_vllm(upstream: mock.RunningMock) -> None:
    """Flat errors; one inside a stream is followed by the terminator."""
    _, _, body = await asked(upstream, "provider=vllm, status=500", WHOLE)
    assert json.loads(body) == {
        "object": "error",
        "message": "status 500 was asked for",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
    *_, failure, done = events_of(await stream_of(upstream, "vllm", "error_after=2"))
    assert json.loads(failure[6:])["error"]["object"] == "error"
    assert done == "data: [DONE]"


async def test_llamacpp(upstream: mock.RunningMock) -> None:
    """Timings behind the usage, or in the last chunk if there is none."""
    assert list(documents(await stream_of(upstream, "llamacpp"))[-1])[-2:] == ["usage", "timings"]
    last = documents(await stream_of(upstream, "llamacpp", body=PING))[-1]
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["timings"]


async def test_ollama(upstream: mock.RunningMock) -> None:
    """An error inside a stream is swallowed: the stream just ends."""
    body = await stream_of(upstream, "ollama", "error_after=2")
    assert b"error" not in body
    assert b"[DONE]" not in body
    assert documents(body)[-1]["choices"][0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "finish_reason": None,
    }


async def test_openrouter(upstream: mock.RunningMock) -> None:
    """Usage whether asked for or not; an error inside a stream is in the middle of a chunk."""
    last = documents(await stream_of(upstream, "openrouter", body=PING))[-1]
    assert last["choices"] == []
    assert last["usage"]["cost"] > 0
    failure = documents(await stream_of(upstream, "openrouter", "error_after=3"))[-1]
    assert failure["id"].startswith("gen-")
    assert failure["error"]["message"]
    assert failure["choices"][0]["finish_reason"] == "error"


async def test_anthropic(upstream: mock.RunningMock) -> None:
    """The compatible endpoint names errors in `code` too; the native one counts what came from its cache."""
    _, _, body = await asked(upstream, "provider=anthropic, status=429", WHOLE)
    assert json.loads(body)["error"]["code"] == "rate_limit_error"
    base = upstream.url.removesuffix("/v1")
    headers = {"x-mock": "provider=anthropic, words=2"}
    async with anthropic.AsyncAnthropic(
        base_url=base, api_key="k", max_retries=0, default_headers=headers
    ) as claude:
        whole = await claude.messages.create(model="c", max_tokens=9, messages=ASK)
        async with claude.messages.stream(model="c", max_tokens=9, messages=ASK) as stream:
            final = await stream.get_final_message()
    for usage in (whole.usage, final.usage):
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (1, 2, 2)


@pytest.mark.parametrize(
    "prefix", ["", "/v1", "/v1beta/openai", "/api/v1", "/openai/v1", "/openai/deployments/x"]
)
async def test_base_urls(upstream: mock.RunningMock, prefix: str) -> None:
    """What stands in front of a route in a provider's base URL."""
    assert (await fetch(upstream, "words=1", path=f"{prefix}/chat/completions"))[0] == 200
    assert (await fetch(upstream, "words=1", path=f"{prefix}/x/chat/completions"))[0] == 404
