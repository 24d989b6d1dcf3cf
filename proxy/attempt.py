"""One try at one upstream: what it takes, how it waits for its first byte, and what it reports.

Every try ends in `close`, which reports once: to the breaker, to the metrics, to the pool of credentials.
"""

from __future__ import annotations

import time
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from proxy import answers, retry
from proxy.breaker import Outcome, State, outcome_of_error, outcome_of_status
from proxy.errors import Reason, UpstreamCut, UpstreamFailed, UpstreamRefusedUs
from proxy.headers import RawHeaders, value_of
from proxy.peek import with_model
from proxy.routing import RESTING_STATUSES
from proxy.wire import HELD_LIMIT
from proxy.wire_connection import End

if TYPE_CHECKING:
    from proxy.metrics import Metrics
    from proxy.reshape import Reshape
    from proxy.targets import Target
    from proxy.uploads import Upload

#: By these names: a member that is looked up in its class costs 0.1 us (Python 3.11), a global a twentieth.
_NEUTRAL, _FAILURE, _CLOSED = Outcome.NEUTRAL, Outcome.FAILURE, State.CLOSED
_COMPLETE = Reason.COMPLETE
#: Attempts whose caller has gone are no verdict on the upstream.
_CANCELLED = "cancelled"
#: What else an attempt comes to whose answer went to the caller, by how the request ended.
_RESULTS = {
    Reason.UPSTREAM_STALL: "timeout",
    Reason.DEADLINE: "timeout",
    Reason.UPSTREAM_CUT: "reset",
    Reason.UPSTREAM_ERROR: "status",  # an error that calls itself a success
    Reason.CLIENT_GONE: _CANCELLED,
}
#: The ends that are the upstream's failure.
_BREAKS = frozenset({Reason.UPSTREAM_STALL, Reason.UPSTREAM_CUT})


class Job(msgspec.Struct):
    """What is to be asked: the same for every attempt, but for the model's name.

    model: as the caller wrote it; None where the route has none.
    reshape: what happens to the answer; None: it is passed on as it is.
    """

    method: str
    path: str
    fields: bytes
    body: bytes | Upload
    model: str | None
    wants_stream: bool = False
    reshape: Reshape | None = None
    hedge_after_s: float | None = None

    def body_for(self, target: Target) -> bytes | Upload:
        if target.model is None or target.model == self.model:
            return self.body
        if isinstance(self.body, bytes):
            return with_model(self.body, target.model) if self.model is not None else self.body
        return self.body.with_model(target.model)

    @property
    def replayable(self) -> bool:
        return isinstance(self.body, bytes) or self.body.replayable


class WholeAnswer(msgspec.Struct, frozen=True):
    """An answer that is here to its last byte."""

    status: int
    reason: str
    fields: RawHeaders
    body: bytes


class Answered(UpstreamFailed):
    """The upstream answered with a status of `retry.statuses`. The caller only ever sees the answer itself,
    except where a stream was promised already."""

    result = "status"

    def __init__(self, answer: WholeAnswer) -> None:
        super().__init__()
        self.answer = answer


class Attempt:
    """Everything that can fail is done before the breaker is asked: leave that nobody reports on would keep
    everybody else out.

    admitted: the breaker lets it pass, and `close` is owed."""

    __slots__ = (
        "_key",
        "_leave",
        "_metrics",
        "_result",
        "_unjudged",
        "admitted",
        "exchange",
        "target",
        "upstream",
    )

    def __init__(self, job: Job, target: Target, metrics: Metrics, now: float, *, fresh: bool) -> None:
        self.target = target
        self.upstream = upstream = target.upstream
        self._metrics = metrics
        self._result = _CANCELLED
        self._unjudged = True
        self._key = key = upstream.take_key(now)
        body = job.body if target.model is None else job.body_for(target)
        self.exchange = exchange = upstream.exchange(job.method, job.path, job.fields, body, key)
        if fresh:
            exchange.fresh = True
        self._leave = leave = upstream.breaker.admit(now)
        self.admitted = leave is not None
        if leave is not None:
            upstream.in_flight += 1

    # ── the answer's beginning ───────────────────────────────────────────────────────────────────────────

    async def refuse(self, until: float) -> None:
        """Its status may be tried again: raises Answered, with the whole answer, if that is small."""
        exchange = self.exchange
        if not await exchange.hold(HELD_LIMIT, min(monotonic() + self.upstream.timeouts.idle, until)):
            return
        _, end = exchange.look()
        if end is None:
            return
        body, end = exchange.taken()
        if end is End.CUT:
            raise UpstreamCut
        body = answers.checked_body(exchange.status, body)
        raise Answered(WholeAnswer(exchange.status, exchange.reason, exchange.fields, body))

    # ── what it says about the upstream ──────────────────────────────────────────────────────────────────

    def answered(self) -> None:
        """The first byte is here."""
        status = self.exchange.status
        self._record(outcome_of_status(status, self.upstream.settings.breaker.statuses))
        if status in RESTING_STATUSES:
            self.upstream.rest_key(self._key, self._retry_after_s(), monotonic())

    def failed(self, error: UpstreamFailed) -> None:
        self._result = error.result
        if not self._has_error_status:
            self._record(outcome_of_error(error))

    def delivered(self, reason: Reason) -> None:
        """Its answer went to the caller, as far as it went; reason: how the request ended."""
        status = self.exchange.status
        if status >= 500 or status == 429:
            self._result = "status"
        elif reason is _COMPLETE:  # nearly always
            self._result = "ok"
            return
        else:
            self._result = _RESULTS.get(reason, "ok")
        if reason in _BREAKS and not self._has_error_status:
            self._record(_FAILURE)

    @property
    def _has_error_status(self) -> bool:
        """Then `answered` has judged it: what becomes of the body changes nothing, and counts no second
        time."""
        return not self._unjudged and self.exchange.status >= 400

    def close(self) -> None:
        """Ends the exchange, and gives everything back. A second call does nothing."""
        if not self.admitted:
            return
        self.admitted = False
        self.exchange.close()
        self.upstream.in_flight -= 1
        if self._unjudged:
            self._record(_NEUTRAL)
        self._metrics.upstream_attempts.add((self.upstream.name, self._result))

    def _record(self, outcome: Outcome) -> None:
        assert self._leave is not None
        self._unjudged = False
        breaker = self.upstream.breaker
        if outcome is _FAILURE or breaker.state is not _CLOSED:  # nothing else means anything to a closed one
            breaker.record(self._leave, outcome, monotonic())

    # ── again? ───────────────────────────────────────────────────────────────────────────────────────────

    def failure(self, job: Job, error: UpstreamFailed, *, stale_before: bool) -> retry.Failure:
        """What `retry` has to know of it."""
        exchange = self.exchange
        answered = isinstance(error, Answered)
        resting = exchange.status in RESTING_STATUSES and isinstance(error, (Answered, UpstreamRefusedUs))
        return retry.Failure(
            kind=retry.Kind.STATUS if answered else retry.kind_of(error),
            method=job.method,
            status=exchange.status,
            retry_after_s=self._retry_after_s() if answered else None,
            final=answered and value_of(exchange.fields, b"x-should-retry") == b"false",
            spare_credential=resting and self.upstream.spare_key(monotonic()),
            stale_before=stale_before,
            replayable=job.replayable,
        )

    def _retry_after_s(self) -> float | None:
        fields = self.exchange.fields
        after, after_ms = value_of(fields, b"retry-after"), value_of(fields, b"retry-after-ms")
        return retry.parse_retry_after(after, after_ms, time.time()) if after or after_ms else None
