"""`streams.on_disconnect: drain_for_usage`: the rest of an answer whose caller has left, read for the usage
at its end.

The request's own task reads on, so that the request keeps its slots, is seen and can be killed like any
other, and settles once. It ends with the answer, or at a bound: seconds, bytes, requests at once.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, ClassVar

from proxy.chunked import inside
from proxy.errors import Reason
from proxy.pipe import GRACE_S, TIMER_SLACK_S

if TYPE_CHECKING:
    from proxy.context import Context
    from proxy.core import Core
    from proxy.schema import DrainForUsage, Streams
    from proxy.tap import Tap
    from proxy.upstream import Exchange
    from proxy.wire_connection import End


async def drain_for_usage(core: Core, ctx: Context, exchange: Exchange, tap: Tap, total_at: float) -> None:
    """Reads on, if that is wanted. Called once the caller has left: by the task that its leaving has
    cancelled, or will. Raises CancelledError if it is ended from outside."""
    bounds = _bounds_of(core.config.streams)
    if bounds is None or tap.feed is None or exchange.status >= 300 or ctx.stopped is not None:
        return
    if core.draining or core.draining_for_usage >= bounds.streams:
        return
    ctx.reason, ctx.left_at = Reason.CLIENT_GONE, monotonic()
    rest = Rest(tap, bounds.bytes, min(ctx.left_at + bounds.seconds, total_at))
    core.draining_for_usage += 1
    try:
        await rest.take(ctx, exchange)
    finally:
        core.draining_for_usage -= 1


def _bounds_of(streams: Streams) -> DrainForUsage | None:
    """None: an answer ends with its caller. Where usage is not looked for there is nothing to read on for."""
    if streams.on_disconnect == "cancel" or streams.usage == "off":
        return None
    return streams.on_disconnect.drain_for_usage


class Rest:
    """Takes the rest of an answer; a sink for both data paths (`pipe.Taker`).

    until: a moment of `time.monotonic`.
    """

    __slots__ = ("_feed", "_left_bytes", "_may_leave", "_tap", "_timer", "_until", "_wake", "finished")
    blocked: ClassVar[bool] = False

    def __init__(self, tap: Tap, most_bytes: int, until: float) -> None:
        assert tap.feed is not None
        self._tap = tap
        self._feed = tap.feed
        self._left_bytes = most_bytes
        self._until = until
        self._may_leave = not _uncancel()  # that the caller has left may still be told
        self._timer: asyncio.TimerHandle | None = None
        self._wake: asyncio.Future[None] | None = None
        self.finished = False

    async def take(self, ctx: Context, exchange: Exchange) -> None:
        """Returns when the answer is over or a bound is reached. Raises CancelledError."""
        try:
            self._arm()
            self._look()
            while not self.finished:
                try:
                    await exchange.pump(self)
                    await self._over()
                except asyncio.CancelledError:
                    if ctx.stopped is not None or not self._may_leave:
                        raise
                    self._may_leave = not _uncancel()  # a write had told before
        finally:
            self.finished = True
            if self._timer is not None:
                self._timer.cancel()

    async def _over(self) -> None:
        if not self.finished:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake

    def feed(self, data: bytes, start: int = 0) -> None:
        if self.finished:
            return
        data = inside(data, start)
        self._left_bytes -= len(data)
        self._feed(data)
        if self._left_bytes <= 0:
            self._finish()
        else:
            self._look()

    async def deliver(self, data: bytes) -> None:
        self.feed(data)

    def end(self, _how: End) -> None:
        self._finish()

    def next_at(self) -> float:
        return self._until

    async def tick_deliver(self) -> None:
        if monotonic() + TIMER_SLACK_S >= self._until:
            self._finish()

    def _look(self) -> None:
        """After the terminator only the end of the framing is waited for: it lets the connection be kept."""
        if self._tap.over and self._until > monotonic() + GRACE_S:
            self._until = monotonic() + GRACE_S
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, self._until - monotonic()), self._finish)

    def _finish(self) -> None:
        self.finished = True
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


def _uncancel() -> bool:
    """Was this task cancelled? From here on it can be once more."""
    task = asyncio.current_task()
    assert task is not None
    was_cancelled = task.cancelling() > 0
    task.uncancel()
    return was_cancelled
