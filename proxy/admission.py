"""What a caller may use: request rate, tokens, slots. Where a limit is taken, and given back.

In the order of a request (contract, "Limits"): `spend_address` takes from the address; `arrive` from the
caller's request rate, by the head alone; `take_model_request` and `reserve_tokens` what depends on the body;
`settle` corrects the tokens once the real usage is known; `seat` holds the slots.

`limits.mode: observe` counts who would be refused and refuses nobody.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from proxy import budgets
from proxy.errors import BudgetExceeded, LimitExceeded, Overloaded, QueueFull, TokensLimited, TooManyInFlight
from proxy.permit import Direct, Permit, Slots, Ticket, Wanted
from proxy.pricing import PICOS_PER_NANO, format_usd, usd
from proxy.seat import Manner, Seat
from proxy.state import Charge, Slot, Spend, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.bucket import Decision
    from proxy.context import Context
    from proxy.identity import Principal
    from proxy.metrics import Metrics
    from proxy.schema import Limits, Model, Plan
    from proxy.stores import Stores
    from proxy.upstream import Upstream

#: The plan that callers without one wait under: a label of the queue's metrics.
OPEN_PLAN = "open"


class Reservation(msgspec.Struct):
    """Tokens that were taken for a request whose real usage is not known yet."""

    charges: tuple[Charge, ...] = ()


class Admission:
    """The limits of one process."""

    def __init__(self, limits: Limits, stores: Stores, slots: Slots, metrics: Metrics) -> None:
        self.state = stores.state
        self.slots = slots
        self._own = Direct(stores.state, remote=stores.remote)
        self._local = stores.local
        self._machine_name = stores.machine
        self._metrics = metrics
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
        self._slots_of: dict[Upstream, Slot] = {}
        self._enforces = limits.mode == "enforce"

    # ── the address ──────────────────────────────────────────────────────────────────────────────────────

    async def spend_address(self, client_ip: str) -> None:
        """A failed authentication, or a request without one. On this machine only: no store is asked."""
        per_ip = self.limits.per_ip
        charge = Charge(f"ip:{client_ip}", per_ip.requests_per_minute, per_ip.burst)
        decisions = await self._local.take([charge], monotonic())
        self._judge(("ip",), decisions, LimitExceeded)

    # ── the caller ───────────────────────────────────────────────────────────────────────────────────────

    async def arrive(self, ctx: Context, name: str, plan_name: str, plan: Plan) -> None:
        """Takes one request of the caller's rate, and of its plan's. Raises LimitExceeded."""
        scopes, charges = [], []
        if plan.requests_per_minute is not None:
            scopes.append("key")
            charges.append(request_charge(name, plan))
        if plan.total_requests_per_minute is not None:
            rate = plan.total_requests_per_minute
            scopes.append("plan")
            charges.append(Charge(f"plan:{plan_name}", rate, rate))
        if not charges:
            return
        decisions = await self._take(charges)
        if plan.requests_per_minute is not None:
            ctx.allowance["requests"] = decisions[0]
        self._judge(scopes, decisions, LimitExceeded)

    # ── what the body asks for ───────────────────────────────────────────────────────────────────────────

    async def take_model_request(self, name: str, rate: int) -> None:
        """One request of the model's own `rate` a minute. Raises LimitExceeded."""
        self._judge(("model",), await self._take([Charge(f"model:{name}", rate, rate)]), LimitExceeded)

    async def reserve_tokens(
        self, ctx: Context, plan: Plan | None, model: tuple[str, Model], tokens: int
    ) -> Reservation:
        """Takes the tokens that a request may cost, at most a full bucket of them. Raises TokensLimited."""
        model_name, entry = model
        scopes, charges = [], []
        if plan is not None and plan.tokens_per_minute is not None and ctx.principal is not None:
            scopes.append("tokens")
            charges.append(token_charge(ctx.principal.name, plan, tokens))
        if entry.tokens_per_minute is not None:
            rate = entry.tokens_per_minute
            scopes.append("model")
            charges.append(Charge(f"model-tokens:{model_name}", rate, rate, min(tokens, rate)))
        if not charges:
            return Reservation()
        decisions = await self._take(charges)
        if scopes[0] == "tokens":
            ctx.allowance["tokens"] = decisions[0]
        self._judge(scopes, decisions, TokensLimited)
        if not all([decision.allowed for decision in decisions]):
            return Reservation()  # observed only: nothing was taken
        self.reserved += 1
        return Reservation(tuple(charges))

    async def settle(self, reservation: Reservation, tokens: int | None) -> None:
        """Corrects a reservation by what was really used; a second call does nothing. None: nobody knows,
        and what was reserved stays spent."""
        charges, reservation.charges = reservation.charges, ()
        self.reserved -= bool(charges)
        if tokens is None:
            return
        corrections = [
            Charge(charge.bucket_id, charge.rate_per_minute, charge.burst, tokens - charge.amount)
            for charge in charges
            if tokens != charge.amount
        ]
        if corrections:
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

    async def seat(
        self, ctx: Context, plan: Plan | None, upstreams: Sequence[Upstream], manner: Manner
    ) -> Seat:
        """The caller's own slot at once or 429; the machine's and one upstream's together, waiting if need
        be. To be left (`async with`), however the request ends."""
        began_at = monotonic()
        own = None
        if plan is not None and plan.max_in_flight is not None and ctx.principal is not None:
            own = own_slot(ctx.principal.name, plan)
        try:
            # Nearly always all of them are free: one step. Who finds them taken asks one after the other.
            permit = await self.slots.try_now(self._wanted(upstreams, own))
            if permit is None:
                return await self._seat_in_turn(ctx, plan, own, (upstreams, manner))
        except StoreUnavailable:
            raise Overloaded from None
        finally:
            ctx.queue_s = monotonic() - began_at
        if own is not None:
            self._count("in_flight", allowed=True)
        self._count("global", allowed=True)
        return Seat(permit, None, self.slots, self.slot_of)

    async def _seat_in_turn(
        self, ctx: Context, plan: Plan | None, own: Slot | None, wish: tuple[Sequence[Upstream], Manner]
    ) -> Seat:
        name, priority = OPEN_PLAN, 0
        if ctx.principal is not None and plan is not None:
            name, priority = ctx.principal.plan, plan.priority
        upstreams, manner = wish
        ticket = Ticket(name, priority, manner is Manner.LOW)
        held = None if own is None else await self._own_slot(own)
        try:
            permit = await self._shared_slots(self._wanted(upstreams, None), ticket, manner)
        except BaseException:  # a caller that leaves the queue too
            if held is not None:
                await held.release()
            raise
        return Seat(permit, held, self.slots, self.slot_of)

    async def left(self, name: str, plan: Plan) -> dict[str, object]:
        """What a caller could use now, by unit; null is no limit."""
        now = monotonic()
        units: dict[str, object] = {"requests": None, "tokens": None, "in_flight": None}
        try:
            if plan.requests_per_minute is not None:
                (decision,) = await self.state.peek([request_charge(name, plan, 0)], now)
                units["requests"] = _as_document(decision, plan.requests_per_minute)
            if plan.tokens_per_minute is not None:
                (decision,) = await self.state.peek([token_charge(name, plan, 0)], now)
                units["tokens"] = _as_document(decision, plan.tokens_per_minute)
            if plan.max_in_flight is not None:
                (taken,) = await self.state.peek_slots([own_slot(name, plan).name], now)
                left = max(plan.max_in_flight - taken, 0)
                units["in_flight"] = {"limit": plan.max_in_flight, "remaining": left}
        except StoreUnavailable:
            raise Overloaded from None
        return units

    def _wanted(self, upstreams: Sequence[Upstream], own: Slot | None) -> Wanted:
        """The machine's slot, and one of these upstreams'; with the caller's own if it is not held yet."""
        machine = self._machine
        return Wanted(
            (machine,) if own is None else (own, machine),
            tuple([(each.name, self.slot_of(each)) for each in upstreams]),
        )

    def slot_of(self, upstream: Upstream) -> Slot:
        """Made once for each configuration of an upstream and of the limits."""
        slot = self._slots_of.get(upstream)
        if slot is None:
            most = upstream.settings.max_in_flight or self._limits.max_in_flight
            slot = self._slots_of[upstream] = Slot(f"upstream:{upstream.name}", most)
        return slot

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
            permit = await self.slots.try_now(wanted)
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
    ) -> None:
        """Counts each decision; the longest wait of those that refuse is the caller's."""
        wait_s = 0.0
        for scope, decision in zip(scopes, decisions, strict=True):
            self._count(scope, allowed=decision.allowed)
            if decision.retry_after_s > wait_s:
                wait_s = decision.retry_after_s
        if wait_s > 0 and self._enforces:
            raise refusal(wait_s)

    def _count(self, scope: str, *, allowed: bool) -> None:
        result = "allowed" if allowed else "refused" if self._enforces else "observed"
        self._metrics.limit_decisions.add((scope, result))


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


def _as_document(decision: Decision, per_minute: int) -> dict[str, object]:
    return {
        "per_minute": per_minute,
        "limit": decision.limit,
        "remaining": decision.remaining,
        "reset_seconds": round(decision.reset_after_s, 3),
    }


def request_charge(name: str, plan: Plan, amount: int = 1) -> Charge:
    """One request of a caller; the plan has a request rate."""
    assert plan.requests_per_minute is not None
    return Charge(
        f"requests:{name}", plan.requests_per_minute, plan.burst or plan.requests_per_minute, amount
    )


def own_slot(name: str, plan: Plan) -> Slot:
    """A caller's own slot; the plan has a limit of requests in flight."""
    assert plan.max_in_flight is not None
    return Slot(f"caller:{name}", plan.max_in_flight)


def token_charge(name: str, plan: Plan, tokens: int) -> Charge:
    """Tokens of a caller, at most a full bucket; the plan has a token rate."""
    rate = plan.tokens_per_minute
    assert rate is not None
    return Charge(f"tokens:{name}", rate, rate, min(tokens, rate))
