"""The way to Redis: a few connections, scripts by their hash, a time budget, one kind of failure.

- Work runs in a task of its own: a caller that is cancelled cuts off no command. It ends within the budget,
  which covers all of it: waiting for a connection, connecting, logging in, the answer.
- A connection is out of the pool while it is in use, and comes back only after a whole answer that makes
  sense. Any other end closes it, so no answer is ever read by the next command (redis-py issues 2624 and
  2665, where a cancelled command shifted all later answers). redis-py's own pools give a connection back in
  a `finally` that awaits a lock: a timeout at that point loses a place of the pool for ever.
- In the budget of 50 ms a connection can be made where a round trip takes up to 15: connecting is one, a
  password one, TLS two, the command one. Whatever is farther away is too far to be asked for each request.
- Nothing is sent twice: a `take` that was perhaps done must not be done again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, TypeVar

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError

from proxy.state.errors import StoreUnavailable
from proxy.state.lua import Script
from proxy.tasks import spawn

T = TypeVar("T")

#: A budget that ends this late was held up by our own event loop, not by Redis. The answer may lie in the
#: socket, which a loop reads after it has run its timers: it gets this much longer, once.
_LATE_S = 0.005
_GRACE_S = 0.01


class Link:
    """Connections to one server. `url` as in redis-py: redis://, rediss://, unix://. Errors: ValueError."""

    def __init__(self, url: str, budget_s: float, connections: int) -> None:
        self._budget_s = budget_s
        self._places = asyncio.Semaphore(connections)
        self._maker = ConnectionPool.from_url(
            url,
            protocol=2,  # RESP2 needs no greeting, which would be a round trip; so would be the driver's name
            driver_info=None,
            socket_timeout=None,  # the budget is the timeout
            socket_connect_timeout=None,
            socket_keepalive=True,
        )
        self._idle: list[AbstractConnection] = []
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T | StoreUnavailable]:
        """Runs `work` within the budget, whatever happens to the caller. The task itself never fails."""
        task = spawn(self._bounded(work), "state store")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def call(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `start`, for a caller that may be cancelled. Errors: StoreUnavailable."""
        outcome = await asyncio.shield(self.start(work))
        if isinstance(outcome, StoreUnavailable):
            raise outcome
        return outcome

    async def run(
        self, script: Script, keys: Sequence[str], args: Sequence[int | str], read: Callable[[Any], T]
    ) -> T:
        """The script's answer, as `command`."""
        words = (len(keys), *keys, *args)
        try:
            return await self.command(("EVALSHA", script.sha, *words), read)
        except NoScriptError:  # a new server, or SCRIPT FLUSH: EVAL keeps the script for the next call
            return await self.command(("EVAL", script.text, *words), read)

    async def command(self, words: Sequence[int | str], read: Callable[[Any], T]) -> T:
        """What `read` makes of the answer; it raises ValueError if that is none to this command.

        Only inside `start` or `call`. Errors: whatever redis-py and `read` raise.
        """
        async with self._places:
            connection = self._idle.pop() if self._idle else self._make()
            try:
                await _freshen(connection)
                await connection.send_command(*words)
                answer = read(await connection.read_response())
            except ResponseError:  # Redis refused, in a whole answer
                self._idle.append(connection)
                raise
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
            self._idle.append(connection)
            return answer

    async def close(self) -> None:
        """Waits for what is running, which the budget bounds, and closes all connections."""
        if self._running:
            await asyncio.wait(self._running)
        while self._idle:
            await self._idle.pop().disconnect(nowait=True)

    def _make(self) -> AbstractConnection:
        made: AbstractConnection = self._maker.make_connection()  # type: ignore[no-untyped-call] # redis-py
        return made

    async def _bounded(self, work: Coroutine[Any, Any, T]) -> T | StoreUnavailable:
        try:
            async with _Budget(self._budget_s):
                return await work
        except TimeoutError:
            return StoreUnavailable(f"no answer within {self._budget_s * 1000:.0f} ms")
        except Exception as error:  # a server that talks nonsense makes a parser raise anything
            return StoreUnavailable(_reason(error))


async def _freshen(connection: AbstractConnection) -> None:
    """Connected, and nobody has closed it or said anything since its last answer."""
    if connection.is_connected and await connection.can_read():
        await connection.disconnect(nowait=True)
    if not connection.is_connected:
        await connection.connect()  # type: ignore[no-untyped-call] # redis-py


def _reason(error: Exception) -> str:
    """Redis's own words and those of the network; of anything else only the kind, for it may quote data."""
    said = f": {str(error)[:120]}" if isinstance(error, (ResponseError, RedisConnectionError)) else ""
    return type(error).__name__ + said


class _Budget:
    """asyncio.timeout, which is not used up by the loop's own delays (see _LATE_S)."""

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit = asyncio.timeout(None)
        self._ends = self._loop.time() + seconds
        self._grace_s = _GRACE_S

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()
        self._timer = self._loop.call_at(self._ends, self._expire)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._limit.__aexit__(kind, error, trace)

    def _expire(self) -> None:
        grace_s, self._grace_s = self._grace_s, 0.0
        if grace_s and self._loop.time() > self._ends + _LATE_S:
            self._timer = self._loop.call_later(grace_s, self._expire)
        else:
            self._limit.reschedule(self._loop.time())
