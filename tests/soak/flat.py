"""What was measured, and whether it is flat. No I/O."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MIB = 2**20
#: How much the fitted line of all processes' memory may rise over the measured time. Runs of 30, 40, 220 and
#: 480 s rose by 1.0, 0.7, 1.3 and 1.2 MiB; the ledger's page cache (SQLite's cache_size, 2 MiB) is full after
#: 8,000 rows. A leak of 4 KiB a request is found in a minute, one of 300 bytes in ten.
MEMORY_RISE = 4 * MIB
#: Levels follow the load, which is not even; at rest they are compared to the last one.
LEVEL_RISE = 0.25
LEVEL_SPARE = 10
#: Connections to Redis of one process, at most (proxy/state/redis.py): a store that was away for a moment has
#: to make them again. Then those of two workers, their front, and who asks how many there are.
REDIS_EACH = 32
REDIS_MOST = 3 * REDIS_EACH + 1
#: Below this a line is drawn through noise.
LEAST_SAMPLES = 10


@dataclass(frozen=True)
class Sample:
    """One look at all processes together. connections: at upstreams, in use and idle."""

    at_s: float
    requests: int
    streams: int
    memory_bytes: int
    fds: int
    tasks: int
    connections: int
    redis: int

    @property
    def files(self) -> int:
        """File descriptors that are no connection to Redis: those are kept, and counted for themselves."""
        return self.fds - self.redis


class Line(NamedTuple):
    """A fitted line: how much it rises over the measured time, and may rise."""

    name: str
    mean: float
    per_minute: float
    rise: float
    allowed: float

    @property
    def flat(self) -> bool:
        return self.rise <= self.allowed


#: Attribute -> its name in the tables.
LEVELS = {
    "files": "file descriptors",
    "tasks": "tasks",
    "connections": "upstream connections",
    "redis": "Redis connections",
}


def lines(samples: Sequence[Sample]) -> list[Line]:
    """Least squares through each figure, over all samples."""
    assert len(samples) >= LEAST_SAMPLES, f"{len(samples)} samples"
    found = [Line("memory, bytes", *_fit(samples, "memory_bytes"), MEMORY_RISE)]
    for each, name in LEVELS.items():
        mean, per_minute, rise = _fit(samples, each)
        allowed = REDIS_EACH if each == "redis" else LEVEL_RISE * mean + LEVEL_SPARE
        found.append(Line(name, mean, per_minute, rise, allowed))
    return found


def _fit(samples: Sequence[Sample], name: str) -> tuple[float, float, float]:
    """Mean, slope a minute, and rise over the samples' time."""
    times = [each.at_s for each in samples]
    values = [float(getattr(each, name)) for each in samples]
    slope = statistics.linear_regression(times, values).slope
    return statistics.mean(values), slope * 60, slope * (times[-1] - times[0])


def left_behind(before: Sample, after: Sample) -> list[str]:
    """What is more than it was, at rest before and after the load; of connections to Redis so many are kept
    as were ever needed at once."""
    found = []
    for each, name in LEVELS.items():
        was, now = (REDIS_MOST if each == "redis" else getattr(before, each)), getattr(after, each)
        if now > was:
            found.append(f"{name}: {was} before the load, {now} after it")
    return found


def row(sample: Sample, note: str = "") -> str:
    cells = (
        f"{sample.at_s:8.0f}",
        f"{sample.requests:9d}",
        f"{sample.streams:8d}",
        f"{sample.memory_bytes / MIB:11.1f}",
        f"{sample.fds:5d}",
        f"{sample.tasks:6d}",
        f"{sample.connections:9d}",
        f"{sample.redis:6d}",
    )
    return f"{''.join(cells)}  {note}".rstrip()


HEADING = " seconds requests streams memory MiB  fds tasks upstream Redis"


def verdicts(found: Sequence[Line], requests: int) -> list[str]:
    """One text line a figure, and one for what a request leaves in memory."""
    told = []
    for line in found:
        unit, size = ("MiB", MIB) if line.name.startswith("memory") else ("", 1)
        told.append(
            f"{line.name.partition(',')[0]:<22}mean {line.mean / size:8.1f} {unit:<3}"
            f"  slope {line.per_minute / size:+7.2f} {unit:<3} a minute"
            f"  rise {line.rise / size:+6.1f} of {line.allowed / size:.1f} allowed"
            f"  {'flat' if line.flat else 'GROWS'}"
        )
    told.append(
        f"{'memory a request':<22}{found[0].rise / max(requests, 1):+.0f} bytes over {requests} requests"
    )
    return told
