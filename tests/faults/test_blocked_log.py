"""Row 34: nobody reads standard output, and it is full."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from tests.kit.callers import Caller, ask, chat
from tests.kit.fleet import samples, summed, write
from tests.kit.headrace import command, settings_for, until
from tests.kit.invariant import rows_are_right, told_once
from tests.kit.ledger import written

#: A request's line has 500 bytes and more; a pipe cannot be smaller than a page.
PIPE_BYTES = 4096
COUNT = 30
METRICS = b"GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"


async def test_a_stream_does_not_wait_for_the_log(tmp_path: Path) -> None:
    """Requests end and a stream flows while the writer hangs in a full pipe; each of their lines is there
    once somebody reads, and the books are right."""
    file = tmp_path / "headrace.yaml"
    write(file, settings_for("mock:"))
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    try:
        async with command("-c", str(file), "serve", stdout=writes) as headrace:
            os.close(writes)
            port, admin = await headrace.serving()
            async with await Caller.connect(port) as caller, asyncio.timeout(20):
                await caller.send(chat("x-mock: words=400, gap=0.02"))
                answer = await caller.head()
                await caller.piece(answer)
                for _ in range(COUNT):
                    assert (await ask(port, chat("Connection: close", stream=False))).status == 200
                await until(lambda: _waiting(reads) > PIPE_BYTES / 2)  # written a moment later, by a thread
                for _ in range(20):
                    await caller.piece(answer)
                caller.leave()
            lines = await _lines(reads, COUNT + 1)
            page = samples(await ask(admin, METRICS))
            assert summed(page, "headrace_log_lines_dropped_total") == 0
            told_once(lines, page)
            rows_are_right(lines, written(tmp_path / "headrace.db"), [], page)
    finally:
        os.close(reads)


def _waiting(pipe: int) -> int:
    """Bytes that nobody has read yet."""
    found = fcntl.ioctl(pipe, 0x541B, b"\0" * 4)  # FIONREAD
    return int.from_bytes(found, "little")


async def _lines(pipe: int, count: int) -> list[dict[str, Any]]:
    """The request lines, read until there are so many."""
    raw = b""
    async with asyncio.timeout(20):
        while raw.count(b"\n") < count:
            raw += await asyncio.to_thread(os.read, pipe, 65536)
    return [each for line in raw.splitlines() if (each := json.loads(line))["event"] == "request"]
