"""Who is asked next: the upstream within a model, the model after a model, the key within an upstream.

- Within a tier the better of two: two distinct candidates are drawn by weight, and the one with fewer
  requests in flight per weight is taken; between equals the one drawn first. So an idle pool is shared
  exactly by weight, and a busy one settles where requests in flight are. (nginx's `random two least_conn`
  compares the same; comparing `in_flight + 1` instead would leave a lighter upstream without any request as
  long as the pool is idle: with weights 3:1 and one request at a time 100:0, measured.)
- The next tier only when none of the tiers before has an available candidate.
- Available is healthy and not full (Caddy's hosts.go); a candidate says so itself, and is asked at each pick.
- A request tries everybody once before it tries anybody twice.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar


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


class Choice(NamedTuple):
    """`target`: an index into the candidates. `again`: this request has asked it before, so a wait is due."""

    target: int
    again: bool


def order(candidates: Sequence[Candidate], rng: Callable[[], float]) -> Iterator[Choice]:
    """The attempts of one request, each decided when it is asked for.

    Of the available candidates those that were asked least often, over all tiers: a retry goes elsewhere if
    it can, and to the same only when everybody else was asked too. Ends only when none is available; the
    caller counts attempts."""
    asked = [0] * len(candidates)
    while True:
        available = [target for target, candidate in enumerate(candidates) if candidate.available]
        if not available:
            return
        least = min(asked[target] for target in available)
        open_to = [target for target in available if asked[target] == least]
        chosen = pick([candidates[target] for target in open_to], rng)
        if chosen is None:
            return
        target = next(target for target in open_to if candidates[target] is chosen)
        yield Choice(target, least > 0)
        asked[target] += 1


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
