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
from tests.kit.desk import Desk, question
from tests.kit.fleet import Fleet, fleet
from tests.kit.headrace import settings_for
from tests.kit.invariant import balanced
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
