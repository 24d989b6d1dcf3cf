"""Whether Headrace has become dearer: its figures as ratios to nginx's, beside the baseline's ratios.

    python -m bench.check [--rounds 5] [--quick] [--print-only] [--baseline FILE]

Exit code 1 when a ratio lost more than 15 %. nginx goes through the same kernel in the same rounds, which
is why a ratio can be compared between machines and an absolute figure cannot.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from bench import measures, report, rounds

BASELINE = report.RESULTS / "baseline.json"
TOLERANCE = 0.15
#: What a change is judged by: CPU, because it is what stays the same on a machine that others use, too.
JUDGED = ("chunk_400_us", "chunk_200_us", "request_us")
_PEER, _BASE = "headrace-full", "nginx"


def compare(baseline: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(figure, ratio then, ratio now) of what both have."""
    found = []
    for name in JUDGED:
        then, today = (rounds.ratios(each, _PEER, _BASE, name) for each in (baseline, now))
        if then and today:
            found.append((name, statistics.median(then), statistics.median(today)))
    return found


def lost(then: float, now: float) -> bool:
    return now > then * (1 + TOLERANCE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.check", description="against the baseline")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="two seconds-long rounds")
    parser.add_argument("--print-only", action="store_true", help="never fail: for CI on shared machines")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    arguments = parser.parse_args()
    plan = rounds.Plan(
        peers=[_PEER, _BASE],
        rounds=arguments.rounds or (2 if arguments.quick else 5),
        length=measures.QUICK if arguments.quick else measures.FULL,
        only=frozenset({"stream_400", "stream_200", "short"}),
    )
    now = rounds.run(plan)
    if not arguments.baseline.exists():
        print(f"no baseline: cp {report.LATEST} {arguments.baseline}")
        return 0 if arguments.print_only else 1
    baseline = json.loads(arguments.baseline.read_text())
    compared = compare(baseline, now)
    print(f"\n{'times nginx':<42}{'baseline':>10}{'now':>8}{'change':>9}")
    for name, then, today in compared:
        verdict = "  LOST" if lost(then, today) else ""
        label = measures.FIGURES[name].label
        print(f"{label:<42}{then:>10.2f}{today:>8.2f}{today / then - 1:>+9.0%}{verdict}")
    missing = set(JUDGED) - {name for name, _, _ in compared}
    for name in sorted(missing):
        print(f"{measures.FIGURES[name].label}: not measured in both")
    bad = bool(missing) or any(lost(then, today) for _, then, today in compared)
    return int(bad and not arguments.print_only)


if __name__ == "__main__":
    raise SystemExit(main())
