"""The counters that all workers share: rate buckets, slots for requests in flight, budgets.

`State` is the whole seam: a few verbs, each of them atomic over everything it is handed (all or none). What
the verbs mean is held by one contract suite, tests/test_state.py, which every store passes.

- Time is a parameter. A store on several machines uses its own clock instead; a store on one machine trusts
  `now`, so all its workers pass the same clock: time.monotonic() (one clock for all processes of a Linux
  machine) for buckets, slots and `renew`, time.time() for budgets, whose `resets_at` is a date.
- Names are chosen by the caller and mean nothing here. Each kind of counter has names of its own.
- Limits travel with each call, so a reload needs no visit to the store.
- `limits.mode: observe` needs no verb of its own. A caller that counts and refuses nobody calls the same
  verbs, lets everybody pass, and settles or releases only what it was granted: then the counters are those
  that enforcing would have had, and so is the number of refusals.
- A store that cannot be reached raises StoreUnavailable, within its own time budget; nothing else is raised.
  A verb that failed this way may or may not have happened. The memory store never fails.
- No verb may run in a task that a leaving reader cancels: an `acquire` that is cut off has an unknown end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from proxy.bucket import Decision
from proxy.state.errors import StoreUnavailable as StoreUnavailable


class Charge(msgspec.Struct, frozen=True, gc=False):
    """`amount` units of one bucket. For `settle`: negative gives back, positive takes more."""

    bucket_id: str
    rate_per_minute: float
    burst: int
    amount: int = 1


class Slot(msgspec.Struct, frozen=True, gc=False, cache_hash=True):
    """One of `limit` places for requests in flight."""

    name: str
    limit: int


class Spend(msgspec.Struct, frozen=True, gc=False):
    """`amount` of a budget, all integers in one unit of the caller's choice (micro-dollars, say).

    `resets_at` (wall clock, seconds) is the end of the period and names it: each new one starts at 0. A late
    caller with an earlier period is counted in the running one. For `settle_spend`, amount is the correction
    and limit is not looked at.
    """

    name: str
    amount: int
    limit: int
    resets_at: float


class Lease(Protocol):
    """Slots that are held: given back by `release`, or by the end of their owner."""

    @property
    def names(self) -> tuple[str, ...]: ...


class Near(Protocol):
    """The verbs of every request, of a store that never waits: what `State` says of them, as plain calls. A
    coroutine that never suspends costs a request a microsecond each time, and what is not awaited cannot be
    cut off."""

    def take_now(self, charges: Sequence[Charge], now: float) -> list[Decision]: ...

    def settle_now(self, charges: Sequence[Charge], now: float) -> None: ...

    def acquire_now(self, slots: Sequence[Slot], now: float) -> Lease | None: ...

    def release_now(self, lease: Lease) -> None: ...


class State(Protocol):
    """A store, as one owner (a worker) sees it."""

    @property
    def near(self) -> Near | None:
        """The same store by plain calls; None: it is at the other end of a network, or may be."""
        ...

    async def take(self, charges: Sequence[Charge], now: float) -> list[Decision]:
        """Takes every charge if each is allowed, else none; one decision a charge, in order.

        The decisions of a refused call say what is left, nothing having been taken.
        """
        ...

    async def settle(self, charges: Sequence[Charge], now: float) -> None:
        """Corrects earlier charges by `amount`, which may be negative. Never refused: see bucket.settle."""
        ...

    async def peek(self, charges: Sequence[Charge], now: float) -> list[Decision]:
        """What `take` would say of each charge by itself; takes nothing. Amount 0 asks what is left."""
        ...

    async def acquire(self, slots: Sequence[Slot], now: float) -> Lease | None:
        """Takes one place of every slot, or none (None). Counts as a sign of life, like `renew`."""
        ...

    async def release(self, lease: Lease) -> None:
        """Gives all its places back. A second time, or after the owner was counted as gone: nothing."""
        ...

    async def peek_slots(self, names: Sequence[str], now: float) -> list[int]:
        """Places taken now, over all living owners."""
        ...

    async def renew(self, now: float) -> None:
        """The sign of life of an owner, about once a second.

        An owner silent for longer than the store's `lease_s` counts as gone: its slots are free again, and
        stay free if it comes back after all. Its requests are then in flight without a place.
        """
        ...

    async def spend(self, spends: Sequence[Spend], now: float) -> list[bool]:
        """Adds every amount if each stays within its limit, else none; one answer a spend, in order."""
        ...

    async def settle_spend(self, spends: Sequence[Spend], now: float) -> None:
        """Corrects earlier spends, past the limit if need be, never below 0.

        A correction for a period that is over is dropped: that counter is gone, the ledger has the truth.
        """
        ...

    async def peek_spend(self, names: Sequence[str], now: float) -> list[int]:
        """What is spent in the running period of each budget."""
        ...

    async def close(self) -> None:
        """Lets go of the store and of every slot this owner holds. Call it once, last."""
        ...
