"""`headrace bench`: loads direct, Headrace and its peers with the same work in turn.

Prints a table, and writes bench/results/latest.json with the charts beside it. Five rounds of the usual four
take twenty minutes; `--quick` shows in four that all of it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench import chart, machine, measures, report, rounds, targets

#: What runs unless told; nginx where it is found.
USUAL = ["direct", "headrace-full", "headrace-open", "nginx"]
MEASURES = [
    *measures.EVERY_ROUND,
    *measures.SOME_ROUNDS,
    *measures.ONCE,
    "over_tls",
    "with_workers",
    "retries",
]


def main() -> int:
    arguments = _parser().parse_args()
    peers = [*USUAL[:1], *targets.names()] if arguments.all else arguments.peer or USUAL
    if unknown := set(peers) - {targets.DIRECT, *targets.names()}:
        known = ", ".join([targets.DIRECT, *targets.names()])
        print(f"headrace bench: no peer {', '.join(sorted(unknown))}: there are {known}", file=sys.stderr)
        return 2
    if arguments.realtime and not machine.be_realtime():
        print("headrace bench: --realtime needs root", file=sys.stderr)
        return 2
    plan = rounds.Plan(
        peers=peers,
        rounds=arguments.rounds or (1 if arguments.quick else 5),
        length=measures.QUICK if arguments.quick else measures.FULL,
        only=frozenset(arguments.only.split(",")) if arguments.only else frozenset(),
    )
    document = rounds.run(plan)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print("\n" + "\n".join(report.lines(document)))
    for file in [arguments.out, *chart.write(document, arguments.out.parent)]:
        print(f"written: {file}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headrace bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "peer", nargs="*", help=f"direct, {', '.join(targets.names())}; unless told {', '.join(USUAL)}"
    )
    parser.add_argument("--all", action="store_true", help="all peers; the first time installs them")
    parser.add_argument("--rounds", type=int, help="5 unless told; 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="seconds-long rounds: for a look, not to quote")
    parser.add_argument(
        "--realtime", action="store_true", help="before all others on a machine that is shared (root)"
    )
    parser.add_argument("--only", metavar="A,B", help=f"of {', '.join(MEASURES)}")
    parser.add_argument(
        "--out", type=Path, default=report.LATEST, metavar="FILE", help=f"unless told {report.LATEST}"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
