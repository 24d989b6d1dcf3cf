"""Nine providers by pass-through: their quirks through a running Headrace, their example configurations."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import anthropic
import openai
import pytest

from proxy import cli, config, mock
from proxy.errors import Dialect
from proxy.mock_behaviour import ProviderName
from proxy.sse import Scanner
from proxy.usage import Source, Usage, find_in_json
from tests.kit.callers import Answer, Caller, ask, chat, everything, post
from tests.kit.headrace import ROOT, Headrace, running, settings_for, until
from tests.kit.lab import Way, both, lab, last_event, plays, response
from tests.kit.pool import in_turn
from tests.kit.upstreams import Call

pytestmark = pytest.mark.timeout(30)

PROVIDERS: tuple[str, ...] = get_args(ProviderName)
every = pytest.mark.parametrize("provider", PROVIDERS)
ASK: list[Any] = [{"role": "user", "content": "one two three"}]
WHOLE = {"model": "m", "messages": ASK}
STREAM = WHOLE | {"stream": True, "stream_options": {"include_usage": True}}
TEXT = "the quick brown fox"
#: What an upstream is configured with beside its address; nobody minds what is Azure's.
AZURE = {"auth": "api-key", "query": {"api-version": "2024-10-21"}}
THINKS = {"deepseek", "openrouter", "gemini"}
CACHES = {"deepseek", "openrouter", "azure"}


def reported(provider: str) -> Usage:
    """Four words, three thoughts if the model thinks."""
    thoughts = 3 if provider in THINKS else 0
    return Usage(3, 2 if provider in CACHES else 0, 4 + thoughts, thoughts, Source.REPORTED)


@asynccontextmanager
async def headrace_for(way: Way, **sections: Any) -> AsyncIterator[Headrace]:
    upstream = AZURE | sections.pop("upstream", {})
    settings = settings_for("mock:", upstream=upstream, **({"retry": {"attempts": 1}} | sections))
    async with running(settings, push=way.push) as started:
        yield started
        await started.quiet()


def request(provider: str, body: Any, more: str = "") -> bytes:
    return post(
        "/v1/chat/completions?api-version=2024-10-21", body, f"x-mock: {fault(provider, more)}", "api-key: k"
    )


def fault(provider: str, more: str = "") -> str:
    return f"provider={provider}, words=4, {more}".rstrip(", ")


async def from_the_mock(asked: bytes) -> Answer:
    """What a mock of its own answers: the first answer of each has the same ids."""
    direct = await mock.start()
    try:
        return await ask(direct.port, asked)
    finally:
        await direct.close()


async def ended(headrace: Headrace, reason: str) -> dict[str, Any]:
    await until(lambda: bool(headrace.log_lines()))
    [line] = headrace.log_lines()
    assert line["reason"] == reason, line
    return line


def scanned(body: bytes) -> Scanner:
    scanner = Scanner(Dialect.OPENAI, expects_terminator=True)
    scanner.feed(body)
    return scanner


def sdk(headrace: Headrace, provider: str, more: str = "") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=headrace.base_url,
        api_key="caller",
        max_retries=0,
        default_headers={"x-mock": fault(provider, more)},
    )


# ── the table: every provider, over both data paths ──────────────────────────────────────────────────────


@both
@every
async def test_a_stream(way: Way, provider: str) -> None:
    """Complete, byte for byte what the provider sent, its usage found, its text read by the SDK."""
    direct = await from_the_mock(request(provider, STREAM))
    async with headrace_for(way) as headrace:
        answer = await ask(headrace.port, request(provider, STREAM))
        await ended(headrace, "complete")
        async with sdk(headrace, provider) as client:
            stream = await client.chat.completions.create(
                model="m", messages=ASK, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
    assert answer.clean
    assert answer.body == direct.body
    assert scanned(answer.body).usage() == reported(provider)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
    assert [c.usage for c in chunks if c.usage][-1].prompt_tokens == 3


@both
@every
async def test_a_whole_answer(way: Way, provider: str) -> None:
    """The same without a stream; blank lines in front of the JSON included."""
    direct = await from_the_mock(request(provider, WHOLE))
    async with headrace_for(way) as headrace:
        answer = await ask(headrace.port, request(provider, WHOLE))
        await ended(headrace, "complete")
        async with sdk(headrace, provider) as client:
            read = await client.chat.completions.create(model="m", messages=ASK)
    assert (answer.status, answer.clean, answer.body) == (200, True, direct.body)
    assert answer.headers["content-type"] == direct.headers["content-type"]
    assert answer.body[:1].isspace() == (provider in {"deepseek", "openrouter"})
    assert find_in_json(Dialect.OPENAI, answer.body) == reported(provider)
    assert read.choices[0].message.content == TEXT


@both
@every
async def test_an_error(way: Way, provider: str) -> None:
    """Status and Retry-After stay, the body too, but for Gemini's array; the SDK raises the right class."""
    faults = "status=429, retry_after=7"
    direct = await from_the_mock(request(provider, STREAM, faults))
    async with headrace_for(way) as headrace:
        answer = await ask(headrace.port, request(provider, STREAM, faults))
        await ended(headrace, "complete")
        async with sdk(headrace, provider, faults) as client:
            with pytest.raises(openai.RateLimitError, match="status 429 was asked for") as raised:
                await client.chat.completions.create(model="m", messages=ASK)
    assert (answer.status, answer.clean, answer.headers["retry-after"]) == (429, True, "7")
    assert answer.headers["content-type"] == direct.headers["content-type"]
    if provider == "gemini":
        error = {"message": "status 429 was asked for", "type": "resource_exhausted", "param": None}
        assert answer.json() == {"error": error | {"code": "resource_exhausted"}}
        assert raised.value.code == "resource_exhausted"
    else:
        assert answer.body == direct.body


@both
@every
async def test_an_error_inside_a_stream(way: Way, provider: str) -> None:
    """What the provider says itself is passed on and ends as upstream_error. Ollama says nothing, so its
    stream gets our own event and a visible end; Gemini says it in no event, so the visible end is all."""
    direct = await from_the_mock(request(provider, STREAM, "error_after=2"))
    async with headrace_for(way) as headrace:
        answer = await ask(headrace.port, request(provider, STREAM, "error_after=2"))
        says_nothing = provider in {"gemini", "ollama"}
        await ended(headrace, "upstream_cut" if says_nothing else "upstream_error")
        async with sdk(headrace, provider, "error_after=2") as client:
            stream = await client.chat.completions.create(model="m", messages=ASK, stream=True)
            with pytest.raises(openai.APIError):
                _ = [chunk async for chunk in stream]
    if provider == "ollama":
        assert answer.body.startswith(direct.body)
        assert not answer.clean
        assert last_event(answer)["error"]["type"] == "server_error"
    else:
        assert (answer.body, answer.clean) == (direct.body, provider != "gemini")


@both
async def test_anthropic_itself(way: Way) -> None:
    """The native dialect: stream, whole answer and errors as they came, read by its own SDK."""
    asked = {"model": "m", "messages": ASK, "max_tokens": 9}
    async with headrace_for(way) as headrace:
        for body in (asked | {"stream": True}, asked):
            message = post("/v1/messages", body, f"x-mock: {fault('anthropic')}")
            direct = await from_the_mock(message)
            answer = await ask(headrace.port, message)
            assert without_ids(answer.body) == without_ids(direct.body)
        async with (
            claude(headrace, fault("anthropic")) as client,
            client.messages.stream(**asked) as stream,
        ):
            final = await stream.get_final_message()
        async with claude(headrace, fault("anthropic", "status=529")) as client:
            with pytest.raises(anthropic.APIStatusError, match="status 529 was asked for") as raised:
                await client.messages.create(**asked)
        await until(lambda: len(headrace.log_lines()) == 4)
        assert [line["reason"] for line in headrace.log_lines()] == ["complete"] * 3 + ["upstream_error"]
    assert (final.content[0].text, final.usage.cache_read_input_tokens) == (TEXT, 2)
    assert find_in_json(Dialect.ANTHROPIC, answer.body) == Usage(3, 2, 4, 0, Source.REPORTED)
    assert raised.value.body == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "status 529 was asked for"},
    }


def claude(headrace: Headrace, faults: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(
        base_url=headrace.url, api_key="caller", max_retries=0, default_headers={"x-mock": faults}
    )


def without_ids(body: bytes) -> bytes:
    return re.sub(rb"mock-\d+", b"", body)


@both
@every
async def test_an_error_with_a_good_status(way: Way, provider: str) -> None:
    """A 200 whose whole JSON is an error is a 502, whatever the error looks like."""
    async with headrace_for(way) as headrace:
        answer = await ask(headrace.port, request(provider, WHOLE, "error_body"))
        await ended(headrace, "upstream_error")
    assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_error")


@both
@every
async def test_plain_json_as_a_stream(way: Way, provider: str) -> None:
    """wrap_json: a provider that answers a streaming request with JSON is read as a stream all the same."""
    async with headrace_for(way, streams={"wrap_json": True}) as headrace:
        answer = await ask(headrace.port, request(provider, STREAM, "plain_json"))
        await ended(headrace, "complete")
        async with sdk(headrace, provider, "plain_json") as client:
            stream = await client.chat.completions.create(model="m", messages=ASK, stream=True)
            [chunk] = [chunk async for chunk in stream]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body.endswith(b"\n\ndata: [DONE]\n\n")
    assert scanned(answer.body).usage() == reported(provider)
    assert (chunk.choices[0].delta.content, chunk.choices[0].finish_reason) == (TEXT, "stop")


@both
async def test_plain_json_stays_plain(way: Way) -> None:
    """Unless wrap_json is set, or if no stream was asked for."""
    async with headrace_for(way) as headrace:
        assert (await ask(headrace.port, request("openai", STREAM, "plain_json"))).json()["choices"]
    async with headrace_for(way, streams={"wrap_json": True}) as headrace:
        assert (await ask(headrace.port, request("openai", WHOLE))).json()["choices"]


LONG = b'{"choices":[{"message":{"role":"assistant","content":"%b"}}]}' % (b"x" * 100_000)
NO_CHAT = b'{"object":"list","data":"%b"}' % (b"x" * 100_000)


@both
async def test_long_plain_json_as_a_stream(way: Way) -> None:
    """More than is held of other answers; what is no chat is passed on as it is, half an answer is none."""
    whole, other = response(200, LONG), response(200, NO_CHAT)
    scripts = [plays(whole), plays(other), plays(whole[:90_000], Call.close), plays(whole[:900], Call.close)]
    async with lab(in_turn(*scripts), way, streams={"wrap_json": True}) as it:
        answer = await ask(it.port, chat())
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.body.count(b"x") >= 100_000
        assert answer.body.endswith(b"\n\ndata: [DONE]\n\n")
        await it.ended("complete", 1)
        assert (await ask(it.port, chat())).body == NO_CHAT
        await it.ended("complete", 2)
        for count in (3, 4):
            answer = await ask(it.port, chat())
            assert answer.status == 502
            assert (await it.line(count))["reason"] in ("upstream_cut", "upstream_error")  # by way
        await it.headrace.quiet()


@both
async def test_a_reader_that_does_not_take_its_end(way: Way) -> None:
    """All of it goes out at once, so it is the end that waits for him."""
    whole = response(200, b'{"choices":[{"message":{"content":"%b"}}]}' % (b"x" * 8_000_000))
    settings: dict[str, Any] = {"streams": {"wrap_json": True}, "timeouts": {"write": 0.5}}
    async with (
        lab(plays(whole), way, **settings) as it,
        await Caller.connect(it.port, receive_buffer=4096) as caller,
    ):
        await caller.send(chat())
        assert (await caller.head()).status == 200
        await it.ended("client_gone")


@both
async def test_plain_json_behind_heartbeats(way: Way) -> None:
    """After a 200 and comments a stream is owed: what cannot be made one breaks it off."""
    script = plays(0.4, response(200, NO_CHAT))
    streams = {"wrap_json": True, "commit_after": 0.1, "heartbeat": 0.1}
    async with lab(script, way, streams=streams) as it:
        answer = await everything(it.port, chat())
        assert (answer.status, answer.clean) == (200, False)
        assert last_event(answer)["error"]["code"] == "upstream_invalid_response"
        await it.ended("upstream_error")


# ── signs of life are no answer ──────────────────────────────────────────────────────────────────────────

FOUR_GAPS_MS = 190  # 200, less what a loop's clock may round


@both
@pytest.mark.parametrize("provider", ["deepseek", "openrouter"])
async def test_first_byte_and_first_token(way: Way, provider: str) -> None:
    """Comments are no first byte; a chunk for the role alone is no first token, a thought is one."""
    async with headrace_for(way) as headrace:
        await ask(headrace.port, request(provider, STREAM, "keepalive_comments=4, gap=0.05"))
        line = await ended(headrace, "complete")
    assert line["ttfb_ms"] >= FOUR_GAPS_MS
    after_the_role = 48 if provider == "deepseek" else 0
    assert line["ttft_ms"] >= FOUR_GAPS_MS + after_the_role


@both
async def test_first_byte_of_a_body(way: Way) -> None:
    """Nor are blank lines."""
    async with headrace_for(way) as headrace:
        await ask(headrace.port, request("deepseek", WHOLE, "keepalive_comments=4, gap=0.05"))
        assert (await ended(headrace, "complete"))["ttfb_ms"] >= FOUR_GAPS_MS


@both
@pytest.mark.parametrize("body", [STREAM, WHOLE], ids=["stream", "whole"])
async def test_signs_of_life_do_not_stop_the_timer(way: Way, body: Any) -> None:
    """An upstream that only says that it is there has not answered in time."""
    async with headrace_for(way, upstream={"timeouts": {"first_byte": 0.3}}) as headrace:
        answer = await ask(headrace.port, request("deepseek", body, "keepalive_comments=10000, gap=0.01"))
        await ended(headrace, "upstream_stall")
    assert (answer.status, answer.json()["error"]["code"]) == (504, "upstream_timeout")


@both
async def test_what_waits_is_kept_alive(way: Way) -> None:
    """The caller of a queued stream gets our heartbeat while the provider's signs are held back; then both
    arrive, and the answer."""
    streams = {"commit_after": 0.1, "heartbeat": 0.1}
    async with headrace_for(way, streams=streams) as headrace, await Caller.connect(headrace.port) as caller:
        await caller.send(request("deepseek", STREAM, "keepalive_comments=20, gap=0.05"))
        answer = await caller.head()
        assert await caller.piece(answer) == b": headrace\n"
        await caller.rest(answer)
        await ended(headrace, "complete")
    assert answer.clean
    assert answer.body.count(b": keep-alive\n\n") == 20
    assert scanned(answer.body).usage() == reported("deepseek")


# ── Gemini's arrays ──────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_argument"), (404, "not_found"), (500, "internal"), (503, "unavailable")],
)
async def test_gemini_errors(way: Way, status: int, kind: str) -> None:
    """The contract's shape for every status, with the right length."""
    async with headrace_for(way) as headrace:
        answer = await ask(headrace.port, request("gemini", WHOLE, f"status={status}"))
        await ended(headrace, "complete" if status < 500 else "upstream_error")
    assert answer.status == status
    assert int(answer.headers["content-length"]) == len(answer.body)
    message = f"status {status} was asked for"
    assert answer.json() == {"error": {"message": message, "type": kind, "param": None, "code": kind}}


@both
async def test_gemini_refuses(way: Way) -> None:
    """Which member it does not know arrives in the message that the SDK shows."""
    async with headrace_for(way) as headrace, sdk(headrace, "gemini") as client:
        with pytest.raises(openai.BadRequestError, match="parallel_tool_calls"):
            await client.chat.completions.create(model="m", messages=ASK, parallel_tool_calls=False)


# ── Azure's address ──────────────────────────────────────────────────────────────────────────────────────


@both
async def test_azure(way: Way) -> None:
    """Key in api-key, version in the query, deployment in the path; none of it is the caller's to know."""
    azure = await mock.start(behaviour=mock.Behaviour(provider="azure", words=4))
    base = f"http://127.0.0.1:{azure.port}/openai/deployments/gpt"
    try:
        async with running(settings_for(base, upstream=AZURE), push=way.push) as headrace:
            answer = await ask(headrace.port, post("/v1/chat/completions", STREAM))
            await ended(headrace, "complete")
        seen = azure.record.last
    finally:
        await azure.close()
    assert answer.body.startswith(b'data: {"choices":[]')
    assert seen.raw_path == "/openai/deployments/gpt/chat/completions?api-version=2024-10-21"
    assert (seen.header("api-key"), seen.header("authorization")) == ("upstream-secret", None)


# ── the example configurations ───────────────────────────────────────────────────────────────────────────

EXAMPLES = sorted((ROOT / "deploy" / "providers").glob("*.yaml"))
examples = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
#: A setting that is offered but off: `#key: value`, where prose has a blank behind its #.
OFFERED = re.compile(r"^( *)#(?=\S)", re.MULTILINE)


def variables(text: str) -> set[str]:
    """What the environment has to have."""
    return set(re.findall(r"\$\{([A-Z0-9_]+)\}", text))


def check(monkeypatch: pytest.MonkeyPatch, file: Path, environ: set[str]) -> int:
    for name in (*variables(file.read_text()), "VLLM_API_KEY", "OLLAMA_URL", "LLAMACPP_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in environ:
        monkeypatch.setenv(name, "some-value")
    return cli.main(["check", "-c", str(file)])


def test_there_is_one_for_every_provider() -> None:
    """And one with many."""
    assert {path.stem for path in EXAMPLES} == {*PROVIDERS, "many"}


@examples
def test_an_example(
    example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`headrace check` accepts it with its variables set, and prints its routes without a secret."""
    assert check(monkeypatch, example, variables(example.read_text())) == 0
    first, *routes = capsys.readouterr().out.splitlines()
    assert first == f"{example}: ok"
    assert routes


@examples
def test_a_variable_that_is_missing(
    example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each one that has no default is named, with the place that needs it."""
    needed = variables(OFFERED.sub(r"\1# ", example.read_text()))
    needed -= {name for name in needed if not re.search(rf"^[^#]*\$\{{{name}\}}", example.read_text(), re.M)}
    for name in needed:
        assert check(monkeypatch, example, needed - {name}) == 1
        error = capsys.readouterr().err
        assert re.search(rf"upstreams\.[\w-]+\.\S+: the environment variable {name} is not set", error), error
    assert needed or example.stem in {"vllm", "llamacpp", "ollama"}


@examples
def test_what_is_offered(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that are commented out are accepted too, except files that are not on this machine."""
    text = OFFERED.sub(r"\1", example.read_text()).replace("/etc/ssl/private-ca.pem", __file__)
    written = tmp_path / example.name
    written.write_text(text)
    assert check(monkeypatch, written, variables(text)) == 0


def test_the_readers_of_many() -> None:
    """What the comments of many.yaml promise is what is read from it."""
    path = ROOT / "deploy" / "providers" / "many.yaml"
    read = config.load(path, dict.fromkeys(variables(path.read_text()), "x"))
    model = read.models["gpt-4.1"]
    assert [(t.name, t.weight, t.tier) for t in model.upstreams] == [
        ("openai", 3, 1),
        ("azure-eu", 1, 1),
        ("openrouter", 1, 2),
    ]
    assert (model.fallback, model.hedge_after) == (("gemini-2.5-pro",), 8)
    assert len(read.upstreams["openai"].api_keys) == 2
    assert read.upstreams["azure-eu"].query == {"api-version": "2024-10-21"}
    assert read.streams.wrap_json
