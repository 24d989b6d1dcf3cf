"""What a caller's plan asks of the stores, prepared once: of a request only the amounts are its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from proxy import budgets
from proxy.state import Charge, Slot

if TYPE_CHECKING:
    from proxy.identity import Principal
    from proxy.schema import Plan

#: Callers that are remembered; past that all are forgotten. One takes about a kilobyte.
_REMEMBERED = 4096


class Allotment(msgspec.Struct, frozen=True):
    """Of one caller; None is no limit."""

    plan: Plan | None
    requests: Charge | None = None
    scopes: tuple[str, ...] = ()  # what `arrival` takes from, in order: labels of the metrics
    arrival: tuple[Charge, ...] = ()
    tokens: Charge | None = None
    slot: Slot | None = None  # its own: requests in flight
    slots: tuple[Slot, ...] = ()  # all that every request of it takes, whatever its upstream
    budgeted: bool = False  # by its plan; a key may have a budget of its own besides


class Allotments:
    """Those of the callers that came lately. A table lives as long as the limits that it was made with: a
    reload makes a new one, and a plan that is not the same object is read again."""

    def __init__(self, machine: Slot) -> None:
        self._machine = machine
        self._known: dict[str, Allotment] = {}
        self._open = Allotment(None, slots=(machine,))

    def of(self, principal: Principal | None, plan: Plan | None) -> Allotment:
        """Without a plan nothing is limited but the machine."""
        if principal is None or plan is None:
            return self._open
        found = self._known.get(principal.name)
        if found is not None and found.plan is plan:
            return found
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        made = self._known[principal.name] = self._made(principal, plan)
        return made

    def _made(self, principal: Principal, plan: Plan) -> Allotment:
        requests = _requests(principal.name, plan)
        total = _rate(f"plan:{principal.plan}", plan.total_requests_per_minute)
        slot = None if plan.max_in_flight is None else Slot(f"caller:{principal.name}", plan.max_in_flight)
        arrival = [(scope, charge) for scope, charge in (("key", requests), ("plan", total)) if charge]
        return Allotment(
            plan,
            requests,
            scopes=tuple([scope for scope, _ in arrival]),
            arrival=tuple([charge for _, charge in arrival]),
            tokens=_rate(f"tokens:{principal.name}", plan.tokens_per_minute),
            slot=slot,
            slots=(self._machine,) if slot is None else (slot, self._machine),
            budgeted=budgets.of_plan(plan),
        )


def _requests(name: str, plan: Plan) -> Charge | None:
    rate = plan.requests_per_minute
    return None if rate is None else Charge(f"requests:{name}", rate, plan.burst or rate)


def _rate(bucket_id: str, rate: int | None) -> Charge | None:
    """One unit of a bucket that is full with a minute's."""
    return None if rate is None else Charge(bucket_id, rate, rate)


def so_many(charge: Charge, units: int) -> Charge:
    """Of the same bucket, and at most what it holds when it is full."""
    burst = charge.burst
    return Charge(charge.bucket_id, charge.rate_per_minute, burst, units if units < burst else burst)
