"""What may be spent: dollars a day and a month, of a caller and of all callers of a plan together.

Days and months are those of UTC. Counters are in nanodollars (pricing.cost_nanos). What a request may cost at
most is taken before it is sent, and corrected by what it did cost: of requests that come together none can
spend what another has taken. So a budget may refuse a little early, and is never overdrawn by more than the
prompt was underestimated.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from proxy.identity import Principal
from proxy.schema import Plan
from proxy.state import Spend

NANOS = 10**9


def ends_of(wall_now: float) -> tuple[float, float]:
    """When the day and the month of this moment are over: seconds since the epoch."""
    day = datetime.fromtimestamp(wall_now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    month = (day.replace(day=1) + timedelta(days=32)).replace(day=1)
    return (day + timedelta(days=1)).timestamp(), month.timestamp()


def begins_of(wall_now: float) -> tuple[float, float]:
    """When the day and the month of this moment began."""
    day = datetime.fromtimestamp(wall_now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return day.timestamp(), day.replace(day=1).timestamp()


def has_own(principal: Principal) -> bool:
    """Has the caller any budget, whatever its plan?"""
    return principal.budget_day_usd is not None or principal.budget_month_usd is not None


def of_plan(plan: Plan) -> bool:
    """Has everybody of this plan a budget, or all of them together?"""
    return not (
        plan.budget_day is None
        and plan.budget_month is None
        and plan.total_budget_day is None
        and plan.total_budget_month is None
    )


def spends(principal: Principal, plan: Plan, nanos: int, wall_now: float) -> list[Spend]:
    """What a request that may cost this much takes from each of its caller's budgets; empty: it has none."""
    limits = _limits(principal, plan)
    ends = ends_of(wall_now)
    named = zip(_names(principal.name, principal.plan), limits, (*ends, *ends), strict=True)
    return [
        Spend(name, nanos, int(limit * NANOS), resets_at)
        for name, limit, resets_at in named
        if limit is not None
    ]


def own(principal: Principal, plan: Plan, wall_now: float) -> list[Spend | None]:
    """The caller's own budgets of the day and of the month, with nothing taken."""
    named = zip(
        _names(principal.name, principal.plan), _limits(principal, plan), ends_of(wall_now), strict=False
    )
    return [
        None if limit is None else Spend(name, 0, int(limit * NANOS), resets_at)
        for name, limit, resets_at in named
    ]


def rebuilt(caller: str, plan: str, day_nanos: int, month_nanos: int, wall_now: float) -> Iterator[Spend]:
    """What the ledger knows that a caller has spent, for counters that have just been made."""
    ends = ends_of(wall_now)
    amounts = (day_nanos, month_nanos, day_nanos, month_nanos)
    for name, amount, resets_at in zip(_names(caller, plan), amounts, (*ends, *ends), strict=True):
        if amount:
            yield Spend(name, amount, 0, resets_at)


def _limits(principal: Principal, plan: Plan) -> tuple[Decimal | None, ...]:
    """In the order of `_names`; a key's own budget goes before its plan's."""
    day, month = principal.budget_day_usd, principal.budget_month_usd
    return (
        plan.budget_day if day is None else day,
        plan.budget_month if month is None else month,
        plan.total_budget_day,
        plan.total_budget_month,
    )


def _names(caller: str, plan: str) -> tuple[str, ...]:
    return (f"day:{caller}", f"month:{caller}", f"day:plan:{plan}", f"month:plan:{plan}")
