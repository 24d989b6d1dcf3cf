"""The real openai and anthropic packages through Headrace, against the embedded mock upstream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from proxy import mock
from tests.kit.headrace import Headrace, running, settings_for, until

pytestmark = pytest.mark.timeout(30)

ASK: list[Any] = [{"role": "user", "content": "one two three"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
#: anthropic 2.11 lets the transport's own error through where openai wraps it.
BROKEN_OFF = (anthropic.APIError, httpx2.HTTPError)
SLOW = "words=100000, gap=0.01"


@pytest.fixture
async def headrace() -> AsyncIterator[Headrace]:
    settings = settings_for(
        "mock:", upstream={"timeouts": {"first_byte": 5, "idle": 0.4, "total": 20}}, streams={"heartbeat": 0}
    )
    async with running(settings) as started:
        yield started
        await started.quiet()


@pytest.fixture(params=["/v1", ""])
async def client(headrace: Headrace, request: pytest.FixtureRequest) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=headrace.url + request.param, api_key="caller-key", max_retries=0
    ) as made:
        yield made


@pytest.fixture
async def claude(headrace: Headrace) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=headrace.url, api_key="caller-key", max_retries=0) as made:
        yield made


def record(headrace: Headrace) -> mock.Record:
    """What the embedded mock saw."""
    assert headrace.server._mock is not None
    return headrace.server._mock.record


def expected(words: int) -> str:
    return " ".join(mock.WORDS[number % len(mock.WORDS)] for number in range(words))


def fault(text: str) -> dict[str, str]:
    return {"x-mock": text}


async def collect(stream: Any, into: list[Any]) -> None:
    """Reads a stream to its end; what came before a break stays in `into`."""
    async for item in stream:
        into.append(item)  # noqa: PERF401 - a comprehension would lose them


async def last_line(headrace: Headrace, count: int = 1) -> dict[str, Any]:
    await until(lambda: len(headrace.log_lines()) >= count)
    return headrace.log_lines()[-1]


# -- what works


async def test_chat(client: openai.AsyncOpenAI, headrace: Headrace) -> None:
    """A whole answer reaches the async SDK, with the id that is in the log."""
    answer = await client.chat.completions.create(model="m", messages=ASK)
    assert answer.choices[0].message.content == expected(20)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20
    line = await last_line(headrace)
    assert (line["request_id"], line["reason"]) == (answer._request_id, "complete")


async def test_chat_stream(client: openai.AsyncOpenAI, headrace: Headrace) -> None:
    """A stream reaches the async SDK whole, and counts as complete."""
    stream = await client.chat.completions.create(model="m", messages=ASK, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected(20)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert stream.response.headers["x-headrace-upstream"] == "up"
    assert (await last_line(headrace))["reason"] == "complete"


async def test_usage_chunk(client: openai.AsyncOpenAI) -> None:
    """include_usage adds the upstream's usage chunk, and it arrives."""
    stream = await client.chat.completions.create(
        model="m", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 20)


async def test_tools(client: openai.AsyncOpenAI) -> None:
    """A tool call arrives whole and in pieces."""
    whole = await client.chat.completions.create(model="m", messages=ASK, tools=TOOLS, tool_choice="required")
    assert whole.choices[0].message.tool_calls is not None
    assert whole.choices[0].message.tool_calls[0].function.arguments == '{"city":"Paris"}'
    async with client.chat.completions.stream(
        model="m", messages=ASK, tools=TOOLS, extra_headers=fault("tool")
    ) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    assert final.choices[0].message.tool_calls[0].function.arguments == '{"city":"Paris"}'


async def test_completions(client: openai.AsyncOpenAI) -> None:
    """The old completions route, whole and as a stream."""
    whole = await client.completions.create(model="m", prompt="one two")
    assert whole.choices[0].text == expected(20)
    stream = await client.completions.create(model="m", prompt="one two", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == expected(20)


async def test_responses(client: openai.AsyncOpenAI) -> None:
    """The responses API, whole, as a stream, and through the stream helper."""
    whole = await client.responses.create(model="m", input="one two")
    assert whole.output_text == expected(20)
    events = [event async for event in await client.responses.create(model="m", input="one", stream=True)]
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == expected(20)
    async with client.responses.stream(model="m", input=ASK) as stream:
        assert (await stream.get_final_response()).output_text == expected(20)


async def test_embeddings(client: openai.AsyncOpenAI) -> None:
    """Embeddings, in the base64 form that the SDK asks for."""
    answer = await client.embeddings.create(model="m", input=["one two", "three"])
    assert [item.embedding for item in answer.data] == [list(mock.VECTOR)] * 2


async def test_models(client: openai.AsyncOpenAI, headrace: Headrace) -> None:
    """The list of models is ours: no request goes upstream."""
    assert [model.id async for model in client.models.list()] == ["m"]
    assert (await client.models.retrieve("m")).owned_by == "up"
    with pytest.raises(openai.NotFoundError) as raised:
        await client.models.retrieve("nothing")
    assert raised.value.code == "model_not_found"
    assert record(headrace).hits == 0


async def test_models_of_anthropic(claude: anthropic.AsyncAnthropic) -> None:
    """anthropic reads the same models list."""
    page = await claude.models.list()
    assert [(model.id, model.type, model.display_name) for model in page.data] == [("m", "model", "m")]
    one = await claude.models.retrieve("m")
    assert one.created_at.year >= 2024


async def test_messages(claude: anthropic.AsyncAnthropic, headrace: Headrace) -> None:
    """anthropic on /v1/messages: whole, the raw stream, the stream helper."""
    whole = await claude.messages.create(model="m", max_tokens=9, messages=ASK)
    assert whole.content[0].text == expected(20)
    assert whole._request_id == (await last_line(headrace))["request_id"]
    raw = await claude.messages.create(model="m", max_tokens=9, messages=ASK, stream=True)
    assert [event.type async for event in raw][-1] == "message_stop"
    async with claude.messages.stream(model="m", max_tokens=9, messages=ASK) as stream:
        final = await stream.get_final_message()
    assert (final.content[0].text, final.usage.output_tokens) == (expected(20), 20)
    await until(lambda: len(headrace.log_lines()) == 3)
    assert {line["reason"] for line in headrace.log_lines()} == {"complete"}


async def test_sync_openai(headrace: Headrace) -> None:
    """The sync SDK: whole, stream, usage, responses, embeddings, an error."""

    def work() -> None:
        with openai.OpenAI(base_url=headrace.base_url, api_key="k", max_retries=0) as client:
            whole = client.chat.completions.create(model="m", messages=ASK)
            assert whole.choices[0].message.content == expected(20)
            for _ in range(3):
                stream = client.chat.completions.create(
                    model="m", messages=ASK, stream=True, stream_options={"include_usage": True}
                )
                chunks = list(stream)
                assert chunks[-1].usage is not None
            assert client.responses.create(model="m", input="a").output_text == expected(20)
            assert len(client.embeddings.create(model="m", input="a").data) == 1
            with pytest.raises(openai.RateLimitError) as raised:
                client.chat.completions.create(
                    model="m", messages=ASK, extra_headers=fault("status=429, retry_after=7")
                )
            assert raised.value.response.headers["retry-after"] == "7"
            with pytest.raises(openai.APIError):
                for _ in client.chat.completions.create(
                    model="m", messages=ASK, stream=True, extra_headers=fault("words=9, rst_after=3")
                ):
                    pass

    await asyncio.to_thread(work)
    await until(lambda: len(headrace.log_lines()) == 8)
    reasons = [line["reason"] for line in headrace.log_lines()]
    assert reasons == ["complete"] * 7 + ["upstream_cut"]


async def test_sync_anthropic(headrace: Headrace) -> None:
    """The sync anthropic SDK: whole, stream, a visible break."""

    def work() -> None:
        with anthropic.Anthropic(base_url=headrace.url, api_key="k", max_retries=0) as client:
            whole = client.messages.create(model="m", max_tokens=9, messages=ASK)
            assert whole.content[0].text == expected(20)
            with client.messages.stream(model="m", max_tokens=9, messages=ASK) as stream:
                assert stream.get_final_text() == expected(20)
            with (
                pytest.raises(BROKEN_OFF),
                client.messages.stream(
                    model="m", max_tokens=9, messages=ASK, extra_headers=fault("words=9, cut_after=4")
                ) as stream,
            ):
                stream.get_final_text()

    await asyncio.to_thread(work)


async def test_own_request_id(client: openai.AsyncOpenAI, headrace: Headrace) -> None:
    """A caller's own id comes back and goes upstream."""
    answer = await client.chat.completions.create(
        model="m", messages=ASK, extra_headers={"x-request-id": "mine-1"}
    )
    assert answer._request_id == "mine-1"
    assert record(headrace).last.header("x-request-id") == "mine-1"


# -- errors become the SDK's exceptions

OPENAI_ERRORS: list[tuple[str, type[openai.APIStatusError], int]] = [
    ("status=400", openai.BadRequestError, 400),
    ("status=401", openai.InternalServerError, 502),
    ("status=403", openai.InternalServerError, 502),
    ("status=404", openai.NotFoundError, 404),
    ("status=409", openai.ConflictError, 409),
    ("status=422", openai.UnprocessableEntityError, 422),
    ("status=429, retry_after=3", openai.RateLimitError, 429),
    ("status=500", openai.InternalServerError, 500),
    ("status=503", openai.InternalServerError, 503),
    ("status=529", openai.InternalServerError, 529),
    ("error_body", openai.InternalServerError, 502),
    ("redirect", openai.InternalServerError, 502),
    ("garbage", openai.InternalServerError, 502),
    ("upgrade", openai.InternalServerError, 502),
    ("cut_after=-1", openai.InternalServerError, 502),
    ("rst_after=-1", openai.InternalServerError, 502),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("behaviour", "kind", "status"), OPENAI_ERRORS)
async def test_status_errors(
    headrace: Headrace, behaviour: str, kind: type[openai.APIStatusError], status: int, stream: bool
) -> None:
    """Each status becomes the SDK's right class, with our request id, streaming or not."""
    async with openai.AsyncOpenAI(base_url=headrace.base_url, api_key="k", max_retries=0) as client:
        with pytest.raises(kind) as raised:
            await client.chat.completions.create(
                model="m", messages=ASK, stream=stream, extra_headers=fault(behaviour)
            )
    line = await last_line(headrace)
    assert type(raised.value) is kind
    assert raised.value.status_code == line["status"] == status
    assert raised.value.request_id == line["request_id"]
    assert raised.value.type
    if "retry_after" in behaviour:
        assert raised.value.response.headers["retry-after"] == "3"
    if status == 502:
        assert str(raised.value.code).startswith("upstream_")
        assert "mock" not in raised.value.response.text


async def test_unknown_model(client: openai.AsyncOpenAI, headrace: Headrace) -> None:
    """An unknown model is the SDK's NotFoundError, and nothing goes upstream."""
    with pytest.raises(openai.NotFoundError) as raised:
        await client.chat.completions.create(model="no-such-model", messages=ASK)
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    assert raised.value.request_id == (await last_line(headrace))["request_id"]
    assert record(headrace).hits == 0


ANTHROPIC_ERRORS: list[tuple[str, type[anthropic.APIStatusError], int]] = [
    ("status=400", anthropic.BadRequestError, 400),
    ("status=401", anthropic.InternalServerError, 502),
    ("status=429, retry_after=3", anthropic.RateLimitError, 429),
    ("status=500", anthropic.InternalServerError, 500),
    ("status=529", anthropic.OverloadedError, 529),
]


@pytest.mark.parametrize(("behaviour", "kind", "status"), ANTHROPIC_ERRORS)
async def test_anthropic_errors(
    claude: anthropic.AsyncAnthropic,
    headrace: Headrace,
    behaviour: str,
    kind: type[anthropic.APIStatusError],
    status: int,
) -> None:
    """The same for anthropic, whose ids are in request-id."""
    with pytest.raises(kind) as raised:
        await claude.messages.create(model="m", max_tokens=9, messages=ASK, extra_headers=fault(behaviour))
    assert raised.value.status_code == status
    assert raised.value.request_id == (await last_line(headrace))["request_id"]


async def test_anthropic_unknown_model(claude: anthropic.AsyncAnthropic, headrace: Headrace) -> None:
    """Our own refusals on /v1/messages have anthropic's shape."""
    with pytest.raises(anthropic.NotFoundError) as raised:
        await claude.messages.create(model="nothing", max_tokens=9, messages=ASK)
    body: Any = raised.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "not_found_error"
    assert body["request_id"] == raised.value.request_id
    assert record(headrace).hits == 0


async def test_first_byte_timeout() -> None:
    """No first byte in time is a 504."""
    settings = settings_for("mock:", upstream={"timeouts": {"first_byte": 0.2}})
    async with (
        running(settings) as headrace,
        openai.AsyncOpenAI(base_url=headrace.base_url, api_key="k", max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError) as raised:
            await client.chat.completions.create(model="m", messages=ASK, extra_headers=fault("hang"))
    assert (raised.value.status_code, raised.value.code) == (504, "upstream_timeout")


async def test_the_sdk_retries_by_itself(headrace: Headrace) -> None:
    """With its own retries on, the SDK obeys the Retry-After that came from the upstream."""
    async with openai.AsyncOpenAI(base_url=headrace.base_url, api_key="k", max_retries=1) as client:
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(
                model="m", messages=ASK, extra_headers=fault("status=429, retry_after=0.05")
            )
    assert record(headrace).hits == 2


# -- a stream that breaks is never silently short

BREAKS = [
    ("words=9, cut_after=3", "upstream_cut"),
    ("words=9, rst_after=3", "upstream_cut"),
    ("words=9, cut_after=3, cut_mid_event", "upstream_cut"),
    ("words=9, rst_after=3, close_delimited", "upstream_cut"),
    ("words=9, cut_after=3, close_delimited", "upstream_cut"),
    ("words=9, no_done", "upstream_cut"),
    ("words=9, stall_after=3", "upstream_stall"),
    ("words=9, error_after=3", "upstream_error"),
]


@pytest.mark.parametrize(("behaviour", "reason"), BREAKS)
@pytest.mark.parametrize("push", [True, False], ids=["push", "pull"])
async def test_broken_streams_raise(behaviour: str, reason: str, push: bool) -> None:
    """chat: whatever kills the stream, the SDK raises, over both data paths."""
    settings = settings_for("mock:", upstream={"timeouts": {"idle": 0.3}})
    async with running(settings, push=push) as headrace:
        async with openai.AsyncOpenAI(base_url=headrace.base_url, api_key="k", max_retries=0) as client:
            chunks: list[Any] = []
            stream = await client.chat.completions.create(
                model="m", messages=ASK, stream=True, extra_headers=fault(behaviour)
            )
            with pytest.raises(openai.APIError):
                await collect(stream, chunks)
        assert len(chunks) >= 3
        line = await last_line(headrace)
        assert line["reason"] == reason
        await headrace.quiet()


@pytest.mark.parametrize(("behaviour", "reason"), BREAKS)
async def test_broken_responses_raise(headrace: Headrace, behaviour: str, reason: str) -> None:
    """responses: the same; the upstream's own flat error event may reach the reader as an event."""
    async with openai.AsyncOpenAI(base_url=headrace.base_url, api_key="k", max_retries=0) as client:
        events: list[Any] = []

        async def read() -> None:
            stream = await client.responses.create(
                model="m", input="a", stream=True, extra_headers=fault(behaviour)
            )
            await collect(stream, events)

        if reason == "upstream_error":
            try:
                await read()
            except openai.APIError:
                pass
            else:
                assert events[-1].type == "error"
        else:
            with pytest.raises(openai.APIError):
                await read()
    assert "response.completed" not in [event.type for event in events]
    assert (await last_line(headrace))["reason"] == reason


@pytest.mark.parametrize(("behaviour", "reason"), BREAKS)
async def test_broken_messages_raise(
    claude: anthropic.AsyncAnthropic, headrace: Headrace, behaviour: str, reason: str
) -> None:
    """messages: the same for anthropic, in its dialect."""
    stream = await claude.messages.create(
        model="m", max_tokens=9, messages=ASK, stream=True, extra_headers=fault(behaviour)
    )
    events: list[Any] = []
    with pytest.raises(BROKEN_OFF):
        await collect(stream, events)
    assert "message_stop" not in [event.type for event in events]
    assert (await last_line(headrace))["reason"] == reason


async def test_the_error_event_names_what_happened(headrace: Headrace) -> None:
    """At an event boundary the SDK sees our error, not only a torn connection."""
    async with openai.AsyncOpenAI(base_url=headrace.base_url, api_key="k", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="m", messages=ASK, stream=True, extra_headers=fault("words=9, stall_after=3")
        )
        with pytest.raises(openai.APIError) as raised:
            await collect(stream, [])
    assert (raised.value.code, raised.value.type) == ("upstream_timeout", "server_error")


async def test_broken_whole_answer_raises(headrace: Headrace) -> None:
    """A whole answer that is cut is a 502, not half a JSON."""
    async with openai.AsyncOpenAI(base_url=headrace.base_url, api_key="k", max_retries=0) as client:
        for behaviour in ("cut_after=0", "rst_after=0", "cut_after=0, cut_mid_event"):
            with pytest.raises(openai.InternalServerError) as raised:
                await client.chat.completions.create(model="m", messages=ASK, extra_headers=fault(behaviour))
            assert raised.value.status_code == 502


# -- leaving early


async def leave_chat(headrace: Headrace) -> None:
    async with openai.AsyncOpenAI(base_url=headrace.base_url, api_key="k", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="m", messages=ASK, stream=True, extra_headers=fault(SLOW)
        )
        async for _ in stream:
            break
        await stream.close()


async def leave_messages(headrace: Headrace) -> None:
    async with (
        anthropic.AsyncAnthropic(base_url=headrace.url, api_key="k", max_retries=0) as client,
        client.messages.stream(model="m", max_tokens=9, messages=ASK, extra_headers=fault(SLOW)) as stream,
    ):
        async for _ in stream:
            break


async def leave_sync(headrace: Headrace) -> None:
    def work() -> None:
        with openai.OpenAI(base_url=headrace.base_url, api_key="k", max_retries=0) as client:
            stream = client.chat.completions.create(
                model="m", messages=ASK, stream=True, extra_headers=fault(SLOW)
            )
            next(iter(stream))
            stream.close()

    await asyncio.to_thread(work)


async def leave_waiting(headrace: Headrace) -> None:
    async with openai.AsyncOpenAI(base_url=headrace.base_url, api_key="k", max_retries=0) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=0.3).chat.completions.create(
                model="m", messages=ASK, extra_headers=fault("hang")
            )


@pytest.mark.parametrize("leave", [leave_chat, leave_messages, leave_sync, leave_waiting])
async def test_leaving_early_frees_the_upstream(
    headrace: Headrace, leave: Callable[[Headrace], Awaitable[None]]
) -> None:
    """Break and close, or a timeout of the SDK's own: the upstream request ends within a second."""
    await leave(headrace)
    await until(lambda: record(headrace).aborted == 1, 1.0)
    await headrace.quiet(1.0)
    line = await last_line(headrace)
    assert line["reason"] == "client_gone"
