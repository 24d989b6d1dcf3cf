"""New requests begin a few in a turn of the loop, in order, and none is lost."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from proxy.turnstile import Turnstile


class Turns:
    """Counts the loop's turns, as a running stream would have them."""

    def __init__(self) -> None:
        self.number = 0
        self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self._next)

    def _next(self) -> None:
        self.number += 1
        self._loop.call_soon(self._next)


async def _burst(turnstile: Turnstile, size: int, cost_s: float) -> tuple[list[int], Counter[int]]:
    """In which order requests begin that have all arrived, and how many in which turn."""
    turns = Turns()
    order: list[int] = []
    begun: Counter[int] = Counter()

    async def request(number: int) -> None:
        await turnstile.enter()
        order.append(number)
        begun[turns.number] += 1
        until = time.perf_counter() + cost_s
        while time.perf_counter() < until:
            pass

    await asyncio.gather(*[request(number) for number in range(size)])
    return order, begun


async def test_a_burst_of_costly_requests_is_spread_over_turns() -> None:
    order, begun = await _burst(Turnstile(wanted_s=0.001), 100, 0.0003)
    assert order == list(range(100))
    turns = [begun[number] for number in sorted(begun)]
    assert len(turns) > 10
    assert max(turns[-5:]) <= 8, turns  # it has found how few keep a turn short; at first it cannot know


async def test_cheap_requests_begin_many_in_a_turn() -> None:
    order, begun = await _burst(Turnstile(wanted_s=10), 100, 0)
    assert order == list(range(100))
    assert len(begun) <= 10


async def test_who_leaves_the_line_takes_no_turn() -> None:
    turnstile = Turnstile(wanted_s=0)  # every turn is too long: they begin one by one
    entered: list[int] = []

    async def request(number: int) -> None:
        await turnstile.enter()
        entered.append(number)

    tasks = [asyncio.ensure_future(request(number)) for number in range(100)]
    await asyncio.sleep(0)
    for task in tasks[40:90]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert entered == [*range(40), *range(90, 100)]
    await asyncio.wait_for(turnstile.enter(), 5)  # and the line is open again
