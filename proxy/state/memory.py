"""The store of one machine: counters in shared memory, exact over all its processes.

`create` makes an anonymous file; every process that inherits its descriptor calls `attach` with an owner
number of its own. One process alone is owner 0 of a file that nobody else has.
The layout of its tables, their locks and what a full one means: proxy.state.table.

A process may be killed at any instruction, because every change is one aligned 8-byte store, or a sequence
whose every prefix is a valid state: a cell gets its value before its key, and loses its key first. What can
remain is one request's charge in some of its buckets. Slots stay with the epoch of their owner; raising the
epoch (one store: `attach`, `forget`, or anybody who finds the owner silent for `lease_s`) frees them all.

Microseconds a call, with its await (minimum of 5 runs of 20,000; 2-core VM, Python 3.11, no contention):

    take 1 / 3 buckets              1.3 / 5.1     settle 1             1.2
    acquire and release 1 / 3       1.9 / 2.9     acquire, refused     2.1
    spend 2 budgets                 4.1           settle_spend 2       4.7
    peek 3 / peek_slots 3           4.1 / 2.8     renew                1.9
    take of a name never seen       8.4           two processes: a lock each, 0.8
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from proxy import bucket
from proxy.state.table import EPOCH, OWNERS, ROW, SEEN, Counters, Place
from proxy.state.table import create as create  # one way in: create, attach

if TYPE_CHECKING:
    from proxy.bucket import Decision
    from proxy.state import Charge, Lease, Slot, Spend

#: A slot word is an epoch above a count.
_COUNT_BITS = 32
_COUNT = (1 << _COUNT_BITS) - 1
_MOST = 2**62


def attach(fd: int, owner: int) -> MemoryState:
    """The counters behind a descriptor of `create`, as `owner`: from 0, below `owners`, one a living process.

    What an earlier process left in flight under this number is free from here on. The descriptor stays the
    caller's and has to outlive the state. Errors: ValueError if it is no such file or the owner is too high.
    """
    return MemoryState(fd, owner)


class Held(msgspec.Struct, gc=False):
    """Slots of this store. `words` are the owner's own counts; those of names without a cell are missing."""

    slots: Sequence[Slot]
    words: list[int]
    epoch: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple([slot.name for slot in self.slots])


class MemoryState(Counters):
    """proxy.state.State and Near on shared memory. Use `attach`."""

    @property
    def near(self) -> MemoryState | None:
        return self

    # ── buckets ──────────────────────────────────────────────────────────────────────────────────

    async def take(self, charges: Sequence[Charge], now: float) -> list[Decision]:
        return self.take_now(charges, now)

    def take_now(self, charges: Sequence[Charge], now: float) -> list[Decision]:
        if len(charges) == 1:  # nearly always
            if self._words[SEEN] == 1:
                return [self._take_one(charges[0], now)]
            try:
                self._lock((self._buckets.place(charges[0].bucket_id),))
                return [self._take_one(charges[0], now)]
            finally:
                self._unlock()
        places = [self._buckets.place(charge.bucket_id) for charge in charges]
        try:
            self._lock(places)
            tats: dict[Place, int] = {}
            decisions = []
            for place, charge in zip(places, charges, strict=True):
                before = tats[place] if place in tats else self._tat(place)
                tats[place], decision = bucket.take(
                    before, charge.rate_per_minute, charge.burst, charge.amount, now
                )
                decisions.append(decision)
            if all([decision.allowed for decision in decisions]):  # a list: half the time of a generator
                self._write_tats(tats, now)
            else:
                self._lower_tats(tats)
        finally:
            self._release()
        return decisions

    def _take_one(self, charge: Charge, now: float) -> Decision:
        """As `take`, under the lock or alone."""
        words, table, name = self._words, self._buckets, charge.bucket_id
        value = table.cells.get(name)
        if value is None:
            value = table.look(name)
        before = words[value] if value >= 0 else 0
        tat, decision = bucket.take(before, charge.rate_per_minute, charge.burst, charge.amount, now)
        if value >= 0:
            words[value] = tat
        elif decision.allowed:
            self._write_tats({table.place(name): tat}, now)
        return decision

    async def settle(self, charges: Sequence[Charge], now: float) -> None:
        self.settle_now(charges, now)

    def settle_now(self, charges: Sequence[Charge], now: float) -> None:
        words, table = self._words, self._buckets
        shared = words[SEEN] != 1
        try:
            if shared:
                self._lock([table.place(charge.bucket_id) for charge in charges])
            for charge in charges:
                value = table.cells.get(charge.bucket_id)
                if value is None:
                    value = table.look(charge.bucket_id)
                before = words[value] if value >= 0 else 0
                tat = bucket.settle(before, charge.rate_per_minute, charge.burst, charge.amount, now)
                if value >= 0:
                    words[value] = tat
                else:
                    self._write_tats({table.place(charge.bucket_id): tat}, now)
        finally:
            if shared:
                self._unlock()

    async def peek(self, charges: Sequence[Charge], now: float) -> list[Decision]:
        places = [self._buckets.place(charge.bucket_id) for charge in charges]
        try:
            self._lock(places)
            tats = [self._tat(place) for place in places]
        finally:
            self._release()
        return [
            bucket.take(tat, charge.rate_per_minute, charge.burst, charge.amount, now)[1]
            for tat, charge in zip(tats, charges, strict=True)
        ]

    def _tat(self, place: Place) -> int:
        value = self._buckets.find(place)
        return self._words[value] if value >= 0 else 0

    def _write_tats(self, tats: dict[Place, int], now: float) -> None:
        """Buckets that have a cell go first: as long as they are idle, a new one could take it from them."""
        missing = []
        for place, tat in tats.items():
            value = self._buckets.find(place)
            if value >= 0:
                self._words[value] = tat
            elif not bucket.is_full(tat, now):
                missing.append(place)
        for place in missing:
            value = self._buckets.room(place, lambda value: bucket.is_full(self._words[value], now))
            if value < 0:
                self._overflowed()
                continue
            self._words[value] = tats[place]
            self._buckets.publish(place)

    def _lower_tats(self, tats: dict[Place, int]) -> None:
        """After a refusal nothing is taken, but a clock that jumped back may have lowered a tat."""
        for place, tat in tats.items():
            value = self._buckets.find(place)
            if value >= 0 and tat < self._words[value]:
                self._words[value] = tat

    # ── slots ────────────────────────────────────────────────────────────────────────────────────

    async def acquire(self, slots: Sequence[Slot], now: float) -> Held | None:
        return self.acquire_now(slots, now)

    def acquire_now(self, slots: Sequence[Slot], now: float) -> Held | None:
        if now * 1e9 > self._silent_until:
            self._sign(int(now * 1e9))
        held = self._acquire(slots)
        if held is None and self._reap(int(now * 1e9)):
            return self._acquire(slots)
        return held

    async def release(self, lease: Lease) -> None:
        self.release_now(lease)

    def release_now(self, lease: Lease) -> None:
        """Needs no lock: nobody else writes the words of this owner."""
        assert isinstance(lease, Held)
        mine, lease.words = lease.words, []
        words = self._words
        if lease.epoch == words[self._row + EPOCH]:
            for at in mine:
                words[at] -= 1

    async def peek_slots(self, names: Sequence[str], now: float) -> list[int]:
        self._reap(int(now * 1e9))
        places = [self._slots.place(name) for name in names]
        try:
            self._lock(places)
            return [self._taken(place) for place in places]
        finally:
            self._release()

    async def renew(self, now: float) -> None:
        now_ns = int(now * 1e9)
        self._sign(now_ns)
        self._reap(now_ns)

    def _acquire(self, slots: Sequence[Slot]) -> Held | None:
        """One after the other; what was taken is given back at the first that is full. Under the lock nobody
        sees the difference, and who is killed holds nothing: its epoch is over."""
        words, table = self._words, self._slots
        mine: list[int] = []
        held = Held(slots, mine, words[self._row + EPOCH])
        fresh = held.epoch << _COUNT_BITS
        shared = words[SEEN] != 1
        try:
            if shared:
                self._lock([table.place(slot.name) for slot in slots])
            known = None if shared else table.together.get(tuple(slots))
            for at, limit in known or self._found(slots, fresh):
                if not limit:
                    break
                word = words[at]
                if word < fresh:  # of an earlier epoch
                    word = fresh
                if (self._count(at - self._owner) if shared else word - fresh) >= limit:
                    break
                words[at] = word + 1
                mine.append(at)
            else:
                if known is None and not shared and len(mine) == len(slots):
                    limits = [slot.limit for slot in slots]
                    table.remember(tuple(slots), tuple(zip(mine, limits, strict=True)))
                return held
            self.release_now(held)
            return None
        finally:
            if shared:
                self._unlock()

    def _found(self, slots: Sequence[Slot], fresh: int) -> Iterator[tuple[int, int]]:
        """The word of each slot, and its limit. One that is not counted is passed over. The next is looked
        for when the one before is taken: until then its cell is idle, and a new name could get it."""
        table, owner = self._slots, self._owner
        for slot in slots:
            value = table.cells.get(slot.name)
            if value is None:
                value = table.look(slot.name)
                if value < 0 and slot.limit:
                    value = self._new_slot(table.place(slot.name), fresh)
                    if value < 0:
                        continue
            yield value + owner, slot.limit

    def _new_slot(self, place: Place, fresh: int) -> int:
        """A cell with nothing taken, or -1. What this call has taken already is not idle."""
        value = self._slots.room(place, lambda value: not self._count(value))
        if value < 0:
            self._overflowed()
        else:
            self._words[value + self._owner] = fresh
            self._slots.publish(place)
        return value

    def _taken(self, place: Place) -> int:
        value = self._slots.find(place)
        return self._count(value) if value >= 0 else 0

    def _count(self, value: int) -> int:
        """The places of a cell that living owners hold; a word of an earlier epoch is nobody's."""
        words, row, count = self._words, OWNERS + EPOCH, 0
        if words[SEEN] == 1:
            word = words[value]
            return word & _COUNT if word >> _COUNT_BITS == words[row] else 0
        for at in range(value, value + words[SEEN]):
            word = words[at]
            if word and word >> _COUNT_BITS == words[row]:
                count += word & _COUNT
            row += ROW
        return count

    # ── budgets ──────────────────────────────────────────────────────────────────────────────────

    async def spend(self, spends: Sequence[Spend], now: float) -> list[bool]:
        now_ns = int(now * 1e9)
        places = [self._budgets.place(spend.name) for spend in spends]
        try:
            self._lock(places)
            totals: dict[Place, tuple[int, int]] = {}
            within = []
            for place, spend in zip(places, spends, strict=True):
                spent, ends_ns = totals.get(place) or self._period(place, spend.resets_at, now_ns)
                totals[place] = (spent + spend.amount, ends_ns)
                within.append(spent + spend.amount <= spend.limit)
            if all(within):
                self._write_totals(totals, now_ns)
        finally:
            self._release()
        return within

    async def settle_spend(self, spends: Sequence[Spend], now: float) -> None:
        now_ns = int(now * 1e9)
        places = [self._budgets.place(spend.name) for spend in spends]
        try:
            self._lock(places)
            for place, spend in zip(places, spends, strict=True):
                spent, ends_ns = self._period(place, spend.resets_at, now_ns)
                if now_ns < ends_ns == int(spend.resets_at * 1e9):
                    self._write_totals({place: (max(spent + spend.amount, 0), ends_ns)}, now_ns)
        finally:
            self._release()

    async def peek_spend(self, names: Sequence[str], now: float) -> list[int]:
        now_ns = int(now * 1e9)
        places = [self._budgets.place(name) for name in names]
        try:
            self._lock(places)
            return [self._period(place, 0.0, now_ns)[0] for place in places]
        finally:
            self._release()

    def _period(self, place: Place, resets_at: float, now_ns: int) -> tuple[int, int]:
        """What is spent, and when that period ends: the later one of the cell's and the caller's."""
        ends_ns = int(resets_at * 1e9)
        value = self._budgets.find(place)
        if value < 0 or self._words[value + 1] <= now_ns or self._words[value + 1] < ends_ns:
            return 0, ends_ns
        return self._words[value], self._words[value + 1]

    def _write_totals(self, totals: dict[Place, tuple[int, int]], now_ns: int) -> None:
        """As in `_write_tats`, names that have a cell go first. A new period begins with 0, then its end."""
        words = self._words
        missing = []
        for place, (total, ends_ns) in totals.items():
            value = self._budgets.find(place)
            if value < 0:
                missing.append(place)
                continue
            if words[value + 1] != ends_ns:
                words[value] = 0
                words[value + 1] = ends_ns
            words[value] = min(total, _MOST)
        for place in missing:
            value = self._budgets.room(place, lambda value: words[value + 1] <= now_ns)
            if value < 0:
                self._overflowed()
                continue
            words[value], words[value + 1] = min(totals[place][0], _MOST), totals[place][1]
            self._budgets.publish(place)

    async def close(self) -> None:
        self.forget(self._owner)
        self._unmap()
