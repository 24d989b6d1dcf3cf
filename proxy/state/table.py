"""The tables in shared memory that stand under proxy.state.memory: owners, names, cells, locks.

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
either: the event loop is the only caller in a process. One process alone takes none: each is two system
calls, and while it makes them other threads (log, ledger) may take the interpreter from it. A stopped holder
(SIGSTOP) stops the others at the same set until it continues or is killed.

A full set reuses an idle cell, which says the same as no cell. If there is none, the name is not counted: it
is answered as if never used, and `overflow` goes up. How rare that is was decided with the size: in a table
half full, two sets in ten million would need more than 64 cells (Poisson, mean 32).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy.state import Slot

_MAGIC = 0x6865616472616365  # also the version of this layout
_WAYS = 64
_WORD = 8
#: Header words: magic, bucket sets, budget sets, slot sets, owners, lease_ns, owners seen, hash secret (2).
_HEADER = struct.Struct("=7q16s")
SEEN = 6
#: The rows of owners begin here (words) and are one cache line wide: epoch, last sign of life, overflows.
OWNERS = 16
ROW = 8
EPOCH, ALIVE, OVERFLOW = 0, 1, 2
#: How long a second process waits before its first verb.
_SETTLE_S = 0.02
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
    words = OWNERS + owners * ROW + cells
    header = _HEADER.pack(_MAGIC, *sets, owners, int(lease_s * 1e9), 0, secrets.token_bytes(16))
    try:
        os.ftruncate(fd, words * _WORD)
        os.pwrite(fd, header, 0)
    except OSError:
        os.close(fd)
        raise
    return fd


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("counters")
    with tempfile.TemporaryFile() as file:  # macOS: no memfd; an unlinked file does the same
        return os.dup(file.fileno())


class Place:
    """A name's hash, its set, and the cell where it was last seen (word indices)."""

    __slots__ = ("cell", "high", "keys", "low", "needle", "span", "value")

    def __init__(self, low: int, high: int, keys: int, value: int) -> None:
        self.low = low
        self.high = high
        self.needle = struct.pack("=qq", low, high)
        self.keys = keys
        self.sits(keys, value)

    def sits(self, cell: int, value: int) -> None:
        self.cell, self.value = cell, value
        self.span = slice(cell * _WORD, (cell + 2) * _WORD)  # of the file: its key


class Table:
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
        #: Values of names, at most `_REMEMBERED`. Of use while this process is alone: then nobody else moves
        #: a cell. `_lock` empties it.
        self.cells: dict[str, int] = {}
        #: The same of slots that are taken together: the word of each, and its limit. As many, and as long.
        self.together: dict[tuple[Slot, ...], tuple[tuple[int, int], ...]] = {}

    def _place(self, name: str) -> Place:
        digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16, key=self._secret).digest()
        low, high = struct.unpack("=qq", digest)
        keys = self._start + high % self._sets * _WAYS * (2 + self._width)
        return Place(low | 1, high, keys, keys + 2 * _WAYS)  # a free cell has low = 0

    def look(self, name: str) -> int:
        """As `find`, for a name that `cells` does not know."""
        value = self.find(self.place(name))
        if value >= 0 and self._words[SEEN] == 1:
            if len(self.cells) >= _REMEMBERED:
                self.forget()
            self.cells[name] = value
        return value

    def remember(self, slots: tuple[Slot, ...], words: tuple[tuple[int, int], ...]) -> None:
        """For `together`."""
        if len(self.together) >= _REMEMBERED:
            self.forget()
        self.together[slots] = words

    def forget(self) -> None:
        """Every cell is looked for again."""
        self.cells.clear()
        self.together.clear()

    def find(self, place: Place) -> int:
        """The word index of its value, or -1."""
        if self._memory[place.span] == place.needle:
            return place.value
        begin = place.keys * _WORD
        at = self._memory.find(place.needle, begin, begin + 2 * _WAYS * _WORD)
        if at < 0 or at % (2 * _WORD) != begin % (2 * _WORD):
            return -1
        return self._remember(place, (at - begin) // (2 * _WORD))

    def room(self, place: Place, idle: Callable[[int], bool]) -> int:
        """The value of a cell without a name, taken from an idle one if need be; -1 if there is none."""
        words = self._words
        for way in range(_WAYS):
            if not words[place.keys + 2 * way]:
                return self._remember(place, way)
        for way in range(_WAYS):
            if idle(self._value(place, way)):
                words[place.keys + 2 * way] = 0
                self.forget()  # it may be one of these
                return self._remember(place, way)
        return -1

    def publish(self, place: Place) -> None:
        """Gives the cell of `room` its name, now that it has its value."""
        self._words[place.cell + 1] = place.high
        self._words[place.cell] = place.low

    def _remember(self, place: Place, way: int) -> int:
        place.sits(place.keys + 2 * way, self._value(place, way))
        return place.value

    def _value(self, place: Place, way: int) -> int:
        return place.keys + 2 * _WAYS + way * self._width


class Counters:
    """The file of `create`, mapped: its tables, its owners, its locks."""

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
        self._silent_until = 0  # of this owner: it has to give a sign by then
        self._row = OWNERS + owner * ROW
        self._owner = owner
        tables = OWNERS + owners * ROW
        self._buckets = Table(self._memory, self._words, tables, buckets, 1)
        self._budgets = Table(self._memory, self._words, self._buckets.end, budgets, 2)
        self._slots = Table(self._memory, self._words, self._budgets.end, slots, owners)
        self._come(owner)

    @property
    def name(self) -> str:
        """The same for all owners of this file, and for nobody else."""
        secret = self._memory[_HEADER.size - 16 : _HEADER.size]
        return blake2b(secret, digest_size=8, person=b"name").hexdigest()

    def forget(self, owner: int) -> None:
        """Frees all slots of an owner that is known to be dead, before its lease says so."""
        try:
            self._lock_owners()
            self._words[OWNERS + owner * ROW + EPOCH] += 1
        finally:
            self._unlock()

    @property
    def overflow(self) -> int:
        """Names that were answered without being counted, since `create`, by all owners."""
        rows = range(OWNERS, OWNERS + self._words[SEEN] * ROW, ROW)
        return sum(self._words[row + OVERFLOW] for row in rows)

    def _overflowed(self) -> None:
        self._words[self._row + OVERFLOW] += 1

    def _come(self, owner: int) -> None:
        """The second one waits for whatever the first is doing without a lock: it takes microseconds."""
        self.forget(owner)
        try:
            self._lock_owners()
            seen = self._words[SEEN]
            self._words[SEEN] = max(seen, owner + 1)
        finally:
            self._unlock()
        if seen == 1 and owner:
            time.sleep(_SETTLE_S)

    def _sign(self, now_ns: int) -> None:
        """Under the lock, so that nobody who read an older sign still counts this owner as gone."""
        try:
            self._lock_owners()
            self._words[self._row + ALIVE] = now_ns
            self._silent_until = now_ns + self._lease_ns // 4
        finally:
            self._unlock()

    def _reap(self, now_ns: int) -> bool:
        """Frees the slots of owners that were silent for too long; says whether there were any."""
        last = now_ns - self._lease_ns
        rows = range(OWNERS, OWNERS + self._words[SEEN] * ROW, ROW)
        silent = [row for row in rows if self._words[row + ALIVE] < last]
        if not silent:
            return False
        try:
            self._lock_owners()
            for row in silent:
                if self._words[row + ALIVE] < last:
                    self._words[row + EPOCH] += 1
                    self._words[row + ALIVE] = now_ns  # looked at again in a lease, no sooner
        finally:
            self._unlock()
        return True

    def _lock(self, places: Sequence[Place]) -> None:
        """Always in ascending order, so that no two processes wait for each other. Not while this process is
        the only one there has been: see `_come`."""
        if self._words[SEEN] == 1:
            return
        for table in (self._buckets, self._slots):
            table.forget()  # of a time when it was alone
        if len(places) == 1:
            fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, places[0].keys * _WORD)
            return
        for keys in sorted({place.keys for place in places}):
            fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, keys * _WORD)

    def _release(self) -> None:
        """After `_lock`. If a second process has come meanwhile, what is unlocked was not locked: no harm."""
        if self._words[SEEN] != 1:
            self._unlock()

    def _lock_owners(self) -> None:
        """The first byte of the file; taken alone."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX, 1)

    def _unlock(self) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def _unmap(self) -> None:
        self._words.release()
        self._memory.close()
