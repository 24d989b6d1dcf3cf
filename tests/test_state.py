"""What the verbs of `State` mean: one suite for every store, then what only shared memory can show."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import math
import os
import random
import resource
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.state import Charge, Slot, Spend, State
from proxy.state import memory as shared
from proxy.state.memory import MemoryState
from tests.kit import hammer
from tests.kit.redis import redis_server

#: A monotonic clock's now, and a period that ends a day later on the wall.
NOW = 5000.0
WALL = 1.76e9
DAY = WALL + 86400
LEASE_S = 5.0

pytestmark = pytest.mark.timeout(20)


class Store:
    """A fresh store: opened here by `state`, and in other processes by its address."""

    def __init__(self, address: str, fds: list[int]) -> None:
        self.address = address
        self.fds = fds
        self.opened: list[State] = []

    def state(self, owner: int = 0) -> State:
        self.opened.append(hammer.open_state(self.address, owner))
        return self.opened[-1]


@asynccontextmanager
async def _memory() -> AsyncIterator[Store]:
    fd = shared.create(lease_s=LEASE_S)
    yield Store(f"memory:{fd}", [fd])
    os.close(fd)


@asynccontextmanager
async def _redis() -> AsyncIterator[Store]:
    async with redis_server() as server:
        yield Store(f"redis:{server.url}", [])


@pytest.fixture
async def memory() -> AsyncIterator[Store]:
    async with _memory() as made:
        yield made


@pytest.fixture(params=[_memory, _redis], ids=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    """The stores that the suite is run on."""
    async with request.param() as made:
        yield made
        for state in made.opened:
            await state.close()


@pytest.fixture
def state(store: Store) -> State:
    return store.state()


async def remaining(state: State, charge: Charge, now: float = NOW) -> int:
    (decision,) = await state.peek([Charge(charge.bucket_id, charge.rate_per_minute, charge.burst, 0)], now)
    return decision.remaining


# ── buckets ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_bucket_gives_its_burst_and_then_its_rate(state: State) -> None:
    """Decisions carry what the headers say."""
    charge = Charge("key:a", 60, 3)
    answers = [(await state.take([charge], NOW))[0] for _ in range(5)]
    assert [answer.allowed for answer in answers] == [True, True, True, False, False]
    assert [answer.remaining for answer in answers] == [2, 1, 0, 0, 0]
    assert {answer.limit for answer in answers} == {3}
    assert answers[4].retry_after_s == pytest.approx(1)
    assert (await state.take([charge], NOW + 1.001))[0].allowed
    assert not (await state.take([charge], NOW + 1.002))[0].allowed


async def test_nothing_is_asked(state: State) -> None:
    """Callers need not look whether they have anything to ask."""
    assert await state.take([], NOW) == await state.peek([], NOW) == []
    assert await state.spend([], NOW) == await state.peek_spend([], NOW) == []
    await state.settle([], NOW)
    await state.settle_spend([], NOW)


async def test_charges_are_taken_together_or_not(state: State) -> None:
    """A refusal of one leaves the others as they were; every decision is told."""
    wide, narrow = Charge("wide", 60, 100, 10), Charge("narrow", 60, 2, 1)
    for left in (90, 80):
        decisions = await state.take([wide, narrow], NOW)
        assert [decision.allowed for decision in decisions] == [True, True]
        assert decisions[0].remaining == left
    decisions = await state.take([wide, narrow], NOW)
    assert [decision.allowed for decision in decisions] == [True, False]
    assert await remaining(state, wide) == 80
    assert await remaining(state, narrow) == 0
    assert await state.take([], NOW) == []


async def test_the_same_bucket_twice(state: State) -> None:
    """Two charges on one bucket count as their sum."""
    charge = Charge("key:a", 60, 5, 3)
    assert [d.allowed for d in await state.take([charge, charge], NOW)] == [True, False]
    assert await remaining(state, charge) == 5
    small = Charge("key:a", 60, 5, 2)
    assert [d.remaining for d in await state.take([small, small], NOW)] == [3, 1]
    assert await remaining(state, charge) == 1


async def test_peeking_takes_nothing(state: State) -> None:
    """Neither of a bucket that is used nor of one that is not."""
    charge = Charge("key:a", 60, 5)
    for _ in range(20):
        assert (await state.peek([charge], NOW))[0].allowed
    await state.take([charge], NOW)
    assert [await remaining(state, charge) for _ in range(3)] == [4, 4, 4]


async def test_settling(state: State) -> None:
    """Back what was too much, more where it was too little, down to a bounded debt, never above full."""
    reserved = Charge("words:a", 600, 1000, 800)
    other = Charge("words:b", 600, 1000, 100)
    await state.take([reserved, other], NOW)
    await state.settle([Charge("words:a", 600, 1000, -500), Charge("words:b", 600, 1000, 50)], NOW)
    assert [await remaining(state, reserved), await remaining(state, other)] == [700, 850]
    await state.settle([Charge("words:a", 600, 1000, -5000)], NOW)
    assert await remaining(state, reserved) == 1000
    await state.settle([Charge("words:a", 600, 1000, 10**9)], NOW)
    assert await remaining(state, reserved) == 0
    (decision,) = await state.take([Charge("words:a", 600, 1000, 1)], NOW)
    assert decision.retry_after_s == pytest.approx(100.1)
    assert await remaining(state, reserved, NOW + 200.001) == 1000


async def test_a_limit_may_change_between_calls(state: State) -> None:
    """It travels with the call: no visit to the store after a reload."""
    await state.take([Charge("key:a", 60, 10, 10)], NOW)
    (decision,) = await state.take([Charge("key:a", 60, 100, 50)], NOW)
    assert (decision.allowed, decision.remaining) == (True, 40)


async def test_kinds_have_names_of_their_own(state: State) -> None:
    """A bucket, a slot and a budget of one name are three counters."""
    await state.take([Charge("a", 60, 5)], NOW)
    await state.acquire([Slot("a", 5)], NOW)
    await state.spend([Spend("a", 7, 10, DAY)], WALL)
    assert await remaining(state, Charge("a", 60, 5)) == 4
    assert await state.peek_slots(["a", "b"], NOW) == [1, 0]
    assert await state.peek_spend(["a", "b"], WALL) == [7, 0]


async def test_owners_share_one_truth(store: Store) -> None:
    """What one takes is missing for the other, of every kind."""
    one, two = store.state(0), store.state(1)
    await one.take([Charge("a", 60, 5, 3)], NOW)
    lease = await one.acquire([Slot("a", 1)], NOW)
    await one.spend([Spend("a", 7, 10, DAY)], WALL)
    assert not (await two.take([Charge("a", 60, 5, 3)], NOW))[0].allowed
    assert await two.acquire([Slot("a", 1)], NOW) is None
    assert await two.spend([Spend("a", 4, 10, DAY)], WALL) == [False]
    assert lease is not None
    await one.release(lease)
    assert await two.acquire([Slot("a", 1)], NOW) is not None


async def test_many_names(state: State) -> None:
    """Ten thousand callers: each has its own bucket, and it is remembered."""
    charges = [Charge(f"key:{number}", 60, 5, 1 + number % 5) for number in range(10_000)]
    for charge in charges:
        await state.take([charge], NOW)
    for charge in charges:
        assert await remaining(state, charge) == 5 - charge.amount


# ── slots ────────────────────────────────────────────────────────────────────────────────────────


async def test_slots_are_taken_together_or_not(state: State) -> None:
    """One that is full leaves the others free."""
    lease = await state.acquire([Slot("machine", 10), Slot("key:a", 1)], NOW)
    assert lease is not None
    assert lease.names == ("machine", "key:a")
    assert await state.acquire([Slot("machine", 10), Slot("key:a", 1)], NOW) is None
    assert await state.peek_slots(["machine", "key:a"], NOW) == [1, 1]
    await state.release(lease)
    assert await state.peek_slots(["machine", "key:a"], NOW) == [0, 0]
    assert await state.acquire([Slot("key:a", 0)], NOW) is None


async def test_a_slot_twice(state: State) -> None:
    """Two places of one slot are two."""
    assert await state.acquire([Slot("a", 1), Slot("a", 1)], NOW) is None
    lease = await state.acquire([Slot("a", 2), Slot("a", 2)], NOW)
    assert lease is not None
    assert await state.peek_slots(["a"], NOW) == [2]
    await state.release(lease)
    assert await state.peek_slots(["a"], NOW) == [0]


async def test_releasing_twice(state: State) -> None:
    """The second time gives nothing back."""
    first, second = [await state.acquire([Slot("a", 5)], NOW) for _ in range(2)]
    assert first is not None
    assert second is not None
    await state.release(first)
    await state.release(first)
    assert await state.peek_slots(["a"], NOW) == [1]


async def test_slots_end_with_a_silent_owner(store: Store) -> None:
    """Living owners keep theirs, a silent one loses all after the lease, and gets none back."""
    alive, silent = store.state(0), store.state(1)
    await alive.renew(NOW)
    mine = await alive.acquire([Slot("a", 2)], NOW)
    lost = await silent.acquire([Slot("a", 2), Slot("b", 1)], NOW)
    assert mine is not None
    assert lost is not None
    for second in range(1, 5):
        await alive.renew(NOW + second)
        assert await alive.acquire([Slot("a", 2)], NOW + second) is None
    late = NOW + LEASE_S + 0.5
    await alive.renew(late)
    assert await alive.peek_slots(["a", "b"], late) == [1, 0]
    assert await alive.acquire([Slot("a", 2)], late) is not None
    await silent.renew(late)
    assert await silent.acquire([Slot("a", 2)], late) is None
    again = await silent.acquire([Slot("b", 1)], late)
    assert again is not None
    await silent.release(lost)
    assert await alive.peek_slots(["a", "b"], late) == [2, 1]


async def test_a_refusal_looks_for_silent_owners_itself(store: Store) -> None:
    """Without a renew of anybody: whoever finds no place asks who still lives."""
    silent, asking = store.state(0), store.state(1)
    assert await silent.acquire([Slot("a", 1)], NOW) is not None
    assert await asking.acquire([Slot("a", 1)], NOW + LEASE_S - 0.1) is None
    assert await asking.acquire([Slot("a", 1)], NOW + LEASE_S + 0.1) is not None


async def test_renewing_keeps_slots(store: Store) -> None:
    """An owner that gives signs keeps its slots for ever; a request is a sign too."""
    one, two = store.state(0), store.state(1)
    assert await one.acquire([Slot("a", 1)], NOW) is not None
    assert await two.acquire([Slot("b", 1)], NOW) is not None
    for second in range(1, 60):
        await one.renew(NOW + second)
        assert await two.acquire([Slot("a", 1)], NOW + second) is None
    assert await one.peek_slots(["a", "b"], NOW + 59) == [1, 1]


async def test_closing_frees_slots(store: Store) -> None:
    """A worker that goes in order leaves nothing for its lease."""
    one, two = store.state(0), store.state(1)
    await one.acquire([Slot("a", 1)], NOW)
    store.opened.remove(one)
    await one.close()
    assert await two.acquire([Slot("a", 1)], NOW) is not None


# ── budgets ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_budget_is_exact(state: State) -> None:
    """To the last unit, and not one more."""
    assert await state.spend([Spend("day", 99, 100, DAY)], WALL) == [True]
    assert await state.spend([Spend("day", 2, 100, DAY)], WALL) == [False]
    assert await state.spend([Spend("day", 1, 100, DAY)], WALL) == [True]
    assert await state.spend([Spend("day", 1, 100, DAY)], WALL) == [False]
    assert await state.spend([Spend("day", 0, 100, DAY)], WALL) == [True]
    assert await state.peek_spend(["day"], WALL) == [100]


async def test_budgets_are_spent_together_or_not(state: State) -> None:
    """A month that is used up costs nothing of the day."""
    month = DAY + 86400 * 20
    assert await state.spend([Spend("d", 5, 100, DAY), Spend("m", 5, 8, month)], WALL) == [True, True]
    assert await state.spend([Spend("d", 5, 100, DAY), Spend("m", 5, 8, month)], WALL) == [True, False]
    assert await state.peek_spend(["d", "m"], WALL) == [5, 5]


async def test_a_budget_starts_again(state: State) -> None:
    """At its end; a late correction does not reach into the new period."""
    await state.spend([Spend("day", 60, 100, DAY)], WALL)
    assert await state.peek_spend(["day"], DAY - 0.001) == [60]
    assert await state.peek_spend(["day"], DAY) == [0]
    assert await state.spend([Spend("day", 100, 100, DAY + 86400)], DAY) == [True]
    await state.settle_spend([Spend("day", -50, 0, DAY)], DAY + 1)
    assert await state.peek_spend(["day"], DAY + 1) == [100]
    assert await state.spend([Spend("day", 1, 100, DAY)], DAY - 5) == [False]


async def test_settling_a_budget(state: State) -> None:
    """Real cost counts, past the limit too, also where nothing was reserved; never below 0."""
    await state.spend([Spend("a", 60, 100, DAY)], WALL)
    await state.settle_spend([Spend("a", -20, 0, DAY), Spend("b", 30, 0, DAY)], WALL)
    assert await state.peek_spend(["a", "b"], WALL) == [40, 30]
    await state.settle_spend([Spend("a", 100, 0, DAY), Spend("b", -31, 0, DAY)], WALL)
    assert await state.peek_spend(["a", "b"], WALL) == [140, 0]
    assert await state.spend([Spend("a", 0, 100, DAY)], WALL) == [False]


# ── several processes ────────────────────────────────────────────────────────────────────────────

OWNERS = (1, 2, 3, 4)


async def hammered(store: Store, job: str, witness: int = -1) -> list[Any]:
    """What four processes were granted in half a second; all of them are still there when it is known."""
    async with hammer.children(store.address, store.fds, OWNERS, job, 0.5, witness) as children:
        for child in children:
            child.go()
        return [await child.granted() for child in children]


async def test_hammered_buckets(store: Store) -> None:
    """In any stretch of time the burst and what the rate brought, and no more; over all of it, no less."""
    times = sorted(instant for child in await hammered(store, "buckets") for instant in child)
    rate_s, burst = hammer.NARROW.rate_per_minute / 60, hammer.NARROW.burst
    lowest = math.inf
    for index, instant in enumerate(times):
        # Of all stretches that end here the fullest began where this was lowest.
        lowest = min(lowest, index - rate_s * instant)
        assert index + 1 - rate_s * instant - lowest <= burst + 1e-3
    length = times[-1] - times[0]
    print(f"granted {len(times)} of {burst + rate_s * length:.1f} in {length:.2f} s")
    assert len(times) > burst + rate_s * length - 0.1 * burst
    # The wide bucket brings twice that: if refusals of the narrow one had cost it something, it were empty.
    assert await remaining(store.state(), hammer.WIDE, times[-1]) >= hammer.WIDE.burst - burst - 1


async def test_hammered_while_time_stands_still(store: Store) -> None:
    """Exactly the burst, and exactly as much from the other bucket."""
    granted = await hammered(store, "frozen")
    assert sum(granted) == hammer.NARROW.burst
    assert await remaining(store.state(), hammer.WIDE, 1000.0) == hammer.WIDE.burst - hammer.NARROW.burst


async def test_hammered_slots(store: Store) -> None:
    """Never more holders than places, as locks of the kernel testify."""
    witness = os.memfd_create("witness")
    try:
        told = await hammered(store, "slots", witness)
    finally:
        os.close(witness)
    assert [child["over"] for child in told] == [0, 0, 0, 0]
    assert min(child["held"] for child in told) > 10
    assert await store.state().peek_slots([slot.name for slot in hammer.SLOTS], time.monotonic()) == [0, 0]


async def test_hammered_budgets(store: Store) -> None:
    """The sum of all grants is the counter, of both alike; the smaller one is used up."""
    granted = await hammered(store, "budgets")
    assert min(granted) > 0
    total = sum(granted)
    assert await store.state().peek_spend(list(hammer.BUDGETS), time.monotonic()) == [total, total]
    assert 0 <= min(hammer.BUDGETS.values()) - total < hammer.LARGEST


@pytest.mark.parametrize("rounds", [2, pytest.param(5, marks=pytest.mark.slow)])
async def test_killed_at_random(store: Store, rounds: int) -> None:
    """Four kills a round amid all verbs: the others go on, and after a lease no slot is taken."""
    names = ["machine", *(f"key:{number}" for number in range(50))]
    state = store.state()
    async with hammer.children(store.address, store.fds, (1, 2), "everything", 60) as survivors:
        for survivor in survivors:
            survivor.go()
        for _ in range(rounds):
            async with hammer.children(store.address, store.fds, (3, 4, 5, 6), "everything", 60) as victims:
                for victim in victims:
                    victim.go()
                for victim in victims:
                    await asyncio.sleep(random.uniform(0.002, 0.03))
                    await victim.kill()
                    await _visit(state)
        for survivor in survivors:
            assert survivor.process.returncode is None
        (before,) = await state.peek_spend(["endless"], time.monotonic())
        while (await state.peek_spend(["endless"], time.monotonic()))[0] < before + 100:
            await _visit(state)
    machine, *keys = await state.peek_slots(names, time.monotonic())
    assert machine > 0
    assert abs(machine - sum(keys)) <= 6, "each process died between two names at most once"
    assert set(await state.peek_slots(names, time.monotonic() + LEASE_S + 1)) == {0}
    later = time.monotonic() + 60
    for charge in (hammer.WIDE, hammer.NARROW):
        assert await remaining(state, charge, later) == charge.burst


async def _visit(state: State) -> None:
    """Every lock that somebody could have died with; the test's time limit is the judge."""
    now = time.monotonic()
    await state.renew(now)
    await state.take([hammer.WIDE, hammer.NARROW], now)
    await state.peek_spend(["endless"], now)
    await state.peek_slots(["machine", *(f"key:{number}" for number in range(50))], now)


# ── shared memory alone ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small() -> Iterator[tuple[MemoryState, MemoryState]]:
    """Two owners of tables with one set of 64 cells each."""
    fd = shared.create(buckets=64, budgets=64, slots=64, owners=4, lease_s=LEASE_S)
    yield shared.attach(fd, 0), shared.attach(fd, 1)
    os.close(fd)


async def test_a_full_table_of_buckets(small: tuple[MemoryState, MemoryState]) -> None:
    """Nothing that counts is dropped: a new name is let through and counted; idle cells are used again."""
    state, other = small
    charges = [Charge(f"ip:{number}", 60, 10, 5) for number in range(64)]
    for charge in charges:
        await state.take([charge], NOW)
    assert state.overflow == 0
    for visits in range(1, 4):
        (decision,) = await other.take([Charge("ip:new", 60, 10, 10)], NOW)
        assert (decision.allowed, decision.remaining) == (True, 0)
        assert state.overflow == other.overflow == visits
    assert not (await state.take([Charge("ip:new", 60, 10, 11)], NOW))[0].allowed
    for charge in charges:
        assert await remaining(state, charge) == 5
    await state.take([Charge("ip:7", 60, 10, 5)], NOW)
    for number in range(63):  # five seconds later all are full again but ip:7
        await other.take([Charge(f"ip:later:{number}", 60, 10, 10)], NOW + 5.1)
    assert state.overflow == 3
    assert await remaining(state, charges[7], NOW + 5.1) == 5
    await state.take([Charge("ip:new", 60, 10, 10)], NOW + 5.1)
    assert state.overflow == 4


async def test_a_full_table_of_slots(small: tuple[MemoryState, MemoryState]) -> None:
    """The same: a name without a cell is let through, and its release takes nothing from anybody."""
    state, other = small
    leases = [await state.acquire([Slot(f"key:{number}", 1)], NOW) for number in range(64)]
    extra = await other.acquire([Slot("key:new", 1), Slot("key:3", 2)], NOW)
    assert extra is not None
    assert state.overflow == 1
    assert await state.peek_slots(["key:new", "key:3"], NOW) == [0, 2]
    await other.release(extra)
    assert await state.peek_slots(["key:3", "key:4"], NOW) == [1, 1]
    assert leases[4] is not None
    await state.release(leases[4])
    assert await other.acquire([Slot("key:new", 1)], NOW) is not None
    assert await other.acquire([Slot("key:new", 1)], NOW) is None
    state.forget(0)
    for number in range(100, 163):
        assert await other.acquire([Slot(f"key:{number}", 1)], NOW) is not None
    assert state.overflow == 1


async def test_a_full_table_of_budgets(small: tuple[MemoryState, MemoryState]) -> None:
    """The same: periods that are over make room."""
    state, other = small
    for number in range(64):
        await state.spend([Spend(f"day:{number}", 1, 10, DAY + number)], WALL)
    assert await other.spend([Spend("day:new", 1, 10, DAY)], WALL) == [True]
    assert (state.overflow, await state.peek_spend(["day:new"], WALL)) == (1, [0])
    assert await other.spend([Spend("day:new", 1, 10, DAY + 86400)], DAY) == [True]
    assert await state.peek_spend(["day:new", "day:0", "day:1"], DAY) == [1, 0, 1]
    assert state.overflow == 1


async def test_new_names_take_no_cell_from_their_own_call(small: tuple[MemoryState, MemoryState]) -> None:
    """An idle cell that this very call is about to use is not given to its other names."""
    state, _ = small
    for number in range(64):
        await state.take([Charge(f"ip:{number}", 60, 10)], NOW)
    later = NOW + 60
    for number in range(64):
        await state.take([Charge(f"ip:new:{number}", 60, 10, 2), Charge(f"ip:{number}", 60, 10, 3)], later)
        if await remaining(state, Charge(f"ip:{number}", 60, 10), later) == 10:
            break
        assert await remaining(state, Charge(f"ip:new:{number}", 60, 10), later) == 8
    assert number >= 31
    assert await remaining(state, Charge("ip:new:0", 60, 10), later) == 8
    assert await remaining(state, Charge("ip:0", 60, 10), later) == 7


@pytest.mark.parametrize("owners", [1, 2])
@pytest.mark.parametrize("seed", range(5))
async def test_slots_against_a_plain_count(owners: int, seed: int) -> None:
    """Alone with the file, where cells are remembered, and with another process, where they are looked for:
    leases, refusals and counts are those of a dict."""
    fd = shared.create(slots=64, owners=4, lease_s=LEASE_S)
    chance, states = random.Random(seed), [shared.attach(fd, owner) for owner in range(owners)]
    names = [f"slot:{number}" for number in range(12)]
    taken, leases = dict.fromkeys(names, 0), []
    together = [
        tuple([Slot(name, chance.randrange(4)) for name in chance.choices(names, k=chance.randint(1, 4))])
        for _ in range(60)
    ]
    for _ in range(900):
        state = chance.choice(states)
        if leases and chance.random() < 0.45:
            owner, lease = leases.pop(chance.randrange(len(leases)))
            owner.release_now(lease)
            for name in lease.names:
                taken[name] -= 1
        else:
            slots = chance.choice(together)
            lease = state.acquire_now(slots, NOW)
            wanted = dict(taken)
            fits = all([_count_up(wanted, slot) for slot in slots])
            assert (lease is not None) == fits
            if lease is not None:
                taken = wanted
                leases.append((state, lease))
        assert await state.peek_slots(names, NOW) == list(taken.values())
    os.close(fd)


def _count_up(taken: dict[str, int], slot: Slot) -> bool:
    taken[slot.name] += 1
    return taken[slot.name] <= slot.limit


async def test_a_remembered_cell_that_is_another_names() -> None:
    """Alone with a file whose cells are all taken: who was idle long enough lost its cell, and knows it."""
    fd = shared.create(buckets=64, slots=64, owners=4, lease_s=LEASE_S)
    state = shared.attach(fd, 0)
    first = Charge("first", 60, 10, 4)
    for _ in range(2):  # a cell is remembered when it was found
        state.take_now([first], NOW)
        lease = state.acquire_now([Slot("first", 1)], NOW)
        assert lease is not None
        state.release_now(lease)
    others = [f"other:{number}" for number in range(64)]
    for name in others:
        state.take_now([Charge(name, 60, 10, 4)], NOW + 60)
        assert state.acquire_now([Slot(name, 1)], NOW) is not None
    assert state.overflow == 0
    state.take_now([first], NOW + 60)
    state.settle_now([Charge("first", 60, 10, 3)], NOW + 60)
    assert state.acquire_now([Slot("first", 1)], NOW) is not None
    assert state.overflow == 3, "there was no cell for it any more"
    assert {await remaining(state, Charge(name, 60, 10), NOW + 60) for name in others} == {6}
    assert set(await state.peek_slots(others, NOW)) == {1}
    os.close(fd)


async def test_a_remembered_cell_when_a_second_process_comes() -> None:
    """From then on the other may give an idle cell to another name."""
    fd = shared.create(buckets=64, slots=64, owners=4, lease_s=LEASE_S)
    state = shared.attach(fd, 0)
    for _ in range(2):  # a cell is remembered when it was found
        state.take_now([Charge("first", 60, 10, 4)], NOW)
    other = shared.attach(fd, 1)
    names = [f"other:{number}" for number in range(63)] + ["last"]
    for name in names:
        other.take_now([Charge(name, 60, 10, 4)], NOW + 60)
    state.take_now([Charge("first", 60, 10, 4)], NOW + 60)
    assert {await remaining(other, Charge(name, 60, 10), NOW + 60) for name in names} == {6}
    os.close(fd)


async def test_forgetting_an_owner(small: tuple[MemoryState, MemoryState]) -> None:
    """Its slots are free at once; a new process under its number starts with none."""
    state, other = small
    assert await other.acquire([Slot("a", 1)], NOW) is not None
    state.forget(1)
    lost = await other.acquire([Slot("a", 1)], NOW)
    assert lost is not None
    await state.acquire([Slot("b", 1)], NOW)
    again = shared.attach(other._fd, 1)
    assert await state.peek_slots(["a", "b"], NOW) == [0, 1]
    assert await again.acquire([Slot("a", 1)], NOW) is not None
    await other.release(lost)
    assert await state.peek_slots(["a"], NOW) == [1]


async def test_a_lock_dies_with_its_holder(memory: Store) -> None:
    """Somebody is killed while holding every lock: nobody waits for it."""
    state = memory.state()
    (fd,) = memory.fds
    async with hammer.children(memory.address, memory.fds, [1], "hold", 1, witness=fd) as (holder,):
        holder.go()
        assert await holder.granted()
        with pytest.raises(BlockingIOError):
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        await holder.kill()
        await _visit(state)


@pytest.mark.parametrize("names", [("b",), ("b", "c")])
async def test_a_clock_that_jumped_back(memory: Store, names: tuple[str, ...]) -> None:
    """Nobody waits for the jump: at most for what was taken, as if it had been taken now."""
    state, charges = memory.state(), [Charge(name, 60, 1, 1) for name in names]
    for now, allowed in ((NOW + 1000, True), (NOW, False), (NOW + 2.1, True)):
        assert {decision.allowed for decision in await state.take(charges, now)} == {allowed}


def test_other_files_are_refused() -> None:
    """With a sentence, not with a crash later."""
    fd = os.memfd_create("other")
    try:
        for size in (0, 4096):
            os.ftruncate(fd, size)
            with pytest.raises(ValueError, match="counters"):
                shared.attach(fd, 0)
    finally:
        os.close(fd)
    fd = shared.create(owners=2)
    try:
        with pytest.raises(ValueError, match="owner 2"):
            shared.attach(fd, 2)
    finally:
        os.close(fd)


def test_without_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that lacks it gets an unlinked file."""
    monkeypatch.delattr(os, "memfd_create")
    fd = shared.create()
    shared.attach(fd, 0)
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


def test_a_system_without_memory() -> None:
    """Nothing stays open."""
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            shared.create()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(os.listdir("/proc/self/fd")) == before


class Killed(BaseException):
    """Stands for SIGKILL."""


class Mortal:
    """Shared memory whose writer dies before its n-th store."""

    def __init__(self, words: memoryview[int], stores: int) -> None:
        self._words = words
        self.stores = stores

    def __getitem__(self, at: int) -> int:
        return self._words[at]

    def __setitem__(self, at: int, word: int) -> None:
        if not self.stores:
            raise Killed
        self.stores -= 1
        self._words[at] = word


A, B = Charge("a", 60, 10, 3), Charge("b", 60, 10, 4)
VERBS: dict[str, Callable[[MemoryState, float], Coroutine[Any, Any, Any]]] = {
    "take": lambda state, later: state.take([A, B], NOW + later),
    "settle": lambda state, later: state.settle([A, B], NOW + later),
    "acquire": lambda state, later: state.acquire([Slot("a", 2), Slot("b", 2)], NOW + later),
    "spend": lambda state, later: state.spend(
        [Spend("a", 3, 10, DAY + 2 * later), Spend("b", 4, 10, DAY + 2 * later)], WALL + later
    ),
}


@pytest.mark.parametrize("later", [0.0, 86400.0], ids=["same", "idle"])
@pytest.mark.parametrize("known", ["", "a", "ab"])
@pytest.mark.parametrize("verb", VERBS)
async def test_killed_before_every_store(verb: str, known: str, later: float) -> None:
    """In a table that is full of names, some of them idle: a verb cut off anywhere is at worst a charge that
    nobody used. Its names count right afterwards, and no slot is left."""
    for stores in itertools.count():
        fd = shared.create(buckets=64, budgets=64, slots=64, owners=4, lease_s=1e6)
        state, dying = shared.attach(fd, 0), shared.attach(fd, 1)
        await _crowd(state, known)
        finished = await _die(dying, VERBS[verb](dying, later), stores)
        assert finished or stores < 20
        await _is_sane(state, later, verb, known)
        os.close(fd)
        if finished:
            break
    assert stores >= 2


async def _crowd(state: MemoryState, known: str) -> None:
    """A day later all of these are idle; 62 cells are idle at once already, if not free."""
    for name in known:
        await state.take([Charge(name, 60, 10, 1)], NOW)
        await state.spend([Spend(name, 1, 10, DAY)], WALL)
        lease = await state.acquire([Slot(name, 2)], NOW)
        assert lease is not None
        await state.release(lease)
    for number in range(64 - len(known)):
        await state.take([Charge(str(number), 60, 10, 1)], NOW - 500)
        await state.spend([Spend(str(number), 1, 10, WALL - 400)], WALL - 500)
        lease = await state.acquire([Slot(str(number), 2)], NOW)
        assert lease is not None
        await state.release(lease)


async def _die(state: MemoryState, verb: Coroutine[Any, Any, Any], stores: int) -> bool:
    """Whether it came to its end after all."""
    mortal: Any = Mortal(state._words, stores)
    for holder in (state, state._buckets, state._budgets, state._slots):
        holder._words = mortal
    try:
        await verb
    except Killed:
        return False
    return True


async def _is_sane(state: MemoryState, later: float, verb: str, known: str) -> None:
    now, wall = NOW + later, WALL + later
    others = [str(number) for number in range(64)]
    assert all([await remaining(state, Charge(name, 60, 10), now) == 10 for name in others])
    assert set(await state.peek_spend(others, wall)) == set(await state.peek_slots(others, now)) == {0}
    for charge in (A, B):
        name = charge.bucket_id
        used = 1 if name in known and not later else 0
        left = await remaining(state, charge, now)
        assert left in (
            (10 - used, 10 - used - charge.amount) if verb in ("take", "settle") else (10 - used,)
        )
        (spent,) = await state.peek_spend([name], wall)
        assert spent in ((used, used + charge.amount) if verb == "spend" else (used,))
        assert (await state.take([Charge(name, 60, 10, left)], now))[0].allowed
        assert not (await state.take([Charge(name, 60, 10, 1)], now))[0].allowed
        rest = 10 - spent
        assert await state.spend([Spend(name, rest, 10, DAY + 2 * later)], wall) == [True]
        assert await state.spend([Spend(name, 1, 10, DAY + 2 * later)], wall) == [False]
    state.forget(1)
    assert await state.peek_slots(["a", "b"], now) == [0, 0]
    for places in (1, 2):
        assert await state.acquire([Slot("a", 2), Slot("b", 2)], now) is not None
        assert await state.peek_slots(["a", "b"], now) == [places, places]
    assert await state.acquire([Slot("a", 2)], now) is None
    assert state.overflow == 0
