"""The waiting room of one process, on shared memory, on shared memory that is slow, and on a real Redis."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.errors import Draining, HeadraceError, Internal, QueueFull, QueueTimeout
from proxy.permit import Permit, Ticket, Wanted
from proxy.slots import WaitingRoom
from proxy.state import Slot, State, StoreUnavailable
from proxy.state import memory as shared
from proxy.state.memory import Held, MemoryState
from proxy.state.redis import RedisState
from tests.kit.headrace import until
from tests.kit.redis import redis_server

pytestmark = pytest.mark.timeout(30)

MACHINE = Slot("machine", 100)
ONE = Slot("up:one", 1)
TWO = Slot("up:two", 1)
#: One place on the machine and at the upstream `one`.
WANTED = Wanted((MACHINE,), (("one", ONE),))
BASIC, PRO, ENTERPRISE = Ticket("basic", 0), Ticket("pro", 5), Ticket("enterprise", 10)


class Far(MemoryState):
    """Shared memory at the end of a long way: each verb suspends before and after it happens."""

    near = None

    async def acquire(self, slots: Sequence[Slot], now: float) -> Held | None:
        await asyncio.sleep(0)
        held = await super().acquire(slots, now)
        await asyncio.sleep(0)
        return held

    async def release(self, lease: Any) -> None:
        await asyncio.sleep(0)
        await super().release(lease)
        await asyncio.sleep(0)

    async def peek_slots(self, names: Sequence[str], now: float) -> list[int]:
        await asyncio.sleep(0)
        taken = await super().peek_slots(names, now)
        await asyncio.sleep(0)
        return taken


class Lab:
    """A store with one room, and what a test wants to know about both."""

    def __init__(self, state: State, other: State) -> None:
        self.state = state
        self.other = other  # another process, as it were
        self.waits: list[str] = []
        self.room = self.open_room()

    def open_room(self, max_waiting: int = 200, max_wait_s: float = 20.0, **more: Any) -> WaitingRoom:
        more.setdefault("waited", lambda plan, _: self.waits.append(plan))
        self.room = WaitingRoom(self.state, max_waiting, max_wait_s, **more)
        return self.room

    async def taken(self, *slots: Slot) -> list[int]:
        return await self.other.peek_slots([slot.name for slot in slots or (MACHINE, ONE)], time.monotonic())

    async def becomes(self, taken: list[int], *slots: Slot) -> None:
        """A give-back to a store that is far away takes its time."""
        async with asyncio.timeout(5):
            while await self.taken(*slots) != taken:
                await asyncio.sleep(0.001)

    def enter(self, wanted: Wanted = WANTED, ticket: Ticket = BASIC) -> asyncio.Task[Permit]:
        return asyncio.get_running_loop().create_task(self.room.enter(wanted, ticket))

    async def queue(self, *tickets: Ticket, wanted: Wanted = WANTED) -> list[asyncio.Task[Permit]]:
        """One waiter each, in this order."""
        waiting = []
        for ticket in tickets:
            before = self.room.waiting
            waiting.append(self.enter(wanted, ticket))
            await until(lambda before=before: self.room.waiting == before + 1)  # type: ignore[misc]  # a default binds the value of now
        return waiting


@asynccontextmanager
async def _memory(kind: type[MemoryState]) -> AsyncIterator[Lab]:
    fd = shared.create(lease_s=600)  # nobody renews here: a leak must not look like a give-back
    lab = Lab(kind(fd, 0), shared.attach(fd, 1))
    yield lab
    await lab.room.close()
    await lab.state.close()
    await lab.other.close()
    os.close(fd)


@asynccontextmanager
async def near() -> AsyncIterator[Lab]:
    async with _memory(MemoryState) as lab:
        yield lab


@asynccontextmanager
async def far() -> AsyncIterator[Lab]:
    async with _memory(Far) as lab:
        yield lab


@asynccontextmanager
async def on_redis() -> AsyncIterator[Lab]:
    async with redis_server() as server:
        lab = Lab(*(RedisState(server.url, 2.0, lease_s=600) for _ in range(2)))
        yield lab
        await lab.room.close()
        await lab.state.close()
        await lab.other.close()


@pytest.fixture(params=[near, far, on_redis], ids=["memory", "far", "redis"])
async def lab(request: pytest.FixtureRequest) -> AsyncIterator[Lab]:
    async with request.param() as made:
        yield made


@pytest.fixture(params=[near, far], ids=["memory", "far"])
async def quick(request: pytest.FixtureRequest) -> AsyncIterator[Lab]:
    async with request.param() as made:
        yield made


async def in_time(work: Awaitable[Permit]) -> Permit:
    async with asyncio.timeout(5):
        return await work


# ── free slots ───────────────────────────────────────────────────────────────────────────────────────────


async def test_free_slots_are_taken_at_once(lab: Lab) -> None:
    """Both together; given back once, however often one says so."""
    permit = await lab.room.enter(WANTED, BASIC)
    assert permit.upstream == "one"
    assert await lab.taken() == [1, 1]
    with permit:
        pass
    await lab.becomes([0, 0])
    permit.release()
    again = await lab.room.enter(WANTED, BASIC)
    permit.release()
    assert await lab.taken() == [1, 1]
    again.release()
    await lab.becomes([0, 0])
    assert lab.room.waiting == 0
    assert lab.waits == []


async def test_the_first_choice_that_is_free(lab: Lab) -> None:
    """In the order of preference; then whichever comes free."""
    wanted = Wanted((MACHINE,), (("one", ONE), ("two", TWO)))
    first, second = await lab.room.enter(wanted, BASIC), await lab.room.enter(wanted, BASIC)
    assert [first.upstream, second.upstream] == ["one", "two"]
    assert await lab.room.direct.try_now(wanted) is None
    (waiting,) = await lab.queue(BASIC, wanted=wanted)
    second.release()
    third = await in_time(waiting)
    assert third.upstream == "two"
    first.release()
    third.release()
    await lab.becomes([0, 0, 0], MACHINE, ONE, TWO)


# ── waiting ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_waiter_holds_nothing(lab: Lab) -> None:
    """Neither the machine's slot while the upstream is full, nor the other way round."""
    permit = await lab.room.enter(WANTED, BASIC)
    narrow = Wanted((Slot("narrow", 1),), (("two", TWO),))
    other = await lab.room.enter(narrow, BASIC)
    for_upstream = await lab.queue(BASIC, BASIC)
    for_machine = await lab.queue(BASIC, wanted=Wanted(narrow.base, (("three", Slot("up:three", 5)),)))
    assert await lab.taken(MACHINE, Slot("up:three", 5)) == [1, 0]
    for waiter in (*for_upstream, *for_machine):
        waiter.cancel()
    await until(lambda: lab.room.waiting == 0)
    permit.release()
    other.release()
    await lab.becomes([0, 0], MACHINE, Slot("narrow", 1))


async def test_the_middle_one_leaves(lab: Lab) -> None:
    """One slot, three waiters: the order stays, no wake-up is lost, no slot leaks."""
    permit = await lab.room.enter(WANTED, BASIC)
    first, middle, last = await lab.queue(BASIC, BASIC, BASIC)
    middle.cancel()
    await asyncio.wait([middle])
    assert lab.room.waiting == 2
    permit.release()
    got = await in_time(first)
    assert not last.done()
    got.release()
    (await in_time(last)).release()
    await lab.becomes([0, 0])
    assert lab.waits == ["basic", "basic"]


async def test_leaving_in_the_instant_of_the_grant(quick: Lab) -> None:
    """The grant is made, the waiter does not know yet, and is cancelled: the next one gets the slot."""
    tasks: list[asyncio.Task[Permit]] = []
    room = quick.open_room(waited=lambda *_: tasks[0].cancel())
    permit = await room.enter(WANTED, BASIC)
    tasks += await quick.queue(BASIC, BASIC)
    permit.release()
    await asyncio.wait([tasks[0]], timeout=5)
    assert tasks[0].cancelled()
    (await in_time(tasks[1])).release()
    await quick.becomes([0, 0])


async def test_cancelled_and_not_yet_awake(quick: Lab) -> None:
    """Cancelled in the same step in which the slot comes free: nothing is lost on the one that is going."""
    permit = await quick.room.enter(WANTED, BASIC)
    first, second = await quick.queue(BASIC, BASIC)
    quick.room.released()
    first.cancel()
    permit.release()
    (await in_time(second)).release()
    await asyncio.wait([first])
    assert first.cancelled()
    await quick.becomes([0, 0])


@pytest.mark.parametrize("steps", range(12))
async def test_leaving_so_many_steps_after_the_release(quick: Lab, steps: int) -> None:
    """At every step between give-back and grant: it has its permit, or leaves nothing behind."""
    permit = await quick.room.enter(WANTED, BASIC)
    first, second = await quick.queue(BASIC, BASIC)
    permit.release()
    for _ in range(steps):
        await asyncio.sleep(0)
    if not first.cancel():
        (await first).release()
    (await in_time(second)).release()
    await quick.becomes([0, 0])


@pytest.mark.parametrize("steps", range(6))
async def test_leaving_so_many_steps_after_coming(quick: Lab, steps: int) -> None:
    """With its slot free: cut off in the middle of taking it."""
    task = quick.enter()
    for _ in range(steps):
        await asyncio.sleep(0)
    if not task.cancel():
        (await task).release()
    await asyncio.wait([task])
    await quick.becomes([0, 0])


async def test_a_slot_that_another_process_gave_back(lab: Lab) -> None:
    """Nobody tells the room: it looks."""
    lease = await lab.other.acquire([ONE], time.monotonic())
    assert lease is not None
    (waiting,) = await lab.queue(BASIC)
    await lab.other.release(lease)
    (await in_time(waiting)).release()
    await lab.becomes([0, 0])


async def test_a_full_upstream_holds_up_nobody_else(lab: Lab) -> None:
    """Another model passes: at once when it comes later, and out of the queue when its slot is free."""
    one, two = await lab.room.enter(WANTED, BASIC), Wanted((MACHINE,), (("two", TWO),))
    first = await lab.queue(BASIC, PRO)
    await until(lambda: lab.room.contended == {ONE.name})
    newcomer = await in_time(lab.room.enter(two, BASIC))
    (behind,) = await lab.queue(BASIC, wanted=two)
    newcomer.release()
    (await in_time(behind)).release()
    assert [waiter.done() for waiter in first] == [False, False]
    one.release()
    (await in_time(first[1])).release()
    (await in_time(first[0])).release()
    await lab.becomes([0, 0, 0], MACHINE, ONE, TWO)
    await until(lambda: lab.room.contended == set())


async def test_nobody_barges(lab: Lab) -> None:
    """The slot is free again, its waiter has not got it yet: a newcomer and a failover find it taken."""
    lease = await lab.other.acquire([ONE], time.monotonic())
    assert lease is not None
    (waiting,) = await lab.queue(BASIC)
    await until(lambda: lab.room.contended == {ONE.name})
    await lab.other.release(lease)
    assert await lab.room.direct.try_now(WANTED) is None
    newcomer = lab.enter()
    permit = await in_time(waiting)
    assert not newcomer.done()
    permit.release()
    (await in_time(newcomer)).release()


# ── order ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_shares_of_a_thousand_grants(quick: Lab) -> None:
    """One slot, three plans that never run out: 1 to 6 to 11, to the grant."""
    room = quick.open_room(max_waiting=3000)
    served: list[str] = []
    permit = await room.enter(WANTED, BASIC)

    async def one(ticket: Ticket) -> None:
        with await room.enter(WANTED, ticket):
            served.append(ticket.plan)

    work = [asyncio.ensure_future(one(t)) for _ in range(900) for t in (BASIC, PRO, ENTERPRISE)]
    await until(lambda: room.waiting == 2700)
    assert room.depths() == {"basic": 900, "pro": 900, "enterprise": 900}
    permit.release()
    await until(lambda: len(served) >= 1000, 20)
    for task in work:
        task.cancel()
    counts = Counter(served[:1000])
    for ticket, weight in ((BASIC, 1), (PRO, 6), (ENTERPRISE, 11)):
        assert abs(counts[ticket.plan] - 1000 * weight / 18) < 1
    await asyncio.wait(work)
    await quick.becomes([0, 0])


async def test_in_no_hurry(quick: Lab) -> None:
    """A caller that lowers its own priority goes after its plan, but still goes: a tenth of the share."""
    served: list[bool] = []
    permit = await quick.room.enter(WANTED, BASIC)

    async def one(ticket: Ticket) -> None:
        with await quick.room.enter(WANTED, ticket):
            served.append(ticket.low)

    work = [asyncio.ensure_future(one(Ticket("pro", 5, low=number < 2))) for number in range(25)]
    await until(lambda: quick.room.waiting == 25)
    assert quick.room.depths() == {"pro": 25}
    permit.release()
    await asyncio.wait(work, timeout=5)
    first, second = [number for number, low in enumerate(served) if low]
    assert (first in (9, 10), second in (20, 21)) == (True, True)  # ties with the tenth and twentieth
    await quick.becomes([0, 0])


async def test_the_lowest_plan_is_served_among_newcomers(quick: Lab) -> None:
    """Enterprise requests that keep coming, three at a time, do not starve one of the basic plan."""
    permit = await quick.room.enter(WANTED, BASIC)
    (basic,) = await quick.queue(BASIC)
    others = await quick.queue(*[ENTERPRISE] * 3)
    grants = 0
    permit.release()
    while not basic.done():
        done, _ = await asyncio.wait([basic, *others], return_when=asyncio.FIRST_COMPLETED, timeout=5)
        assert done
        for task in done - {basic}:
            grants += 1
            others.remove(task)
            others += await quick.queue(ENTERPRISE)
            (await task).release()
    assert grants <= 12
    for task in (basic, *others):
        (await in_time(task)).release()


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_too_late(lab: Lab) -> None:
    """A deadline for each waiter: 503 with a Retry-After; those who may still wait are not touched."""
    room = lab.open_room(max_wait_s=0.05)
    permit = await room.enter(WANTED, PRO)
    (late,) = await lab.queue(PRO)
    room.max_wait_s = 20
    (patient,) = await lab.queue(PRO)
    with pytest.raises(QueueTimeout) as caught:
        await in_time(late)
    assert (caught.value.status, caught.value.code) == (503, "queue_timeout")
    assert caught.value.headers["Retry-After"] == "2"  # one waits, and nothing is known about a grant
    assert lab.waits == ["pro"]
    permit.release()
    (await in_time(patient)).release()
    await lab.becomes([0, 0])


async def test_no_room(lab: Lab) -> None:
    """Bounded: one more than may wait is refused at once, unless its slots are free."""
    room = lab.open_room(max_waiting=2)
    permit = await room.enter(WANTED, BASIC)
    waiting = await lab.queue(BASIC, BASIC)
    with pytest.raises(QueueFull) as caught:
        await in_time(room.enter(WANTED, ENTERPRISE))
    assert (caught.value.status, caught.value.code) == (503, "overloaded")
    assert caught.value.headers["Retry-After"] == "3"
    await until(lambda: room.contended == {ONE.name})
    (await in_time(room.enter(Wanted((MACHINE,), (("two", TWO),)), BASIC))).release()
    room.max_waiting = 3
    waiting += await lab.queue(BASIC)
    permit.release()
    for waiter in waiting:
        (await in_time(waiter)).release()
    room.max_waiting = 0
    permit = await room.enter(WANTED, BASIC)
    with pytest.raises(QueueFull):
        await in_time(room.enter(WANTED, BASIC))
    permit.release()


async def test_retry_after_is_how_fast_it_drains() -> None:
    """Two seconds between two grants, three waiting: the fourth is told eight seconds."""
    now = 1000.0
    async with near() as lab:
        room = lab.open_room(max_waiting=4, clock=lambda: now)
        permit = await room.enter(WANTED, BASIC)
        waiting = await lab.queue(*[BASIC] * 4)
        for _ in range(6):
            now += 2
            permit.release()
            permit = await in_time(waiting.pop(0))
            waiting += await lab.queue(BASIC)
        room.max_waiting = 3
        waiting.pop(0).cancel()
        await until(lambda: room.waiting == 3)
        with pytest.raises(QueueFull) as caught:
            await in_time(room.enter(WANTED, BASIC))
        assert caught.value.headers["Retry-After"] == "8"
        permit.release()
        for waiter in waiting:
            (await in_time(waiter)).release()


async def test_closing(lab: Lab) -> None:
    """Those who wait are told to come back; so is everybody after them."""
    permit = await lab.room.enter(WANTED, BASIC)
    waiting = await lab.queue(BASIC, PRO)
    await lab.room.close()
    for waiter in waiting:
        with pytest.raises(Draining):
            await in_time(waiter)
    with pytest.raises(Draining):
        await in_time(lab.room.enter(WANTED, BASIC))
    permit.release()
    await lab.becomes([0, 0])
    (await in_time(lab.room.enter(WANTED, BASIC))).release()
    await lab.becomes([0, 0])


async def test_the_store_goes_away() -> None:
    """Those who wait hear it, and so do those who come; afterwards everything is as new."""
    async with redis_server() as server:
        state = RedisState(server.url, lease_s=600)
        room = WaitingRoom(state, 10, 20.0)
        lease = await state.acquire([ONE], 0.0)
        waiting = asyncio.ensure_future(room.enter(WANTED, BASIC))
        await until(lambda: room.waiting == 1)
        await server.kill()
        with pytest.raises(StoreUnavailable):
            await in_time(waiting)
        with pytest.raises(StoreUnavailable):
            await in_time(room.enter(WANTED, BASIC))
        assert await _fails_away(lambda: room.direct.try_now(WANTED))
        await server.start()
        assert lease is not None
        await until(lambda: room.contended == set())

        async def back() -> Permit:
            while True:
                try:
                    return await room.enter(WANTED, BASIC)
                except StoreUnavailable:
                    await asyncio.sleep(0.05)

        permit = await in_time(back())
        permit.release()
        await room.close()
        await state.close()


async def _fails_away(ask: Callable[[], Awaitable[Permit | None]]) -> bool:
    try:
        await ask()
    except StoreUnavailable:
        return True
    return False


async def test_a_fault_of_our_own_strands_nobody() -> None:
    """Whoever still waits is told, and the room serves those who come after."""

    def fault(*_: object) -> None:
        raise ValueError("a bug")

    async with near() as lab:
        room = lab.open_room(waited=fault)
        permit = await room.enter(WANTED, BASIC)
        first, second = await lab.queue(BASIC, BASIC)
        permit.release()
        got = await in_time(first)
        with pytest.raises(Internal):
            await in_time(second)
        (third,) = await lab.queue(BASIC)
        got.release()
        (await in_time(third)).release()
        await lab.becomes([0, 0])


# ── failover ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_failover(lab: Lab) -> None:
    """The upstream's slot is exchanged, the machine's stays, even where others wait for it."""
    machine = Slot("machine", 1)
    permit = await lab.room.enter(Wanted((machine,), (("one", ONE),)), BASIC)
    (waiting,) = await lab.queue(PRO, wanted=Wanted((machine,), (("one", ONE),)))
    assert await lab.room.direct.failover(permit, (("two", TWO),))
    assert permit.upstream == "two"
    await lab.becomes([1, 0, 1], machine, ONE, TWO)
    three = Slot("up:three", 1)
    assert await lab.room.direct.failover(permit, (("three", three),))
    await lab.becomes([1, 0, 0, 1], machine, ONE, TWO, three)
    assert not waiting.done()
    permit.release()
    (await in_time(waiting)).release()
    await lab.becomes([0, 0, 0, 0], machine, ONE, TWO, three)


async def test_failover_takes_only_what_is_free(lab: Lab) -> None:
    """If no slot is free at once the permit is as it was."""
    permit = await lab.room.enter(WANTED, BASIC)
    other = await lab.room.enter(Wanted((MACHINE,), (("two", TWO),)), BASIC)
    assert not await lab.room.direct.failover(permit, (("two", TWO),))
    assert permit.upstream == "one"
    assert await lab.taken(MACHINE, ONE, TWO) == [2, 1, 1]
    permit.release()
    other.release()
    await lab.becomes([0, 0, 0], MACHINE, ONE, TWO)


@pytest.mark.parametrize("steps", range(1, 9))
async def test_leaving_during_a_failover(quick: Lab, steps: int) -> None:
    """At any step: what it had and what it was about to get are given back."""
    permit = await quick.room.enter(WANTED, BASIC)

    async def request() -> None:
        with permit:
            await quick.room.direct.failover(permit, (("two", TWO),))
            await asyncio.Event().wait()

    task = asyncio.ensure_future(request())
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await quick.becomes([0, 0, 0], MACHINE, ONE, TWO)


# ── everything at once ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(8))
async def test_thousands_come_and_leave_at_any_instant(quick: Lab, seed: int) -> None:
    """No slot is ever given twice; at the end none is taken, nobody waits, and somebody was served."""
    chance = random.Random(seed)
    machine, limits = Slot("machine", 5), {"one": 1, "two": 3, "three": 2}
    slots = {name: Slot(f"up:{name}", limit) for name, limit in limits.items()}
    room = quick.open_room(max_waiting=40, max_wait_s=chance.choice((20.0, 0.003)))
    inside: Counter[str] = Counter()
    ended: Counter[str] = Counter()

    async def request(names: list[str], ticket: Ticket, steps: int) -> None:
        try:
            with await room.enter(
                Wanted((machine,), tuple((name, slots[name]) for name in names)), ticket
            ) as permit:
                upstream = permit.upstream
                inside[upstream] += 1
                try:
                    assert inside[upstream] <= limits[upstream]
                    assert inside.total() <= machine.limit
                    for _ in range(steps):
                        await asyncio.sleep(0)
                finally:
                    inside[upstream] -= 1
            ended["served"] += 1
        except asyncio.CancelledError:
            ended["left"] += 1
            raise
        except HeadraceError as error:
            ended[error.code] += 1

    tasks: list[asyncio.Task[None]] = []
    for _ in range(3000):
        names = chance.sample(list(limits), chance.randint(1, 3))
        ticket = chance.choice((BASIC, PRO, ENTERPRISE, Ticket("pro", 5, low=True)))
        tasks.append(asyncio.ensure_future(request(names, ticket, chance.randint(0, 6))))
        for task in chance.sample(tasks, min(len(tasks), chance.choice((0, 0, 1, 3)))):
            task.cancel()
        for _ in range(chance.choice((0, 0, 1, 4))):
            await asyncio.sleep(0)
        tasks = [task for task in tasks if not task.done()]
    if tasks:
        await asyncio.wait(tasks, timeout=15)
    assert not any(not task.done() for task in tasks), f"seed {seed}: {ended}"
    await quick.becomes([0, 0, 0, 0], machine, *slots.values())
    await until(lambda: room.waiting == 0 and room.contended == set() and room.depths() == {})
    assert ended["served"] > 200
    assert ended["left"] > 50
