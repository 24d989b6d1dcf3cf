"""All workers of a front, seen as one: sums, lists, commands. Draining generations are among them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import structlog

from proxy import config
from proxy.control import ControlError
from proxy.errors import StartError
from proxy.metrics import Snapshot
from proxy.tasks import spawn
from proxy.workers import RemoteWorker, Worker


class Crew:
    """workers: those that serve. elders: generations that still drain."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.elders: list[RemoteWorker] = []

    async def state(self) -> dict[str, Any]:
        """The sum over all; `workers` counts those that serve."""
        total: dict[str, Any] = {}
        for state in await self._ask_all(lambda worker: worker.state()):
            for name, value in state.items():
                total[name] = total.get(name, 0) + value
        total["workers"] = len(self.workers)
        return total

    async def snapshots(self) -> list[Snapshot]:
        return await self._ask_all(lambda worker: worker.snapshot())

    async def streams(self) -> list[dict[str, Any]]:
        lists = await self._ask_all(lambda worker: worker.streams())
        return [stream for streams in lists for stream in streams]

    async def kill(self, stream_id: str) -> bool:
        return any(await self._ask_all(lambda worker: worker.kill(stream_id)))

    async def prepare(self, settings: config.Config) -> list[Worker]:
        """Those that serve have made themselves ready for new settings. Raises StartError, and none has."""
        workers = list(self.workers)
        try:
            for worker in workers:
                await worker.prepare(settings)
        except (ControlError, StartError, OSError, ValueError) as error:
            await ask(workers, lambda worker: worker.discard())
            raise StartError(f"nothing was changed: {error}") from error
        return workers

    async def commit(self, workers: Iterable[Worker], give_up: Callable[[Worker], None]) -> None:
        """They change to what they have prepared. give_up: on one that does not answer."""
        for worker in workers:
            try:
                await worker.commit()
            except ControlError:
                give_up(worker)

    async def drain(self, limit_s: float) -> None:
        """Only those that serve: an elder drains already."""
        drains = (worker.drain(limit_s) for worker in self.workers)
        for result in await asyncio.gather(*drains, return_exceptions=True):
            if isinstance(result, Exception):  # the others still have to end in order
                structlog.get_logger().error("drain_failed", error=type(result).__name__)

    async def hurry(self) -> None:
        await ask(self.workers, lambda worker: worker.hurry())

    async def until_elders_gone(self, limit_s: float, hurry: asyncio.Event) -> None:
        """Generations before this one are seen and counted through it only."""
        closed = [elder.channel.closed for elder in self.elders if elder.channel is not None]
        if closed and not hurry.is_set():
            hurried = spawn(hurry.wait(), "wait for hurry")
            gone = asyncio.gather(*map(asyncio.shield, closed))
            await asyncio.wait([gone, hurried], timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            hurried.cancel()
            gone.cancel()

    async def _ask_all(self, question: Callable[[Worker], Awaitable[Any]]) -> list[Any]:
        return await ask([*self.workers, *self.elders], question)


async def ask(workers: Iterable[Worker], question: Callable[[Worker], Awaitable[Any]]) -> list[Any]:
    """The answers of those that answer; one that has just died is not waited for, its figures are what it
    said last."""
    answers = await asyncio.gather(*(question(worker) for worker in workers), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, ControlError):
            raise answer
    return [answer for answer in answers if not isinstance(answer, BaseException)]
