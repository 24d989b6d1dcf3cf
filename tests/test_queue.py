"""The waiting room from outside: who waits for a slot, for how long, in which order, and what is left."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import jwt
import pytest

from tests.kit.callers import Caller, ask
from tests.kit.desk import Crowd, Desk, question
from tests.kit.fleet import Fleet, fleet, summed, write
from tests.kit.headrace import Headrace, running, settings_for, until
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.upstreams import scripted

pytestmark = pytest.mark.timeout(60)

SECRET = "a-secret-of-32-bytes-and-some-more"
#: A lease is 5 s; deadlines are five times what is promised.
LEASE_S = 5.0
SLACK = 5


class Office:
    """A Headrace with one desk behind it, and the crowd before it."""

    def __init__(self, headrace: Headrace, desk: Desk) -> None:
        self.headrace = headrace
        self.desk = desk
        self.crowd = Crowd(headrace.port)

    async def holds(self, name: str, *headers: str, **fields: Any) -> None:
        """Asks, and returns once the upstream has it."""
        self.crowd.ask(name, *headers, **fields)
        await until(lambda: name in self.desk.seen)

    async def waits(self, name: str, *headers: str, **fields: Any) -> None:
        """Asks, and returns once it stands in the queue."""
        room = self.headrace.server._room
        assert room is not None
        before = room.waiting
        self.crowd.ask(name, *headers, **fields)
        await until(lambda: room.waiting == before + 1)

    async def taken(self, *slots: str) -> list[int]:
        """Places that are taken, as the store counts them."""
        return await self.headrace.server.core.admission.state.peek_slots(slots, time.monotonic())

    async def empty(self) -> None:
        """Nothing is left behind, and the next request is served."""
        await self.headrace.quiet()
        assert self.headrace.server._room is not None
        assert self.headrace.server._room.waiting == 0
        assert await self.taken("machine", "upstream:up") == [0, 0]
        self.desk.open_all()
        assert (await ask(self.headrace.port, question("the last"))).status == 200
        await self.headrace.quiet()


@asynccontextmanager
async def office(**sections: Any) -> AsyncIterator[Office]:
    desk = Desk()
    async with scripted(desk) as upstream, running(settings_for(upstream.url, **sections)) as headrace:
        yield Office(headrace, desk)


def limits(most: int, max_waiting: int = 200, max_wait: float = 20) -> dict[str, Any]:
    return {"max_in_flight": most, "queue": {"max_waiting": max_waiting, "max_wait": max_wait}}


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ── one process ──────────────────────────────────────────────────────────────────────────────────────────


async def test_the_second_waits_and_is_served_when_the_first_ends() -> None:
    async with office(limits=limits(1)) as here:
        await here.holds("first")
        await here.waits("second")
        samples = await here.headrace.metrics()
        assert samples['headrace_queue_depth{plan="open"}'] == 1
        assert samples['headrace_queue_depth{plan="basic"}'] == 0
        assert here.headrace.state["queued"] == 1
        assert here.desk.seen == ["first"]
        await asyncio.sleep(0.05)  # what it waits at least: `queue_ms` is checked against it
        here.desk.open("first", "second")
        assert await here.crowd.statuses(["first", "second"]) == [200, 200]
        await until(lambda: len(here.headrace.log_lines()) == 2)
        first, second = here.headrace.log_lines()
        assert first["queue_ms"] < 50 <= second["queue_ms"] <= second["duration_ms"]
        samples = await here.headrace.metrics()
        assert samples['headrace_queue_depth{plan="open"}'] == 0
        assert samples['headrace_queue_wait_seconds_count{plan="open"}'] == 1
        assert samples['headrace_queue_wait_seconds_sum{plan="open"}'] >= 0.05
        assert here.desk.most == 1
        await here.empty()


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async with office(limits=limits(1, max_waiting=1)) as here:
        await here.holds("first")
        await here.waits("second")
        answer = await ask(here.headrace.port, question("third"))
        assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        here.desk.open_all()
        assert await here.crowd.statuses(["first", "second"]) == [200, 200]
        assert "third" not in here.desk.seen
        samples = await here.headrace.metrics()
        decisions = "headrace_limit_decisions_total"
        assert summed(samples, decisions, 'scope="global"', 'result="refused"') == 1
        assert summed(samples, decisions, 'scope="global"', 'result="allowed"') == 2
        (line,) = [line for line in here.headrace.log_lines() if line["status"] == 503]
        assert line["reason"] == "rejected"
        await here.empty()


async def test_a_callers_own_slot_is_held_while_it_waits(tmp_path: Path) -> None:
    """Its own slots never wait, but who waits for the machine's counts among them; all come back, whether
    they were used or not."""
    key = await make_key(tmp_path, plan="basic")
    mine = {"auth": auth_section(tmp_path), "plans": {"basic": {"max_in_flight": 3}}}
    async with office(limits=limits(1), **mine) as here:

        async def left() -> int:
            head = f"GET /v1/limits HTTP/1.1\r\nHost: h\r\n{bearer(key)}\r\nConnection: close\r\n\r\n"
            return int((await ask(here.headrace.port, head.encode())).json()["in_flight"]["remaining"])

        here.crowd.ask("first", bearer(key))
        await until(lambda: here.desk.seen == ["first"])
        for count, name in enumerate(("leaves", "stays"), 1):
            here.crowd.ask(name, bearer(key))
            await until(lambda count=count: here.headrace.state["queued"] == count)
        answer = await ask(here.headrace.port, question("one more", bearer(key)))
        assert (answer.status, answer.json()["error"]["code"]) == (429, "too_many_in_flight")
        here.crowd.leave("leaves")
        await until(lambda: here.headrace.state["queued"] == 1)
        assert await left() == 1
        here.desk.open_all()
        assert await here.crowd.statuses(["first", "stays"]) == [200, 200]
        await here.headrace.quiet()
        assert await left() == 3
        assert here.desk.seen == ["first", "stays"]


async def test_no_room_at_all_means_nobody_waits() -> None:
    async with office(limits=limits(1, max_waiting=0)) as here:
        await here.holds("first")
        answer = await ask(here.headrace.port, question("second"))
        assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
        here.desk.open_all()
        assert await here.crowd.status("first") == 200
        await here.empty()


@pytest.mark.alone
async def test_who_waits_too_long_is_told_so() -> None:
    async with office(limits=limits(1, max_wait=0.2)) as here:
        await here.holds("first")
        began_at = time.monotonic()
        answer = await ask(here.headrace.port, question("second"))
        assert 0.2 <= time.monotonic() - began_at < 0.2 * SLACK
        assert (answer.status, answer.json()["error"]["code"]) == (503, "queue_timeout")
        assert int(answer.headers["retry-after"]) >= 1
        samples = await here.headrace.metrics()
        assert samples['headrace_queue_wait_seconds_count{plan="open"}'] == 1
        here.desk.open_all()
        assert await here.crowd.status("first") == 200
        assert "second" not in here.desk.seen
        await here.empty()


@pytest.mark.parametrize("how", ["leave", "reset"])
async def test_a_waiter_that_leaves_frees_its_place_and_never_arrives(how: str) -> None:
    async with office(limits=limits(1, max_waiting=1)) as here:
        await here.holds("first")
        room = here.headrace.server._room
        assert room is not None
        async with await Caller.connect(here.headrace.port) as caller:
            await caller.send(question("gone"))
            await until(lambda: room.waiting == 1)
            getattr(caller, how)()
            await until(lambda: room.waiting == 0)
        await here.waits("third")  # in its place
        here.desk.open_all()
        assert await here.crowd.statuses(["first", "third"]) == [200, 200]
        assert here.desk.seen == ["first", "third"]
        samples = await here.headrace.metrics()
        assert samples['headrace_client_disconnects_total{phase="queue"}'] == 1
        (line,) = [line for line in here.headrace.log_lines() if line["reason"] == "client_gone"]
        assert line["queue_ms"] > 0
        await here.empty()


async def test_a_full_upstream_holds_up_nobody_who_wants_another() -> None:
    near, far = Desk(), Desk()
    async with scripted(near) as one, scripted(far) as other:
        sections = {
            "upstreams": {
                "up": {"base_url": one.url, "max_in_flight": 1},
                "far": {"base_url": other.url},
            },
            "models": {"m": {"upstreams": ["up"]}, "n": {"upstreams": ["far"]}},
            "limits": limits(10),
        }
        async with running(settings_for(one.url, **sections)) as headrace:
            here = Office(headrace, near)
            far.open_all()
            await here.holds("first")
            await here.waits("second")
            assert (await ask(headrace.port, question("passes", model="n"))).status == 200
            assert here.crowd.waiting("second")
            near.open_all()
            assert await here.crowd.statuses(["first", "second"]) == [200, 200]
            assert (near.seen, near.most, far.seen) == (["first", "second"], 1, ["passes"])
            await here.empty()


def token(plan: str) -> str:
    now = int(time.time())
    claims = {"iss": "headrace", "aud": "headrace", "sub": plan, "plan": plan, "iat": now, "exp": now + 600}
    return f"Authorization: Bearer {jwt.encode(claims, SECRET, 'HS256')}"


async def test_a_higher_plan_goes_first_and_the_lowest_is_served(tmp_path: Path) -> None:
    """Weights are 1 + priority: 1 and 10, so the lowest has one turn in eleven."""
    auth = {
        "mode": "required",
        "database": f"sqlite:{tmp_path}/keys.db",
        "jwt": {"algorithms": ["HS256"], "secret": SECRET},
    }
    plans: dict[str, Any] = {"steerage": {"priority": 0}, "cabin": {"priority": 9}}
    async with office(limits=limits(1), auth=auth, plans=plans) as here:
        await here.holds("first", token("cabin"))
        await here.waits("low", token("steerage"))
        cabin = [f"high {number}" for number in range(15)]
        for name in cabin:
            await here.waits(name, token("cabin"))
        samples = await here.headrace.metrics()
        assert samples['headrace_queue_depth{plan="steerage"}'] == 1
        assert samples['headrace_queue_depth{plan="cabin"}'] == 15
        here.desk.open_all()
        assert await here.crowd.statuses(["first", "low", *cabin]) == [200] * 17
        turn = here.desk.seen.index("low")
        assert 5 <= turn <= 12, here.desk.seen
        assert [name for name in here.desk.seen if name.startswith("high")] == cabin
        samples = await here.headrace.metrics()
        assert samples['headrace_queue_wait_seconds_count{plan="steerage"}'] == 1
        assert samples['headrace_queue_wait_seconds_count{plan="cabin"}'] == 15
        await here.headrace.quiet()


async def test_who_says_that_it_is_in_no_hurry_lets_others_go_first() -> None:
    async with office(limits=limits(1)) as here:
        await here.holds("first")
        await here.waits("patient", "x-headrace-priority: low")
        for number in range(5):
            await here.waits(str(number))
        here.desk.open_all()
        assert await here.crowd.statuses(["first", "patient", "4"]) == [200, 200, 200]
        assert here.desk.seen == ["first", "0", "1", "2", "3", "4", "patient"]
        await here.empty()


def two_upstreams(second_url: str) -> dict[str, Any]:
    """`m` begins at one that nobody answers at; `n` uses the second one only."""
    return {
        "upstreams": {
            "dead": {"base_url": f"http://127.0.0.1:{closed_port()}/v1"},
            "up": {"base_url": second_url, "max_in_flight": 1},
        },
        "models": {"m": {"upstreams": ["dead", "up"]}, "n": {"upstreams": ["up"]}},
        "limits": limits(10),
        "retry": {},
    }


async def test_a_failover_never_waits_for_a_slot() -> None:
    desk = Desk()
    async with (
        scripted(desk) as upstream,
        running(settings_for(upstream.url, **two_upstreams(upstream.url))) as headrace,
    ):
        here = Office(headrace, desk)
        await here.holds("first", model="n")
        began_at = time.monotonic()
        answer = await ask(headrace.port, question("second"))
        assert time.monotonic() - began_at < 1.0 * SLACK  # not the 20 s of the queue
        assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_unreachable")
        desk.open_all()
        assert await here.crowd.status("first") == 200
        assert desk.seen == ["first"]
        await headrace.quiet()
        assert await here.taken("machine", "upstream:up", "upstream:dead") == [0, 0, 0]


async def test_a_failover_holds_the_slot_of_the_upstream_that_answers() -> None:
    desk = Desk()
    async with (
        scripted(desk) as upstream,
        running(settings_for(upstream.url, **two_upstreams(upstream.url))) as headrace,
    ):
        here = Office(headrace, desk)
        await here.holds("first")
        assert await here.taken("machine", "upstream:up", "upstream:dead") == [1, 1, 0]
        desk.open_all()
        assert await here.crowd.status("first") == 200
        await headrace.quiet()
        assert await here.taken("machine", "upstream:up", "upstream:dead") == [0, 0, 0]


async def test_thousands_leave_at_random_instants_and_nothing_is_left() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    models = {"m": {"upstreams": ["up"], "tokens_per_minute": 10**9}}  # so that tokens are reserved
    async with office(limits=limits(3, max_waiting=30), models=models) as here:
        ended = {"answered": 0, "left": 0}

        async def one(name: str) -> None:
            async with await Caller.connect(here.headrace.port) as caller:
                await caller.send(question(name))
                if chance.random() < 0.2:
                    here.desk.open(name)
                    answer = await caller.rest(await caller.head())
                    assert answer.status in (200, 503), answer.body
                    ended["answered"] += 1
                    return
                await asyncio.sleep(chance.random() * 0.02)
                ended["left"] += 1
                (caller.reset if chance.random() < 0.5 else caller.leave)()

        async def many(first: int) -> None:
            for number in range(75):
                await one(f"{first}-{number}")

        async with asyncio.timeout(40):
            await asyncio.gather(*(many(first) for first in range(40)))
        assert ended["left"] > 2000
        assert ended["answered"] > 300
        await here.empty()
        assert here.headrace.state["reservations"] == 0
        assert {line["reason"] for line in here.headrace.log_lines()} <= {
            "complete",
            "client_gone",
            "rejected",
        }


# ── several processes ────────────────────────────────────────────────────────────────────────────────────


class Hall:
    """Like `Office`, with processes."""

    def __init__(self, ships: Fleet, desk: Desk) -> None:
        self.fleet = ships
        self.desk = desk
        self.crowd = Crowd(ships.port)

    async def holds(self, name: str) -> None:
        self.crowd.ask(name)
        await until(lambda: name in self.desk.seen, 10)

    async def waits(self, name: str) -> None:
        before = await self.depth()
        self.crowd.ask(name)
        await self.has_depth(before + 1)

    async def has_seen(self, count: int) -> None:
        await until(lambda: len(self.desk.seen) == count, 10)

    async def depth(self) -> float:
        return summed(await self.fleet.metrics(), "headrace_queue_depth")

    async def has_depth(self, count: float) -> None:
        async with asyncio.timeout(10):
            while await self.depth() != count:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def hall(tmp_path: Path, workers: int, **sections: Any) -> AsyncIterator[Hall]:
    desk = Desk()
    async with scripted(desk) as upstream:
        settings = {**settings_for(upstream.url, **sections), "workers": workers}
        async with fleet(tmp_path, settings) as ships:
            await ships.settle(workers)
            yield Hall(ships, desk)


async def test_two_workers_share_the_machines_slots_exactly_and_in_order(tmp_path: Path) -> None:
    async with hall(tmp_path, 2, limits=limits(3)) as here:
        for name in ("a", "b", "c"):
            await here.holds(name)
        names = [str(number) for number in range(12)]
        for name in names:
            await here.waits(name)
        assert (await here.fleet.state())["queued"] == 12
        served = ["a", "b", "c", *names]
        for done, name in enumerate(served):  # one by one, so that the order of arrival upstream is theirs
            here.desk.open(name)
            assert await here.crowd.status(name) == 200
            await here.has_seen(min(done + 4, len(served)))
        assert here.desk.seen == served
        assert here.desk.most == 3
        page = await here.fleet.metrics()
        assert summed(page, "headrace_queue_wait_seconds_count", 'plan="open"') == 12
        await here.fleet.quiet()


async def test_two_workers_never_exceed_under_load(tmp_path: Path) -> None:
    async with hall(tmp_path, 2, limits=limits(3)) as here:
        here.desk.open_all()
        names = [str(number) for number in range(150)]
        for name in names:
            here.crowd.ask(name)
        assert await here.crowd.statuses(names) == [200] * 150
        assert here.desk.most <= 3
        await here.fleet.quiet()


async def test_a_full_and_a_late_queue_answer_the_same_with_two_workers(tmp_path: Path) -> None:
    async with hall(tmp_path, 2, limits=limits(1, max_waiting=1, max_wait=2)) as here:
        await here.holds("first")
        await here.waits("late")
        full = await ask(here.fleet.port, question("full"))
        assert (full.status, full.json()["error"]["code"]) == (503, "overloaded")
        assert int(full.headers["retry-after"]) >= 1
        late = await here.crowd.answer("late")
        assert late is not None
        assert (late.status, late.json()["error"]["code"]) == (503, "queue_timeout")
        here.desk.open_all()
        assert await here.crowd.status("first") == 200
        assert here.desk.seen == ["first"]
        await here.fleet.quiet()


@asynccontextmanager
async def stopped(pid: int) -> AsyncIterator[None]:
    """While it stands still, new connections are the other worker's. It may be killed meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def test_a_killed_worker_gives_back_what_it_holds_and_waits_for(tmp_path: Path) -> None:
    async with hall(tmp_path, 2, limits=limits(2)) as here:
        doomed, other = await here.fleet.settle(2)
        async with stopped(other):
            await here.holds("held")
            await here.holds("ended")
            here.crowd.ask("granted")
            await here.has_depth(1)  # few looks: each waits a second for the one that stands still
            here.desk.open("ended")  # what the room then grants is held by the supervisor
            await until(lambda: "granted" in here.desk.seen)
            here.crowd.ask("waiting")
            await here.has_depth(1)
        survivors = ["one", "two"]
        async with stopped(doomed):
            for name in survivors:
                here.crowd.ask(name)
            await here.has_depth(3)
            os.kill(doomed, signal.SIGKILL)
        began_at = time.monotonic()
        await until(lambda: set(survivors) <= set(here.desk.seen), LEASE_S * SLACK)
        print(f"slots came back after {time.monotonic() - began_at:.2f} s")
        assert await here.crowd.statuses(["held", "granted", "waiting"]) == [0, 0, 0]
        assert here.desk.seen[:3] == ["held", "ended", "granted"]
        assert "waiting" not in here.desk.seen
        here.desk.open_all()
        assert await here.crowd.statuses(survivors) == [200, 200]
        await here.fleet.settle(2)
        assert (await ask(here.fleet.port, question("the last"))).status == 200
        await here.fleet.quiet()


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_drain_serves_those_who_wait(tmp_path: Path, workers: int) -> None:
    async with hall(tmp_path, workers, limits=limits(1), drain=30) as here:
        await here.holds("first")
        await here.waits("second")
        await here.waits("third")
        here.fleet.first.signal(signal.SIGTERM)
        await here.fleet.first.line(r'"event":\s*"draining"')
        here.desk.open_all()
        assert await here.crowd.statuses(["first", "second", "third"]) == [200, 200, 200]
        assert await here.fleet.first.ended() == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_the_end_of_a_drain_tells_those_who_still_wait(tmp_path: Path, workers: int) -> None:
    async with hall(tmp_path, workers, limits=limits(1), drain=1) as here:
        await here.holds("first")
        await here.waits("second")
        here.fleet.first.signal(signal.SIGTERM)
        second = await here.crowd.answer("second")
        assert second is not None
        assert (second.status, second.json()["error"]["code"]) == (503, "draining")
        assert await here.fleet.first.ended() == 0
        assert here.desk.seen == ["first"]


async def reload(here: Hall, settings: dict[str, Any]) -> None:
    write(here.fleet.file, settings)
    code, _, err = await here.fleet.tell("reload")
    assert code == 0, err


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_reload_changes_the_queue_and_the_slots(tmp_path: Path, workers: int) -> None:
    desk = Desk()
    async with scripted(desk) as upstream:

        def settings(**changed: Any) -> dict[str, Any]:
            return {**settings_for(upstream.url, limits=limits(**changed)), "workers": workers}

        async with fleet(tmp_path, settings(most=1, max_waiting=0, max_wait=0.1)) as ships:
            await ships.settle(workers)
            here = Hall(ships, desk)
            await here.holds("first")
            assert (await ask(ships.port, question("full"))).status == 503
            await reload(here, settings(most=1, max_waiting=1, max_wait=15))
            await here.waits("second")
            assert (await ask(ships.port, question("full again"))).status == 503
            # Longer than the old wait and what a worker adds to it for a room that does not answer.
            await asyncio.sleep(2.5)
            assert here.crowd.waiting("second")
            desk.open("first")
            await until(lambda: "second" in desk.seen)
            await reload(here, settings(most=4, max_waiting=1, max_wait=15))
            for name in ("third", "fourth", "fifth"):
                await here.holds(name)
            await here.waits("sixth")
            desk.open_all()
            names = ["first", "second", "third", "fourth", "fifth", "sixth"]
            assert await here.crowd.statuses(names) == [200] * 6
            assert desk.most == 4
            await ships.quiet()
