"""Two upstreams at once: who is asked too and when, who wins, and that the other one is gone at once."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from proxy.errors import Reason
from tests.kit.callers import Answer, Caller, ask, chat
from tests.kit.headrace import until
from tests.kit.lab import Gate, Way, both, plays, response
from tests.kit.pool import (
    BLACKHOLE,
    REFUSES,
    Place,
    Pool,
    hangs_up,
    in_order,
    in_turn,
    pool,
    refuses_with,
    says,
    silent,
    streams,
)
from tests.kit.upstreams import DONE, HEAD, Call, Script, chunk, event

pytestmark = pytest.mark.timeout(30)

#: The loser's connection is closed within this time (contract: 100 ms; five times that on a busy machine).
CLOSED_WITHIN_S = 0.5
POST = chat(stream=False)


def hedged(names: str = "ab", after: float = 0.05, **more: Any) -> dict[str, Any]:
    """A model whose second upstream is asked too after this many seconds."""
    return {"m": {"upstreams": in_order(names), "hedge_after": after, **more}}


async def gone(*calls: Call) -> None:
    async with asyncio.timeout(CLOSED_WITHIN_S):
        for call in calls:
            await call.gone.wait()


async def slots(it: Pool) -> dict[str, int]:
    """Places that are taken, by upstream, and the machine's."""
    names = ["machine", *(f"upstream:{name}" for name in it.upstreams)]
    taken = await it.core.admission.state.peek_slots(names, time.monotonic())
    return {name.removeprefix("upstream:"): count for name, count in zip(names, taken, strict=True) if count}


def retries(it: Pool) -> int:
    """What the budget counts as spent."""
    spent: int = it.core.retry_budget._retries
    return spent


# ── who wins ────────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("stream", [True, False])
async def test_the_second_wins(way: Way, stream: bool) -> None:
    async with pool(silent, plays(streams("b") if stream else says("b")), way=way, models=hedged()) as it:
        answer = await ask(it.port, chat(stream=stream))
        await gone(it.calls("a")[0])
        assert (answer.status, answer.clean) == (200, True)
        assert answer.body == (event("b") + DONE if stream else b'{"from": "b"}')
        assert answer.headers["x-headrace-upstream"] == "b"
        assert answer.headers["x-headrace-attempts"] == "2"
        line = await it.ended("complete", 2)
        assert line["upstream"] == "b"
        assert it.hits == {"a": 1, "b": 1}
        assert await it.attempts() == {"a": {"cancelled": 1}, "b": {"ok": 1}}
        assert retries(it) == 1


@both
@pytest.mark.parametrize("stream", [True, False])
async def test_the_first_wins_after_all(way: Way, stream: bool) -> None:
    gate = Gate()
    first = plays(gate, streams("a") if stream else says("a"))
    async with pool(first, silent, way=way, models=hedged()) as it:
        asking = asyncio.ensure_future(ask(it.port, chat(stream=stream)))
        second = await it.called("b")
        gate.open()
        answer = await asking
        await gone(second)
        assert answer.body == (event("a") + DONE if stream else b'{"from": "a"}')
        assert answer.headers["x-headrace-upstream"] == "a"
        line = await it.ended("complete", 2)
        assert line["upstream"] == "a"
        assert await it.attempts() == {"a": {"ok": 1}, "b": {"cancelled": 1}}


@both
async def test_both_answer_at_once(way: Way) -> None:
    """One answer, whole; the other is counted as cancelled, whatever had come of it."""
    gate = Gate()
    scripts = plays(gate, streams("a")), plays(gate, streams("b"))
    async with pool(*scripts, way=way, models=hedged()) as it:
        asking = asyncio.ensure_future(ask(it.port, chat()))
        await it.called("b")
        gate.open()
        answer = await asking
        winner = answer.headers["x-headrace-upstream"]
        assert answer.body == event(winner) + DONE
        await it.ended("complete", 2)
        loser = "b" if winner == "a" else "a"
        assert await it.attempts() == {winner: {"ok": 1}, loser: {"cancelled": 1}}


@both
async def test_the_loser_has_begun_its_answer(way: Way) -> None:
    """A head without a byte of the body is no answer yet."""
    async with pool(plays(HEAD, Call.watch), plays(streams("b")), way=way, models=hedged()) as it:
        answer = await ask(it.port, chat())
        await gone(it.calls("a")[0])
        assert answer.body == event("b") + DONE
        await it.ended("complete", 2)


@both
async def test_nobody_is_slow(way: Way) -> None:
    async with pool(plays(says("a")), plays(says("b")), way=way, models=hedged(after=5.0)) as it:
        assert (await ask(it.port, POST)).json() == {"from": "a"}
        await it.ended("complete", 1)
        assert it.hits == {"a": 1}
        assert retries(it) == 0


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("first", [refuses_with(503), REFUSES], ids=["503", "refused"])
async def test_the_first_fails_before_it_is_slow(way: Way, first: Script | Place) -> None:
    """That is a retry like any other, at once."""
    async with pool(first, plays(says("b")), way=way, models=hedged(after=8.0)) as it:
        began_at = time.monotonic()
        assert (await ask(it.port, POST)).json() == {"from": "b"}
        assert time.monotonic() - began_at < 4.0
        await it.ended("complete", 2)


@both
@pytest.mark.parametrize("second", [refuses_with(503), REFUSES, hangs_up], ids=["503", "refused", "fin"])
async def test_the_second_fails(way: Way, second: Script | Place) -> None:
    """The first one goes on as if nothing had been."""
    gate = Gate()
    async with pool(plays(gate, says("a")), second, way=way, models=hedged()) as it:
        asking = asyncio.ensure_future(ask(it.port, POST))
        await until(lambda: it.core.metrics.upstream_attempts.values or it.core.upstreams["b"].in_flight)
        await until(lambda: len(it.core.running) == 1 and next(iter(it.core.running)).attempts == 2)
        gate.open()
        answer = await asking
        assert answer.json() == {"from": "a"}
        assert answer.headers["x-headrace-upstream"] == "a"
        line = await it.ended("complete", 2)
        assert line["upstream"] == "a"


@both
async def test_the_first_fails_while_both_run(way: Way) -> None:
    gates = Gate(), Gate()
    scripts = plays(gates[0], response(503, b"{}")), plays(gates[1], says("b"))
    async with pool(*scripts, way=way, models=hedged()) as it:
        asking = asyncio.ensure_future(ask(it.port, POST))
        await it.called("b")
        gates[0].open()
        await until(lambda: it.core.upstreams["a"].breaker._failed_at)  # its verdict is in
        gates[1].open()
        assert (await asking).json() == {"from": "b"}
        await it.ended("complete", 2)
        assert await it.attempts() == {"a": {"status": 1}, "b": {"ok": 1}}


@both
@pytest.mark.parametrize("last", ["a", "b"])
async def test_both_fail(way: Way, last: str) -> None:
    """One error: the last one's answer, under its name."""
    gates = {"a": Gate(), "b": Gate()}
    scripts = [plays(gates[name], response(503, b'{"of": "%b"}' % name.encode())) for name in "ab"]
    first = "b" if last == "a" else "a"
    async with pool(*scripts, way=way, models=hedged(), retry={"attempts": 2}) as it:
        asking = asyncio.ensure_future(ask(it.port, POST))
        await it.called("b")
        gates[first].open()
        await until(lambda: it.core.upstreams[first].breaker._failed_at)
        gates[last].open()
        answer = await asking
        assert (answer.status, answer.json()) == (503, {"of": last})
        assert answer.headers["x-headrace-upstream"] == last
        assert answer.headers["x-should-retry"] == "false"
        line = await it.ended("upstream_error", 2)
        assert line["upstream"] == last
        assert await it.attempts() == {"a": {"status": 1}, "b": {"status": 1}}


@both
async def test_both_fail_and_a_third_is_asked(way: Way) -> None:
    """With a slot of its own: those of the race are given back."""
    gates = Gate(), Gate()
    scripts = plays(gates[0], response(503, b"{}")), plays(gates[1], response(503, b"{}")), plays(says("c"))
    async with pool(*scripts, way=way, models=hedged("abc")) as it:
        asking = asyncio.ensure_future(ask(it.port, POST))
        await it.called("b")
        for gate in gates:
            gate.open()
        assert (await asking).json() == {"from": "c"}
        await it.ended("complete", 3)
        assert it.hits == {"a": 1, "b": 1, "c": 1}


@both
async def test_one_that_may_still_be_generating(way: Way) -> None:
    """A POST that broke after it was sent: no third attempt, whatever the second one answers."""
    gates = Gate(), Gate()
    scripts = plays(gates[0], hangs_up), plays(gates[1], response(503, b"{}")), plays(says("c"))
    async with pool(*scripts, way=way, models=hedged("abc")) as it:
        asking = asyncio.ensure_future(ask(it.port, POST))
        await it.called("b")
        gates[0].open()
        await until(lambda: it.core.upstreams["a"].breaker._failed_at)
        gates[1].open()
        answer = await asking
        assert answer.status == 503
        await it.ended("upstream_error", 2)
        assert it.hits == {"a": 1, "b": 1}


async def test_a_stale_connection_of_the_second() -> None:
    """It is repeated there, not at the first one, and with a slot of that upstream. (On the wire: the public
    way cannot know a kept connection.)"""
    gates = Gate(), Gate()
    first = plays(gates[0], response(503, b"{}"))
    second = in_turn(plays(says("warm")), plays(gates[1], hangs_up), plays(says("b")))
    models = hedged() | {"warm": {"upstreams": ["b"]}}
    async with pool(first, second, way=Way(push=True), models=models) as it:
        await ask(it.port, chat(stream=False, model="warm"))
        asking = asyncio.ensure_future(ask(it.port, POST))
        await it.called("b", 2)
        gates[0].open()
        await until(lambda: it.core.upstreams["a"].breaker._failed_at)
        gates[1].open()
        answer = await asking
        assert answer.json() == {"from": "b"}
        assert answer.headers["x-headrace-upstream"] == "b"
        await it.ended("complete", 3, count=2)
        assert it.hits == {"a": 1, "b": 3}
        assert await it.attempts() == {"a": {"status": 1}, "b": {"ok": 2, "reset": 1}}


# ── slots and budget ────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("winner", ["a", "b"])
async def test_slots(way: Way, winner: str) -> None:
    """Two during the race, the winner's after it, none at the end."""
    gates, end = {"a": Gate(), "b": Gate()}, Gate()
    scripts = [
        plays(gates[name], HEAD + chunk(event(name)), end, chunk(DONE) + b"0\r\n\r\n") for name in "ab"
    ]
    async with pool(*scripts, way=way, models=hedged()) as it, await Caller.connect(it.port) as caller:
        await caller.send(chat())
        await it.called("b")
        assert await slots(it) == {"machine": 1, "a": 1, "b": 1}
        gates[winner].open()
        answer = await caller.head()
        assert await caller.piece(answer) == event(winner)
        await until(lambda: it.core.upstreams["b" if winner == "a" else "a"].in_flight == 0)
        async with asyncio.timeout(1.0):
            while await slots(it) != {"machine": 1, winner: 1}:
                await asyncio.sleep(0.005)
        for gate in (*gates.values(), end):
            gate.open()
        assert (await caller.rest(answer)).clean
        await it.ended("complete", 2)


@both
async def test_no_budget(way: Way) -> None:
    gate = Gate()
    async with pool(
        plays(gate, says("a")), plays(says("b")), way=way, models=hedged(), retry={"budget": 0}
    ) as it:
        asking = asyncio.ensure_future(ask(it.port, POST))
        await it.called("a")
        await asyncio.sleep(0.15)  # three times hedge_after: nothing happens, and that is what is seen here
        assert it.hits == {"a": 1}
        gate.open()
        assert (await asking).json() == {"from": "a"}
        await it.ended("complete", 1)


@both
@pytest.mark.alone
async def test_the_budget_of_a_slow_hour(way: Way) -> None:
    """Everybody is slow, and all 100 would hedge: every fifth may."""
    gate = Gate()
    scripts = plays(gate, says("a")), plays(gate, says("b"))
    async with pool(*scripts, way=way, models=hedged(after=0.01)) as it:
        asking = [asyncio.ensure_future(ask(it.port, POST)) for _ in range(100)]
        await it.called("a", 100)
        await it.called("b", 20)
        await asyncio.sleep(0.1)  # no more of them come
        gate.open()
        assert {answer.status for answer in await asyncio.gather(*asking)} == {200}
        await it.settled(100)
        assert it.hits == {"a": 100, "b": 20}


@both
async def test_full(way: Way) -> None:
    """A hedge waits for no slot."""
    gates = Gate(), Gate()
    scripts = plays(gates[0], says("a")), plays(gates[1], says("b"))
    models = hedged() | {"other": {"upstreams": ["b"]}}
    async with pool(*scripts, way=way, models=models, each={"b": {"max_in_flight": 1}}) as it:
        holding = asyncio.ensure_future(ask(it.port, chat(stream=False, model="other")))
        await it.called("b")
        asking = asyncio.ensure_future(ask(it.port, POST))
        await it.called("a")
        await asyncio.sleep(0.15)  # three times hedge_after
        assert it.hits == {"a": 1, "b": 1}
        for gate in gates:
            gate.open()
        assert (await asking).json() == {"from": "a"}
        assert (await holding).json() == {"from": "b"}
        await it.settled(2)
        assert retries(it) == 0  # what a hedge took that was not made is given back


@both
@pytest.mark.parametrize("why", ["another model", "attempts"])
async def test_who_is_not_asked_too(way: Way, why: str) -> None:
    """Being slow is no reason for another model; attempts are attempts."""
    gate = Gate()
    models = hedged("a", fallback=["other"]) | {"other": {"upstreams": ["b"]}}
    retry = {}
    if why == "attempts":
        models, retry = hedged(), {"attempts": 1}
    async with pool(plays(gate, says("a")), plays(says("b")), way=way, models=models, retry=retry) as it:
        asking = asyncio.ensure_future(ask(it.port, POST))
        await it.called("a")
        await asyncio.sleep(0.15)  # three times hedge_after
        gate.open()
        assert (await asking).json() == {"from": "a"}
        await it.ended("complete", 1)
        assert it.hits == {"a": 1}


# ── ends from outside ───────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("leave", [Caller.leave, Caller.reset], ids=["fin", "rst"])
async def test_the_reader_leaves(way: Way, leave: Any) -> None:
    async with pool(silent, silent, way=way, models=hedged()) as it:
        caller = await Caller.connect(it.port)
        await caller.send(chat())
        calls = await it.called("a"), await it.called("b")
        leave(caller)
        async with asyncio.timeout(1.0):
            for call in calls:
                await call.gone.wait()
        await it.ended("client_gone", 2)
        assert await it.attempts() == {"a": {"cancelled": 1}, "b": {"cancelled": 1}}


@both
async def test_the_reader_leaves_while_the_second_connects(way: Way) -> None:
    slow = {"b": {"timeouts": {"connect": 20}}}
    async with pool(silent, BLACKHOLE, way=way, models=hedged(), each=slow) as it:
        caller = await Caller.connect(it.port)
        await caller.send(chat())
        await until(lambda: it.core.upstreams["b"].in_flight == 1)
        caller.leave()
        async with asyncio.timeout(1.0):
            await it.calls("a")[0].gone.wait()
        await it.ended("client_gone", 2)


@both
@pytest.mark.parametrize("reason", [Reason.KILLED, Reason.DRAINED])
async def test_stopped(way: Way, reason: Reason) -> None:
    """By the operator, or by the end of a drain."""
    async with pool(silent, silent, way=way, models=hedged()) as it:
        asking = asyncio.ensure_future(ask(it.port, POST))
        calls = await it.called("a"), await it.called("b")
        (ctx,) = it.core.running
        ctx.stop(reason)
        assert (await asking).status == 503
        await gone(*calls)
        await it.ended(reason.value, 2)


@both
async def test_one_deadline(way: Way) -> None:
    """Over both of them."""
    each = {"a": {"timeouts": {"total": 0.3}}}
    async with pool(silent, silent, way=way, models=hedged(), each=each) as it:
        answer = await ask(it.port, POST)
        assert answer.status == 504
        await it.ended("deadline", 2)
        assert await it.attempts() == {"a": {"timeout": 1}, "b": {"timeout": 1}}


# ── after an early 200 ──────────────────────────────────────────────────────────────────────────────────


async def beats_of(caller: Caller, answer: Answer, count: int) -> None:
    for _ in range(count):
        assert await caller.piece(answer) == b": headrace\n"


@both
async def test_a_race_behind_heartbeats(way: Way) -> None:
    """Two wait, and one of them keeps the caller warm."""
    gate = Gate()
    early = {"commit_after": 0.1, "heartbeat": 0.1}
    async with (
        pool(silent, plays(gate, streams("b")), way=way, models=hedged(after=0.02), streams=early) as it,
        await Caller.connect(it.port) as caller,
    ):
        began_at = time.monotonic()
        await caller.send(chat())
        answer = await caller.head()
        await beats_of(caller, answer, 4)
        assert time.monotonic() - began_at >= 0.4 - 0.01  # four of them, not eight
        gate.open()
        await caller.rest(answer)
        assert answer.clean
        assert answer.body.replace(b": headrace\n", b"") == event("b") + DONE
        await it.ended("complete", 2)
