"""Rows 19 and 22 as callers see them: whatever becomes of Redis, they are answered; the books are right."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kit.callers import ask
from tests.kit.chaos import Fault, chaos
from tests.kit.desk import Crowd, Desk, question
from tests.kit.fleet import Fleet, fleet
from tests.kit.headrace import running, settings_for, until
from tests.kit.invariant import balanced
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.lab import Gate, plays, response
from tests.kit.redis import redis_server
from tests.kit.upstreams import Scripted, scripted

pytestmark = pytest.mark.timeout(60)

LIMIT = 5


async def store_is(here: Fleet, up: bool) -> None:
    """Until all workers say so; it takes a request to notice that it is gone."""
    async with asyncio.timeout(20):
        while (await here.metrics())["headrace_state_store_up"] != up:
            await asyncio.sleep(0.02)


@asynccontextmanager
async def node(tmp_path: Path, store: str, **sections: Any) -> AsyncIterator[tuple[Fleet, Scripted]]:
    async with scripted(Desk(wide_open=True)) as upstream:
        settings = settings_for(upstream.url, limits={"store": store}, workers=2, **sections)
        async with fleet(tmp_path, settings) as here:
            await here.settle()
            yield here, upstream


async def statuses(here: Fleet, count: int, model: str = "m") -> list[int]:
    """Of so many requests one after the other. One that hangs fails the test."""
    request = question("one", "Connection: close", model=model)
    return [(await ask(here.port, request)).status for _ in range(count)]


@pytest.mark.parametrize("gone", ["refuses", "says nothing"])
async def test_redis_is_down_at_the_start(tmp_path: Path, gone: str) -> None:
    """It starts, its own counters limit, nobody is failed; when Redis comes the shared ones begin."""
    models = {"m": {"upstreams": ["up"]}, "few": {"upstreams": ["up"], "requests_per_minute": LIMIT}}
    async with redis_server() as server, chaos(server.port) as between:
        await between.become(Fault(refuse=True) if gone == "refuses" else Fault(blackhole=True))
        url = f"redis://127.0.0.1:{between.port}/0"
        async with node(tmp_path, url, models=models) as (here, upstream):
            assert set(await statuses(here, 10)) == {200}
            await store_is(here, False)
            answers = await statuses(here, 2 * LIMIT, "few")
            assert answers[:LIMIT] == [200] * LIMIT
            assert 429 in answers
            await between.become(Fault())
            await store_is(here, True)
            assert await statuses(here, LIMIT, "few") == [200] * LIMIT  # these counters are new
            assert set(await statuses(here, 10)) == {200}
            await balanced(here, upstream.calls)


async def test_redis_that_is_full_or_read_only_fails_no_request(tmp_path: Path) -> None:
    """OOM and READONLY, as after a failover that left us with a replica."""
    async with (
        redis_server() as server,
        server.client() as client,
        node(tmp_path, server.url) as (here, upstream),
    ):
        harms = (
            (lambda: client.config_set("maxmemory", "1mb"), lambda: client.config_set("maxmemory", "0")),
            (lambda: client.replicaof("127.0.0.1", "1"), lambda: client.replicaof("NO", "ONE")),
        )
        await store_is(here, True)
        for harm, heal in harms:
            await harm()
            assert set(await statuses(here, 20)) == {200}
            await store_is(here, False)
            assert set(await statuses(here, 20)) == {200}
            await heal()
            await store_is(here, True)
        assert set(await statuses(here, 20)) == {200}
        await balanced(here, upstream.calls)


def head(path: str, key: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: h\r\n{bearer(key)}\r\nConnection: close\r\n\r\n".encode()


async def test_a_store_that_must_be_there_loses_nothing(tmp_path: Path) -> None:
    """on_store_failure: closed. Whoever runs goes on to the end and gives everything back, without a slot for
    a failover; nobody else is served, whatever his plan asks of the store; all is well when it comes back."""
    plans = {
        "basic": {"max_in_flight": 5, "tokens_per_minute": 10**6},
        "pro": {"max_in_flight": 5, "requests_per_minute": 1000},
        "fast": {"max_in_flight": 5},
        "small": {},  # its key has a budget
    }
    keys = {
        plan: await make_key(tmp_path, plan=plan, budget_day=5 if not plans[plan] else None) for plan in plans
    }
    failing, desk = Gate(), Desk()
    async with (
        redis_server() as server,
        scripted(plays(failing, response(503, b"{}"))) as bad,
        scripted(desk) as good,
        running(
            settings_for(
                good.url,
                upstreams={name: {"base_url": url} for name, url in (("up", good.url), ("bad", bad.url))},
                models={
                    "m": {"upstreams": ["up"], "price": {"input": 1, "output": 1}},
                    "two": {"upstreams": ["bad", {"name": "up", "tier": 2}]},
                },
                limits={"store": server.url, "on_store_failure": "closed"},
                auth=auth_section(tmp_path),
                plans=plans,
                retry={"attempts": 3, "base": 0.01},
            )
        ) as headrace,
    ):
        crowd = Crowd(headrace.port)
        for name in ("basic", "small"):
            crowd.ask(name, bearer(keys[name]))
        crowd.ask("fails over", bearer(keys["pro"]), model="two")
        await until(lambda: len(good.calls) == 2 and len(bad.calls) == 1)
        await server.kill()
        asked = [question("new", bearer(key)) for key in keys.values()]
        asked += [head("/v1/limits", keys[plan]) for plan in plans if plans[plan]]
        asked += [head("/v1/usage", keys["small"])]
        for request in asked:
            refused = await ask(headrace.port, request)
            assert (refused.status, refused.json()["error"]["code"]) == (503, "overloaded"), request
        failing.open()
        desk.open_all()
        assert await crowd.statuses(["basic", "small", "fails over"]) == [200, 200, 503]
        assert len(good.calls) == 2
        await headrace.quiet()
        await server.restart()
        async with asyncio.timeout(20):
            while not (await headrace.metrics())["headrace_state_store_up"]:
                await asyncio.sleep(0.02)
        assert (await ask(headrace.port, question("again", bearer(keys["basic"])))).status == 200
