"""The waiting room of several workers: it is in the supervisor, and they speak to it in notes.

A worker takes free slots itself, straight from the store (`permit.Direct`); only who has to wait comes here.
What the room grants is held by the supervisor on the worker's behalf, and ends with the worker's channel.

    worker -> supervisor    queue.hello                       tell me what is contended
                            queue.enter  [number, wanted, ticket]
                            queue.keep   number               gives its upstream's slot back, not the others
                            queue.leave  number               waits no longer, or gives back all it holds
    supervisor -> worker    queue.contended [names]
                            queue.granted [number, upstream]
                            queue.refused [number, why, Retry-After in seconds]

Notes of one channel arrive in order. The one crossing there can be is a grant under way to a waiter that has
just left: its `leave` then gives the slots back, and the worker does not know the number any more.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import msgspec

from proxy.control import Channel
from proxy.errors import Draining, Internal, Overloaded, QueueFull, QueueTimeout
from proxy.permit import Direct, Permit, Ticket, Wanted
from proxy.slots import WaitingRoom
from proxy.state import Slot, StoreUnavailable
from proxy.tasks import spawn

#: A note that found the channel full is sent again after so long.
_AGAIN_S = 0.05
#: The room answers at its deadline; a worker that has heard nothing so much later gives up by itself.
_GRACE_S = 2.0

_Enter = tuple[int, Wanted, Ticket]


class RemoteRoom:
    """The worker's end. Implements `Slots` and, for what the supervisor holds, `Keeper`."""

    def __init__(self, channel: Channel, direct: Direct, max_wait_s: float) -> None:
        self.max_wait_s = max_wait_s
        self._channel = channel
        self.direct = direct
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[str | Exception]] = {}
        channel.closed.add_done_callback(self._lost)
        self._say("queue.hello", None)

    @property
    def waiting(self) -> int:
        return len(self._answers)

    def heard(self, verb: str, payload: Any) -> None:
        """Takes a note of the supervisor that begins with `queue.`."""
        if verb == "queue.contended":
            self.direct.contended = frozenset(payload)
            return
        number, *words = payload
        answer = self._answers.get(number)
        if answer is None or answer.done():
            return  # it has left and has said so
        answer.set_result(words[0] if verb == "queue.granted" else _error(*words))

    # ── Slots ────────────────────────────────────────────────────────────────────────────────────────────

    async def enter(self, wanted: Wanted, ticket: Ticket) -> Permit:
        permit = await self.direct.try_now(wanted)
        if permit is not None:
            return permit
        number = next(self._numbers)
        outcome = await self._ask(number, wanted, ticket)
        if isinstance(outcome, str):
            return Permit(outcome, wanted.base, self, number)
        raise outcome

    # ── Keeper ───────────────────────────────────────────────────────────────────────────────────────────

    def give_back(self, token: int) -> None:
        self._say("queue.leave", token)

    async def keep_only(self, token: int, slots: tuple[Slot, ...]) -> int | None:
        self._say("queue.keep" if slots else "queue.leave", token)
        return token if slots else None

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────

    async def _ask(self, number: int, wanted: Wanted, ticket: Ticket) -> str | Exception:
        if not self._channel.note("queue.enter", (number, wanted, ticket)):
            raise Draining if self._channel.closed.done() else Overloaded
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str | Exception] = loop.create_future()
        self._answers[number] = answer
        late = loop.call_later(self.max_wait_s + _GRACE_S, self._give_up, number)
        try:
            return await answer
        except asyncio.CancelledError:
            self._say("queue.leave", number)  # granted or not
            raise
        finally:
            late.cancel()
            del self._answers[number]

    def _give_up(self, number: int) -> None:
        answer = self._answers[number]
        if not answer.done():
            answer.set_result(QueueTimeout())
            self._say("queue.leave", number)

    def _say(self, verb: str, payload: Any) -> None:
        """For certain: what is not said would keep slots taken. With the end of the channel they are free."""
        if not self._channel.note(verb, payload) and not self._channel.closed.done():
            asyncio.get_running_loop().call_later(_AGAIN_S, self._say, verb, payload)

    def _lost(self, _: asyncio.Future[None]) -> None:
        """There is no queue any more: what is free is taken, who finds nothing is told to come back."""
        self.direct.contended = frozenset()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(Draining())


class Door:
    """The supervisor's end: one for each worker. `room` is its waiting room."""

    def __init__(self, channel: Channel, room: WaitingRoom) -> None:
        self._channel = channel
        self._room = room
        self._entering: dict[int, asyncio.Task[None]] = {}
        self._permits: dict[int, Permit] = {}
        self._told: frozenset[str] | None = None  # None: it has not asked yet
        self._unwatch = room.watch(self._tell)
        channel.closed.add_done_callback(self._lost)

    @property
    def held(self) -> int:
        """Permits that this worker has from here."""
        return len(self._permits)

    def heard(self, verb: str, payload: Any) -> None:
        """Takes a note of the worker that begins with `queue.`."""
        if verb == "queue.hello":
            self._told = frozenset()
        elif verb == "queue.enter":
            self._let_in(*msgspec.convert(payload, _Enter))
        elif verb == "queue.leave":
            self._let_out(payload)
        elif verb == "queue.keep" and (permit := self._permits.get(payload)) is not None:
            spawn(permit.shrink(permit.let_go()), "shrink a permit")
        self._tell(self._room.contended)

    def _let_in(self, number: int, wanted: Wanted, ticket: Ticket) -> None:
        entering = spawn(self._enter(number, wanted, ticket), "wait for slots")
        self._entering[number] = entering
        entering.add_done_callback(lambda _: self._entering.pop(number, None))

    async def _enter(self, number: int, wanted: Wanted, ticket: Ticket) -> None:
        """From the grant to the end there is no suspension: `_let_out` finds a task or a permit."""
        try:
            permit = await self._room.enter(wanted, ticket)
        except Exception as error:
            self._channel.note("queue.refused", (number, *_words(error)))
            if not isinstance(error, (Overloaded, StoreUnavailable)):
                raise
            return
        self._permits[number] = permit
        if not self._channel.note("queue.granted", (number, permit.upstream)):
            self._let_out(number)  # it will give up by itself

    def _let_out(self, number: int) -> None:
        permit = self._permits.pop(number, None)
        if permit is not None:
            permit.release()
        elif number in self._entering:
            self._entering[number].cancel()

    def _tell(self, contended: frozenset[str]) -> None:
        """What could not be said is said with the worker's next note."""
        if self._told is None or contended == self._told:
            return
        if self._channel.note("queue.contended", sorted(contended)):
            self._told = contended

    def _lost(self, _: asyncio.Future[None]) -> None:
        """The worker is gone, and with it everything it waited for or held."""
        self._unwatch()
        for number in [*self._entering, *self._permits]:
            self._let_out(number)


def _words(error: Exception) -> tuple[str, int]:
    """A refusal for the way, and its Retry-After."""
    if isinstance(error, QueueFull):
        return ("late" if isinstance(error, QueueTimeout) else "full"), error.retry_after_s
    if isinstance(error, Overloaded):
        return "draining", 0
    return ("store" if isinstance(error, StoreUnavailable) else "failed"), 0


def _error(why: str, retry_after_s: int) -> Exception:
    """What `_words` was made of."""
    if why in ("late", "full"):
        return (QueueTimeout if why == "late" else QueueFull)(retry_after_s)
    if why == "draining":
        return Draining()
    return StoreUnavailable("the supervisor's store gave no answer") if why == "store" else Internal()
