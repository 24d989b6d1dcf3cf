"""`streams.usage` in a running Headrace: usage that callers did not ask for, and usage nobody looks for."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kit.callers import Answer, Caller, ask, chat, post
from tests.kit.headrace import until
from tests.kit.lab import Gate, Lab, LoopThread, Way, both, everywhere, hold, lab, last_event, plays, response
from tests.kit.upstreams import DONE, END, HEAD, Call, Script, chunk, event
from tests.test_providers import PROVIDERS, STREAM, ended, fault, from_the_mock, headrace_for

pytestmark = pytest.mark.timeout(30)

INJECT: dict[str, Any] = {"streams": {"usage": "inject"}}
OFF: dict[str, Any] = {"streams": {"usage": "off"}}
COUNTS = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
A, B = event("a"), event("b")
EXTRA = b'data: {"id":"c","choices":[],"usage":%b}\n\n' % json.dumps(COUNTS).encode()
COMPLETION = json.dumps({"choices": [{"message": {"content": "a"}}], "usage": COUNTS}).encode()
ASKED = {"stream_options": {"include_usage": True}}
UNTOUCHED = b'{ "model" : "m", "stream":true ,"messages":[ ]%b}'
BODY = UNTOUCHED % b""
SENT = UNTOUCHED % b',"stream_options":{"include_usage":true}'


def used(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["usage_source"], line["prompt_tokens"], line["completion_tokens"]


REPORTED = ("reported", 5, 7)


# ── asked for, and taken out ─────────────────────────────────────────────────────────────────────────────


@everywhere
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/chat/completions"])
async def test_the_extra_chunk_is_ours(way: Way, path: str) -> None:
    """The upstream is asked for usage, the caller gets everything but the answer to that."""
    async with lab(plays(HEAD, chunk(A + EXTRA[:20]), chunk(EXTRA[20:] + DONE), END), way, **INJECT) as it:
        answer = await ask(it.port, post(path, BODY))
        assert (await it.called()).body == SENT
        assert answer.clean
        assert answer.body == A + DONE
        line = await it.ended("complete")
        assert used(line) == REPORTED
        assert line["bytes_out"] == len(A + DONE)


@both
@pytest.mark.parametrize("asks", [b',"stream_options":{"include_usage":true}', b',"stream_options":[ ]'])
async def test_who_has_asked_gets_it(way: Way, asks: bytes) -> None:
    """Not a byte is changed, on either way; options that nobody understands are the upstream's matter."""
    async with lab(plays(HEAD, chunk(A + EXTRA + DONE), END), way, **INJECT) as it:
        answer = await ask(it.port, post("/v1/chat/completions", UNTOUCHED % asks))
        assert (await it.called()).body == UNTOUCHED % asks
        assert answer.body == A + EXTRA + DONE
        assert used(await it.ended("complete")) == REPORTED


@both
@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/chat/completions/x"]
)
async def test_other_routes_have_no_such_option(way: Way, path: str) -> None:
    """Their bodies and their answers pass, whatever is in them."""
    async with lab(plays(HEAD, chunk(A + EXTRA + DONE), END), way, **INJECT) as it:
        answer = await ask(it.port, post(path, BODY))
        assert (await it.called()).body == BODY
        assert answer.body.startswith(A + EXTRA + DONE)


@both
@pytest.mark.parametrize("mode", ["observe", "off"])
async def test_nothing_is_asked_for_unless_it_is_wanted(way: Way, mode: str) -> None:
    async with lab(plays(HEAD, chunk(A + EXTRA + DONE), END), way, streams={"usage": mode}) as it:
        answer = await ask(it.port, post("/v1/chat/completions", BODY))
        assert (await it.called()).body == BODY
        assert answer.body == A + EXTRA + DONE


@both
async def test_together_with_another_name(way: Way) -> None:
    """The upstream calls the model something else."""
    models = {"m": {"upstreams": [{"name": "up", "model": "m-eu"}]}}
    async with lab(plays(HEAD, chunk(A + EXTRA + DONE), END), way, models=models, **INJECT) as it:
        answer = await ask(it.port, chat(stream_options={"include_obfuscation": False}))
        sent = json.loads((await it.called()).body)
        assert sent["model"] == "m-eu"
        assert sent["stream_options"] == {"include_obfuscation": False, "include_usage": True}
        assert answer.body == A + DONE


@both
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_every_provider(way: Way, provider: str) -> None:
    """The caller gets what it would have got without asking: but for nulls and running totals, for a chunk
    that one provider sends to everybody, and for what another moves into the extra chunk."""
    quiet = {key: value for key, value in STREAM.items() if key != "stream_options"}
    asked = [
        post("/v1/chat/completions?api-version=1", body, f"x-mock: {fault(provider)}", "api-key: k")
        for body in (quiet, STREAM)
    ]
    unasked, direct = [await from_the_mock(each) for each in asked]
    async with headrace_for(way, **INJECT) as headrace:
        answer = await ask(headrace.port, asked[0])
        line = await ended(headrace, "complete")
    assert answer.clean
    assert line["usage_source"] == "reported"
    events = direct.body.split(b"\n\n")
    extra = [each for each in events if b'"choices":[]' in each and b'"usage":{' in each]
    assert answer.body.split(b"\n\n") == [each for each in events if each not in extra]
    if provider not in ("gemini", "llamacpp"):
        without = [each for each in unasked.body.split(b"\n\n") if each not in extra]
        assert answer.body.replace(b',"usage":null', b"").split(b"\n\n") == without


# ── answers that cannot be changed, or need not ──────────────────────────────────────────────────────────


@both
async def test_an_upstream_that_does_not_know_the_option(way: Way) -> None:
    """Its refusal is the caller's answer: such an upstream needs `observe`."""
    refusal = json.dumps({"error": {"message": "unknown field stream_options"}}).encode()
    async with lab(plays(response(400, refusal)), way, **INJECT) as it:
        answer = await ask(it.port, chat())
        assert (answer.status, answer.body) == (400, refusal)


@both
async def test_a_compressed_stream_passes(way: Way) -> None:
    """Nobody asked for that; it cannot be looked into, and what it used is unknown."""
    body = gzip.compress(A + EXTRA + DONE)
    head = HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
    async with lab(plays(head, chunk(body[:20]), chunk(body[20:]), END), way, **INJECT) as it:
        answer = await ask(it.port, chat())
        assert b"accept-encoding: identity" in (await it.called()).head.lower()
        assert answer.body == body
        assert answer.clean
        assert (await it.ended("complete"))["usage_source"] == "unknown"


@both
async def test_an_identity_is_no_compression(way: Way) -> None:
    head = HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: identity\r\n\r\n")
    async with lab(plays(head, chunk(A + EXTRA + DONE), END), way, **INJECT) as it:
        assert (await ask(it.port, chat())).body == A + DONE
        assert used(await it.ended("complete")) == REPORTED


@both
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("size", [0, 200_000], ids=["small", "large"])
async def test_whole_answers_pass(way: Way, stream: bool, size: int) -> None:
    """Also to a caller that wanted a stream and gets none."""
    body = COMPLETION.replace(b'"a"', b'"%b"' % (b"a" * size))
    async with lab(plays(response(200, body)), way, **INJECT) as it:
        asked = BODY if stream else BODY.replace(b"true", b"false")
        answer = await ask(it.port, post("/v1/chat/completions", asked))
        assert (await it.called()).body == (SENT if stream else asked)
        assert answer.body == body
        assert used(await it.ended("complete")) == REPORTED


@both
@pytest.mark.parametrize("query", ["", "?format=content"])
async def test_a_page_that_asks(way: Way, query: str) -> None:
    """The browser API asks for a stream of its own; one of its two formats is made here."""
    sections = {**INJECT, "browser_api": {"model": "m"}}
    async with lab(plays(HEAD, chunk(A + EXTRA + DONE), END), way, **sections) as it:
        asked = {"messages": [{"role": "user", "content": "hi"}]}
        answer = await ask(it.port, post(f"/api/chat/stream{query}", asked))
        assert json.loads((await it.called()).body)["stream_options"] == ASKED["stream_options"]
        assert answer.body == (b'data: {"content": "a"}\n\n' if query else A) + DONE
        assert used(await it.ended("complete")) == REPORTED


# ── what is held back ────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("part", [EXTRA[:8], EXTRA[:24], EXTRA[:-1]], ids=["little", "some", "nearly all"])
async def test_a_heartbeat_while_an_event_is_held(way: Way, part: bytes) -> None:
    """What was given ends between two events, so a comment may be added."""
    gate = Gate()
    script = plays(HEAD, chunk(A + part), gate, chunk(EXTRA[len(part) :] + DONE), END)
    streams = {"usage": "inject", "heartbeat": 0.05}
    async with lab(script, way, streams=streams) as it, await Caller.connect(it.port) as caller:
        await caller.send(chat())
        answer = await caller.head()
        while not answer.body.endswith(b": headrace\n"):
            await caller.piece(answer)
        gate.open()
        await caller.rest(answer)
        assert answer.clean
        assert answer.body.replace(b": headrace\n", b"") == A + DONE


@both
async def test_no_heartbeat_inside_an_event(way: Way) -> None:
    """One that is not held, because it has a choice."""
    script = plays(HEAD, chunk(A + B[:-5]), 0.3, chunk(B[-5:] + DONE), END)
    async with lab(script, way, streams={"usage": "inject", "heartbeat": 0.02}) as it:
        assert (await ask(it.port, chat())).body == A + B + DONE


@both
@pytest.mark.parametrize("part", [EXTRA[:8], EXTRA[:24], EXTRA[:-1]], ids=["little", "some", "nearly all"])
@pytest.mark.parametrize("death", ["cut", "stall", "kill"])
async def test_a_death_while_an_event_is_held(way: Way, part: bytes, death: str) -> None:
    """What was held is delivered, then the abort; inside an event there is no room for an error."""
    gate = Gate()
    ends = {"cut": (gate, Call.close), "stall": (hold,), "kill": (hold,)}
    sections = {**INJECT, "upstream": {"timeouts": {"idle": 0.2}}} if death == "stall" else INJECT
    async with lab(plays(HEAD, chunk(A + part), *ends[death]), way, **sections) as it:
        async with await Caller.connect(it.port) as caller:
            await caller.send(chat())
            answer = await caller.head()
            await caller.piece(answer)
            gate.open()
            if death == "kill":
                server = it.headrace.server
                assert server.kill(server.streams()[0]["id"])
            await caller.rest(answer)
        assert not answer.clean
        assert answer.body == A + part
        await it.ended({"cut": "upstream_cut", "stall": "upstream_stall", "kill": "killed"}[death])


@both
async def test_a_death_after_the_extra_chunk(way: Way) -> None:
    """Between two events: the error event is the last."""
    gate = Gate()
    async with lab(plays(HEAD, chunk(A + EXTRA), gate, Call.close), way, **INJECT) as it:
        async with await Caller.connect(it.port) as caller:
            await caller.send(chat())
            answer = await caller.head()
            await caller.piece(answer)
            gate.open()
            await caller.rest(answer)
        assert not answer.clean
        assert answer.body.startswith(A)
        assert last_event(answer)["error"]["code"] == "upstream_error"
        assert EXTRA not in answer.body
        assert used(await it.ended("upstream_cut")) == REPORTED


@both
async def test_an_end_without_the_last_blank_line(way: Way) -> None:
    """An event that never became whole is delivered as it came."""
    finish = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
    async with lab(plays(HEAD, chunk(finish + EXTRA[:30]), END), way, **INJECT) as it:
        answer = await ask(it.port, chat())
        assert answer.clean
        assert answer.body == finish + EXTRA[:30]
        assert (await it.ended("complete"))["bytes_out"] == len(answer.body)


# ── any stream, any cut ──────────────────────────────────────────────────────────────────────────────────

EVENTS = st.sampled_from(
    [
        *(A, B, EXTRA, b": ping\n\n", b": ping\n", b'data: {"choices":[],"usage":null}\n\n'),
        *(event("x" * 9000), b"id: 1\n" + A, A.replace(b"}\n\n", b',"usage":{"total_tokens":3}}\n\n')),
    ]
)
SIZES = st.lists(st.one_of(st.just(1), st.integers(1, 30), st.integers(1, 9000)), min_size=1, max_size=5)
HUNDREDS = 300  # more pieces take too long


class Bench:
    """A lab in a thread of its own, for all examples of a test."""

    def __init__(self, way: Way) -> None:
        self.pieces: list[bytes] = []
        self._thread = LoopThread()
        self._stack = AsyncExitStack()
        self.lab: Lab = self._thread.run(
            self._stack.enter_async_context(lab(self._script, way, streams={"usage": "inject"}))
        )

    async def _script(self, call: Call) -> None:
        call.writer.write(HEAD)
        for piece in list(self.pieces):
            call.writer.write(chunk(piece))
            await asyncio.sleep(0)  # a turn of the loop: else the writes are joined
        call.writer.write(END)

    def ask(self, stream: bytes, sizes: list[int]) -> Answer:
        self.pieces, at = [], 0
        while at < len(stream):
            size = max(sizes[len(self.pieces) % len(sizes)], len(stream) // HUNDREDS)
            self.pieces.append(stream[at : at + size])
            at += size
        return self._thread.run(ask(self.lab.port, chat("Connection: close")))

    def last_line(self) -> dict[str, Any]:
        return self.lab.headrace.log_lines()[-1]

    def close(self) -> None:
        self._thread.run(self._stack.aclose())
        self._thread.close()


@pytest.fixture(scope="module", params=[Way(push=True), Way(push=False)], ids=str)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(request.param)
    yield made
    made.close()


@settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
@given(
    events=st.lists(EVENTS, max_size=8),
    end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    sizes=SIZES,
)
def test_only_the_chunk_goes(bench: Bench, events: list[bytes], end: bytes, sizes: list[int]) -> None:
    """Through real sockets: everything but the extra chunk arrives, however it was cut."""
    stream = b"".join([*events, DONE]).replace(b"\n", end)
    kept = b"".join([each for each in [*events, DONE] if each != EXTRA]).replace(b"\n", end)
    answer = bench.ask(stream, sizes)
    assert answer.body == kept
    assert answer.clean
    if EXTRA in events:
        assert used(bench.last_line())[0] == "reported"


# ── not looked for ───────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("size", [0, 200_000], ids=["small", "large"])
async def test_whole_answers_when_it_is_off(way: Way, size: int) -> None:
    """Unknown, though it stands there."""
    body = COMPLETION.replace(b'"a"', b'"%b"' % (b"a" * size))
    async with lab(plays(response(200, body)), way, **OFF) as it:
        assert (await ask(it.port, chat(stream=False))).body == body
        assert (await it.ended("complete"))["usage_source"] == "unknown"


@both
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/messages"])
async def test_streams_when_it_is_off(way: Way, route: str) -> None:
    """How a stream ends is still known: whole, cut, and after a terminator."""
    terminator = DONE if "chat" in route else b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    asked = post(route, {"model": "m", "stream": True, "messages": []})
    ends: dict[str, Script] = {
        "complete": plays(HEAD, chunk(A * 30 + EXTRA + terminator), hold),
        "upstream_cut": plays(HEAD, chunk(A * 30 + EXTRA), END),
    }
    for reason, script in ends.items():
        async with lab(script, way, **OFF) as it:
            answer = await ask(it.port, asked)
            assert answer.clean == (reason == "complete")
            line = await it.ended(reason)
            assert line["usage_source"] == "unknown"
            assert line["ttft_ms"] is not None


@both
async def test_what_a_stored_object_shows_is_not_counted_again(way: Way) -> None:
    """A response that is looked up tells what it used when it was made."""
    async with lab(plays(response(200, COMPLETION)), way) as it:
        lookup = b"GET /v1/responses/resp_1 HTTP/1.1\r\nHost: t\r\n\r\n"
        for request in (lookup, post("/v1/chat/completions/c1", {"metadata": {}})):
            assert (await ask(it.port, request)).body == COMPLETION
        await until(lambda: len(it.headrace.log_lines()) == 2)
        counted = [(line["usage_source"], line["completion_tokens"]) for line in it.headrace.log_lines()]
        assert counted == [("estimated", 0)] * 2
