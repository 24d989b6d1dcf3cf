"""The bucket: rate and burst mean what they say, whatever the clock does."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import bucket

#: From one in ten minutes; full again within 73 years, see the test of sizes.
RATES = st.one_of(st.integers(1, 10_000_000), st.floats(0.1, 1e6))
BURSTS = st.integers(1, 1_000_000)
#: Wall clock, monotonic clock of a young machine.
STARTS = st.sampled_from([0.0, 12.5, 1.76e9])
#: Seconds to the next request, and its amount as a share of the burst.
STEPS = st.lists(st.tuples(st.floats(0, 30), st.floats(0, 1.2)), max_size=40)
#: The same with a clock that may go back.
LEAPS = st.lists(st.tuples(st.floats(-4000, 30), st.floats(0, 1.2)), max_size=40)
#: Half a microsecond: two steps of a float that holds the wall clock.
GRAIN = 5e-7


def level(tat_ns: int, rate: float, burst: int, now: float) -> float:
    """Units in the bucket, from the definition."""
    interval = math.ceil(60e9 / rate)
    return burst - max(tat_ns - int(now * 1e9), 0) / interval


def test_from_full_the_burst_and_not_one_more() -> None:
    """Ten at once of ten, also where a minute is no multiple of the rate."""
    for rate in (1, 7, 30, 100, 500, 77.7):
        tat = 0
        for left in range(9, -1, -1):
            tat, decision = bucket.take(tat, rate, 10, 1, 1000.0)
            assert (decision.allowed, decision.limit, decision.remaining) == (True, 10, left)
        tat, decision = bucket.take(tat, rate, 10, 1, 1000.0)
        assert not decision.allowed
        assert decision.retry_after_s == pytest.approx(60 / rate)
        assert decision.reset_after_s == pytest.approx(600 / rate)


def test_then_the_rate() -> None:
    """30 a minute, asked every tenth of a second for ten minutes: the burst and 300."""
    tat, granted = 0, 0
    for tick in range(6001):
        tat, decision = bucket.take(tat, 30, 10, 1, 5.0 + tick / 10)
        granted += decision.allowed
    assert granted == 310


def test_more_than_the_burst_is_never_allowed() -> None:
    """It says so: no wait would help."""
    tat, decision = bucket.take(0, 60, 10, 11, 50.0)
    assert (tat, decision.allowed, decision.remaining) == (0, False, 10)
    assert decision.retry_after_s == math.inf


def test_a_burst_larger_than_anything_asked() -> None:
    """What would take more than 73 years to fill is cut there, and fits the 64-bit word of a store."""
    tat, decision = bucket.take(0, 500, 10**9, 10**6, 1.76e9)
    assert (decision.allowed, decision.remaining) == (True, 10**9 - 10**6)
    tat, decision = bucket.take(0, 0.001, 10**12, 10**6, 1.76e9)
    assert (decision.allowed, decision.retry_after_s) == (False, math.inf)
    assert tat == 0
    for _ in range(5):
        tat = bucket.settle(tat, 0.001, 10**12, 10**12, 1.76e9)
    assert tat < 2**63


def test_nothing_asked_of_a_bucket_in_debt() -> None:
    """Amount 0 is allowed unless there is debt, and changes nothing."""
    assert bucket.take(0, 60, 10, 0, 50.0)[0] == 0
    tat = bucket.settle(0, 60, 10, 15, 50.0)
    same, decision = bucket.take(tat, 60, 10, 0, 50.0)
    assert (same, decision.allowed, decision.remaining) == (tat, False, 0)
    assert decision.retry_after_s == pytest.approx(5)


def test_debt_is_bounded() -> None:
    """However much was used, the bucket is full again after the time of two bursts."""
    tat = bucket.settle(0, 60, 10, 10**9, 50.0)
    assert level(tat, 60, 10, 50.0) == -10
    assert bucket.is_full(tat, 70.0)
    assert not bucket.is_full(tat, 69.9)


def test_after_a_jump_back_it_recovers() -> None:
    """An hour back: empty, down to the debt limit, and full again after the time of two bursts."""
    tat, _ = bucket.take(0, 60, 10, 5, 7200.0)
    tat, decision = bucket.take(tat, 60, 10, 1, 3600.0)
    assert not decision.allowed
    assert decision.retry_after_s == pytest.approx(11)
    assert bucket.take(tat, 60, 10, 10, 3620.0)[1].allowed


def test_a_change_of_the_limit_keeps_the_deficit_as_time() -> None:
    """Five seconds from full stay five seconds from full."""
    tat, before = bucket.take(0, 60, 10, 5, 50.0)
    _, after = bucket.take(tat, 120, 40, 0, 50.0)
    assert before.reset_after_s == after.reset_after_s == 5
    assert after.remaining == 30


@given(RATES, BURSTS, STARTS, STEPS)
def test_bounds(rate: float, burst: int, now: float, steps: list[tuple[float, float]]) -> None:
    """Never above the burst, never below nothing; figures that belong together; tat only grows by taking."""
    tat = 0
    for pause, share in steps:
        now += pause
        amount = round(burst * share)
        had = level(tat, rate, burst, now)
        before, (tat, decision) = tat, bucket.take(tat, rate, burst, amount, now)
        assert tat >= before
        assert decision.allowed == (had + 1e-6 >= amount) or abs(had - amount) < 1e-6
        assert 0 <= decision.remaining <= burst == decision.limit
        assert decision.remaining <= level(tat, rate, burst, now)
        assert decision.reset_after_s >= 0
        assert (decision.retry_after_s > 0) != decision.allowed
        assert (decision.retry_after_s == math.inf) == (amount > burst)
        if not decision.allowed:
            assert tat == before


@given(RATES, BURSTS, STARTS, STEPS)
def test_any_minute_gives_rate_and_burst_at_most(
    rate: float, burst: int, now: float, steps: list[tuple[float, float]]
) -> None:
    """From every grant, over any time that follows: at most the burst and what the rate brought."""
    tat, grants = 0, []
    for pause, share in steps:
        now += pause
        amount = round(burst * share)
        tat, decision = bucket.take(tat, rate, burst, amount, now)
        if decision.allowed:
            grants.append((now, amount))
    for first, (begin, _) in enumerate(grants):
        total = 0
        for end, amount in grants[first:]:
            total += amount
            assert total <= burst + rate * (end - begin + GRAIN) / 60
            assert end - begin > 60 or total <= burst + rate + rate * GRAIN


@given(RATES, BURSTS, STARTS, STEPS)
def test_retry_after_is_true(rate: float, burst: int, now: float, steps: list[tuple[float, float]]) -> None:
    """Whoever waits as told is served, and not much earlier."""
    tat = 0
    for pause, share in steps:
        now += pause
        amount = max(round(burst * min(share, 1)), 1)
        tat, decision = bucket.take(tat, rate, burst, amount, now)
        wait = decision.retry_after_s
        if not decision.allowed:
            assert bucket.take(tat, rate, burst, amount, now + wait + GRAIN)[1].allowed
            assert (
                wait < 2 * GRAIN
                or not bucket.take(tat, rate, burst, amount, now + wait - 2 * GRAIN)[1].allowed
            )
        assert bucket.is_full(tat, now + decision.reset_after_s + GRAIN)


@given(RATES, BURSTS, STARTS, LEAPS)
def test_a_clock_that_goes_back_grants_nothing(
    rate: float, burst: int, start: float, leaps: list[tuple[float, float]]
) -> None:
    """Only time that passed forwards fills the bucket."""
    tat, granted, forwards, now = 0, 0, 0.0, start + 100_000
    for leap, share in leaps:
        now = max(now + leap, 0.0)
        forwards += max(leap, 0.0)
        amount = round(burst * share)
        tat, decision = bucket.take(tat, rate, burst, amount, now)
        granted += amount * decision.allowed
        assert granted <= burst + rate * (forwards + GRAIN * len(leaps)) / 60


@given(RATES, BURSTS, STARTS, st.floats(0, 2), st.integers(-(10**7), 10**7), st.floats(-100, 100))
def test_settling(rate: float, burst: int, now: float, share: float, delta: int, leap: float) -> None:
    """A refund never lifts above full nor by more than it is; more taken is a debt of one burst at most."""
    now += 1000
    tat = bucket.settle(0, rate, burst, round(burst * share), now)
    now += leap
    before = level(tat, rate, burst, now)
    settled = bucket.settle(tat, rate, burst, delta, now)
    after = level(settled, rate, burst, now)
    assert after <= burst
    if delta <= 0:
        assert before <= after <= max(before - delta + 1e-6, before)
    else:
        assert after <= before
        assert after >= min(before, -burst) - 1e-6
    if burst >= delta > 0 and before >= 0:
        assert after == pytest.approx(before - delta, abs=1e-3)


def test_a_refund_before_a_jump_back() -> None:
    """Full is full at the instant of the refund: an earlier clock still sees the time between as missing."""
    tat, _ = bucket.take(0, 60, 10, 10, 1000.0)
    tat = bucket.settle(tat, 60, 10, -10, 1005.0)
    assert level(tat, 60, 10, 1005.0) == 10
    assert level(tat, 60, 10, 1002.0) == 7


@given(RATES, BURSTS, STARTS, st.integers(1, 10**6))
def test_giving_all_back_is_not_having_taken(rate: float, burst: int, now: float, amount: int) -> None:
    """Take, settle with the same amount: as if nothing had been."""
    amount = min(amount, burst)
    tat, _ = bucket.take(0, rate, burst, amount, now)
    back = bucket.settle(tat, rate, burst, -amount, now)
    assert bucket.is_full(back, now)
    assert bucket.take(back, rate, burst, burst, now)[1].allowed
