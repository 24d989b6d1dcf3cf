"""Callers of every kind, again and again: what a busy day has, in some seconds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from tests.kit.callers import Caller, ask, chat, post

#: One visit to the data listener at this port.
Visit = Callable[[int], Awaitable[object]]

_PRICE = {"input": 2.0, "cached_input": 0.5, "output": 8.0}


def settings(workers: int = 2) -> dict[str, Any]:
    """Four upstreams behind four models; what goes wrong, goes wrong soon."""
    patient = {"breaker": {"failures": 1000}, "timeouts": {"idle": 1}}
    return {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "workers": workers,
        "auth": {"mode": "open"},
        "upstreams": {
            "north": {"base_url": "mock:", **patient},
            "south": {"base_url": "mock:", **patient},
            "narrow": {"base_url": "mock:", "max_in_flight": 1},
            "fragile": {"base_url": "mock:", "breaker": {"failures": 3, "cool_down": 2, "max_cool_down": 4}},
        },
        "models": {
            "large": {"upstreams": ["north"], "price": _PRICE},
            "small": {"upstreams": ["south"], "price": {"input": 0.1, "output": 0.4}},
            "popular": {"upstreams": ["narrow"], "price": _PRICE},
            "metered": {"upstreams": ["south"], "requests_per_minute": 10, "price": _PRICE},
            "unlucky": {"upstreams": ["fragile", "north"], "price": _PRICE},
        },
        "streams": {"usage": "inject", "heartbeat": 0.3},
        "limits": {"queue": {"max_wait": 5}},
        "retry": {"attempts": 2, "base": 0.01},
    }


def _stream(model: str, mock: str) -> Visit:
    return lambda port: ask(port, chat(f"x-mock: {mock}", model=model))


def _whole(model: str, mock: str) -> Visit:
    return lambda port: ask(port, chat(f"x-mock: {mock}", model=model, stream=False))


async def _leaves(port: int) -> None:
    """In the middle of a stream."""
    async with await Caller.connect(port) as caller:
        await caller.send(chat("x-mock: words=200, gap=0.05", model="large"))
        answer = await caller.head()
        await caller.piece(answer)
        caller.leave()


async def _gives_up(port: int) -> None:
    """Before the first byte."""
    async with await Caller.connect(port) as caller:
        await caller.send(chat("x-mock: ttfb=5", model="small"))
        with suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await caller.head()


async def _crowd(port: int) -> None:
    """More at once than the upstream takes: all but one wait."""
    await asyncio.gather(*(_stream("popular", "words=10, ttfb=0.1, gap=0.01")(port) for _ in range(4)))


async def _spoiled(port: int) -> None:
    await ask(port, post("/v1/chat/completions", b"{", ""))


#: What happens how often (seconds between two of them).
VISITS: dict[str, tuple[float, Visit]] = {
    "streams": (0.1, _stream("large", "words=20, ttfb=0.15, gap=0.01")),
    "quick streams": (0.1, _stream("small", "words=30, ttfb=0.02, gap=0.002")),
    "slow starts": (0.5, _stream("large", "words=10, ttfb=0.6, gap=0.02")),
    "whole answers": (0.2, _whole("small", "words=20, ttfb=0.05")),
    "silences": (0.5, _stream("small", "words=2, gap=0.4")),
    "crowds": (0.2, _crowd),
    "leaving": (0.4, _leaves),
    "giving up": (0.4, _gives_up),
    "too much": (0.2, _whole("metered", "words=2")),
    "quota": (0.5, _whole("large", "status=429, retry_after=60")),
    "errors": (0.5, _whole("small", "status=500")),
    "cuts": (0.5, _stream("large", "cut_after=3")),
    "stalls": (0.5, _stream("small", "stall_after=3")),
    "broken upstream": (0.1, _whole("unlucky", "status=503")),
    "unknown models": (0.5, _whole("nothing", "words=1")),
    "spoiled bodies": (0.5, _spoiled),
}


async def _again_and_again(port: int, every_s: float, visit: Visit) -> None:
    while True:
        with suppress(OSError, asyncio.IncompleteReadError):
            await visit(port)
        await asyncio.sleep(every_s)


@asynccontextmanager
async def traffic(port: int, *names: str) -> AsyncIterator[None]:
    """These visits (all of them), as long as the block lasts."""
    wanted = [VISITS[name] for name in names] if names else list(VISITS.values())
    tasks = [asyncio.ensure_future(_again_and_again(port, every_s, visit)) for every_s, visit in wanted]
    try:
        yield
        failed = [task for task in tasks if task.done()]
        assert not failed, [task.exception() for task in failed]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
