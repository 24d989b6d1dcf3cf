"""Row 29, as callers see it: the disk under the ledger is full for a while."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path

from tests.kit.callers import ask
from tests.kit.desk import Desk, question
from tests.kit.fleet import fleet
from tests.kit.headrace import settings_for
from tests.kit.invariant import balanced
from tests.kit.ledger import written
from tests.kit.upstreams import scripted

COUNT = 20


async def test_a_full_disk_costs_no_request_and_no_row(tmp_path: Path) -> None:
    """Two workers hand their rows to a process that cannot write: they are served, the rows wait there, and
    all of them are in the file when there is room again."""
    async with scripted(Desk(wide_open=True)) as upstream:
        settings = settings_for(upstream.url, workers=2)
        async with fleet(tmp_path, settings) as here:
            await here.settle()
            limits = resource.prlimit(here.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(here.pid, resource.RLIMIT_FSIZE, (4096, limits[1]))
            for _ in range(COUNT):
                assert (await ask(here.port, question("one", "Connection: close"))).status == 200
            async with asyncio.timeout(10):
                while (await here.state())["ledger_pending"] != COUNT:
                    await asyncio.sleep(0.02)
            assert written(tmp_path / "headrace.db") == []
            resource.prlimit(here.pid, resource.RLIMIT_FSIZE, limits)
            await balanced(here, upstream.calls)
            assert len(written(tmp_path / "headrace.db")) == COUNT
            assert await here.total("headrace_ledger_dropped_total") == 0
