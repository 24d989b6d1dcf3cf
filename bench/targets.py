"""What is measured: nothing in between (`direct`), Headrace, or a peer of `bench/peers`.

A peer is a folder. `start.sh` becomes the proxy: it listens on 127.0.0.1:$BENCH_PORT, asks $BENCH_UPSTREAM
(a URL; with https $BENCH_CA names the certificate that signed its own), and may use the folder $BENCH_OUT.
`install.sh`, if there is one, comes before and keeps what it fetches in $BENCH_CACHE; `prepare.sh` is what
the start is not measured with. When one fails the peer is skipped with its last line. `peer.json`: headers
and model of the requests, seconds to start (`startup_s`) and to settle (`settle_s`), `slow_streams` where the
full load would only show that it is too much, `tls: false` and `workers: false` for what it is not asked.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench import machine

PEERS = Path(__file__).resolve().parent / "peers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "headrace-bench"
DIRECT = "direct"


class Skipped(Exception):
    """This peer cannot be measured here; the text says why."""


@contextmanager
def upstream(tls: bool = False) -> Iterator[Upstream]:
    """The bench's upstream in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        authority = Path(folder) / "ca.pem"
        flags = _certificate(Path(folder), authority) if tls else []
        command = [sys.executable, "-m", "bench.upstream", *flags]
        process = subprocess.Popen(
            machine.on_core(machine.cores()[1], command),
            cwd=machine.REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout
            yield Upstream(int(process.stdout.readline()), authority if tls else None)
        finally:
            process.kill()
            process.communicate()


class Upstream:
    """port on the loopback; authority: the certificate that signed its own, a file; None without TLS."""

    def __init__(self, port: int, authority: Path | None) -> None:
        self.port = port
        self.authority = authority

    @property
    def url(self) -> str:
        # A name, because a certificate for an address is refused by several peers.
        return f"https://localhost:{self.port}" if self.authority else f"http://127.0.0.1:{self.port}"


def _certificate(folder: Path, authority: Path) -> list[str]:
    import trustme  # only needed for the TLS line

    issuer = trustme.CA()
    issued = issuer.issue_cert("localhost")
    issuer.cert_pem.write_to_path(str(authority))
    for number, part in enumerate(issued.cert_chain_pems):
        part.write_to_path(str(folder / "cert.pem"), append=number > 0)
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    return ["--tls", str(folder / "cert.pem"), str(folder / "key.pem")]


class Target:
    """A running proxy, or none (`direct`); a context manager."""

    def __init__(self, name: str, upstream: Upstream, workers: int = 1) -> None:
        self.name = name
        self._upstream = upstream
        self._workers = workers
        self._folder = PEERS / name
        if name != DIRECT and not (self._folder / "start.sh").exists():
            raise Skipped(f"no peer of this name: {', '.join(['direct', *names()])}")
        settings = self._folder / "peer.json"
        self._settings: dict[str, Any] = json.loads(settings.read_text()) if settings.exists() else {}
        self._process: subprocess.Popen[bytes] | None = None
        self._out: Path | None = None
        self.port = upstream.port if name == DIRECT else free_port()
        self._second_port = free_port()
        self.cold_start_s = 0.0

    @property
    def slow_streams(self) -> int:
        """How many streams to load it with, if the full load would only show that it is too much; else 0."""
        return int(self._settings.get("slow_streams", 0))

    def can(self, what: str) -> bool:
        """`tls` or `workers`."""
        return bool(self._settings.get(what, True))

    @property
    def pids(self) -> list[int]:
        return machine.family(self._process.pid) if self._process else []

    @property
    def version(self) -> str:
        """What start.sh wrote about itself."""
        file = self._out / "version" if self._out else None
        return file.read_text().strip() if file and file.exists() else ""

    def __enter__(self) -> Self:
        if self.name == DIRECT:
            return self
        self._out = Path(tempfile.mkdtemp(prefix=f"headrace-bench-{self.name}-"))
        try:
            for script in ("install.sh", "prepare.sh"):
                self._run(script)
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "BENCH_PORT": str(self.port),
            "BENCH_SECOND_PORT": str(self._second_port),
            "BENCH_UPSTREAM": self._upstream.url,
            "BENCH_CA": str(self._upstream.authority or ""),
            "BENCH_OUT": str(self._out),
            "BENCH_CACHE": str(CACHE),
            "BENCH_REPOSITORY": str(machine.REPOSITORY),
            "BENCH_PYTHON": sys.executable,
            "BENCH_WORKERS": str(self._workers),
        }

    def _run(self, name: str) -> None:
        script = self._folder / name
        if not script.exists():
            return
        CACHE.mkdir(parents=True, exist_ok=True)
        command = ["sh", str(script)]
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, cwd=self._out)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or f"{name}: {done.returncode}").splitlines()
            raise Skipped(said[-1])

    def _start(self) -> None:
        assert self._out
        command = ["sh", str(self._folder / "start.sh")]
        if self._workers == 1:
            command = machine.on_core(machine.cores()[0], command)
        began = time.monotonic()
        with (self._out / "output").open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=self._out,
                env=self._environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if not self._answers(began + self._settings.get("startup_s", 30)):
            said = (self._out / "output").read_text(errors="replace").strip().splitlines()
            raise Skipped("did not start" + (f": {said[-1][:300]}" if said else ""))
        self.cold_start_s = time.monotonic() - began
        time.sleep(self._settings.get("settle_s", 0.5))

    def _answers(self, until: float) -> bool:
        """Whether a request came through it in time; some peers listen before they can."""
        assert self._process
        while time.monotonic() < until and self._process.poll() is None:
            if self._asked_once():
                return True
            time.sleep(0.005)
        return False

    def _asked_once(self) -> bool:
        lines = dict(line.split(": ", 1) for line in ["Content-Type: application/json", *self.headers])
        body = json.dumps({"model": self.model, "messages": [{"role": "user", "content": "Hello"}]})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("POST", "/v1/chat/completions", body, lines)
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            return False
        else:
            return answer.status == 200
        finally:
            connection.close()

    def _end(self) -> None:
        if self._process:
            for sign in (signal.SIGTERM, signal.SIGKILL):
                for pid in self.pids:
                    try:
                        os.kill(pid, sign)
                    except ProcessLookupError:
                        pass
                try:
                    self._process.wait(3)
                except subprocess.TimeoutExpired:
                    continue
                if sign == signal.SIGTERM:
                    time.sleep(0.2)
        if self._out:
            shutil.rmtree(self._out, ignore_errors=True)

    # ── load ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def model(self) -> str:
        """What this peer knows the upstream's model by."""
        return str(self._settings.get("model", "mock-model"))

    @property
    def headers(self) -> list[str]:
        """What this peer wants in a request; KEY stands for what start.sh left in the file `key`."""
        key = self._out / "key" if self._out else None
        secret = key.read_text().strip() if key and key.exists() else ""
        return [header.replace("KEY", secret) for header in self._settings.get("headers", [])]

    def load_command(self, **flags: Any) -> list[str]:
        """The generator's command line; flags as its own, `streams=400`."""
        command = [sys.executable, "-m", "bench.load", str(self.port)]
        for header in self.headers:
            command += ["--header", header]
        command += ["--model", self.model]
        for name, value in flags.items():
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return machine.on_core(machine.cores()[1], command)

    def load(self, watch_memory: bool = False, **flags: Any) -> dict[str, Any]:
        """The generator's figures, and `cpu_s`, `resident_kib` (before), `peak_kib` of this proxy."""
        pids = self.pids
        before_kib = peak_kib = machine.resident_kib(pids)
        cpu_s = machine.cpu_seconds(pids)
        generator = subprocess.Popen(
            self.load_command(**flags), cwd=machine.REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        while watch_memory and generator.poll() is None:
            peak_kib = max(peak_kib, machine.resident_kib(pids))
            time.sleep(0.1)
        said, _ = generator.communicate()
        figures: dict[str, Any] = json.loads(said)
        figures["cpu_s"] = machine.cpu_seconds(pids) - cpu_s
        figures["resident_kib"], figures["peak_kib"] = before_kib, peak_kib
        return figures

    def watch(self, after_s: float, for_s: float, **flags: Any) -> dict[str, Any]:
        """The same load; `cpu_s` is that of a window of it, and `window_s` how long that was."""
        generator = subprocess.Popen(
            self.load_command(**flags), cwd=machine.REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        time.sleep(after_s)
        cpu_s, began = machine.cpu_seconds(self.pids), time.monotonic()
        time.sleep(for_s)
        cpu_s, window_s = machine.cpu_seconds(self.pids) - cpu_s, time.monotonic() - began
        said, _ = generator.communicate()
        return {**json.loads(said), "cpu_s": cpu_s, "window_s": window_s}


def names() -> list[str]:
    """All peers that have a folder."""
    return sorted(folder.name for folder in PEERS.iterdir() if (folder / "start.sh").exists())


def free_port() -> int:
    """Nobody's at this moment: nginx and most peers cannot choose one themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
