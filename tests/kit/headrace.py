"""Headrace under test: inside this process (fast, inspectable) or as the command (signals, files)."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from proxy import config, log
from proxy.server import Server
from proxy.supervisor import Front
from proxy.workers import LocalWorker
from tests.kit.callers import ask

ROOT = Path(__file__).resolve().parents[2]
#: What has to be zero when nothing is going on.
LEVELS = (
    "in_flight",
    "streams",
    "permits",
    "queued",
    "reservations",
    "buffered_bytes",
    "upstream_connections",
)
#: Branches are counted (`make coverage`): a process that is killed leaves no figures.
MEASURED = "COVERAGE_PROCESS_CONFIG" in os.environ


class ListSink(log.Sink):
    """The real sink, writing into a list as well as nowhere else."""

    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[bytes] = []

    def write(self, line: bytes) -> None:
        self.lines.append(line)  # here, not in the writer's thread: a test sees every line at once
        super().write(line)

    def _write_batch(self, lines: list[bytes]) -> None:
        pass


class Headrace:
    """A running Headrace inside this process: one front with one worker."""

    def __init__(self, front: Front, sink: ListSink) -> None:
        self.front = front
        self.sink = sink

    @property
    def server(self) -> Server:
        """The data plane of the one worker."""
        worker = self.front._crew.workers[0]
        assert isinstance(worker, LocalWorker)
        return worker.server

    @property
    def port(self) -> int:
        return self.front.port

    @property
    def url(self) -> str:
        return self.front.address()

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.front.admin_port}"

    @property
    def state(self) -> dict[str, Any]:
        return self.server.state()

    def log_lines(self, event: str = "request") -> list[dict[str, Any]]:
        """All lines so far."""
        documents = [msgspec.json.decode(line) for line in self.sink.lines]
        return [document for document in documents if document["event"] == event]

    async def metrics(self) -> dict[str, float]:
        """Every sample as `name{labels}` -> value."""
        request = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        text = (await ask(self.front.admin_port, request)).body.decode()
        samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples if name}

    async def quiet(self, timeout_s: float = 5.0) -> None:
        """Waits until nothing is going on; fails with the state if that does not come."""
        await until(
            lambda: not any(self.state[name] for name in LEVELS),
            timeout_s,
            lambda: str(self.state),
        )


async def until(
    condition: Callable[[], bool], timeout_s: float = 5.0, describe: Callable[[], str] = lambda: ""
) -> None:
    """Waits for a condition that nothing signals, looking often; fails after `timeout_s`."""
    limit = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < limit, (
            f"did not become true in {timeout_s} s: {describe()}"
        )
        await asyncio.sleep(0.005)


def settings_for(upstream_url: str, **sections: Any) -> dict[str, Any]:
    """A configuration with the model `m` on the upstream `up`; sections are merged one level deep.

    `upstream` adds to the upstream's own section; everything else is a top-level section. One attempt a
    request, unless `retry` says otherwise: what a test counts is then one for one.
    """
    upstream = {"base_url": upstream_url, "api_key": "upstream-secret", **sections.pop("upstream", {})}
    return {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "auth": {"mode": "open"},
        "upstreams": {"up": upstream},
        "models": {"m": {"upstreams": ["up"]}},
        "retry": {"attempts": 1},
        **sections,
    }


@asynccontextmanager
async def running(
    settings: Mapping[str, Any], *, push: bool = True, environ: Mapping[str, str] | None = None
) -> AsyncIterator[Headrace]:
    """Starts a Headrace in this process and stops it; fails if it leaves anything behind. Its ledger ends
    with it, unless the settings name one."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = {"ledger": {"database": f"sqlite:{folder}/headrace.db"}}
        async with _running({**ledger, **settings}, push, environ or {}) as headrace:
            yield headrace


@asynccontextmanager
async def _running(
    settings: Mapping[str, Any], push: bool, environ: Mapping[str, str]
) -> AsyncIterator[Headrace]:
    # JSON is YAML, and json writes it in a hundredth of the time.
    parsed = config.parse(json.dumps(dict(settings), ensure_ascii=False), "test.yaml", environ)
    stdout, _ = log.configure(path=None, level="info", text=False)
    sink = ListSink()
    request_log = log.RequestLog(sink, text=False, enabled=True)
    front = Front(parsed, lambda: parsed, sink, request_log, push=push)
    try:
        await front.start()
        yield Headrace(front, sink)
    finally:
        await front.close()
        sink.close()
        stdout.close()


class Command:
    """`headrace …` as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers: list[asyncio.Task[None]] = []

    async def _collect(self, stream: asyncio.StreamReader, into: list[str]) -> None:
        while line := await stream.readline():
            into.append(line.decode().rstrip("\n"))

    def collect(self) -> None:
        loop = asyncio.get_running_loop()
        for stream, into in ((self.process.stdout, self.out), (self.process.stderr, self.err)):
            if stream is not None:  # one that was handed to `command` is the test's to read
                self._readers.append(loop.create_task(self._collect(stream, into)))

    async def line(self, pattern: str, timeout_s: float = 10.0) -> re.Match[str]:
        """The first line on standard error or output that matches."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            found[:] = [m for text in [*self.err, *self.out] if (m := re.search(pattern, text))]
            return bool(found) or self.process.returncode is not None

        await until(look, timeout_s, lambda: "\n".join([*self.err, *self.out]))
        assert found, f"ended with {self.process.returncode}:\n" + "\n".join([*self.err, *self.out])
        return found[0]

    async def serving(self) -> tuple[int, int]:
        """The ports of the data and the admin listener, once `serve` has printed them."""
        data = await self.line(r"^  data   https?://\S+:(\d+)/v1$")
        admin = await self.line(r"^  admin  http://\S+:(\d+)/metrics$")
        return int(data[1]), int(admin[1])

    def requests(self) -> list[dict[str, Any]]:
        """The request lines on standard output so far."""
        documents = [msgspec.json.decode(line) for line in self.out if line.startswith("{")]
        return [document for document in documents if document["event"] == "request"]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self, timeout_s: float = 10.0) -> int:
        async with asyncio.timeout(timeout_s):
            code = await self.process.wait()
            await asyncio.gather(*self._readers)
        return code


async def end(send: Callable[[signal.Signals], object], gone: Callable[[], object]) -> None:
    """Kills processes that still run; measured ones are asked before, twice, as it takes to end a drain."""
    for patience_s in (1.0, 3.0) if MEASURED else ():
        if gone():
            return
        send(signal.SIGTERM)
        with suppress(AssertionError):
            await until(gone, patience_s)
    if not gone():
        send(signal.SIGKILL)


@asynccontextmanager
async def command(
    *words: str,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    before: str = "",
    stdout: int = asyncio.subprocess.PIPE,
) -> AsyncIterator[Command]:
    """Runs `python -m proxy WORDS`; killed at the end if it still runs.

    `before`: shell words that set up the process (`ulimit -n 64`). `stdout`: a descriptor that the test reads
    by itself, or does not. `cwd`: left out, an empty folder of its own, where a ledger may be made.
    """
    with tempfile.TemporaryDirectory() as folder:
        async with _command(words, environ or {}, cwd or Path(folder), before, stdout) as running_command:
            yield running_command


@asynccontextmanager
async def _command(
    words: Sequence[str], environ: Mapping[str, str], cwd: Path, before: str, stdout: int
) -> AsyncIterator[Command]:
    run = [sys.executable, "-m", "proxy", *words]
    process = await asyncio.create_subprocess_exec(
        *(["bash", "-c", f'{before}; exec "$@"', "bash", *run] if before else run),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
    )
    running_command = Command(process)
    running_command.collect()
    try:
        yield running_command
    finally:
        await end(running_command.signal, lambda: process.returncode is not None)
        await running_command.ended()
