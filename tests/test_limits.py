"""What a plan and a model allow, on the wire: requests, tokens, slots, and the figures of what is left."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kit.callers import Answer, Caller, ask, chat
from tests.kit.fleet import fleet, summed, write
from tests.kit.headrace import Headrace, running, settings_for
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.lab import PLAIN, Gate, lab, plays, response
from tests.kit.upstreams import scripted

OK = response(200, b'{"id":"a","object":"chat.completion","choices":[]}')
DECISIONS = "headrace_limit_decisions_total"


@asynccontextmanager
async def limited(
    tmp_path: Path, plan: dict[str, Any], **sections: Any
) -> AsyncIterator[tuple[Headrace, str]]:
    """A Headrace before the mock upstream, and a key of the plan `small`."""
    key = await make_key(tmp_path, plan="small")
    url = sections.pop("url", "mock:")
    sections.setdefault("auth", auth_section(tmp_path))
    plans = {"small": plan}
    async with running(settings_for(url, plans=plans, **sections)) as headrace:
        yield headrace, key


def code(answer: Answer) -> str:
    found = answer.json()["error"]["code"]
    assert isinstance(found, str)
    return found


def ask_json(key: str, *fields: str, **document: Any) -> bytes:
    return chat(bearer(key), *fields, stream=False, **document)


async def figures(headrace: Headrace, key: str) -> dict[str, Any]:
    request = f"GET /v1/limits HTTP/1.1\r\nHost: test\r\n{bearer(key)}\r\n\r\n".encode()
    answer = await ask(headrace.port, request)
    assert answer.status == 200
    document: dict[str, Any] = answer.json()
    return document


async def decided(headrace: Headrace, scope: str) -> dict[str, float]:
    samples = await headrace.metrics()
    results = ("allowed", "refused", "observed")
    return {each: summed(samples, DECISIONS, f'scope="{scope}"', f'"{each}"') for each in results}


def left(answer: Answer, unit: str = "requests") -> dict[str, str]:
    prefix, suffix = "x-ratelimit-", f"-{unit}"
    return {
        name.removeprefix(prefix).removesuffix(suffix): value
        for name, value in answer.headers.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_burst_passes_and_the_next_one_waits(tmp_path: Path) -> None:
    """One request each 10 s: the time that this test takes does not count."""
    async with limited(tmp_path, {"requests_per_minute": 6, "burst": 3}) as (headrace, key):
        for remaining, reset in (("2", "10s"), ("1", "20s"), ("0", "30s")):
            answer = await ask(headrace.port, ask_json(key))
            assert answer.status == 200
            assert left(answer) == {"limit": "3", "remaining": remaining, "reset": reset}
        answer = await ask(headrace.port, ask_json(key))
        assert (answer.status, code(answer)) == (429, "rate_limit_exceeded")
        assert left(answer) == {"limit": "3", "remaining": "0", "reset": "30s"}
        wait_ms = int(answer.headers["retry-after-ms"])
        assert 5000 < wait_ms <= 10_000
        assert int(answer.headers["retry-after"]) == -(-wait_ms // 1000)
        assert await decided(headrace, "key") == {"allowed": 3, "refused": 1, "observed": 0}
        line = headrace.log_lines()[-1]
        assert (line["reason"], line["error"], line["attempts"]) == ("rejected", "rate_limit_exceeded", 0)


async def test_what_retry_after_says_is_true(tmp_path: Path) -> None:
    async with limited(tmp_path, {"requests_per_minute": 120, "burst": 1}) as (headrace, key):
        assert (await ask(headrace.port, ask_json(key))).status == 200
        refused = await ask(headrace.port, ask_json(key))
        assert refused.status == 429
        assert refused.headers["retry-after"] == "1"
        assert left(refused)["reset"].endswith("ms")
        await asyncio.sleep(int(refused.headers["retry-after-ms"]) / 1000)
        assert (await ask(headrace.port, ask_json(key))).status == 200


async def test_a_refusal_does_not_read_the_body(tmp_path: Path) -> None:
    """Decided from the head: the body of this one never comes."""
    async with limited(tmp_path, {"requests_per_minute": 1, "burst": 1}) as (headrace, key):
        assert (await ask(headrace.port, ask_json(key))).status == 200
        head = ask_json(key).partition(b"\r\n\r\n")[0]
        async with await Caller.connect(headrace.port) as caller, asyncio.timeout(5):
            assert (await caller.ask(head + b"\r\n\r\n")).status == 429


async def test_callers_of_a_plan_are_counted_apart(tmp_path: Path) -> None:
    other = await make_key(tmp_path, plan="small")
    async with limited(tmp_path, {"requests_per_minute": 1, "burst": 1}) as (headrace, key):
        for each in (key, other):
            assert [(await ask(headrace.port, ask_json(each))).status for _ in range(2)] == [200, 429]


async def test_a_plan_has_a_total(tmp_path: Path) -> None:
    other = await make_key(tmp_path, plan="small")
    async with limited(tmp_path, {"total_requests_per_minute": 2}) as (headrace, key):
        statuses = [(await ask(headrace.port, ask_json(each))).status for each in (key, other, key, other)]
        assert statuses == [200, 200, 429, 429]
        assert await decided(headrace, "plan") == {"allowed": 2, "refused": 2, "observed": 0}


async def test_a_model_has_a_rate(tmp_path: Path) -> None:
    """For all of its callers together, in open mode as well."""
    models = {"m": {"upstreams": ["up"], "requests_per_minute": 2}, "free": {"upstreams": ["up"]}}
    for auth in ({"mode": "open"}, auth_section(tmp_path)):
        async with limited(tmp_path, {}, auth=auth, models=models) as (headrace, key):
            answers = [await ask(headrace.port, ask_json(key)) for _ in range(3)]
            assert [each.status for each in answers] == [200, 200, 429], auth
            assert code(answers[2]) == "rate_limit_exceeded"
            assert (await ask(headrace.port, ask_json(key, model="free"))).status == 200
            assert await decided(headrace, "model") == {"allowed": 2, "refused": 1, "observed": 0}


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────

RATE = 600  # tokens a minute: 10 come back each second


def used_by(answer: Answer) -> int:
    """What the upstream said that it took."""
    data = answer.body
    if answer.headers["content-type"].startswith("text/event-stream"):
        data = next(line[6:] for line in data.split(b"\n") if b'"usage":{' in line)
    used = json.loads(data)["usage"]["total_tokens"]
    assert isinstance(used, int)
    return used


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "json"])
async def test_tokens_are_reserved_and_then_settled(tmp_path: Path, stream: bool) -> None:
    async with limited(tmp_path, {"tokens_per_minute": RATE}) as (headrace, key):
        began_at = time.monotonic()
        options: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
        request = chat(bearer(key), stream=stream, max_tokens=400, **options)
        answer = await ask(headrace.port, request)
        assert answer.status == 200
        prompt = -(-len(request.partition(b"\r\n\r\n")[2]) // 4)
        assert left(answer, "tokens")["limit"] == str(RATE)
        assert left(answer, "tokens")["remaining"] == str(RATE - 400 - prompt)
        await headrace.quiet()
        used, remaining = used_by(answer), (await figures(headrace, key))["tokens"]["remaining"]
        back = (time.monotonic() - began_at) * RATE / 60
        assert used < 100  # far from what was reserved
        assert RATE - used <= remaining <= min(RATE - used + back + 1, RATE)
        assert headrace.state["reservations"] == 0


async def test_without_usage_what_was_reserved_stays_spent(tmp_path: Path) -> None:
    async with scripted(plays(OK)) as upstream:
        plan = {"tokens_per_minute": RATE}
        async with limited(tmp_path, plan, url=upstream.url) as (headrace, key):
            began_at = time.monotonic()
            answer = await ask(headrace.port, ask_json(key, max_tokens=400))
            reserved = RATE - int(left(answer, "tokens")["remaining"])
            remaining = (await figures(headrace, key))["tokens"]["remaining"]
            back = (time.monotonic() - began_at) * RATE / 60
            assert reserved > 400
            assert RATE - reserved <= remaining <= RATE - reserved + back + 1


async def test_tokens_come_back_when_nothing_was_sent(tmp_path: Path) -> None:
    async with scripted(plays(OK)) as gone:
        pass
    plan = {"tokens_per_minute": RATE}
    async with limited(tmp_path, plan, url=gone.url) as (headrace, key):
        for _ in range(3):  # each of them would take two thirds of it
            answer = await ask(headrace.port, ask_json(key, max_tokens=400))
            assert (answer.status, code(answer)) == (502, "upstream_unreachable")
        assert (await figures(headrace, key))["tokens"]["remaining"] == RATE


async def test_too_many_tokens(tmp_path: Path) -> None:
    async with scripted(plays(OK)) as upstream:
        plan = {"tokens_per_minute": RATE}
        async with limited(tmp_path, plan, url=upstream.url) as (headrace, key):
            # More than a bucket holds is cut to it: refused for ever it would never be served.
            assert (await ask(headrace.port, ask_json(key, max_tokens=RATE * 10))).status == 200
            answer = await ask(headrace.port, ask_json(key, max_tokens=400))
            assert (answer.status, code(answer)) == (429, "tokens_limit_exceeded")
            assert 20 <= int(answer.headers["retry-after"]) <= 60
            assert left(answer, "tokens")["limit"] == str(RATE)
            assert len(upstream.calls) == 1
            assert await decided(headrace, "tokens") == {"allowed": 1, "refused": 1, "observed": 0}


# ── slots ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_caller_without_a_slot_is_refused_at_once(tmp_path: Path) -> None:
    key, gate = await make_key(tmp_path, plan="small"), Gate()
    plans = {"small": {"max_in_flight": 1}}
    async with (
        lab(plays(gate, OK), PLAIN[0], auth=auth_section(tmp_path), plans=plans) as it,
        await Caller.connect(it.port) as caller,
        asyncio.timeout(20),
    ):
        await caller.send(ask_json(key))
        await it.called()
        in_flight = (await figures(it.headrace, key))["in_flight"]
        assert in_flight == {"limit": 1, "remaining": 0}
        answer = await ask(it.port, ask_json(key))  # the first one is still held: this did not wait for it
        assert (answer.status, code(answer)) == (429, "too_many_in_flight")
        assert answer.headers["retry-after"] == "1"
        assert int(answer.headers["retry-after-ms"]) == 1000
        assert len(it.upstream.calls) == 1
        gate.open()
        assert (await caller.rest(await caller.head())).status == 200
        await it.headrace.quiet()
        assert (await ask(it.port, ask_json(key))).status == 200
        assert (await figures(it.headrace, key))["in_flight"] == {"limit": 1, "remaining": 1}


async def test_a_caller_that_leaves_gives_its_slot_back(tmp_path: Path) -> None:
    key, gate = await make_key(tmp_path, plan="small"), Gate()
    plans = {"small": {"max_in_flight": 1}}
    async with lab(plays(gate, OK), PLAIN[0], auth=auth_section(tmp_path), plans=plans) as it:
        caller = await Caller.connect(it.port)
        await caller.send(ask_json(key))
        call = await it.called()
        caller.reset()
        await it.headrace.quiet()
        assert (await figures(it.headrace, key))["in_flight"]["remaining"] == 1
        gate.open()
        call.close()
        assert (await ask(it.port, ask_json(key))).status == 200


# ── figures, modes, changes ─────────────────────────────────────────────────────────────────────────────


async def test_asking_what_is_left_costs_nothing(tmp_path: Path) -> None:
    plan = {
        "requests_per_minute": 6,
        "burst": 3,
        "tokens_per_minute": RATE,
        "max_in_flight": 4,
        "priority": 7,
    }
    async with limited(tmp_path, plan) as (headrace, key):
        fresh = {
            "object": "limits",
            "plan": "small",
            "priority": 7,
            "requests": {"per_minute": 6, "limit": 3, "remaining": 3, "reset_seconds": 0.0},
            "tokens": {"per_minute": RATE, "limit": RATE, "remaining": RATE, "reset_seconds": 0.0},
            "in_flight": {"limit": 4, "remaining": 4},
        }
        for _ in range(10):
            assert await figures(headrace, key) == fresh
        assert (await ask(headrace.port, ask_json(key))).status == 200
        spent = (await figures(headrace, key))["requests"]
        assert (spent["limit"], spent["remaining"]) == (3, 2)
        assert 0 < spent["reset_seconds"] <= 10


async def test_a_plan_without_limits_has_no_figures(tmp_path: Path) -> None:
    async with limited(tmp_path, {}) as (headrace, key):
        answer = await ask(headrace.port, ask_json(key))
        assert answer.status == 200
        assert not left(answer)
        assert not left(answer, "tokens")
        document = await figures(headrace, key)
        assert [document[unit] for unit in ("requests", "tokens", "in_flight")] == [None, None, None]


async def test_observing_refuses_nobody_and_counts(tmp_path: Path) -> None:
    plan = {"requests_per_minute": 1, "burst": 1, "tokens_per_minute": 10, "total_requests_per_minute": 2}
    limits = {"mode": "observe", "per_ip": {"requests_per_minute": 1, "burst": 1}}
    async with limited(tmp_path, plan, limits=limits) as (headrace, key):
        for _ in range(5):
            assert (await ask(headrace.port, ask_json(key))).status == 200
        assert await decided(headrace, "key") == {"allowed": 1, "refused": 0, "observed": 4}
        assert (await decided(headrace, "plan"))["refused"] == 0
        tokens = await decided(headrace, "tokens")
        assert tokens["refused"] == 0
        assert tokens["observed"] >= 3
        for _ in range(3):
            assert (await ask(headrace.port, chat())).status == 401
        assert await decided(headrace, "ip") == {"allowed": 1, "refused": 0, "observed": 2}


async def test_observing_slots(tmp_path: Path) -> None:
    key, gate = await make_key(tmp_path, plan="small"), Gate()
    plans = {"small": {"max_in_flight": 1}}
    sections = {"auth": auth_section(tmp_path), "plans": plans, "limits": {"mode": "observe"}}
    async with lab(plays(gate, OK), PLAIN[0], **sections) as it, asyncio.TaskGroup() as group:
        asking = [group.create_task(ask(it.port, ask_json(key))) for _ in range(3)]
        await it.called(3)
        gate.open()
        assert [(await each).status for each in asking] == [200, 200, 200]
        assert await decided(it.headrace, "in_flight") == {"allowed": 1, "refused": 0, "observed": 2}


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_reload_changes_a_plan(tmp_path: Path, workers: int) -> None:
    key = await make_key(tmp_path, plan="small")

    def settings(burst: int, mode: str = "enforce") -> dict[str, Any]:
        plans = {"small": {"requests_per_minute": 1, "burst": burst}}
        base = settings_for("mock:", auth=auth_section(tmp_path), plans=plans, limits={"mode": mode})
        return {**base, "workers": workers}

    async with fleet(tmp_path, settings(2)) as running_fleet, asyncio.timeout(40):
        await running_fleet.settle(workers)

        async def statuses(count: int) -> list[int]:
            return [(await ask(running_fleet.port, ask_json(key))).status for _ in range(count)]

        assert await statuses(4) == [200, 200, 429, 429]
        for changed, wanted in ((settings(5), [200] * 3 + [429] * 2), (settings(5, "observe"), [200] * 6)):
            write(running_fleet.file, changed)
            assert (await running_fleet.admin("POST", "/admin/reload")).status == 200
            assert await statuses(len(wanted)) == wanted


# ── overshoot ───────────────────────────────────────────────────────────────────────────────────────────


async def press(port: int, key: str, until_at: float, statuses: list[int]) -> None:
    async with await Caller.connect(port) as caller:
        while time.monotonic() < until_at:
            statuses.append((await caller.ask(ask_json(key))).status)


@pytest.mark.parametrize("seconds", [4, pytest.param(10, marks=pytest.mark.slow)])
async def test_two_workers_allow_no_more_than_one_would(tmp_path: Path, seconds: int) -> None:
    key, statuses = await make_key(tmp_path, plan="small"), list[int]()
    plans = {"small": {"requests_per_minute": 100, "burst": 20}}
    settings = {**settings_for("mock:", auth=auth_section(tmp_path), plans=plans), "workers": 2}
    async with fleet(tmp_path, settings) as running_fleet, asyncio.timeout(60):
        await running_fleet.settle()
        began_at = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(press(running_fleet.port, key, began_at + seconds, statuses))
        took_s = time.monotonic() - began_at
    allowed, most = statuses.count(200), 20 + int(took_s * 100 / 60)
    print(f"\n{len(statuses)} asked in {took_s:.2f} s, {allowed} allowed of at most {most}")
    assert set(statuses) == {200, 429}
    assert allowed <= most
    assert allowed >= (20 + most) // 2  # nor far fewer: what comes back is used
