"""What a process costs: memory, descriptors, CPU time, garbage collections.

Without a worker's number: the page sums over all processes, and over those of two generations in a restart.
"""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Mapping
from typing import Any

from proxy.metrics import Metrics

_PAGE_BYTES = resource.getpagesize()
#: New objects to a young collection, young to a middle one, middle to a full one (CPython's: 700, 10, 10).
_COLLECT_AFTER = (5000, 20, 20)


class Footprint:
    """Of this process, from `start` to `stop`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = 0.0

    def start(self) -> None:
        gc.callbacks.append(self._collecting)

    def stop(self) -> None:
        if self._collecting in gc.callbacks:
            gc.callbacks.remove(self._collecting)

    def _collecting(self, phase: str, info: Mapping[str, Any]) -> None:
        """A collection stops the event loop: its length is a gap in every stream of this process."""
        if phase == "start":
            self._began = time.perf_counter()
        elif self._began:
            self._metrics.gc_pause.observe((), time.perf_counter() - self._began)

    def show(self) -> None:
        """Reads the figures as they are now; about 40 us."""
        show(self._metrics)


def settle_collector() -> None:
    """Once, when a process begins to serve: what is there stays, so no collection looks at it again, and
    requests, which leave little behind that is tied in cycles, are looked at by the thousand. 3 % of a short
    request's CPU (measured); a young collection takes 0.3 ms, a tenth of what a gap in a stream may be."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)


def show(metrics: Metrics) -> None:
    """The figures of this process, set (not added) in its own metrics."""
    files = open_files()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    metrics.cpu_seconds.values[()] = time.process_time()
    metrics.resident_memory.set((), resident_bytes())
    metrics.open_fds.set((), files)
    metrics.open_fds_ratio.set((), files / soft)
    for generation, stats in enumerate(gc.get_stats()):
        metrics.gc_collections.values[str(generation),] = stats["collections"]


def resident_bytes() -> int:
    """Memory that this process uses now (proc_pid_statm(5))."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES


def open_files() -> int:
    """File descriptors of this process."""
    # Since Linux 6.2 the folder's size is their number; listing 10,000 of them would take milliseconds.
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd")) - 1
