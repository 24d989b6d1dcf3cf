"""What the kernel knows: CPU time and memory of processes, cores, the machine that figures come from."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────


def family(pid: int) -> list[int]:
    """The process and all that it has started."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))):
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none of a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time.

    The threads' schedstat has nanoseconds; utime + stime of stat is the same sum in ticks of 10 ms, and also
    has the threads that ended. So: schedstat, unless stat knows of more than rounding explains.
    """
    total = 0.0
    for pid in pids:
        fields = _stat(pid)
        ticks_s = (int(fields[11]) + int(fields[12])) * _TICK_S if fields else 0.0
        exact_s = _schedstat_s(pid)
        total += ticks_s if ticks_s > exact_s + 3 * _TICK_S else exact_s
    return total


def _schedstat_s(pid: int) -> float:
    return sum(thread_seconds(pid).values())


def thread_seconds(pid: int) -> dict[int, float]:
    """CPU time of each living thread, by its id; none where the kernel does not count it."""
    found = {}
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found[int(thread.name)] = int((thread / "schedstat").read_text().split()[0]) / 1e9
    except OSError:
        pass
    return found


def resident_kib(pids: Iterable[int]) -> int:
    """Resident memory; what processes share is counted once for each."""
    return sum(_resident_kib(pid) for pid in pids)


def _resident_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


# ── cores ────────────────────────────────────────────────────────────────────────────────────────────────


def cores() -> tuple[int | None, int | None]:
    """(the proxy's, the upstream's and the generator's); None where there is only one."""
    usable = sorted(os.sched_getaffinity(0))
    return (usable[0], usable[1]) if len(usable) > 1 else (None, None)


def on_core(core: int | None, command: list[str]) -> list[str]:
    """The command, bound to a core with all that it will start."""
    if core is None or not shutil.which("taskset"):
        return command
    return ["taskset", "-c", str(core), *command]


def be_realtime() -> bool:
    """This process and all that it starts go before all others; False if that is not allowed."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(5))
    except PermissionError:
        return False
    return True


# ── where figures come from ──────────────────────────────────────────────────────────────────────────────


def describe() -> dict[str, Any]:
    """Machine, versions and commit, as they stand in every result."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        "packages": {name: metadata.version(name) for name in ("aiohttp", "uvloop", "msgspec")},
        "commit": _said("git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD"),
        "changed": bool(_said("git", "-C", str(REPOSITORY), "status", "--porcelain", "--", "proxy")),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found: Mapping[str, str] = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    return found.get("model name") or platform.machine()


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        return ""
