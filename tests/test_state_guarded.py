"""What happens while the shared store is gone: who decides, for how long, and what is told about it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from proxy.state import Charge, Slot, Spend, StoreUnavailable, memory
from proxy.state.guarded import Guarded, Policy
from proxy.state.redis import RedisState
from tests.kit.chaos import Chaos, Fault, chaos
from tests.kit.redis import RedisServer, redis_server

pytestmark = [pytest.mark.timeout(60), pytest.mark.alone]

#: Four times the real one, which tests/test_state_redis.py has: a machine full of other work may keep Redis
#: waiting for its processor longer than that, and then it is gone.
BUDGET_S = 0.2
#: Deadlines are five times what is promised: these machines are shared.
SLACK = 5
PROBE_S = 0.05
FAR = 4e9
#: Nothing comes back in the time of a test.
CHARGE = Charge("a", 0.1, 100_000)


class Site:
    """A guarded store behind a bad network, what it told, and Redis as others see it."""

    def __init__(self, guarded: Guarded, proxy: Chaos, server: RedisServer, lines: list[Any]) -> None:
        self.guarded = guarded
        self.proxy = proxy
        self.server = server
        self.lines = lines
        self.told: list[bool] = []

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self.lines]

    async def lose(self) -> None:
        """The network is gone, and the store knows it."""
        await self.proxy.become(Fault(blackhole=True))
        await self.guarded.renew(time.monotonic())
        assert not self.guarded.up

    async def regain(self) -> None:
        await self.proxy.become(Fault())
        await until(lambda: self.guarded.up)


async def until(true: Callable[[], bool], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def site(policy: Policy) -> AsyncIterator[Site]:
    fd = memory.create()
    try:
        async with redis_server() as server, chaos(server.port) as proxy:
            remote = RedisState(f"redis://127.0.0.1:{proxy.port}", BUDGET_S)
            guarded = Guarded(
                remote, memory.attach(fd, 0), policy, lambda up: made.told.append(up), probe_every_s=PROBE_S
            )
            with capture_logs() as lines:
                made = Site(guarded, proxy, server, lines)
                guarded.start()
                yield made
                await guarded.close()
    finally:
        os.close(fd)


async def remaining(guarded: Guarded) -> int:
    (decision,) = await guarded.peek([Charge("a", 0.1, 100_000, 0)], time.monotonic())
    return decision.remaining


# ── under load ───────────────────────────────────────────────────────────────────────────────────


async def work(guarded: Guarded, longest: list[float], stop: asyncio.Event) -> int:
    """All verbs in turn, timed, as requests would call them. Any exception fails the test."""
    rounds = 0

    async def timed(verb: Awaitable[Any]) -> Any:
        begin = time.monotonic()
        try:
            return await verb
        finally:
            longest[0] = max(longest[0], time.monotonic() - begin)

    while not stop.is_set():
        now, wall = time.monotonic(), time.time()
        rounds += 1
        await timed(guarded.take([CHARGE, Charge("b", 60, 10)], now))
        lease = await timed(guarded.acquire([Slot("machine", 1000), Slot("a", 1000)], now))
        assert lease is not None
        await timed(guarded.spend([Spend("a", 5, 2**40, FAR)], wall))
        await timed(guarded.peek([CHARGE], now))
        await timed(guarded.peek_slots(["machine"], now))
        await timed(guarded.peek_spend(["a"], wall))
        await timed(guarded.settle([Charge("a", 0.1, 100_000, -1)], now))
        await timed(guarded.settle_spend([Spend("a", -1, 2**40, FAR)], wall))
        await timed(guarded.release(lease))
        await timed(guarded.renew(now))
        await asyncio.sleep(0.002)
    return rounds


@asynccontextmanager
async def load(made: Site) -> AsyncIterator[None]:
    """Eight callers all the time; nobody was failed, nobody waited longer than the budget."""
    longest, stop = [0.0], asyncio.Event()
    callers = [asyncio.create_task(work(made.guarded, longest, stop)) for _ in range(8)]
    try:
        await asyncio.sleep(0.2)
        yield
        await asyncio.sleep(0.2)
    finally:
        stop.set()
        rounds = await asyncio.gather(*callers)
    assert sum(rounds) > 50
    assert longest[0] < BUDGET_S * SLACK


async def gone_and_back(
    made: Site, harm: Callable[[], Awaitable[Any]], heal: Callable[[], Awaitable[Any]]
) -> None:
    """One change there and one back, each told once; slots of all kinds are free at the end."""
    async with load(made):
        assert made.told == []
        await harm()
        await until(lambda: not made.guarded.up)
        await asyncio.sleep(PROBE_S * 5)
        assert (made.told, made.events) == ([False], ["state_store_down"])
        await heal()
        await until(lambda: made.guarded.up)
        await asyncio.sleep(PROBE_S * 3)
    assert (made.told, made.events) == ([False, True], ["state_store_down", "state_store_up"])
    down, up = made.lines
    assert (down["log_level"], down["on_store_failure"]) == ("error", "local")
    assert down["error"]
    assert (up["log_level"], up["gone_s"] > 0) == ("warning", True)
    await made.guarded.renew(time.monotonic())
    assert await made.guarded.peek_slots(["machine", "a"], time.monotonic()) == [0, 0]
    await made.lose()
    assert await made.guarded.peek_slots(["machine", "a"], time.monotonic()) == [0, 0]


FAULTS = {
    "refuse": Fault(refuse=True),
    "reset": Fault(reset=True),
    "blackhole": Fault(blackhole=True),
    "slow": Fault(delay_s=1.0),
    "throttled": Fault(bytes_per_s=10),
    "cut": Fault(cut_after=3),
    "garbage": Fault(garbage=b"\x00\xff" * 50),
    "loading": Fault(garbage=b"-LOADING Redis is loading the dataset in memory\r\n"),
}


#: Each takes two seconds; these are much like others, and tests/test_state_redis.py has each of them.
LATER = ("reset", "slow", "throttled", "cut", "loading")
faults = [
    pytest.param(fault, id=name, marks=[pytest.mark.slow] if name in LATER else [])
    for name, fault in FAULTS.items()
]


@pytest.mark.parametrize("fault", faults)
async def test_a_bad_network_under_load(fault: Fault) -> None:
    """Nobody notices but the log."""
    async with site("local") as made:
        await gone_and_back(made, lambda: made.proxy.become(fault), lambda: made.proxy.become(Fault()))


async def test_killed_and_restarted_under_load() -> None:
    """SIGKILL, and an empty one in its place."""
    async with site("local") as made:
        await gone_and_back(made, made.server.kill, made.server.restart)


async def test_stopped_under_load() -> None:
    """Redis itself hangs for a while."""
    async with site("local") as made, made.server.client() as client:
        sleep: list[asyncio.Task[Any]] = []

        async def hang() -> None:
            sleep.append(asyncio.create_task(client.execute_command("DEBUG", "SLEEP", "0.8")))

        await gone_and_back(made, hang, lambda: sleep[0])


async def test_full_memory_under_load() -> None:
    """OOM is a failure like any other; slots were given back meanwhile."""
    async with site("local") as made, made.server.client() as client:
        await gone_and_back(
            made, lambda: client.config_set("maxmemory", "1mb"), lambda: client.config_set("maxmemory", "0")
        )


async def test_a_replica_under_load() -> None:
    """So is a server that takes no writes, although it answers."""
    async with site("local") as made, made.server.client() as client:
        await gone_and_back(
            made, lambda: client.replicaof("127.0.0.1", "1"), lambda: client.replicaof("NO", "ONE")
        )


async def test_flushes_under_load() -> None:
    """They are no failure: limits begin anew, nothing is told."""
    async with site("local") as made, made.server.client() as client:
        async with load(made):
            for _ in range(5):
                await client.flushall()
                await client.script_flush()
                await asyncio.sleep(0.05)
        assert (made.told, made.events) == ([], [])


async def test_many_calls_fail_together() -> None:
    """A thousand under way when it goes: one line; and all of them are answered within the budget."""
    async with site("local") as made:
        await made.guarded.take([CHARGE], 0.0)
        await made.proxy.become(Fault(blackhole=True))
        begin = time.monotonic()
        decisions = await asyncio.gather(*[made.guarded.take([CHARGE], begin) for _ in range(1000)])
        assert time.monotonic() - begin < BUDGET_S * SLACK
        assert all(decision.allowed for (decision,) in decisions)
        assert (made.told, made.events) == ([False], ["state_store_down"])


async def test_a_failure_from_before_it_came_back() -> None:
    """A call that began before the last change says nothing about now."""
    async with site("local") as made:
        await made.guarded.take([CHARGE], 0.0)
        changes = made.guarded._changes
        await made.lose()
        await made.regain()
        made.guarded._lose(changes, StoreUnavailable("late"))
        assert made.guarded.up
        assert made.told == [False, True]


# ── the policies ─────────────────────────────────────────────────────────────────────────────────


async def test_local_limits_meanwhile() -> None:
    """This machine's counters decide; afterwards the shared ones go on where they were."""
    async with site("local") as made:
        guarded, now = made.guarded, time.monotonic()
        await guarded.take([Charge("a", 0.1, 100_000, 60_000)], now)
        assert await guarded.spend([Spend("a", 70, 100, FAR)], time.time()) == [True]
        await made.lose()
        assert await remaining(guarded) == 100_000
        await guarded.take([Charge("a", 0.1, 100_000, 10)], now)
        assert await guarded.spend([Spend("a", 101, 100, FAR)], time.time()) == [False]
        assert await guarded.spend([Spend("a", 100, 100, FAR)], time.time()) == [True]
        assert await remaining(guarded) == 99_990
        await made.regain()
        assert await remaining(guarded) == 40_000
        assert await guarded.peek_spend(["a"], time.time()) == [70]


async def test_open_meanwhile() -> None:
    """Everything is allowed and says so; leases hold nothing; afterwards limits hold again."""
    async with site("open") as made:
        guarded, now = made.guarded, time.monotonic()
        await made.lose()
        for _ in range(3):
            (decision,) = await guarded.take([Charge("a", 1, 5, 50)], now)
            assert (decision.allowed, decision.limit, decision.remaining) == (True, 5, 5)
            assert (decision.reset_after_s, decision.retry_after_s) == (0, 0)
        assert (await guarded.peek([Charge("a", 1, 5, 50)], now))[0].allowed
        leases = [await guarded.acquire([Slot("a", 1)], now) for _ in range(3)]
        assert await guarded.peek_slots(["a"], now) == [0]
        assert await guarded.spend([Spend("a", 50, 5, FAR)], now) == [True]
        assert await guarded.peek_spend(["a"], now) == [0]
        await guarded.settle([Charge("a", 1, 5, 50)], now)
        await guarded.settle_spend([Spend("a", 50, 5, FAR)], now)
        await made.regain()
        for lease in leases:
            assert lease is not None
            assert lease.names == ()
            await guarded.release(lease)
        assert not (await guarded.take([Charge("a", 1, 5, 50)], now))[0].allowed
        assert made.lines[0]["on_store_failure"] == "open"


async def test_closed_meanwhile() -> None:
    """No decision without the store, and no waiting for it; what needs no answer passes."""
    async with site("closed") as made:
        guarded, now = made.guarded, time.monotonic()
        lease = await guarded.acquire([Slot("a", 1)], now)
        assert lease is not None
        await made.lose()
        begin = time.monotonic()
        for _ in range(200):
            for verb in (
                guarded.take([CHARGE], now),
                guarded.peek([CHARGE], now),
                guarded.acquire([Slot("a", 1)], now),
                guarded.peek_slots(["a"], now),
                guarded.spend([Spend("a", 1, 5, FAR)], now),
                guarded.peek_spend(["a"], now),
            ):
                with pytest.raises(StoreUnavailable, match="closed"):
                    await verb
        assert time.monotonic() - begin < BUDGET_S * SLACK  # for 1,200 calls
        await guarded.settle([CHARGE], now)
        await guarded.settle_spend([Spend("a", 1, 5, FAR)], now)
        await guarded.renew(now)
        await guarded.release(lease)
        await made.regain()
        assert (await guarded.take([CHARGE], now))[0].allowed
        await guarded.renew(now)
        assert await guarded.peek_slots(["a"], now) == [0]


async def test_nobody_waits_for_a_store_that_is_gone() -> None:
    """Only the first call does; a thousand later ones together take no longer than that one budget."""
    async with site("local") as made:
        await made.lose()
        begin = time.monotonic()
        for _ in range(1000):
            await made.guarded.take([CHARGE], begin)
        assert time.monotonic() - begin < BUDGET_S * SLACK


# ── leases over a change ─────────────────────────────────────────────────────────────────────────


async def test_a_lease_is_released_where_it_was_given() -> None:
    """A remote one while the store is gone: by the first renew afterwards. A local one after it came back."""
    async with site("local") as made:
        guarded = made.guarded
        far = await guarded.acquire([Slot("a", 1)], time.monotonic())
        assert far is not None
        assert far.names == ("a",)
        await made.lose()
        near = await guarded.acquire([Slot("a", 1)], time.monotonic())
        assert near is not None, "another store, another place"
        assert await guarded.acquire([Slot("a", 1)], time.monotonic()) is None
        await guarded.release(far)
        await guarded.release(far)
        assert await guarded.peek_slots(["a"], time.monotonic()) == [1]
        await made.regain()
        assert await guarded.peek_slots(["a"], time.monotonic()) == [1]
        await guarded.release(near)
        await guarded.release(near)
        await guarded.renew(time.monotonic())
        assert await guarded.peek_slots(["a"], time.monotonic()) == [0]
        await made.lose()
        assert await guarded.peek_slots(["a"], time.monotonic()) == [0]


async def test_local_leases_are_kept_after_it_came_back() -> None:
    """Renewing goes on for both stores: a stream that began meanwhile may last much longer."""
    fd = memory.create(lease_s=0.3)
    try:
        async with redis_server() as server:
            guarded = Guarded(RedisState(server.url, BUDGET_S), memory.attach(fd, 0), "local", None, PROBE_S)
            guarded.start()
            await server.kill()
            assert await guarded.acquire([Slot("a", 1)], time.monotonic()) is not None
            await server.restart()
            await until(lambda: guarded.up)
            end = time.monotonic() + 0.7
            witness = memory.attach(fd, 1)
            while time.monotonic() < end:
                await guarded.renew(time.monotonic())
                assert await witness.peek_slots(["a"], time.monotonic()) == [1]
                await asyncio.sleep(0.02)
            await guarded.close()
    finally:
        os.close(fd)


async def test_a_release_that_fails_is_made_good() -> None:
    """The one that finds out that the store is gone, too."""
    async with site("local") as made:
        lease = await made.guarded.acquire([Slot("a", 1)], time.monotonic())
        assert lease is not None
        await made.proxy.become(Fault(blackhole=True))
        await made.guarded.release(lease)
        assert made.told == [False]
        await made.regain()
        await made.guarded.renew(time.monotonic())
        assert await made.guarded.peek_slots(["a"], time.monotonic()) == [0]


async def test_one_call_is_charged_once_in_each_store() -> None:
    """At most: its remote answer did not come, so the local store was charged; never twice in one."""
    async with site("local") as made:
        await made.guarded.take([CHARGE], time.monotonic())
        await made.lose()
        await made.guarded.take([Charge("a", 0.1, 100_000, 10)], time.monotonic())
        assert await remaining(made.guarded) == 99_990
        await made.regain()
        await made.proxy.become(Fault(delay_s=1.0))
        await made.guarded.take([Charge("a", 0.1, 100_000, 100)], time.monotonic())
        assert not made.guarded.up
        assert await remaining(made.guarded) == 99_890
        await made.regain()
        assert await remaining(made.guarded) == 99_999 - 100


async def test_gone_from_the_start() -> None:
    """The first call finds out; it is found when it comes."""
    async with site("local") as made:
        await made.server.kill()
        begin = time.monotonic()
        assert (await made.guarded.take([CHARGE], begin))[0].allowed
        assert time.monotonic() - begin < BUDGET_S * SLACK
        await made.server.restart()
        await until(lambda: made.guarded.up)
        assert (await made.guarded.take([CHARGE], begin))[0].remaining == 99_999
