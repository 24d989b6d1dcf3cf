"""An answer of the client for who reads it: its deltas, and what is known of it at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from proxy.client_errors import ChatError, aborted
from proxy.client_events import Delta
from proxy.client_exchange import Exchange


class Stream:
    """The deltas of one answer: `async with client.stream(…) as stream: async for delta in stream: …`.

    The request is sent when the first delta is asked for. Every failure is a ChatError. Leaving the block
    ends the request, whatever it is doing, and Headrace then ends it upstream.

    finish_reason, usage: the latest that the answer gave.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        self._exchange = exchange
        self._deltas = exchange.run()
        self._ended = False
        self._stopped = False
        self._scope: asyncio.Timeout | None = None

    @property
    def attempts(self) -> int:
        """How many have been made."""
        return self._exchange.attempts

    @property
    def headers(self) -> Mapping[str, str]:
        """Of the newest answer; found in any case."""
        return self._exchange.head.headers if self._exchange.head else {}

    @property
    def request_id(self) -> str | None:
        """What to ask the operator about."""
        return self._exchange.head.request_id if self._exchange.head else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if self._stopped:
            raise self._aborted()
        try:
            # Never late by itself: it is how `aclose` reaches who waits in here, in any phase.
            async with asyncio.timeout(None) as self._scope:
                delta = await anext(self._deltas)
        except BaseException as error:
            self._ended = True
            if self._stopped and isinstance(error, TimeoutError):
                raise self._aborted() from None
            raise
        finally:
            self._scope = None
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.usage = delta.usage or self.usage
        return delta

    async def aclose(self) -> None:
        """Ends the request. Who reads in another task, now or later, gets the ChatError `aborted`."""
        if self._ended or self._stopped:
            return
        self._stopped = True
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())
        else:
            await self._deltas.aclose()

    def _aborted(self) -> ChatError:
        error = aborted()
        error.partial = self._exchange.delivered
        return error
