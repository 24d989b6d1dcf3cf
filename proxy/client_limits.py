"""Limits that a program keeps by itself: so many requests at once, so many a minute, the urgent ones first.

For batch work beside others on the same key: who waits here costs the server nothing and gets no 429. The
limits are kept by waiting, never by an error. A request keeps its place while it pauses before another
attempt, so requests that are refused together make no room for more that would be refused as well.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from heapq import heappop, heappush
from time import monotonic
from typing import NamedTuple

#: Sums of floats drift: nobody is refused for so many seconds.
_DRIFT_S = 1e-6


class TokenBucket:
    """`burst` requests at once when full, then `per_minute` evenly: over any 60 s at most the sum of both.

    GCRA, as in proxy.bucket: the whole state is the instant at which the bucket is full again."""

    def __init__(self, per_minute: float, burst: int) -> None:
        self._interval_s = 60 / per_minute
        self._capacity_s = burst * self._interval_s
        self._full_at = -math.inf

    def take(self, now: float) -> float:
        """Takes one and returns 0, or takes none and returns the seconds until there is one."""
        full_at = max(self._full_at, now) + self._interval_s
        wait_s = full_at - self._capacity_s - now
        if wait_s > _DRIFT_S:
            return wait_s
        self._full_at = full_at
        return 0.0


class _Waiter(NamedTuple):
    """In the order of the queue: `rank` (the lower goes first), then arrival."""

    rank: float
    arrival: int
    places: int
    granted: asyncio.Future[None]


class Limits:
    """At most `max_in_flight` requests at once and `requests_per_minute` (None: any number) after a `burst`.

    Several clients of one event loop may share them. `clock`: seconds, never backwards.
    """

    def __init__(
        self,
        max_in_flight: int = 100,
        requests_per_minute: float | None = None,
        burst: int = 1,
        *,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        if max_in_flight < 1 or burst < 1 or (requests_per_minute is not None and requests_per_minute <= 0):
            raise ValueError("limits: every limit is above 0")
        self.max_in_flight = max_in_flight
        self.in_flight = 0
        self._bucket = TokenBucket(requests_per_minute, burst) if requests_per_minute is not None else None
        self._clock = clock
        self._waiting: list[_Waiter] = []
        self._arrivals = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return sum(not waiter.granted.done() for waiter in self._waiting)

    @asynccontextmanager
    async def turn(self, priority: int = 0) -> AsyncIterator[None]:
        """A place, and one request of the minute. The highest priority goes first, then who came first."""
        await self._wait(-priority, 1)
        try:
            yield
        finally:
            self._leave(1)

    async def again(self) -> None:
        """One more request of the minute, for who has a place: it goes before all who have none, because they
        may be waiting for its place."""
        await self._wait(-math.inf, 0)

    async def _wait(self, rank: float, places: int) -> None:
        granted = asyncio.get_running_loop().create_future()
        heappush(self._waiting, _Waiter(rank, next(self._arrivals), places, granted))
        self._serve()
        try:
            await granted
        except asyncio.CancelledError:
            # Granted when it was being cancelled: the place goes back, the request of the minute is lost.
            self._leave(0 if granted.cancelled() else places)
            raise

    def _leave(self, places: int) -> None:
        self.in_flight -= places
        self._serve()

    def _serve(self) -> None:
        """Whoever can go, goes."""
        while self._waiting:
            first = self._waiting[0]
            if not first.granted.done():  # else it has left
                if self.in_flight + first.places > self.max_in_flight:
                    return
                wait_s = self._bucket.take(self._clock()) if self._bucket is not None else 0.0
                if wait_s > 0:
                    self._serve_later(wait_s)
                    return
                self.in_flight += first.places
                first.granted.set_result(None)
            heappop(self._waiting)

    def _serve_later(self, wait_s: float) -> None:
        if self._timer is None:
            # Whole milliseconds: uvloop's timers know no shorter time, and would be early.
            wait_s = math.ceil(wait_s * 1000) / 1000
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._due)

    def _due(self) -> None:
        self._timer = None
        self._serve()
