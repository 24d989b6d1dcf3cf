"""What the live view shows: one look at all processes as a document. No I/O; clocks are parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from proxy.breaker import State
from proxy.config import Config
from proxy.ledger_read import Group, Sums
from proxy.metrics import Labels, Metrics
from proxy.pricing import format_usd, usd
from proxy.usage_report import total

#: Streams in one document, the oldest first: 8,000 would be 3 MB a second for every reader.
MAX_STREAMS = 200
#: Models in the sum of today, the dearest first.
_MAX_MODELS = 5
#: Results of attempts that are the upstream's doing (`upstream_attempts_total`).
_FAILED = frozenset({"connect_error", "timeout", "reset", "status"})
#: Phases in which a request has no slot yet.
_WITHOUT_SLOT = frozenset({"body", "queue"})


class LastFailure(msgspec.Struct, frozen=True):
    """result: as in `upstream_attempts_total`. ago_s: seconds, to the look that saw it first."""

    result: str
    ago_s: float


class UpstreamNow(msgspec.Struct, frozen=True):
    """One upstream, all processes together.

    state: of its breaker, the worst of them. available: healthy and not full. limit: slots; None is the
    machine's. attempts, failed: since the counters began. last_failure: None also if nobody was looking then.
    """

    name: str
    state: str
    available: bool
    in_flight: int
    limit: int | None
    attempts: int
    failed: int
    last_failure: LastFailure | None


class LimitsNow(msgspec.Struct, frozen=True):
    """slots: requests that hold one of the machine's slots. queued: who waits, by plan. oldest_s: age of the
    request that waits longest; None: nobody does. refused: requests by the limit that refused them, since the
    counters began."""

    slots: int
    max_slots: int
    queued: dict[str, int]
    max_queued: int
    oldest_s: float | None
    max_wait_s: float
    refused: dict[str, int]


class SpendNow(msgspec.Struct, frozen=True):
    """Of the running UTC day. Dollars are exact decimals. left_out: requests whose usage or price nobody
    knows; their cost is not in the sums. models: name, cost; the dearest."""

    cost_usd: str
    requests: int
    tokens: int
    left_out: int
    models: list[tuple[str, str]]


class Document(msgspec.Struct, frozen=True):
    """running: all requests by phase, `streams` the oldest of them. spend: None while nobody knows."""

    version: str
    draining: bool
    workers: int
    running: dict[str, int]
    streams: list[dict[str, Any]]
    upstreams: list[UpstreamNow]
    limits: LimitsNow
    spend: SpendNow | None


class Failures:
    """When attempts failed last, as far as somebody was looking: the counters themselves have no times."""

    def __init__(self) -> None:
        self._counts: dict[Labels, float] = {}
        self._last: dict[str, tuple[str, float]] = {}
        self._gap = True

    def rest(self) -> None:
        """Nobody looks from now on."""
        self._gap = True

    def look(self, attempts: Mapping[Labels, float], now: float) -> None:
        """attempts: by upstream and result, since the counters began. now: seconds of any clock that does not
        go back."""
        for labels, count in attempts.items():
            upstream, result = labels
            if result not in _FAILED or count <= self._counts.get(labels, 0):
                continue
            self._counts[labels] = count
            if self._gap:
                self._last.pop(upstream, None)
            else:
                self._last[upstream] = result, now
        self._gap = False

    def last(self, upstream: str, now: float) -> LastFailure | None:
        seen = self._last.get(upstream)
        return None if seen is None else LastFailure(seen[0], round(now - seen[1], 1))


def phases(streams: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for stream in streams:
        counts[stream["phase"]] = counts.get(stream["phase"], 0) + 1
    return counts


def oldest(streams: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(streams, key=lambda each: -each["age_s"])[:MAX_STREAMS]


def upstreams(settings: Config, metrics: Metrics, failures: Failures, now: float) -> list[UpstreamNow]:
    """In the order of the configuration. `failures` has looked at these metrics."""
    attempts: dict[str, int] = {}
    failed: dict[str, int] = {}
    for (name, result), count in metrics.upstream_attempts.values.items():
        attempts[name] = attempts.get(name, 0) + int(count)
        if result in _FAILED:
            failed[name] = failed.get(name, 0) + int(count)
    return [
        UpstreamNow(
            name=name,
            state=State(int(metrics.breaker_state.values.get((name,), 0))).name.lower(),
            available=bool(metrics.upstream_available.values.get((name,), 1)),
            in_flight=int(metrics.upstream_in_flight.values.get((name,), 0)),
            limit=entry.max_in_flight,
            attempts=attempts.get(name, 0),
            failed=failed.get(name, 0),
            last_failure=failures.last(name, now),
        )
        for name, entry in settings.upstreams.items()
    ]


def limits(settings: Config, metrics: Metrics, streams: Sequence[Mapping[str, Any]]) -> LimitsNow:
    waiting = [each["age_s"] for each in streams if each["phase"] == "queue"]
    refused: dict[str, int] = {}
    for (scope, result), count in metrics.limit_decisions.values.items():
        if result == "refused" and count:
            refused[scope] = int(count)
    queue = settings.limits.queue
    return LimitsNow(
        slots=sum(each["phase"] not in _WITHOUT_SLOT for each in streams),
        max_slots=settings.limits.max_in_flight,
        queued={plan: int(depth) for (plan,), depth in metrics.queue_depth.values.items() if depth},
        max_queued=queue.max_waiting,
        oldest_s=max(waiting, default=None),
        max_wait_s=queue.max_wait,
        refused=refused,
    )


def spend(groups: Sequence[Group]) -> SpendNow:
    """groups: by model, of one day."""
    dearest = sorted(groups, key=lambda group: -group.sums.cost_picos)[:_MAX_MODELS]
    whole: Sums = total(groups)
    return SpendNow(
        cost_usd=format_usd(usd(whole.cost_picos)),
        requests=whole.requests,
        tokens=whole.prompt_tokens + whole.completion_tokens,
        left_out=whole.unknown + whole.unpriced,
        models=[(str(group.keys[0]), format_usd(usd(group.sums.cost_picos))) for group in dearest],
    )
