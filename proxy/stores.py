"""The stores that `limits.store` names, as one process uses them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

from proxy.errors import StartError
from proxy.schema import Limits
from proxy.shared import Owner
from proxy.state import State, memory
from proxy.state.guarded import Guarded
from proxy.tasks import spawn

#: An owner that is silent for a lease (5 s) counts as gone.
_RENEW_S = 1.0


class Stores:
    """state: the counters all processes share, over machines if `limits.store` says so; local: those of this
    machine. `start` and `close` bracket the life of the process."""

    def __init__(self, limits: Limits, owner: Owner, on_change: Callable[[bool], None]) -> None:
        """on_change: told when the store of several machines goes and comes back. Raises StartError."""
        self.local = memory.attach(owner.fd, owner.number)
        self.remote = limits.store != "memory"
        self._guarded = _guarded(limits, self.local, on_change) if self.remote else None
        self.state: State = self._guarded or self.local
        #: The slots of `limits.max_in_flight` are of one process group, also where it counts in Redis.
        self.machine = f"machine:{self.local.name}" if self.remote else "machine"
        self._renewing: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._guarded is not None:
            self._guarded.start()
        self._renewing = spawn(self._renew(), "renew leases")

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
        await self.state.close()

    async def _renew(self) -> None:
        while True:
            await self.state.renew(monotonic())
            await asyncio.sleep(_RENEW_S)


def _guarded(limits: Limits, local: memory.MemoryState, on_change: Callable[[bool], None]) -> Guarded:
    try:
        from proxy.state.redis import RedisState
    except ImportError:
        raise StartError("limits.store: Redis needs its client: pip install 'headrace[redis]'") from None
    try:
        remote = RedisState(str(limits.store))
    except ValueError as error:
        raise StartError(f"limits.store: {error}") from None
    return Guarded(remote, local, limits.on_store_failure, on_change)
