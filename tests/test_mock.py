"""The mock upstream: its dialects through the real SDKs, its faults on the raw socket."""

import asyncio
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable

import aiohttp
import anthropic
import msgspec
import openai
import pytest
import trustme
import uvloop
from multidict import CIMultiDictProxy

from proxy import mock
from proxy.mock import Behaviour, RunningMock

pytestmark = pytest.mark.timeout(20)

ASK = [{"role": "user", "content": "one two three"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
PING = {"model": "m", "messages": ASK, "stream": True}


@pytest.fixture
async def upstream() -> AsyncIterator[RunningMock]:
    running = await mock.start()
    yield running
    await running.close()


@pytest.fixture
async def client(upstream: RunningMock) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=upstream.url, api_key="k", max_retries=0) as made:
        yield made


@pytest.fixture
async def claude(upstream: RunningMock) -> AsyncIterator[anthropic.AsyncAnthropic]:
    base = upstream.url.removesuffix("/v1")
    async with anthropic.AsyncAnthropic(base_url=base, api_key="k", max_retries=0) as made:
        yield made


def expected(words: int) -> str:
    return " ".join(mock.WORDS[number % len(mock.WORDS)] for number in range(words))


def request_bytes(body: object, fault: str = "", path: str = "/v1/chat/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: mock\r\nContent-Length: {len(data)}\r\n"
    if fault:
        head += f"x-mock: {fault}\r\n"
    return head.encode() + b"\r\n" + data


async def raw(
    upstream: RunningMock, fault: str, body: object = PING, path: str = "/v1/chat/completions"
) -> tuple[bytes, bool]:
    """All that the mock sends before the connection ends, and whether that was by RST."""
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
    writer.write(request_bytes(body, fault, path))
    received = b""
    try:
        while data := await reader.read(1 << 16):
            received += data
    except ConnectionResetError:
        return received, True
    finally:
        writer.close()
    return received, False


async def fetch(
    upstream: RunningMock, fault: str = "", body: object = PING, path: str = "/v1/chat/completions"
) -> tuple[int, CIMultiDictProxy[str], bytes]:
    """One answer that is framed properly."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"http://127.0.0.1:{upstream.port}{path}",
            data=json.dumps(body),
            headers={"x-mock": fault} if fault else {},
            allow_redirects=False,
        ) as response,
    ):
        return response.status, response.headers, await response.read()


def events_of(body: bytes) -> list[str]:
    return [part for part in body.decode().split("\n\n") if part]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def split(received: bytes) -> tuple[bytes, bytes]:
    head, _, body = received.partition(b"\r\n\r\n")
    return head, body


def chunks_of(body: bytes) -> list[bytes]:
    """The chunks of a chunked body, the last empty one left out if it is there."""
    found = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        if length:
            found.append(rest[:length])
        body = rest[length + 2 :]
    return found


# -- dialects


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m-1", messages=ASK)
    assert answer.model == "m-1"
    assert answer.choices[0].message.content == expected(20)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 20)
    assert answer._request_id == "mock-00000001"


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="m-1", messages=ASK, stream=True, extra_headers={"x-mock": "words=3"}
    )
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "the", " quick", " brown", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, None, "stop"]
    assert {chunk.model for chunk in chunks} == {"m-1"}
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


async def test_usage_only_when_asked_for(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="m", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 20)


async def test_chat_stream_bytes(upstream: RunningMock) -> None:
    _, headers, body = await fetch(upstream, "words=1")
    assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert events_of(body)[1] == (
        'data: {"id":"chatcmpl-mock-00000001","object":"chat.completion.chunk","created":1700000000,'
        '"model":"m","choices":[{"index":0,"delta":{"content":"the"},"logprobs":null,"finish_reason":null}]}'
    )
    assert events_of(body)[-1] == "data: [DONE]"


async def test_tool_call(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="m", messages=ASK, tools=TOOLS, tool_choice="required"
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    call = answer.choices[0].message.tool_calls[0]
    assert (call.function.name, call.function.arguments) == ("weather", '{"city":"Paris"}')


@pytest.mark.parametrize(
    ("fault", "choice"), [("tool", "auto"), ("", {"type": "function", "function": {"name": "weather"}})]
)
async def test_tool_call_stream(client: openai.AsyncOpenAI, fault: str, choice: object) -> None:
    async with client.chat.completions.stream(
        model="m", messages=ASK, tools=TOOLS, tool_choice=choice, extra_headers={"x-mock": fault}
    ) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    call = final.choices[0].message.tool_calls[0]
    assert (call.id, call.function.name) == ("call_mock", "weather")
    assert call.function.arguments == '{"city":"Paris"}'


async def test_no_tool_call_unless_asked_for(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m", messages=ASK, tools=TOOLS)
    assert answer.choices[0].finish_reason == "stop"


async def test_completions(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model="m", prompt="one two")
    assert whole.choices[0].text == expected(20)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == 2
    stream = await client.completions.create(
        model="m", prompt="one two", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected(20)
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 20


async def test_embeddings_and_models(client: openai.AsyncOpenAI) -> None:
    base64 = await client.embeddings.create(model="e", input=["one two", "three"])
    floats = await client.embeddings.create(model="e", input="one", encoding_format="float")
    assert [list(item.embedding) for item in base64.data] == [list(mock.VECTOR)] * 2
    assert [list(item.embedding) for item in floats.data] == [list(mock.VECTOR)]
    assert base64.usage.prompt_tokens == 3
    assert [model.id async for model in client.models.list()] == ["mock"]


async def test_responses(client: openai.AsyncOpenAI) -> None:
    whole = await client.responses.create(model="m", input="one two")
    assert whole.output_text == expected(20)
    assert whole.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (2, 20)
    events = [event async for event in await client.responses.create(model="m", input="one two", stream=True)]
    assert [event.type for event in events] == [
        "response.created",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 20,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[3:23]) == events[23].text == expected(20)
    assert events[-1].response.output_text == expected(20)
    assert events[-1].response.usage.output_tokens == 20


async def test_responses_stream_helper(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="m", input=ASK) as stream:
        final = await stream.get_final_response()
    assert final.output_text == expected(20)
    assert final.usage.input_tokens == 3


async def test_messages(claude: anthropic.AsyncAnthropic) -> None:
    whole = await claude.messages.create(model="c", max_tokens=9, messages=ASK)
    assert (whole.content[0].text, whole.stop_reason) == (expected(20), "end_turn")
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (3, 20)
    assert whole._request_id == "mock-00000001"
    async with claude.messages.stream(model="c", max_tokens=9, messages=ASK) as stream:
        final = await stream.get_final_message()
    assert (final.content[0].text, final.stop_reason) == (expected(20), "end_turn")
    assert (final.usage.input_tokens, final.usage.output_tokens) == (3, 20)


async def test_messages_stream_bytes(upstream: RunningMock) -> None:
    body = (await fetch(upstream, "words=2", path="/messages"))[2]
    assert [event.splitlines()[0].removeprefix("event: ") for event in events_of(body)] == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize("prefix", ["", "/v1"])
@pytest.mark.parametrize("route", ["chat/completions", "completions", "embeddings", "responses", "messages"])
async def test_every_route_with_and_without_prefix(upstream: RunningMock, prefix: str, route: str) -> None:
    body = {"model": "x", "messages": ASK, "input": "a", "prompt": "a"}
    status, headers, answer = await fetch(upstream, body=body, path=f"{prefix}/{route}")
    assert status == 200
    assert headers["x-request-id"] == "mock-00000001"
    assert ("request-id" in headers) == (route == "messages")
    assert json.loads(answer)["model"] == "x"


async def test_same_bytes_with_every_start() -> None:
    bodies = []
    for _ in range(2):
        running = await mock.start()
        bodies.append((await fetch(running))[2])
        await running.close()
    assert bodies[0] == bodies[1]


# -- what is recorded, and how the mock is told


async def test_record(upstream: RunningMock) -> None:
    await fetch(upstream, "words=1", path="/v1/chat/completions?a=%20b")
    seen = upstream.record.last
    assert (seen.method, seen.raw_path) == ("POST", "/v1/chat/completions?a=%20b")
    assert (b"x-mock", b"words=1") in seen.headers
    assert seen.header("X-Mock") == "words=1"
    assert seen.header("absent") is None
    assert json.loads(seen.body) == PING
    assert (upstream.record.hits, upstream.record.completed) == (1, 1)
    assert (upstream.record.active, upstream.record.aborted) == (0, 0)


async def test_keep_alive(upstream: RunningMock) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
    for _ in range(3):
        writer.write(request_bytes(PING, "words=1"))
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.close()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_unknown_field_is_named(upstream: RunningMock, path: str) -> None:
    status, _, body = await fetch(upstream, "words=2, wrods=3", path=path)
    answer = json.loads(body)
    assert status == 400
    assert "wrods" in answer["error"]["message"]
    assert ("type" in answer) == (path == "/v1/messages")


@pytest.mark.parametrize("fault", ["words", "words=-1", "gap=soon", "status=99", "hang=perhaps"])
async def test_bad_value_is_refused(upstream: RunningMock, fault: str) -> None:
    status, _, body = await fetch(upstream, fault)
    assert status == 400
    assert fault.partition("=")[0] in json.loads(body)["error"]["message"]


async def test_body_that_is_no_request(upstream: RunningMock) -> None:
    assert (await fetch(upstream, body=[1]))[0] == 400
    assert (await fetch(upstream, body={"stream": "yes"}))[0] == 400


async def test_unknown_route(upstream: RunningMock) -> None:
    status, headers, body = await fetch(upstream, path="/v1/nothing")
    assert status == 404
    assert "/v1/nothing" in json.loads(body)["error"]["message"]
    assert headers["x-request-id"]


async def test_behaviour_of_the_server_and_of_a_request() -> None:
    running = await mock.start(behaviour=Behaviour(words=2, crlf=True))
    assert b"\r\n\r\n" in (await fetch(running))[2]
    assert len(events_of((await fetch(running, "words=4, crlf=false"))[2])) == 4 + 3
    running.behaviour = Behaviour(status=503)
    assert (await fetch(running))[0] == 503
    await running.close()


def test_override_keeps_the_rest() -> None:
    base = Behaviour(gap=0.5)
    assert mock.override(base, " words=3 ,tool,, ") == Behaviour(gap=0.5, words=3, tool=True)
    with pytest.raises(msgspec.ValidationError, match="nonsense"):
        mock.override(base, "nonsense=1")


async def test_record_is_in_the_application() -> None:
    assert mock.make_app()[mock.RECORD].hits == 0


async def test_tls() -> None:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    running = await mock.start(ssl_context=server)
    assert running.url.startswith("https://")
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=trusting)
    writer.write(request_bytes(PING, "words=1"))
    assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    await reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=trusting)
    writer.write(request_bytes(PING, "rst_after=1"))
    await reader.readuntil(b"\n\n\r\n")
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    await running.close()


# -- faults


async def test_one_chunk_per_event(upstream: RunningMock) -> None:
    received, reset = await raw(upstream, "words=5, close_delimited=false, cut_after=8")
    chunks = chunks_of(split(received)[1])
    assert len(chunks) == 5 + 3
    assert all(chunk.endswith(b"\n\n") and chunk.count(b"\n\n") == 1 for chunk in chunks)
    assert not reset


async def test_events_arrive_one_by_one(upstream: RunningMock) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
    writer.write(request_bytes(PING, "words=2, stall_after=2"))
    await reader.readuntil(b'"role":"assistant"')
    await reader.readuntil(b'"the"')
    writer.close()


async def test_ttfb_and_gap(upstream: RunningMock) -> None:
    before = time.monotonic()
    await fetch(upstream, "words=2, ttfb=0.05, gap=0.02")
    assert time.monotonic() - before >= 0.05 + 4 * 0.02


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503, 529])
async def test_status(upstream: RunningMock, status: int) -> None:
    got, headers, body = await fetch(upstream, f"status={status}, retry_after=7")
    error = json.loads(body)["error"]
    assert got == status
    assert headers["Retry-After"] == "7"
    assert headers["x-request-id"]
    assert set(error) == {"message", "type", "param", "code"}


async def test_status_in_the_sdks(client: openai.AsyncOpenAI, claude: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(openai.RateLimitError) as limited:
        await client.chat.completions.create(
            model="m", messages=ASK, extra_headers={"x-mock": "status=429, retry_after=0.5"}
        )
    assert limited.value.response.headers["retry-after"] == "0.5"
    assert limited.value.type == "rate_limit_error"
    with pytest.raises(anthropic.InternalServerError) as overloaded:
        await claude.messages.create(
            model="m", max_tokens=1, messages=ASK, extra_headers={"x-mock": "status=529"}
        )
    assert overloaded.value.body["error"]["type"] == "overloaded_error"


async def test_no_retry_after_unless_set(upstream: RunningMock) -> None:
    assert "Retry-After" not in (await fetch(upstream, "status=429"))[1]


@pytest.mark.parametrize(("number", "count"), [(0, 0), (3, 3), (8, 8)])
async def test_cut_after(upstream: RunningMock, number: int, count: int) -> None:
    received, reset = await raw(upstream, f"words=5, cut_after={number}")
    head, body = split(received)
    assert b"chunked" in head
    assert len(chunks_of(body)) == count
    assert not reset
    assert not received.endswith(b"0\r\n\r\n")
    assert (upstream.record.completed, upstream.record.aborted) == (1, 0)


async def test_cut_beyond_the_end_is_no_cut(upstream: RunningMock) -> None:
    assert len(events_of((await fetch(upstream, "words=5, cut_after=9"))[2])) == 8


async def test_cut_before_the_head(upstream: RunningMock) -> None:
    assert await raw(upstream, "cut_after=-1") == (b"", False)
    assert await raw(upstream, "rst_after=-1") == (b"", True)


@pytest.mark.parametrize("fault", ["cut_after=2", "rst_after=2"])
async def test_cut_mid_event(upstream: RunningMock, fault: str) -> None:
    received, reset = await raw(upstream, f"{fault}, cut_mid_event")
    chunks = chunks_of(split(received)[1])
    assert len(chunks) == 3
    assert chunks[2].startswith(b"data: {")
    assert b"\n\n" not in chunks[2]
    assert reset == ("rst" in fault)


async def test_cut_of_a_plain_body(upstream: RunningMock) -> None:
    received, reset = await raw(upstream, "cut_after=0, cut_mid_event", {"messages": ASK})
    head, body = split(received)
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    assert len(body) == length // 2
    assert not reset


async def test_rst_after(upstream: RunningMock) -> None:
    received, reset = await raw(upstream, "words=5, rst_after=3")
    assert reset
    assert len(chunks_of(split(received)[1])) == 3
    assert upstream.record.completed == 1


async def test_rst_sends_what_is_queued_first(upstream: RunningMock) -> None:
    received, reset = await raw(upstream, "big_event=3000000, rst_after=2")
    assert reset
    assert len(chunks_of(split(received)[1])[1]) > 3_000_000


def test_rst_and_single_writes_under_uvloop() -> None:
    async def scenario() -> None:
        running = await mock.start()
        try:
            received, reset = await raw(running, "words=5, rst_after=3")
            assert reset
            assert len(chunks_of(split(received)[1])) == 3
            received, reset = await raw(running, "words=5, cut_after=3")
            assert not reset
            assert len(chunks_of(split(received)[1])) == 3
        finally:
            await running.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


async def test_stall_after(upstream: RunningMock) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
    writer.write(request_bytes(PING, "stall_after=2"))
    await reader.readuntil(b'"the"')
    await reader.readuntil(b"\n\n\r\n")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.05)
    assert upstream.record.active == 1
    writer.close()
    await until(lambda: upstream.record.aborted == 1)
    assert upstream.record.active == 0


async def test_hang(upstream: RunningMock) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
    writer.write(request_bytes(PING, "hang"))
    await until(lambda: upstream.record.active == 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.05)
    writer.close()
    await until(lambda: upstream.record.aborted == 1)


async def test_caller_that_leaves_is_seen_while_the_mock_waits(upstream: RunningMock) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
    writer.write(request_bytes(PING, "gap=10"))
    await reader.readuntil(b"assistant")
    writer.transport.abort()
    async with asyncio.timeout(1):
        await until(lambda: upstream.record.aborted == 1)
    assert (upstream.record.completed, upstream.record.active) == (0, 0)


async def test_caller_that_leaves_within_its_body(upstream: RunningMock) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
    writer.write(request_bytes(PING)[:-5])
    await until(lambda: upstream.record.active == 1)
    writer.close()
    await until(lambda: upstream.record.aborted == 1)
    assert upstream.record.last.body == b""


@pytest.mark.alone
async def test_close_does_not_wait_for_those_that_hang() -> None:
    running = await mock.start()
    writers = []
    for fault in ("hang", "stall_after=1", "upgrade"):
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(request_bytes(PING, fault))
        writers.append(writer)
    await until(lambda: running.record.active == 3)
    before = time.monotonic()
    await running.close()
    assert time.monotonic() - before < 0.5
    for writer in writers:
        writer.close()


async def test_bad_json(upstream: RunningMock) -> None:
    events = events_of((await fetch(upstream, "words=3, bad_json=2"))[2])
    for number, event in enumerate(events[:-1], 1):
        if number == 2:
            with pytest.raises(json.JSONDecodeError):
                json.loads(event.removeprefix("data: "))
        else:
            json.loads(event.removeprefix("data: "))
    assert len(events) == 6
    with pytest.raises(json.JSONDecodeError):
        json.loads((await fetch(upstream, "bad_json=1", {"messages": ASK}))[2])


async def test_half_events(upstream: RunningMock) -> None:
    received, _ = await raw(upstream, "words=1, half_events, cut_after=4")
    chunks = chunks_of(split(received)[1])
    assert len(chunks) == 8
    assert all(not chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") for chunk in chunks[1::2])


async def test_one_byte(upstream: RunningMock) -> None:
    received, _ = await raw(upstream, "words=1, one_byte, cut_after=4")
    chunks = chunks_of(split(received)[1])
    assert {len(chunk) for chunk in chunks} == {1}
    assert b"".join(chunks).endswith(b"data: [DONE]\n\n")


async def test_big_event(upstream: RunningMock) -> None:
    events = events_of((await fetch(upstream, "words=2, big_event=1048576"))[2])
    sizes = [len(json.loads(event[6:])["choices"][0]["delta"].get("content", "")) for event in events[:-1]]
    assert sizes == [0, 1048576, len(" quick"), 0]


async def test_close_delimited(upstream: RunningMock) -> None:
    received, reset = await raw(upstream, "words=2, close_delimited")
    head, body = split(received)
    assert b"connection: close" in head.lower()
    assert b"transfer-encoding" not in head.lower()
    assert b"content-length" not in head.lower()
    assert len(events_of(body)) == 5
    assert body.endswith(b"data: [DONE]\n\n")
    assert not reset


async def test_close_delimited_with_other_faults(upstream: RunningMock) -> None:
    received, reset = await raw(upstream, "close_delimited, rst_after=2")
    assert reset
    assert len(events_of(split(received)[1])) == 2
    received, reset = await raw(upstream, "close_delimited, cut_after=2")
    assert not reset
    assert len(events_of(split(received)[1])) == 2
    received, _ = await raw(upstream, "close_delimited", {"messages": ASK})
    assert json.loads(split(received)[1])["object"] == "chat.completion"


async def test_error_after_in_each_dialect(
    upstream: RunningMock, client: openai.AsyncOpenAI, claude: anthropic.AsyncAnthropic
) -> None:
    fault = {"x-mock": "error_after=2"}
    stream = await client.chat.completions.create(model="m", messages=ASK, stream=True, extra_headers=fault)
    with pytest.raises(openai.APIError, match="failed as asked"):
        _ = [chunk async for chunk in stream]
    responses = await client.responses.create(model="m", input="a", stream=True, extra_headers=fault)
    assert [event.type async for event in responses][-1] == "error"
    with pytest.raises(anthropic.APIStatusError, match="failed as asked"):
        async with claude.messages.stream(
            model="m", max_tokens=1, messages=ASK, extra_headers=fault
        ) as messages:
            await messages.get_final_message()
    events = events_of((await fetch(upstream, "error_after=2"))[2])  # which ends properly
    assert len(events) == 3
    assert "error" in json.loads(events[2][6:])


async def test_error_body(upstream: RunningMock) -> None:
    status, headers, body = await fetch(upstream, "error_body")
    assert status == 200
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize("route", ["chat/completions", "completions", "responses", "messages"])
async def test_no_done(upstream: RunningMock, route: str) -> None:
    body = PING | {"input": "a", "prompt": "a", "stream_options": {"include_usage": True}}
    answer = (await fetch(upstream, "words=3, no_done", body, f"/v1/{route}"))[2]
    assert mock.WORDS[2].encode() in events_of(answer)[-1].encode()
    for word in (b"[DONE]", b'"stop"', b"end_turn", b"completed", b"message_stop"):
        assert word not in answer


async def test_garbage(upstream: RunningMock) -> None:
    assert await raw(upstream, "garbage") == (b"SSH-2.0-OpenSSH\r\n", False)
    assert upstream.record.completed == 1


async def test_upgrade(upstream: RunningMock) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
    writer.write(request_bytes(PING, "upgrade"))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    writer.close()
    await until(lambda: upstream.record.active == 0)


async def test_redirect(upstream: RunningMock) -> None:
    status, headers, _ = await fetch(upstream, "redirect")
    assert (status, headers["Location"]) == (302, "http://127.0.0.1:9/")


async def test_big_header(upstream: RunningMock) -> None:
    received, _ = await raw(upstream, "big_header=20000, cut_after=0")
    assert b"x" * 20000 in split(received)[0]


async def test_linger(upstream: RunningMock) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
    writer.write(request_bytes(PING, "linger=0.05"))
    await reader.readuntil(b"data: [DONE]\n\n\r\n")
    before = time.monotonic()
    assert await reader.readuntil(b"\r\n\r\n") == b"0\r\n\r\n"
    assert time.monotonic() - before >= 0.03
    writer.close()


async def test_crlf(upstream: RunningMock, client: openai.AsyncOpenAI) -> None:
    body = (await fetch(upstream, "crlf, keepalive_comments=1"))[2]
    assert body.count(b"\n") == body.count(b"\r\n") == 2 * (1 + 23)
    stream = await client.chat.completions.create(
        model="m", messages=ASK, stream=True, extra_headers={"x-mock": "crlf"}
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == expected(20)


async def test_keepalive_comments(upstream: RunningMock) -> None:
    events = events_of((await fetch(upstream, "words=1, keepalive_comments=3"))[2])
    assert events[:3] == [": keep-alive"] * 3
    assert events[3].startswith("data: ")


async def test_plain_json(upstream: RunningMock) -> None:
    _, headers, body = await fetch(upstream, "plain_json")
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body)["object"] == "chat.completion"


@pytest.mark.parametrize(
    "fault", ["cut_after=1", "rst_after=1", "cut_after=-1", "garbage", "close_delimited"]
)
async def test_faults_leave_nothing_in_the_log(
    upstream: RunningMock, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    await raw(upstream, fault)
    await until(lambda: upstream.record.active == 0)
    assert caplog.records == []


async def test_half_closed_caller_is_gone(upstream: RunningMock) -> None:
    """aiohttp takes a caller's FIN for its leaving, as it should be known to tests of the proxy."""
    with socket.create_connection(("127.0.0.1", upstream.port)) as caller:
        caller.sendall(request_bytes(PING, "gap=10"))
        await until(lambda: upstream.record.active == 1)
        caller.shutdown(socket.SHUT_WR)
        await until(lambda: upstream.record.aborted == 1)
