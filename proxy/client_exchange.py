"""One request of the client: its attempts, and the answer as it comes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

import aiohttp

from proxy.client_errors import (
    Category,
    ChatError,
    Head,
    aborted,
    decoded,
    refusal,
    silent,
    truncated,
    unreadable,
)
from proxy.client_events import Delta, DeltaReader, whole_answer
from proxy.client_limits import Limits

#: After the terminator the body's own end is near: whoever reads it can use the connection again. Seconds;
#: the OpenAI SDK for Python waits as long.
_DRAIN_S = 0.1
#: Bytes of a refusal that are read.
_LONGEST_REFUSAL = 2**20


@dataclass(frozen=True)
class Retry:
    """Further attempts, only while nothing has been delivered. Seconds.

    The back-off has full jitter: a random part of a bound that doubles from `base_s` to `max_s`. Nobody asks
    before Retry-After, and one above `max_retry_after_s` is raised, not waited for. `rng`: uniform in [0, 1).
    """

    attempts: int = 3
    base_s: float = 0.5
    max_s: float = 8.0
    max_retry_after_s: float = 60.0
    rng: Callable[[], float] = random.random

    def wait_s(self, error: ChatError, attempt: int) -> float | None:
        """Seconds before the attempt after this one (from 1); None: there is none."""
        if not error.retryable or attempt >= self.attempts:
            return None
        asked_s = error.retry_after_s
        if asked_s is None:
            return self.rng() * min(self.max_s, self.base_s * 2.0 ** min(attempt - 1, 63))
        if asked_s > self.max_retry_after_s:
            return None
        return asked_s + self.rng() * min(self.base_s, self.max_s)  # all that were refused are told the same


@dataclass(frozen=True)
class Timeouts:
    """Seconds; None: any time. There is none for a whole stream: a long one is no fault.

    connect: TCP and TLS. first_byte: until the head of the answer, which is the whole generation if nothing
    is streamed. idle: silence between bytes, comments included.
    """

    connect_s: float | None = 10.0
    first_byte_s: float | None = 300.0
    idle_s: float | None = 120.0


class Ask(NamedTuple):
    """What is sent."""

    url: str
    body: bytes
    headers: Mapping[str, str]
    priority: int


@dataclass(frozen=True)
class Link:
    """What the requests of a client share."""

    session: aiohttp.ClientSession
    limits: Limits
    retry: Retry
    timeouts: Timeouts


class Exchange:
    """A request under way. `attempts`: made so far; `head`: of the newest answer; `delivered`: a part of it.

    It does not know its Stream: one that nobody holds any more is freed at once, and ends its request.
    """

    def __init__(self, link: Callable[[], Link], ask: Ask) -> None:
        self.attempts = 0
        self.head: Head | None = None
        self.delivered = False
        self._link = link
        self._ask = ask

    async def run(self) -> AsyncGenerator[Delta, None]:
        """The deltas. Raises ChatError."""
        link = self._link()
        async with link.limits.turn(self._ask.priority):
            while True:
                try:
                    async with aclosing(self._attempt(link)) as deltas:
                        async for delta in deltas:
                            self.delivered = True
                            yield delta
                    return
                except ChatError as error:
                    error.partial = self.delivered
                    wait_s = None if self.delivered else link.retry.wait_s(error, self.attempts)
                    if wait_s is None:
                        raise
                await asyncio.sleep(wait_s)
                await link.limits.again()

    async def _attempt(self, link: Link) -> AsyncGenerator[Delta, None]:
        self.attempts += 1
        response = await self._send(link)
        self.head = head = Head(response.status, response.headers)
        idle_s = link.timeouts.idle_s
        try:
            if not 200 <= head.status < 300:
                raise refusal(head, await _start_of(response, idle_s), time.time())
            if response.content_type == "text/event-stream":
                async with aclosing(_deltas_of(response, head, idle_s)) as deltas:
                    async for delta in deltas:
                        yield delta
            elif "json" in response.content_type:
                yield whole_answer(decoded(await _whole(response, head, idle_s)), head)
            else:
                raise unreadable(head)
        finally:
            response.close()  # unless its end has been read: then the connection is in the pool again

    async def _send(self, link: Link) -> aiohttp.ClientResponse:
        ask = self._ask
        try:
            async with asyncio.timeout(link.timeouts.first_byte_s):
                # A redirect is not followed: the key would go where nobody meant it to.
                return await link.session.post(
                    ask.url, data=ask.body, headers=ask.headers, allow_redirects=False
                )
        except TimeoutError as cause:  # aiohttp's, for the connection, as well
            raise silent() from cause
        except (aiohttp.ClientConnectionError, OSError) as cause:
            raise ChatError(Category.NETWORK, f"The server could not be reached: {cause}") from cause
        except aiohttp.ClientResponseError as cause:
            raise unreadable(None) from cause
        except RuntimeError as cause:  # of a session that was closed while this one waited
            if not link.session.closed:
                raise
            raise aborted() from cause


async def _read(
    response: aiohttp.ClientResponse, head: Head, idle_s: float | None
) -> tuple[bytes, Exception | None]:
    """What has come, b"" at the end; and what broke the connection behind it."""
    try:
        async with asyncio.timeout(idle_s):
            return await response.content.readany(), None
    except TimeoutError as cause:
        raise silent(head) from cause
    except (aiohttp.ClientError, OSError) as cause:
        return _unread(response.content), cause


def _unread(content: aiohttp.StreamReader) -> bytes:
    """What came before a break. aiohttp's reader keeps it back once it knows of the break, although half an
    answer and the reason of its end may be in it. Without its private method it stays lost."""
    read = getattr(content, "_read_nowait", None)
    return bytes(read(-1)) if read is not None else b""


async def _deltas_of(
    response: aiohttp.ClientResponse, head: Head, idle_s: float | None
) -> AsyncGenerator[Delta, None]:
    reader, cause = DeltaReader(head), None
    while not reader.over and cause is None:
        data, cause = await _read(response, head, idle_s)
        for delta in reader.feed(data):
            yield delta
        if not data:
            break
    if reader.over:
        await _drain(response)
    else:
        for delta in reader.end(framed=cause is None):
            yield delta


async def _drain(response: aiohttp.ClientResponse) -> None:
    try:
        async with asyncio.timeout(_DRAIN_S):
            while await response.content.readany():
                pass
    except (TimeoutError, aiohttp.ClientError, OSError):
        pass  # the answer is whole


async def _whole(response: aiohttp.ClientResponse, head: Head, idle_s: float | None) -> bytes:
    pieces, cause = [b""], None
    while cause is None:
        data, cause = await _read(response, head, idle_s)
        if not data:
            break
        pieces.append(data)
    if cause is not None:
        raise truncated(head) from cause
    return b"".join(pieces)


async def _start_of(response: aiohttp.ClientResponse, idle_s: float | None) -> bytes:
    """Of a refusal's body, whose status says the most: what cannot be read is left out."""
    try:
        async with asyncio.timeout(idle_s):
            return await response.content.read(_LONGEST_REFUSAL)
    except (TimeoutError, aiohttp.ClientError, OSError):
        return b""
