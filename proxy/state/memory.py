"""The store of one machine: counters in shared memory, exact over all its processes.

`create` makes an anonymous file; every process that inherits its descriptor calls `attach` with an owner
number of its own. One process alone is owner 0 of a file that nobody else has.

Layout: a header, a row for each owner, then three tables of fixed cells. A table is cut into sets of 64; the
keyed 128-bit hash of a name chooses the set, and the name lives in any cell of it, so a cell can be freed
without repairing a chain. The hash is keyed at random: nobody can choose names that meet in one set.

    bucket  the tat of proxy.bucket                       idle when the bucket is full
    budget  the amount, the end of its period             idle when the period is over
    slot    one word an owner: its epoch and its count    idle when no living owner holds any

Locks are fcntl record locks on the first byte of a set: the kernel drops them with their holder, whatever
ended it. Every verb locks its sets in ascending order, works for a few microseconds and unlocks, without a
suspension point between. Such locks belong to the process and end when it closes *any* descriptor of the
file: nobody opens a second one while the state is in use (a second `attach` in one process is for tests: it
is safe as long as none is closed inside a verb, and no verb gives way). They do not keep threads apart
either: the event loop is the only caller in a process. A stopped holder (SIGSTOP) stops the others at the
same set until it continues or is killed.

A process may be killed at any instruction, because every change is one aligned 8-byte store, or a sequence
whose every prefix is a valid state: a cell gets its value before its key, and loses its key first. What can
remain is one request's charge in some of its buckets. Slots stay with the epoch of their owner; raising the
epoch (one store: `attach`, `forget`, or anybody who finds the owner silent for `lease_s`) frees them all.

A full set reuses an idle cell, which says the same as no cell. If there is none, the name is not counted: it
is answered as if never used, and `overflow` goes up. How rare that is was decided with the size: in a table
half full, two sets in ten million would need more than 64 cells (Poisson, mean 32).

Microseconds a call, with its await (minimum of 5 runs of 20,000; 2-core VM, Python 3.11, no contention):

    take 1 / 3 buckets              5.0 / 9.8     settle 1             4.5
    acquire and release 1 / 3       5.7 / 10.3    acquire, refused     4.6
    spend 2 budgets                 6.1           settle_spend 2       6.8
    peek 3 / peek_slots 3           8.5 / 7.1     renew                2.0
    take of a name never seen       11.5          of these, a lock     0.8
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec

from proxy import bucket

if TYPE_CHECKING:
    from proxy.bucket import Decision
    from proxy.state import Charge, Lease, Slot, Spend

_MAGIC = 0x6865616472616365  # also the version of this layout
_WAYS = 64
_WORD = 8
#: Header words: magic, bucket sets, budget sets, slot sets, owners, lease_ns, owners seen, hash secret (2).
_HEADER = struct.Struct("=7q16s")
_SEEN = 6
#: The rows of owners begin here (words) and are one cache line wide: epoch, last sign of life, overflows.
_OWNERS = 16
_ROW = 8
_EPOCH, _ALIVE, _OVERFLOW = 0, 1, 2
#: A slot word is an epoch above a count.
_COUNT_BITS = 32
_COUNT = (1 << _COUNT_BITS) - 1
_MOST = 2**62
#: Names whose hash and cell a process remembers, per table.
_REMEMBERED = 8192


def create(
    *, buckets: int = 65536, budgets: int = 8192, slots: int = 8192, owners: int = 64, lease_s: float = 5.0
) -> int:
    """A descriptor of new shared counters, with room for so many names of each kind (rounded up to 64s).

    It is not inheritable: hand it on with pass_fds. Memory is used as cells are (6 MB if all were).
    Errors: OSError if the system gives no memory.
    """
    sets = [-(-count // _WAYS) for count in (buckets, budgets, slots)]
    fd = _anonymous_file()
    cells = sum(count * _WAYS * (2 + width) for count, width in zip(sets, (1, 2, owners), strict=True))
    words = _OWNERS + owners * _ROW + cells
    header = _HEADER.pack(_MAGIC, *sets, owners, int(lease_s * 1e9), 0, secrets.token_bytes(16))
    try:
        os.ftruncate(fd, words * _WORD)
        os.pwrite(fd, header, 0)
    except OSError:
        os.close(fd)
        raise
    return fd


def attach(fd: int, owner: int) -> MemoryState:
    """The counters behind a descriptor of `create`, as `owner`: from 0, below `owners`, one a living process.

    What an earlier process left in flight under this number is free from here on. The descriptor stays the
    caller's and has to outlive the state. Errors: ValueError if it is no such file or the owner is too high.
    """
    return MemoryState(fd, owner)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("counters")
    with tempfile.TemporaryFile() as file:  # macOS: no memfd; an unlinked file does the same
        return os.dup(file.fileno())


class _Place:
    """A name's hash, its set, and the cell where it was last seen (word indices)."""

    __slots__ = ("cell", "high", "keys", "low", "needle", "value")

    def __init__(self, low: int, high: int, keys: int, value: int) -> None:
        self.low = low
        self.high = high
        self.needle = struct.pack("=qq", low, high)
        self.keys = self.cell = keys
        self.value = value


class _Table:
    """Cells of one kind. Whoever calls `find`, `room` or `publish` holds the lock of the set."""

    def __init__(self, memory: mmap.mmap, words: memoryview, start: int, sets: int, width: int) -> None:
        self._memory = memory
        self._words = words
        self._secret = memory[_HEADER.size - 16 : _HEADER.size]
        self._start = start
        self._sets = sets
        self._width = width
        self.end = start + sets * _WAYS * (2 + width)
        self.place = lru_cache(maxsize=_REMEMBERED)(self._place)

    def _place(self, name: str) -> _Place:
        digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16, key=self._secret).digest()
        low, high = struct.unpack("=qq", digest)
        keys = self._start + high % self._sets * _WAYS * (2 + self._width)
        return _Place(low | 1, high, keys, keys + 2 * _WAYS)  # a free cell has low = 0

    def find(self, place: _Place) -> int:
        """The word index of its value, or -1."""
        words = self._words
        if words[place.cell] == place.low and words[place.cell + 1] == place.high:
            return place.value
        begin = place.keys * _WORD
        at = self._memory.find(place.needle, begin, begin + 2 * _WAYS * _WORD)
        if at < 0 or at % (2 * _WORD) != begin % (2 * _WORD):
            return -1
        return self._remember(place, (at - begin) // (2 * _WORD))

    def room(self, place: _Place, idle: Callable[[int], bool]) -> int:
        """The value of a cell without a name, taken from an idle one if need be; -1 if there is none."""
        words = self._words
        for way in range(_WAYS):
            if not words[place.keys + 2 * way]:
                return self._remember(place, way)
        for way in range(_WAYS):
            if idle(self._value(place, way)):
                words[place.keys + 2 * way] = 0
                return self._remember(place, way)
        return -1

    def publish(self, place: _Place) -> None:
        """Gives the cell of `room` its name, now that it has its value."""
        self._words[place.cell + 1] = place.high
        self._words[place.cell] = place.low

    def _remember(self, place: _Place, way: int) -> int:
        place.cell = place.keys + 2 * way
        place.value = self._value(place, way)
        return place.value

    def _value(self, place: _Place, way: int) -> int:
        return place.keys + 2 * _WAYS + way * self._width


class Held(msgspec.Struct):
    """Slots of this store. `words` are the owner's own counts; those of names without a cell are missing."""

    names: tuple[str, ...]
    words: list[int]
    epoch: int


class MemoryState:
    """proxy.state.State on shared memory. Use `attach`."""

    def __init__(self, fd: int, owner: int) -> None:
        if os.fstat(fd).st_size < _HEADER.size:
            raise ValueError("not a file of shared counters")
        self._fd = fd
        self._memory = mmap.mmap(fd, 0)
        self._words = memoryview(self._memory).cast("q")
        magic, buckets, budgets, slots, owners, lease_ns, *_ = _HEADER.unpack_from(self._memory)
        if magic != _MAGIC or not 0 <= owner < owners:
            self._unmap()
            raise ValueError(f"no shared counters for owner {owner}" if magic == _MAGIC else "other counters")
        self._lease_ns = lease_ns
        self._row = _OWNERS + owner * _ROW
        self._owner = owner
        tables = _OWNERS + owners * _ROW
        self._buckets = _Table(self._memory, self._words, tables, buckets, 1)
        self._budgets = _Table(self._memory, self._words, self._buckets.end, budgets, 2)
        self._slots = _Table(self._memory, self._words, self._budgets.end, slots, owners)
        self._come(owner)

    # ── buckets ──────────────────────────────────────────────────────────────────────────────────

    async def take(self, charges: Sequence[Charge], now: float) -> list[Decision]:
        places = [self._buckets.place(charge.bucket_id) for charge in charges]
        try:
            self._lock(places)
            tats: dict[_Place, int] = {}
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
            self._unlock()
        return decisions

    async def settle(self, charges: Sequence[Charge], now: float) -> None:
        places = [self._buckets.place(charge.bucket_id) for charge in charges]
        try:
            self._lock(places)
            for place, charge in zip(places, charges, strict=True):
                tat = bucket.settle(
                    self._tat(place), charge.rate_per_minute, charge.burst, charge.amount, now
                )
                self._write_tats({place: tat}, now)
        finally:
            self._unlock()

    async def peek(self, charges: Sequence[Charge], now: float) -> list[Decision]:
        places = [self._buckets.place(charge.bucket_id) for charge in charges]
        try:
            self._lock(places)
            tats = [self._tat(place) for place in places]
        finally:
            self._unlock()
        return [
            bucket.take(tat, charge.rate_per_minute, charge.burst, charge.amount, now)[1]
            for tat, charge in zip(tats, charges, strict=True)
        ]

    def _tat(self, place: _Place) -> int:
        value = self._buckets.find(place)
        return self._words[value] if value >= 0 else 0

    def _write_tats(self, tats: dict[_Place, int], now: float) -> None:
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

    def _lower_tats(self, tats: dict[_Place, int]) -> None:
        """After a refusal nothing is taken, but a clock that jumped back may have lowered a tat."""
        for place, tat in tats.items():
            value = self._buckets.find(place)
            if value >= 0 and tat < self._words[value]:
                self._words[value] = tat

    # ── slots ────────────────────────────────────────────────────────────────────────────────────

    async def acquire(self, slots: Sequence[Slot], now: float) -> Held | None:
        now_ns = int(now * 1e9)
        if now_ns - self._words[self._row + _ALIVE] > self._lease_ns // 4:
            self._sign(now_ns)
        held = self._acquire(slots)
        if held is None and self._reap(now_ns):
            return self._acquire(slots)
        return held

    async def release(self, lease: Lease) -> None:
        """Needs no lock: nobody else writes the words of this owner."""
        assert isinstance(lease, Held)
        words, lease.words = lease.words, []
        if lease.epoch == self._words[self._row + _EPOCH]:
            for word in words:
                self._words[word] -= 1

    async def peek_slots(self, names: Sequence[str], now: float) -> list[int]:
        self._reap(int(now * 1e9))
        places = [self._slots.place(name) for name in names]
        try:
            self._lock(places)
            return [self._taken(place) for place in places]
        finally:
            self._unlock()

    async def renew(self, now: float) -> None:
        now_ns = int(now * 1e9)
        self._sign(now_ns)
        self._reap(now_ns)

    def forget(self, owner: int) -> None:
        """Frees all slots of an owner that is known to be dead, before its lease says so."""
        try:
            self._lock_owners()
            self._words[_OWNERS + owner * _ROW + _EPOCH] += 1
        finally:
            self._unlock()

    def _acquire(self, slots: Sequence[Slot]) -> Held | None:
        places = [self._slots.place(slot.name) for slot in slots]
        try:
            self._lock(places)
            wanted: dict[_Place, int] = {}
            for place, slot in zip(places, slots, strict=True):
                wanted[place] = wanted.get(place, 0) + 1
                if self._taken(place) + wanted[place] > slot.limit:
                    return None
            return self._enter(tuple([slot.name for slot in slots]), wanted)
        finally:
            self._unlock()

    def _enter(self, names: tuple[str, ...], wanted: dict[_Place, int]) -> Held:
        """As in `_write_tats`, names that have a cell go first."""
        words, epoch = self._words, self._words[self._row + _EPOCH]
        held = Held(names, [], epoch)
        missing = []
        for place, places in wanted.items():
            value = self._slots.find(place)
            if value < 0:
                missing.append(place)
                continue
            mine = value + self._owner
            fresh = words[mine] >> _COUNT_BITS != epoch
            words[mine] = (epoch << _COUNT_BITS if fresh else words[mine]) + places
            held.words += [mine] * places
        for place in missing:
            value = self._slots.room(place, lambda value: not self._count(value))
            if value < 0:
                self._overflowed()
                continue
            mine = value + self._owner
            words[mine] = (epoch << _COUNT_BITS) + wanted[place]
            self._slots.publish(place)
            held.words += [mine] * wanted[place]
        return held

    def _taken(self, place: _Place) -> int:
        value = self._slots.find(place)
        return self._count(value) if value >= 0 else 0

    def _count(self, value: int) -> int:
        """The places of a cell that living owners hold; a word of an earlier epoch is nobody's."""
        words, row, count = self._words, _OWNERS + _EPOCH, 0
        for at in range(value, value + words[_SEEN]):
            word = words[at]
            if word and word >> _COUNT_BITS == words[row]:
                count += word & _COUNT
            row += _ROW
        return count

    # ── budgets ──────────────────────────────────────────────────────────────────────────────────

    async def spend(self, spends: Sequence[Spend], now: float) -> list[bool]:
        now_ns = int(now * 1e9)
        places = [self._budgets.place(spend.name) for spend in spends]
        try:
            self._lock(places)
            totals: dict[_Place, tuple[int, int]] = {}
            within = []
            for place, spend in zip(places, spends, strict=True):
                spent, ends_ns = totals.get(place) or self._period(place, spend.resets_at, now_ns)
                totals[place] = (spent + spend.amount, ends_ns)
                within.append(spent + spend.amount <= spend.limit)
            if all(within):
                self._write_totals(totals, now_ns)
        finally:
            self._unlock()
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
            self._unlock()

    async def peek_spend(self, names: Sequence[str], now: float) -> list[int]:
        now_ns = int(now * 1e9)
        places = [self._budgets.place(name) for name in names]
        try:
            self._lock(places)
            return [self._period(place, 0.0, now_ns)[0] for place in places]
        finally:
            self._unlock()

    def _period(self, place: _Place, resets_at: float, now_ns: int) -> tuple[int, int]:
        """What is spent, and when that period ends: the later one of the cell's and the caller's."""
        ends_ns = int(resets_at * 1e9)
        value = self._budgets.find(place)
        if value < 0 or self._words[value + 1] <= now_ns or self._words[value + 1] < ends_ns:
            return 0, ends_ns
        return self._words[value], self._words[value + 1]

    def _write_totals(self, totals: dict[_Place, tuple[int, int]], now_ns: int) -> None:
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

    # ── owners, locks ────────────────────────────────────────────────────────────────────────────

    async def close(self) -> None:
        self.forget(self._owner)
        self._unmap()

    @property
    def overflow(self) -> int:
        """Names that were answered without being counted, since `create`, by all owners."""
        rows = range(_OWNERS, _OWNERS + self._words[_SEEN] * _ROW, _ROW)
        return sum(self._words[row + _OVERFLOW] for row in rows)

    def _overflowed(self) -> None:
        self._words[self._row + _OVERFLOW] += 1

    def _come(self, owner: int) -> None:
        self.forget(owner)
        try:
            self._lock_owners()
            self._words[_SEEN] = max(self._words[_SEEN], owner + 1)
        finally:
            self._unlock()

    def _sign(self, now_ns: int) -> None:
        """Under the lock, so that nobody who read an older sign still counts this owner as gone."""
        try:
            self._lock_owners()
            self._words[self._row + _ALIVE] = now_ns
        finally:
            self._unlock()

    def _reap(self, now_ns: int) -> bool:
        """Frees the slots of owners that were silent for too long; says whether there were any."""
        last = now_ns - self._lease_ns
        rows = range(_OWNERS, _OWNERS + self._words[_SEEN] * _ROW, _ROW)
        silent = [row for row in rows if self._words[row + _ALIVE] < last]
        if not silent:
            return False
        try:
            self._lock_owners()
            for row in silent:
                if self._words[row + _ALIVE] < last:
                    self._words[row + _EPOCH] += 1
                    self._words[row + _ALIVE] = now_ns  # looked at again in a lease, no sooner
        finally:
            self._unlock()
        return True

    def _lock(self, places: Iterable[_Place]) -> None:
        """Always in ascending order, so that no two processes wait for each other."""
        for keys in sorted({place.keys for place in places}):
            fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, keys * _WORD)

    def _lock_owners(self) -> None:
        """The first byte of the file; taken alone."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX, 1)

    def _unlock(self) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def _unmap(self) -> None:
        self._words.release()
        self._memory.close()
