"""The README's figures, written from the committed run: each goal beside what was measured, and the other
proxies beside Headrace.

    python -m bench.goals     writes them from bench/results/baseline.json and peers.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench import marked, report
from bench.rounds import ratios

_README = Path(__file__).resolve().parents[1] / "README.md"
#: The committed runs; latest.json may be anybody's. Of other gateways fewer things are measured.
RESULTS = report.RESULTS / "baseline.json"
PEERS = report.RESULTS / "peers.json"
#: With a key, a plan, limits, metrics, log, ledger, heartbeat and timers on.
_OURS = "headrace-full"
#: Flat, as far as it can be measured.
_FLAT = 1.3

Document = dict[str, Any]
#: What was measured; None: this run did not.
Measured = Callable[[Document], float | None]


class Goal(NamedTuple):
    """must, moonshot: the value may be that much at most. `unit` follows each of the three."""

    label: str
    measured: Measured
    unit: str
    must: float
    moonshot: float
    digits: int = 2


def _median(name: str, peer: str = _OURS) -> Measured:
    def measured(document: Document) -> float | None:
        found = document["peers"].get(peer, {}).get("figures", {}).get(name)
        return None if found is None else float(found["median"])

    return measured


def _beside_nginx(name: str) -> Measured:
    def measured(document: Document) -> float | None:
        found = ratios(document, _OURS, "nginx", name)
        return statistics.median(found) if found else None

    return measured


def _added_ms(name: str) -> Measured:
    """The difference to no proxy at all, of the same round."""

    def measured(document: Document) -> float | None:
        values = [
            document["peers"].get(peer, {}).get("figures", {}).get(name, {}).get("values", [])
            for peer in (_OURS, report.DIRECT)
        ]
        added = [ours - direct for ours, direct in zip(*values, strict=False)]
        return statistics.median(added) / 1000 if added else None

    return measured


def _ratio(above: str, below: str) -> Measured:
    def measured(document: Document) -> float | None:
        first, second = _median(above)(document), _median(below)(document)
        return None if first is None or not second else first / second

    return measured


def _ms(name: str) -> Measured:
    def measured(document: Document) -> float | None:
        found = _median(name)(document)
        return None if found is None else found / 1000

    return measured


GOALS = (
    Goal("CPU per chunk, 400 streams x 42/s", _beside_nginx("chunk_400_us"), "x nginx", 1.8, 1.4),
    Goal("CPU per chunk, 200 streams x 50/s", _beside_nginx("chunk_200_us"), "x nginx", 1.5, 1.25),
    Goal("CPU per short request (1 KB answer)", _median("request_us"), " µs", 220, 130, 0),
    Goal("the same with two workers", _ratio("workers_request_us", "request_us"), "x one worker", 1.25, 1.05),
    Goal("added time to first byte, 1 stream, p50", _added_ms("ttfb_p50_us"), " ms", 0.6, 0.35),
    Goal("added time to first byte, 1 stream, p99", _added_ms("ttfb_p99_us"), " ms", 1.5, 0.6),
    Goal("time to first byte at 500 streams, p99", _ms("ttfb_500_p99_us"), " ms", 5, 1.5),
    Goal("memory per open stream", _median("stream_kib"), " KiB", 30, 15, 1),
    Goal("2,000 streams begin in 1 s: first byte, p99", _median("many_ttfb_p99_ms"), " ms", 2000, 250, 0),
    Goal("of these, failed", _median("many_failed"), "", 0, 0, 0),
    Goal("idle memory of a worker", _median("idle_mib"), " MiB", 70, 50, 0),
    Goal("cold start", _median("cold_start_s"), " s", 1, 0.5),
    Goal("CPU per chunk, 2,000 streams beside 100", _ratio("growth_2000_us", "growth_100_us"), "x", _FLAT, 1),
)


def section(document: Document | None, peers: Document | None = None) -> str:
    """What stands between the marks. `peers`: a run beside other gateways."""
    if document is None:
        return "No figures yet: `make bench` measures them, `python -m bench.goals` puts them here.\n"
    found = [*_goals(document), "", report.headline(document), ""]
    if peers is not None:
        found += [*_sideways(peers), "", report.headline(peers), ""]
    return "\n".join(found)


def _goals(document: Document) -> Iterator[str]:
    yield "| goal | must | moonshot | measured | |"
    yield "|---|--:|--:|--:|---|"
    for goal in GOALS:
        value = goal.measured(document)
        if value is not None:
            must, moonshot, is_ = (_text(goal, each) for each in (goal.must, goal.moonshot, value))
            yield f"| {goal.label} | <= {must} | <= {moonshot} | **{is_}** | {_verdict(goal, value)} |"


def _text(goal: Goal, value: float) -> str:
    digits = f"{value:,.{goal.digits}f}"
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits}{goal.unit}"


def _verdict(goal: Goal, value: float) -> str:
    if round(value, goal.digits) <= goal.moonshot:
        return "moonshot"
    return "met" if round(value, goal.digits) <= goal.must else "missed"


def _sideways(document: Document) -> Iterator[str]:
    """A row a proxy, the cheapest chunk first."""
    figures = {name: each["figures"] for name, each in document["peers"].items() if name != report.DIRECT}
    names = [name for name in report.FIGURES if any(name in found for found in figures.values())]
    labels = [report.FIGURES[name] for name in names]
    yield "| | " + " | ".join(f"{each.label}, {each.unit}" for each in labels) + " |"
    yield "|---|" + "--:|" * len(names)
    for peer in sorted(figures, key=lambda peer: _median("chunk_200_us", peer)(document) or 0.0):
        medians = [figures[peer].get(name, {}).get("median") for name in names]
        cells = [
            "" if each is None else _number(each, label.digits)
            for each, label in zip(medians, labels, strict=True)
        ]
        yield f"| {f'**{peer}**' if peer == _OURS else peer} | " + " | ".join(cells) + " |"


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits if value < 100 else 0}f}"


def read(results: Path = RESULTS) -> Document | None:
    """None: nothing was committed."""
    return json.loads(results.read_text()) if results.exists() else None


def page(readme: str, document: Document | None, peers: Document | None = None) -> str:
    """The README with its section written anew."""
    return marked.put(readme, "goals", section(document, peers))


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m bench.goals", description="writes the README's figures from the committed run"
    ).parse_args()
    _README.write_text(page(_README.read_text(), read(), read(PEERS)))


if __name__ == "__main__":
    main()
