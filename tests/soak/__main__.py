"""Two workers, Redis, a ledger and a mock upstream under a mixed load: does anything grow?

First a warm-up, then everything rests; then the load again, sampled all the time, and rest again. Memory has
to be flat in between, and what is open at the end is what was open before.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import uvloop
from redis.asyncio import Redis

from tests.kit.fleet import Fleet, descriptors, fleet, resident, summed
from tests.kit.headrace import command
from tests.kit.invariant import balanced
from tests.kit.keys import auth_section, make_key
from tests.kit.redis import redis_server
from tests.soak import flat
from tests.soak.load import Door, Load, other_upstream, settings

Say = Callable[[str], None]


class Watched:
    """A running Headrace, seen from outside."""

    def __init__(self, here: Fleet, redis: Redis, load: Load) -> None:
        self.fleet = here
        self.load = load
        self._redis = redis
        self._began_at = time.monotonic()

    async def sample(self) -> flat.Sample:
        state = await self.fleet.state()
        pids = self.fleet.processes()
        clients = await self._redis.info("clients")
        return flat.Sample(
            at_s=time.monotonic() - self._began_at,
            requests=sum(self.load.made.values()),
            streams=state["streams"],
            memory_bytes=sum(map(resident, pids)),
            fds=sum(map(descriptors, pids)),
            tasks=state["tasks"],
            connections=state["upstream_connections"] + state["upstream_idle"],
            redis=clients["connected_clients"],
        )

    async def at_rest(self) -> flat.Sample:
        """Once nothing goes on and no connection is kept: the lowest of what is then looked at for a second,
        because who looks is a connection and a task as well."""
        await self.fleet.quiet()
        async with asyncio.timeout(20):
            while (await self.fleet.state())["upstream_idle"]:
                await asyncio.sleep(0.05)
        looks = []
        for _ in range(10):
            looks.append(await self.sample())
            await asyncio.sleep(0.1)
        return min(looks, key=lambda each: (each.fds + each.redis, each.tasks))


@asynccontextmanager
async def watched(folder: Path, seed: int) -> AsyncIterator[Watched]:
    async with (
        redis_server() as redis,
        redis.client() as client,
        command("mock", "--port", "0") as mock,
        other_upstream() as other_url,
        aiohttp.ClientSession() as session,
    ):
        mock_url = (await mock.line(r"^mock upstream at (\S+)$"))[1]
        fast, small = [await make_key(folder, plan=plan, budget_day=100_000) for plan in ("fast", "small")]
        configuration = settings(mock_url, other_url, redis.url, auth_section(folder))
        async with fleet(folder, configuration) as here:
            await here.settle()
            yield Watched(here, client, Load(Door(here.port, fast, small, session), seed))


async def soak(seconds: float, say: Say, seed: int = 1) -> list[str]:
    """What was found to grow, or to be left behind: nothing, if all is well."""
    warm_up_s = min(120.0, seconds / 3)
    every_s = max(0.5, (seconds - warm_up_s) / 100)
    with tempfile.TemporaryDirectory(prefix="headrace-soak-") as folder:
        async with watched(Path(folder), seed) as it:
            say(flat.HEADING)
            async with it.load.running():
                await asyncio.sleep(warm_up_s)
                say(flat.row(await it.sample(), "warm"))
            before = await it.at_rest()
            say(flat.row(before, "at rest"))
            samples = await _measured(it, seconds - warm_up_s, every_s, say)
            after = await it.at_rest()
            say(flat.row(after, "at rest"))
            await balanced(it.fleet)
            dropped = await it.fleet.total("headrace_ledger_dropped_total")
            reasons = await _reasons(it.fleet)
            broken = it.load.broken
    found = flat.lines(samples)
    for line in flat.verdicts(found, samples[-1].requests - samples[0].requests):
        say(line)
    say("ends: " + ", ".join(f"{reason} {count}" for reason, count in reasons.items()))
    return [
        *(
            f"{line.name} grew by {line.rise:.0f} (allowed: {line.allowed:.0f})"
            for line in found
            if not line.flat
        ),
        *flat.left_behind(before, after),
        *([f"{dropped:.0f} rows of the ledger were dropped"] if dropped else []),
        *(f"{name}: {count} without an answer" for name, count in broken.items()),
    ]


async def _measured(it: Watched, seconds: float, every_s: float, say: Say) -> list[flat.Sample]:
    """Samples under load; about twenty of them are told."""
    samples: list[flat.Sample] = []
    told_every = max(1, round(seconds / every_s / 20))
    async with it.load.running():
        await asyncio.sleep(2 * every_s)  # callers come one after the other
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            samples.append(await it.sample())
            if len(samples) % told_every == 1 or told_every == 1:
                say(flat.row(samples[-1]))
            await asyncio.sleep(max(0.0, now + every_s - time.monotonic()))
    return samples


async def _reasons(here: Fleet) -> dict[str, int]:
    page = await here.metrics()
    names = ("complete", "client_gone", "upstream_error", "upstream_cut", "upstream_stall", "rejected")
    return {name: int(summed(page, "headrace_requests_total", f'reason="{name}"')) for name in names}


def _print(line: str) -> None:
    print(line, flush=True)


def main(words: list[str]) -> int:
    seconds = float(words[0]) if words else 600.0
    grown = uvloop.run(soak(seconds, _print))
    _print("\n".join(f"NOT FLAT: {each}" for each in grown) or "flat")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
