"""Slots that a request holds, and taking them from the store at once or not at all.

`Slots` is what the data path asks for them: `direct` takes what is free, and `enter` waits for it, in the
room of this process (`slots`) or that of the supervisor (`slots_remote`). A request that finds its slots free
costs one `acquire` and one `release` and speaks to nobody: 2.6 microseconds for both, 1.9 of them in
the store (2 slots in memory; minimum of 7 runs of 20,000; 2-core VM, Python 3.11).

Nobody barges: `Direct.contended` names the slots that others wait for, and those are not tried.

A store at the other end of a network is asked only by tasks of our own: a caller that leaves cuts nothing
off. A store that is near is asked by plain calls: there is nothing that could be cut.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import msgspec

from proxy.state import Lease, Slot, State, StoreUnavailable
from proxy.tasks import spawn

#: A caller that lowers its own priority weighs a tenth of its plan.
_LOW = 0.1
#: A give-back that the store did not answer is tried again after so long. Past that the owner's lease has run
#: out if the store was away, and it is free anyway.
_AGAIN_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)

#: Upstream name and its slot, in order of preference.
Choices = tuple[tuple[str, Slot], ...]
#: An upstream, and what was taken for it.
Found = tuple[str, Lease]


class Wanted(msgspec.Struct, frozen=True):
    """All slots of `base` and one of `choices`, which are not empty."""

    base: tuple[Slot, ...]
    choices: Choices


class Ticket(msgspec.Struct, frozen=True):
    """Who waits: the plan (also the label of the metrics), its priority (0 or more), and whether it said
    that it is in no hurry."""

    plan: str
    priority: int = 0
    low: bool = False

    @property
    def weight(self) -> float:
        return (1 + self.priority) * (_LOW if self.low else 1.0)


class Slots(Protocol):
    """What the data path asks, wherever the room is."""

    @property
    def direct(self) -> Direct:
        """Takes what is free, and never waits."""
        ...

    async def enter(self, wanted: Wanted, ticket: Ticket) -> Permit:
        """Waits if need be. Raises QueueFull, QueueTimeout, Draining, StoreUnavailable. Safe to cancel at
        any instant; to be awaited as it is (wait_for in Python 3.11 can lose an answer)."""
        ...


class Keeper(Protocol):
    """Who holds slots on behalf of a permit."""

    def give_back(self, token: Any) -> None:
        """Never raises."""
        ...

    async def keep_only(self, token: Any, slots: tuple[Slot, ...]) -> Any:
        """Gives all other slots back; what is then held (None: nothing)."""
        ...


#: Who holds it, what, and whether an upstream's slot is among it.
_Hold = tuple[Keeper, Any, bool]


class Permit:
    """Slots that are held: a context manager. `upstream` is the one whose slot is among them."""

    __slots__ = ("_base", "_ended", "_holds", "upstream")

    def __init__(self, upstream: str, base: tuple[Slot, ...], keeper: Keeper, token: Any) -> None:
        self.upstream = upstream
        self._base = base
        self._ended = False
        self._holds: list[_Hold] = [(keeper, token, True)]

    def release(self) -> None:
        """Gives everything back; a second time nothing."""
        self._ended = True
        holds, self._holds = self._holds, []
        for keeper, token, _ in holds:
            keeper.give_back(token)

    def take_over(self, other: Permit) -> list[_Hold]:
        """Holds what `other` held, and has its upstream. The answer is what it held itself: for `shrink`."""
        own, self._holds, other._holds = self._holds, other._holds, []
        self.upstream = other.upstream
        return own

    def let_go(self) -> list[_Hold]:
        """Everything it holds: for `shrink`."""
        own, self._holds = self._holds, []
        return own

    async def shrink(self, holds: list[_Hold]) -> None:
        """Gives the upstream's slot among them back and keeps the others. Whole, whoever is cancelled: a
        store that is far away calls for a task of its own."""
        for keeper, token, whole in holds:
            kept = await keeper.keep_only(token, self._base) if whole else token
            if kept is not None:
                self._holds.append((keeper, kept, False))
        if self._ended:  # meanwhile
            self.release()

    def __enter__(self) -> Permit:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Direct:
    """The store's slots, at once or not at all."""

    def __init__(
        self,
        state: State,
        *,
        freed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state = state
        self.near = state.near
        self.clock = clock
        self.contended: frozenset[str] = frozenset()  # names of slots that others wait for: all of them
        self._freed = freed

    def take_now(self, base: tuple[Slot, ...], choices: Choices) -> Permit | None:
        """The first choice that is free, with the base. None: there is none, or others wait for it, or the
        store is not near, and then `try_now` has to be asked."""
        near, clock = self.near, self.clock  # a callable that is looked up in its object is called slowly
        if near is None:
            return None
        if self.contended:
            choices = self._uncontended(base, choices)
        for upstream, slot in choices:
            lease = near.acquire_now((*base, slot), clock())
            if lease is not None:
                return Permit(upstream, base, self, lease)
        return None

    async def try_now(self, wanted: Wanted) -> Permit | None:
        """The same of any store. Raises StoreUnavailable."""
        base, choices = wanted.base, wanted.choices
        if self.near is not None:
            return self.take_now(base, choices)
        if self.contended:
            choices = self._uncontended(base, choices)
        found = await self._whole(self._take_first(base, choices))
        return Permit(found[0], base, self, found[1]) if found is not None else None

    async def failover(self, permit: Permit, choices: Choices) -> bool:
        """Exchanges the upstream slot of a permit for one of `choices` if one is free at once; the machine's
        stays. False: the permit is as it was. Raises StoreUnavailable."""
        extra = await self.try_now(Wanted((), choices))  # first: if there is none, the permit keeps its own
        if extra is None:
            return False
        shrinking = permit.shrink(permit.take_over(extra))
        if self.near is None:
            spawn(shrinking, "shrink a permit")
        else:
            await shrinking
        return True

    def _uncontended(self, base: tuple[Slot, ...], choices: Choices) -> Choices:
        if any([slot.name in self.contended for slot in base]):
            return ()
        return tuple([each for each in choices if each[1].name not in self.contended])

    async def _take_first(self, base: tuple[Slot, ...], choices: Choices) -> Found | None:
        """For callers that are never cancelled."""
        for upstream, slot in choices:
            lease = await self.state.acquire((*base, slot), self.clock())
            if lease is not None:
                return upstream, lease
        return None

    # ── Keeper ───────────────────────────────────────────────────────────────────────────────────────────

    def give_back(self, token: Lease) -> None:
        if self.near is None:
            spawn(self._release_for_sure(token), "give slots back")
            return
        self.near.release_now(token)
        if self.contended:  # somebody waits
            self._freed()

    async def keep_only(self, token: Lease, slots: tuple[Slot, ...]) -> Lease | None:
        """There is no verb for this, so the lease is changed for another: another process may be quicker, and
        the permit then goes on without. One request too many for a while, and a rare one."""
        await self._release_for_sure(token)
        try:
            return await self.state.acquire(slots, self.clock()) if slots else None
        except StoreUnavailable:
            return None

    async def _release_for_sure(self, lease: Lease) -> None:
        for again_s in (*_AGAIN_S, None):
            try:
                await self.state.release(lease)
                break
            except StoreUnavailable:
                if again_s is None:
                    raise
                await asyncio.sleep(again_s)
        self._freed()

    async def _whole(self, work: Coroutine[Any, Any, Found | None]) -> Found | None:
        """A caller that leaves cuts nothing off: the work ends by itself, and its slots go back."""
        task = spawn(_outcome(work), "take slots")
        outcome: Found | StoreUnavailable | None
        try:
            outcome = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._undo)
            raise
        if isinstance(outcome, StoreUnavailable):
            raise outcome
        return outcome

    def _undo(self, task: asyncio.Task[Found | StoreUnavailable | None]) -> None:
        if isinstance(found := task.result(), tuple):
            spawn(self._release_for_sure(found[1]), "give slots back")


async def _outcome(work: Coroutine[Any, Any, Found | None]) -> Found | StoreUnavailable | None:
    """The failure as a value: nobody may be left to take an exception."""
    try:
        return await work
    except StoreUnavailable as error:
        return error
