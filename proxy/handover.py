"""The two ends of a restart.

A front starts another process with the same sockets and one end of a channel; over it the new generation
says when it serves, and from then on asks the old one what it would ask a worker, until that has drained.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

import msgspec
import structlog

from proxy.control import Channel
from proxy.crew import Crew
from proxy.errors import StartError
from proxy.metrics import Metrics, Snapshot
from proxy.shared import Shared
from proxy.tasks import spawn
from proxy.workers import START_S, RemoteWorker, Worker, answer_worker_verb

#: Descriptors handed to a new generation: data listener, admin listener, handover channel; then the counters.
_INHERIT = "HEADRACE_INHERIT"


class Inheritance(NamedTuple):
    """What the generation before has left."""

    listener: socket.socket
    admin: socket.socket
    channel: socket.socket
    counters: str


def inherited(environ: MutableMapping[str, str]) -> Inheritance | None:
    """The sockets and the counters of the generation before, if this one was started by a restart."""
    named = environ.pop(_INHERIT, None)
    if named is None:
        return None
    *numbers, counters = named.split(",")
    listener, admin, channel = (socket.socket(fileno=int(number)) for number in numbers)
    channel.setblocking(False)
    return Inheritance(listener, admin, channel, counters)


class Heir:
    """The next generation, as the front sees it that starts it.

    myself: this whole front as one worker. leave_admin: called when the heir answers at the admin listener.
    """

    def __init__(self, myself: Worker, leave_admin: Callable[[], Awaitable[None]]) -> None:
        self._myself = myself
        self._leave_admin = leave_admin
        self._channel: Channel | None = None
        self._serving: asyncio.Future[None] | None = None

    @property
    def exists(self) -> bool:
        return self._channel is not None

    async def start(self, sockets: list[socket.socket], shared: Shared, environ: Mapping[str, str]) -> int:
        """Its pid, once it serves. sockets: data and admin listener. Raises StartError."""
        ours, theirs = socket.socketpair()
        numbers = [sock.fileno() for sock in (*sockets, theirs)]
        bequest = ",".join(map(str, [*numbers, shared.bequest()]))
        with theirs:
            process = await asyncio.to_thread(
                subprocess.Popen,
                [sys.executable, "-m", "proxy", *sys.argv[1:]],
                pass_fds=[*numbers, shared.fd],
                env={**environ, _INHERIT: bequest},
            )
        try:
            await self._until_serving(ours)
        except (TimeoutError, StartError) as error:
            process.kill()
            await asyncio.to_thread(process.wait)
            self._forget()
            raise StartError(str(error) or "the new generation does not start in time") from None
        structlog.get_logger().info("handed_over", to=process.pid)
        return process.pid

    async def _until_serving(self, ours: socket.socket) -> None:
        self._serving = asyncio.get_running_loop().create_future()
        ours.setblocking(False)
        self._channel = await Channel.open(ours, self._answer, lambda *_: None)
        async with asyncio.timeout(START_S):
            first = [self._serving, self._channel.closed]
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not self._serving.done():
            raise StartError("the new generation ended while it started; see its log")

    def _forget(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    async def _answer(self, verb: str, payload: Any) -> Any:
        """It asks us what it would ask a worker."""
        if verb == "serving":
            await self._leave_admin()
            if self._serving is not None and not self._serving.done():
                self._serving.set_result(None)
            return None
        return await answer_worker_verb(self._myself, verb, payload)

    async def bequeath(self, figures: Snapshot) -> None:
        """The last word: what this generation has counted."""
        assert self._channel is not None
        self._channel.note("figures", msgspec.msgpack.encode(figures))
        self._channel.close()
        await asyncio.sleep(0)


async def take_over(channel: socket.socket, crew: Crew, metrics: Metrics) -> None:
    """From the generation that has started this one: it is a worker of `crew` until it is gone; then what it
    has counted is in `metrics`. Returns when nobody else answers at the admin listener."""
    elder = RemoteWorker(os.getppid())
    await elder.connect(channel)
    assert elder.channel is not None
    crew.elders.append(elder)
    await elder.channel.call("serving")
    spawn(_until_gone(elder, elder.channel.closed, crew, metrics), "previous generation")


async def _until_gone(
    elder: RemoteWorker, closed: asyncio.Future[None], crew: Crew, metrics: Metrics
) -> None:
    await asyncio.shield(closed)
    crew.elders.remove(elder)
    metrics.absorb(elder.last, levels=False)
