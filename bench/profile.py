"""Where the CPU time of a stream's chunk and of a short request goes.

    python -m bench.profile [stream|short]... [--peer headrace-full] [--seconds 6] [--top 25] [--under NAME]

Two samplers, one after the other, while the bench loads the proxy. py-spy knows Python's functions: `self`
has what they spend in C and in the kernel, `with` also the Python functions that they call. perf, where there
is one, knows the C and kernel functions behind them. Shares are of the proxy's CPU time; microseconds are
these shares of what a chunk or a request costs without a sampler.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench import machine, targets

WORK: dict[str, dict[str, Any]] = {
    "stream": {"streams": 400, "gap_ms": 24, "ramp": 0.5},
    "short": {"streams": 32, "short": True},
}
_LINE = re.compile(r":\d+\)$")
_THREAD = re.compile(r"^thread \(\w+\)(: )?")
_PERF_ROW = re.compile(r"^\s*(\d+\.\d+)%\s+(\S+)\s+\[(.)\] (.+?)(?:\s+-\s+-)?\s*$")

Stacks = list[tuple[list[str], float]]


def profiler() -> str:
    """The path of py-spy, which is fetched into a cache of its own if it is not here."""
    beside = Path(sys.executable).with_name("py-spy")
    if found := shutil.which("py-spy") or (str(beside) if beside.exists() else None):
        return found
    home = targets.CACHE / "py-spy"
    if not (home / "bin/py-spy").exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(home / "bin/pip"), "install", "-q", "py-spy"], check=True)
    return str(home / "bin/py-spy")


def load(target: targets.Target, work: dict[str, Any], seconds: float) -> float:
    """Microseconds of CPU a unit of work."""
    flags = dict(work)
    if "short" in flags:
        flags["seconds"] = seconds
    else:
        flags |= {"requests": flags["streams"], "events": int(seconds * 1000 / flags["gap_ms"])}
    figures = target.load(**flags)
    return float(figures["cpu_s"] * 1e6 / (figures["events"] or figures["requests"]))


def python_stacks(target: targets.Target, work: dict[str, Any], seconds: float) -> Stacks:
    """Stacks of Python frames, outermost first, with their shares of the process's CPU time.

    py-spy takes a thread that waits for one that works on some kernels: so each thread's samples are scaled
    to the CPU time that the kernel counted for it.
    """
    pid = target.pids[-1]
    names = _thread_names(pid)
    before = machine.thread_seconds(pid)
    rows = _record(target, work, seconds)
    used = {
        names.get(thread, "?"): spent - before.get(thread, 0.0)
        for thread, spent in machine.thread_seconds(pid).items()
    }
    whole = sum(used.values()) or 1.0
    samples: Counter[str] = Counter()
    for thread, _, count in rows:
        samples[thread] += count
    return [
        (frames, used.get(thread, 0.0) / whole * count / samples[thread]) for thread, frames, count in rows
    ]


def _thread_names(pid: int) -> dict[int, str]:
    dumped = subprocess.run([profiler(), "dump", "--json", "-p", str(pid)], capture_output=True, text=True)
    if dumped.returncode:
        raise SystemExit(
            f"py-spy: {dumped.stderr.strip().splitlines()[-1]} (as root it may look into processes)"
        )
    return {each["os_thread_id"]: each["thread_name"] for each in json.loads(dumped.stdout)}


def _record(target: targets.Target, work: dict[str, Any], seconds: float) -> list[tuple[str, list[str], int]]:
    """(thread, frames, samples)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stacks"
        command = [profiler(), "record", "-t", "-F", "-f", "raw", "-r", "250", "-d", str(int(seconds))]
        recorder = _start([*command, "-p", str(target.pids[-1]), "-o", str(file)])
        load(target, work, seconds + 1.5)
        recorder.communicate(timeout=120)
        lines = file.read_text().splitlines()
    found = []
    for line in lines:
        stack, _, count = line.rpartition(" ")
        thread, *frames = [_LINE.sub(")", frame) for frame in stack.split(";")]
        found.append((_THREAD.sub("", thread), frames, int(count)))
    return found


def native_rows(target: targets.Target, work: dict[str, Any], seconds: float) -> list[tuple[float, str]]:
    """(percent, function) of C and the kernel; none without perf."""
    if not shutil.which("perf"):
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "data")
        pid = str(target.pids[-1])
        command = ["perf", "record", "-q", "-F", "999", "-o", file, "-p", pid, "--", "sleep", str(seconds)]
        recorder = _start(command)
        load(target, work, seconds + 1.5)
        recorder.communicate(timeout=120)
        report = subprocess.run(
            ["perf", "report", "-q", "--stdio", "-i", file, "--no-children", "--sort", "dso,symbol"],
            capture_output=True,
            text=True,
        ).stdout
    found = filter(None, map(_PERF_ROW.match, report.splitlines()))
    return [(float(row[1]), f"{row[4]} ({row[2].rpartition('/')[2]})") for row in found]


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def show(stacks: Stacks, unit_us: float, unit: str, top: int) -> None:
    own: Counter[str] = Counter()
    within: Counter[str] = Counter()
    for frames, share in stacks:
        own[frames[-1]] += share  # type: ignore[assignment]  # a Counter adds up fractions as well
        for frame in set(frames):
            within[frame] += share  # type: ignore[assignment]  # None until it is known
    for title, counted in (("self", own), ("with what it calls", within)):
        print(f"\nPython, {title}")
        for frame, share in counted.most_common(top):
            print(f" {100 * share:5.1f}%  {unit_us * share:6.2f} us/{unit}  {frame}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("work", nargs="*", help="stream, short; both unless told")
    parser.add_argument("--peer", default="headrace-full")
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument(
        "--under", metavar="TEXT", default="", help="only stacks with a frame that contains this"
    )
    arguments = parser.parse_args()
    with targets.upstream() as upstream, targets.Target(arguments.peer, upstream) as target:
        target.load(streams=8, requests=500, short=True)
        for name in arguments.work or list(WORK):
            unit = "chunk" if name == "stream" else "request"
            unit_us = load(target, WORK[name], 3)
            print(f"\n== {name}: {unit_us:.1f} us of CPU per {unit}")
            time.sleep(0.5)
            stacks = python_stacks(target, WORK[name], arguments.seconds)
            show(
                [each for each in stacks if arguments.under in ";".join(each[0])],
                unit_us,
                unit,
                arguments.top,
            )
            print("\nC and kernel")
            for percent, function in native_rows(target, WORK[name], arguments.seconds)[: arguments.top]:
                print(f" {percent:5.1f}%  {unit_us * percent / 100:6.2f} us/{unit}  {function}")


if __name__ == "__main__":
    main()
