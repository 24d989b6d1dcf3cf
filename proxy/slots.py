"""The waiting room: a request waits for the machine's slot and one upstream slot together, holding neither.

One a machine: in the single process, or in the supervisor (workers: `slots_remote`).

- The room looks again when a slot came free in this process, and every few milliseconds while anybody waits,
  because other processes (and machines) give slots back in the store without a word.
- A look asks the store which of the wanted slots are full, then serves flows in the order of `fairqueue`: one
  whose slots are full is passed by. So a full upstream holds up nobody who wants another one.
- A grant is the waiter's from the moment its slots are taken; a waiter that leaves then gives them back
  itself. One that left before has left the queue, and the next of its flow gets them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from proxy.errors import Draining, Internal, QueueFull, QueueTimeout
from proxy.fairqueue import DrainRate, FairQueue
from proxy.permit import Direct, Found, Permit, Ticket, Wanted
from proxy.state import Slot, State, StoreUnavailable
from proxy.tasks import spawn

#: Between two looks while anybody waits: a look costs microseconds in memory, a round trip in Redis.
_POLL_S = 0.005
_POLL_REMOTE_S = 0.025

#: What its waiters want, their plan, and whether they are in no hurry.
_Flow = tuple[Wanted, str, bool]


class _Waiter:
    """What it gets is its slots, or the error to raise."""

    __slots__ = ("came_at", "flow", "outcome")

    def __init__(self, flow: _Flow, came_at: float) -> None:
        self.flow = flow
        self.came_at = came_at
        self.outcome: asyncio.Future[Found | Exception] = asyncio.get_running_loop().create_future()

    def end(self, outcome: Found | Exception) -> bool:
        """False: it has left, or has its end already."""
        if self.outcome.done():
            return False
        self.outcome.set_result(outcome)
        return True


class WaitingRoom:
    """See the module's docstring. Implements `Slots`. `max_waiting` and `max_wait_s` may change at any time;
    `waited(plan, seconds)` is told of each wait that ended with a grant or at its deadline."""

    def __init__(
        self,
        state: State,
        max_waiting: int,
        max_wait_s: float,
        *,
        waited: Callable[[str, float], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_waiting = max_waiting
        self.max_wait_s = max_wait_s
        self.direct = Direct(state, freed=self.released, clock=clock)
        self._poll_s = _POLL_REMOTE_S if state.near is None else _POLL_S
        self._waited = waited
        self._queue: FairQueue[_Flow, _Waiter] = FairQueue()
        self._rate = DrainRate()
        self._look = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._watchers: list[Callable[[frozenset[str]], None]] = []
        self._told: frozenset[str] = frozenset()
        self._closed = False

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def contended(self) -> frozenset[str]:
        """Names of the slots that those who wait were found to wait for."""
        return self._told

    def depths(self) -> dict[str, int]:
        """Waiters by plan; plans without any are missing."""
        depths: dict[str, int] = {}
        for flow in self._queue.flows():
            depths[flow[1]] = depths.get(flow[1], 0) + self._queue.depth(flow)
        return depths

    def watch(self, watcher: Callable[[frozenset[str]], None]) -> Callable[[], None]:
        """Calls with `contended` when it has changed; the answer ends that."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    def released(self) -> None:
        """A slot may have come free: look now."""
        if self._queue:
            self._look.set()

    async def close(self) -> None:
        """Those who wait, and all who come and would have to, get Draining."""
        self._closed = True
        for waiter in self._queue.drain():
            waiter.end(Draining())
        self._look.set()
        if self._looking is not None:
            await asyncio.wait([self._looking])

    # ── Slots ────────────────────────────────────────────────────────────────────────────────────────────

    async def enter(self, wanted: Wanted, ticket: Ticket) -> Permit:
        permit = await self.direct.try_now(wanted)
        if permit is not None:
            return permit
        self._check_room()
        self.direct.contended |= await self._held_up_by(wanted)
        waiter = self._join(wanted, ticket)
        late = asyncio.get_running_loop().call_later(self.max_wait_s, self._expire, waiter)
        try:
            outcome = await waiter.outcome
        except asyncio.CancelledError:
            self._leave(waiter)
            raise
        finally:
            late.cancel()
        if isinstance(outcome, Exception):
            raise outcome
        return Permit(outcome[0], wanted.base, self.direct, outcome[1])

    # ── coming and going ─────────────────────────────────────────────────────────────────────────────────

    def _check_room(self) -> None:
        if self._closed:
            raise Draining
        if len(self._queue) >= self.max_waiting:
            raise QueueFull(self._rate.retry_after_s(len(self._queue), self.direct.clock()))

    async def _held_up_by(self, wanted: Wanted) -> set[str]:
        """What a newcomer waits for, before the room has looked; without a suspension, so that nobody barges
        meanwhile. To ask a store that is far away would take one: then it may be any slot."""
        if self.direct.near is None:
            return {slot.name for slot in _slots_of(wanted)}
        return _held_up_by(wanted, await self._full(set(_slots_of(wanted))))

    def _join(self, wanted: Wanted, ticket: Ticket) -> _Waiter:
        now = self.direct.clock()
        if not self._queue:
            self._rate.began(now)
        waiter = _Waiter((wanted, ticket.plan, ticket.low), now)
        self._queue.push(waiter.flow, ticket.weight, waiter)
        self._look.set()
        if self._looking is None:
            self._looking = spawn(self._serve(), "waiting room")
        return waiter

    def _leave(self, waiter: _Waiter) -> None:
        """The task was cancelled, perhaps in the very instant of the grant."""
        if self._queue.remove(waiter.flow, waiter):
            self._look.set()
        elif not waiter.outcome.cancelled() and isinstance(found := waiter.outcome.result(), tuple):
            self.direct.give_back(found[1])

    def _expire(self, waiter: _Waiter) -> None:
        if self._queue.remove(waiter.flow, waiter):
            now = self.direct.clock()
            waiter.end(QueueTimeout(self._rate.retry_after_s(len(self._queue), now)))
            self._waited(waiter.flow[1], now - waiter.came_at)
            self._look.set()

    # ── granting ─────────────────────────────────────────────────────────────────────────────────────────

    async def _serve(self) -> None:
        """As long as anybody waits."""
        loop = asyncio.get_running_loop()
        try:
            while self._queue:
                next_look = loop.call_later(self._poll_s, self._look.set)
                await self._look.wait()
                next_look.cancel()
                self._look.clear()
                await self._look_once()
        finally:
            self._looking = None
            self._rate.ended()
            self._tell(frozenset())

    async def _look_once(self) -> None:
        """Serves all who can go. Whatever fails, nobody is left waiting for it."""
        try:
            full = await self._full({slot for flow in self._queue.flows() for slot in _slots_of(flow[0])})
            while (flow := self._queue.first(lambda flow: _can_go(flow[0], full))) is not None:
                await self._serve_one(flow, full)
            held_up = [_held_up_by(flow[0], full) for flow in self._queue.flows()]
            self._tell(frozenset().union(*held_up))
        except Exception as error:
            away = isinstance(error, StoreUnavailable)
            for waiter in self._queue.drain():
                waiter.end(StoreUnavailable(*error.args) if away else Internal())
            if not away:
                raise

    async def _full(self, wanted: set[Slot]) -> set[Slot]:
        """Those that have no place free."""
        slots = list(wanted)
        taken = await self.direct.state.peek_slots([slot.name for slot in slots], self.direct.clock())
        return {slot for slot, count in zip(slots, taken, strict=True) if count >= slot.limit}

    async def _serve_one(self, flow: _Flow, full: set[Slot]) -> None:
        wanted = flow[0]
        upstream, slot = next(each for each in wanted.choices if each[1] not in full)
        lease = await self.direct.state.acquire((*wanted.base, slot), self.direct.clock())
        if lease is None:  # it was free a moment ago: by the next look we know which one it is
            full.add(slot)
            return
        waiter = self._queue.pop(flow, lambda flow: _can_go(flow[0], full))
        while waiter is not None and not waiter.end((upstream, lease)):  # cancelled, and not yet awake
            waiter = self._queue.pop(flow, lambda flow: _can_go(flow[0], full))
        if waiter is None:
            self.direct.give_back(lease)
            return
        now = self.direct.clock()
        self._rate.granted(now)
        self._waited(flow[1], now - waiter.came_at)

    def _tell(self, contended: frozenset[str]) -> None:
        self.direct.contended = contended
        if contended != self._told:
            self._told = contended
            for watcher in list(self._watchers):
                watcher(contended)


def _slots_of(wanted: Wanted) -> tuple[Slot, ...]:
    return (*wanted.base, *[slot for _, slot in wanted.choices])


def _can_go(wanted: Wanted, full: set[Slot]) -> bool:
    return full.isdisjoint(wanted.base) and not all([slot in full for _, slot in wanted.choices])


def _held_up_by(wanted: Wanted, full: set[Slot]) -> set[str]:
    """The names of what it waits for: a full base, or all its choices."""
    base = {slot.name for slot in wanted.base if slot in full}
    return base or {slot.name for _, slot in wanted.choices}
