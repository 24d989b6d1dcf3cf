"""New requests begin a few at a time, so that the running streams come between them.

A turn of the event loop takes everything that has arrived. Hundreds of new requests in one turn are tens of
milliseconds in which no chunk moves: 200 callers with invalid keys delayed the chunks of others by 30 ms
(p99; bench/head_of_line.py). So a turn begins only so many of them that it stays short, and the others stand
in line until the loop has looked at all connections once more. That look costs, too: while turns are short,
as many may begin as arrive.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic

#: How long a turn with new requests may take before the next begins fewer. What one request costs until its
#: answer comes is 0.1 to 0.4 ms; a chunk waits one turn and a part of the next.
TURN_S = 0.002
_MOST = 32


class Turnstile:
    """The line of one event loop: first come, first served."""

    __slots__ = ("_began_at", "_left", "_line", "_per_turn", "_turning", "_wanted_s")

    def __init__(self, wanted_s: float = TURN_S) -> None:
        self._wanted_s = wanted_s
        self._per_turn = self._left = _MOST
        self._line: deque[asyncio.Future[None]] = deque()
        self._turning = False
        self._began_at = 0.0

    async def enter(self) -> None:
        """Returns when it is this request's turn. May be cancelled."""
        if not self._turning:
            self._begin_turn(asyncio.get_running_loop(), monotonic())
        if self._left and not self._line:
            self._left -= 1
            return
        place = asyncio.get_running_loop().create_future()
        self._line.append(place)
        await place

    def _begin_turn(self, loop: asyncio.AbstractEventLoop, now: float) -> None:
        self._turning = True
        self._began_at = now
        loop.call_soon(self._end_turn, loop)

    def _end_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """Half as many after a long turn, one more after a short one, as TCP finds its window (RFC 5681)."""
        now = monotonic()
        if now - self._began_at > self._wanted_s:
            self._per_turn = max(1, self._per_turn // 2)
        else:
            self._per_turn = min(_MOST, self._per_turn + 1)
        self._left = self._per_turn
        while self._left and self._line:
            place = self._line.popleft()
            if not place.done():  # else its caller has left
                place.set_result(None)
                self._left -= 1
        self._turning = False
        if self._left < self._per_turn:
            self._begin_turn(loop, now)
