"""Callers of every kind, chosen by weight, for as long as wanted."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from tests.kit.callers import Caller, ask, chat, post
from tests.kit.keys import bearer
from tests.kit.uploads import form, head

#: At once; each rests between two visits, so that two cores are busy and not full.
CALLERS = 16
REST_S = 0.15
_PRICE = {"input": 2.0, "cached_input": 0.5, "output": 8.0}


def settings(mock_url: str, other_url: str, redis_url: str, auth: dict[str, Any]) -> dict[str, Any]:
    """Two workers, limits in Redis. What goes wrong, goes wrong soon; kept connections end soon."""
    # 1 s: "at rest" comes quickly, and connections are made and ended all the time.
    calm = {"pool": {"keepalive": 1}, "breaker": {"failures": 1000}, "timeouts": {"idle": 1}}
    return {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "workers": 2,
        "auth": auth,
        "plans": {
            "fast": {
                "requests_per_minute": 10**5,
                "burst": 10**5,
                "max_in_flight": 500,
                "tokens_per_minute": 10**8,
            },
            "small": {"requests_per_minute": 30, "burst": 5, "max_in_flight": 2},
        },
        "limits": {"store": redis_url, "per_ip": {"requests_per_minute": 10**5, "burst": 10**5}},
        "default_upstream": "other",
        "upstreams": {
            "mock": {"base_url": mock_url, **calm},
            "narrow": {"base_url": mock_url, "max_in_flight": 2, **calm},
            "other": {"base_url": other_url, **calm},
        },
        "models": {
            "m": {"upstreams": ["mock"], "price": _PRICE},
            "popular": {"upstreams": ["narrow"], "price": _PRICE},
            "spare": {"upstreams": ["mock", "narrow"], "price": _PRICE},
            "voice": {"upstreams": ["other"], "websocket": True},
        },
        "streams": {"heartbeat": 0.3, "usage": "inject"},
        "retry": {"attempts": 2, "base": 0.01},
    }


@asynccontextmanager
async def other_upstream() -> AsyncIterator[str]:
    """What the mock upstream has not: files and WebSockets. Its base URL."""

    async def files(request: web.Request) -> web.Response:
        size = 0
        with suppress(ConnectionError):  # its caller has left, and nobody reads an answer
            async for piece in request.content.iter_any():
                size += len(piece)
        return web.json_response({"id": "file-1", "object": "file", "bytes": size})

    async def talk(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for message in ws:
            await ws.send_str(message.data)
        return ws

    app = web.Application()
    app.router.add_post("/v1/files", files)
    app.router.add_get("/v1/realtime", talk)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


@dataclass(frozen=True)
class Door:
    """Where callers go, and as whom. keys: of the plan fast, of the plan small."""

    port: int
    fast: str
    small: str
    session: aiohttp.ClientSession


Visit = Callable[[Door], Awaitable[object]]


def _asks(mock: str, *, model: str = "m", stream: bool = True, kind: str = "fast") -> Visit:
    def visit(door: Door) -> Awaitable[object]:
        key = bearer(getattr(door, kind))
        return ask(door.port, chat(f"x-mock: {mock}", key, "Connection: close", model=model, stream=stream))

    return visit


async def _several_on_one_connection(door: Door) -> None:
    async with await Caller.connect(door.port) as caller, asyncio.timeout(20):
        for number in range(5):
            await caller.ask(chat(f"x-mock: words={5 + number}", bearer(door.fast), model="m"))


async def _leaves(door: Door) -> None:
    """In the middle of a stream, politely or not."""
    async with await Caller.connect(door.port) as caller, asyncio.timeout(20):
        await caller.send(chat("x-mock: words=500, gap=0.05", bearer(door.fast), model="m"))
        await caller.piece(await caller.head())
        random.choice((caller.leave, caller.reset))()


async def _gives_up(door: Door) -> None:
    """Before the first byte."""
    async with await Caller.connect(door.port) as caller:
        await caller.send(chat("x-mock: ttfb=5", bearer(door.fast), model="m"))
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await caller.head()


async def _sends_half_a_body(door: Door) -> None:
    async with await Caller.connect(door.port) as caller:
        await caller.send(chat(bearer(door.fast), model="m")[:-5])
        caller.leave()


async def _spoiled(door: Door) -> None:
    await ask(door.port, post("/v1/chat/completions", b"{", bearer(door.fast), "Connection: close"))


async def _stranger(door: Door) -> None:
    await ask(door.port, chat(bearer("hr_nobody_nothing"), "Connection: close"))


async def _uploads(door: Door) -> None:
    body = form(random.randrange(300_000), model=None)
    await ask(door.port, head(len(body), bearer(door.fast), "Connection: close") + body)


async def _leaves_an_upload(door: Door) -> None:
    body = form(200_000, model=None)
    async with await Caller.connect(door.port) as caller:
        await caller.send(head(len(body), bearer(door.fast)) + body[:100_000])
        caller.reset()


async def _talks(door: Door) -> None:
    url = f"http://127.0.0.1:{door.port}/v1/realtime?model=voice"
    fields = {"Authorization": f"Bearer {door.fast}"}
    async with door.session.ws_connect(url, headers=fields) as ws:
        for number in range(10):
            await ws.send_str(f'{{"type":"ping","number":{number}}}')
            await ws.receive(10)


#: What callers do, and how often beside the others.
VISITS: dict[str, tuple[int, Visit]] = {
    "short": (8, _asks("words=5", stream=False)),
    "kept": (2, _several_on_one_connection),
    "streams": (8, _asks("words=40, ttfb=0.05, gap=0.01")),
    "long": (3, _asks("words=100, ttfb=0.1, gap=0.02")),
    "silent": (1, _asks("words=2, gap=0.4")),
    "queued": (3, _asks("words=10, gap=0.01", model="popular")),
    "failover": (2, _asks("status=503", model="spare")),
    "leaves": (4, _leaves),
    "gives up": (2, _gives_up),
    "half a body": (1, _sends_half_a_body),
    "refused": (3, _asks("words=2", kind="small")),
    "quota": (1, _asks("status=429, retry_after=60", stream=False)),
    "errors": (1, _asks("status=500", stream=False)),
    "cut": (2, _asks("cut_after=5")),
    "reset": (1, _asks("rst_after=5")),
    "stall": (1, _asks("stall_after=3")),
    "spoiled": (1, _spoiled),
    "stranger": (1, _stranger),
    "upload": (2, _uploads),
    "left upload": (1, _leaves_an_upload),
    "websocket": (2, _talks),
}


#: Those whose caller breaks off, and may find that it was Headrace.
BREAKING = {"leaves", "gives up", "half a body", "left upload"}


class Load:
    """made: visits by kind; broken: those that had no answer and should have had. One that has no end, or
    fails in a way that callers do not, fails the soak."""

    def __init__(self, door: Door, seed: int) -> None:
        self.made = Counter[str]()
        self.broken = Counter[str]()
        self._door = door
        self._seed = seed

    async def _caller(self, number: int) -> None:
        rng = random.Random(self._seed + number)
        names, weights = list(VISITS), [weight for weight, _ in VISITS.values()]
        while True:
            (name,) = rng.choices(names, weights)
            await self._visit(name)
            await asyncio.sleep(rng.random() * 2 * REST_S)

    async def _visit(self, name: str) -> None:
        self.made[name] += 1
        try:
            await VISITS[name][1](self._door)
        except TimeoutError:  # which is an OSError
            raise AssertionError(f"{name}: no end") from None
        except (OSError, asyncio.IncompleteReadError, aiohttp.ClientError):
            if name not in BREAKING:
                self.broken[name] += 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """As long as the block lasts."""
        tasks = [asyncio.ensure_future(self._caller(number)) for number in range(CALLERS)]
        try:
            yield
            for task in tasks:
                assert not task.done(), task.exception()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
