"""Active probes: an upstream is asked how it is, by a path that costs no model call.

Two failures in a row make it unhealthy, one answer makes it healthy again: a lost packet must not take an
upstream away, and a recovered one must not wait. Any answer below 500 is healthy, 401 and 404 too: somebody
is there. A probe has a connection of its own, with DNS, TCP and TLS as a new request would have them; it is
no traffic: it takes no slot, counts in no metric, and the breaker does not hear of it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import aiohttp
import structlog

from proxy.tasks import spawn

if TYPE_CHECKING:
    from yarl import URL

_FAILURES = 2


class Health:
    """The rule, without a clock."""

    __slots__ = ("_failures", "healthy")

    def __init__(self) -> None:
        self.healthy = True
        self._failures = 0

    def record(self, ok: bool) -> bool:
        """Takes the outcome of a probe; True if the verdict has changed."""
        before = self.healthy
        self._failures = 0 if ok else self._failures + 1
        self.healthy = ok or (before and self._failures < _FAILURES)
        return self.healthy is not before


def next_wait_s(interval_s: float, rng: Callable[[], float]) -> float:
    """An interval, a tenth more or less: workers and machines that started together do not probe together."""
    return interval_s * (0.9 + 0.2 * rng())


class Request(NamedTuple):
    """What a probe asks. Both may hold a credential."""

    url: URL
    fields: list[tuple[str, str]]


class Prober:
    """Probes one upstream. `changed` is called with each new verdict. Ends `session` with itself.

    An answer has to be there within the session's timeout."""

    def __init__(
        self, name: str, request: Request, interval_s: float, session: aiohttp.ClientSession
    ) -> None:
        self._name = name
        self._request = request
        self._interval_s = interval_s
        self._session = session
        self._health = Health()
        self._task: asyncio.Task[None] | None = None

    def start(self, changed: Callable[[bool], None]) -> None:
        """Idempotent."""
        if self._task is None:
            self._task = spawn(self._run(changed), f"probe {self._name}")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._session.close()

    async def _run(self, changed: Callable[[bool], None]) -> None:
        while True:
            trouble = await self._ask()
            if self._health.record(trouble is None):
                self._say(trouble)
                changed(self._health.healthy)
            await asyncio.sleep(next_wait_s(self._interval_s, random.random))

    async def _ask(self) -> str | None:
        """None, or what is wrong: a status or the kind of an error, never a URL."""
        try:
            async with self._session.get(
                self._request.url, headers=self._request.fields, allow_redirects=False
            ) as response:
                return None if response.status < 500 else f"status {response.status}"
        except (aiohttp.ClientError, OSError, ValueError, RuntimeError) as error:
            return type(error).__name__

    def _say(self, trouble: str | None) -> None:
        log = structlog.get_logger()
        if trouble is None:
            log.info("upstream_healthy", upstream=self._name)
        else:
            log.warning("upstream_unhealthy", upstream=self._name, why=trouble)
