"""A real Redis of our own: on a free port, without persistence, killed and started again at will."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

#: Seconds in which a redis-server answers its first PING; 0.05 s measured.
_START_S = 10.0


class PortTakenError(RuntimeError):
    """redis-server ended at its start; its log is the message. Nearly always another has the port."""


class RedisServer:
    """One redis-server process after another on the same port. It forgets everything between two."""

    def __init__(self, binary: str, folder: Path, port: int) -> None:
        self._binary = binary
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"

    def client(self) -> Redis:
        """A client of the test's own; `async with` closes it."""
        return Redis.from_url(self.url, socket_connect_timeout=2, socket_timeout=5)

    async def start(self) -> None:
        """Returns once it answers."""
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self._folder),
            "save": "",
            "appendonly": "no",
            "enable-debug-command": "yes",
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        with (self._folder / "redis.log").open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                self._binary, *words, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output
            )
        async with asyncio.timeout(_START_S):
            while not await self._answers(self._process.pid):
                if self._process.returncode is not None:
                    raise PortTakenError((self._folder / "redis.log").read_text())
                await asyncio.sleep(0.01)

    async def kill(self) -> None:
        """SIGKILL; returns once it is dead, every connection with it."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def restart(self) -> None:
        """SIGKILL if it still runs, then a new and empty one on the same port."""
        await self.kill()
        await self.start()

    async def _answers(self, pid: int) -> bool:
        """Is it ours that answers? Somebody else may have taken the free port in between."""
        try:
            async with self.client() as client:
                return bool((await client.info("server"))["process_id"] == pid)
        except (RedisError, OSError):
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _started(binary: str, folder: Path) -> RedisServer:
    for _ in range(3):
        server = RedisServer(binary, folder, _free_port())
        try:
            await server.start()
        except PortTakenError as error:
            failure = error
        else:
            return server
    raise failure


@asynccontextmanager
async def redis_server() -> AsyncIterator[RedisServer]:
    """A running redis-server. Without the program the test is skipped."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("no redis-server: install the Debian package redis-server")
    with tempfile.TemporaryDirectory(prefix="headrace-redis-") as folder:
        server = await _started(binary, Path(folder))
        try:
            yield server
        finally:
            await server.kill()
