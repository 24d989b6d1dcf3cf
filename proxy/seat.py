"""The shared slots of one request, from its place in the queue to its last byte: a failover changes the
upstream's, a hedge holds two for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from proxy.permit import Choices, Direct, Permit, Wanted
from proxy.state import StoreUnavailable
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
    `permit` None: observed only, there was none. A context manager."""

    __slots__ = ("_choices_of", "_direct", "_extra", "_own", "_permit")

    def __init__(
        self,
        permit: Permit | None,
        own: Permit | None,
        direct: Direct,
        choices_of: Callable[[Sequence[Upstream]], Choices],
    ) -> None:
        self._permit = permit
        self._own = own
        self._direct = direct
        self._choices_of = choices_of
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
            return await self._direct.failover(self._permit, self._choices_of((upstream,)))
        except StoreUnavailable:
            return False

    async def add(self, upstream: Upstream) -> bool:
        """For a hedge: a slot of that upstream as well, if one is free at once."""
        if self._permit is None:
            return True
        try:
            self._extra = await self._direct.try_now(Wanted((), self._choices_of((upstream,))))
        except StoreUnavailable:
            return False
        return self._extra is not None

    def keep(self, upstream: Upstream | None) -> None:
        """After a hedge: only this upstream's slot."""
        extra, self._extra = self._extra, None
        if extra is None:
            return
        if self._permit is not None and upstream is not None and extra.upstream == upstream.name:
            spawn(self._permit.shrink(self._permit.take_over(extra)), "shrink a permit")
        else:
            extra.release()

    def __enter__(self) -> Seat:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Gives everything back; a second time nothing."""
        if self._extra is not None:
            self.keep(None)
        if self._permit is not None:
            self._permit.release()
        if self._own is not None:
            self._own.release()
