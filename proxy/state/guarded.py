"""What happens while the shared store is gone: `limits.on_store_failure`, decided here and nowhere else.

The first StoreUnavailable of the remote store (that call has waited for its budget) changes to the fallback;
from then on no call waits for the remote one. A probe in the background changes back. Each change is one log
line and one call of `on_change`.

    local   the store of this machine decides: limits hold, but for each machine by itself
    open    everything is allowed
    closed  every decision raises StoreUnavailable at once; corrections, which nobody waits for, are dropped

Nothing is decided twice, but what is under way at a change can be charged in both stores:

- A call whose remote answer did not come may have been charged there and is then charged by the fallback:
  once in each, never twice in one.
- Corrections (`settle`, `settle_spend`) go to the store that is in use when they come. For a request that was
  in flight at a change, the one store keeps its estimate and the other gets the correction; both are bounded,
  a bucket by full and by its debt, a budget by 0.
- A lease knows its store and is released there. A remote one that is released while the remote store is gone
  is kept for the first `renew` after it; that of an owner who was silent for too long has ended anyway.
- Slots of the fallback are not known to the remote store, and the other way round: after a change the
  requests in flight do not count in the store that took over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import msgspec
import structlog

from proxy.bucket import Decision
from proxy.state.errors import StoreUnavailable
from proxy.tasks import spawn

if TYPE_CHECKING:
    from proxy.state import Charge, Lease, Slot, Spend, State

    class Remote(State, Protocol):
        """A store that can be gone: proxy.state.redis."""

        async def probe(self) -> None:
            """Errors: StoreUnavailable, unless decisions can be had."""
            ...

        def release_later(self, lease: Lease) -> None:
            """By its next `renew`."""
            ...


T = TypeVar("T")
Policy = Literal["local", "open", "closed"]


class Kept(msgspec.Struct, frozen=True):
    """A lease and the store that gave it."""

    lease: Lease
    store: State

    @property
    def names(self) -> tuple[str, ...]:
        return self.lease.names


class Guarded:
    """proxy.state.State that asks `remote` and, while it is gone, what `policy` says.

    `local` is renewed and closed together with it, whatever the policy. Errors: StoreUnavailable, and only
    with the policy `closed`.
    """

    near = None

    def __init__(
        self,
        remote: Remote,
        local: State,
        policy: Policy,
        on_change: Callable[[bool], None] | None = None,
        probe_every_s: float = 0.5,
    ) -> None:
        self._remote = remote
        self._local = local
        self._policy = policy
        self._fallback: State = {"local": local, "open": Open(), "closed": Closed()}[policy]
        self._on_change = on_change
        self._probe_every_s = probe_every_s
        self._gone = asyncio.Event()
        self._changes = 0
        self._since_s = 0.0
        self._prober: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        """The remote store is in use (the gauge state_store_up)."""
        return not self._gone.is_set()

    def start(self) -> None:
        """Begins to look for a remote store that is gone: without it, it stays gone. Call it in the loop."""
        self._prober = spawn(self._probe(), "state store probe")

    async def take(self, charges: Sequence[Charge], now: float) -> list[Decision]:
        return await self._ask(lambda store: store.take(charges, now))

    async def settle(self, charges: Sequence[Charge], now: float) -> None:
        await self._ask(lambda store: store.settle(charges, now))

    async def peek(self, charges: Sequence[Charge], now: float) -> list[Decision]:
        return await self._ask(lambda store: store.peek(charges, now))

    async def acquire(self, slots: Sequence[Slot], now: float) -> Kept | None:
        return await self._ask(lambda store: _acquire(store, slots, now))

    async def release(self, lease: Lease) -> None:
        assert isinstance(lease, Kept)
        if lease.store is not self._remote:
            return await lease.store.release(lease.lease)
        if not self.up:
            return self._remote.release_later(lease.lease)
        await self._correct(lambda: self._remote.release(lease.lease))  # if it fails, it is remembered there

    async def peek_slots(self, names: Sequence[str], now: float) -> list[int]:
        return await self._ask(lambda store: store.peek_slots(names, now))

    async def renew(self, now: float) -> None:
        """Both stores, for both may have given leases that still are held."""
        await self._local.renew(now)
        if self.up:
            await self._correct(lambda: self._remote.renew(now))

    async def spend(self, spends: Sequence[Spend], now: float) -> list[bool]:
        return await self._ask(lambda store: store.spend(spends, now))

    async def settle_spend(self, spends: Sequence[Spend], now: float) -> None:
        await self._ask(lambda store: store.settle_spend(spends, now))

    async def peek_spend(self, names: Sequence[str], now: float) -> list[int]:
        return await self._ask(lambda store: store.peek_spend(names, now))

    async def close(self) -> None:
        if self._prober is not None:
            self._prober.cancel()
        await self._remote.close()
        await self._local.close()

    async def _ask(self, verb: Callable[[State], Awaitable[T]]) -> T:
        if self.up:
            changes = self._changes
            try:
                return await verb(self._remote)
            except StoreUnavailable as error:
                self._lose(changes, error)
        return await verb(self._fallback)

    async def _correct(self, verb: Callable[[], Awaitable[None]]) -> None:
        """What only the remote store can do."""
        changes = self._changes
        try:
            await verb()
        except StoreUnavailable as error:
            self._lose(changes, error)

    def _lose(self, changes: int, error: StoreUnavailable) -> None:
        """Not for the failure of a call that began before the store was last seen."""
        if self.up and changes == self._changes:
            self._since_s = asyncio.get_running_loop().time()
            self._gone.set()
            self._change()
            structlog.get_logger().error("state_store_down", error=str(error), on_store_failure=self._policy)

    def _regain(self) -> None:
        self._gone.clear()
        self._change()
        gone_s = asyncio.get_running_loop().time() - self._since_s
        structlog.get_logger().warning("state_store_up", gone_s=round(gone_s, 3))

    def _change(self) -> None:
        self._changes += 1
        if self._on_change is not None:
            self._on_change(self.up)

    async def _probe(self) -> None:
        while True:
            await self._gone.wait()
            await asyncio.sleep(self._probe_every_s)
            try:
                await self._remote.probe()
            except StoreUnavailable:
                continue
            self._regain()


async def _acquire(store: State, slots: Sequence[Slot], now: float) -> Kept | None:
    lease = await store.acquire(slots, now)
    return None if lease is None else Kept(lease, store)


class Nothing(msgspec.Struct, frozen=True):
    """A lease without places."""

    names: tuple[str, ...] = ()


class Open:
    """Allows everything and counts nothing; its decisions show full buckets."""

    near = None

    async def take(self, charges: Sequence[Charge], now: float) -> list[Decision]:
        return [Decision(True, charge.burst, charge.burst, 0.0, 0.0) for charge in charges]

    async def settle(self, charges: Sequence[Charge], now: float) -> None: ...

    async def peek(self, charges: Sequence[Charge], now: float) -> list[Decision]:
        return await self.take(charges, now)

    async def acquire(self, slots: Sequence[Slot], now: float) -> Nothing:
        return Nothing()

    async def release(self, lease: Lease) -> None: ...

    async def peek_slots(self, names: Sequence[str], now: float) -> list[int]:
        return [0 for _ in names]

    async def renew(self, now: float) -> None: ...

    async def spend(self, spends: Sequence[Spend], now: float) -> list[bool]:
        return [True for _ in spends]

    async def settle_spend(self, spends: Sequence[Spend], now: float) -> None: ...

    async def peek_spend(self, names: Sequence[str], now: float) -> list[int]:
        return [0 for _ in names]

    async def close(self) -> None: ...


class Closed:
    """Refuses to decide."""

    near = None

    async def take(self, charges: Sequence[Charge], now: float) -> list[Decision]:
        raise StoreUnavailable(_CLOSED)

    async def settle(self, charges: Sequence[Charge], now: float) -> None: ...

    async def peek(self, charges: Sequence[Charge], now: float) -> list[Decision]:
        raise StoreUnavailable(_CLOSED)

    async def acquire(self, slots: Sequence[Slot], now: float) -> Lease | None:
        raise StoreUnavailable(_CLOSED)

    async def release(self, lease: Lease) -> None: ...

    async def peek_slots(self, names: Sequence[str], now: float) -> list[int]:
        raise StoreUnavailable(_CLOSED)

    async def renew(self, now: float) -> None: ...

    async def spend(self, spends: Sequence[Spend], now: float) -> list[bool]:
        raise StoreUnavailable(_CLOSED)

    async def settle_spend(self, spends: Sequence[Spend], now: float) -> None: ...

    async def peek_spend(self, names: Sequence[str], now: float) -> list[int]:
        raise StoreUnavailable(_CLOSED)

    async def close(self) -> None: ...


_CLOSED = "the state store is gone, and limits.on_store_failure is closed"
