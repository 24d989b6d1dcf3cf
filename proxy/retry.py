"""Whether a request is tried again, after how long, and whether there is any budget left for it.

    what happened                               GET, HEAD, OPTIONS   every other method
    connect   no connection (DNS, TCP, TLS)     again                again     nothing was sent
    stale     a reused connection died, no byte fresh                fresh     once, if `stale_connection`
    reset     died after the request was sent   again                no
    timeout   no first byte in time             again                no
    status    an answer in `statuses`           again                again     the configuration says so
    credential  401, and another key is ready   again                again     it says that it did nothing
    invalid   an answer nobody can use          no                   no        the next would be the same
    deadline  the time of all attempts is over  no                   no

"No" for a POST whose bytes were sent: the upstream may still be generating, and a second attempt would be
paid twice (RFC 9110 9.2.2: a proxy must not automatically retry non-idempotent requests). DELETE and PUT are
idempotent by that section, but the answer to the second differs from the first's (404 for what was deleted),
so only the safe methods (9.2.1) are repeated unasked. A stale connection (RFC 9112 9.3.1) is pingora's
ReusedOnly: most likely it was closed while it lay idle; where it is not allowed, or happens twice, it is a
reset.

Before the table come the vetoes: nothing is tried again once a byte has gone to the caller, after `attempts`
attempts (of every kind, the stale one and those that never connected included), or when the body is a stream
that has begun to be consumed.

Waiting: another upstream is asked at once. The same one is asked again after a back-off with full jitter,
uniform in [0, min(max, base * 2**n)] (Brooker, "Exponential Backoff and Jitter", AWS 2015), or after its
Retry-After. A Retry-After beyond `max`, a wait beyond the deadline of all attempts, and `x-should-retry:
false` are not waited for: the caller gets the answer as it is.

Budget: see RetryBudget.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Callable, Container
from email.utils import parsedate_tz
from enum import StrEnum
from typing import Protocol

import msgspec

from proxy.errors import (
    UpstreamConnectFailed,
    UpstreamDeadline,
    UpstreamFailed,
    UpstreamInBand,
    UpstreamInvalid,
    UpstreamRefusedUs,
    UpstreamStale,
    UpstreamTimeout,
)

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
#: A day: nobody waits longer, and no clock arithmetic suffers from it.
_LONGEST_S = 86_400.0
_DECIMAL = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")

#: Retries at once that are always allowed, so that a proxy with little traffic retries: Envoy's
#: min_retry_concurrency. Its value of 3 refused retries that came together: of 20 requests at a time 98.0 %
#: succeeded instead of 99.2 (bench/retries.py). What bounds a storm is the share of the total.
_MIN_IN_FLIGHT = 10
#: Retries that the first requests may borrow from later ones.
_MIN_RETRIES = 10
#: Retries that good times may save up for a bad one.
_MAX_SAVED = 100


class Kind(StrEnum):
    """How an attempt failed."""

    CONNECT = "connect"
    STALE = "stale"
    RESET = "reset"
    TIMEOUT = "timeout"
    STATUS = "status"
    CREDENTIAL = "credential"
    INVALID = "invalid"
    DEADLINE = "deadline"


class Verdict(StrEnum):
    """NO: the failure is what the caller gets. AGAIN: another upstream, or this one after a wait.
    FRESH: this upstream at once, on a new connection."""

    NO = "no"
    AGAIN = "again"
    FRESH = "fresh"


#: (safe methods, every other method): the table above.
TABLE: dict[Kind, tuple[Verdict, Verdict]] = {
    Kind.CONNECT: (Verdict.AGAIN, Verdict.AGAIN),
    Kind.STALE: (Verdict.FRESH, Verdict.FRESH),
    Kind.RESET: (Verdict.AGAIN, Verdict.NO),
    Kind.TIMEOUT: (Verdict.AGAIN, Verdict.NO),
    Kind.STATUS: (Verdict.AGAIN, Verdict.AGAIN),
    Kind.CREDENTIAL: (Verdict.AGAIN, Verdict.AGAIN),
    Kind.INVALID: (Verdict.NO, Verdict.NO),
    Kind.DEADLINE: (Verdict.NO, Verdict.NO),
}


class Policy(Protocol):
    """`retry` of the configuration; durations in seconds."""

    @property
    def attempts(self) -> int: ...
    @property
    def base(self) -> float: ...
    @property
    def max(self) -> float: ...
    @property
    def statuses(self) -> Container[int]: ...
    @property
    def stale_connection(self) -> bool: ...


class Failure(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A failed attempt, as far as it matters here.

    status: of kind STATUS.
    retry_after_s: what the answer asked for (`parse_retry_after`).
    final: the answer said `x-should-retry: false`, so this upstream is not asked again.
    spare_credential: another key of this upstream is ready (`routing.Rotation.spare`).
    stale_before: this request has already been repeated because of a stale connection.
    replayable: the whole body is still here.
    committed: a byte of an answer has gone to the caller.
    """

    kind: Kind
    method: str
    status: int = 0
    retry_after_s: float | None = None
    final: bool = False
    spare_credential: bool = False
    stale_before: bool = False
    replayable: bool = True
    committed: bool = False


def may_retry(failure: Failure, attempts: int, policy: Policy) -> Verdict:
    """The table. `attempts`: how many this request has made, this one included."""
    kind = failure.kind
    if failure.committed or attempts >= policy.attempts:
        return Verdict.NO
    if not failure.replayable and kind is not Kind.CONNECT:
        return Verdict.NO
    if kind is Kind.STATUS and failure.status not in policy.statuses:
        return Verdict.NO
    if kind is Kind.CREDENTIAL and not failure.spare_credential:
        return Verdict.NO
    if kind is Kind.STALE and (failure.stale_before or not policy.stale_connection):
        kind = Kind.RESET
    return TABLE[kind][failure.method not in _SAFE_METHODS]


def kind_of(error: UpstreamFailed) -> Kind:
    """The kind of an attempt that ended in one of our errors; an answer with a status is Kind.STATUS."""
    for error_type, kind in _KINDS:
        if isinstance(error, error_type):
            return kind
    return Kind.RESET


#: In this order: UpstreamDeadline is an UpstreamTimeout.
_KINDS: tuple[tuple[type[UpstreamFailed], Kind], ...] = (
    (UpstreamConnectFailed, Kind.CONNECT),
    (UpstreamStale, Kind.STALE),
    (UpstreamDeadline, Kind.DEADLINE),
    (UpstreamTimeout, Kind.TIMEOUT),
    (UpstreamRefusedUs, Kind.CREDENTIAL),
    (UpstreamInvalid, Kind.INVALID),
    (UpstreamInBand, Kind.INVALID),
)


# ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────


def backoff_s(retry: int, policy: Policy, rng: Callable[[], float]) -> float:
    """Full jitter before the retry with this number, from 0; `rng` is uniform in [0, 1)."""
    return rng() * min(policy.max, policy.base * 2.0 ** min(retry, 63))


def wait_s(
    failure: Failure, retry: int, policy: Policy, rng: Callable[[], float], left_s: float
) -> float | None:
    """Seconds before the upstream that has just failed is asked again; None: it is not.

    `left_s`: until the deadline over all attempts; an attempt that could only begin after it is none.
    """
    if failure.spare_credential:
        return 0.0 if left_s > 0 else None  # the rest is that of the other key
    if failure.final:
        return None
    asked_s = failure.retry_after_s
    if asked_s is None:
        wait = backoff_s(retry, policy, rng)
    elif asked_s <= policy.max:
        wait = asked_s + backoff_s(0, policy, rng)  # jitter on top: all that were refused are told the same
    else:
        return None
    return wait if wait < left_s else None


def parse_retry_after(after: bytes | None, after_ms: bytes | None, wall_now: float) -> float | None:
    """Seconds that `Retry-After` or `retry-after-ms` ask for, in [0, a day]; None if neither can be read.

    The milliseconds win, as in the SDKs of OpenAI and Anthropic; fractions of seconds are read, as there. A
    date (RFC 9110 5.6.7, all three forms) counts from `wall_now`, in seconds since the epoch."""
    ms = _decimal(after_ms)
    if ms is not None:
        return min(ms / 1000, _LONGEST_S)
    seconds = _decimal(after)
    if seconds is None:
        at = _http_date(after)
        seconds = None if at is None else max(at - wall_now, 0.0)
    return None if seconds is None else min(seconds, _LONGEST_S)


def _decimal(value: bytes | None) -> float | None:
    """float() alone takes `nan`, `-1`, `1_0`, `1e9` and other scripts' digits."""
    text = (value or b"").decode("latin-1").strip(" \t")
    return float(text) if _DECIMAL.fullmatch(text) else None


def _http_date(value: bytes | None) -> float | None:
    """Seconds since the epoch."""
    try:
        fields = parsedate_tz((value or b"").decode("latin-1"))
        return None if fields is None else float(calendar.timegm(fields[:9]) - (fields[9] or 0))
    except (ValueError, TypeError, LookupError, OverflowError):  # what an upstream may write into a date
        return None


# ── budget ──────────────────────────────────────────────────────────────────────────────────────────────


class RetryBudget:
    """Retries as a share of requests, so that they cannot multiply a provider's trouble.

        retries at once   <= max(10, share * requests in flight)
        retries in total  <= max(10, share * requests in total)

    Counted as a retry is every attempt after the first that *reached* an upstream: what hits an upstream is
    requests plus retries. So from `10 / share` requests on (50 at 0.2), in any order and any interleaving,

        hits <= (1 + share) * requests

    holds at every instant, not only on average. An attempt that never connected has hit nothing, and the next
    one takes its place: failover after a connect failure is free. The stale-connection retry is not: its
    first request may have been read.

    The first requests borrow their retries from later ones (a lone request is retried), and good times save
    up at most 100 for a bad one: beyond that requests stop counting. No clock: a quiet proxy earns by its
    requests, like a busy one. One budget belongs to one process; a share of 0 allows no retry that costs.
    """

    def __init__(
        self, share: float, *, min_in_flight: int = _MIN_IN_FLIGHT, min_retries: int = _MIN_RETRIES
    ) -> None:
        self._share = share
        self._min_in_flight = min_in_flight
        self._min_retries = min_retries
        self._requests = 0
        self._retries = 0
        self.in_flight = 0
        self.retries_in_flight = 0

    def open(self) -> Account:
        """A request begins: its account, which it closes when it ends."""
        self.in_flight += 1
        if self._share * self._requests - self._retries < _MAX_SAVED:
            self._requests += 1
        return Account(self)

    def _take(self) -> bool:
        at_once = max(self._min_in_flight, self._share * self.in_flight)
        in_total = max(self._min_retries, self._share * self._requests)
        full = self.retries_in_flight + 1 > at_once or self._retries + 1 > in_total
        if full or self._share <= 0:
            return False
        self.retries_in_flight += 1
        self._retries += 1
        return True

    def _give_back(self, *, used: bool) -> None:
        self.retries_in_flight -= 1
        if not used:
            self._retries -= 1


class _Held(StrEnum):
    """What an account holds of the budget."""

    NOTHING = "nothing"
    TRYING = "trying"  # a retry that waits or is under way
    UNUSED = "unused"  # a retry whose attempt reached no upstream


#: By these names: a member that is looked up in its class costs 0.1 us (Python 3.11), a global a twentieth.
_NOTHING, _TRYING, _UNUSED = _Held.NOTHING, _Held.TRYING, _Held.UNUSED


class Account(msgspec.Struct, eq=False):
    """One request's dealings with the budget: `take` before each attempt (and before its back-off),
    `give_back`
    when that attempt's verdict is known (its first byte, or its failure), `close` in a finally."""

    _budget: RetryBudget
    _reached: bool = False
    _held: _Held = _NOTHING
    _open: bool = True

    def take(self) -> bool:
        """Whether an attempt may be made. Always, as long as none has reached an upstream."""
        if self._held is _NOTHING and self._reached:
            if not self._budget._take():
                return False
            self._held = _TRYING
        elif self._held is _UNUSED:
            self._held = _TRYING
        return True

    def give_back(self, *, reached: bool) -> None:
        """The attempt's verdict is known: the retry is no longer in flight, even if its answer streams on.
        `reached`: bytes of the request may have got to an upstream. If none have, the retry stays here for
        the next attempt. Cancelled before it was sent, in the back-off say, is not reached."""
        if reached:
            self._reached = True
        if self._held is not _TRYING:
            return
        if reached:
            self._budget._give_back(used=True)
            self._held = _NOTHING
        else:
            self._held = _UNUSED

    def close(self) -> None:
        """The request ends. An attempt without a verdict counts as one that reached. A second call does
        nothing."""
        if not self._open:
            return
        self._open = False
        if self._held is not _NOTHING:
            self._budget._give_back(used=self._held is _TRYING)
            self._held = _NOTHING
        self._budget.in_flight -= 1
