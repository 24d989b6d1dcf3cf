"""What the end of a request adds to the metrics, summed up until somebody reads them."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from proxy.pricing import PICOS_PER_USD

if TYPE_CHECKING:
    from proxy.ledger_row import Row
    from proxy.metrics import Histogram, Labels, Metrics


class Series:
    """One row of a histogram, for who adds to it again and again: nothing has to be looked up. It begins with
    its first value."""

    __slots__ = ("_bounds", "_histogram", "_labels", "_row")

    def __init__(self, histogram: Histogram, labels: Labels) -> None:
        self._histogram, self._labels, self._bounds = histogram, labels, histogram.buckets
        self._row: list[float] | None = None

    def observe(self, value: float) -> None:
        row = self._row
        if row is None:
            row = self._row = self._histogram.row(self._labels)
        row[bisect_left(self._bounds, value)] += 1
        row[-1] += value


class Outcome:
    """Requests that ended alike: what the end of one adds to. Adding to a number here costs a tenth of a look
    into a dict by five labels; `show` adds the sums to the metrics, before anybody reads them.

    As many as `requests_total` has series, and as long-lived: labels are from closed sets, and what was
    counted stays. A series begins when something is counted in it, no sooner.
    """

    __slots__ = (
        "_labels",
        "_metrics",
        "_spent",
        "bytes_out",
        "cached",
        "completion",
        "cost_picos",
        "duration",
        "first_byte",
        "first_token",
        "model",
        "overhead",
        "prompt",
        "reason",
        "reasoning",
        "requests",
        "to_route",
        "upstream",
    )

    def __init__(self, metrics: Metrics, labels: Labels) -> None:
        """labels: of `requests_total`."""
        route, self.model, self.upstream, _, self.reason = self._labels = labels
        self._metrics = metrics
        self.to_route = (route,)
        self.duration = Series(metrics.request_duration, (route, self.upstream))
        self.overhead = Series(metrics.overhead, ())
        self.first_byte = Series(metrics.time_to_first_byte, (self.upstream,))
        self.first_token = Series(metrics.time_to_first_token, (self.model, self.upstream))
        self._begin()

    def _begin(self) -> None:
        """Since the metrics were told."""
        self.requests = self.bytes_out = 0
        self.prompt = self.cached = self.completion = self.reasoning = 0
        self._spent = False
        self.cost_picos: int | None = None  # not known of any of them

    def spend(self, row: Row) -> None:
        """What the row of such a request says: these counters are proved against the rows. Its usage is
        known."""
        self._spent = True
        self.prompt += row.prompt_tokens
        self.cached += row.cached_tokens
        self.completion += row.completion_tokens
        self.reasoning += row.reasoning_tokens
        cost = row.cost_picos
        if cost is not None:
            self.cost_picos = cost + (self.cost_picos or 0)

    def show(self) -> None:
        """Tells the metrics what has come since it was last called."""
        metrics, model = self._metrics, self.model
        if self.requests:
            metrics.requests.add(self._labels, self.requests)
            metrics.response_bytes.add((), self.bytes_out)
        if self._spent:
            metrics.tokens.add((model, "prompt"), self.prompt)
            metrics.tokens.add((model, "cached"), self.cached)
            metrics.tokens.add((model, "completion"), self.completion)
            metrics.tokens.add((model, "reasoning"), self.reasoning)
        if self.cost_picos is not None:
            metrics.cost_usd.add((model,), self.cost_picos / PICOS_PER_USD)
        self._begin()
