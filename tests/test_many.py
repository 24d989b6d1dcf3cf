"""A thousand streams at once on one process, all of them whole."""

from __future__ import annotations

import asyncio
import hashlib
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import yaml

from tests.kit.callers import Caller, chat
from tests.kit.headrace import command, settings_for

pytestmark = [pytest.mark.timeout(60), pytest.mark.alone]

STREAMS = 1000
#: Contract: memory per stream is bounded. Measured: about 32 KB; the rest is slack.
MOST_KB_PER_STREAM = 150


@pytest.fixture(autouse=True)
def _many_files() -> None:
    """Room for the sockets of this process; its children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            pytest.skip(f"the hard limit of open files is {hard}: ulimit -Hn {wanted}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def resident_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


@asynccontextmanager
async def served(directory: Path) -> AsyncIterator[tuple[int, int, str]]:
    """Headrace and the mock upstream as two processes: Headrace's pid, its port, its admin URL."""
    async with command("mock", "--port", "0", "--words", "20", "--gap", "0.25") as mock:
        upstream = (await mock.line(r"mock upstream at (\S+)"))[1]
        settings = settings_for(upstream)
        file = directory / "headrace.yaml"
        file.write_text(yaml.safe_dump(settings))
        async with command("serve", "-c", str(file)) as headrace:
            port = int((await headrace.line(r"data\s+http://127\.0\.0\.1:(\d+)"))[1])
            admin = (await headrace.line(r"admin\s+(http://\S+)/metrics"))[1]
            yield headrace.process.pid, port, admin


async def state(admin: str) -> dict[str, int]:
    async with aiohttp.ClientSession() as session, session.get(f"{admin}/debug/state") as answer:
        document = await answer.json()
    assert isinstance(document, dict)
    return document


async def one(port: int, room: asyncio.Semaphore, *headers: str) -> tuple[str, bool]:
    """A whole stream: the digest of its body without the ids that count up, and whether it ended well."""
    async with room:  # connecting at once would only measure the listen queue
        caller = await Caller.connect(port)
        await caller.send(chat(*headers))
    async with caller, asyncio.timeout(40):
        answer = await caller.rest(await caller.head())
    assert answer.status == 200
    lines = (line.partition(b'"choices"')[2] or line for line in answer.body.split(b"\n"))
    return hashlib.sha256(b"\n".join(lines)).hexdigest(), answer.clean


async def test_a_thousand_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All are open at the same time, all complete, all hold the same bytes; memory per stream is printed."""
    async with served(tmp_path) as (pid, port, admin), asyncio.timeout(50):
        room = asyncio.Semaphore(100)
        reference, clean = await one(port, room, "x-mock: gap=0")
        assert clean
        before = resident_kb(pid)
        running = asyncio.gather(*(one(port, room) for _ in range(STREAMS)))
        together = 0
        while not running.done() and together < STREAMS:
            together = max(together, (await state(admin))["streams"])
            await asyncio.sleep(0.02)  # a reading every now and then, nothing is awaited
        open_kb = resident_kb(pid)
        answers = await running
        assert together == STREAMS
        assert all(clean for _, clean in answers)
        assert {digest for digest, _ in answers} == {reference}
        after: dict[str, int] = {}
        for _ in range(200):
            after = await state(admin)
            if not any(after[name] for name in ("in_flight", "streams", "permits", "upstream_connections")):
                break
            await asyncio.sleep(0.01)
        assert (after["in_flight"], after["streams"], after["upstream_connections"]) == (0, 0, 0)
        async with aiohttp.ClientSession() as session, session.get(f"{admin}/metrics") as page:
            samples = [line for line in (await page.text()).splitlines() if "requests_total{" in line]
        assert [line.split()[-1] for line in samples] == [f"{STREAMS + 1}.0"], samples
        assert 'reason="complete"' in samples[0]
    per_stream = (open_kb - before) / STREAMS
    with capsys.disabled():
        print(
            f"\n{STREAMS} open streams: {per_stream:.1f} KB each ({before} KB before, {open_kb} KB with them)"
        )
    assert per_stream < MOST_KB_PER_STREAM
