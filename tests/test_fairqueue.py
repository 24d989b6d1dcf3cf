"""Order and shares of the queue, and the rate at which it drains: arithmetic, no loop and no clock."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.fairqueue import DrainRate, FairQueue

#: The weights of the three plans that come with a configuration: 1 + priority.
WEIGHTS = {"basic": 1, "pro": 6, "enterprise": 11}


def everybody(_: str) -> bool:
    return True


def serve(queue: FairQueue[str, str], *, blocked: str = "") -> str | None:
    """The next one of the flows that do not begin with `blocked`."""
    can_go = (lambda flow: not flow.startswith(blocked)) if blocked else everybody
    flow = queue.first(can_go)
    return queue.pop(flow, can_go) if flow is not None else None


def filled(weights: dict[str, float], waiters: int) -> FairQueue[str, str]:
    queue: FairQueue[str, str] = FairQueue()
    for number in range(waiters):
        for flow, weight in weights.items():
            queue.push(flow, weight, f"{flow} {number}")
    return queue


def turns(queue: FairQueue[str, str], count: int, *, blocked: str = "") -> Counter[str]:
    """How often each flow was served, of so many turns."""
    served: Counter[str] = Counter()
    for _ in range(count):
        item = serve(queue, blocked=blocked)
        assert item is not None
        served[item.split()[0]] += 1
    return served


def test_first_come_first_served_inside_a_flow() -> None:
    """Whatever leaves in between."""
    queue = filled({"a": 1}, 6)
    assert queue.remove("a", "a 2")
    assert not queue.remove("a", "a 2")
    assert not queue.remove("b", "a 3")
    assert [serve(queue) for _ in range(6)] == ["a 0", "a 1", "a 3", "a 4", "a 5", None]
    assert len(queue) == 0


def test_shares_are_exact_over_a_thousand_turns() -> None:
    """18 turns are one round of the weights 1, 6, 11; 1,000 turns are 55 rounds and 10 more."""
    served = turns(filled(dict(WEIGHTS), 1000), 1000)
    for flow, weight in WEIGHTS.items():
        assert abs(served[flow] - 1000 * weight / 18) < 1
    assert turns(filled(dict(WEIGHTS), 990), 990) == {"basic": 55, "pro": 330, "enterprise": 605}


def test_the_heaviest_goes_first() -> None:
    """Of those who came while nothing was free, in whatever order."""
    for order in (("basic", "pro", "enterprise"), ("enterprise", "basic", "pro")):
        queue: FairQueue[str, str] = FairQueue()
        for flow in order:
            queue.push(flow, WEIGHTS[flow], flow)
        assert [serve(queue) for _ in range(3)] == ["enterprise", "pro", "basic"]


def test_equal_weights_take_turns() -> None:
    """A flow of one waiter does not wait for a long one to end."""
    queue = filled({"a": 1}, 100)
    queue.push("b", 1, "b 0")
    assert turns(queue, 2) == {"a": 1, "b": 1}


def test_coming_one_at_a_time_gains_nothing() -> None:
    """A flow that empties with each turn and comes back at once has the share of one that never empties."""
    queue = filled({"pro": 6}, 2000)
    queue.push("basic", 1, "basic 0")
    served = Counter[str]()
    for _ in range(1400):
        item = serve(queue)
        assert item is not None
        served[item.split()[0]] += 1
        if item.startswith("basic"):
            queue.push("basic", 1, item)
    assert abs(served["basic"] - 200) <= 2


def test_leaving_costs_its_flow_nothing() -> None:
    """A hundred that left before their turn: the one that stayed is where the first of them was."""
    queue = filled({"a": 1, "b": 1}, 101)
    for number in range(100):
        queue.remove("a", f"a {number}")
    assert {serve(queue), serve(queue)} == {"a 100", "b 0"}


def test_time_stands_still_for_those_who_cannot_go() -> None:
    """While a model is full the others pass; afterwards nobody catches up, and shares are what they were."""
    weights = {"x basic": 1.0, "x pro": 6.0, "y basic": 1.0}
    queue = filled({flow.replace(" ", "-"): weight for flow, weight in weights.items()}, 3000)
    assert turns(queue, 1000, blocked="x-") == {"y-basic": 1000}
    served = turns(queue, 80)  # all three again: no credit for the thousand
    assert abs(served["y-basic"] - 10) <= 1
    assert abs(served["x-basic"] - 10) <= 1
    assert abs(served["x-pro"] - 60) <= 1


def test_shares_hold_at_each_bottleneck() -> None:
    """One upstream serves one in ten, the other the rest: at the slow one 6 to 1 is still 6 to 1."""
    queue = filled({"slow-basic": 1, "slow-pro": 6, "fast-basic": 1}, 3000)
    served: Counter[str] = Counter()
    for _ in range(210):
        served += turns(queue, 9, blocked="slow")
        served += turns(queue, 1, blocked="fast")
    assert served["fast-basic"] == 1890
    assert abs(served["slow-pro"] - 180) <= 1
    assert abs(served["slow-basic"] - 30) <= 1


@given(
    weights=st.lists(st.sampled_from([0.1, 0.6, 1, 2, 6, 11]), min_size=2, max_size=6),
    blocked=st.lists(st.integers(0, 5), max_size=60),
    tested=st.integers(0, 5),
)
def test_nobody_starves(weights: list[float], blocked: list[int], tested: int) -> None:
    """Whatever the others could not do before: a flow that can go waits for its share, and not longer."""
    names = [f"{number}" for number in range(len(weights))]
    queue: FairQueue[str, tuple[str, int]] = FairQueue()
    for name, weight in zip(names, weights, strict=True):
        for number in range(400):
            queue.push(name, weight, (name, number))
    for number in blocked:

        def can_go(flow: str, number: int = number) -> bool:
            return flow != f"{number}"

        flow = queue.first(can_go)
        assert flow is not None
        queue.pop(flow, can_go)
    mine = names[tested % len(names)]
    own = weights[names.index(mine)]
    others = [weight for name, weight in zip(names, weights, strict=True) if name != mine]
    most = sum(math.ceil(weight / own) + 1 for weight in others)
    for _ in range(most + 1):
        flow = queue.first(everybody)
        assert flow is not None
        queue.pop(flow, everybody)
        if flow == mine:
            return
    pytest.fail(f"passed over {most + 1} times")


@given(
    st.lists(
        st.tuples(st.sampled_from("+-s"), st.integers(0, 2), st.integers(0, 7)),
        max_size=120,
    )
)
def test_like_lists_of_waiters(steps: list[tuple[str, int, int]]) -> None:
    """Any mix of coming, leaving and turns: each flow is what a plain list would be, and counts agree."""
    queue: FairQueue[int, int] = FairQueue()
    model: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for number, (step, flow, which) in enumerate(steps):
        if step == "+":
            queue.push(flow, 1 + 5 * flow, number)
            model[flow].append(number)
        elif step == "-" and model[flow]:
            left = model[flow].pop(which % len(model[flow]))
            assert queue.remove(flow, left)
        elif step == "s":
            can_go = which.__ne__
            first = queue.first(can_go)
            assert (first is None) == (not any(model[each] for each in model if each != which))
            if first is not None:
                assert first != which
                assert queue.pop(first, can_go) == model[first].pop(0)
        assert len(queue) == sum(map(len, model.values()))
        assert set(queue.flows()) == {each for each in model if model[each]}
        assert [queue.depth(each) for each in model] == [len(model[each]) for each in model]
    assert sorted(queue.drain()) == sorted(item for items in model.values() for item in items)
    assert len(queue) == 0
    assert queue.first(lambda _: True) is None


def test_a_flow_that_was_left_by_all() -> None:
    """Between the question and the answer everybody has left: nobody gets the turn."""
    queue = filled({"a": 1}, 1)
    flow = queue.first(everybody)
    assert flow == "a"
    queue.remove("a", "a 0")
    assert queue.pop(flow, everybody) is None


# ── how fast it drains ───────────────────────────────────────────────────────────────────────────────────


def test_retry_after_is_what_was_observed() -> None:
    """Four grants a second: ten who wait and one more take 2.75 seconds."""
    rate = DrainRate()
    rate.began(100.0)
    for number in range(1, 41):
        rate.granted(100.0 + number / 4)
    assert rate.seconds_per_grant(110.0) == pytest.approx(0.25)
    assert rate.retry_after_s(10, 110.0) == 3
    assert rate.retry_after_s(0, 110.0) == 1


def test_idle_time_is_no_slowness() -> None:
    """An hour in which nobody waited does not count."""
    rate = DrainRate()
    for hour in (0.0, 3600.0, 7200.0):
        rate.began(hour)
        rate.granted(hour + 2)
        rate.ended()
    assert rate.retry_after_s(3, 9000.0) == 8


def test_the_rate_falls_while_nothing_goes() -> None:
    """And is bounded: what is known now says little about an hour from now."""
    rate = DrainRate()
    rate.began(0.0)
    for number in range(1, 11):
        rate.granted(number / 10)
    assert rate.retry_after_s(9, 1.0) == 1
    assert rate.retry_after_s(9, 6.0) == 6
    assert rate.retry_after_s(9, 1e6) == 60


def test_only_the_last_grants_count() -> None:
    """A slow hour is forgotten after 64 fast grants."""
    rate = DrainRate()
    now = 0.0
    rate.began(now)
    for gap in [50.0] * 100 + [0.5] * 64:
        now += gap
        rate.granted(now)
    assert rate.retry_after_s(1, now) == 1


def test_nothing_observed_yet() -> None:
    """A second each, until it takes longer; a clock that jumps back does no harm."""
    rate = DrainRate()
    assert rate.retry_after_s(0, 5.0) == 1
    assert rate.retry_after_s(7, 5.0) == 8
    rate.began(5.0)
    assert rate.retry_after_s(7, 8.0) == 24
    assert rate.retry_after_s(7, 1.0) == 8
    rate.granted(4.0)
    assert rate.retry_after_s(7, 4.0) == 1
