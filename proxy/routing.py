"""Who is asked next: the upstream within a model, the model after a model, the key within an upstream.

- Within a tier the better of two: two distinct candidates are drawn by weight, and the one with fewer
  requests in flight per weight is taken; between equals the one drawn first. So an idle pool is shared
  exactly by weight, and a busy one settles where requests in flight are. (nginx's `random two least_conn`
  compares the same; comparing `in_flight + 1` instead would leave a lighter upstream without any request as
  long as the pool is idle: with weights 3:1 and one request at a time 100:0, measured.)
- The next tier only when none of the tiers before has an available candidate.
- Available is healthy and not full (Caddy's hosts.go); ready is healthy and maybe full, which a request can
  wait for. A candidate says so itself, and is asked at each pick.
- A request tries everybody once before it tries anybody twice.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar


class Candidate(Protocol):
    """One upstream as a target of a model. `weight` is above 0; of `tier`, smaller comes first."""

    @property
    def in_flight(self) -> int: ...
    @property
    def weight(self) -> float: ...
    @property
    def tier(self) -> int: ...
    @property
    def available(self) -> bool: ...
    @property
    def ready(self) -> bool: ...


C = TypeVar("C", bound=Candidate)


def pick(candidates: Sequence[C], rng: Callable[[], float]) -> C | None:
    """The candidate to ask, None if none is available; `rng` is uniform in [0, 1)."""
    available = [candidate for candidate in candidates if candidate.available]
    if not available:
        return None
    first_tier = min(candidate.tier for candidate in available)
    tier = [candidate for candidate in available if candidate.tier == first_tier]
    if len(tier) == 1:
        return tier[0]
    one = tier.pop(_draw(tier, rng))
    other = tier[_draw(tier, rng)]
    # Multiplied crosswise: equal loads compare as equal, which quotients of floats would not.
    return other if other.in_flight * one.weight < one.in_flight * other.weight else one


def _draw(candidates: Sequence[Candidate], rng: Callable[[], float]) -> int:
    """An index, by weight."""
    point = rng() * sum(candidate.weight for candidate in candidates)
    for index, candidate in enumerate(candidates):
        point -= candidate.weight
        if point < 0:
            return index
    return len(candidates) - 1  # the sum was rounded up


class Turns(Generic[C]):
    """Whom one request has asked, and who is next; each turn is decided when it is asked for.

    `groups`: the candidates of the model, then those of each model to fall back to. Of the available
    candidates those that were asked least often, over all groups and tiers: a retry goes elsewhere if it can,
    and to the same only when everybody else was asked too. `rng` is uniform in [0, 1).
    """

    __slots__ = ("_asked", "_groups", "_not_before", "_rng")

    def __init__(self, groups: Sequence[Sequence[C]], rng: Callable[[], float]) -> None:
        self._groups = groups
        self._rng = rng
        self._asked: dict[C, int] = {}
        self._not_before: dict[C, float] = {}

    def all(self) -> list[C]:
        return [candidate for group in self._groups for candidate in group]

    def ranking(self) -> list[C]:
        """Those of the first group that can answer, best first; those that are full only after all others.
        Empty: nobody can."""
        for group in self._groups:
            if len(group) == 1:  # as often as not, and without the frame of a comprehension
                if group[0].ready:
                    return [group[0]]
                continue
            ready = [candidate for candidate in group if candidate.ready]
            if len(ready) > 1:
                return self._ranked(ready)
            if ready:
                return ready
        return []

    def _ranked(self, ready: list[C]) -> list[C]:
        ranked = []
        while (best := pick(ready, self._rng)) is not None:
            ready.remove(best)
            ranked.append(best)
        return ranked + sorted(ready, key=lambda candidate: candidate.tier)

    def took(self, candidate: C) -> None:
        """It is being asked."""
        self._asked[candidate] = self._asked.get(candidate, 0) + 1

    def asked(self, candidate: C) -> bool:
        """Has it been?"""
        return candidate in self._asked

    def rest(self, candidate: C, until: float) -> None:
        """Not again before then; `inf` is never."""
        self._not_before[candidate] = until

    def next(self) -> tuple[C, float] | None:
        """Who is to be asked, and from when on (the past: at once). None: nobody is left. The caller counts
        attempts."""
        left = [
            (self._asked.get(candidate, 0), number, candidate)
            for number, group in enumerate(self._groups)
            for candidate in group
            if candidate.available and self._not_before.get(candidate, 0.0) < math.inf
        ]
        if not left:
            return None
        least, first, _ = min(left, key=lambda each: each[:2])
        open_to = [each for asked, number, each in left if (asked, number) == (least, first)]
        if least == 0:
            chosen = pick(open_to, self._rng)
        else:
            chosen = min(open_to, key=lambda each: (self._not_before.get(each, 0.0), each.tier))
        return None if chosen is None else (chosen, self._not_before.get(chosen, 0.0))


def fallbacks(model: str, listed: Callable[[str], Sequence[str]]) -> Iterator[str]:
    """The model itself, then those to fall back to: what it lists, then what those list, each once.

    Breadth first: whoever wrote two fallbacks for a model meant both before the first one's own. `listed`
    gives a model's list, empty for one without. `a -> b -> a` ends after b."""
    seen = {model}
    waiting = deque([model])
    while waiting:
        name = waiting.popleft()
        yield name
        for other in listed(name):
            if other not in seen:
                seen.add(other)
                waiting.append(other)


#: How long a key rests that was refused without a Retry-After. A 401 may last until somebody repairs the
#: configuration, or be a provider's bad minute: one refused request each half minute finds out, and that
#: request is tried again with another key.
DEFAULT_REST_S = 30.0
#: Answers that speak of the key they were sent with.
RESTING_STATUSES = frozenset({401, 429})


class Rotation:
    """Several keys of one upstream, in turn. Each is known by its index: no secret passes through here.

    A key that was refused (RESTING_STATUSES) rests alone; the others go on. When all rest, the one whose rest
    ends first is taken: a wrong rest must not stop an upstream. `now` is in seconds of any clock that never
    goes back."""

    __slots__ = ("_next", "_rests_until")

    def __init__(self, count: int) -> None:
        """`count` is 1 or more."""
        self._rests_until = [-math.inf] * count
        self._next = 0

    def take(self, now: float) -> int:
        """The index of the key to use."""
        count = len(self._rests_until)
        turn = [(self._next + step) % count for step in range(count)]
        index = min(turn, key=lambda i: max(self._rests_until[i], now))  # min keeps the first among equals
        self._next = (index + 1) % count
        return index

    def rest(self, index: int, retry_after_s: float | None, now: float) -> None:
        """The key was refused: not before its Retry-After. A longer rest that it already has stays."""
        until = now + (DEFAULT_REST_S if retry_after_s is None else retry_after_s)
        self._rests_until[index] = max(self._rests_until[index], until)

    def spare(self, now: float) -> bool:
        """Whether any key is not resting: asked after `rest`, whether the request can go on with another."""
        return any(until <= now for until in self._rests_until)
