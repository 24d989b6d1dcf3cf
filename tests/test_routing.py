"""Who is asked next: weights, load and tiers, the order of attempts, fallbacks, and keys in turn."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.routing import DEFAULT_REST_S, Rotation, Turns, fallbacks, pick


class Target(msgspec.Struct, eq=False):
    """A candidate as upstream.py has it."""

    weight: float = 1.0
    tier: int = 1
    in_flight: int = 0
    available: bool = True
    ready: bool = True


#: Available and ready: healthy, full, out of order.
STATES = [(True, True), (False, True), (False, False)]


def in_state(target: Target, state: tuple[bool, bool]) -> Target:
    target.available, target.ready = state
    return target


POOLS = st.lists(
    st.builds(
        Target,
        weight=st.one_of(st.integers(1, 5), st.floats(0.001, 1000)),
        tier=st.integers(1, 3),
        in_flight=st.integers(0, 5),
    ).flatmap(lambda target: st.sampled_from(STATES).map(lambda state: in_state(target, state))),
    max_size=7,
)
SEEDS = st.integers(0, 2**32)


def shares(pool: list[Target], seed: int = 1, picks: int = 20_000) -> list[float]:
    rng = random.Random(seed)
    counted = Counter(id(pick(pool, rng.random)) for _ in range(picks))
    return [counted[id(target)] / picks for target in pool]


# ── pick ────────────────────────────────────────────────────────────────────────────────────────────────


@given(POOLS, SEEDS)
def test_first_available_tier(pool: list[Target], seed: int) -> None:
    """Only available candidates, only of the first tier that has any; None only if none is available."""
    chosen = pick(pool, random.Random(seed).random)
    available = [target for target in pool if target.available]
    if chosen is None:
        assert available == []
    else:
        assert chosen in available
        assert chosen.tier == min(target.tier for target in available)


@pytest.mark.parametrize("draws", list(itertools.product((0.0, 0.5, 1 - 2**-53), repeat=2)))
def test_the_ends_of_the_random_source(draws: tuple[float, float]) -> None:
    """0 and the last number before 1, with weights whose sum is rounded."""
    source = iter(draws)
    pool = [Target(weight=weight) for weight in (0.1, 0.2, 0.3)]
    assert pick(pool, lambda: next(source)) in pool


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (4, 2, 1), (10, 1, 1, 1), (0.5, 0.25)])
@pytest.mark.parametrize("load", [0, 1, 7])
def test_under_equal_load_picks_follow_the_weights(weights: tuple[float, ...], load: int) -> None:
    """Idle, or each with the same load per weight. A share of 20,000 picks has a deviation below 0.0036."""
    pool = [Target(weight=weight, in_flight=round(load * weight * 4)) for weight in weights]
    assert shares(pool) == pytest.approx([weight / sum(weights) for weight in weights], abs=0.018)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=5), SEEDS)
def test_idle_picks_follow_any_weights(weights: list[int], seed: int) -> None:
    """2,000 picks have a deviation below 0.0112."""
    found = shares([Target(weight=weight) for weight in weights], seed, 2000)
    assert found == pytest.approx([weight / sum(weights) for weight in weights], abs=0.07)


@pytest.mark.parametrize(("weights", "at_once"), [((1, 1), 2), ((3, 1), 8), ((3, 1), 40), ((4, 2, 1), 70)])
def test_requests_in_flight_settle_by_weight(weights: tuple[int, ...], at_once: int) -> None:
    """A busy pool: each request ends at random and is followed by another."""
    rng = random.Random(3)
    pool = [Target(weight=weight) for weight in weights]
    live: list[Target] = []
    counted: Counter[int] = Counter()
    for _ in range(20_000):
        if len(live) == at_once:
            live.pop(rng.randrange(at_once)).in_flight -= 1
        target = pick(pool, rng.random)
        assert target is not None
        target.in_flight += 1
        live.append(target)
        counted[id(target)] += 1
    found = [counted[id(target)] / 20_000 for target in pool]
    assert found == pytest.approx([weight / sum(weights) for weight in weights], abs=0.03)


def test_the_better_of_two() -> None:
    """Never the one with more in flight per weight; so the busiest of three is never taken at all."""
    assert shares([Target(in_flight=1), Target()]) == [0, 1]
    assert shares([Target(weight=3, in_flight=2), Target(in_flight=1)]) == [1, 0]
    worst, *others = shares([Target(in_flight=9), Target(in_flight=2), Target(in_flight=1)])
    assert worst == 0
    assert others == pytest.approx([1 / 3, 2 / 3], abs=0.018)


# ── turns ───────────────────────────────────────────────────────────────────────────────────────────────


def turns(*groups: list[Target], seed: int = 1) -> Turns[Target]:
    return Turns(groups, random.Random(seed).random)


def take(of: Turns[Target], count: int) -> list[Target]:
    """The next ones, each of them asked."""
    taken = []
    for _ in range(count):
        turn = of.next()
        assert turn is not None
        of.took(turn[0])
        taken.append(turn[0])
    return taken


@given(POOLS, SEEDS)
def test_everybody_once_before_anybody_twice(pool: list[Target], seed: int) -> None:
    """Rounds: each available one exactly once, tiers in order."""
    available = [target for target in pool if target.available]
    taken = take(turns(pool, seed=seed), 3 * len(available))
    for number in range(3):
        part = taken[number * len(available) : (number + 1) * len(available)]
        assert {id(target) for target in part} == {id(target) for target in available}
        assert [target.tier for target in part] == sorted(target.tier for target in part)


@given(POOLS, SEEDS)
def test_ranking(pool: list[Target], seed: int) -> None:
    """Everybody who is ready, once; the available ones first, their tiers in order."""
    ranked = turns(pool, seed=seed).ranking()
    assert {id(target) for target in ranked} == {id(target) for target in pool if target.ready}
    available = [target for target in ranked if target.available]
    assert [target.tier for target in available] == sorted(target.tier for target in available)
    if len(ranked) > 1:
        assert ranked[: len(available)] == available


def test_a_fallback_is_for_a_model_that_nobody_can_answer() -> None:
    """One that is only full is waited for."""
    full, other = Target(available=False, ready=True), Target()
    assert turns([full], [other]).ranking() == [full]
    full.ready = False
    assert turns([full], [other]).ranking() == [other]
    other.available = other.ready = False
    assert turns([full], [other]).ranking() == []


def test_groups_in_order_before_a_second_round() -> None:
    first, second, third = Target(), Target(tier=2), Target()
    assert take(turns([first, second], [third]), 6) == [first, second, third] * 2


def test_none_available_ends_it() -> None:
    """Everything open: no attempt at all."""
    assert turns([Target(available=False), Target(available=False)]).next() is None
    assert turns([]).next() is None


def test_rest() -> None:
    """In a second round the one that may be asked soonest; never is never, in every round."""
    first, second, third = Target(), Target(), Target()
    here = turns([first, second, third])
    here.rest(third, math.inf)
    assert set(map(id, take(here, 2))) == {id(first), id(second)}
    here.rest(first, 9.0)
    here.rest(second, 8.0)
    assert here.next() == (second, 8.0)
    here.took(second)
    assert here.next() == (first, 9.0)
    here.rest(first, math.inf)
    assert here.next() == (second, 8.0)
    here.rest(second, math.inf)
    assert here.next() is None


def test_availability_is_looked_at_each_time() -> None:
    """One that opens after the first attempt is left out, one that comes back unasked goes first."""
    first, second, third = pool = [Target(), Target(tier=2, available=False), Target(tier=3)]
    here = turns(pool)
    assert take(here, 1) == [first]
    first.available = False
    assert take(here, 2) == [third, third]
    first.available = second.available = True
    assert take(here, 2) == [second, first]
    first.available = second.available = third.available = False
    assert here.next() is None


# ── fallbacks ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("listed", "chain"),
    [
        ({}, "a"),
        ({"a": ["b"]}, "ab"),
        ({"a": ["b"], "b": ["a"]}, "ab"),
        ({"a": ["a"]}, "a"),
        ({"a": ["b", "c"], "b": ["d"], "c": ["d", "e"]}, "abcde"),
        ({"a": ["b", "b"]}, "ab"),
    ],
)
def test_fallbacks(listed: dict[str, list[str]], chain: str) -> None:
    """Its own list first, then theirs; cycles end."""
    assert list(fallbacks("a", lambda name: listed.get(name, []))) == list(chain)


NAMES = st.sampled_from("abcdef")


@given(st.dictionaries(NAMES, st.lists(NAMES, max_size=4)), NAMES)
def test_any_graph_of_fallbacks(listed: dict[str, list[str]], model: str) -> None:
    """Ends; each that can be reached, once; each after one that lists it."""
    chain = list(fallbacks(model, lambda name: listed.get(name, [])))
    assert chain[0] == model
    assert len(set(chain)) == len(chain)
    for position, name in enumerate(chain[1:], 1):
        assert any(name in listed.get(before, []) for before in chain[:position])
    assert all(other in chain for name in chain for other in listed.get(name, []))


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_in_turn() -> None:
    """None of them rests."""
    keys = Rotation(3)
    assert [keys.take(0.0) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_a_refused_key_rests_alone() -> None:
    """For its Retry-After; then it is in turn again."""
    keys = Rotation(3)
    assert keys.take(100.0) == 0
    keys.rest(0, 10.0, 100.0)
    assert [keys.take(109.9) for _ in range(4)] == [1, 2, 1, 2]
    assert [keys.take(110.0) for _ in range(3)] == [0, 1, 2]


def test_a_rest_without_retry_after() -> None:
    """A 401 says nothing of the kind."""
    keys = Rotation(2)
    keys.rest(0, None, 100.0)
    assert {keys.take(100.0 + DEFAULT_REST_S - 0.1) for _ in range(3)} == {1}
    assert {keys.take(100.0 + DEFAULT_REST_S) for _ in range(2)} == {0, 1}


def test_all_rest() -> None:
    """The one whose rest ends first is asked all the same; `spare` says that it is no help to a retry."""
    keys = Rotation(3)
    for index, rest_s in enumerate((30.0, 5.0, 20.0)):
        assert keys.spare(100.0)
        keys.rest(index, rest_s, 100.0)
    assert not keys.spare(100.0)
    assert [keys.take(100.0) for _ in range(3)] == [1, 1, 1]
    assert keys.spare(105.0)


def test_a_single_key() -> None:
    """It is all there is: it is asked whether it rests or not, and is never a spare one."""
    keys = Rotation(1)
    keys.rest(0, 60.0, 100.0)
    assert keys.take(101.0) == 0
    assert not keys.spare(101.0)


def test_a_rest_is_not_shortened() -> None:
    """Two requests were refused with the same key, the second for less."""
    keys = Rotation(2)
    keys.rest(0, 60.0, 100.0)
    keys.rest(0, 1.0, 101.0)
    assert {keys.take(103.0) for _ in range(3)} == {1}


@given(
    st.integers(1, 5),
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 4), st.one_of(st.none(), st.floats(0, 50)), st.floats(0, 20)),
        max_size=60,
    ),
)
def test_any_rests(count: int, steps: list[tuple[bool, int, float | None, float]]) -> None:
    """Never one that rests while another does not; those that do not rest are taken equally often."""
    keys, now = Rotation(count), 1000.0
    until = [0.0] * count
    for rests, index, rest_s, pause in steps:
        now += pause
        if rests:
            index %= count
            keys.rest(index, rest_s, now)
            until[index] = max(until[index], now + (DEFAULT_REST_S if rest_s is None else rest_s))
        ready = {index for index in range(count) if until[index] <= now}
        assert keys.spare(now) is bool(ready)
        if ready:
            assert Counter(keys.take(now) for _ in range(2 * len(ready))) == dict.fromkeys(ready, 2)
        else:
            assert until[keys.take(now)] == min(until)
