"""Limits that several machines share through Redis, and what happens to requests when it goes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy import config
from proxy.token_commands import issue
from tests.kit.callers import Answer, Caller, ask
from tests.kit.chaos import Fault, chaos
from tests.kit.desk import Crowd, Desk, question
from tests.kit.fleet import Fleet, fleet, summed
from tests.kit.headrace import settings_for, until
from tests.kit.invariant import balanced
from tests.kit.redis import RedisServer, redis_server
from tests.kit.upstreams import scripted

pytestmark = [pytest.mark.timeout(90), pytest.mark.alone]

#: Promised: no request waits longer for the store than this, and a silent owner's slots are free after that.
BUDGET_S = 0.05
LEASE_S = 5.0
SLACK = 5
CANARY = "canary-7c1f0d"


@pytest.fixture
async def server() -> AsyncIterator[RedisServer]:
    async with redis_server() as made:
        yield made


class Pair:
    """Two Headraces with one store and one upstream."""

    def __init__(self, fleets: list[Fleet], desk: Desk) -> None:
        self.fleets = fleets
        self.desk = desk
        self.ports = [each.port for each in fleets]

    async def store_up(self, level: int) -> None:
        """Until both say so."""
        async with asyncio.timeout(15):
            for each in self.fleets:
                while (await each.metrics())["headrace_state_store_up"] != level:
                    await asyncio.sleep(0.02)

    async def quiet(self) -> None:
        """And the books of both agree."""
        for each in self.fleets:
            await balanced(each)


@asynccontextmanager
async def pair(
    tmp_path: Path, url: str, workers: int = 1, count: int = 2, **sections: Any
) -> AsyncIterator[Pair]:
    """`limits` adds to the store."""
    desk = Desk()
    limits = {"store": url, **sections.pop("limits", {})}
    async with scripted(desk) as upstream, AsyncExitStack() as stack:
        settings = {**settings_for(upstream.url, limits=limits, **sections), "workers": workers}
        fleets = []
        for name in "ab"[:count]:
            (tmp_path / name).mkdir()
            fleets.append(await stack.enter_async_context(fleet(tmp_path / name, settings)))
        for each in fleets:
            await each.settle(workers)
        yield Pair(fleets, desk)


class Load:
    """Callers that ask one request after the other; what they got, and how long the longest took."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.longest_s = 0.0
        self.stop = asyncio.Event()

    async def run(self, port: int) -> None:
        async with await Caller.connect(port) as caller:
            while not self.stop.is_set():
                began_at = time.monotonic()
                answer: Answer = await caller.ask(question("load"))
                self.longest_s = max(self.longest_s, time.monotonic() - began_at)
                self.statuses.append(answer.status)
                await asyncio.sleep(0.005)

    async def goes_on(self, count: int = 50) -> None:
        """Until so many more have been answered."""
        wanted = len(self.statuses) + count
        await until(lambda: len(self.statuses) >= wanted, 20)


@asynccontextmanager
async def load(ports: list[int], callers: int = 2) -> AsyncIterator[Load]:
    """That many callers a port; a request without a whole answer fails the test."""
    made = Load()
    tasks = [asyncio.ensure_future(made.run(port)) for port in ports for _ in range(callers)]
    try:
        await made.goes_on()
        yield made
    finally:
        made.stop.set()
        await asyncio.gather(*tasks)


# ── shared ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_rate_is_shared_to_the_request(tmp_path: Path, server: RedisServer) -> None:
    models = {"m": {"upstreams": ["up"], "requests_per_minute": 20}}
    async with pair(tmp_path, server.url, models=models) as here:
        here.desk.open_all()
        began_at = time.monotonic()
        answers = await asyncio.gather(
            *(ask(here.ports[number % 2], question(str(number))) for number in range(80))
        )
        refilled = int((time.monotonic() - began_at) * 20 / 60)
        passed = sum(answer.status == 200 for answer in answers)
        assert 20 <= passed <= 20 + refilled
        assert {answer.status for answer in answers} == {200, 429}
        assert len(here.desk.seen) == passed


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
async def test_an_upstreams_slots_are_shared_and_never_exceeded(
    tmp_path: Path, server: RedisServer, workers: int
) -> None:
    limits = {"queue": {"max_waiting": 200, "max_wait": 30}}
    async with pair(tmp_path, server.url, workers, upstream={"max_in_flight": 3}, limits=limits) as here:
        crowds = [Crowd(port) for port in here.ports]
        names = [str(number) for number in range(30)]
        for name in names:
            crowds[int(name) % 2].ask(name)
        await until(lambda: here.desk.inside == 3, 10)
        here.desk.open_all()
        assert [await crowds[int(name) % 2].status(name) for name in names] == [200] * 30
        assert here.desk.most == 3
        await here.quiet()


async def test_a_killed_nodes_slots_come_back_within_the_lease(tmp_path: Path, server: RedisServer) -> None:
    limits = {"queue": {"max_waiting": 10, "max_wait": 40}}
    async with pair(tmp_path, server.url, upstream={"max_in_flight": 1}, limits=limits) as here:
        dead, living = here.fleets
        crowd = Crowd(living.port)
        crowd.ask("held", port=dead.port)
        await until(lambda: "held" in here.desk.seen)
        crowd.ask("waits")
        async with asyncio.timeout(10):
            while summed(await living.metrics(), "headrace_queue_depth") != 1:
                await asyncio.sleep(0.01)
        os.kill(dead.pid, signal.SIGKILL)
        began_at = time.monotonic()
        await until(lambda: "waits" in here.desk.seen, LEASE_S * SLACK)
        print(f"the slot came back after {time.monotonic() - began_at:.2f} s")
        here.desk.open_all()
        assert await crowd.status("waits") == 200
        assert await crowd.status("held") == 0
        await living.quiet()


async def test_nothing_secret_is_in_redis(tmp_path: Path, server: RedisServer) -> None:
    auth = {"mode": "required", "database": f"sqlite:{tmp_path}/keys.db"}
    plans = {"basic": {"requests_per_minute": 100, "tokens_per_minute": 10**6, "max_in_flight": 5}}
    sections: dict[str, Any] = {
        "auth": {**auth, "jwt": {"algorithms": ["HS256"], "secret": CANARY * 4}},
        "plans": plans,
        "upstream": {"api_key": f"{CANARY}-upstream"},
    }
    async with pair(tmp_path, server.url, count=1, **sections) as here:
        command = here.fleets[0]
        settings = config.load(command.file, {})
        token = issue(settings, f"{CANARY}-subject", "basic", "10m", time.time())
        crowd = Crowd(here.ports[0])
        crowd.ask("held", f"Authorization: Bearer {token}")
        await until(lambda: bool(here.desk.seen), 10)
        async with server.client() as client:
            keys = [key async for key in client.scan_iter()]
            dumped = b"".join([key + (await client.dump(key) or b"") for key in keys])
            assert keys  # the request has left its traces
            assert all(key.startswith(b"headrace:") for key in keys)
        for secret in (CANARY, *token.split(".")):
            assert secret.encode() not in dumped
        here.desk.open_all()
        assert await crowd.status("held") == 200


# ── gone ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_redis_killed_under_load_costs_a_budget_once(tmp_path: Path, server: RedisServer) -> None:
    async with pair(tmp_path, server.url) as here:
        here.desk.open_all()
        await here.store_up(1)
        async with load(here.ports) as asked:
            await server.kill()
            await asked.goes_on()
            await here.store_up(0)
            await server.start()
            await here.store_up(1)
            await asked.goes_on()
        print(f"{len(asked.statuses)} requests, the longest took {asked.longest_s * 1000:.0f} ms")
        assert set(asked.statuses) == {200}
        assert asked.longest_s < BUDGET_S * SLACK
        for each in here.fleets:
            assert len(each.logged("state_store_down")) == 1
            assert len(each.logged("state_store_up")) == 1
        await here.quiet()


@pytest.mark.parametrize(("policy", "status"), [("closed", 503), ("open", 200), ("local", 429)])
async def test_what_is_decided_without_the_store(
    tmp_path: Path, server: RedisServer, policy: str, status: int
) -> None:
    models = {"m": {"upstreams": ["up"], "requests_per_minute": 1}}
    limits = {"on_store_failure": policy}
    async with pair(tmp_path, server.url, count=1, models=models, limits=limits) as here:
        here.desk.open_all()
        assert (await ask(here.ports[0], question("one"))).status == 200
        assert (await ask(here.ports[0], question("two"))).status == 429
        await server.kill()
        await ask(here.ports[0], question("notices it"))  # the local bucket's only request
        answers = [await ask(here.ports[0], question("later")) for _ in range(5)]
        assert {answer.status for answer in answers} == {status}
        if status == 503:
            assert answers[0].json()["error"]["code"] == "overloaded"
            assert int(answers[0].headers["retry-after"]) >= 1
        await server.start()
        await here.store_up(1)
        assert (await ask(here.ports[0], question("again"))).status == 200  # a new and empty Redis
        await here.quiet()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(delay_s=0.5), id="slow", marks=pytest.mark.slow),
        pytest.param(Fault(blackhole=True), id="silent"),
    ],
)
async def test_a_store_that_does_not_answer_in_time_counts_as_gone(
    tmp_path: Path, server: RedisServer, fault: Fault
) -> None:
    async with (
        chaos(server.port) as between,
        pair(tmp_path, f"redis://127.0.0.1:{between.port}/0", count=1) as here,
    ):
        here.desk.open_all()
        async with load(here.ports) as asked:
            await between.become(fault)
            await here.store_up(0)
            await asked.goes_on()
            await between.become(Fault())
            await here.store_up(1)
            await asked.goes_on()
        print(f"{len(asked.statuses)} requests, the longest took {asked.longest_s * 1000:.0f} ms")
        assert set(asked.statuses) == {200}
        assert asked.longest_s < BUDGET_S * SLACK
        await here.quiet()


async def _flush_all(server: RedisServer) -> None:
    async with server.client() as client:
        await client.flushall()


async def _flush_scripts(server: RedisServer) -> None:
    async with server.client() as client:
        await client.script_flush()


# Everything includes the scripts.
@pytest.mark.parametrize("flush", [_flush_all, pytest.param(_flush_scripts, marks=pytest.mark.slow)])
async def test_a_redis_that_forgets_fails_no_request(
    tmp_path: Path, server: RedisServer, flush: Callable[[RedisServer], Awaitable[None]]
) -> None:
    async with pair(tmp_path, server.url) as here:
        here.desk.open_all()
        async with load(here.ports) as asked:
            for _ in range(10):
                await flush(server)
                await asked.goes_on(10)
        assert set(asked.statuses) == {200}
        for each in here.fleets:
            assert not each.logged("state_store_down")
        await here.quiet()
