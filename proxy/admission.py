"""What a caller may use: request rate, tokens, slots. Where a limit is taken, and given back.

In the order of a request (contract, "Limits"): `spend_address` takes from the address; `arrive` from the
caller's request rate, by the head alone; `take_model_request` and `reserve_tokens` what depends on the body;
`settle` corrects the tokens once the real usage is known; a seat holds the slots.

What nearly every request does is a plain call while the store is near: it answers None when it is done, and
else what is to be awaited.

`limits.mode: observe` counts who would be refused and refuses nobody.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from proxy import budgets
from proxy.allotment import Allotment, Allotments, so_many
from proxy.errors import BudgetExceeded, LimitExceeded, Overloaded, QueueFull, TokensLimited, TooManyInFlight
from proxy.permit import Choices, Direct, Permit, Slots, Ticket, Wanted
from proxy.pricing import PICOS_PER_NANO, format_usd, usd
from proxy.seat import Manner, Seat
from proxy.state import Charge, Slot, Spend, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from proxy.bucket import Decision
    from proxy.context import Context
    from proxy.identity import Principal
    from proxy.metrics import Metrics
    from proxy.schema import Limits, Model, Plan
    from proxy.stores import Stores
    from proxy.upstream import Upstream

#: The plan that callers without one wait under: a label of the queue's metrics.
OPEN_PLAN = "open"


#: Orders of upstreams that are remembered; past that all are forgotten. Mostly there is one for a model.
_REMEMBERED = 1024


class Reservation(msgspec.Struct, gc=False):
    """Tokens that were taken for a request whose real usage is not known yet: `most` of them, if the buckets
    hold so many."""

    most: int = 0
    charges: tuple[Charge, ...] = ()


#: Scopes, labels of the metrics, and what is taken from them.
_Wanted = tuple[tuple[str, ...], tuple[Charge, ...]]


class Admission:
    """The limits of one process."""

    def __init__(self, limits: Limits, stores: Stores, slots: Slots, metrics: Metrics) -> None:
        self.state = stores.state
        self.slots = slots
        self._near = stores.state.near
        self._direct = slots.direct
        self._own = Direct(stores.state)
        self._local = stores.local
        self._machine_name = stores.machine
        self._decisions = metrics.limit_decisions.values
        self.reserved = 0  # reservations that are not settled yet
        self.limits = limits

    @property
    def limits(self) -> Limits:
        """Set again by a reload."""
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = limits
        self._machine = Slot(self._machine_name, limits.max_in_flight)
        self._allotments = Allotments(self._machine)
        self._choices: dict[tuple[Upstream, ...], Choices] = {}
        self._enforces = limits.mode == "enforce"
        self._refused = "refused" if self._enforces else "observed"

    # ── the address ──────────────────────────────────────────────────────────────────────────────────────

    async def spend_address(self, client_ip: str) -> None:
        """A failed authentication, or a request without one. On this machine only: no store is asked."""
        per_ip = self.limits.per_ip
        charge = Charge(f"ip:{client_ip}", per_ip.requests_per_minute, per_ip.burst)
        self._judge(("ip",), self._local.take_now([charge], monotonic()), LimitExceeded)

    # ── the caller ───────────────────────────────────────────────────────────────────────────────────────

    def allotment(self, principal: Principal | None, plan: Plan | None) -> Allotment:
        """Of a caller under its plan, for what follows; without a plan only the machine is limited."""
        return self._allotments.of(principal, plan)

    def arrive(self, ctx: Context, principal: Principal, plan: Plan) -> Awaitable[None] | None:
        """Takes one request of the caller's rate, and of its plan's. Raises LimitExceeded."""
        allotment = self._allotments.of(principal, plan)
        if not allotment.arrival:
            return None
        if self._near is None:
            return self._arrive_far(ctx, allotment)
        self._arrived(ctx, allotment, self._near.take_now(allotment.arrival, monotonic()))
        return None

    async def _arrive_far(self, ctx: Context, allotment: Allotment) -> None:
        self._arrived(ctx, allotment, await self._take(allotment.arrival))

    def _arrived(self, ctx: Context, allotment: Allotment, decisions: Sequence[Decision]) -> None:
        if allotment.requests is not None:
            ctx.allowance["requests"] = decisions[0]
        self._judge(allotment.scopes, decisions, LimitExceeded)

    # ── what the body asks for ───────────────────────────────────────────────────────────────────────────

    async def take_model_request(self, name: str, rate: int) -> None:
        """One request of the model's own `rate` a minute. Raises LimitExceeded."""
        self._judge(("model",), await self._take([Charge(f"model:{name}", rate, rate)]), LimitExceeded)

    def reserve_tokens(
        self, ctx: Context, allotment: Allotment, entry: Model, held: Reservation
    ) -> Awaitable[None] | None:
        """Takes `held.most` tokens, at most a full bucket of them. Raises TokensLimited."""
        scopes: tuple[str, ...] = ()
        charges: tuple[Charge, ...] = ()
        own, rate = allotment.tokens, entry.tokens_per_minute
        if own is not None:
            scopes, charges = ("tokens",), (so_many(own, held.most),)
        if rate is not None:
            scopes += ("model",)
            charges += (so_many(Charge(f"model-tokens:{ctx.model}", rate, rate), held.most),)
        if not charges:
            return None
        if self._near is None:
            return self._reserve_far(ctx, held, (scopes, charges))
        self._reserved(ctx, held, (scopes, charges), self._near.take_now(charges, monotonic()))
        return None

    async def _reserve_far(self, ctx: Context, held: Reservation, wanted: _Wanted) -> None:
        self._reserved(ctx, held, wanted, await self._take(wanted[1]))

    def _reserved(
        self, ctx: Context, held: Reservation, wanted: _Wanted, decisions: Sequence[Decision]
    ) -> None:
        scopes, charges = wanted
        if scopes[0] == "tokens":
            ctx.allowance["tokens"] = decisions[0]
        if self._judge(scopes, decisions, TokensLimited):  # else it is only observed: nothing was taken
            held.charges = charges
            self.reserved += 1

    def settle(self, held: Reservation, tokens: int | None) -> Awaitable[None] | None:
        """Corrects a reservation by what was really used; a second call does nothing. None: nobody knows,
        and what was reserved stays spent."""
        charges = held.charges
        if not charges:
            return None
        held.charges = ()
        self.reserved -= 1
        if tokens is None:
            return None
        corrections = []
        for charge in charges:
            if tokens != charge.amount:
                delta = tokens - charge.amount
                corrections.append(Charge(charge.bucket_id, charge.rate_per_minute, charge.burst, delta))
        if not corrections:
            return None
        if self._near is None:
            return self._settle_far(corrections)
        self._near.settle_now(corrections, monotonic())
        return None

    async def _settle_far(self, corrections: Sequence[Charge]) -> None:
        try:
            await self.state.settle(corrections, monotonic())
        except StoreUnavailable:
            pass  # the bucket fills up by itself

    async def spend(self, wanted: Sequence[Spend]) -> Sequence[Spend]:
        """Takes from all budgets or none. Raises BudgetExceeded; empty if it is only observed."""
        wall_now = time.time()
        try:
            within = await self.state.spend(wanted, wall_now)
        except StoreUnavailable:
            raise Overloaded from None
        self._count("budget", allowed=all(within))
        if all(within):
            return wanted
        if not self._enforces:
            return ()
        last = max(spend.resets_at for spend, inside in zip(wanted, within, strict=True) if not inside)
        raise BudgetExceeded(
            last - wall_now, datetime.fromtimestamp(last, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        )

    async def budgets_left(self, principal: Principal, plan: Plan) -> list[dict[str, object] | None]:
        """Of the caller's own day and month; None where there is no budget."""
        own = budgets.own(principal, plan, time.time())
        names = [spend.name for spend in own if spend is not None]
        try:
            spent = iter(await self.state.peek_spend(names, time.time()) if names else ())
        except StoreUnavailable:
            raise Overloaded from None
        return [None if spend is None else _budget_document(spend, next(spent)) for spend in own]

    async def settle_spend(self, taken: Sequence[Spend], nanos: int) -> None:
        """Corrects what was taken by what was really spent."""
        corrections = [
            Spend(spend.name, nanos - spend.amount, spend.limit, spend.resets_at)
            for spend in taken
            if nanos != spend.amount
        ]
        if corrections:
            try:
                await self.state.settle_spend(corrections, time.time())
            except StoreUnavailable:
                pass  # the ledger has the truth

    # ── slots ────────────────────────────────────────────────────────────────────────────────────────────

    def seat_at_once(self, ctx: Context, allotment: Allotment, upstreams: Sequence[Upstream]) -> Seat | None:
        """The caller's own slot, the machine's and one upstream's, if all of them are free: nearly always.
        None: `seat_in_turn` has to be asked, now. To be left, however the request ends."""
        permit = self._direct.take_now(allotment.slots, self._choices_of(upstreams))
        return None if permit is None else self._seated(ctx, allotment, permit)

    async def seat_in_turn(
        self, ctx: Context, allotment: Allotment, upstreams: Sequence[Upstream], manner: Manner
    ) -> Seat:
        """The caller's own slot at once or 429; the machine's and one upstream's together, waiting if need
        be. To be left, however the request ends."""
        began_at = monotonic()
        choices = self._choices_of(upstreams)
        try:
            if self._near is None:
                permit = await self._direct.try_now(Wanted(allotment.slots, choices))
                if permit is not None:
                    return self._seated(ctx, allotment, permit)
            own = None if allotment.slot is None else await self._own_slot(allotment.slot)
            try:
                wanted = Wanted((self._machine,), choices)
                shared = await self._shared_slots(wanted, _ticket(ctx, allotment.plan, manner), manner)
            except BaseException:  # a caller that leaves the queue too
                if own is not None:
                    own.release()
                raise
            return Seat(shared, own, self._direct, self._choices_of)
        except StoreUnavailable:
            raise Overloaded from None
        finally:
            ctx.queue_s = monotonic() - began_at

    def _seated(self, ctx: Context, allotment: Allotment, permit: Permit) -> Seat:
        counts = self._decisions
        if allotment.slot is not None:
            counts["in_flight", "allowed"] += 1
        counts["global", "allowed"] += 1
        ctx.queue_s = 0.0
        return Seat(permit, None, self._direct, self._choices_of)

    async def left(self, principal: Principal, plan: Plan) -> dict[str, object]:
        """What a caller could use now, by unit; null is no limit."""
        now = monotonic()
        allotment = self._allotments.of(principal, plan)
        rates = {"requests": allotment.requests, "tokens": allotment.tokens}
        units: dict[str, object] = {"requests": None, "tokens": None, "in_flight": None}
        try:
            for unit, charge in rates.items():
                if charge is not None:
                    (decision,) = await self.state.peek([so_many(charge, 0)], now)
                    units[unit] = _as_document(decision, charge.rate_per_minute)
            if (slot := allotment.slot) is not None:
                (taken,) = await self.state.peek_slots([slot.name], now)
                units["in_flight"] = {"limit": slot.limit, "remaining": max(slot.limit - taken, 0)}
        except StoreUnavailable:
            raise Overloaded from None
        return units

    def _choices_of(self, upstreams: Sequence[Upstream]) -> Choices:
        """Kept for each configuration of an upstream and of the limits."""
        key = tuple(upstreams)
        choices = self._choices.get(key)
        if choices is None:
            if len(self._choices) >= _REMEMBERED:
                self._choices.clear()
            choices = self._choices[key] = tuple([(each.name, self._slot_of(each)) for each in upstreams])
        return choices

    def _slot_of(self, upstream: Upstream) -> Slot:
        most = upstream.settings.max_in_flight or self._limits.max_in_flight
        return Slot(f"upstream:{upstream.name}", most)

    async def _own_slot(self, slot: Slot) -> Permit | None:
        """Raises TooManyInFlight."""
        permit = await self._own.try_now(Wanted((), ((slot.name, slot),)))
        self._count("in_flight", allowed=permit is not None)
        if permit is None and self._enforces:
            raise TooManyInFlight(1.0)
        return permit

    async def _shared_slots(self, wanted: Wanted, ticket: Ticket, manner: Manner) -> Permit | None:
        """Raises QueueFull, QueueTimeout, Draining."""
        if not self._enforces or manner is Manner.NOW:
            permit = await self._direct.try_now(wanted)
            self._count("global", allowed=permit is not None)
            if permit is None and self._enforces:
                raise Overloaded
            return permit
        try:
            permit = await self.slots.enter(wanted, ticket)
        except QueueFull:
            self._count("global", allowed=False)
            raise
        self._count("global", allowed=True)
        return permit

    # ── deciding ─────────────────────────────────────────────────────────────────────────────────────────

    async def _take(self, charges: Sequence[Charge]) -> list[Decision]:
        try:
            return await self.state.take(charges, monotonic())
        except StoreUnavailable:
            raise Overloaded from None  # limits.on_store_failure: closed

    def _judge(
        self, scopes: Sequence[str], decisions: Sequence[Decision], refusal: type[LimitExceeded]
    ) -> bool:
        """Counts each decision; are all allowed? The longest wait of those that refuse is the caller's."""
        counts, wait_s = self._decisions, 0.0
        for scope, decision in zip(scopes, decisions, strict=True):
            if decision.allowed:
                counts[scope, "allowed"] += 1
            else:
                counts[scope, self._refused] += 1
                wait_s = max(wait_s, decision.retry_after_s)
        if not wait_s:
            return True
        if self._enforces:
            raise refusal(wait_s)
        return False

    def _count(self, scope: str, *, allowed: bool) -> None:
        self._decisions[scope, "allowed" if allowed else self._refused] += 1


def _ticket(ctx: Context, plan: Plan | None, manner: Manner) -> Ticket:
    low = manner is Manner.LOW
    if ctx.principal is None or plan is None:
        return Ticket(OPEN_PLAN, low=low)
    return Ticket(ctx.principal.plan, plan.priority, low)


def _budget_document(budget: Spend, spent: int) -> dict[str, object]:
    """Spent includes what requests under way may still cost."""
    return {
        "limit_usd": _usd(budget.limit),
        "spent_usd": _usd(spent),
        "remaining_usd": _usd(max(budget.limit - spent, 0)),
        "resets_at": _date(budget.resets_at),
    }


def _usd(nanos: int) -> str:
    return format_usd(usd(nanos * PICOS_PER_NANO))


def _date(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _as_document(decision: Decision, per_minute: float) -> dict[str, object]:
    return {
        "per_minute": per_minute,
        "limit": decision.limit,
        "remaining": decision.remaining,
        "reset_seconds": round(decision.reset_after_s, 3),
    }
