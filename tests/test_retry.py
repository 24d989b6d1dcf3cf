"""Retries: who may be tried again, how long it waits, and that no storm outgrows the budget."""

from __future__ import annotations

import calendar
import itertools
import random
import re
from collections.abc import Callable, Generator
from fractions import Fraction

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy import errors, retry
from proxy.retry import TABLE, Account, Failure, Kind, RetryBudget, Verdict, may_retry, wait_s

NO, AGAIN, FRESH = Verdict.NO, Verdict.AGAIN, Verdict.FRESH
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
SAFE = METHODS[:3]


class Policy(msgspec.Struct, frozen=True):
    """The defaults of the configuration."""

    attempts: int = 3
    base: float = 0.25
    max: float = 8.0
    statuses: tuple[int, ...] = (429, 502, 503, 504, 529)
    stale_connection: bool = True


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_docstring_prints_the_table() -> None:
    """What is read is what is run: row by row, in the same order."""
    row = re.compile(
        rf"^    ({'|'.join(Kind)}) .*? (again|fresh|no) +(again|fresh|no)(?: .*)?$", re.MULTILINE
    )
    printed = [
        (Kind(kind), (Verdict(safe), Verdict(other)))
        for kind, safe, other in row.findall(retry.__doc__ or "")
    ]
    assert printed == list(TABLE.items())
    assert set(TABLE) == set(Kind)


#: The rules in the issue's words: the first that speaks of a failure decides.
RULES: list[tuple[str, Callable[[Failure, int, Policy], bool], Verdict]] = [
    ("a byte has gone to the caller", lambda f, n, p: f.committed, NO),
    ("no attempts left", lambda f, n, p: n >= p.attempts, NO),
    ("connect, TLS and DNS failures always", lambda f, n, p: f.kind == "connect", AGAIN),
    ("only a body that is still here", lambda f, n, p: not f.replayable, NO),
    ("answers by retry.statuses", lambda f, n, p: f.kind == "status" and f.status in p.statuses, AGAIN),
    ("no other answer", lambda f, n, p: f.kind == "status", NO),
    ("401 with another key", lambda f, n, p: f.kind == "credential" and f.spare_credential, AGAIN),
    (
        "a stale connection, once, if allowed",
        lambda f, n, p: f.kind == "stale" and p.stale_connection and not f.stale_before,
        FRESH,
    ),
    ("safe methods after a break", lambda f, n, p: f.kind in ("reset", "stale") and f.method in SAFE, AGAIN),
    ("safe methods after silence", lambda f, n, p: f.kind == "timeout" and f.method in SAFE, AGAIN),
    ("never otherwise", lambda f, n, p: True, NO),
]


def test_every_row() -> None:
    """All kinds, methods and circumstances."""
    spoken: set[str] = set()
    rows = 0
    flags = list(itertools.product((False, True), repeat=5))
    policies = [Policy(stale_connection=allowed) for allowed in (False, True)]
    for kind, method, status in itertools.product(Kind, METHODS, (0, 200, 400, 429, 500, 502, 503, 504, 529)):
        for spare, stale, replayable, committed, final in flags:
            failure = Failure(
                kind=kind,
                method=method,
                status=status,
                spare_credential=spare,
                stale_before=stale,
                replayable=replayable,
                committed=committed,
                final=final,
            )
            for policy, attempts in itertools.product(policies, (1, 2, 3, 4)):
                name, verdict = next((n, v) for n, speaks, v in RULES if speaks(failure, attempts, policy))
                assert may_retry(failure, attempts, policy) is verdict, (name, failure, attempts)
                spoken.add(name)
                rows += 1
    assert rows == 129_024
    assert spoken == {name for name, _, _ in RULES}


@pytest.mark.parametrize(
    ("kind", "method", "verdict"),
    [
        (Kind.CONNECT, "POST", AGAIN),
        (Kind.STALE, "POST", FRESH),
        (Kind.RESET, "POST", NO),
        (Kind.RESET, "GET", AGAIN),
        (Kind.RESET, "DELETE", NO),
        (Kind.TIMEOUT, "POST", NO),
        (Kind.TIMEOUT, "GET", AGAIN),
    ],
)
def test_the_rows_that_cost_money(kind: Kind, method: str, verdict: Verdict) -> None:
    """Spelled out: a POST that may be generating is never sent twice."""
    assert may_retry(Failure(kind=kind, method=method), 1, Policy()) is verdict


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.UpstreamConnectFailed(), Kind.CONNECT),
        (errors.UpstreamStale(), Kind.STALE),
        (errors.UpstreamUnreachable(), Kind.RESET),
        (errors.UpstreamCut(), Kind.RESET),
        (errors.UpstreamTimeout(), Kind.TIMEOUT),
        (errors.UpstreamDeadline(), Kind.DEADLINE),
        (errors.UpstreamRefusedUs(), Kind.CREDENTIAL),
        (errors.UpstreamInvalid(), Kind.INVALID),
        (errors.UpstreamInBand(), Kind.INVALID),
    ],
)
def test_kinds_of_errors(error: errors.UpstreamFailed, kind: Kind) -> None:
    """Subclasses come before their parents."""
    assert retry.kind_of(error) is kind


# ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────


@given(
    st.integers(0, 10**9),
    st.floats(0.001, 100),
    st.floats(0.001, 1000),
    st.floats(0, 1, exclude_max=True),
)
def test_backoff_is_bounded(number: int, base: float, longest: float, draw: float) -> None:
    """Within [0, min(max, base * 2**n)], for any n, and the whole of it."""
    policy = Policy(base=base, max=longest)
    bound = min(longest, base * 2 ** min(number, 40))
    wait = retry.backoff_s(number, policy, lambda: draw)
    assert 0 <= wait <= longest
    assert wait == pytest.approx(draw * bound)


def test_backoff_is_full_jitter() -> None:
    """Uniform from 0: the mean is half of the bound, and the bound doubles up to max."""
    rng = random.Random(1)
    means = [sum(retry.backoff_s(n, Policy(), rng.random) for _ in range(4000)) / 4000 for n in range(8)]
    assert means == pytest.approx([0.125, 0.25, 0.5, 1, 2, 4, 4, 4], rel=0.05)


FAILURE = Failure(kind=Kind.STATUS, method="POST", status=503)


@pytest.mark.parametrize(
    ("changes", "left_s", "wait"),
    [
        ({}, 900, 0.125),  # half of 0.25
        ({"retry_after_s": 0.0}, 900, 0.125),
        ({"retry_after_s": 2.0}, 900, 2.125),  # at least what was asked for
        ({"retry_after_s": 8.0}, 900, 8.125),  # as long as retry.max
        ({"retry_after_s": 8.001}, 900, None),  # longer: passed on, not waited for
        ({"retry_after_s": 2.0}, 2.0, None),  # beyond the one deadline
        ({}, 0.125, None),
        ({}, -1, None),
        ({"final": True}, 900, None),  # x-should-retry: false
        ({"spare_credential": True, "retry_after_s": 60.0}, 900, 0.0),  # that is the other key's rest
        ({"spare_credential": True}, 0, None),
    ],
)
def test_how_long_the_same_upstream_is_waited_for(
    changes: dict[str, float], left_s: float, wait: float | None
) -> None:
    """The first retry, with a draw of one half."""
    failure = msgspec.structs.replace(FAILURE, **changes)
    assert wait_s(failure, 0, Policy(), lambda: 0.5, left_s) == wait


@given(
    st.one_of(st.none(), st.floats(0, 100)),
    st.integers(0, 50),
    st.floats(0, 1, exclude_max=True),
    st.floats(-10, 1000),
)
def test_no_wait_beyond_the_deadline(asked_s: float | None, number: int, draw: float, left_s: float) -> None:
    """Whatever was asked for; and never less than that."""
    failure = msgspec.structs.replace(FAILURE, retry_after_s=asked_s)
    wait = wait_s(failure, number, Policy(), lambda: draw, left_s)
    if wait is not None:
        assert max(asked_s or 0, 0) <= wait < left_s


# ── Retry-After ─────────────────────────────────────────────────────────────────────────────────────────

#: Sun, 06 Nov 1994 08:49:37 GMT, the date of RFC 9110 5.6.7.
RFC_DATE = float(calendar.timegm((1994, 11, 6, 8, 49, 37)))
DAY_S = 86_400.0


@pytest.mark.parametrize(
    ("after", "after_ms", "seconds"),
    [
        (None, None, None),
        (b"7", None, 7.0),
        (b"0", None, 0.0),
        (b" 1.5 ", None, 1.5),
        (b".5", None, 0.5),
        (b"30", b"1500", 1.5),
        (None, b"250.5", 0.2505),
        (b"3", b"soon", 3.0),
        (b"Sun, 06 Nov 1994 08:49:37 GMT", None, 10.0),
        (b"Sunday, 06-Nov-94 08:49:37 GMT", None, 10.0),
        (b"Sun Nov  6 08:49:37 1994", None, 10.0),
        (b"Sun, 06 Nov 1994 09:49:37 +0100", None, 10.0),
        (b"Sun, 06 Nov 1994 08:49:26 GMT", None, 0.0),  # a second ago
        (b"Fri, 31 Dec 9999 23:59:59 GMT", None, DAY_S),
        (b"9" * 5000, None, DAY_S),
        (None, b"9" * 5000, DAY_S),
        (b"-1", None, None),
        (b"nan", None, None),
        (b"inf", None, None),
        (b"1_0", None, None),
        (b"1e3", None, None),
        (b"0x10", None, None),
        (b"", b"", None),
        ("\u0661".encode(), None, None),  # one, to str.isdigit()
        (b"Sun, 99 Nov 1994 99:99:99 GMT", b"-5", None),
    ],
)
def test_retry_after(after: bytes | None, after_ms: bytes | None, seconds: float | None) -> None:
    """Ten seconds before the RFC's date. A day is the most that anything says."""
    if after == b"Sun, 99 Nov 1994 99:99:99 GMT":
        parsed = retry.parse_retry_after(after, after_ms, RFC_DATE)
        assert parsed is None or 0 <= parsed <= DAY_S  # whatever it is taken for
        return
    assert retry.parse_retry_after(after, after_ms, RFC_DATE - 10) == seconds


@given(
    st.one_of(st.none(), st.binary(max_size=60), st.from_regex(rb"[A-Z0-9a-z ,:+.-]{0,60}", fullmatch=True)),
    st.one_of(st.none(), st.binary(max_size=20), st.integers().map(lambda n: b"%d" % n)),
    st.floats(0, 4e9),
)
@example(b"Sun, 06 Nov 1994 08:49:37 +99999999999999999999999", None, 0.0)
@example(b"Sun, 06 Nov 99999999999 08:49:37 GMT", None, 0.0)
@example(b"Sun, 00 Nov 0000 08:49:37 GMT", None, 0.0)
@example(b"6 Nov", None, 0.0)
@example(b"\xff, \x00", b"\xff", 0.0)
def test_retry_after_never_raises(after: bytes | None, after_ms: bytes | None, now: float) -> None:
    """Any bytes: None, or a wait that can be waited."""
    seconds = retry.parse_retry_after(after, after_ms, now)
    assert seconds is None or 0 <= seconds <= DAY_S


@given(st.integers(0, 4 * 10**9), st.integers(-(10**6), 10**5))
def test_dates_count_from_the_wall_clock(now: int, ahead_s: int) -> None:
    """Any date of our time, in the preferred form."""
    at = max(now + ahead_s, 0)
    days = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
    year, month, day, hour, minute, second, weekday, *_ = _utc(at)
    text = (
        f"{days[weekday]}, {day:02} {calendar.month_abbr[month]} {year} {hour:02}:{minute:02}:{second:02} GMT"
    )
    seconds = retry.parse_retry_after(text.encode(), None, float(now))
    assert seconds == min(max(at - now, 0), DAY_S)


def _utc(at: int) -> tuple[int, ...]:
    import time

    return tuple(time.gmtime(at))


# ── the budget ──────────────────────────────────────────────────────────────────────────────────────────


class Storm:
    """Requests on an upstream that fails as `draw` says, with the rules as forward uses them, and a meter."""

    def __init__(self, budget: RetryBudget, draw: Callable[[], Kind | None]) -> None:
        self.budget = budget
        self.draw = draw
        self.requests = 0
        self.hits = 0
        self.extra = 0  # of these, not a request's first

    def request(self) -> Generator[None, None, None]:
        """One request; whatever else happens meanwhile happens at a yield."""
        self.requests += 1
        account = self.budget.open()
        try:
            yield from self.attempts(account)
        finally:
            account.close()

    def attempts(self, account: Account) -> Generator[None, None, None]:
        has_hit = False
        for attempt in itertools.count(1):
            if not account.take():
                return
            yield  # the back-off
            kind = self.draw()
            reached = kind is not Kind.CONNECT
            self.hits += reached
            self.extra += reached and has_hit
            has_hit = has_hit or reached
            yield  # under way
            account.give_back(reached=reached)
            if kind is None:
                yield  # streaming
                return
            failure = Failure(kind=kind, method="GET", status=503)
            if may_retry(failure, attempt, Policy()) is NO:
                return


def half(rng: random.Random) -> Callable[[], Kind | None]:
    return lambda: Kind.STATUS if rng.random() < 0.5 else None


@pytest.mark.parametrize("at_once", [1, 7, 20, 200])
@pytest.mark.parametrize("seed", range(5))
def test_fault_33(at_once: int, seed: int) -> None:
    """Half of all attempts fail, 200 requests, one after the other or at once: at most 240 hits.
    And the budget is there to be used: nearly all of it is."""
    rng = random.Random(seed)
    storm = Storm(RetryBudget(0.2), half(rng))
    waiting = [storm.request() for _ in range(200)]
    running: list[Generator[None, None, None]] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.pop())
            next(running[-1])
        one = rng.choice(running)
        if next(one, ...) is ...:
            running.remove(one)
        if storm.requests >= 50:
            assert storm.hits <= 1.2 * storm.requests
    assert storm.requests == 200
    assert 230 <= storm.hits <= 240
    assert (storm.budget.in_flight, storm.budget.retries_in_flight) == (0, 0)


def test_everything_fails() -> None:
    """A dead upstream that answers 503 gets a fifth more, not three times as much."""
    storm = Storm(RetryBudget(0.2), lambda: Kind.STATUS)
    for _ in range(1000):
        list(storm.request())
    assert storm.hits == 1200


def test_a_lone_request_is_retried() -> None:
    """The first of all requests may borrow: all three attempts."""
    storm = Storm(RetryBudget(0.2), lambda: Kind.STATUS)
    list(storm.request())
    assert storm.hits == 3


def test_borrowed_retries_are_paid_back() -> None:
    """Ten at once, then none until the requests have earned more than ten."""
    storm = Storm(RetryBudget(0.2), lambda: Kind.STATUS)
    hits = []
    for _ in range(60):
        list(storm.request())
        hits.append(storm.hits)
    assert hits[4] == 5 + 10
    assert hits[53] == 54 + 10
    assert hits[54] == 55 + 11


def test_good_times_save_up_a_hundred() -> None:
    """Ten thousand good requests do not pay for a storm of two thousand retries."""
    budget = RetryBudget(0.2)
    good = Storm(budget, lambda: None)
    for _ in range(10_000):
        list(good.request())
    bad = Storm(budget, lambda: Kind.STATUS)
    for _ in range(1000):
        list(bad.request())
    assert 299 <= bad.hits - bad.requests <= 100 + 200


def test_failover_after_a_connect_failure_is_free() -> None:
    """Nothing was sent: with a budget that is used up, the second upstream is still asked."""
    budget = RetryBudget(0.2)
    worn = Storm(budget, lambda: Kind.STATUS)
    for _ in range(50):
        list(worn.request())
    assert worn.hits == 60
    kinds = iter([Kind.CONNECT, Kind.CONNECT, None])
    storm = Storm(budget, lambda: next(kinds))
    list(storm.request())
    assert storm.hits == 1


def test_a_retry_that_never_connects_is_not_spent() -> None:
    """It stays with its request for the next attempt, and goes back if there is none."""
    budget = RetryBudget(0.2, min_retries=1)
    account = budget.open()
    assert account.take()
    account.give_back(reached=True)
    assert account.take()
    account.give_back(reached=False)
    other = budget.open()
    other.give_back(reached=True)
    assert not other.take()  # the only retry is still the first one's
    assert account.take()
    account.give_back(reached=False)
    account.close()
    assert other.take()
    other.give_back(reached=True)
    assert not other.take()
    other.close()
    assert (budget.in_flight, budget.retries_in_flight) == (0, 0)


def test_retries_at_once() -> None:
    """A fifth of what is in flight, ten at least; a retry whose verdict is known makes room for another."""
    budget = RetryBudget(0.2, min_retries=1000)
    accounts = [budget.open() for _ in range(60)]
    for account in accounts:
        account.take()
        account.give_back(reached=True)
    taken = [account.take() for account in accounts]
    assert taken == [True] * 12 + [False] * 48
    accounts[0].give_back(reached=True)
    assert accounts[20].take()
    for account in accounts[21:]:
        account.close()
    for account in accounts[1:5]:  # of twelve retries eight are left, and ten may be
        account.give_back(reached=True)
    assert [account.take() for account in accounts[1:5]] == [True, True, False, False]


def test_an_attempt_without_a_verdict_is_spent() -> None:
    """A caller that leaves while its retry is under way: the upstream has it. A second close is none."""
    budget = RetryBudget(0.2, min_retries=1)
    account = budget.open()
    account.take()
    account.give_back(reached=True)
    assert account.take()
    account.close()
    account.close()
    assert (budget.in_flight, budget.retries_in_flight) == (0, 0)
    other = budget.open()
    other.give_back(reached=True)
    assert not other.take()


def test_no_budget() -> None:
    """`budget: 0` allows what costs nothing, and nothing else."""
    kinds = iter([Kind.CONNECT, Kind.STATUS, None])
    storm = Storm(RetryBudget(0), lambda: next(kinds))
    list(storm.request())
    assert storm.hits == 1


@given(
    st.sampled_from(["0.01", "0.1", "0.2", "0.3", "0.35", "0.7", "1", "1.5"]),
    st.integers(0, 5),
    st.integers(0, 12),
    st.lists(
        st.tuples(st.integers(0, 1000), st.sampled_from([None, "connect", "status", "stale", "leaves"])),
        max_size=300,
    ),
)
def test_any_interleaving(share: str, floor: int, borrowed: int, steps: list[tuple[int, str | None]]) -> None:
    """Requests begin, go on and are cancelled in any order: at every instant what hits an upstream beyond
    a request's first hit stays within the share, exactly, and so do retries at once; none is held after."""
    budget = RetryBudget(float(share), min_in_flight=floor, min_retries=borrowed)
    kind: list[Kind | None] = [None]
    storm = Storm(budget, lambda: kind[0])
    running: list[Generator[None, None, None]] = []
    for number, what in steps:
        kind[0] = None if what in (None, "leaves") else Kind(what)
        index = number % (len(running) + 1)
        if index == len(running):
            running.append(storm.request())
        held = budget.retries_in_flight
        if what == "leaves":
            running.pop(index).close()
        elif next(running[index], ...) is ...:
            del running[index]
        assert storm.extra <= max(borrowed, Fraction(share) * storm.requests)
        if budget.retries_in_flight > held:
            assert budget.retries_in_flight <= max(floor, Fraction(share) * budget.in_flight)
    for one in running:
        one.close()
    assert (budget.in_flight, budget.retries_in_flight) == (0, 0)
