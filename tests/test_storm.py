"""Everything goes wrong at once, by a seed: faulty upstreams, callers that leave, full places, hedges. At the
end nothing is held, and everything was counted exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from typing import Any

import pytest

from tests.kit.callers import Answer, Caller, chat
from tests.kit.headrace import until
from tests.kit.lab import Way, both, response
from tests.kit.pool import REFUSES, Pool, pool, says, streams
from tests.kit.upstreams import HEAD, Call, Script, chunk, event

pytestmark = pytest.mark.timeout(60)

REQUESTS = 300
AT_ONCE = 60
POLICY = {"attempts": 4, "base": 0.005, "max": 0.05}
SETTINGS = {
    "max_in_flight": 25,
    "timeouts": {"connect": 1.0, "first_byte": 0.15, "idle": 0.15, "total": 1.0},
    "breaker": {"failures": 6, "window": 0.5, "cool_down": 0.03, "max_cool_down": 0.1},
}
ENDS = {
    "complete",
    "client_gone",
    "upstream_error",
    "upstream_cut",
    "upstream_stall",
    "deadline",
    "rejected",
}


async def close(call: Call) -> None:
    call.close()


async def reset(call: Call) -> None:
    call.reset()


async def refuse(call: Call) -> None:
    await call.send(response(503, b"{}"))


async def limit(call: Call) -> None:
    await call.send(response(429, b"{}", "retry-after-ms: 10"))


async def stall(call: Call) -> None:
    await call.watch()


async def half_a_refusal(call: Call) -> None:
    await call.send(b"HTTP/1.1 503 No\r\nContent-Length: 9\r\n\r\n{")
    await call.watch()


async def cut(call: Call) -> None:
    await call.send(HEAD + chunk(event("x")))
    call.close()


async def stuck(call: Call) -> None:
    await call.send(HEAD + chunk(event("x")))
    await call.watch()


async def answer(call: Call) -> None:
    await call.send(streams("x") if b'"stream": true' in call.body else says("x"))


FAULTS = (close, reset, refuse, refuse, limit, stall, half_a_refusal, cut, stuck)


def moody(rng: random.Random, share: float) -> Script:
    """Fails that often, in any way, and is slow now and then."""

    async def script(call: Call) -> None:
        if rng.random() < 0.2:
            await asyncio.sleep(rng.random() * 0.05)
        await (rng.choice(FAULTS) if rng.random() < share else answer)(call)

    return script


async def calls(it: Pool, rng: random.Random, tickets: asyncio.Semaphore) -> Answer | None:
    """One request to its end, or until its caller leaves (None)."""
    async with tickets, await Caller.connect(it.port) as caller:
        stays_s = rng.random() * 0.1 if rng.random() < 0.25 else 15.0
        await caller.send(chat(stream=rng.random() < 0.5))
        try:
            async with asyncio.timeout(stays_s):
                return await caller.rest(await caller.head())
        except TimeoutError:
            with contextlib.suppress(OSError):
                rng.choice((Caller.leave, Caller.reset))(caller)
            return None


@both
@pytest.mark.parametrize("hedge_after", [None, 0.02], ids=["alone", "hedged"])
@pytest.mark.parametrize("seed", [1, 2])
async def test_storm(way: Way, hedge_after: float | None, seed: int) -> None:
    rng = random.Random(seed)
    targets: list[Any] = ["a", "b", {"name": "c", "weight": 2}, {"name": "d", "weight": 0.3}]
    model: dict[str, Any] = {"upstreams": targets}
    if hedge_after is not None:
        model["hedge_after"] = hedge_after
    places = [moody(rng, share) for share in (0.1, 0.3, 0.6)]
    async with pool(
        *places,
        REFUSES,
        way=way,
        models={"m": model},
        upstream=SETTINGS,
        retry=POLICY,
        streams={"commit_after": 0.05, "heartbeat": 0.02},
        limits={"max_in_flight": 50, "queue": {"max_waiting": 20, "max_wait": 0.5}},
    ) as it:
        tickets = asyncio.Semaphore(AT_ONCE)
        answers = await asyncio.gather(*[calls(it, rng, tickets) for _ in range(REQUESTS)])
        await until(lambda: not it.core.running)
        lines = it.headrace.log_lines()
        # One that left before its head was read never was a request.
        stayed = sum(each is not None for each in answers)
        assert stayed <= len(lines) <= REQUESTS
        await it.settled(len(lines))
        reasons = Counter(line["reason"] for line in lines)
        assert set(reasons) <= ENDS, reasons
        assert reasons["client_gone"] <= REQUESTS - stayed
        assert {"complete", "client_gone"} <= set(reasons)
        assert all(line["attempts"] <= POLICY["attempts"] for line in lines)
        assert all((line["attempts"] == 0) == (line["upstream"] is None) for line in lines)
        attempts = {name: sum(results.values()) for name, results in (await it.attempts()).items()}
        assert all(attempts[name] >= count for name, count in it.hits.items())
        assert sum(it.hits.values()) <= 1.2 * len(lines)
        assert it.core.admission.slots.waiting == 0
