"""Dollars a day and a month: reserved before a call, corrected after it, never spent twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import budgets
from proxy.identity import Principal
from proxy.schema import Plan
from tests.kit.callers import Answer, ask
from tests.kit.chaos import Fault, chaos
from tests.kit.desk import Crowd, Desk, question
from tests.kit.fleet import fleet, summed
from tests.kit.headrace import Headrace, running, settings_for, until
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.lab import response
from tests.kit.redis import redis_server
from tests.kit.upstreams import Call, scripted

pytestmark = pytest.mark.timeout(60)

#: What `Desk` answers: 1 token of each kind. A million tokens cost a million dollars: one token one dollar.
PRICE = {"input": 0, "output": 1_000_000}
MODEL = {"upstreams": ["up"], "price": PRICE}
#: Each request may answer with 5 tokens, so it reserves 5 dollars; it then costs 1.
MOST = 5


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def caller(day: int | None = None, month: int | None = None) -> Principal:
    return Principal(
        name="key:a",
        key_id="a",
        plan="pro",
        budget_day_usd=None if day is None else Decimal(day),
        budget_month_usd=None if month is None else Decimal(month),
    )


# ── the rule ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("now", "day", "month"),
    [
        ("2026-11-21T12:00:00", "2026-11-22", "2026-12-01"),
        ("2026-12-31T23:59:59.999", "2027-01-01", "2027-01-01"),
        ("2028-02-29T00:00:00", "2028-03-01", "2028-03-01"),
        ("2026-01-31T00:00:00", "2026-02-01", "2026-02-01"),
    ],
)
def test_when_a_budget_begins_anew(now: str, day: str, month: str) -> None:
    assert budgets.ends_of(at(now)) == (at(day), at(month))


@given(st.floats(0, 4e9))
def test_a_moment_is_in_its_own_day_and_month(now: float) -> None:
    for begins_at, ends_at in zip(budgets.begins_of(now), budgets.ends_of(now), strict=True):
        assert begins_at <= now < ends_at
        assert budgets.ends_of(begins_at)[0] <= ends_at


def test_a_keys_own_budget_goes_before_its_plans() -> None:
    plan = Plan(budget_day=Decimal(9), budget_month=Decimal(90), total_budget_month=Decimal(900))
    now = at("2026-11-21")
    named = {each.name: each.limit // budgets.NANOS for each in budgets.spends(caller(day=3), plan, 1, now)}
    assert named == {"day:key:a": 3, "month:key:a": 90, "month:plan:pro": 900}
    assert budgets.spends(caller(), Plan(), 1, now) == []
    zero = budgets.spends(caller(day=0), Plan(), 1, now)
    assert [each.limit for each in zero] == [0]


def test_what_the_ledger_knows_goes_into_the_same_counters() -> None:
    now = at("2026-11-21")
    plan = Plan(total_budget_day=Decimal(1), total_budget_month=Decimal(1))
    taken = budgets.spends(caller(day=1, month=1), plan, 1, now)
    known = list(budgets.rebuilt("key:a", "pro", 5, 7, now))
    assert [(each.name, each.resets_at) for each in known] == [(each.name, each.resets_at) for each in taken]
    assert [each.amount for each in known] == [5, 7, 5, 7]
    assert [each.amount for each in budgets.rebuilt("key:a", "pro", 0, 7, now)] == [7, 7]


# ── through a running Headrace ───────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def office(tmp_path: Path, **sections: Any) -> AsyncIterator[tuple[Headrace, Desk]]:
    desk = Desk()
    sections = {"auth": auth_section(tmp_path), "models": {"m": MODEL}, **sections}
    async with (
        scripted(desk) as upstream,
        running(settings_for(upstream.url, **sections)) as headrace,
    ):
        yield headrace, desk


async def usage_of(port: int, key: str) -> dict[str, Any]:
    answer = await ask(port, f"GET /v1/usage HTTP/1.1\r\nHost: test\r\n{bearer(key)}\r\n\r\n".encode())
    assert answer.status == 200, answer.body
    document: dict[str, Any] = answer.json()
    return document


def refusal(answer: Answer | None) -> str:
    assert answer is not None
    assert answer.status == 429
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-headrace-budget-reset"] in answer.json()["error"]["message"]
    assert answer.headers["x-headrace-budget-reset"].endswith("T00:00:00Z")
    assert int(answer.headers["retry-after"]) >= 1
    return str(answer.json()["error"]["code"])


async def test_fifty_at_once_against_a_budget_for_ten(tmp_path: Path) -> None:
    """Ten pass and are still there while the other forty are refused; then each has cost what it has."""
    key = await make_key(tmp_path, budget_day=10 * MOST)
    async with office(tmp_path) as (headrace, desk):
        await fifty(headrace.port, desk, key)
        await headrace.quiet()
        left = (await usage_of(headrace.port, key))["day"]["budget"]
        assert (left["limit_usd"], left["spent_usd"], left["remaining_usd"]) == ("50.00", "10.00", "40.00")
        samples = await headrace.metrics()
        for result, count in (("allowed", 10), ("refused", 40)):
            decided = summed(samples, "headrace_limit_decisions_total", 'scope="budget"', f'"{result}"')
            assert decided == count
        assert samples['headrace_cost_usd_total{model="m"}'] == 10


async def fifty(port: int, desk: Desk, key: str, other_port: int | None = None) -> None:
    crowd = Crowd(port)
    names = [str(number) for number in range(50)]
    for number, name in enumerate(names):
        to = other_port if number % 2 else port
        crowd.ask(name, bearer(key), port=to, max_tokens=MOST)
    await until(lambda: len(desk.seen) == 10 and sum(map(crowd.waiting, names)) == 10, 20)
    desk.open_all()
    answers = [await crowd.answer(name) for name in names]
    passed = [answer for answer in answers if answer is not None and answer.status == 200]
    assert len(passed) == desk.most == 10
    refused = [answer for answer in answers if answer not in passed]
    assert {refusal(answer) for answer in refused} == {"budget_exceeded"}


@pytest.mark.alone
async def test_fifty_at_once_over_two_workers(tmp_path: Path) -> None:
    key = await make_key(tmp_path, budget_month=10 * MOST)
    desk = Desk()
    async with scripted(desk) as upstream:
        settings = settings_for(upstream.url, auth=auth_section(tmp_path), models={"m": MODEL})
        async with fleet(tmp_path, {**settings, "workers": 2}) as made:
            await made.settle(2)
            await fifty(made.port, desk, key)
            await made.quiet()


@pytest.mark.alone
async def test_fifty_at_once_over_two_machines_on_one_redis(tmp_path: Path) -> None:
    key = await make_key(tmp_path, budget_day=10 * MOST)
    desk = Desk()
    async with redis_server() as server, scripted(desk) as upstream:
        limits = {"store": server.url}
        settings = settings_for(upstream.url, auth=auth_section(tmp_path), models={"m": MODEL}, limits=limits)
        for name in "ab":
            (tmp_path / name).mkdir()
        async with fleet(tmp_path / "a", settings) as one, fleet(tmp_path / "b", settings) as other:
            await one.settle(1)
            await other.settle(1)
            await fifty(one.port, desk, key, other.port)


async def test_a_budget_that_one_request_could_overdraw_refuses_it(tmp_path: Path) -> None:
    """What it may cost counts, not what it will: with fewer tokens the same is allowed."""
    key = await make_key(tmp_path, budget_day=MOST)
    async with office(tmp_path) as (headrace, desk):
        desk.open_all()
        answer = await ask(headrace.port, question("a", bearer(key), max_tokens=MOST + 1))
        assert refusal(answer) == "budget_exceeded"
        assert desk.seen == []
        for name in "bcdef":  # each costs one dollar, of five
            assert (await ask(headrace.port, question(name, bearer(key), max_tokens=1))).status == 200
        assert (
            refusal(await ask(headrace.port, question("g", bearer(key), max_tokens=1))) == "budget_exceeded"
        )


@pytest.mark.parametrize("status", [400, 429, 500, 503])
async def test_what_the_upstream_refused_costs_nothing(tmp_path: Path, status: int) -> None:
    async def refuse(call: Call) -> None:
        await call.send(response(status, json.dumps({"error": {"message": "no"}}).encode()))

    key = await make_key(tmp_path, budget_day=MOST)
    async with scripted(refuse) as upstream:
        settings = settings_for(upstream.url, auth=auth_section(tmp_path), models={"m": MODEL})
        async with running(settings) as headrace:
            for _ in range(3):
                answer = await ask(headrace.port, question("a", bearer(key), max_tokens=MOST))
                assert answer.status == status
            left = (await usage_of(headrace.port, key))["day"]["budget"]
            assert left["spent_usd"] == "0.00"


async def test_who_leaves_before_an_answer_leaves_its_reservation_behind(tmp_path: Path) -> None:
    """The upstream may have gone on and billed: nobody knows."""
    key = await make_key(tmp_path, budget_day=10 * MOST)
    async with office(tmp_path) as (headrace, desk):
        crowd = Crowd(headrace.port)
        crowd.ask("a", bearer(key), max_tokens=MOST)
        await until(lambda: desk.seen == ["a"])
        crowd.leave("a")
        await headrace.quiet()
        line = headrace.log_lines()[-1]
        assert (line["reason"], line["usage_source"], line["cost_usd"]) == ("client_gone", "unknown", None)
        left = (await usage_of(headrace.port, key))["day"]["budget"]
        assert left["spent_usd"] == "5.00"


async def test_a_plans_budgets(tmp_path: Path) -> None:
    """One caller's, and all callers' together."""
    plans = {"small": {"budget_day": 2 * MOST, "total_budget_day": 3 * MOST}}
    keys = [await make_key(tmp_path, plan="small") for _ in range(2)]
    async with office(tmp_path, plans=plans) as (headrace, desk):
        crowd = Crowd(headrace.port)
        for name in ("a0", "a1"):
            crowd.ask(name, bearer(keys[0]), max_tokens=MOST)
        await until(lambda: len(desk.seen) == 2)
        refused = await ask(headrace.port, question("a2", bearer(keys[0]), max_tokens=MOST))
        assert refusal(refused) == "budget_exceeded"
        crowd.ask("b0", bearer(keys[1]), max_tokens=MOST)
        await until(lambda: len(desk.seen) == 3)
        refused = await ask(headrace.port, question("b1", bearer(keys[1]), max_tokens=MOST))
        assert refusal(refused) == "budget_exceeded"
        desk.open_all()
        assert await crowd.statuses(["a0", "a1", "b0"]) == [200, 200, 200]
        assert (await ask(headrace.port, question("b2", bearer(keys[1]), max_tokens=MOST))).status == 200


async def test_observe_refuses_nobody(tmp_path: Path) -> None:
    key = await make_key(tmp_path, budget_day=1)
    async with office(tmp_path, limits={"mode": "observe"}) as (headrace, desk):
        desk.open_all()
        for name in "ab":
            assert (await ask(headrace.port, question(name, bearer(key), max_tokens=MOST))).status == 200
        samples = await headrace.metrics()
        assert summed(samples, "headrace_limit_decisions_total", 'scope="budget"', '"observed"') == 2


async def test_a_new_start_knows_what_was_spent(tmp_path: Path) -> None:
    """From the ledger: the counters themselves are gone."""
    key = await make_key(tmp_path, budget_day=2 * MOST)
    ledger = {"database": f"sqlite:{tmp_path / 'ledger.db'}"}
    async with office(tmp_path, ledger=ledger) as (headrace, desk):
        desk.open_all()
        for number in range(6):
            assert (await ask(headrace.port, question(str(number), bearer(key), max_tokens=1))).status == 200
    async with office(tmp_path, ledger=ledger) as (headrace, desk):
        left = (await usage_of(headrace.port, key))["day"]["budget"]
        assert (left["spent_usd"], left["remaining_usd"]) == ("6.00", "4.00")
        refused = await ask(headrace.port, question("x", bearer(key), max_tokens=MOST))
        assert refusal(refused) == "budget_exceeded"
        assert desk.seen == []


async def test_usage_of_a_caller(tmp_path: Path) -> None:
    """Its own rows only, what is still on the way to the file included; it costs no request."""
    keys = [await make_key(tmp_path, plan="basic") for _ in range(2)]
    ledger = {"database": f"sqlite:{tmp_path / 'ledger.db'}"}
    async with office(tmp_path, ledger=ledger) as (headrace, desk):
        desk.open_all()
        await asyncio.gather(*[ask(headrace.port, question(n, bearer(keys[0]), max_tokens=1)) for n in "abc"])
        document = await usage_of(headrace.port, keys[0])
        assert (document["plan"], document["month"]["budget"]) == ("basic", None)
        for period in ("day", "month"):
            counted = document[period]
            assert (counted["requests"], counted["completion_tokens"], counted["cost_usd"]) == (3, 3, "3.00")
        assert (await usage_of(headrace.port, keys[1]))["day"]["requests"] == 0


async def test_who_leaves_while_the_store_decides_leaves_no_reservation_behind(tmp_path: Path) -> None:
    """Tokens are taken, dollars are being asked for at the end of a slow network: callers leave at instants
    all over it."""
    plans = {"small": {"tokens_per_minute": 1_000_000}}
    key = await make_key(tmp_path, plan="small", budget_day=10_000)
    async with redis_server() as server, chaos(server.port) as network:
        await network.become(Fault(delay_s=0.01))
        limits = {"store": f"redis://127.0.0.1:{network.port}"}
        async with office(tmp_path, plans=plans, limits=limits) as (headrace, desk):
            desk.open_all()
            crowd = Crowd(headrace.port)
            names = [str(number) for number in range(60)]
            for number, name in enumerate(names):
                crowd.ask(name, bearer(key), max_tokens=MOST)
                await asyncio.sleep(0.001 * (number % 50))
                crowd.leave(name)
            await headrace.quiet()
            assert len(headrace.log_lines()) > 0
