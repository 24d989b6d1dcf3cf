"""The shared slots of one request, from its place in the queue to its last byte: a failover changes the
upstream's, a hedge holds two for a while.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING

from proxy.permit import Permit, Slots, Wanted
from proxy.state import Slot, StoreUnavailable
from proxy.tasks import spawn

if TYPE_CHECKING:
    from proxy.upstream import Upstream


class Manner(StrEnum):
    """How a request waits for its slots."""

    WAIT = "wait"
    LOW = "low"  # it said that it is in no hurry
    NOW = "now"  # not at all: an upload would hold its caller's bytes back


class Seat:
    """The machine's slot and an upstream's, and the caller's own: in the same permit, or in one of its own.
    `permit` None: observed only, there was none."""

    __slots__ = ("_extra", "_own", "_permit", "_slot_of", "_slots")

    def __init__(
        self,
        permit: Permit | None,
        own: Permit | None,
        slots: Slots,
        slot_of: Callable[[Upstream], Slot],
    ) -> None:
        self._permit = permit
        self._own = own
        self._slots = slots
        self._slot_of = slot_of
        self._extra: Permit | None = None

    @property
    def upstream(self) -> str | None:
        """Whose slot is held."""
        return None if self._permit is None else self._permit.upstream

    async def change(self, upstream: Upstream) -> bool:
        """For a failover: a slot of that upstream instead, if one is free at once."""
        if self._permit is None or self._permit.upstream == upstream.name:
            return True
        try:
            return await self._slots.failover(self._permit, ((upstream.name, self._slot_of(upstream)),))
        except StoreUnavailable:
            return False

    async def add(self, upstream: Upstream) -> bool:
        """For a hedge: a slot of that upstream as well, if one is free at once."""
        if self._permit is None:
            return True
        wanted = Wanted((), ((upstream.name, self._slot_of(upstream)),))
        try:
            self._extra = await self._slots.try_now(wanted)
        except StoreUnavailable:
            return False
        return self._extra is not None

    async def keep(self, upstream: Upstream | None) -> None:
        """After a hedge: only this upstream's slot. Never suspends."""
        extra, self._extra = self._extra, None
        if extra is None:
            return
        if self._permit is not None and upstream is not None and extra.upstream == upstream.name:
            spawn(self._permit.shrink(self._permit.take_over(extra)), "shrink a permit")
        else:
            await extra.release()

    async def __aenter__(self) -> Seat:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Never suspends."""
        if self._extra is not None:
            await self.keep(None)
        if self._permit is not None:
            await self._permit.release()
        if self._own is not None:
            await self._own.release()
