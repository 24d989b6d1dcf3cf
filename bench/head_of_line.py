"""Whether one caller holds up all others: the lateness of running streams' chunks, quiet and disturbed.

    python -m bench.head_of_line [--seconds 3] [--busy 0.7] [--only prompts,upload] [--first]

As many streams run through one Headrace (`headrace-full`, on one core) as keep that core busy to `--busy`
while nothing disturbs; `bench.disturb` has what does. Each caller asks again when its stream of ten chunks
has ended: with longer ones the generator would need more than a core to keep the proxy's busy. Lateness is
from an event's departure upstream to its arrival at the generator. Callers and upstreams share the other
core, so they may be late themselves: `direct` is the same load and disturbance without a proxy.
Writes bench/results/head_of_line.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from bench import disturb, machine, report, targets
from bench.load import Load, build_request, spread

Figures = dict[str, Any]

RESULT = report.RESULTS / "head_of_line.json"
QUIET = "quiet"
#: Milliseconds between two chunks of a stream: 42 a second, as in the bench's main figure.
GAP_MS = 24
#: A request costs the proxy as much as six to eight chunks.
EVENTS = 10
_RAMP_S = 0.5
#: From the first request to the first chunk that counts.
_SETTLE_S = 1.0
#: The first guess: a chunk with its share of a request costs 50 to 90 µs.
_FIRST_STREAMS = 200
_CALIBRATIONS = 2
#: What disturbs comes after all else: the machine may have two cores, and the streams' generator is on one.
_NICE = 10
#: With --first. Not a realtime policy (`machine.be_realtime`): the kernel takes 50 ms of every second away
#: from one (sched_rt_runtime_us), and a core that is 97 % busy shows them.
_FIRST = -20
_WORDS = {
    QUIET: "quiet",
    "prompts": "prompts of 2 MB",
    "streamed_prompts": "prompts of 2 MB, streamed",
    "upload": "uploads of 100 MB",
    "invalid_keys": "flood of invalid keys",
    "new_streams": "2,000 new streams/s",
    "download": "answers of 10 MB",
}


class Disturbed(targets.Target):
    """Headrace with a second upstream, for what disturbs."""

    def __init__(self, upstream: targets.Upstream, second_url: str, per_ip: int) -> None:
        super().__init__("headrace-full", upstream)
        self._second_url = second_url
        self._per_ip = per_ip

    def _start(self) -> None:
        assert self._out
        file = self._out / "headrace.yaml"
        settings = yaml.safe_load(file.read_text())
        second = {"base_url": f"{self._second_url}/v1", "api_key": "up", "max_in_flight": 20000}
        settings["upstreams"]["second"] = second
        settings["models"][disturb.MODEL] = {"upstreams": ["second"]}
        if self._per_ip:
            settings["limits"]["per_ip"] = {"requests_per_minute": self._per_ip, "burst": 100}
        file.write_text(yaml.safe_dump(settings))
        super()._start()


# ── the running streams ──────────────────────────────────────────────────────────────────────────────────


class Running(Load):
    """Counts only what comes within the window, and says when it opens and closes."""

    def measure(self, streams: int, seconds: float) -> None:
        """Asks again and again until the window has closed."""
        now = time.monotonic_ns()
        self._opens_ns = now + int(_SETTLE_S * 1e9)
        self._closes_ns = self._opens_ns + int(seconds * 1e9)
        self.kept: list[int] = []
        self.run(streams, 0, _SETTLE_S + seconds, _RAMP_S)

    def _turn(self, wait_s: float) -> None:
        super()._turn(wait_s)
        now = time.monotonic_ns()
        if self._opens_ns and now >= self._opens_ns:
            self._opens_ns = 0
            self.late = []
            print("opened", flush=True)
        if self._closes_ns and now >= self._closes_ns:
            self._closes_ns = 0
            self.kept, self.late = self.late, []
            print("closed", flush=True)


def generate(port: int, headers: list[str], streams: int, seconds: float) -> None:
    """The generator's process."""
    asked = argparse.Namespace(
        port=port,
        events=EVENTS,
        gap_ms=GAP_MS,
        size=0,
        pad=0,
        short=False,
        model="mock-model",
        path="/v1/chat/completions",
        header=headers,
    )
    load = Running(port, build_request(asked), asked.events)
    gc.disable()  # nothing here makes cycles
    load.measure(streams, seconds)
    print(json.dumps({"chunks": len(load.kept), "failed": load.failed, "late": spread(load.kept)}))


# ── one row ──────────────────────────────────────────────────────────────────────────────────────────────


def _behind_all() -> None:
    """What disturbs must not keep the streams' own generator and upstream from their core."""
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)


def _start(*words: str) -> subprocess.Popen[str]:
    command = machine.on_core(machine.cores()[1], [sys.executable, "-m", "bench.disturb", *words])
    return subprocess.Popen(
        command, cwd=machine.REPOSITORY, stdout=subprocess.PIPE, text=True, preexec_fn=_behind_all
    )


def measure(target: targets.Target, streams: int, seconds: float, kind: str, second_url: str) -> Figures:
    """Milliseconds of lateness, and how busy the proxy's core was."""
    words = ["--generate", str(target.port), json.dumps(target.headers), str(streams), str(seconds)]
    command = [sys.executable, "-m", "bench.head_of_line", *words]
    generator = subprocess.Popen(
        machine.on_core(machine.cores()[1], command),
        cwd=machine.REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert generator.stdout
    port = str(target.port) if target.pids else second_url.rpartition(":")[2]
    time.sleep(_SETTLE_S * 0.8)
    disturbing = None if kind == QUIET else _start(kind, port, _secret(target))
    pids = target.pids
    assert generator.stdout.readline() == "opened\n"
    cpu_s, began = machine.cpu_seconds(pids), time.monotonic()
    assert generator.stdout.readline() == "closed\n"
    busy = (machine.cpu_seconds(pids) - cpu_s) / (time.monotonic() - began)
    found: Figures = {"busy": round(busy, 3)}
    if disturbing is not None:
        disturbing.terminate()
        found["disturbing"] = json.loads(disturbing.communicate()[0])
    found |= json.loads(generator.communicate()[0])
    found["late_ms"] = {name: round(value / 1000, 3) for name, value in found.pop("late").items()}
    return found


def _secret(target: targets.Target) -> str:
    return target.headers[0].rpartition(" ")[2] if target.headers else ""


def _calibrated(target: targets.Target, busy: float, second_url: str) -> int:
    """How many streams keep the core that busy."""
    streams = _FIRST_STREAMS
    for _ in range(_CALIBRATIONS):
        found = measure(target, streams, 1.0, QUIET, second_url)
        streams = round(streams * busy / found["busy"])
    return streams


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _second_upstream() -> Iterator[str]:
    process = _start("upstream")
    try:
        assert process.stdout
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.communicate()


def run(arguments: argparse.Namespace) -> Figures:
    """What is written to the file."""
    kinds = arguments.only.split(",") if arguments.only else [QUIET, *disturb.KINDS]
    document: Figures = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "first": arguments.first,
        "per_ip": arguments.per_ip,
        "rows": [],
    }
    with targets.upstream() as upstream, _second_upstream() as second_url:
        direct = targets.Target(targets.DIRECT, upstream)
        with Disturbed(upstream, second_url, arguments.per_ip) as target:
            streams = arguments.streams or _calibrated(target, arguments.busy, second_url)
            document["streams"] = streams
            for kind in kinds:
                row: Figures = {"disturbance": kind}
                if not arguments.no_direct:
                    row["direct"] = measure(direct, streams, arguments.seconds, kind, second_url)
                row["headrace"] = measure(target, streams, arguments.seconds, kind, second_url)
                document["rows"].append(row)
                print(line(row), flush=True)
    return document


def heading() -> str:
    return (
        f"{'lateness of chunks, ms':<28}{'direct p50':>11}{'p99':>8}{'max':>8}"
        f"{'headrace p50':>14}{'p99':>8}{'max':>8}{'busy':>7}  what disturbed got"
    )


def line(row: Figures) -> str:
    """One row of the table."""
    cells = f"{_WORDS[row['disturbance']]:<28}"
    for peer, width in (("direct", 11), ("headrace", 14)):
        late = row.get(peer, {}).get("late_ms") or {}
        cells += f"{_ms(late, 'p50'):>{width}}{_ms(late, 'p99'):>8}{_ms(late, 'max'):>8}"
    through = row["headrace"]
    cells += f"{through['busy']:>7.0%}"
    if "disturbing" in through:
        done = through["disturbing"]
        cells += "  " + ", ".join(
            f"{number / done['seconds']:.1f}/s {status}" for status, number in done["statuses"].items()
        )
        if done["ttfb"]:
            cells += (
                f", first byte p50 {done['ttfb']['p50'] / 1000:.0f} p99 {done['ttfb']['p99'] / 1000:.0f} ms"
            )
    return cells + (f"  FAILED {through['failed']}" if through["failed"] else "")


def _ms(late: Figures, name: str) -> str:
    return f"{late[name]:.2f}" if name in late else "-"


def main() -> int:
    if sys.argv[1:2] == ["--generate"]:
        port, headers, streams, seconds = sys.argv[2:6]
        generate(int(port), json.loads(headers), int(streams), float(seconds))
        return 0
    arguments = _parser().parse_args()
    if arguments.first:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, _FIRST)
        except PermissionError:
            print("head_of_line: --first needs root", file=sys.stderr)
            return 2
    print(heading())
    document = run(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{document['streams']} streams; written: {arguments.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.head_of_line", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each row")
    parser.add_argument("--busy", type=float, default=0.7, help="share of the proxy's core, while quiet")
    parser.add_argument("--streams", type=int, default=0, help="instead of finding the number for --busy")
    parser.add_argument("--only", metavar="A,B", help=f"of {', '.join([QUIET, *disturb.KINDS])}")
    parser.add_argument(
        "--per-ip", type=int, default=0, metavar="N", help="limits.per_ip; 0: as good as none"
    )
    parser.add_argument("--no-direct", action="store_true")
    parser.add_argument("--first", action="store_true", help="before all others on a shared machine (root)")
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
