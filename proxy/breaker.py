"""The circuit breaker of one upstream: whether it is asked at all, learned from traffic alone.

    state      event    next       what happened
    closed     ok       closed     an answer
    closed     neutral  closed     the caller left, a 4xx, a 429 of one caller: no verdict on the upstream
    closed     failure  closed     not yet `failures` of them within `window`
    closed     tripped  open       the failure that makes it `failures` within `window`: ejection
    open       cooled   half-open  the ejection is over and a request asks: it becomes the trial
    half-open  ok       closed     the trial's verdict; nothing of the past counts any more
    half-open  neutral  half-open  the trial gave no verdict: the next request is the trial
    half-open  failure  open       ejected again, for twice as long

What is not in the table cannot happen, or comes from an attempt that began in an earlier state and is
dropped.

- Half-open lets exactly one request through; everybody else is refused until its outcome is recorded.
- An ejection lasts `cool_down`, doubled with each one after it, at most `max_cool_down`. It starts over at
  `cool_down` after a period of health: closed for as long as the last ejection, and for `window`.
- Of a pool at most half is ejected, rounded down, but one always may be (Envoy's max_ejection_percent, whose
  first ejection is always allowed too): a pool of one opens, of two and three one opens, of four two.
  Half-open counts as ejected. An upstream in several pools has to be allowed in each of them. Where it is not
  allowed, it stays closed, keeps its failures, and asks again with the next one.
- Nothing here waits and nothing expires by itself: an open breaker without traffic stays open, which costs
  its first request nothing but being the trial.

A failure counts whatever succeeds beside it (nginx's max_fails, Caddy's fail_duration).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable
from enum import IntEnum, StrEnum
from typing import Protocol

from proxy.errors import UpstreamDeadline, UpstreamFailed, UpstreamInBand, UpstreamRefusedUs, UpstreamStale

#: How soon to ask again while a trial is under way: its verdict may come at any moment.
_TRIAL_WAIT_S = 1.0
#: Failures that say nothing about the upstream's health: a connection that was closed while it lay idle, our
#: own credential, the caller's total deadline, an error that calls itself a success.
_NO_VERDICT = (UpstreamStale, UpstreamRefusedUs, UpstreamDeadline, UpstreamInBand)


class State(IntEnum):
    """The values of the metric `breaker_state`."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Outcome(StrEnum):
    """What an attempt says about its upstream."""

    OK = "ok"
    NEUTRAL = "neutral"
    FAILURE = "failure"


#: By these names: a member that is looked up in its class costs 0.1 us (Python 3.11), a global a twentieth.
_CLOSED = State.CLOSED
_OK, _NEUTRAL, _FAILURE = Outcome.OK, Outcome.NEUTRAL, Outcome.FAILURE


class Event(StrEnum):
    """What moves a breaker: an outcome, or what it amounts to."""

    OK = "ok"
    NEUTRAL = "neutral"
    FAILURE = "failure"
    TRIPPED = "tripped"
    COOLED = "cooled"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.CLOSED, Event.OK): State.CLOSED,
    (State.CLOSED, Event.NEUTRAL): State.CLOSED,
    (State.CLOSED, Event.FAILURE): State.CLOSED,
    (State.CLOSED, Event.TRIPPED): State.OPEN,
    (State.OPEN, Event.COOLED): State.HALF_OPEN,
    (State.HALF_OPEN, Event.OK): State.CLOSED,
    (State.HALF_OPEN, Event.NEUTRAL): State.HALF_OPEN,
    (State.HALF_OPEN, Event.FAILURE): State.OPEN,
}


class Settings(Protocol):
    """`upstreams.x.breaker` of the configuration; durations in seconds."""

    @property
    def failures(self) -> int: ...
    @property
    def window(self) -> float: ...
    @property
    def cool_down(self) -> float: ...
    @property
    def max_cool_down(self) -> float: ...


class Pass:
    """Leave to make one attempt. Its identity is all it has: it tells the trial from everybody else, and the
    attempts of this closed period from those of an earlier one."""

    __slots__ = ()


class Breaker:
    """One upstream's breaker. `now` is in seconds of any clock that never goes back.

    `pools`: the pools that its upstream belongs to, each with all its breakers, set once all of them are
    built. Empty is a pool of its own."""

    __slots__ = (
        "_closed_at",
        "_ejection_s",
        "_ejections",
        "_failed_at",
        "_open_until",
        "_pass",
        "_settings",
        "_trial",
        "pools",
        "state",
    )

    def __init__(self, settings: Settings) -> None:
        self.state = State.CLOSED
        self.pools: tuple[tuple[Breaker, ...], ...] = ()
        self._settings = settings
        self._failed_at: deque[float] = deque(maxlen=settings.failures)
        self._pass = Pass()  # of this closed period
        self._trial: Pass | None = None
        self._closed_at = 0.0
        self._open_until = 0.0
        self._ejections = 0  # in a row
        self._ejection_s = 0.0  # the last one's length

    def available(self, now: float) -> bool:
        """Whether `admit` would let a request pass. A look: it changes nothing."""
        if self.state is _CLOSED:
            return True
        if self.state is State.OPEN:
            return now >= self._open_until
        return self._trial is None

    def admit(self, now: float) -> Pass | None:
        """Leave to make an attempt, or None. Whoever gets it owes `record` an outcome, however the attempt
        ends: a trial without one would keep everybody else out."""
        if self.state is _CLOSED:
            return self._pass
        if not self.available(now):
            return None
        if self.state is State.OPEN:
            self._move(Event.COOLED, now)
        self._trial = Pass()
        return self._trial

    def record(self, leave: Pass, outcome: Outcome, now: float) -> None:
        """The verdict on an attempt: ok with the first byte of its answer, so that a long stream does not
        keep
        the trial; a stream that is cut later is a failure on top of that."""
        if leave is self._trial:
            self._trial = None
            if outcome is _OK:
                self._pass = leave  # a stream that begins the closed period may still be cut in it
            self._move(Event(outcome), now)
        elif leave is self._pass and outcome is _FAILURE:  # nothing else means anything to a closed one
            self._move(self._counted(now), now)

    def retry_after_s(self, now: float) -> float:
        """Seconds until a request may pass: 0 if one may now."""
        if self.available(now):
            return 0.0
        return _TRIAL_WAIT_S if self.state is State.HALF_OPEN else self._open_until - now

    def _counted(self, now: float) -> Event:
        failed_at = self._failed_at
        failed_at.append(now)  # drops the oldest: only the last `failures` can ever matter
        full = len(failed_at) == failed_at.maxlen and now - failed_at[0] <= self._settings.window
        return Event.TRIPPED if full and self._may_open() else Event.FAILURE

    def _may_open(self) -> bool:
        return all(may_eject(pool, self) for pool in self.pools)

    def _move(self, event: Event, now: float) -> None:
        before, self.state = self.state, TRANSITIONS[self.state, event]
        if self.state is before:
            return
        if self.state is State.OPEN:
            self._eject(before, now)
        elif self.state is State.CLOSED:
            self._failed_at.clear()
            self._closed_at = now

    def _eject(self, before: State, now: float) -> None:
        settings = self._settings
        healthy_s = now - self._closed_at
        if before is State.CLOSED and healthy_s >= max(settings.window, self._ejection_s):
            self._ejections = 0
        doubled_s = settings.cool_down * 2.0 ** min(self._ejections, 63)
        self._ejections += 1
        self._ejection_s = min(doubled_s, settings.max_cool_down)
        self._open_until = now + self._ejection_s
        self._pass = Pass()  # attempts that began before the ejection have nothing more to say


def may_eject(pool: Iterable[Breaker], breaker: Breaker) -> bool:
    """Whether one more of this pool may be ejected: see the rule above. A breaker that is listed twice (one
    upstream under two names of a model) is one."""
    members = {*pool, breaker}
    ejected = sum(other.state is not State.CLOSED for other in members if other is not breaker)
    return ejected < max(1, len(members) // 2)


def soonest_s(breakers: Iterable[Breaker], now: float) -> float:
    """Seconds until the first of them lets a request pass: the Retry-After of `no_upstream_available`, which
    whoever prints it rounds up to at least 1 (SDKs take 0 for no wait at all, or for no answer)."""
    return min((breaker.retry_after_s(now) for breaker in breakers), default=0.0)


def outcome_of_status(status: int, statuses: Container[int]) -> Outcome:
    """The outcome of an answer; `statuses` is the configuration's list of those that count as failures."""
    if status < 400:  # of which the list has none
        return _OK
    return _FAILURE if status in statuses else _NEUTRAL


def outcome_of_error(error: UpstreamFailed) -> Outcome:
    """The outcome of an attempt without an answer: connect failures, timeouts, breaks. What ends an attempt
    from our side (the caller leaves, a drain, a kill) is no UpstreamFailed, and neutral."""
    return _NEUTRAL if isinstance(error, _NO_VERDICT) else _FAILURE
