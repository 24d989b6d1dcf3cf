"""`python -m tests.kit.serve push|pull`: Headrace in a process of its own, over a chosen data path.

The configuration comes on standard input; the port goes to standard output. Ends with standard input.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvloop
import yaml

from proxy import config, log
from proxy.server import Server
from tests.kit.headrace import ROOT


class Child:
    """Headrace in another process: its port and its memory."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.port = port

    def resident(self) -> int:
        """Bytes of memory that it uses now."""
        with open(f"/proc/{self._process.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096

    def lines(self) -> asyncio.StreamReader:
        assert self._process.stdout is not None
        return self._process.stdout


@asynccontextmanager
async def child(settings: dict[str, Any], *, push: bool) -> AsyncIterator[Child]:
    """Starts it; ends it at the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.kit.serve", "push" if push else "pull"),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(yaml.safe_dump(settings).encode() + b"...\n")
        async with asyncio.timeout(10):
            port = int(await process.stdout.readline())
        yield Child(process, port)
    finally:
        process.kill()
        await process.wait()
        process.stdin.close()


async def _main(push: bool) -> None:
    text = ""
    while not text.endswith("...\n"):
        text += sys.stdin.readline()
    sink = log.Sink(None)
    request_log = log.RequestLog(sink, text=False, enabled=False)
    server = Server(config.parse(text, "test.yaml", {}), sink, request_log, push=push)
    await server.start()
    print(server.port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.close()


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1] == "push"))
