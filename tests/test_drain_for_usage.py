"""Readers who leave early: what their answers used is estimated, or read on for within bounds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from proxy import mock
from proxy.usage import find_in_tail
from tests.kit.callers import Caller, chat, post
from tests.kit.headrace import until
from tests.kit.lab import Gate, Lab, Way, both, everywhere, hold, lab, plays
from tests.kit.upstreams import DONE, END, HEAD, Call, Script, chunk, event
from tests.test_usage import ROUTES, mock_stream

pytestmark = pytest.mark.timeout(40)

#: Contract section 6, rule 4.
WITHIN_S = 1.0
A = event("a")
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":22,"total_tokens":33}}\n\n'
DRAINS: dict[str, Any] = {"drain_for_usage": {"seconds": 10}}
JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
LARGE = b'{"padding":"' + b"x" * 200_000 + b'","usage":{"prompt_tokens":11,"completion_tokens":22}}'


def drains(**bounds: float) -> dict[str, Any]:
    return {"on_disconnect": {"drain_for_usage": bounds}}


def half_close(caller: Caller) -> None:
    """FIN of the sending side only; the reading side stays open."""
    caller.writer.write_eof()


leaves = pytest.mark.parametrize(
    "leave", [Caller.leave, Caller.reset, half_close], ids=["fin", "rst", "half-close"]
)
Leave = Callable[[Caller], None]


async def is_read_on(it: Lab, count: int = 1) -> None:
    """Until so many requests are read on for nobody; they are visible, and keep what they hold."""
    await until(
        lambda: [each["phase"] for each in it.headrace.server.streams()] == ["drain_for_usage"] * count
    )
    state = it.headrace.state
    assert (state["in_flight"], state["streams"], state["permits"]) == (count, count, count)
    assert it.headrace.server.core.draining_for_usage == count


async def left(it: Lab, *counts: int | None, count: int = 1) -> dict[str, Any]:
    """The one end of a request whose caller has left: prompt and completion tokens; none: an estimate."""
    line = await it.ended("client_gone", count)
    assert it.headrace.server.core.draining_for_usage == 0
    if counts:
        used = line["usage_source"], line["prompt_tokens"], line["completion_tokens"]
        assert used == ("reported", *counts), line
    else:
        assert line["usage_source"] == "estimated", line
    return line


async def has_left(it: Lab, leave: Leave = Caller.leave, **fields: Any) -> None:
    """A caller that leaves after its first piece."""
    async with await Caller.connect(it.port) as caller:
        await caller.send(chat(**fields))
        await caller.piece(await caller.head())
        leave(caller)
        if leave is half_close:
            await caller.reader.read()  # until Headrace has noticed


def pumps(enough: Callable[[Call, int], bool], piece: bytes = A) -> Script:
    """Sends one piece after the other, until it is enough: then the usage."""

    async def script(call: Call) -> None:
        sent = 0
        await call.send(HEAD)
        try:
            while not enough(call, sent):
                await call.send(chunk(piece))
                sent += len(piece)
                await asyncio.sleep(0)
            await call.send(chunk(USAGE + DONE) + END)
        except ConnectionError:
            call.gone.set()

    return script


# ── read on ──────────────────────────────────────────────────────────────────────────────────────────────


@everywhere
@leaves
async def test_a_silent_stream_is_read_to_its_usage(way: Way, leave: Leave) -> None:
    """One line, once the answer is over, with what was reported; the connection is kept."""
    gate = Gate()
    script = plays(HEAD, chunk(A), gate, chunk(A + A), chunk(USAGE), chunk(DONE), END)
    async with lab(script, way, streams={"on_disconnect": DRAINS}) as it, asyncio.timeout(15):
        await has_left(it, leave)
        await is_read_on(it)
        assert it.headrace.log_lines() == []
        gate.open()
        line = await left(it, 11, 22)
        assert (line["status"], line["chunks"], line["bytes_out"]) == (200, 1, len(A))
        assert it.headrace.state["upstream_idle"] == 1
        samples = await it.headrace.metrics()
        assert samples['headrace_client_disconnects_total{phase="stream"}'] == 1


@everywhere
@leaves
async def test_a_busy_stream_is_read_to_its_usage(way: Way, leave: Leave) -> None:
    """Writes fail while the leaving is noticed; nothing of what they carried is lost."""
    async with (
        lab(pumps(lambda _, sent: sent > 200 * len(A)), way, streams={"on_disconnect": DRAINS}) as it,
        asyncio.timeout(20),
    ):
        await asyncio.gather(*(has_left(it, leave) for _ in range(10)))
        await until(lambda: len(it.headrace.log_lines()) == 10)
        await it.headrace.quiet()
        ends = [(each["reason"], each["usage_source"]) for each in it.headrace.log_lines()]
        assert ends == [("client_gone", "reported")] * 10


@both
@leaves
async def test_a_blocked_stream_is_read_to_its_usage(way: Way, leave: Leave) -> None:
    """A reader that had stopped reading leaves: the upstream is no longer held back by it."""
    gate = Gate()
    script = plays(HEAD, *([chunk(A * 1000)] * 100), gate, chunk(USAGE + DONE) + END)
    bounds = drains(bytes=100_000_000)
    async with (
        lab(script, way, streams=bounds) as it,
        asyncio.timeout(15),
        await Caller.connect(it.port, receive_buffer=4096) as caller,
    ):
        caller.writer.transport.pause_reading()
        await caller.send(chat())
        call = await it.called()
        await until(lambda: call.writer.transport.get_write_buffer_size() > 2**16)
        await until(lambda: [each["phase"] for each in it.headrace.server.streams()] == ["stream"])
        leave(caller)
        gate.open()
        await left(it, 11, 22)


@both
async def test_a_reader_that_is_too_slow_has_left(way: Way) -> None:
    """`timeouts.write` closes it; its stream is read on all the same."""
    gate = Gate()
    script = plays(HEAD, *([chunk(A * 1000)] * 100), gate, chunk(USAGE + DONE) + END)
    sections = {"streams": drains(bytes=100_000_000), "timeouts": {"write": 0.3}}
    async with (
        lab(script, way, **sections) as it,
        asyncio.timeout(20),
        await Caller.connect(it.port, receive_buffer=4096) as caller,
    ):
        caller.writer.transport.pause_reading()
        await caller.send(chat())
        await is_read_on(it)
        gate.open()
        await left(it, 11, 22)


@everywhere
@pytest.mark.parametrize("leave", [Caller.leave, Caller.reset], ids=["fin", "rst"])
async def test_the_usage_comes_as_the_caller_goes(way: Way, leave: Leave) -> None:
    """In the same turn of the loop: the write fails before anybody has said that the caller left."""
    written = asyncio.Event()

    async def script(call: Call) -> None:
        written.clear()
        await call.send(HEAD + chunk(A))
        await written.wait()

    async with lab(script, way, streams={"on_disconnect": DRAINS}) as it:
        async with asyncio.timeout(20):
            for count in range(1, 31):
                async with await Caller.connect(it.port) as caller:
                    await caller.send(chat())
                    await caller.piece(await caller.head())
                    call = await it.called(count)
                    leave(caller)
                    for _ in range(count % 5):
                        await asyncio.sleep(0)
                    call.writer.write(chunk(USAGE + DONE) + END)
                    written.set()
                await it.line(count)
            ends = {(each["reason"], each["usage_source"]) for each in it.headrace.log_lines()}
            assert ends <= {("client_gone", "reported"), ("complete", "reported")}, ends
            await it.headrace.quiet()


@both
async def test_the_terminator_is_enough(way: Way) -> None:
    """An upstream that does not end after it is not waited for."""
    async with (
        lab(plays(HEAD, chunk(A), hold), way, streams={"on_disconnect": DRAINS}) as it,
        asyncio.timeout(10),
    ):
        await has_left(it)
        await is_read_on(it)
        call = await it.called()
        await call.send(chunk(USAGE + DONE))
        async with asyncio.timeout(WITHIN_S):
            await call.gone.wait()
        await left(it, 11, 22)


@both
async def test_a_large_answer_is_read_to_its_usage(way: Way) -> None:
    """One that is no stream, once it has begun: its usage stands at its end."""
    gate = Gate()
    script = plays(JSON_HEAD, chunk(LARGE[:150_000]), gate, chunk(LARGE[150_000:]), END)
    async with lab(script, way, streams={"on_disconnect": DRAINS}) as it, asyncio.timeout(10):
        await has_left(it, stream=False)
        await until(lambda: it.headrace.server.core.draining_for_usage == 1)
        gate.open()
        await left(it, 11, 22)


@both
async def test_a_large_answer_that_is_read(way: Way) -> None:
    """Its usage is found as well when nobody leaves."""
    async with lab(plays(JSON_HEAD, chunk(LARGE), END), way) as it, asyncio.timeout(10):
        async with await Caller.connect(it.port) as caller:
            answer = await caller.ask(chat(stream=False))
        assert answer.body == LARGE
        line = await it.ended("complete")
        assert (line["usage_source"], line["prompt_tokens"], line["completion_tokens"]) == (
            "reported",
            11,
            22,
        )


# ── bounds ───────────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("bound", ["seconds", "total"])
async def test_seconds(way: Way, bound: str) -> None:
    """Past the bound, and past the deadline over all, the upstream is closed: an estimate."""
    seconds, total = (0.2, 900) if bound == "seconds" else (60, 0.5)
    sections: dict[str, Any] = {"upstream": {"timeouts": {"total": total}}}
    async with (
        lab(plays(HEAD, chunk(A), hold), way, streams=drains(seconds=seconds), **sections) as it,
        asyncio.timeout(10),
    ):
        await has_left(it)
        await is_read_on(it)
        call = await it.called()
        async with asyncio.timeout(min(seconds, total) + WITHIN_S):
            await call.gone.wait()
        line = await left(it)
        assert line["completion_tokens"] >= 1
        assert it.headrace.state["upstream_idle"] == 0


@both
async def test_bytes(way: Way) -> None:
    """An upstream that never ends is closed once it has sent too much."""
    counted = 0

    def enough(_: Call, sent: int) -> bool:
        nonlocal counted
        counted = sent
        return False

    async with (
        lab(pumps(enough, A * 100), way, streams=drains(seconds=30, bytes=1_000_000)) as it,
        asyncio.timeout(15),
    ):
        await has_left(it)
        line = await left(it)
        assert line["duration_ms"] < 15_000
        await until(lambda: it.upstream.calls[0].gone.is_set())
        assert counted > 1_000_000


@both
async def test_streams(way: Way) -> None:
    """So many at once; one more is cancelled at once, and a place that was left is used again."""
    gate = Gate()

    async def script(call: Call) -> None:
        await call.send(HEAD + chunk(A))
        if b"last" in call.body:
            await call.send(chunk(USAGE + DONE) + END)
        elif b"more" in call.body:
            await hold(call)
        else:
            await plays(gate, chunk(USAGE + DONE), END)(call)

    async with lab(script, way, streams=drains(streams=2)) as it, asyncio.timeout(15):
        await asyncio.gather(*(has_left(it) for _ in range(2)))
        await is_read_on(it, 2)
        await has_left(it, user="more")
        async with asyncio.timeout(WITHIN_S):
            await it.upstream.calls[-1].gone.wait()
        assert (await it.line())["usage_source"] == "estimated"
        await is_read_on(it, 2)
        gate.open()
        await until(lambda: it.headrace.server.core.draining_for_usage == 0)
        gate._event.clear()
        await has_left(it)
        await is_read_on(it)
        gate.open()
        await until(lambda: len(it.headrace.log_lines()) == 4)
        sources = [line["usage_source"] for line in it.headrace.log_lines()]
        assert sources == ["estimated", "reported", "reported", "reported"]
        await it.headrace.quiet()


@both
async def test_a_death_of_the_upstream(way: Way) -> None:
    """An answer that ends early has no report; it is estimated, and its caller had left before."""
    gate = Gate()
    script = plays(HEAD, chunk(A), gate, lambda call: call.reset())
    async with lab(script, way, streams={"on_disconnect": DRAINS}) as it, asyncio.timeout(10):
        await has_left(it)
        await is_read_on(it)
        gate.open()
        await left(it)


# ── ended from outside ───────────────────────────────────────────────────────────────────────────────────


@both
async def test_a_kill_ends_it_at_once(way: Way) -> None:
    """Through the admin listener, where it is shown; the reason stays what it was for its caller."""
    async with (
        lab(plays(HEAD, chunk(A), hold), way, streams={"on_disconnect": DRAINS}) as it,
        asyncio.timeout(10),
        aiohttp.ClientSession(it.headrace.admin_url) as admin,
    ):
        await has_left(it)
        await is_read_on(it)
        async with admin.get("/admin/streams") as answer:
            [shown] = (await answer.json())["streams"]
        assert shown["phase"] == "drain_for_usage"
        async with admin.delete(f"/admin/streams/{shown['id']}") as answer:
            assert answer.status == 200
        async with asyncio.timeout(WITHIN_S):
            await (await it.called()).gone.wait()
        await left(it)


@both
async def test_a_shutdown_waits_for_no_usage(way: Way) -> None:
    """What is read on when it begins ends, and nothing more is."""
    async with (
        lab(plays(HEAD, chunk(A), hold), way, streams={"on_disconnect": DRAINS}) as it,
        asyncio.timeout(15),
        await Caller.connect(it.port) as stays,
    ):
        await stays.send(chat())
        await stays.piece(await stays.head())
        await has_left(it)
        await until(lambda: it.headrace.server.core.draining_for_usage == 1)
        ending = asyncio.get_running_loop().create_task(it.headrace.server.drain(30, asyncio.Event()))
        await until(lambda: len(it.headrace.log_lines()) == 1)
        assert it.headrace.server.core.draining_for_usage == 0
        stays.leave()
        await until(lambda: len(it.headrace.log_lines()) == 2)
        await ending
        for line in it.headrace.log_lines():
            assert (line["reason"], line["usage_source"]) == ("client_gone", "estimated")


@both
async def test_a_close_leaves_nothing_behind(way: Way) -> None:
    """Without any drain: the end of the process ends what is read on."""
    sections = {"streams": {"on_disconnect": DRAINS}}
    async with lab(plays(HEAD, chunk(A), hold), way, unfinished=True, **sections) as it:
        await has_left(it)
        await is_read_on(it)
        core = it.headrace.server.core
    await until(lambda: not core.running)
    assert core.draining_for_usage == 0


# ── cancelled at once ────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("stream", [True, False])
async def test_before_the_first_byte(way: Way, stream: bool) -> None:
    """Nothing has come that could be read on; what it used is unknown, not zero."""
    async with lab(plays(hold), way, streams={"on_disconnect": DRAINS}) as it, asyncio.timeout(10):
        async with await Caller.connect(it.port) as caller:
            await caller.send(chat(stream=stream))
            call = await it.called()
        async with asyncio.timeout(WITHIN_S):
            await call.gone.wait()
        line = await it.ended("client_gone")
        assert line["usage_source"] == "unknown"


@both
async def test_where_usage_is_not_wanted(way: Way) -> None:
    """`usage: off`: there is nothing to read on for, and nothing is known."""
    streams = {"on_disconnect": DRAINS, "usage": "off"}
    async with lab(plays(HEAD, chunk(A + USAGE), hold), way, streams=streams) as it, asyncio.timeout(10):
        await has_left(it)
        async with asyncio.timeout(WITHIN_S):
            await (await it.called()).gone.wait()
        assert (await it.ended("client_gone"))["usage_source"] == "unknown"


@both
async def test_an_answer_that_refuses(way: Way) -> None:
    """A large error page costs nothing."""
    head = JSON_HEAD.replace(b"200 OK", b"400 Bad Request")
    script = plays(head, chunk(LARGE[:150_000]), hold)
    async with lab(script, way, streams={"on_disconnect": DRAINS}) as it, asyncio.timeout(10):
        await has_left(it, stream=False)
        async with asyncio.timeout(WITHIN_S):
            await (await it.called()).gone.wait()
        assert (await it.ended("client_gone"))["status"] == 400


# ── every event of every dialect ─────────────────────────────────────────────────────────────────────────


def events_of(route: str) -> list[bytes]:
    stream = mock_stream(route, mock.Behaviour(words=3), prompt="one two three")
    return [each + b"\n\n" for each in stream.split(b"\n\n")[:-1]]


def asks(route: str, passed: int) -> bytes:
    asked = {"model": "m", "stream": True, "messages": [], "input": "x", "prompt": "x", "max_tokens": 9}
    return post(f"/v1{route}", {**asked, "user": str(passed)})


class Stepwise:
    """So many events as the request says, and the rest once its caller has been seen to leave."""

    def __init__(self, events: list[bytes]) -> None:
        self.events = events
        self.go_on = asyncio.Event()

    async def __call__(self, call: Call) -> None:
        passed = int(json.loads(call.body)["user"])
        self.go_on.clear()
        await call.send(HEAD + b"".join(chunk(each) for each in self.events[:passed]))
        await self.go_on.wait()
        if not call.reader.at_eof():
            await call.send(b"".join(chunk(each) for each in self.events[passed:]) + END)


async def leaves_after(it: Lab, route: str, events: list[bytes]) -> None:
    wanted = b"".join(events)
    async with await Caller.connect(it.port) as caller:
        await caller.send(asks(route, len(events)))
        answer = await caller.head()
        while len(answer.body) < len(wanted):
            await caller.piece(answer)
        assert answer.body == wanted


@both
@pytest.mark.parametrize("route", sorted(ROUTES))
async def test_leaving_after_each_event(way: Way, route: str) -> None:
    """Read on: what was reported, wherever the caller left."""
    script = Stepwise(events_of(route))
    whole = find_in_tail(ROUTES[route], b"", b"".join(script.events))
    assert whole is not None
    async with lab(script, way, streams={"on_disconnect": DRAINS}) as it, asyncio.timeout(25):
        for count in range(1, len(script.events)):
            await leaves_after(it, route, script.events[:count])
            await until(lambda: it.headrace.server.core.draining_for_usage == 1)
            script.go_on.set()
            await left(it, whole.prompt_tokens, whole.completion_tokens, count=count)


@both
@pytest.mark.parametrize("route", sorted(ROUTES))
async def test_cancelling_after_each_event(way: Way, route: str) -> None:
    """Cancelled: what was reported until then, else an estimate that says so and grows with what passed."""
    script = Stepwise(events_of(route))
    guesses = []
    async with lab(script, way) as it, asyncio.timeout(25):
        for count in range(1, len(script.events)):
            passed = script.events[:count]
            await leaves_after(it, route, passed)
            line = await it.ended("client_gone", count)
            found = find_in_tail(ROUTES[route], b"".join(passed), b"")
            assert line["usage_source"] == ("estimated" if found is None else "reported"), (passed[-1], line)
            assert line["prompt_tokens"] > 0
            guesses.append(line["completion_tokens"])
            script.go_on.set()
    assert guesses[0] <= guesses[-1]
    assert 1 <= guesses[-1] <= 5 * 3


@both
async def test_what_cannot_be_read_is_unknown(way: Way) -> None:
    """A compressed stream, and one of a route whose events are no pieces of text: no estimate is made up."""
    encoded = HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")

    async def script(call: Call) -> None:
        is_speech = b"/audio/speech" in call.head
        await call.send((HEAD if is_speech else encoded) + chunk(A * 3))
        await hold(call)

    requests = [chat(), post("/v1/audio/speech", {"model": "m", "input": "x", "voice": "v"})]
    async with lab(script, way) as it, asyncio.timeout(10):
        for count, request in enumerate(requests, 1):
            async with await Caller.connect(it.port) as caller:
                await caller.send(request)
                await caller.piece(await caller.head())
            line = await it.ended("client_gone", count)
            assert line["usage_source"] == "unknown"
