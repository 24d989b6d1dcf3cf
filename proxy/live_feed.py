"""One look a second for everybody who watches, and none while nobody does.

All readers share the looks. Each reader takes the newest one when it is ready for it, so a slow reader misses
some and nothing is kept for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec

from proxy import __version__, ledger_read, live_view
from proxy.admin import number_the_queue
from proxy.config import Config
from proxy.ledger_read import LedgerFailed
from proxy.live_view import Document, Failures, SpendNow
from proxy.metrics import Metrics
from proxy.sqlitefile import path_of
from proxy.tasks import spawn

MAX_READERS = 16
_EVERY_S = 1.0
_SPEND_EVERY_S = 5.0
#: What takes long is done less often: a look costs at most this share of the time, reading the ledger too.
_SHARE = 0.05
_DAY_S = 86400


class Source(Protocol):
    """The process that holds the admin listener."""

    def ready(self) -> bool: ...

    async def page(self) -> Metrics: ...

    async def streams(self) -> list[dict[str, Any]]: ...


class Feed:
    """look: the next event. rested: told when nobody looks any more. every_s: from look to look, seconds."""

    def __init__(
        self,
        look: Callable[[], Awaitable[bytes]],
        rested: Callable[[], None] = lambda: None,
        every_s: float = _EVERY_S,
    ) -> None:
        self._look = look
        self._rested = rested
        self._every_s = every_s
        self._news = asyncio.Condition()
        self._latest: bytes | None = None
        self._number = 0
        self._ended = False
        self._sampling: asyncio.Task[None] | None = None
        self.readers = 0

    @property
    def full(self) -> bool:
        return self.readers >= MAX_READERS

    @contextmanager
    def reader(self) -> Iterator[AsyncIterator[bytes]]:
        """What one reader gets, from now on until the feed ends."""
        self.readers += 1
        if self._sampling is None:
            self._sampling = spawn(self._sample(), "live view")
        try:
            yield self._events()
        finally:
            self.readers -= 1
            if not self.readers:
                self._rest()

    async def end(self) -> None:
        """For good: every reader's events end."""
        self._ended = True
        await self._tell()

    async def _events(self) -> AsyncIterator[bytes]:
        seen = -1 if self._latest is not None else self._number
        while True:
            await self._other_than(seen)
            if self._ended or self._latest is None:
                return
            seen = self._number
            yield self._latest

    async def _other_than(self, seen: int) -> None:
        async with self._news:
            await self._news.wait_for(lambda: self._ended or self._number != seen)

    async def _sample(self) -> None:
        try:
            while not self._ended:
                began = time.monotonic()
                self._latest = await self._look()
                took_s = time.monotonic() - began
                self._number += 1
                await self._tell()
                await asyncio.sleep(max(self._every_s - took_s, took_s / _SHARE))
        except Exception:
            self._sampling = self._latest = None
            self._number += 1
            await self._tell()  # or they would wait for ever: their events end, and they come again
            raise

    def _rest(self) -> None:
        if self._sampling is not None:
            self._sampling.cancel()
        self._sampling = self._latest = None
        self._rested()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()


class Looks:
    """Makes the events. settings: the configuration in use."""

    def __init__(self, source: Source, settings: Callable[[], Config]) -> None:
        self._source = source
        self._settings = settings
        self._failures = Failures()
        self._spend = Spend(settings)
        self.rest = self._failures.rest

    async def event(self) -> bytes:
        """One event, as it goes over the wire. Its JSON has no line end."""
        return b"data: %b\n\n" % msgspec.json.encode(await self._document())

    async def _document(self) -> Document:
        streams, metrics = await asyncio.gather(self._source.streams(), self._source.page())
        number_the_queue(streams)
        settings, now = self._settings(), time.monotonic()
        self._failures.look(metrics.upstream_attempts.values, now)
        return Document(
            version=__version__,
            draining=not self._source.ready(),
            workers=int(metrics.workers.values.get((), 0)),
            running=live_view.phases(streams),
            streams=live_view.oldest(streams),
            upstreams=live_view.upstreams(settings, metrics, self._failures, now),
            limits=live_view.limits(settings, metrics, streams),
            spend=self._spend.today(),
        )


class Spend:
    """What today has cost, as the ledger had it a few seconds ago: a look never waits for a disk."""

    def __init__(self, settings: Callable[[], Config]) -> None:
        self._settings = settings
        self._known: tuple[int, SpendNow] | None = None
        self._due_at = 0.0
        self._reading: asyncio.Task[None] | None = None

    def today(self) -> SpendNow | None:
        if self._reading is None and time.monotonic() >= self._due_at:
            self._reading = spawn(self._read(), "spend of today")
        known = self._known
        return known[1] if known is not None and known[0] == _today() else None

    async def _read(self) -> None:
        day, began = _today(), time.monotonic()
        path = path_of(self._settings().ledger.database)
        try:
            groups = await asyncio.to_thread(ledger_read.grouped, [path], ("model",), day * _DAY_S, None)
            self._known = day, live_view.spend(groups)
        except LedgerFailed:  # said by whoever writes it, and the page shows nothing
            self._known = None
        finally:
            now = time.monotonic()
            self._due_at = now + max(_SPEND_EVERY_S, (now - began) / _SHARE)
            self._reading = None


def _today() -> int:
    return int(time.time() // _DAY_S)
