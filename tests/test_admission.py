"""Admission asks a near store by plain calls and a far one by coroutines: what comes of both is the same."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import accounting, allotment
from proxy.accounting import Bill
from proxy.admission import Admission
from proxy.allotment import Allotments
from proxy.context import Context
from proxy.endpoints import match
from proxy.errors import HeadraceError
from proxy.identity import Principal
from proxy.metrics import Metrics
from proxy.schema import Limits, Model, Plan, Price, Target
from proxy.schema import Upstream as UpstreamSettings
from proxy.seat import Manner, Seat
from proxy.shared import Owner
from proxy.slots import WaitingRoom
from proxy.state import Slot
from proxy.state import memory as shared
from proxy.state.memory import MemoryState
from proxy.stores import Stores
from proxy.upstream import Upstream
from proxy.usage import Source, Usage

pytestmark = pytest.mark.timeout(60)

CALLERS = (
    (Principal(name="a", key_id="a", plan="small"), Plan(requests_per_minute=4, tokens_per_minute=60)),
    (
        Principal(name="b", key_id="b", plan="shared"),
        Plan(requests_per_minute=6, burst=3, total_requests_per_minute=5, max_in_flight=2),
    ),
    (Principal(name="c", key_id="c", plan="free"), Plan()),
    (
        Principal(name="d", key_id="d", plan="rich"),
        Plan(tokens_per_minute=90, budget_day=Decimal("0.00005"), max_in_flight=1),
    ),
    (None, None),
)
PRICE = Price(input=Decimal(1), output=Decimal(1))
TO = (Target(name="one"),)
MODELS = (
    Model(upstreams=TO),
    Model(upstreams=TO, tokens_per_minute=80),
    Model(upstreams=TO, requests_per_minute=3, price=PRICE),
)


class Far(MemoryState):
    """Shared memory that is spoken to as if it were at the other end of a network."""

    near = None


class Step(NamedTuple):
    """A request that comes after `pause_s`, and how many others come before it ends."""

    pause_s: float
    caller: int
    model: int
    output: int
    used: int | None
    stays: int


STEPS = st.builds(
    Step,
    st.sampled_from((0.0, 0.5, 7.0, 31.0)),
    st.integers(0, len(CALLERS) - 1),
    st.integers(0, len(MODELS) - 1),
    st.integers(0, 70),
    st.none() | st.integers(0, 120),
    st.integers(0, 4),
)


class Desk:
    """One process's limits, asked as the data path asks them; `seen` is what callers get to know."""

    def __init__(self, state: MemoryState, stores: Stores, mode: Literal["enforce", "observe"]) -> None:
        self.state = state
        stores.state = state
        self.metrics = Metrics("0")
        limits = Limits(max_in_flight=4, mode=mode)
        self.admission = Admission(limits, stores, WaitingRoom(state, 0, 1.0), self.metrics)
        self.upstreams = [
            Upstream(name, UpstreamSettings(base_url="http://x", max_in_flight=2), "http://x", push=False)
            for name in ("one", "two")
        ]
        self.seen: list[Any] = []
        self.inside: list[tuple[int, Context, Bill, Seat | None]] = []

    async def comes(self, step: Step) -> None:
        ctx = Context("id", match("POST", "/v1/chat/completions"), "/v1/chat/completions", 0.0)
        ctx.principal, plan = CALLERS[step.caller]
        ctx.model, ctx.asked_tokens = f"m{step.model}", 5
        try:
            await self._enters(ctx, plan, step)
        except HeadraceError as error:
            retry_after_s = getattr(error, "retry_after_s", None)
            self.seen.append((type(error).__name__, retry_after_s, dict(ctx.allowance)))

    async def _enters(self, ctx: Context, plan: Plan | None, step: Step) -> None:
        if ctx.principal is not None and plan is not None:
            waiting = self.admission.arrive(ctx, ctx.principal, plan)
            assert (waiting is None) == (self.state.near is not None or plan.requests_per_minute is None)
            if waiting is not None:
                await waiting
        entry = MODELS[step.model]
        bill, mine = Bill(ctx.asked_tokens + step.output), self.admission.allotment(ctx.principal, plan)
        await self._if_any(accounting.open_bill(self.admission, ctx, mine, entry, bill))
        try:
            seat = self.admission.seat_at_once(ctx, mine, self.upstreams)
            if seat is None:
                seat = await self.admission.seat_in_turn(ctx, mine, self.upstreams, Manner.NOW)
        except HeadraceError as error:
            await self._if_any(accounting.settle(self.admission, ctx, bill, entry, error))
            raise
        self.seen.append((seat.upstream, dict(ctx.allowance)))
        if step.used is not None:
            ctx.usage = Usage(step.used, 0, 0, 0, Source.REPORTED)
        ctx.reached_upstream = ctx.committed = True
        self.inside.append((step.stays, ctx, bill, seat))

    async def _if_any(self, waiting: Awaitable[None] | None) -> None:
        if waiting is not None:
            await waiting

    async def leave(self, *, all_of_them: bool = False) -> None:
        """Those whose time is over."""
        for at, (stays, ctx, bill, seat) in reversed(list(enumerate(self.inside))):
            if stays and not all_of_them:
                self.inside[at] = (stays - 1, ctx, bill, seat)
                continue
            del self.inside[at]
            assert seat is not None
            with seat:
                pass
            entry = MODELS[int((ctx.model or "")[1:])]
            await self._if_any(accounting.settle(self.admission, ctx, bill, entry, None))
        if self.state.near is None:  # what is given back there takes a turn of the loop
            for _ in range(3):
                await asyncio.sleep(0)

    async def close(self) -> None:
        for upstream in self.upstreams:
            await upstream.close()
        await self.state.close()


@contextmanager
def counters(kind: type[MemoryState], mode: Literal["enforce", "observe"]) -> Iterator[Desk]:
    fd = shared.create(lease_s=600)
    stores = Stores(Limits(), Owner(fd, 0), lambda _: None)
    yield Desk(kind(fd, 0), stores, mode)
    os.close(fd)


async def _play(kind: type[MemoryState], mode: Literal["enforce", "observe"], steps: list[Step]) -> list[Any]:
    """What was seen, what was counted, and what is left of everything at the end."""
    now = 1000.0
    with pytest.MonkeyPatch.context() as patched, counters(kind, mode) as desk:
        patched.setattr("proxy.admission.monotonic", lambda: now)
        for step in steps:
            now += step.pause_s
            await desk.leave()
            await desk.comes(step)
        await desk.leave(all_of_them=True)
        assert desk.admission.reserved == 0
        names = ["machine", "upstream:one", "upstream:two", "caller:b", "caller:d"]
        assert await desk.state.peek_slots(names, now) == [0] * 5
        left = [await desk.admission.left(who, plan) for who, plan in CALLERS if who and plan]
        decisions = dict(desk.metrics.limit_decisions.values)
        await desk.close()
    return [*desk.seen, decisions, left]


@given(steps=st.lists(STEPS, max_size=25), mode=st.sampled_from(("enforce", "observe")))
@settings(max_examples=60, deadline=None)
def test_near_and_far_are_the_same(steps: list[Step], mode: Literal["enforce", "observe"]) -> None:
    """Decisions, figures of what is left, refusals, counters, slots, settlements: whatever is asked for."""
    assert asyncio.run(_play(MemoryState, mode, steps)) == asyncio.run(_play(Far, mode, steps))


def test_a_plan_is_prepared_once_and_read_again_when_it_changes() -> None:
    """A reload that leaves a caller its name and gives it another plan is not overlooked."""
    known = Allotments(Slot("machine", 10))
    who = Principal(name="a", key_id="a", plan="small")
    before, after = Plan(tokens_per_minute=5), Plan(tokens_per_minute=6)
    first = known.of(who, before)
    assert known.of(who, before) is first
    assert first.tokens is not None
    assert first.tokens.rate_per_minute == 5
    changed = known.of(who, after).tokens
    assert changed is not None
    assert changed.rate_per_minute == 6
    assert known.of(None, None).slots == (Slot("machine", 10),)


def test_callers_that_came_long_ago_are_forgotten() -> None:
    """Whoever can make up names (addresses, subjects of tokens) fills no memory with them."""
    known, plan = Allotments(Slot("machine", 10)), Plan(requests_per_minute=5)
    for number in range(3 * allotment._REMEMBERED):
        known.of(Principal(name=f"ip:{number}", key_id="", plan="anonymous"), plan)
        assert len(known._known) <= allotment._REMEMBERED


async def test_what_is_counted_of_a_seat_at_once() -> None:
    """Both limits were asked, and nobody waited."""
    with counters(MemoryState, "enforce") as desk:
        ctx = Context("id", None, "/", 0.0)
        ctx.principal, plan = CALLERS[1]
        seat = desk.admission.seat_at_once(ctx, desk.admission.allotment(ctx.principal, plan), desk.upstreams)
        assert seat is not None
        assert desk.metrics.limit_decisions.values == {("in_flight", "allowed"): 1, ("global", "allowed"): 1}
        assert ctx.queue_s == 0.0
        await desk.close()


async def test_a_reload_changes_the_slots_that_are_taken() -> None:
    """Limits that are set again hold for the next request, whatever was prepared for the old ones."""
    with counters(MemoryState, "enforce") as desk:
        ctx = Context("id", None, "/", 0.0)
        first = desk.admission.seat_at_once(ctx, desk.admission.allotment(None, None), desk.upstreams)
        desk.admission.limits = Limits(max_in_flight=1)
        assert desk.admission.seat_at_once(ctx, desk.admission.allotment(None, None), desk.upstreams) is None
        assert first is not None
        with first:
            pass
        second = desk.admission.seat_at_once(ctx, desk.admission.allotment(None, None), desk.upstreams)
        assert second is not None
        await desk.close()


async def test_orders_of_upstreams_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many upstreams can be asked in more orders than anybody has memory for."""
    monkeypatch.setattr("proxy.admission._REMEMBERED", 1)
    with counters(MemoryState, "enforce") as desk:
        one, two = desk.upstreams
        for _ in range(2):
            for order in ([one, two], [two, one]):
                everybody = desk.admission.allotment(None, None)
                seat = desk.admission.seat_at_once(Context("id", None, "/", 0.0), everybody, order)
                assert seat is not None
                with seat:
                    assert seat.upstream == order[0].name
                assert len(desk.admission._choices) == 1
        await desk.close()
