"""The breaker: its table, its one trial, its growing ejections, and how much of a pool it may take away."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import breaker as rules
from proxy import errors
from proxy.breaker import TRANSITIONS, Breaker, Event, Outcome, Pass, State, may_eject

OK, NEUTRAL, FAILURE = Outcome.OK, Outcome.NEUTRAL, Outcome.FAILURE
#: The configuration's default.
STATUSES = (500, 502, 503, 504, 529)


class Settings(msgspec.Struct, frozen=True):
    """The defaults of the configuration."""

    failures: int = 5
    window: float = 30.0
    cool_down: float = 5.0
    max_cool_down: float = 60.0


def one_attempt(breaker: Breaker, outcome: Outcome, now: float) -> None:
    leave = breaker.admit(now)
    assert leave is not None
    breaker.record(leave, outcome, now)


def tripped(now: float) -> Breaker:
    """Open since `now`."""
    breaker = Breaker(Settings())
    for _ in range(5):
        one_attempt(breaker, FAILURE, now)
    assert breaker.state is State.OPEN
    return breaker


def trial(breaker: Breaker, now: float) -> Pass:
    leave = breaker.admit(now)
    assert leave is not None
    assert breaker.state is State.HALF_OPEN
    return leave


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_docstring_prints_the_table() -> None:
    """What is read is what is run: row by row, in the same order."""
    row = re.compile(r"^    (closed|half-open|open) +(\w+) +(closed|half-open|open) ", re.MULTILINE)
    names = {"closed": State.CLOSED, "half-open": State.HALF_OPEN, "open": State.OPEN}
    printed = [((names[a], Event(event)), names[b]) for a, event, b in row.findall(rules.__doc__ or "")]
    assert printed == list(TRANSITIONS.items())


def test_states_are_the_metric() -> None:
    """breaker_state: 0 closed, 1 half-open, 2 open."""
    assert [int(state) for state in (State.CLOSED, State.HALF_OPEN, State.OPEN)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("outcome", "after"), [(OK, State.CLOSED), (NEUTRAL, State.HALF_OPEN), (FAILURE, State.OPEN)]
)
def test_the_trials_verdict(outcome: Outcome, after: State) -> None:
    """The three rows of half-open, through the object."""
    breaker = tripped(100.0)
    breaker.record(trial(breaker, 105.0), outcome, 106.0)
    assert breaker.state is after
    assert breaker.available(106.0) is (after is not State.OPEN)


def test_a_life() -> None:
    """Trip, wait, trial, recover; then nothing of the past counts."""
    breaker = Breaker(Settings())
    for second in range(4):
        one_attempt(breaker, FAILURE, 100.0 + second)
    one_attempt(breaker, OK, 104.0)
    assert breaker.state is State.CLOSED
    one_attempt(breaker, FAILURE, 105.0)
    assert breaker.state is State.OPEN
    assert breaker.admit(109.99) is None
    breaker.record(trial(breaker, 110.0), OK, 111.0)
    for _ in range(4):
        one_attempt(breaker, FAILURE, 112.0)
    assert breaker.state is State.CLOSED
    one_attempt(breaker, FAILURE, 112.0)
    assert breaker.state is State.OPEN


@pytest.mark.parametrize(("gap", "state"), [(7.5, State.OPEN), (7.51, State.CLOSED)])
def test_the_window_slides(gap: float, state: State) -> None:
    """Five failures in 30 seconds open; five in a little more do not, however many follow at that pace."""
    breaker = Breaker(Settings())
    now = 100.0
    for _ in range(5 if state is State.OPEN else 50):
        one_attempt(breaker, FAILURE, now)
        now += gap
    assert breaker.state is state


def test_a_429_opens_nothing() -> None:
    """A thousand callers at their own limit, or gone, or wrong: no verdict."""
    breaker = Breaker(Settings())
    for _ in range(1000):
        one_attempt(breaker, rules.outcome_of_status(429, STATUSES), 100.0)
    assert breaker.state is State.CLOSED


# ── the trial ───────────────────────────────────────────────────────────────────────────────────────────


def test_fifty_at_once_make_one_trial() -> None:
    """Fault 32: half-open and fifty requests at the same instant."""
    breaker = tripped(100.0)
    passed = [leave for _ in range(50) if (leave := breaker.admit(105.0))]
    assert len(passed) == 1


def test_looking_takes_nothing() -> None:
    """`available` may be asked any number of times before somebody is admitted."""
    breaker = tripped(100.0)
    assert all(breaker.available(105.0) for _ in range(3))
    assert breaker.state is State.OPEN
    trial(breaker, 105.0)
    assert not breaker.available(105.0)


def test_a_cancelled_trial_is_given_back_once() -> None:
    """The next request is the trial; a second word of the first one does not let a third through."""
    breaker = tripped(100.0)
    first = trial(breaker, 105.0)
    breaker.record(first, NEUTRAL, 106.0)
    second = trial(breaker, 106.0)
    for outcome in Outcome:
        breaker.record(first, outcome, 106.0)
    assert breaker.state is State.HALF_OPEN
    assert breaker.admit(106.0) is None
    breaker.record(second, OK, 107.0)
    assert breaker.state is State.CLOSED


def test_late_verdicts_are_dropped() -> None:
    """Attempts from before an ejection neither end it, nor lengthen it, nor count after it."""
    breaker = Breaker(Settings())
    old = [leave for _ in range(20) if (leave := breaker.admit(100.0))]
    for leave in old[:5]:
        breaker.record(leave, FAILURE, 101.0)
    assert breaker.state is State.OPEN
    breaker.record(old[5], OK, 102.0)
    breaker.record(old[6], FAILURE, 103.0)
    assert breaker.retry_after_s(103.0) == pytest.approx(3.0)
    running = trial(breaker, 106.0)
    breaker.record(old[7], FAILURE, 107.0)
    assert breaker.state is State.HALF_OPEN
    breaker.record(running, OK, 108.0)
    for leave in old[8:]:
        breaker.record(leave, FAILURE, 109.0)
    assert breaker.state is State.CLOSED


def test_a_trial_that_is_cut_after_its_first_byte() -> None:
    """It closed the breaker, and its failure counts in the period that it began."""
    breaker = tripped(100.0)
    leave = trial(breaker, 105.0)
    breaker.record(leave, OK, 106.0)
    breaker.record(leave, FAILURE, 107.0)
    for _ in range(3):
        one_attempt(breaker, FAILURE, 107.0)
    assert breaker.state is State.CLOSED
    one_attempt(breaker, FAILURE, 107.0)
    assert breaker.state is State.OPEN


# ── ejection time ───────────────────────────────────────────────────────────────────────────────────────


def test_ejections_grow() -> None:
    """Each trial that fails doubles it, up to max_cool_down."""
    breaker, now = tripped(100.0), 100.0
    lengths = []
    for _ in range(7):
        lengths.append(breaker.retry_after_s(now))
        now += lengths[-1]
        breaker.record(trial(breaker, now), FAILURE, now)
    assert lengths == pytest.approx([5, 10, 20, 40, 60, 60, 60])


@pytest.mark.parametrize(
    ("ejections", "healthy_s", "next_s"), [(1, 29.9, 10), (1, 30, 5), (4, 39.9, 60), (4, 40, 5)]
)
def test_health_resets_the_ejection_time(ejections: int, healthy_s: float, next_s: float) -> None:
    """Closed for the window and for as long as the last ejection: the next one is short again."""
    breaker, now = tripped(100.0), 100.0
    for _ in range(ejections - 1):
        now += breaker.retry_after_s(now)
        breaker.record(trial(breaker, now), FAILURE, now)
    now += breaker.retry_after_s(now)
    breaker.record(trial(breaker, now), OK, now)
    now += healthy_s
    for _ in range(5):
        one_attempt(breaker, FAILURE, now)
    assert breaker.retry_after_s(now) == pytest.approx(next_s)


def test_a_thousand_ejections() -> None:
    """2 ** 1000 seconds is not computed."""
    breaker, now = tripped(100.0), 100.0
    for _ in range(1100):
        now += breaker.retry_after_s(now)
        breaker.record(trial(breaker, now), FAILURE, now)
    assert breaker.retry_after_s(now) == pytest.approx(60)


def test_retry_after() -> None:
    """Closed: at once. Open: the rest. Under trial: soon. Of several, the soonest."""
    closed, opened, tried = Breaker(Settings()), tripped(100.0), tripped(90.0)
    trial(tried, 101.0)
    assert closed.retry_after_s(101.0) == 0
    assert opened.retry_after_s(101.0) == pytest.approx(4)
    assert opened.retry_after_s(200.0) == 0
    assert tried.retry_after_s(101.0) == 1
    assert rules.soonest_s([opened, tried], 101.0) == 1
    assert rules.soonest_s([], 101.0) == 0


# ── pools ───────────────────────────────────────────────────────────────────────────────────────────────


def pool_of(size: int) -> tuple[Breaker, ...]:
    pool = tuple(Breaker(Settings()) for _ in range(size))
    for breaker in pool:
        breaker.pools = (pool,)
    return pool


def fail(breaker: Breaker, now: float, times: int = 5) -> None:
    for _ in range(times):
        leave = breaker.admit(now)
        if leave is not None:
            breaker.record(leave, FAILURE, now)


@pytest.mark.parametrize(("size", "ejected"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (7, 3), (10, 5)])
def test_at_most_half_of_a_pool(size: int, ejected: int) -> None:
    """Rounded down, but one always may be; the others go on being asked."""
    pool = pool_of(size)
    for breaker in pool:
        fail(breaker, 100.0, 50)
    assert sum(breaker.state is State.OPEN for breaker in pool) == ejected
    assert sum(breaker.available(100.0) for breaker in pool) == size - ejected


def test_half_open_still_counts_as_ejected() -> None:
    """Else a second one could open during the trial, and the first one's failure would make two of two."""
    one, other = pool_of(2)
    fail(one, 100.0)
    leave = trial(one, 105.0)
    fail(other, 105.0, 50)
    assert other.state is State.CLOSED
    one.record(leave, FAILURE, 106.0)
    assert (one.state, other.state) == (State.OPEN, State.CLOSED)


def test_who_was_not_allowed_asks_again() -> None:
    """Its failures are kept: when the first one is back, the next failure opens it."""
    one, other = pool_of(2)
    fail(one, 100.0)
    fail(other, 101.0, 20)
    one.record(trial(one, 105.0), OK, 105.0)
    fail(other, 106.0, 1)
    assert (one.state, other.state) == (State.CLOSED, State.OPEN)


def test_two_pools() -> None:
    """In a pool of its own it might open; in the one it shares, half is gone already."""
    shared, other = Breaker(Settings()), Breaker(Settings())
    shared.pools = ((shared,), (shared, other))
    other.pools = ((shared, other),)
    fail(other, 100.0)
    fail(shared, 100.0, 50)
    assert (shared.state, other.state) == (State.CLOSED, State.OPEN)


def test_a_breaker_listed_twice_is_one() -> None:
    """One upstream under two names of a model is still all there is."""
    one, other = Breaker(Settings()), Breaker(Settings())
    fail(other, 100.0)
    assert may_eject([one, one], one)
    assert not may_eject([one, one, one, other], one)


# ── outcomes ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, OK), (204, OK), (304, OK), (400, NEUTRAL), (404, NEUTRAL), (429, NEUTRAL), (501, NEUTRAL)],
)
def test_outcomes_of_answers(status: int, outcome: Outcome) -> None:
    """Whatever is neither a success nor in the configured list is no verdict."""
    assert rules.outcome_of_status(status, STATUSES) is outcome


@pytest.mark.parametrize("status", [500, 502, 503, 504, 529])
def test_statuses_that_count(status: int) -> None:
    """The configured list, and nothing but it."""
    assert rules.outcome_of_status(status, STATUSES) is FAILURE
    assert rules.outcome_of_status(status, ()) is NEUTRAL


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (errors.UpstreamConnectFailed(), FAILURE),
        (errors.UpstreamTimeout(), FAILURE),
        (errors.UpstreamUnreachable(), FAILURE),
        (errors.UpstreamInvalid(), FAILURE),
        (errors.UpstreamCut(), FAILURE),
        (errors.UpstreamStale(), NEUTRAL),
        (errors.UpstreamDeadline(), NEUTRAL),
        (errors.UpstreamRefusedUs(), NEUTRAL),
        (errors.UpstreamInBand(), NEUTRAL),
    ],
)
def test_outcomes_of_errors(error: errors.UpstreamFailed, outcome: Outcome) -> None:
    """A stale connection, our own credential and the caller's deadline say nothing about its health."""
    assert rules.outcome_of_error(error) is outcome


# ── whatever happens ────────────────────────────────────────────────────────────────────────────────────

#: What is done, to which attempt under way or breaker, and after how many seconds.
DEEDS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "ok", "neutral", "failure", "failure"]),
        st.integers(0, 10**6),
        st.one_of(st.just(0.0), st.floats(0, 3), st.floats(0, 100)),
    ),
    max_size=150,
)
SETTINGS = st.builds(
    Settings,
    failures=st.integers(1, 4),
    window=st.floats(0.5, 60),
    cool_down=st.floats(0.1, 20),
    max_cool_down=st.floats(0.1, 100),
)


@given(SETTINGS, DEEDS)
def test_one_breaker(settings: Settings, deeds: list[tuple[str, int, float]]) -> None:
    """Never two in half-open; never open without its failures in the window; every ejection between
    cool_down (or the maximum) and the maximum; open means refused until it is over."""
    breaker, now = Breaker(settings), 1000.0
    under_way: list[Pass] = []
    trials: list[Pass] = []  # under way in this half-open period
    failed_at: list[float] = []  # in this closed period, and since
    for deed, number, pause in deeds:
        now += pause
        before = breaker.state
        could = breaker.available(now)
        if deed == "admit":
            leave = breaker.admit(now)
            assert (leave is not None) is could
            if leave is not None:
                under_way.append(leave)
                trials += [leave] * (breaker.state is State.HALF_OPEN)
        elif under_way:
            leave = under_way.pop(number % len(under_way))
            breaker.record(leave, Outcome(deed), now)
            trials = [other for other in trials if other is not leave]
            failed_at += [now] * (deed == "failure")
        assert len(trials) <= 1
        if breaker.state is not State.HALF_OPEN:
            trials = []
        if breaker.state is State.OPEN and before is not State.OPEN:
            if before is State.CLOSED:
                recent = [at for at in failed_at if now - at <= settings.window]
                assert len(recent) >= settings.failures
            shortest = min(settings.cool_down, settings.max_cool_down)
            assert shortest - 1e-6 <= breaker.retry_after_s(now) <= settings.max_cool_down + 1e-6
        if breaker.state is State.CLOSED and before is not State.CLOSED:
            failed_at = []
        assert breaker.available(now) is (breaker.retry_after_s(now) == 0)


@given(st.integers(1, 7), SETTINGS, DEEDS)
def test_a_pool(size: int, settings: Settings, deeds: list[tuple[str, int, float]]) -> None:
    """However its members fail and recover: never more than half is not closed, but one may be."""
    pool = tuple(Breaker(settings) for _ in range(size))
    for breaker in pool:
        breaker.pools = (pool,)
    now = 1000.0
    under_way: list[tuple[Breaker, Pass]] = []
    for deed, number, pause in deeds:
        now += pause / 10
        if deed == "admit" or not under_way:
            breaker = pool[number % size]
            leave = breaker.admit(now)
            under_way += [(breaker, leave)] * 3 if leave is not None else []
        else:
            breaker, leave = under_way.pop(number % len(under_way))
            breaker.record(leave, Outcome(deed if deed != "admit" else "ok"), now)
        assert sum(other.state is not State.CLOSED for other in pool) <= max(1, size // 2)
