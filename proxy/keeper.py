"""Keeps one worker process alive: starts it, watches its heartbeat, replaces it with back-off."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import structlog

from proxy.errors import StartError
from proxy.workers import START_S, RemoteWorker

#: A worker whose loop has not spoken for this long hangs and is replaced (it speaks every second).
HANG_S = 5.0
#: Back-off of a worker that keeps dying: doubled from the first to the last value.
_BACK_OFF_S = (0.1, 10.0)
#: A worker that has lived this long is healthy again: the next death starts at the first back-off.
_HEALTHY_S = 30.0


class Keeper:
    """Worker `number`.

    inherits: the descriptors of the data listener and of the counters. `connect` opens the channel to a new
    process, `greet` sends it its settings; `joined` and `left` tell when it serves and when it no longer
    does.
    """

    def __init__(
        self,
        number: int,
        inherits: tuple[int, int],
        greet: Callable[[RemoteWorker], None],
        joined: Callable[[RemoteWorker], None],
        left: Callable[[RemoteWorker], None],
        connect: Callable[[RemoteWorker, socket.socket], Awaitable[None]],
    ) -> None:
        self.number = number
        self.serving: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inherits = inherits
        self._greet = greet
        self._joined = joined
        self._left = left
        self._connect = connect
        self._stopping = False
        self._process: subprocess.Popen[bytes] | None = None

    async def run(self) -> None:
        """Until `stop`. A first start that fails is told by `serving` and is the end."""
        back_off_s, last_s = _BACK_OFF_S
        while not self._stopping:
            worker, process = await self._spawn()
            await self._live(worker, process)
            lived_s = time.monotonic() - worker.started_at
            code = await asyncio.to_thread(process.wait)
            if self._stopping or self.serving.exception() is not None:
                return
            log = structlog.get_logger().bind(worker=self.number, pid=process.pid)
            log.error("worker_replaced", exit_code=code, lived_s=round(lived_s, 1))
            back_off_s = _BACK_OFF_S[0] if lived_s > _HEALTHY_S else back_off_s
            await asyncio.sleep(back_off_s)
            back_off_s = min(2 * back_off_s, last_s)

    def stop(self) -> None:
        """From now on its end is final."""
        self._stopping = True

    def terminate(self) -> None:
        """For a process that has not ended although it was told to."""
        self._stopping = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    async def _spawn(self) -> tuple[RemoteWorker, subprocess.Popen[bytes]]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        descriptors = [theirs.fileno(), *self._inherits]
        with theirs:
            self._process = process = await asyncio.to_thread(
                subprocess.Popen,
                [sys.executable, "-m", "proxy", "worker", *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
            )
        worker = RemoteWorker(process.pid, self.number)
        await self._connect(worker, ours)
        self._greet(worker)
        return worker, process

    async def _live(self, worker: RemoteWorker, process: subprocess.Popen[bytes]) -> None:
        """From the first word of the process to its last."""
        try:
            await self._until_ready(worker)
        except StartError as error:
            process.kill()
            why = str(error)
            structlog.get_logger().error("worker_start_failed", worker=self.number, why=why)
            if not self.serving.done():
                self.serving.set_exception(StartError(why))
            return
        self._joined(worker)
        if not self.serving.done():
            self.serving.set_result(None)
        await self._watch(worker, process)
        self._left(worker)

    async def _until_ready(self, worker: RemoteWorker) -> None:
        assert worker.channel is not None
        first = {worker.ready, worker.channel.closed}
        await asyncio.wait(first, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        if worker.ready.done():
            worker.ready.result()
        elif worker.channel.closed.done():
            raise StartError(f"worker {self.number} ended while it started; see its output")
        else:
            raise StartError(f"worker {self.number} does not start in time")

    async def _watch(self, worker: RemoteWorker, process: subprocess.Popen[bytes]) -> None:
        """Returns when the worker is gone; one whose loop hangs is killed."""
        assert worker.channel is not None
        closed = worker.channel.closed
        while not closed.done():
            looked_at = time.monotonic()
            await asyncio.wait([closed], timeout=HANG_S / 5)
            if time.monotonic() - looked_at > HANG_S / 2:
                worker.heard_at = time.monotonic()  # it was this process that stood still
            if time.monotonic() - worker.heard_at > HANG_S and not closed.done():
                structlog.get_logger().error("worker_hangs", worker=self.number, pid=worker.pid)
                process.kill()
                await closed
