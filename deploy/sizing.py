"""How much a core carries, from measured figures: the table in docs/scale.md, and an answer for another load.

python -m deploy.sizing     writes the table from bench/results/baseline.json
python -m deploy.sizing --streams 5000 --chunks 30 --requests 50     says how many cores and how much memory
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

from bench import marked

_ROOT = Path(__file__).resolve().parents[1]
PAGE = _ROOT / "docs" / "scale.md"
#: The committed run; latest.json may be anybody's, and of a part.
RESULTS = _ROOT / "bench" / "results" / "baseline.json"
#: With keys, limits and the ledger, as it is run.
_PEER = "headrace-full"
#: Of a core: above that waiting grows faster than load (a queue that is 70 % busy waits 2.3 services).
BUSY = 0.7
_NONE = "No figures yet: `make bench` measures them, `python -m deploy.sizing` puts them here.\n"
#: Chunks a second of a stream: a slow model, a usual one, a fast one.
_PACES = (20, 50, 100)
#: In the order of Costs.
_FIGURES = ("chunk_400_us", "request_us", "stream_kib", "idle_mib")
_FIRST_BYTES = ("ttfb_p50_us", "ttfb_p99_us", "ttfb_500_p99_us")
_PUBLISHED_EVENTS = 10_000_000
_DAY_S = 86_400


class Costs(NamedTuple):
    """What was measured."""

    chunk_us: float
    request_us: float
    stream_kib: float
    idle_mib: float
    source: str


class Load(NamedTuple):
    """At the busiest moment: streams at once, chunks a second of each, requests a second."""

    streams: int
    chunks: float
    requests: float


def read(results: Path) -> Costs | None:
    """None if there is no such file, or if it is of a run that measured only a part."""
    if not results.exists():
        return None
    document = json.loads(results.read_text())
    figures = document["peers"].get(_PEER, {}).get("figures", {})
    if not all(name in figures for name in (*_FIGURES, *_FIRST_BYTES)):
        return None
    chunk, request, stream, idle = (float(figures[name]["median"]) for name in _FIGURES)
    machine = document["machine"]
    source = (
        f"{document['when'][:10]}, {machine['cpu']}, Python {machine['python']}, {document['rounds']} rounds"
    )
    return Costs(chunk, request, stream, idle, source)


def cores(costs: Costs, load: Load) -> float:
    """That this load keeps busy to BUSY."""
    busy_us = load.streams * load.chunks * costs.chunk_us + load.requests * costs.request_us
    return busy_us / 1e6 / BUSY


def streams_a_core(costs: Costs, chunks: float) -> int:
    return int(BUSY * 1e6 / (chunks * costs.chunk_us))


def memory_mib(costs: Costs, load: Load) -> float:
    """Of all workers (one a core) and the process before them."""
    processes = max(1, math.ceil(cores(costs, load))) + 1
    return processes * costs.idle_mib + load.streams * costs.stream_kib / 1024


def table(costs: Costs) -> str:
    lines = [
        "| a stream's chunks per second | streams a core | memory for them |",
        "|--:|--:|--:|",
    ]
    for pace in _PACES:
        count = streams_a_core(costs, pace)
        memory = costs.idle_mib + count * costs.stream_kib / 1024
        lines.append(f"| {pace} | {count:,} | {memory:,.0f} MiB |")
    short = BUSY * 1e6 / costs.request_us
    lines += [
        "",
        f"Short requests: {short:,.0f} a second and core. From {costs.chunk_us:.1f} µs of CPU a chunk, "
        f"{costs.request_us:.0f} µs a request, {costs.stream_kib:.1f} KiB a stream and "
        f"{costs.idle_mib:.0f} MiB a process, at {BUSY:.0%} of a core "
        f"({costs.source}; `bench/results/baseline.json`).",
        "",
    ]
    return "\n".join(lines)


def claims(results: Path, costs: Costs) -> str:
    """What is published of relays like this one, and the same of this run."""
    figures = json.loads(results.read_text())["peers"][_PEER]["figures"]
    one, worst, many = (figures[name]["median"] / 1000 for name in _FIRST_BYTES)
    each_s = _PUBLISHED_EVENTS / _DAY_S
    rows = {
        "45 to 80 ms to the first token": f"{one:.1f} ms to the first byte (p99 {worst:.1f}), without "
        "a model",
        "500 and more streams at once": f"{many:.1f} ms to the first byte at 500 (p99)",
        "2 KB of memory a connection": f"{costs.stream_kib:.0f} KiB an open stream, both its connections",
        "10 million events a day": f"{each_s:,.0f} a second: {each_s * costs.chunk_us / 1e6:.1%} of a core",
    }
    lines = ["| published of relays like this one | here, measured |", "|---|---|"]
    return "\n".join([*lines, *(f"| {said} | {ours} |" for said, ours in rows.items()), ""])


def page(text: str, results: Path = RESULTS) -> str:
    """The page with the table of these results, or without one until there are any."""
    costs = read(results)
    inner = _NONE if costs is None else table(costs) + "\n" + claims(results, costs)
    return marked.put(text, "sizing", inner)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.sizing", description="cores and memory for a load"
    )
    parser.add_argument("--streams", type=int, help="at once, at the busiest moment")
    parser.add_argument("--chunks", type=float, default=50, help="a second, of each stream")
    parser.add_argument("--requests", type=float, default=0, help="a second")
    arguments = parser.parse_args()
    if arguments.streams is None:
        PAGE.write_text(page(PAGE.read_text()))
        return 0
    costs = read(RESULTS)
    if costs is None:
        sys.stderr.write(f"no figures yet: make bench, and copy its latest.json to {RESULTS.name}\n")
        return 1
    load = Load(arguments.streams, arguments.chunks, arguments.requests)
    sys.stdout.write(f"cores {cores(costs, load):.1f}, memory {memory_mib(costs, load):,.0f} MiB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
