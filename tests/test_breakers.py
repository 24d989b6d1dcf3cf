"""Breakers in a running server: what opens one, who is let through, and what callers and operators see."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from proxy.breaker import State
from tests.kit.callers import Answer, Caller, ask, chat
from tests.kit.headrace import until
from tests.kit.lab import Gate, Way, both, plays, response
from tests.kit.pool import (
    REFUSES,
    Place,
    Pool,
    hangs_up,
    in_turn,
    pool,
    refuses_with,
    resets,
    says,
    silent,
    streams,
)
from tests.kit.upstreams import HEAD, Call, Script, chunk, event

pytestmark = pytest.mark.timeout(30)

POST = chat(stream=False)
CLOSED, OPEN = float(State.CLOSED), float(State.OPEN)


def trips(failures: int = 1, cool_down: float = 60.0, **more: Any) -> dict[str, Any]:
    """Settings of an upstream."""
    return {"breaker": {"failures": failures, "cool_down": cool_down, **more}}


def left_s(it: Pool, name: str = "a") -> float:
    """Seconds until it lets a request through."""
    wait: float = it.core.upstreams[name].breaker.retry_after_s(time.monotonic())
    return wait


async def cooled(it: Pool, name: str = "a") -> None:
    await until(lambda: left_s(it, name) == 0)


async def cut(call: Call) -> None:
    """Ends in the middle of a stream."""
    await call.send(HEAD + chunk(event("a")))
    call.close()


FAULTS: dict[str, Script | Place] = {
    "refused": REFUSES,
    "500": refuses_with(500),
    "503": refuses_with(503),
    "529": refuses_with(529),
    "silent": silent,
    "fin": hangs_up,
    "rst": resets,
    "cut": cut,
    "no http": plays(b"SSH-2.0-x\r\n\r\n", Call.close),
}
ONE = {"attempts": 1}


# ── what opens it ───────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_opens(way: Way, fault: Script | Place) -> None:
    """After as many failures as configured; from then on callers are told at once, and nobody is asked."""
    settings = trips(3) | {"timeouts": {"first_byte": 0.1, "connect": 0.2}}
    async with pool(fault, way=way, upstream=settings, retry=ONE) as it:
        for _ in range(2):
            await ask(it.port, chat())
        await it.settled(2)
        assert await it.level("breaker_state", "a") == CLOSED
        assert await it.level("upstream_available", "a") == 1
        await ask(it.port, chat())
        await it.settled(3)
        assert await it.level("breaker_state", "a") == OPEN
        assert await it.level("upstream_available", "a") == 0
        hits = it.hits
        answer = await ask(it.port, chat())
        assert (answer.status, answer.json()["error"]["code"]) == (503, "no_upstream_available")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        line = await it.ended("rejected", 0, count=4)
        assert (line["upstream"], line["model"], line["status"]) == (None, "m", 503)
        assert it.hits == hits


@both
@pytest.mark.alone
async def test_refused_at_once(way: Way) -> None:
    """In the time of an answer of our own: below 5 ms, five times that here."""
    async with pool(REFUSES, way=way, upstream=trips(), retry=ONE) as it:
        await ask(it.port, POST)
        took_s = []
        async with await Caller.connect(it.port) as caller:
            for _ in range(20):
                began_at = time.monotonic()
                assert (await caller.ask(POST)).status == 503
                took_s.append(time.monotonic() - began_at)
        assert sorted(took_s)[10] < 0.025, took_s
        await it.settled(21)


@both
@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 422, 429])
async def test_does_not_open(way: Way, status: int) -> None:
    """What speaks of one caller, or of our credential."""
    async with pool(refuses_with(status), way=way, upstream=trips(), retry=ONE) as it:
        for _ in range(5):
            await ask(it.port, POST)
        await it.settled(5)
        assert await it.level("breaker_state", "a") == CLOSED
        assert it.hits == {"a": 5}


@both
async def test_one_attempt_is_one_failure(way: Way) -> None:
    """A 503 whose body then breaks off is not two."""
    script = plays(b"HTTP/1.1 503 No\r\nContent-Length: 9\r\n\r\n{", Call.close)
    async with pool(script, way=way, upstream=trips(2), retry=ONE) as it:
        await ask(it.port, POST)
        assert await it.level("breaker_state", "a") == CLOSED
        await ask(it.port, POST)
        assert await it.level("breaker_state", "a") == OPEN
        await it.settled(2)


@both
async def test_attempts_of_one_request_add_up(way: Way) -> None:
    """The third attempt finds it open: the answer that is there passes."""
    async with pool(refuses_with(503), way=way, upstream=trips(2), retry={"attempts": 5}) as it:
        answer = await ask(it.port, POST)
        assert answer.status == 503
        assert answer.body == b'{"error":{"message":"no"}}'
        await it.ended("upstream_error", 2)
        assert it.hits == {"a": 2}


@both
async def test_half_of_four(way: Way) -> None:
    """All fail: two are ejected, the others are still asked."""
    names = "abcd"
    models = {"m": {"upstreams": list(names)}}
    async with pool(
        *[refuses_with(503)] * 4,
        way=way,
        models=models,
        upstream=trips(2),
        retry={"attempts": 4, "budget": 1},
    ) as it:
        for _ in range(5):
            assert (await ask(it.port, POST)).status == 503
        await it.settled(5)
        states = [await it.level("breaker_state", name) for name in names]
        assert sorted(states) == [CLOSED, CLOSED, OPEN, OPEN]


# ── half-open ───────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.alone
async def test_exactly_one_of_fifty(way: Way) -> None:
    """Is the trial; its success closes the breaker for everybody."""
    gate = Gate()
    script = in_turn(refuses_with(503), plays(gate, says("a")), plays(says("a")))
    async with pool(script, way=way, upstream=trips(cool_down=0.1), retry=ONE) as it:
        await ask(it.port, POST)
        await cooled(it)
        asking = [asyncio.ensure_future(ask(it.port, POST)) for _ in range(50)]
        await until(lambda: sum(each.done() for each in asking) == 49)
        refused = [each.result() for each in asking if each.done()]
        assert {answer.status for answer in refused} == {503}
        assert {answer.headers["retry-after"] for answer in refused} == {"1"}
        assert it.hits == {"a": 2}
        assert await it.level("breaker_state", "a") == State.HALF_OPEN
        gate.open()
        answers = await asyncio.gather(*asking)
        assert sum(answer.status == 200 for answer in answers) == 1
        assert await it.level("breaker_state", "a") == CLOSED
        assert (await ask(it.port, POST)).status == 200
        await it.settled(52)
        assert it.hits == {"a": 3}


@both
@pytest.mark.alone
async def test_a_failed_trial_doubles(way: Way) -> None:
    async with pool(refuses_with(503), way=way, upstream=trips(cool_down=0.2), retry=ONE) as it:
        await ask(it.port, POST)
        assert 0.1 < left_s(it) <= 0.2
        await cooled(it)
        assert (await ask(it.port, POST)).body == b'{"error":{"message":"no"}}'
        assert 0.2 < left_s(it) <= 0.4
        await it.settled(2)
        assert it.hits == {"a": 2}


@both
async def test_max_cool_down(way: Way) -> None:
    settings = trips(cool_down=0.1, max_cool_down=0.1)
    async with pool(refuses_with(503), way=way, upstream=settings, retry=ONE) as it:
        for count in range(1, 4):
            await cooled(it)
            await ask(it.port, POST)
            assert left_s(it) <= 0.1
            assert it.hits == {"a": count}
        await it.settled(3)


@both
async def test_the_first_byte_ends_a_trial(way: Way) -> None:
    """A stream of minutes does not keep everybody else out."""
    gate = Gate()
    long = plays(HEAD + chunk(event("a")), gate, chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    script = in_turn(refuses_with(503), long, plays(says("a")))
    async with (
        pool(script, way=way, upstream=trips(cool_down=0.1), retry=ONE) as it,
        await Caller.connect(it.port) as caller,
    ):
        await ask(it.port, POST)
        await cooled(it)
        await caller.send(chat())
        answer = await caller.head()
        assert await caller.piece(answer) == event("a")
        assert (await ask(it.port, POST)).status == 200
        gate.open()
        assert (await caller.rest(answer)).clean
        await it.settled(3)


async def leaves(it: Pool, caller: Caller) -> None:
    caller.leave()


async def is_killed(it: Pool, caller: Caller) -> None:
    (running,) = it.headrace.server.streams()
    it.headrace.server.kill(running["id"])
    assert (await caller.head(Answer())).status == 503


@both
@pytest.mark.parametrize("end", [leaves, is_killed])
async def test_a_trial_without_a_verdict(way: Way, end: Any) -> None:
    """The next request is the trial."""
    script = in_turn(refuses_with(503), silent, plays(says("a")))
    async with pool(script, way=way, upstream=trips(cool_down=0.1), retry=ONE) as it:
        await ask(it.port, POST)
        await cooled(it)
        async with await Caller.connect(it.port) as caller:
            await caller.send(POST)
            call = await it.called("a", 2)
            assert (await ask(it.port, POST)).status == 503
            await end(it, caller)
            async with asyncio.timeout(1.0):
                await call.gone.wait()
        await it.settled(3)
        assert (await ask(it.port, POST)).json() == {"from": "a"}
        assert await it.level("breaker_state", "a") == CLOSED
        await it.settled(4)


@both
async def test_a_trial_that_loses_a_race(way: Way) -> None:
    """Was only slow: no verdict, and the next one is the trial."""
    script = in_turn(refuses_with(503), silent, plays(says("a")))
    models = {
        "m": {"upstreams": [{"name": "a"}, {"name": "b", "tier": 2}], "hedge_after": 0.05},
        "only": {"upstreams": ["a"]},
    }
    async with pool(script, plays(says("b")), way=way, upstream=trips(cool_down=0.1), models=models) as it:
        assert (await ask(it.port, POST)).json() == {"from": "b"}
        await cooled(it)
        assert (await ask(it.port, POST)).json() == {"from": "b"}
        await it.settled(2)
        assert await it.level("breaker_state", "a") == State.HALF_OPEN
        assert (await ask(it.port, chat(stream=False, model="only"))).json() == {"from": "a"}
        assert await it.level("breaker_state", "a") == CLOSED
        await it.settled(3)


# ── among others ────────────────────────────────────────────────────────────────────────────────────────


@both
async def test_an_open_one_is_passed_by(way: Way) -> None:
    """No attempt is spent on it."""
    async with pool(refuses_with(503), plays(streams("b")), way=way, upstream=trips()) as it:
        await ask(it.port, chat())
        for _ in range(3):
            answer = await ask(it.port, chat())
            assert answer.headers["x-headrace-upstream"] == "b"
            assert answer.headers["x-headrace-attempts"] == "1"
        await it.settled(4)
        assert it.hits == {"a": 1, "b": 4}


@both
async def test_the_admin_listener_after_recovery(way: Way) -> None:
    """What an operator's graph shows: 2, and 0 again."""
    script = in_turn(plays(response(500, b"{}")), plays(says("a")))
    async with pool(script, way=way, upstream=trips(cool_down=0.1), retry=ONE) as it:
        await ask(it.port, POST)
        assert await it.level("breaker_state", "a") == OPEN
        await cooled(it)
        assert await it.level("upstream_available", "a") == 1
        await ask(it.port, POST)
        assert await it.level("breaker_state", "a") == CLOSED
        await it.settled(2)
