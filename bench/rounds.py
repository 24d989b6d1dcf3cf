"""The rounds: every target in turn, and again, so that what the machine does meanwhile meets all of them."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from bench import machine, measures, retries, targets
from bench.measures import Figures, Length, Measure

#: These take long, and their figures are steadier than what is asked of them.
_SOME = 3


class Plan(NamedTuple):
    """rounds: of the main figures; only: names of measures, all when empty."""

    peers: list[str]
    rounds: int
    length: Length
    only: frozenset[str]

    def wants(self, name: str) -> bool:
        return not self.only or name in self.only


class Results:
    """Values by peer and figure, one a round; what was skipped and what went wrong, by peer."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, list[float]]] = {}
        self.versions: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.troubles: list[str] = []

    def add(self, peer: str, figures: Figures) -> None:
        mine = self.values.setdefault(peer, {})
        for name, value in figures.items():
            if peer == targets.DIRECT and measures.FIGURES[name].label.startswith("CPU"):
                continue  # there is no proxy to use any
            mine.setdefault(name, []).append(value)

    def trouble(self, text: str) -> None:
        self.troubles.append(text)
        print(f"  {text}", flush=True)

    def as_document(self, plan: Plan) -> dict[str, Any]:
        return {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine.describe(),
            "rounds": plan.rounds,
            "quick": plan.length is measures.QUICK,
            "skipped": self.skipped,
            "troubles": self.troubles,
            "peers": {
                peer: {
                    "version": self.versions.get(peer, ""),
                    "figures": {name: summary(values) for name, values in figures.items()},
                }
                for peer, figures in self.values.items()
            },
        }


def summary(values: list[float]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "values": [round(value, 4) for value in values],
    }


def run(plan: Plan) -> dict[str, Any]:
    """The whole bench; prints a line a step, gives what is written to the file."""
    results = Results()
    with targets.upstream() as upstream:
        for number in range(plan.rounds):
            wanted = _of_round(number, plan)
            for peer in plan.peers:
                if peer not in results.skipped and wanted:
                    print(f"round {number + 1}/{plan.rounds}  {peer}", flush=True)
                    _visit(results, targets.Target(peer, upstream), plan.length, wanted)
    if plan.wants("over_tls"):
        with targets.upstream(tls=True) as upstream:
            _beside(results, plan, "tls", {"over_tls": measures.over_tls}, upstream, 1)
    if plan.wants("with_workers"):
        with targets.upstream() as upstream:
            _beside(results, plan, "workers", {"with_workers": measures.with_workers}, upstream, 2)
    if plan.wants("retries"):
        _retries(results, plan)
    return results.as_document(plan)


def _of_round(number: int, plan: Plan) -> dict[str, Measure]:
    found = dict(measures.EVERY_ROUND)
    if number < _SOME:
        found |= measures.SOME_ROUNDS
    if number == 0:
        found |= measures.ONCE
    return {name: measure for name, measure in found.items() if plan.wants(name)}


def _visit(
    results: Results,
    target: targets.Target,
    length: Length,
    wanted: dict[str, Measure],
    *,
    start: bool = True,
) -> None:
    try:
        with target:
            results.versions[target.name] = target.version
            if start and target.pids:
                idle = machine.resident_kib(target.pids) / 1024
                results.add(target.name, {"cold_start_s": target.cold_start_s, "idle_mib": idle})
            measures.warm_up(target)
            for name, measure in wanted.items():
                try:
                    results.add(target.name, measure(target, length))
                except measures.Trouble as error:
                    results.trouble(f"{target.name} {name}: {error}")
                time.sleep(0.3)
    except targets.Skipped as error:
        results.skipped[target.name] = str(error)
        print(f"  skipped {target.name}: {error}", flush=True)


def _beside(
    results: Results,
    plan: Plan,
    ability: str,
    wanted: dict[str, Measure],
    upstream: targets.Upstream,
    workers: int,
) -> None:
    """Figures with an upstream or a number of workers of their own, of the peers that can."""
    for number in range(min(plan.rounds, _SOME)):
        for peer in plan.peers:
            target = targets.Target(peer, upstream, workers)
            if peer in results.skipped or peer == targets.DIRECT or not target.can(ability):
                continue
            print(f"{ability} {number + 1}/{min(plan.rounds, _SOME)}  {peer}", flush=True)
            _visit(results, target, plan.length, wanted, start=False)


#: Where each may be asked for its retries; Headrace runs open, which changes nothing about them.
_RETRIES = {"headrace-full": "headrace", "nginx": "nginx", "direct": "direct"}


def _retries(results: Results, plan: Plan) -> None:
    requests = 300 if plan.length is measures.QUICK else 2000
    for peer, name in _RETRIES.items():
        if peer in plan.peers and peer not in results.skipped:
            print(f"retries  {peer}", flush=True)
            for share in retries.SHARES:
                outcome = asyncio.run(retries.success_rate(requests, share, name))
                results.add(peer, {f"retry_{share:.0%}".rstrip("%") + "_percent": outcome["success_percent"]})


def ratios(document: dict[str, Any], peer: str, base: str, figure: str) -> list[float]:
    """Round by round, so that what slowed a whole round down cancels out."""
    both = (_values(document, name, figure) for name in (peer, base))
    return [mine / theirs for mine, theirs in zip(*both, strict=False) if theirs]


def _values(document: dict[str, Any], peer: str, figure: str) -> Iterable[float]:
    found = document["peers"].get(peer, {}).get("figures", {}).get(figure, {})
    values: list[float] = found.get("values", [])
    return values
