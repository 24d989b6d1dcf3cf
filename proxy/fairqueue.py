"""Who goes next: weighted fair queueing over flows, and how fast the queue drains.

A flow is the waiters that want the same and weigh the same: one plan's requests for one model. Inside a flow
the order is first come, first served. Between flows, virtual time decides (self-clocked fair queueing,
Golestani, INFOCOM 1994): one turn of a flow takes 1/weight, and the flow whose turn ends first goes first. Of
12 turns flows of weights 11 and 1 get 11 and 1, and none waits longer than its share makes it.

Tags belong to flows, not to waiters: a waiter that leaves takes its turn with it, and costs its flow nothing.

A flow may be unable to go although it is first: its model's upstream is full while another's is not. Then
others pass, and virtual time stands still for it. It keeps its place relative to all others that could
not go, and gathers no credit with which it would shut the rest out later. So the shares hold at every
bottleneck by itself, the machine's or an upstream's; a plan that waits for two models is two flows.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, KeysView
from typing import Generic, TypeVar

F = TypeVar("F", bound=Hashable)
T = TypeVar("T", bound=Hashable)

#: So many times between two grants are averaged.
_REMEMBERED = 64
#: No Retry-After is longer, in seconds: what is measured now says little about later.
_LONGEST_S = 60
#: Before anything was granted: seconds between two grants, a guess.
_UNKNOWN_S = 1.0


class _Flow(Generic[T]):
    __slots__ = ("ends", "items", "joined", "turn")

    def __init__(self, turn: float, ends: float, joined: int) -> None:
        self.turn = turn  # virtual time of one turn: 1/weight
        self.ends = ends  # when its next turn ends; never before the clock
        self.joined = joined
        self.items: OrderedDict[T, None] = OrderedDict()


class FairQueue(Generic[F, T]):
    """Waiters in flows. `push`, `remove`: O(1); `first`, `pop`: O(flows), which is plans times models."""

    def __init__(self) -> None:
        self._flows: dict[F, _Flow[T]] = {}
        self._clock = 0.0
        self._joined = 0
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def flows(self) -> KeysView[F]:
        """The flows with waiters."""
        return self._flows.keys()

    def depth(self, flow: F) -> int:
        """The waiters of one flow."""
        found = self._flows.get(flow)
        return len(found.items) if found is not None else 0

    def push(self, flow: F, weight: float, item: T) -> None:
        """Adds a waiter at the end of its flow. Weights are above 0; the latest one given counts."""
        found = self._flows.get(flow)
        if found is None:
            self._joined += 1
            found = self._flows[flow] = _Flow(1 / weight, self._clock + 1 / weight, self._joined)
        found.turn = 1 / weight
        found.items[item] = None
        self._waiting += 1

    def remove(self, flow: F, item: T) -> bool:
        """Takes a waiter out, wherever it stands; False: it is not there (any more)."""
        found = self._flows.get(flow)
        if found is None or item not in found.items:
            return False
        del found.items[item]
        self._took_one(flow, found)
        return True

    def first(self, can_go: Callable[[F], bool]) -> F | None:
        """The flow whose turn it is, of those that can go."""
        able = [flow for flow in self._flows if can_go(flow)]
        return min(able, key=self._rank, default=None)

    def pop(self, flow: F, can_go: Callable[[F], bool]) -> T | None:
        """The longest waiting of this flow takes its turn; None: all of them have left.

        `flow` is the answer of `first` to the same question, or the shares do not come out.
        """
        found = self._flows.get(flow)
        if found is None:
            return None
        passed = max(found.ends - self._clock, 0.0)
        self._clock += passed
        for other in self._flows:
            if other != flow and not can_go(other):
                self._flows[other].ends += passed
        found.ends += found.turn
        item, _ = found.items.popitem(last=False)
        self._took_one(flow, found)
        return item

    def drain(self) -> list[T]:
        """Takes everybody out, without turns."""
        everybody = [item for flow in self._flows.values() for item in flow.items]
        self._flows.clear()
        self._waiting, self._clock = 0, 0.0
        return everybody

    def _rank(self, flow: F) -> tuple[float, int]:
        found = self._flows[flow]
        return found.ends, found.joined

    def _took_one(self, flow: F, found: _Flow[T]) -> None:
        """A flow without waiters is forgotten: its last turn ended at the clock, where a new one begins."""
        self._waiting -= 1
        if not found.items:
            del self._flows[flow]
        if not self._flows:
            self._clock = 0.0


class DrainRate:
    """Grants per second while somebody waited: an idle queue says nothing about how fast it would drain.

    Instants are seconds of the caller's clock. Without a grant for a while the rate falls by itself.
    """

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=_REMEMBERED)
        self._since: float | None = None

    def began(self, now: float) -> None:
        """From now on somebody waits."""
        self._since = now

    def granted(self, now: float) -> None:
        """One waiter got what it waited for."""
        if self._since is not None:
            self._gaps.append(max(now - self._since, 0.0))
            self._since = now

    def ended(self) -> None:
        """Nobody waits any more."""
        self._since = None

    def seconds_per_grant(self, now: float) -> float:
        running = max(now - self._since, 0.0) if self._since is not None else 0.0
        if not self._gaps:
            return max(running, _UNKNOWN_S)
        return (sum(self._gaps) + running) / len(self._gaps)

    def retry_after_s(self, waiting: int, now: float) -> int:
        """Whole seconds until those who wait and one more were served: from 1 to 60."""
        return max(1, math.ceil(min((waiting + 1) * self.seconds_per_grant(now), _LONGEST_S)))
