"""`python -m tests.kit.hammer ADDRESS OWNER JOB SECONDS`: one process that hammers a store, and tells.

It says `ready`, waits for a line, works until the time is up, says what it was granted as one line of JSON.
`ADDRESS` is what the store's fixture gives out: `memory:FD`, the descriptor being inherited; `redis:URL`;
`timed:URL`, with Redis's own clock and a lease of a second.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from proxy.state import Charge, Lease, Slot, Spend, State
from proxy.state.memory import MemoryState, attach

ROOT = Path(__file__).resolve().parents[2]
#: What all children fight for. Two buckets: all or none means that the wide one is charged like the narrow.
#: Rates that a busy machine uses up too, by way of Redis.
WIDE = Charge("wide", 24_000, 500)
NARROW = Charge("narrow", 12_000, 200)
#: One unit in ten minutes.
SLOW = Charge("slow", 0.1, 400)
#: The places of `slots`, each with the bytes of the witness file that stand for them.
SLOTS = (Slot("few", 2), Slot("more", 3))
BUDGETS = {"day": 2_000_003, "month": 1_500_007}
PERIOD_END = 4e9
#: Amounts of `budgets`: small enough that no process uses one up before the others have begun.
LARGEST = 500


def open_state(address: str, owner: int) -> State:
    """The store behind an address, as this owner. In Redis everybody is an owner of its own, and time is the
    caller's here too: the suite moves it by hand. Its budget is no matter of these tests."""
    kind, _, rest = address.partition(":")
    if kind == "memory":
        return attach(int(rest), owner)
    from proxy.state.redis import RedisState  # redis-py is two thirds of the start of a process

    if kind == "redis":
        return RedisState(rest, budget_s=5.0, callers_clock=True)
    assert kind == "timed"
    return RedisState(rest, budget_s=5.0, lease_s=1.0)


async def buckets(state: State, until: float, _: int) -> list[float]:
    """The instants at which both buckets allowed."""
    granted = []
    while (now := time.monotonic()) < until:
        decisions = await state.take([WIDE, NARROW], now)
        if all(decision.allowed for decision in decisions):
            granted.append(now)
    return granted


async def frozen(state: State, until: float, _: int) -> int:
    """How many of many were allowed while time stood still."""
    granted = 0
    for _round in range(2000):
        decisions = await state.take([WIDE, NARROW], 1000.0)
        granted += all(decision.allowed for decision in decisions)
    return granted


async def slow(state: State, until: float, _: int) -> int:
    """How many were allowed of a bucket that gets nothing back in the time of a test."""
    granted = 0
    while (now := time.monotonic()) < until:
        decisions = await asyncio.gather(*[state.take([SLOW], now) for _round in range(10)])
        granted += sum(decision.allowed for (decision,) in decisions)
    return granted


async def slots(state: State, until: float, witness: int) -> dict[str, int]:
    """Holds one place at a time. The witness is a lock on a byte of another file: more holders than places,
    and one of them finds none that is free."""
    held = over = 0
    while (now := time.monotonic()) < until:
        chosen = random.choice([SLOTS[:1], SLOTS[1:], SLOTS])
        lease = await state.acquire(chosen, now)
        if lease is None:
            continue
        held += 1
        over += sum(not _testify(witness, SLOTS.index(slot) * 16, slot.limit) for slot in chosen)
        fcntl.lockf(witness, fcntl.LOCK_UN)
        await state.release(lease)
    return {"held": held, "over": over}


def _testify(witness: int, first: int, places: int) -> bool:
    """A free byte among those of this slot, and it is locked now."""
    for byte in range(first, first + places):
        try:
            fcntl.lockf(witness, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            return True
        except BlockingIOError:
            continue
    return False


async def budgets(state: State, until: float, _: int) -> int:
    """The sum of what was granted, of both budgets alike, up to the first refusal: however long it takes."""
    granted = 0
    # Memory is much faster: with Redis's amounts the first process would leave the others nothing.
    largest = LARGEST // 20 if isinstance(state, MemoryState) else LARGEST
    while True:
        amount = random.randint(1, largest)
        spends = [Spend(name, amount, limit, PERIOD_END) for name, limit in BUDGETS.items()]
        if not all(await state.spend(spends, time.monotonic())):
            return granted
        granted += amount


async def everything(state: State, until: float, _: int) -> int:
    """All verbs on shared names, old and new, holding many places: made to be killed. Counts its rounds."""
    held: list[Lease] = []
    rounds = 0
    while (now := time.monotonic()) < until:
        rounds += 1
        await state.renew(now)
        await state.take([WIDE, NARROW, Charge(f"ip:{random.random()}", 6000, 5)], now)
        await state.settle([Charge(WIDE.bucket_id, WIDE.rate_per_minute, WIDE.burst, -1)], now)
        await state.spend([Spend("endless", 1, 2**60, PERIOD_END)], now)
        lease = await state.acquire([Slot("machine", 1000), Slot(f"key:{random.randrange(50)}", 1000)], now)
        assert lease is not None
        held.append(lease)
        if len(held) > 20:
            await state.release(held.pop(random.randrange(len(held))))
    for lease in held:
        await state.release(lease)
    return rounds


async def hold(state: State, until: float, witness: int) -> bool:
    """Locks a whole file and keeps it."""
    fcntl.lockf(witness, fcntl.LOCK_EX)
    return True


JOBS: dict[str, Callable[[State, float, int], Coroutine[Any, Any, Any]]] = {
    job.__name__: job for job in (buckets, frozen, slow, slots, budgets, everything, hold)
}


class Child:
    """A process that is ready to hammer."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        assert process.stdin is not None
        assert process.stdout is not None
        self._input, self._output = process.stdin, process.stdout

    async def ready(self) -> None:
        assert await self._output.readline() == b"ready\n"

    def go(self) -> None:
        self._input.write(b"go\n")

    async def granted(self) -> Any:
        """What it says at the end."""
        return json.loads(await self._output.readline())

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        self._input.close()


@asynccontextmanager
async def children(
    address: str, fds: Sequence[int], owners: Sequence[int], job: str, seconds: float, witness: int = -1
) -> AsyncIterator[list[Child]]:
    """One process an owner, all ready; killed at the end if they are still there."""
    passed = [*fds, witness] if witness >= 0 else fds
    started: list[Child] = []
    try:
        for owner in owners:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.kit.hammer"),
                *(address, str(owner), job, str(seconds), str(witness)),
                cwd=ROOT,
                pass_fds=passed,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=2**24,
            )
            started.append(Child(process))
        async with asyncio.timeout(20):
            for child in started:
                await child.ready()
        yield started
    finally:
        for child in started:
            await child.kill()


async def _main(address: str, owner: int, job: str, seconds: float, witness: int) -> None:
    state = open_state(address, owner)
    await state.renew(time.monotonic())
    print("ready", flush=True)
    sys.stdin.readline()
    granted = await JOBS[job](state, time.monotonic() + seconds, witness)
    print(json.dumps(granted), flush=True)
    sys.stdin.read()  # stays alive, so that nothing is freed by its end
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), int(sys.argv[5])))
