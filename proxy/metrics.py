"""Every metric, named once.

Values are plain numbers in plain dicts, keyed by label tuples: adding to one costs 0.2 us where
prometheus-client's `labels().inc()` costs 1.7, and a snapshot of a whole process is one object that can be
sent to another process and summed there. prometheus-client renders the page (and negotiates its format).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from proxy.errors import Reason
from proxy.ledger_row import RowSink
from proxy.outcome import Outcome

_PREFIX = "headrace_"
Labels = tuple[str, ...]
#: The metrics of a process as plain data: attribute -> (labels, value), a histogram's value is its row.
Snapshot = dict[str, list[tuple[Labels, float | list[float]]]]

_DURATION = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_FIRST_MS = (5, 10, 25, 50, 100, 150, 200, 300, 400, 500, 750, 1000, 1500, 2000, 3000, 5000, 7500)
_FIRST = (*(ms / 1000 for ms in _FIRST_MS), 10, 15, 20, 30, 60, 120)
_OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)
#: Gaps between chunks: powers of two of 0.1 ms, so that a gap's bucket is one `bit_length`.
GAPS = tuple(0.0001 * 2**power for power in range(20))
GAP_UNITS_PER_SECOND = 10_000.0


class Counter:
    """Only ever grows."""

    kind = "counter"

    def __init__(self, name: str, help_text: str, labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.labels = f"{_PREFIX}{name}", help_text, tuple(labels)
        self.values: defaultdict[Labels, float] = defaultdict(int)

    def add(self, labels: Labels = (), amount: float = 1) -> None:
        self.values[labels] += amount

    def absorb(self, labels: Labels, value: float | list[float]) -> None:
        assert not isinstance(value, list)
        self.add(labels, value)

    def family(self) -> Metric:
        family = CounterMetricFamily(self.name, self.help, labels=self.labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


class Gauge(Counter):
    """A level: goes up and down; a negative `amount` takes away."""

    kind = "gauge"

    def set(self, labels: Labels, value: float) -> None:
        self.values[labels] = value

    def family(self) -> Metric:
        family = GaugeMetricFamily(self.name, self.help, labels=self.labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


class Summed(Gauge):
    """A level whose sum over all labels is asked for all the time."""

    def __init__(self, name: str, help_text: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, help_text, labels)
        self.total: float = 0

    def add(self, labels: Labels = (), amount: float = 1) -> None:
        self.values[labels] += amount
        self.total += amount

    def set(self, labels: Labels, value: float) -> None:
        self.add(labels, value - self.values[labels])


class Least(Gauge):
    """A level that is as low for all processes as for the worst of them."""

    def absorb(self, labels: Labels, value: float | list[float]) -> None:
        assert not isinstance(value, list)
        self.set(labels, min(value, self.values.get(labels, value)))


class Most(Gauge):
    """A level that is as high for all processes as for the worst of them."""

    def absorb(self, labels: Labels, value: float | list[float]) -> None:
        assert not isinstance(value, list)
        self.set(labels, max(value, self.values.get(labels, value)))


class Histogram:
    """Counts per bucket (the last one is +Inf), and the sum; not cumulative until it is rendered."""

    kind = "histogram"

    def __init__(
        self, name: str, help_text: str, labels: Sequence[str] = (), buckets: Sequence[float] = _DURATION
    ) -> None:
        self.name, self.help, self.labels = f"{_PREFIX}{name}", help_text, tuple(labels)
        self.buckets = tuple(map(float, buckets))  # compared with a float, an integer is converted first
        self.values: dict[Labels, list[float]] = {}

    def observe(self, labels: Labels, value: float) -> None:
        row = self.values.get(labels) or self.row(labels)  # nearly always it is there
        row[bisect_left(self.buckets, value)] += 1
        row[-1] += value

    def absorb(self, labels: Labels, value: float | list[float]) -> None:
        assert isinstance(value, list)
        row = self.row(labels)
        for at, count in enumerate(value):
            row[at] += count

    def row(self, labels: Labels) -> list[float]:
        """Counts and sum, for who counts by himself."""
        row = self.values.get(labels)
        if row is None:
            row = self.values[labels] = self.new_row()
        return row

    def new_row(self) -> list[float]:
        return [0] * (len(self.buckets) + 2)

    def family(self) -> Metric:
        family = HistogramMetricFamily(self.name, self.help, labels=self.labels)
        bounds = [*(f"{bound:.12g}" for bound in self.buckets), "+Inf"]
        for labels, row in self.values.items():
            running, cumulative = 0.0, []
            for bound, count in zip(bounds, row, strict=False):
                running += count
                cumulative.append((bound, running))
            family.add_metric(labels, cumulative, row[-1])
        return family


class Metrics:
    """The metrics of one process (contract section 7; that page fixes the names)."""

    def __init__(self, version: str) -> None:
        self.requests = Counter(
            "requests_total",
            "Requests by how they ended.",
            ("route", "model", "upstream", "code", "reason"),
        )
        self.requests_in_flight = Gauge("requests_in_flight", "Requests being handled.", ("route",))
        self.streams_active = Summed("streams_active", "Event streams being delivered.", ("upstream",))
        self.request_duration = Histogram(
            "request_duration_seconds", "From head to last byte.", ("route", "upstream")
        )
        self.time_to_first_byte = Histogram(
            "time_to_first_byte_seconds",
            "From the request's head to the upstream's first byte.",
            ("upstream",),
            _FIRST,
        )
        self.time_to_first_token = Histogram(
            "time_to_first_token_seconds",
            "From the request's head to the first content, reasoning or tool call.",
            ("model", "upstream"),
            _FIRST,
        )
        self.inter_chunk = Histogram(
            "inter_chunk_seconds", "Every gap between two reads of a stream.", ("upstream",), GAPS
        )
        self.overhead = Histogram(
            "overhead_seconds",
            "From the request's head to its departure upstream, less waiting in the queue.",
            (),
            _OVERHEAD,
        )
        self.tokens = Counter("tokens_total", "Tokens that were reported or estimated.", ("model", "type"))
        self.cost_usd = Counter("cost_usd_total", "US dollars that requests have cost.", ("model",))
        self.response_bytes = Counter("response_bytes_total", "Bytes of answers delivered to callers.")
        self.upstream_attempts = Counter(
            "upstream_attempts_total", "Attempts by result.", ("upstream", "result")
        )
        self.upstream_in_flight = Gauge("upstream_in_flight", "Requests at an upstream.", ("upstream",))
        self.upstream_available = Least(
            "upstream_available", "1 while an upstream is healthy and not full.", ("upstream",)
        )
        self.breaker_state = Most("breaker_state", "0 closed, 1 half-open, 2 open.", ("upstream",))
        self.heartbeats = Counter("heartbeats_total", "Comments sent while an upstream was silent.")
        self.transparency_mismatches = Counter(
            "transparency_mismatch_total",
            "Streams of `streams.verify_sample` whose caller got other bytes than their upstream sent.",
        )
        self.client_disconnects = Counter(
            "client_disconnects_total", "Callers that left before the end.", ("phase",)
        )
        self.limit_decisions = Counter(
            "limit_decisions_total", "Decisions about limits.", ("scope", "result")
        )
        self.queue_depth = Gauge("queue_depth", "Requests that wait for a slot.", ("plan",))
        self.queue_wait = Histogram(
            "queue_wait_seconds", "Waiting for a slot, of requests that had to.", ("plan",), _FIRST
        )
        self.state_store_up = Least("state_store_up", "1 while the store of limits answers.")
        self.ledger_rows = Counter("ledger_rows_total", "Rows handed to the ledger.")
        self.ledger_pending = Gauge("ledger_pending", "Rows of the ledger that are not yet in its file.")
        self.ledger_dropped = Counter("ledger_dropped_total", "Rows that the ledger lost.")
        self.start_time = Least("start_time_seconds", "When these counters began, seconds since the epoch.")
        self.event_loop_lag = Histogram(
            "event_loop_lag_seconds", "How late a timer of the event loop fired.", (), _OVERHEAD
        )
        self.log_dropped = Counter("log_lines_dropped_total", "Log lines that no sink took.")
        self.config_reloads = Counter("config_reloads_total", "Reloads by result.", ("result",))
        self.workers_replaced = Counter("workers_replaced_total", "Workers that died or hung.")
        self._outcomes: dict[tuple[str, str | None, str | None, int, Reason], Outcome] = {}
        self._measure_processes()
        self.state_store_up.set((), 1)
        for result in ("ok", "error"):
            self.config_reloads.add((result,), 0)
        self.build_info = Gauge("build_info", "Constant 1.", ("version",))
        self.build_info.set((version,), 1)
        # Series without labels exist from the start: a rate over a missing series is no rate.
        for metric in (self.response_bytes, self.heartbeats, self.log_dropped, self.workers_replaced):
            metric.add((), 0)
        for metric in (self.ledger_rows, self.ledger_pending, self.ledger_dropped):
            metric.add((), 0)
        self.transparency_mismatches.add((), 0)

    def _measure_processes(self) -> None:
        """What `footprint` shows."""
        self.gc_pause = Histogram(
            "gc_pause_seconds", "Garbage collections: how long each stopped its process.", (), _OVERHEAD
        )
        self.gc_collections = Counter(
            "gc_collections_total", "Garbage collections, of all processes.", ("generation",)
        )
        self.cpu_seconds = Counter("process_cpu_seconds_total", "CPU time, of all processes together.")
        self.resident_memory = Gauge("process_resident_memory_bytes", "Memory, of all processes together.")
        self.open_fds = Gauge("process_open_fds", "File descriptors, of all processes together.")
        self.open_fds_ratio = Most(
            "process_open_fds_ratio", "File descriptors of their limit, in the process with the least left."
        )
        self.workers = Gauge("workers", "Processes that serve or drain.")

    def outcome(
        self, route: str, model: str | None, upstream: str | None, status: int, reason: Reason
    ) -> Outcome:
        """Of a request that has ended so; model, upstream: None if it came to none."""
        key = (route, model, upstream, status, reason)
        found = self._outcomes.get(key)
        if found is None:
            labels = (route, model or "none", upstream or "none", str(status), reason.value)
            found = self._outcomes[key] = Outcome(self, labels)
        return found

    def show_in_flight(self, routes: Iterable[str]) -> None:
        """routes: of the requests that run now. A route that was ever asked for is shown, with 0."""
        levels = self.requests_in_flight.values
        levels.update(dict.fromkeys([*levels, *[each.to_route for each in self._outcomes.values()]], 0))
        for route in routes:
            self.requests_in_flight.add((route,))

    def show_ledger(self, ledger: RowSink) -> None:
        """The figures of the way that rows take from here."""
        self.ledger_rows.values[()] = ledger.added
        self.ledger_pending.values[()] = ledger.pending
        self.ledger_dropped.values[()] = ledger.dropped

    def snapshot(self) -> Snapshot:
        """Everything as plain data, for another process."""
        return {name: list(metric.values.items()) for name, metric in self._all() if metric.values}

    def absorb(self, snapshot: Snapshot, *, levels: bool) -> None:
        """Adds another process's figures; without `levels` (it is gone) only what never goes down, and since
        when it counted."""
        for name, metric in self._all():
            passing = isinstance(metric, Gauge) and metric is not self.start_time
            if passing and not (levels and metric is not self.build_info):
                continue
            for labels, value in snapshot.get(name, ()):
                metric.absorb(labels, value)

    def _all(self) -> list[tuple[str, Counter | Histogram]]:
        for outcome in self._outcomes.values():
            outcome.show()
        return [(name, item) for name, item in vars(self).items() if isinstance(item, (Counter, Histogram))]

    def __iter__(self) -> Iterator[Counter | Histogram]:
        return iter([metric for _, metric in self._all()])


class _Collector:
    def __init__(self, metrics: Iterable[Any]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for metric in self._metrics:
            yield metric.family()


def samples(page: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """What a page in the text format says: names as they are here, labels, values. Raises ValueError."""
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            yield sample.name.removeprefix(_PREFIX), sample.labels, sample.value


def render(metrics: Iterable[Counter | Histogram], accept: str) -> tuple[bytes, str]:
    """The page and its content type, in the format that `accept` prefers."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(list(metrics)))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
