"""The shared counters of one machine, and who owns what in them.

Every process that serves is an owner with a number of its own; a worker that is replaced comes back with the
number of the one before. A new generation after `headrace restart` gets the same memory, so that limits go
on, and the numbers behind the old one's, which still drains.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from proxy.state import memory

#: Owners that the memory has room for, at least: some generations of a usual number of workers.
_OWNERS = 64
_GENERATIONS = 4


class Owner(NamedTuple):
    """One process's place in the counters."""

    fd: int
    number: int


class Shared:
    """fd: of `state.memory.create`. Owner `first` is the front, the next ones are its workers."""

    def __init__(self, fd: int, first: int, owners: int, workers: int, *, new: bool = False) -> None:
        self.fd = fd
        self.first = first
        self.new = new  # nobody has counted in it yet
        self._owners = owners
        self._mine = workers + 1

    @classmethod
    def fresh(cls, workers: int) -> Shared:
        owners = max(_OWNERS, _GENERATIONS * (workers + 1))
        return cls(memory.create(owners=owners), 0, owners, workers, new=True)

    @classmethod
    def inherited(cls, text: str, workers: int) -> Shared:
        """Of the generation before: what its `bequest` said."""
        fd, first, owners = (int(number) for number in text.split(":"))
        if workers + 1 > owners // 2:
            os.close(fd)  # attached by nobody in this process
            return cls.fresh(workers)
        return cls(fd, first if first + workers + 1 <= owners else 0, owners, workers)

    def owner(self, index: int) -> Owner:
        """0 is the front, 1 and more its workers."""
        return Owner(self.fd, self.first + index)

    def bequest(self) -> str:
        """For the next generation, which inherits the descriptor."""
        return f"{self.fd}:{self.first + self._mine}:{self._owners}"

    def close(self) -> None:
        """Last, when nothing in this process is attached any more."""
        os.close(self.fd)
