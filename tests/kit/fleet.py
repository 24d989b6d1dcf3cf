"""Headrace as a family of processes: workers, generations, and figures that are scraped all the time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from tests.kit.callers import Answer, Caller, ask
from tests.kit.headrace import LEVELS, ROOT, Command, command, end

_MARK = "HEADRACE_TEST_FLEET"
#: Between two looks at what only changes in milliseconds: a loop without it takes the processor from those
#: that are looked at.
LOOK_EVERY_S = 0.02


def alive(pid: int) -> bool:
    """Does this process run? A zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def command_line(pid: int) -> list[str]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [word.decode() for word in raw.split(b"\0")[:-1]]


def resident(pid: int) -> int:
    """Bytes of memory that a process uses now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def parent(pid: int) -> int:
    """The process that started this one; 0 if it is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def write(file: Path, settings: Mapping[str, Any]) -> None:
    """In one step, as an editor does: nobody ever reads half a file. The ledger lies beside it."""
    settings = {"ledger": {"database": f"sqlite:{file.parent}/headrace.db"}, **settings}
    fresh = file.with_suffix(".new")
    fresh.write_text(yaml.safe_dump(dict(settings)))
    fresh.replace(file)


class Fleet:
    """A running `headrace serve` with everything that it has started."""

    def __init__(self, first: Command, file: Path, mark: str) -> None:
        self.first = first
        self.file = file
        self.mark = mark
        self.port = self.admin_port = 0

    # ── processes ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def pid(self) -> int:
        """Of the process that was started first; it may have handed over since."""
        return self.first.process.pid

    def processes(self) -> list[int]:
        """Everything that runs and descends from the first process, found by its environment."""
        wanted, found = f"{_MARK}={self.mark}".encode(), []
        for entry in os.listdir("/proc"):
            if not entry.isdecimal():
                continue
            with suppress(OSError):
                if wanted in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0") and alive(int(entry)):
                    found.append(int(entry))
        return sorted(found)

    def signal(self, number: signal.Signals) -> None:
        """To every one of them."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def workers(self, front: int | None = None) -> list[int]:
        """The worker processes of a front (of the first one)."""
        pid = front or self.pid
        # A child between fork and exec still looks like its parent.
        return [
            child for child in self.processes() if parent(child) == pid and "worker" in command_line(child)
        ]

    async def settle(self, count: int = 2, front: int | None = None) -> list[int]:
        """Waits until that many workers serve; their pids."""
        async with asyncio.timeout(15):
            while (await self.state())["workers"] != count:
                await asyncio.sleep(0.02)
        return self.workers(front)

    async def all_gone(self, timeout_s: float = 5.0) -> None:
        """Nothing that was started runs any more."""
        limit = asyncio.get_running_loop().time() + timeout_s
        while self.processes():
            assert asyncio.get_running_loop().time() < limit, self._named()
            await asyncio.sleep(LOOK_EVERY_S)  # a look reads all of /proc

    def _named(self) -> dict[int, list[str]]:
        return {pid: command_line(pid) for pid in self.processes()}

    # ── the admin listener ───────────────────────────────────────────────────────────────────────────────

    async def admin(self, method: str, path: str) -> Answer:
        request = f"{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
        return await ask(self.admin_port, request.encode())

    async def state(self) -> dict[str, Any]:
        answer: dict[str, Any] = (await self.admin("GET", "/debug/state")).json()
        return answer

    async def streams(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = (await self.admin("GET", "/admin/streams")).json()["streams"]
        return listed

    async def metrics(self) -> dict[str, float]:
        """Every sample as `name{labels}` -> value."""
        answer = await self.admin("GET", "/metrics")
        assert (answer.status, answer.clean) == (200, True)
        return samples(answer)

    async def total(self, name: str, *having: str) -> float:
        """The sum of one metric's samples whose labels contain all of these."""
        return summed(await self.metrics(), name, *having)

    async def quiet(self, timeout_s: float = 10.0) -> None:
        """Waits until nothing is going on in any process."""
        state: dict[str, Any] = {}
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    state = await self.state()
                    if not any(state[name] for name in LEVELS):
                        return
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"still busy: {state}") from None

    async def tell(self, verb: str) -> tuple[int, list[str], list[str]]:
        """`headrace VERB` to its end: the exit code, standard output, standard error."""
        words = ("-c", str(self.file), verb, "--admin", f"127.0.0.1:{self.admin_port}")
        async with command(*words) as teller:
            code = await teller.ended(40)
        return code, teller.out, teller.err

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The log lines of this event, of all processes, so far."""
        documents = [json.loads(line) for line in self.first.out if line.startswith("{")]
        return [document for document in documents if document["event"] == event]


def samples(page: Answer) -> dict[str, float]:
    split = (line.rpartition(" ") for line in page.body.decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in split if name}


def summed(page: Mapping[str, float], name: str, *having: str) -> float:
    return sum(
        value
        for sample, value in page.items()
        if sample.partition("{")[0] == name and all(label in sample for label in having)
    )


@asynccontextmanager
async def fleet(
    tmp_path: Path, settings: Mapping[str, Any], *, environ: Mapping[str, str] | None = None, before: str = ""
) -> AsyncIterator[Fleet]:
    """Runs `headrace serve`; whatever generation is left at the end is killed, however the test ends."""
    file, mark = tmp_path / "headrace.yaml", uuid.uuid4().hex
    write(file, settings)
    async with command(
        "-c",
        str(file),
        "serve",
        environ={_MARK: mark, "PYTHONPATH": str(ROOT), **(environ or {})},
        before=before,
    ) as process:
        running = Fleet(process, file, mark)
        try:
            running.port, running.admin_port = await process.serving()
            yield running
        finally:
            while running.processes():
                await end(running.signal, lambda: not running.processes())
                await asyncio.sleep(0.01)


class Scraper:
    """Scrapes the metrics all the time and remembers what went backwards."""

    def __init__(self, running: Fleet) -> None:
        self._fleet = running
        self.pages = 0
        self.page: dict[str, float] = {}
        self.backwards: list[str] = []

    async def run(self) -> None:
        while True:
            self.look(await self._fleet.metrics())
            await asyncio.sleep(LOOK_EVERY_S)

    def look(self, page: dict[str, float]) -> None:
        """Counters, and the counts and sums of histograms, never go down and never vanish."""
        for sample, before in self.page.items():
            name = sample.partition("{")[0]
            if not name.endswith(("_total", "_bucket", "_count", "_sum")):
                continue
            now = page.get(sample, -1.0)
            if now < before - 1e-6:  # sums are added up in another order when a worker is gone
                self.backwards.append(f"page {self.pages}: {sample}: {before} -> {now}")
        self.page = page
        self.pages += 1


@asynccontextmanager
async def scraped(running: Fleet) -> AsyncIterator[Scraper]:
    """At its end: no scrape failed, and no counter ever went backwards."""
    scraper = Scraper(running)
    task = asyncio.ensure_future(scraper.run())
    try:
        yield scraper
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
    scraper.look(await running.metrics())
    assert scraper.pages > 1
    assert not scraper.backwards, scraper.backwards[:10]


async def unix(path: str) -> Caller:
    """A connection to a Unix socket."""
    return Caller(*await asyncio.open_unix_connection(path))
