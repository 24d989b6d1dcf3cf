"""The waiting room of several workers: real channels, one shared memory, and processes that are killed."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from proxy.control import Channel
from proxy.errors import Draining, HeadraceError, Internal, Overloaded, QueueFull, QueueTimeout
from proxy.permit import Direct, Permit, Ticket, Wanted
from proxy.slots import WaitingRoom
from proxy.slots_remote import Door, RemoteRoom
from proxy.state import Slot
from proxy.state import memory as shared
from tests.kit import waiter
from tests.kit.headrace import ROOT, until

pytestmark = pytest.mark.timeout(30)

MACHINE = Slot("machine", 100)
ONE = Slot("up:one", 1)
TWO = Slot("up:two", 1)
WANTED = Wanted((MACHINE,), (("one", ONE),))
OTHER = Wanted((MACHINE,), (("two", TWO),))
BASIC, ENTERPRISE = Ticket("basic", 0), Ticket("enterprise", 10)
#: Nobody renews here: a leak must not look like a give-back.
LEASE_S = 600.0


async def refuse(verb: str, _: Any) -> Any:
    raise ValueError(verb)


async def open_channel(sock: socket.socket, listener: Callable[[str, Any], None]) -> Channel:
    sock.setblocking(False)
    return await Channel.open(sock, refuse, listener)


class Worker:
    """Both ends of one worker's channel, and the notes that went through."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, Any]] = []
        self.said: list[tuple[str, Any]] = []
        self.door: Door
        self.room: RemoteRoom
        self.near: Channel
        self.far: Channel

    async def open(self, house: House, max_wait_s: float = 20.0) -> None:
        ours, theirs = socket.socketpair()
        self.near = await open_channel(ours, self._at_the_door)
        self.far = await open_channel(theirs, self._in_the_room)
        self.door = Door(self.near, house.room)
        self.state = house.attach()
        self.room = RemoteRoom(self.far, Direct(self.state), max_wait_s)
        await until(lambda: bool(self.notes))

    def _at_the_door(self, verb: str, payload: Any) -> None:
        self.notes.append((verb, payload))
        self.door.heard(verb, payload)

    def _in_the_room(self, verb: str, payload: Any) -> None:
        self.said.append((verb, payload))
        self.room.heard(verb, payload)

    def enter(self, wanted: Wanted = WANTED, ticket: Ticket = BASIC) -> asyncio.Task[Permit]:
        return asyncio.get_running_loop().create_task(self.room.enter(wanted, ticket))

    @property
    def contended(self) -> frozenset[str]:
        return self.room.direct.contended


class House:
    """A supervisor with its waiting room, and workers."""

    def __init__(self) -> None:
        self.fd = shared.create(lease_s=LEASE_S)
        self.states = [shared.attach(self.fd, 0)]
        self.room = WaitingRoom(self.states[0], 200, 20.0)
        self.workers: list[Worker] = []

    def attach(self) -> shared.MemoryState:
        self.states.append(shared.attach(self.fd, len(self.states)))
        return self.states[-1]

    async def worker(self, **more: float) -> Worker:
        self.workers.append(Worker())
        await self.workers[-1].open(self, **more)
        return self.workers[-1]

    async def taken(self, *slots: Slot) -> list[int]:
        names = [slot.name for slot in slots or (MACHINE, ONE, TWO)]
        return await self.states[0].peek_slots(names, time.monotonic())

    async def becomes(self, taken: list[int], *slots: Slot) -> None:
        async with asyncio.timeout(5):
            while await self.taken(*slots) != taken:
                await asyncio.sleep(0.001)

    async def waits(self, worker: Worker, *, wanted: Wanted = WANTED, ticket: Ticket = BASIC) -> Any:
        """One more waiter of this worker, once it stands in the supervisor's room."""
        before = self.room.waiting
        task = worker.enter(wanted, ticket)
        await until(lambda: self.room.waiting == before + 1)
        return task

    async def close(self) -> None:
        await self.room.close()
        for worker in self.workers:
            for channel in (worker.near, worker.far):
                channel.close()
                await asyncio.wait_for(asyncio.shield(channel.closed), 5)
        await until(lambda: all(worker.door.held == 0 for worker in self.workers))
        await asyncio.sleep(0)
        for state in self.states:
            await state.close()
        os.close(self.fd)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    made = House()
    yield made
    await made.close()


async def in_time(work: Awaitable[Permit]) -> Permit:
    async with asyncio.timeout(5):
        return await work


async def test_free_slots_need_no_word(house: House) -> None:
    """The worker takes them itself; the supervisor hears nothing but the greeting."""
    worker = await house.worker()
    with await worker.room.enter(WANTED, BASIC) as permit:
        assert permit.upstream == "one"
        assert await house.taken() == [1, 1, 0]
        assert await worker.room.direct.try_now(WANTED) is None
    assert await house.taken() == [0, 0, 0]
    assert worker.notes == [("queue.hello", None)]
    assert worker.said == []


async def test_who_finds_none_waits_in_the_supervisor(house: House) -> None:
    """Whichever worker gives back, by the order of one queue; what is granted is held there."""
    one, two = await house.worker(), await house.worker()
    permit = await one.room.enter(WANTED, BASIC)
    basic = await house.waits(one)
    enterprise = await house.waits(two, ticket=ENTERPRISE)
    assert house.room.depths() == {"basic": 1, "enterprise": 1}
    permit.release()
    first = await in_time(enterprise)
    assert [one.door.held, two.door.held] == [0, 1]
    assert not basic.done()
    assert await house.taken() == [1, 1, 0]
    first.release()
    first.release()
    second = await in_time(basic)
    assert [one.door.held, two.door.held] == [1, 0]
    second.release()
    await house.becomes([0, 0, 0])
    assert [verb for verb, _ in two.notes] == ["queue.hello", "queue.enter", "queue.leave"]


async def test_newcomers_do_not_barge(house: House) -> None:
    """Every worker knows what is waited for, and goes to the queue for it, and only for it."""
    one, two = await house.worker(), await house.worker()
    lease = await one.state.acquire([ONE], time.monotonic())
    assert lease is not None
    waiting = await house.waits(one)
    await until(lambda: two.contended == one.contended == {ONE.name})
    async with asyncio.timeout(5):
        with await two.room.enter(OTHER, BASIC):
            assert [verb for verb, _ in two.notes] == ["queue.hello"]
    await one.state.release(lease)
    assert await two.room.direct.try_now(WANTED) is None
    behind = two.enter()
    (await in_time(waiting)).release()
    (await in_time(behind)).release()
    await until(lambda: two.contended == one.contended == set())
    await house.becomes([0, 0, 0])
    permit = await two.room.direct.try_now(WANTED)
    assert permit is not None
    permit.release()


async def test_a_worker_that_comes_later_is_told(house: House) -> None:
    """What is contended when it says hello."""
    one = await house.worker()
    permit = await one.room.enter(WANTED, BASIC)
    waiting = await house.waits(one)
    await until(lambda: one.contended == {ONE.name})
    two = await house.worker()
    await until(lambda: two.contended == {ONE.name})
    permit.release()
    (await in_time(waiting)).release()


@pytest.mark.parametrize("steps", range(16))
async def test_leaving_so_many_steps_after_the_release(house: House, steps: int) -> None:
    """The grant may be under way, there or here: the next one gets the slot, and it is free in the end."""
    worker = await house.worker()
    permit = await worker.room.enter(WANTED, BASIC)
    first, second = await house.waits(worker), await house.waits(worker)
    permit.release()
    for _ in range(steps):
        await asyncio.sleep(0)
    if not first.cancel():
        (await first).release()
    (await in_time(second)).release()
    await house.becomes([0, 0, 0])
    await until(lambda: worker.door.held == 0)


async def test_leaving_in_the_instant_of_the_grant(house: House) -> None:
    """The note has arrived, the request does not know yet: the slots go back."""
    worker = await house.worker()
    permit = await worker.room.enter(WANTED, BASIC)
    first, second = await house.waits(worker), await house.waits(worker)
    heard, granted = worker.room.heard, []

    def hear(verb: str, payload: Any) -> None:
        heard(verb, payload)
        if verb == "queue.granted" and not granted:
            granted.append(payload)
            first.cancel()

    worker.room.heard = hear  # type: ignore[method-assign]  # for this one object
    permit.release()
    await asyncio.wait([first], timeout=5)
    assert first.cancelled()
    (await in_time(second)).release()
    await house.becomes([0, 0, 0])
    assert [verb for verb, _ in worker.notes].count("queue.leave") == 2


async def test_coming_and_leaving_in_one_breath(house: House) -> None:
    """Both notes arrive together: the supervisor is where it was."""
    worker = await house.worker()
    permit = await worker.room.enter(WANTED, BASIC)
    for _ in range(3):
        task = worker.enter()
        await asyncio.sleep(0)
        task.cancel()
    await until(lambda: [verb for verb, _ in worker.notes].count("queue.leave") == 3)
    await until(lambda: house.room.waiting == 0 and not worker.door._entering)
    permit.release()
    await house.becomes([0, 0, 0])


async def test_refusals_travel(house: House) -> None:
    """With their Retry-After: full, too late, closing down."""
    worker = await house.worker()
    permit = await worker.room.enter(WANTED, BASIC)
    house.room.max_waiting, house.room.max_wait_s = 1, 0.05
    late = await house.waits(worker)
    with pytest.raises(QueueFull) as full:
        await in_time(worker.room.enter(WANTED, BASIC))
    assert (full.value.code, full.value.headers["Retry-After"]) == ("overloaded", "2")
    with pytest.raises(QueueTimeout) as caught:
        await in_time(late)
    assert (caught.value.code, caught.value.headers["Retry-After"]) == ("queue_timeout", "1")
    house.room.max_wait_s = 20
    waiting = await house.waits(worker)
    await house.room.close()
    with pytest.raises(Draining):
        await in_time(waiting)
    permit.release()
    assert [payload[1:] for verb, payload in worker.said if verb == "queue.refused"] == [
        ["full", 2],
        ["late", 1],
        ["draining", 0],
    ]


async def test_a_fault_in_the_supervisor(house: House) -> None:
    """It is told, like any other refusal."""

    def fault(*_: object) -> None:
        raise ValueError("a bug")

    house.room = WaitingRoom(house.states[0], 10, 20.0, waited=fault)
    worker = await house.worker()
    permit = await worker.room.enter(WANTED, BASIC)
    first, second = await house.waits(worker), await house.waits(worker)
    permit.release()
    (await in_time(first)).release()
    with pytest.raises(Internal):
        await in_time(second)
    await house.becomes([0, 0, 0])


async def test_failover(house: House) -> None:
    """Of slots that the supervisor holds, and of those that the worker took itself."""
    machine = Slot("machine", 1)
    wanted = Wanted((machine,), (("one", ONE),))
    worker = await house.worker()
    own = await worker.room.enter(wanted, BASIC)
    waiting = await house.waits(worker, wanted=wanted)
    assert await worker.room.direct.failover(own, (("two", TWO),))
    assert own.upstream == "two"
    assert await house.taken() == [1, 0, 1]
    own.release()
    granted = await in_time(waiting)
    assert await worker.room.direct.failover(granted, (("two", TWO),))
    await house.becomes([1, 0, 1])
    assert granted.upstream == "two"
    other = await house.states[-1].acquire([ONE], time.monotonic())
    assert other is not None
    assert not await worker.room.direct.failover(granted, (("one", ONE),))
    await house.states[-1].release(other)
    assert await worker.room.direct.failover(granted, (("one", ONE),))
    await house.becomes([1, 1, 0])
    granted.release()
    await house.becomes([0, 0, 0])
    assert [verb for verb, _ in worker.notes].count("queue.keep") == 1


async def test_the_supervisor_goes(house: House) -> None:
    """Those who wait are told at once, and nobody waits any more; free slots are still taken."""
    worker = await house.worker()
    permit = await worker.room.enter(WANTED, BASIC)
    waiting = await house.waits(worker)
    worker.near.close()
    with pytest.raises(Draining):
        await in_time(waiting)
    with pytest.raises(Draining):
        await in_time(worker.room.enter(WANTED, BASIC))
    permit.release()
    (await in_time(worker.room.enter(WANTED, BASIC))).release()
    await until(lambda: house.room.waiting == 0)
    await house.becomes([0, 0, 0])


async def test_the_worker_goes(house: House) -> None:
    """What it waited for and what the supervisor held for it is free for the others."""
    one, two = await house.worker(), await house.worker()
    permit = await two.room.enter(WANTED, BASIC)
    granted, waiting = await house.waits(one), await house.waits(one)
    permit.release()
    held = await in_time(granted)
    behind = await house.waits(two)
    one.far.close()
    third = await in_time(behind)
    assert house.room.waiting == 0
    with pytest.raises(Draining):
        await in_time(waiting)
    held.release()
    third.release()
    await house.becomes([0, 0, 0])
    await until(lambda: two.contended == set())
    assert len(house.room._watchers) == 1


@asynccontextmanager
async def alone(max_wait_s: float) -> AsyncIterator[tuple[RemoteRoom, Channel, socket.socket]]:
    """A worker's room without a supervisor: the other end of its channel is a bare socket."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    far = await open_channel(theirs, lambda *_: None)
    fd = shared.create(lease_s=LEASE_S)
    state = shared.attach(fd, 1)
    try:
        yield RemoteRoom(far, Direct(state), max_wait_s), far, ours
    finally:
        far.close()
        ours.close()
        await asyncio.wait_for(asyncio.shield(far.closed), 5)
        await state.close()
        os.close(fd)


async def test_a_supervisor_that_does_not_answer() -> None:
    """The worker gives up by itself, and says that it has."""
    async with alone(max_wait_s=-1.9) as (room, _, ours):  # and two seconds of grace
        permit = await room.enter(WANTED, BASIC)
        with pytest.raises(QueueTimeout):
            await in_time(room.enter(WANTED, BASIC))
        room.heard("queue.granted", [1, "one"])  # too late
        permit.release()
        await asyncio.sleep(0)
        sent = ours.recv(65536)
        assert [sent.count(verb) for verb in (b"queue.hello", b"queue.enter", b"queue.leave")] == [1, 1, 1]


async def test_a_channel_that_is_full() -> None:
    """Who comes is refused; that somebody leaves is said again until it could be."""
    async with alone(max_wait_s=20.0) as (room, far, ours):
        permit = await room.enter(WANTED, BASIC)
        waiting = asyncio.ensure_future(room.enter(WANTED, BASIC))
        await until(lambda: room.waiting == 1)
        while far.note("filling", "x" * 1_000_000):
            pass
        waiting.cancel()
        await asyncio.wait([waiting])
        with pytest.raises(Overloaded):
            await room.enter(WANTED, BASIC)
        permit.release()
        last = b""
        async with asyncio.timeout(5):
            while b"queue.leave" not in last:
                last = last[-100:] + await asyncio.get_running_loop().sock_recv(ours, 1_000_000)


@pytest.mark.parametrize("seed", range(6))
async def test_thousands_come_and_leave_at_any_instant(house: House, seed: int) -> None:
    """Of three workers at once: no slot is given twice, and at the end all are free and nobody waits."""
    chance = random.Random(seed)
    machine, limits = Slot("machine", 5), {"one": 1, "two": 3, "three": 2}
    slots = {name: Slot(f"up:{name}", limit) for name, limit in limits.items()}
    workers = [await house.worker() for _ in range(3)]
    house.room.max_waiting = 40
    inside: Counter[str] = Counter()
    ended: Counter[str] = Counter()

    async def request(worker: Worker, names: list[str], steps: int) -> None:
        wanted = Wanted((machine,), tuple((name, slots[name]) for name in names))
        try:
            with await worker.room.enter(wanted, chance.choice((BASIC, ENTERPRISE))) as permit:
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
    for _ in range(2000):
        names = chance.sample(list(limits), chance.randint(1, 3))
        work = request(chance.choice(workers), names, chance.randint(0, 6))
        tasks.append(asyncio.get_running_loop().create_task(work))
        for task in chance.sample(tasks, min(len(tasks), chance.choice((0, 0, 1, 3)))):
            task.cancel()
        for _ in range(chance.choice((0, 0, 1, 4))):
            await asyncio.sleep(0)
        tasks = [task for task in tasks if not task.done()]
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=15)
        assert not late, f"seed {seed}: {ended}"
    await house.becomes([0, 0, 0, 0], machine, *slots.values())
    await until(lambda: house.room.waiting == 0)
    await until(lambda: all(worker.door.held == 0 and not worker.contended for worker in workers))
    assert ended["served"] > 200
    assert ended["left"] > 50
    assert any(verb == "queue.granted" for worker in workers for verb, _ in worker.said)


async def test_a_grant_that_cannot_be_said(house: House) -> None:
    """To a worker that does not read: the slots are free again, and the note finds nobody."""
    ours, theirs = socket.socketpair()
    near = await open_channel(ours, lambda *_: None)
    with theirs:
        door = Door(near, house.room)
        while near.note("row", "x" * 1_000_000):
            pass
        door.heard("queue.enter", msgspec.to_builtins((1, WANTED, BASIC)))
        await until(lambda: not door._entering)
        assert door.held == 0
        await house.becomes([0, 0], MACHINE, ONE)
        (await house.room.enter(WANTED, BASIC)).release()
    await asyncio.wait_for(asyncio.shield(near.closed), 5)


async def test_a_worker_is_killed(house: House) -> None:
    """A process that holds slots of both kinds and waits for more: what the supervisor held for it is free
    with its channel, its own slots when the supervisor knows that it is dead."""
    ours, theirs = socket.socketpair()
    heard: list[tuple[str, Any]] = []
    doors: list[Door] = []

    def listen(verb: str, payload: Any) -> None:
        if verb.startswith("queue."):
            doors[0].heard(verb, payload)
        else:
            heard.append((verb, payload))

    near = await open_channel(ours, listen)
    doors.append(Door(near, house.room))
    blocking = await house.states[0].acquire([waiter.SHARED], time.monotonic())
    with theirs:
        descriptors = (house.fd, theirs.fileno())
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.kit.waiter",
            *map(str, descriptors),
            "7",
            pass_fds=descriptors,
            cwd=ROOT,
        )
    try:
        await until(lambda: house.room.waiting == 1, 20)
        assert blocking is not None
        await house.states[0].release(blocking)
        await until(lambda: heard == [("holding", ["own", "shared"])], 20)
        await until(lambda: house.room.waiting == 1)
        assert await house.taken(waiter.OWN, waiter.SHARED) == [1, 1]
        behind = asyncio.ensure_future(house.room.enter(Wanted((), (("shared", waiter.SHARED),)), BASIC))
        await until(lambda: house.room.waiting == 2)
        process.kill()
        permit = await in_time(behind)
        assert house.room.waiting == doors[0].held == 0
        permit.release()
        await house.becomes([1, 0], waiter.OWN, waiter.SHARED)
        house.states[0].forget(7)
        assert await house.taken(waiter.OWN, waiter.SHARED) == [0, 0]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        near.close()
        await asyncio.wait_for(asyncio.shield(near.closed), 5)
