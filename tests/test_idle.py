"""Thousands of idle keep-alive connections: what each costs, and what they do to everybody else."""

from __future__ import annotations

import asyncio
import resource
import statistics
import time
from pathlib import Path

import pytest
import yaml

from tests.kit.callers import Caller, post
from tests.kit.headrace import command, settings_for

IDLE = 6000
REQUEST = post("/v1/chat/completions", {"model": "m", "messages": []})


def rss_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


async def p99_ms(port: int) -> float:
    """Of 300 requests in a row, each on a connection of its own."""
    taken = []
    for _ in range(300):
        began = time.perf_counter()
        async with await Caller.connect(port) as caller:
            assert (await caller.ask(REQUEST)).status == 200
        taken.append((time.perf_counter() - began) * 1000)
    return statistics.quantiles(taken, n=100)[98]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(120)
async def test_six_thousand_idle_connections(tmp_path: Path) -> None:
    """They cost less than 40 KiB each and do not slow new requests down by more than 5 times."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * IDLE + 100:
        pytest.skip(f"the hard limit of open files is {hard}: ulimit -Hn {2 * IDLE + 100}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    file = tmp_path / "headrace.yaml"
    file.write_text(yaml.safe_dump(settings_for("mock:", max_connections=IDLE + 200)))
    idle: list[Caller] = []
    try:
        async with command("serve", "-c", str(file)) as process:
            port, _ = await process.serving()
            alone = await p99_ms(port)
            before = rss_kib(process.process.pid)
            while len(idle) < IDLE:
                idle += await asyncio.gather(*(Caller.connect(port) for _ in range(200)))
                await asyncio.gather(*(caller.ask(REQUEST) for caller in idle[-200:]))
            each_kib = (rss_kib(process.process.pid) - before) / IDLE
            crowded = await p99_ms(port)
            print(f"{IDLE} idle: {each_kib:.1f} KiB each; p99 alone {alone:.2f} ms, among them {crowded:.2f}")
            assert each_kib < 40
            assert crowded < 5 * max(alone, 2)
            assert (await idle[0].ask(REQUEST)).status == 200  # they are still good
            for caller in idle:
                caller.leave()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
