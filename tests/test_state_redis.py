"""What only Redis can show: its clock, its failures, its keys, and the network in between.

The contract itself is held by tests/test_state.py.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy import bucket
from proxy.state import Charge, Slot, Spend, StoreUnavailable
from proxy.state.redis import PREFIX, RedisState
from tests.kit import hammer
from tests.kit.chaos import Chaos, Fault, chaos
from tests.kit.redis import RedisServer, redis_server

pytestmark = pytest.mark.timeout(60)

BUDGET_S = 0.05
#: Deadlines are five times what is promised: these machines are shared.
SLACK = 5
#: The callers' `now`, which nobody is to believe.
NONSENSE = -1e9
FAR = 4e9
ENDLESS = 2**40


@pytest.fixture
async def server() -> AsyncIterator[RedisServer]:
    async with redis_server() as made:
        yield made


@pytest.fixture
async def state(server: RedisServer) -> AsyncIterator[RedisState]:
    """With a budget that is no matter of the test."""
    async with opened(server.url, 5.0) as made:
        yield made


@asynccontextmanager
async def opened(url: str, budget_s: float = BUDGET_S, **options: Any) -> AsyncIterator[RedisState]:
    made = RedisState(url, budget_s, **options)
    try:
        yield made
    finally:
        await made.close()


async def every_verb(state: RedisState) -> list[Awaitable[Any]]:
    """Not awaited yet."""
    return [
        state.take([Charge("a", 60, 10), Charge("b", 60, 10)], NONSENSE),
        state.settle([Charge("a", 60, 10, -1)], NONSENSE),
        state.peek([Charge("a", 60, 10)], NONSENSE),
        state.acquire([Slot("a", 10), Slot("b", 10)], NONSENSE),
        state.peek_slots(["a", "b"], NONSENSE),
        state.renew(NONSENSE),
        state.spend([Spend("a", 1, ENDLESS, FAR)], NONSENSE),
        state.settle_spend([Spend("a", 1, ENDLESS, FAR)], NONSENSE),
        state.peek_spend(["a"], NONSENSE),
        state.probe(),
    ]


async def until(true: Callable[[], Awaitable[bool]], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not await true():
            await asyncio.sleep(0.01)


async def free(state: RedisState, *names: str) -> bool:
    """After a renew, which releases what is in doubt."""
    await state.renew(NONSENSE)
    return set(await state.peek_slots(names, NONSENSE)) == {0}


# ── arithmetic ───────────────────────────────────────────────────────────────────────────────────

#: Of all sizes, and such that sums are often whole seconds.
RATES = st.one_of(st.integers(1, 10_000_000), st.floats(0.1, 1e6), st.sampled_from([0.001, 60, 120, 600]))
BURSTS = st.one_of(st.integers(0, 1000), st.integers(1, 10**12))
CHARGE = st.tuples(st.sampled_from("abc"), RATES, BURSTS, st.floats(0, 1.2))
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "settle", "peek"]),
        st.one_of(st.floats(0, 30), st.floats(-4000, 4000), st.sampled_from([0.0, 0.5])),
        st.lists(CHARGE, min_size=1, max_size=3),
        st.integers(-1, 1),
    ),
    max_size=12,
)


@pytest.mark.parametrize("start", [5000.0, 1.76e9])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
async def test_the_arithmetic_is_that_of_the_bucket(server: RedisServer, start: float, steps: Any) -> None:
    """Decisions and what is stored, to the nanosecond: any rate and size, a clock that leaps, any verb."""
    async with opened(server.url, 5.0, callers_clock=True) as state:
        async with server.client() as client:
            await client.flushall()
        now, tats = start + 10_000, dict.fromkeys("abc", 0)
        for verb, leap, drawn, sign in steps:
            now += leap
            charges = [Charge(name, rate, burst, round(burst * share)) for name, rate, burst, share in drawn]
            if verb == "take":
                assert await state.take(charges, now) == expected_take(tats, charges, now)
            elif verb == "settle":
                corrections = [
                    Charge(c.bucket_id, c.rate_per_minute, c.burst, c.amount * sign) for c in charges
                ]
                await state.settle(corrections, now)
                expect_settled(tats, corrections, now)
            assert await state.peek(charges, now) == [
                take(tats[charge.bucket_id], charge, now)[1] for charge in charges
            ]
        # Full at a time before all others, a bucket says its whole tat as the time until it is full again.
        asked = [Charge(name, 0.001, 10**12, 0) for name in tats]
        deficits = [decision.reset_after_s for decision in await state.peek(asked, now)]
        assert deficits == [take(tats[charge.bucket_id], charge, now)[1].reset_after_s for charge in asked]


def take(tat: int, charge: Charge, now: float) -> tuple[int, bucket.Decision]:
    return bucket.take(tat, charge.rate_per_minute, charge.burst, charge.amount, now)


def expected_take(tats: dict[str, int], charges: list[Charge], now: float) -> list[bucket.Decision]:
    """By the arithmetic of proxy.bucket, all or none."""
    after, decisions = dict(tats), []
    for charge in charges:
        after[charge.bucket_id], decision = take(after[charge.bucket_id], charge, now)
        decisions.append(decision)
    all_allowed = all(decision.allowed for decision in decisions)
    for name, tat in after.items():
        tats[name] = tat if all_allowed else min(tat, tats[name])
    return decisions


def expect_settled(tats: dict[str, int], corrections: list[Charge], now: float) -> None:
    for charge in corrections:
        tat = tats[charge.bucket_id]
        tats[charge.bucket_id] = bucket.settle(tat, charge.rate_per_minute, charge.burst, charge.amount, now)


async def test_large_amounts_of_a_budget(state: RedisState) -> None:
    """Exact up to 2^52 units; what is more is as much as that."""
    most = 2**52
    assert await state.spend([Spend("a", most - 1, most, FAR)], NONSENSE) == [True]
    assert await state.spend([Spend("a", 2, most, FAR)], NONSENSE) == [False]
    assert await state.spend([Spend("a", 1, most, FAR)], NONSENSE) == [True]
    assert await state.peek_spend(["a"], NONSENSE) == [most]
    await state.settle_spend([Spend("a", 10**30, 0, FAR)], NONSENSE)
    assert await state.peek_spend(["a"], NONSENSE) == [most]
    await state.settle_spend([Spend("a", -1, 0, FAR)], NONSENSE)
    assert await state.peek_spend(["a"], NONSENSE) == [most - 1]


# ── its clock, its keys ──────────────────────────────────────────────────────────────────────────


async def test_time_is_that_of_the_server(server: RedisServer) -> None:
    """Whatever the callers' clocks say: 10 a second come back at that pace, for all of them alike."""
    charge = Charge("a", 600, 2)
    async with opened(server.url, 5.0) as one, opened(server.url, 5.0) as two:
        begin = time.monotonic()
        granted = 0
        while granted < 7:
            for state, now in ((one, NONSENSE), (two, 1e12)):
                ((decision,),) = [await state.take([charge], now)]
                granted += decision.allowed
                if not decision.allowed:
                    assert 0 < decision.retry_after_s <= 0.1
                    assert decision.reset_after_s <= 0.2
            await asyncio.sleep(0.005)
        assert time.monotonic() - begin >= 0.5


@pytest.mark.alone
async def test_a_budget_ends_by_the_clock_of_the_server(state: RedisState) -> None:
    """At its date."""
    ends = time.time() + 0.5
    assert await state.spend([Spend("a", 10, 10, ends)], NONSENSE) == [True]
    assert await state.spend([Spend("a", 1, 10, ends)], 1e12) == [False]

    async def over() -> bool:
        return await state.peek_spend(["a"], NONSENSE) == [0]

    await until(over)
    assert time.time() >= ends - 0.01


@pytest.mark.alone
async def test_a_lease_ends_by_the_clock_of_the_server(server: RedisServer) -> None:
    """Silence for so long; a renew in time keeps it."""
    async with opened(server.url, 5.0, lease_s=0.6) as silent, opened(server.url, 5.0, lease_s=0.6) as alive:
        assert await silent.acquire([Slot("a", 2)], NONSENSE) is not None
        assert await alive.acquire([Slot("a", 2)], NONSENSE) is not None
        begin = time.monotonic()
        while await alive.peek_slots(["a"], NONSENSE) == [2]:
            await alive.renew(NONSENSE)
            assert time.monotonic() - begin < 0.6 * SLACK
            await asyncio.sleep(0.01)
        assert time.monotonic() - begin > 0.5
        await asyncio.sleep(0.1)
        await alive.renew(NONSENSE)
        assert await alive.peek_slots(["a"], NONSENSE) == [1]


@pytest.mark.alone
async def test_what_an_owner_held_before_it_was_gone(server: RedisServer) -> None:
    """Stays free when it comes back, also if nobody looked in between; what it takes then counts."""
    async with opened(server.url, 5.0, lease_s=0.2) as state, opened(server.url, 5.0) as other:
        lost = await state.acquire([Slot("a", 5)], NONSENSE)
        assert lost is not None
        await asyncio.sleep(0.3)
        assert await state.acquire([Slot("b", 5)], NONSENSE) is not None
        assert await other.peek_slots(["a", "b"], NONSENSE) == [0, 1]
        await state.release(lost)
        assert await state.acquire([Slot("a", 5)], NONSENSE) is not None
        assert await other.peek_slots(["a", "b"], NONSENSE) == [1, 1]


async def test_every_key_ends_and_tells_nothing(server: RedisServer, state: RedisState) -> None:
    """A TTL on each, never longer than what it says needs; no name in the clear, nor outside the prefix."""
    canary = "hr_canary_4711"
    await state.take([Charge(canary, 60, 100, 50)], NONSENSE)
    await state.settle([Charge(canary + "1", 60, 10, 5)], NONSENSE)
    await state.settle([Charge(canary, 60, 100, -20)], NONSENSE)
    lease = await state.acquire([Slot(canary, 5), Slot("b", 5)], NONSENSE)
    await state.acquire([Slot(canary, 5)], NONSENSE)
    assert lease is not None
    await state.release(lease)
    await state.renew(NONSENSE)
    await state.spend([Spend(canary, 5, 10, time.time() + 60)], NONSENSE)
    await state.settle_spend([Spend(canary, -5, 10, time.time() + 60)], NONSENSE)
    await state.probe()
    longest_ms = {"bucket": 32_000, "slot": 3_600_000, "owner": 7000, "budget": 62_000, "probe": 1000}
    async with server.client() as client:
        keys = [key async for key in client.scan_iter()]
        assert {key.decode().split(":")[1] for key in keys} == longest_ms.keys()
        for key in keys:
            assert key.startswith(PREFIX.encode())
            assert 0 < await client.pttl(key) <= longest_ms[key.decode().split(":")[1]]
            assert canary.encode() not in key + await client.dump(key)


async def test_nothing_is_left_of_what_is_over(server: RedisServer) -> None:
    """Released slots and dead owners leave no fields behind; a slot's TTL is the longest there is."""
    async with opened(server.url, 5.0, lease_s=0.2) as state, opened(server.url, 5.0) as other:
        assert await state.acquire([Slot("a", 9), Slot("b", 9)], NONSENSE) is not None
        await until(lambda: free(other, "a", "b"))
        lease = await other.acquire([Slot("c", 9)], NONSENSE)
        assert lease is not None
        await other.release(lease)
        async with server.client() as client:
            assert [key async for key in client.scan_iter(f"{PREFIX}slot:*")] == []


async def test_the_ttl_of_a_slot_is_renewed(server: RedisServer, state: RedisState) -> None:
    """By its holders, well before it ends: an hour without a new request costs nobody a place."""
    assert await state.acquire([Slot("a", 9)], NONSENSE) is not None
    async with server.client() as client:
        (key,) = [key async for key in client.scan_iter(f"{PREFIX}slot:*")]
        await client.expire(key, 100)
        await state.renew(NONSENSE)
        assert await client.ttl(key) <= 100
        state._touched_s -= 901
        await state.renew(NONSENSE)
        assert await client.ttl(key) > 3500


# ── several processes ────────────────────────────────────────────────────────────────────────────


@pytest.mark.alone
async def test_two_processes_overshoot_by_nothing(server: RedisServer) -> None:
    """On Redis's clock: not one more than there is, of buckets and of slots; and not one fewer."""
    address = f"timed:{server.url}"
    async with hammer.children(address, [], (1, 2), "slow", 1.0) as children:
        for child in children:
            child.go()
        assert sum([await child.granted() for child in children]) == hammer.SLOW.burst
    witness = os.memfd_create("witness")
    try:
        async with hammer.children(address, [], (1, 2), "slots", 1.0, witness) as children:
            for child in children:
                child.go()
            told = [await child.granted() for child in children]
    finally:
        os.close(witness)
    assert [child["over"] for child in told] == [0, 0]
    assert min(child["held"] for child in told) > 10


@pytest.mark.alone
async def test_slots_of_killed_processes_come_back(server: RedisServer, state: RedisState) -> None:
    """SIGKILL amid all verbs: their slots count for the lease of a second, and no longer."""
    names = ["machine", *(f"key:{number}" for number in range(50))]
    async with hammer.children(f"timed:{server.url}", [], (1, 2), "everything", 60) as children:
        for child in children:
            child.go()

        async def many() -> bool:
            return (await state.peek_slots(names, NONSENSE))[0] >= 30

        await until(many)
        for child in children:
            await child.kill()
    begin = time.monotonic()
    machine, *keys = await state.peek_slots(names, NONSENSE)
    assert machine == sum(keys) > 0
    await until(lambda: free(state, *names), 1.0 * SLACK)
    assert time.monotonic() - begin > 0.3


# ── callers that leave ───────────────────────────────────────────────────────────────────────────


async def cancelled_at_random(state: RedisState, calls: int, within_s: float) -> int:
    """How many acquires ended before they could be cancelled; those are released."""

    async def one() -> bool:
        task = asyncio.create_task(state.acquire([Slot("machine", 10**6), Slot("a", 10**6)], NONSENSE))
        await asyncio.sleep(random.random() * within_s)
        task.cancel()
        try:
            lease = await task
        except (asyncio.CancelledError, StoreUnavailable):
            return False
        assert lease is not None
        try:
            await state.release(lease)
        except StoreUnavailable:
            pass
        return True

    return sum(await asyncio.gather(*[one() for _ in range(calls)]))


@pytest.mark.alone
async def test_cancelled_acquires_leave_nothing(server: RedisServer, state: RedisState) -> None:
    """Many, cut off at random instants: some got their lease, most did not, no slot is left."""
    finished = sum([await cancelled_at_random(state, 500, 0.2) for _ in range(3)])
    assert 0 < finished < 1500
    await until(lambda: free(state, "machine", "a"))


@pytest.mark.alone
async def test_acquires_of_unknown_end_leave_nothing(server: RedisServer) -> None:
    """The same over a network on which most run into their budget, while it gets better and worse."""
    # The last leaves all in doubt: Redis has done what it was asked for, and its answers come too late.
    faults = (Fault(delay_s=0.03), Fault(blackhole=True), Fault(cut_after=60), Fault(delay_s=0.2))
    async with (
        chaos(server.port) as proxy,
        opened(f"redis://127.0.0.1:{proxy.port}") as state,
        opened(server.url, 5.0) as witness,
    ):
        lease = await state.acquire([Slot("machine", 1)], NONSENSE)  # from now on Redis knows the script
        assert lease is not None
        await state.release(lease)
        for fault in faults * 2:
            await proxy.become(Fault())
            await until(lambda: connected(state, 32))
            await proxy.become(fault)
            await cancelled_at_random(state, 200, 0.1)
        assert await witness.peek_slots(["machine"], NONSENSE) != [0], "nothing was in doubt"
        await proxy.become(Fault())

        async def clean() -> bool:
            try:
                await state.renew(NONSENSE)
            except StoreUnavailable:
                pass
            return await witness.peek_slots(["machine", "a"], NONSENSE) == [0, 0]

        await until(clean, 4.0)  # before a lease ends


async def connected(state: RedisState, connections: int) -> bool:
    """So many are open."""
    probes = [state.probe() for _ in range(connections)]
    return set(await asyncio.gather(*probes, return_exceptions=True)) == {None}


@pytest.mark.alone
async def test_too_many_doubts(server: RedisServer) -> None:
    """They are bounded: then the owner starts anew, and its slots end with their lease."""
    async with opened(server.url, 5.0, lease_s=0.5) as state:
        held = [await state.acquire([Slot("a", 10**6)], NONSENSE) for _ in range(3)]
        for lease in held:
            assert lease is not None
            state.release_later(lease)
        state._doubts.update({-number: state._doubts[1] for number in range(10_000)})
        lost = await state.acquire([Slot("b", 5)], NONSENSE)
        assert lost is not None
        state.release_later(lost)
        assert len(state._doubts) == 0
        assert await state.acquire([Slot("c", 5)], NONSENSE) is not None
        assert await state.peek_slots(["a", "b"], NONSENSE) == [3, 1]
        await until(lambda: free(state, "a", "b"), 0.5 * SLACK)
        assert await state.peek_slots(["c"], NONSENSE) == [1]


async def test_a_cancelled_charge_is_charged(server: RedisServer, state: RedisState) -> None:
    """Once: what was asked for happens, although nobody waits for it."""
    for _ in range(50):
        task = asyncio.create_task(state.take([Charge("a", 0.001, 1000)], NONSENSE))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def charged() -> bool:
        return (await state.peek([Charge("a", 0.001, 1000, 0)], NONSENSE))[0].remaining == 950

    await until(charged)


# ── Redis says no ────────────────────────────────────────────────────────────────────────────────


async def refuses(state: RedisState, words: str) -> None:
    """Every verb that writes says so and changes nothing."""
    for verb in await every_verb(state):
        if verb.__name__ not in ("peek", "peek_slots", "peek_spend", "renew"):  # type: ignore[attr-defined]  # a coroutine has both
            with pytest.raises(StoreUnavailable, match=words):
                await verb
        else:
            verb.close()  # type: ignore[attr-defined]  # a coroutine has both


async def test_memory_is_full(server: RedisServer, state: RedisState) -> None:
    """Nothing more is granted, nothing half; slots are given back all the same."""
    lease = await state.acquire([Slot("a", 10), Slot("b", 10)], NONSENSE)
    assert lease is not None
    await state.take([Charge("a", 60, 10)], NONSENSE)
    async with server.client() as client:
        await client.config_set("maxmemory", "1mb")
        await client.config_set("maxmemory-policy", "noeviction")
        await refuses(state, "OutOfMemory")
        await state.renew(NONSENSE)
        assert await state.peek_slots(["a", "b"], NONSENSE) == [1, 1]
        await state.release(lease)
        assert await state.peek_slots(["a", "b"], NONSENSE) == [0, 0]
        await client.config_set("maxmemory", "0")
    assert (await state.peek([Charge("a", 0.1, 10, 0)], NONSENSE))[0].remaining == 9
    assert (await state.take([Charge("a", 60, 10)], NONSENSE))[0].allowed


async def test_it_is_a_replica(server: RedisServer, state: RedisState) -> None:
    """After a failover the old address may be one: it takes no decisions."""
    await state.take([Charge("a", 60, 10)], NONSENSE)
    async with server.client() as client:
        await client.replicaof("127.0.0.1", "1")
        await refuses(state, "ReadOnly")
        await client.replicaof("NO", "ONE")
    assert (await state.take([Charge("a", 60, 10)], NONSENSE))[0].allowed


async def test_scripts_are_flushed(server: RedisServer, state: RedisState) -> None:
    """Nobody notices."""
    for left in range(9, 4, -1):
        async with server.client() as client:
            await client.script_flush()
        assert (await state.take([Charge("c", 0.1, 10)], NONSENSE))[0].remaining == left
        for verb in await every_verb(state):
            await verb


async def test_everything_is_flushed(server: RedisServer, state: RedisState) -> None:
    """Limits begin anew, and the leases of before cost nobody a place when they end."""
    await state.take([Charge("a", 0.1, 10, 10)], NONSENSE)
    lease = await state.acquire([Slot("a", 1)], NONSENSE)
    async with server.client() as client:
        await client.flushall()
    assert (await state.take([Charge("a", 0.1, 10, 10)], NONSENSE))[0].allowed
    await state.renew(NONSENSE)
    again = await state.acquire([Slot("a", 1)], NONSENSE)
    assert again is not None
    assert lease is not None
    await state.release(lease)
    assert await state.peek_slots(["a"], NONSENSE) == [1]


async def test_a_password(server: RedisServer) -> None:
    """It is used where it is given; where it is wrong or missing, the reason does not tell it."""
    secret = "canary/4711@:"
    async with server.client() as client:
        await client.config_set("requirepass", secret)
        place = f"127.0.0.1:{server.port}/3"
        async with opened(f"redis://:{quote(secret, safe='')}@{place}", 5.0) as state:
            await state.probe()
        for url in (f"redis://:wrong-canary@{place}", f"redis://{place}"):
            async with opened(url, 5.0) as state:
                with pytest.raises(StoreUnavailable) as caught:
                    await state.probe()
                assert "Authentication" in str(caught.value)
                assert "canary" not in str(caught.value)


def test_a_url_that_is_none() -> None:
    """It is said at once."""
    with pytest.raises(ValueError, match="scheme"):
        RedisState("http://127.0.0.1")


# ── the network ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def proxy(server: RedisServer) -> AsyncIterator[Chaos]:
    async with chaos(server.port) as made:
        yield made


@pytest.fixture
async def remote(proxy: Chaos) -> AsyncIterator[RedisState]:
    """Behind the proxy, with the budget of a real one."""
    async with opened(f"redis://127.0.0.1:{proxy.port}") as made:
        yield made


async def fails_in_time(verb: Awaitable[Any]) -> None:
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await verb
    assert time.monotonic() - begin < BUDGET_S * SLACK


async def works(state: RedisState) -> bool:
    try:
        for verb in await every_verb(state):
            await verb
    except StoreUnavailable:
        return False
    return True


FAULTS = {
    "refuse": Fault(refuse=True),
    "reset": Fault(reset=True),
    "blackhole": Fault(blackhole=True),
    "slow": Fault(delay_s=1.0),
    "throttled": Fault(bytes_per_s=10),
    "cut": Fault(cut_after=0),
    "garbage": Fault(garbage=b"\x00\xff" * 50),
}


@pytest.mark.alone
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_faults(proxy: Chaos, remote: RedisState, fault: Fault) -> None:
    """Every verb ends within its budget, one by one and all at once, and all work again afterwards."""
    await until(lambda: works(remote))
    await proxy.become(fault)
    for verb in await every_verb(remote):
        await fails_in_time(verb)
    verbs = [verb for _ in range(5) for verb in await every_verb(remote)]
    begin = time.monotonic()
    outcomes = await asyncio.gather(*verbs, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}
    assert time.monotonic() - begin < BUDGET_S * SLACK
    await proxy.become(Fault())
    await until(lambda: works(remote))


ANSWERS = [
    b"-LOADING Redis is loading the dataset in memory\r\n",
    b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.\r\n",
    b"-BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.\r\n",
    b"-NOPERM this user has no permissions to run the 'evalsha' command\r\n",
    b"-NOSCRIPT No matching script. Please use EVAL.\r\n",
    b"-\xff\xfe\r\n",
    b"+QUEUED\r\n",
    b"$3\r\nabc\r\n",
    b"*0\r\n",
    b"*3\r\n$1\r\n1\r\n$1\r\n2\r\n$1\r\n3\r\n",
    b"*-7\r\n",
    b":abc\r\n",
    b"$99999999999\r\n",
    b"*1\r\n" * 20_000,
    b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n",
    b"\r\n",
]


@pytest.mark.alone
@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: repr(answer[:12]))
async def test_answers_that_are_none(proxy: Chaos, remote: RedisState, answer: bytes) -> None:
    """Whatever a server says: nothing but StoreUnavailable is raised, and the connection is not trusted."""
    await until(lambda: works(remote))
    await proxy.become(Fault(garbage=answer))
    for verb in await every_verb(remote):
        await fails_in_time(verb)
    await proxy.become(Fault())
    await until(lambda: works(remote))


@pytest.mark.alone
async def test_an_answer_to_something_else_ends_its_connection(proxy: Chaos, remote: RedisState) -> None:
    """The next one on it may be as wrong. A refusal is an answer, and its connection is kept."""
    await until(lambda: works(remote))
    for answer, opened_anew in ((b"$3\r\nabc\r\n", 5), (b"-ERR no\r\n", 0)):
        await proxy.become(Fault())
        await remote.probe()
        before = proxy.accepted
        await proxy.become(Fault(garbage=answer))
        for _ in range(6):
            await fails_in_time(remote.probe())
        assert proxy.accepted - before == opened_anew


@pytest.mark.alone
async def test_no_answer_belongs_to_another_question(proxy: Chaos, server: RedisServer) -> None:
    """Answers that come late, in part or never: each budget always says its own sum."""
    sums = {f"budget:{number}": 1000 + number for number in range(40)}
    async with opened(server.url, 5.0) as state:
        for name, amount in sums.items():
            await state.spend([Spend(name, amount, ENDLESS, FAR)], NONSENSE)
    async with opened(f"redis://127.0.0.1:{proxy.port}", connections=4) as state:
        answered = failed = 0

        async def ask(end: float) -> None:
            nonlocal answered, failed
            while time.monotonic() < end:
                name = random.choice(list(sums))
                try:
                    assert await state.peek_spend([name], NONSENSE) == [sums[name]]
                    answered += 1
                except StoreUnavailable:
                    failed += 1

        askers = [asyncio.create_task(ask(time.monotonic() + 2)) for _ in range(8)]
        while not all(asker.done() for asker in askers):
            for fault in (Fault(), Fault(delay_s=0.045), Fault(blackhole=True), Fault(cut_after=100)):
                await proxy.become(fault)
                await asyncio.sleep(random.uniform(0.02, 0.12))
        await asyncio.gather(*askers)
        assert answered > 100
        assert failed > 10


async def test_restarted_between_two_calls(server: RedisServer) -> None:
    """Connections that died while nobody used them cost no call."""
    async with opened(server.url, 5.0) as state:
        for _ in range(5):
            assert (await state.take([Charge("a", 0.1, 10)], NONSENSE))[0].remaining == 9
            await asyncio.gather(*await every_verb(state))
            await server.restart()


@pytest.mark.alone
async def test_a_loop_that_is_held_up(server: RedisServer) -> None:
    """Our own delay is not Redis's: its answer, 30 ms late, lies in the socket when the loop comes back."""
    loop = asyncio.get_running_loop()
    here, there = socket.socketpair()

    def hold_up() -> None:
        here.recv(1)
        time.sleep(BUDGET_S * 1.5)

    loop.add_reader(here, hold_up)
    async with opened(server.url) as state, server.client() as client:
        for _ in range(10):
            await until(lambda: works(state))
            sleep = asyncio.create_task(client.execute_command("DEBUG", "SLEEP", "0.03"))
            await asyncio.sleep(0.005)
            task = asyncio.create_task(state.take([Charge("a", 6000, 100)], NONSENSE))
            await asyncio.sleep(0.001)
            there.send(b"x")
            assert (await task)[0].limit == 100
            await sleep
    loop.remove_reader(here)
    here.close()
    there.close()


async def test_more_calls_than_connections(server: RedisServer) -> None:
    """They wait for each other; there never are more connections than that."""
    async with opened(server.url, 20.0, connections=3) as state:
        decisions = await asyncio.gather(
            *[state.take([Charge("a", 0.1, 1000)], NONSENSE) for _ in range(1000)]
        )
        assert sorted(decision.remaining for (decision,) in decisions) == list(range(1000))
        async with server.client() as client:
            assert (await client.info("clients"))["connected_clients"] == 3 + 1


@pytest.mark.alone
async def test_closing_leaves_nothing_open(server: RedisServer) -> None:
    """No slot, no connection, also amid calls; and a Redis that is gone does not hold it up."""
    state = RedisState(server.url, 5.0)
    assert await state.acquire([Slot("a", 1)], NONSENSE) is not None
    tasks = [asyncio.create_task(state.take([Charge("b", 0.1, 100)], NONSENSE)) for _ in range(20)]
    await asyncio.sleep(0)
    await state.close()
    assert all([(await task)[0].allowed for task in tasks])

    async with server.client() as client:

        async def alone() -> bool:
            return bool((await client.info("clients"))["connected_clients"] == 1)

        await until(alone)
    async with opened(server.url, 5.0) as other:
        assert await other.acquire([Slot("a", 1)], NONSENSE) is not None
        gone = RedisState(server.url)
        await gone.probe()
        await server.kill()
        begin = time.monotonic()
        await gone.close()
        assert time.monotonic() - begin < BUDGET_S * SLACK
