"""The token bucket as arithmetic (GCRA): rate and burst mean what they say.

A bucket holds `burst` units when full and gets `rate_per_minute` units back, evenly. From full, `burst` units
go at once; over any 60 seconds never more than rate + burst. Its whole state is one integer, the theoretical
arrival time (tat): the instant, in nanoseconds of the caller's clock, at which the bucket is full again.
0, or any instant in the past, is a full bucket, so a bucket that nobody uses needs no memory.

    deficit = max(tat - now, 0)                      time until full
    allowed = deficit + amount * interval <= burst * interval

- Integers, because sums of floats drift: with 7 a minute and burst 10 the tenth of ten is still allowed.
  The interval of one unit is rounded up to a nanosecond, so the rate is never above what was asked (and below
  it by less than rate / 60e9: 0.02 % at ten million a minute).
- Real usage that turns out larger than what was taken is booked as debt: at most one more `burst`.
- A clock that jumps back grants nothing: the bucket looks emptier than it is. It never looks emptier than its
  debt limit, so after a jump by an hour it still fills up in the time of two bursts.
- A deficit is kept as time: after a change of rate or burst it drains in the time it would have taken anyway,
  clipped to the new debt limit.
"""

from __future__ import annotations

import math
from functools import lru_cache

import msgspec

_MINUTE_NS = 60_000_000_000
# 73 years. Wall-clock time plus twice this fits a signed 64-bit word, which is where stores keep a tat.
_LONGEST_NS = 2**61


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What a bucket answered, in the shape of the headers. Whoever prints seconds rounds them up.

    limit: units of a full bucket (the burst), which is what `remaining` counts down from.
    remaining: whole units that can be taken at once after this decision; never negative.
    reset_after_s: until the bucket is full again if nothing more is taken.
    retry_after_s: until the same amount would be allowed; 0 if it was, inf if it is more than the burst.
    """

    allowed: bool
    limit: int
    remaining: int
    reset_after_s: float
    retry_after_s: float


def take(tat_ns: int, rate_per_minute: float, burst: int, amount: int, now: float) -> tuple[int, Decision]:
    """Takes `amount` units or none: the new tat, and the decision.

    `rate_per_minute` is above 0; `burst` and `amount` are 0 or more: a burst of 0 allows nothing, an amount
    of 0 asks whether the bucket is out of debt. A burst is cut at what 73 years bring. `now` is in seconds of
    any clock that all callers share.
    A refusal returns the tat unchanged, or lowered to the debt limit after a clock jumped back.
    """
    interval, capacity = shape(rate_per_minute, burst)
    now_ns = int(now * 1e9)
    deficit = tat_ns - now_ns
    if deficit < 0:
        deficit = 0
    elif deficit > 2 * capacity:
        deficit = 2 * capacity
    cost = amount * interval
    after = deficit + cost
    if after <= capacity:
        remaining = (capacity - after) // interval
        return (now_ns + after if amount else tat_ns), Decision(True, burst, remaining, after / 1e9, 0.0)
    retry_after_s = math.inf if cost > capacity else (after - capacity) / 1e9
    remaining = max(capacity - deficit, 0) // interval
    lowered = min(tat_ns, now_ns + 2 * capacity)
    return lowered, Decision(False, burst, remaining, deficit / 1e9, retry_after_s)


def settle(tat_ns: int, rate_per_minute: float, burst: int, delta: int, now: float) -> int:
    """Corrects what was taken: a negative delta gives back (never above full), a positive one takes more.

    Taking more always succeeds, down to a debt of one burst; what is beyond that is forgotten.
    """
    interval, capacity = shape(rate_per_minute, burst)
    now_ns = int(now * 1e9)
    if delta <= 0:  # by comparisons: `min` and `max` take ten times as long
        full = tat_ns if tat_ns < now_ns else now_ns
        given_back = tat_ns + delta * interval
        return given_back if given_back > full else full
    return min(max(tat_ns, now_ns) + delta * interval, max(tat_ns, now_ns + 2 * capacity))


def is_full(tat_ns: int, now: float) -> bool:
    """A full bucket says the same as one that was never used."""
    return tat_ns <= int(now * 1e9)


def terms(rate_per_minute: float, burst: int, now: float) -> tuple[int, int, int]:
    """The interval of one unit, the time from empty to full, and now: all in nanoseconds.

    For a store that does the sums itself (proxy.state.redis).
    """
    return (*shape(rate_per_minute, burst), int(now * 1e9))


@lru_cache(maxsize=1024)
def shape(rate_per_minute: float, burst: int) -> tuple[int, int]:
    """The interval of one unit, and the time from empty to full, in nanoseconds. Kept by its arguments alone,
    the limits of the configuration: the sums were a third of a decision."""
    interval = math.ceil(_MINUTE_NS / rate_per_minute)
    return interval, min(burst * interval, _LONGEST_NS)
