"""Which upstream a request goes to: by name and pattern, weight and tier, what is full, what to fall back to;
and with which of its credentials."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from proxy.breaker import State
from tests.kit.callers import Caller, ask, chat, post
from tests.kit.headrace import until
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.lab import Gate, Way, both, plays, response
from tests.kit.pool import (
    REFUSES,
    Pool,
    hangs_up,
    in_order,
    in_turn,
    pool,
    refuses_with,
    says,
    streams,
)
from tests.kit.uploads import form, head
from tests.kit.upstreams import Call, Script

pytestmark = pytest.mark.timeout(30)

POST = chat(stream=False)
TRIPS = {"breaker": {"failures": 1, "cool_down": 60.0}}


def asks(model: str) -> bytes:
    return chat(stream=False, model=model)


def model_in(call: Call) -> str:
    """What the upstream was asked for."""
    name: str = json.loads(call.body)["model"]
    return name


def everybody(names: str) -> list[Script]:
    """Upstreams that say who they are."""
    return [plays(says(name)) for name in names]


# ── by name ─────────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize(
    ("model", "upstream", "label"),
    [
        ("gpt-4.1", "a", "gpt-4.1"),
        ("gpt-4.1-mini", "b", "gpt-4.1*"),
        ("gpt-5", "c", "gpt-?"),
        ("gpt-55", "d", "gpt-*"),
    ],
)
async def test_by_name(way: Way, model: str, upstream: str, label: str) -> None:
    """The exact name, else the first pattern in the order of the file; the label is what is configured."""
    models = {
        "gpt-4.1*": {"upstreams": ["b"]},
        "gpt-?": {"upstreams": ["c"]},
        "gpt-*": {"upstreams": ["d"]},
        "gpt-4.1": {"upstreams": ["a"]},
    }
    async with pool(*everybody("abcd"), way=way, models=models) as it:
        assert (await ask(it.port, asks(model))).json() == {"from": upstream}
        line = await it.ended("complete", 1)
        assert line["model"] == label
        assert it.hits == {upstream: 1}
        assert it.calls(upstream)[0].body == asks(model).partition(b"\r\n\r\n")[2]


@both
async def test_no_such_model(way: Way) -> None:
    async with pool(*everybody("a"), way=way) as it:
        answer = await ask(it.port, asks("nobody"))
        assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")
        line = await it.ended("rejected", 0)
        assert line["model"] == "other"
        assert it.hits == {}


@both
async def test_a_mapped_name(way: Way) -> None:
    """Each upstream has its own; every other value stays as it was written."""
    targets = [{"name": "a", "model": "real-a"}, {"name": "b", "tier": 2, "model": "real-b"}]
    body = b'{"temperature":0.10,"model":"m","messages":[{"role":"user","content":"\\u00e9 m"}]}'
    models = {"m": {"upstreams": targets}}
    async with pool(refuses_with(503), plays(says("b")), way=way, models=models) as it:
        assert (await ask(it.port, post("/v1/chat/completions", body))).status == 200
        for name in "ab":
            assert it.calls(name)[0].body == body.replace(b':"m"', b':"real-%b"' % name.encode())
        line = await it.ended("complete", 2)
        assert line["model"] == "m"


@both
@pytest.mark.parametrize("default", ["", "b"])
async def test_without_a_model(way: Way, default: str) -> None:
    """`default_upstream`, or the first."""
    sections = {"default_upstream": default} if default else {}
    async with pool(*everybody("ab"), way=way, **sections) as it:
        answer = await ask(it.port, b"GET /v1/files HTTP/1.1\r\nHost: test\r\n\r\n")
        assert answer.json() == {"from": default or "a"}
        line = await it.ended("complete", 1)
        assert line["model"] == "none"


# ── weights, tiers, places ──────────────────────────────────────────────────────────────────────────────


@both
async def test_weights(way: Way) -> None:
    """One at a time, 3 to 1: of 200 requests 150, give or take five standard deviations."""
    models = {"m": {"upstreams": [{"name": "a", "weight": 3}, {"name": "b"}]}}
    async with pool(*everybody("ab"), way=way, models=models) as it, await Caller.connect(it.port) as caller:
        for _ in range(200):
            assert (await caller.ask(POST)).status == 200
        await it.settled(200)
        assert 150 - 31 <= it.hits["a"] <= 150 + 31


@both
async def test_who_is_busy_gets_less(way: Way) -> None:
    """Twelve at once over three equals: nobody is left out, nobody gets more than half."""
    gate = Gate()
    models = {"m": {"upstreams": ["a", "b", "c"]}}
    scripts = [plays(gate, says(name)) for name in "abc"]
    async with pool(*scripts, way=way, models=models) as it:
        asking = [asyncio.ensure_future(ask(it.port, POST)) for _ in range(12)]
        await until(lambda: sum(it.hits.values()) == 12)
        gate.open()
        await asyncio.gather(*asking)
        await it.settled(12)
        assert set(it.hits) == {"a", "b", "c"}
        assert max(it.hits.values()) <= 6


@both
async def test_tiers(way: Way) -> None:
    """The second tier while nobody of the first is available, and not a request longer."""
    a = in_turn(refuses_with(503), plays(says("a")))
    settings = {"a": {"breaker": {"failures": 1, "cool_down": 0.2}}}
    async with pool(a, plays(says("b")), way=way, each=settings) as it:
        for _ in range(4):
            assert (await ask(it.port, POST)).json() == {"from": "b"}
        assert it.hits == {"a": 1, "b": 4}
        await until(lambda: it.core.upstreams["a"].available(asyncio.get_running_loop().time()))
        for _ in range(3):
            assert (await ask(it.port, POST)).json() == {"from": "a"}
        await it.settled(7)
        assert it.hits == {"a": 4, "b": 4}


@both
async def test_full(way: Way) -> None:
    """Another one at once; all are full: in line, and on with the first place that comes free."""
    gates = {"a": Gate(), "b": Gate()}
    scripts = [plays(gates[name], says(name)) for name in "ab"]
    async with pool(*scripts, way=way, upstream={"max_in_flight": 1}) as it:
        first = asyncio.ensure_future(ask(it.port, POST))
        await it.called("a")
        second = asyncio.ensure_future(ask(it.port, POST))
        await it.called("b")
        assert await it.level("upstream_available", "a") == 0
        assert await it.level("breaker_state", "a") == State.CLOSED
        third = asyncio.ensure_future(ask(it.port, POST))
        await until(lambda: it.headrace.state["queued"] == 1)
        gates["b"].open()
        assert (await second).json() == {"from": "b"}
        assert (await third).json() == {"from": "b"}
        gates["a"].open()
        assert (await first).json() == {"from": "a"}
        await it.settled(3)
        assert it.hits == {"a": 1, "b": 2}


@both
async def test_a_failover_waits_for_no_place(way: Way) -> None:
    """The other one is full: what is left is the same one, after a back-off."""
    gate = Gate()
    models = {"m": {"upstreams": in_order("ab")}, "other": {"upstreams": ["b"]}}
    scripts = in_turn(refuses_with(503), plays(says("a"))), plays(gate, says("b"))
    async with pool(*scripts, way=way, models=models, each={"b": {"max_in_flight": 1}}) as it:
        holding = asyncio.ensure_future(ask(it.port, asks("other")))
        await it.called("b")
        assert (await ask(it.port, POST)).json() == {"from": "a"}
        assert it.hits == {"a": 2, "b": 1}
        gate.open()
        assert (await holding).status == 200
        await it.settled(2)


@both
async def test_a_failover_gives_its_place_back(way: Way) -> None:
    """Who has gone on to the next one stands in nobody's way at the first."""
    gate = Gate()
    a = in_turn(refuses_with(503), plays(says("a")))
    async with pool(a, plays(gate, says("b")), way=way, upstream={"max_in_flight": 1}) as it:
        first = asyncio.ensure_future(ask(it.port, POST))
        await it.called("b")
        assert (await ask(it.port, POST)).json() == {"from": "a"}
        gate.open()
        assert (await first).json() == {"from": "b"}
        await it.settled(2)


# ── to another model ────────────────────────────────────────────────────────────────────────────────────


def falls_back(**more: Any) -> dict[str, Any]:
    """`m` at a, then `other` at b."""
    return {"m": {"upstreams": ["a"], "fallback": ["other"]}, "other": {"upstreams": ["b"], **more}}


@both
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("first", [refuses_with(503), REFUSES], ids=["503", "refused"])
async def test_fallback(way: Way, stream: bool, first: Any) -> None:
    """Another model under its own name: for the upstream, the caller, the log and the metric."""
    script = plays(streams("b") if stream else says("b"))
    async with pool(first, script, way=way, models=falls_back()) as it:
        answer = await ask(it.port, chat(stream=stream))
        assert answer.status == 200
        assert answer.headers["x-headrace-model"] == "other"
        assert answer.headers["x-headrace-upstream"] == "b"
        assert model_in(it.calls("b")[0]) == "other"
        line = await it.ended("complete", 2)
        assert (line["model"], line["upstream"]) == ("other", "b")
        (counted,) = await it.samples("requests_total")
        assert 'model="other"' in counted


@both
async def test_no_fallback_is_needed(way: Way) -> None:
    async with pool(*everybody("ab"), way=way, models=falls_back()) as it:
        answer = await ask(it.port, POST)
        assert answer.json() == {"from": "a"}
        assert "x-headrace-model" not in answer.headers
        await it.ended("complete", 1)


@both
async def test_fallback_at_once(way: Way) -> None:
    """Where nobody of the first model is available no attempt is spent on it."""
    async with pool(refuses_with(500), plays(says("b")), way=way, models=falls_back(), upstream=TRIPS) as it:
        assert (await ask(it.port, POST)).status == 500
        answer = await ask(it.port, POST)
        assert answer.json() == {"from": "b"}
        assert answer.headers["x-headrace-attempts"] == "1"
        await it.ended("complete", 1, count=2)


@both
async def test_fallback_by_pattern_and_mapped(way: Way) -> None:
    """Its label is the pattern; its name is what was written, or what its upstream calls it."""
    models = {
        "m": {"upstreams": ["a"], "fallback": ["gpt-x", "big"]},
        "gpt-*": {"upstreams": ["b"]},
        "big": {"upstreams": [{"name": "c", "model": "very-big"}]},
    }
    async with pool(refuses_with(503), refuses_with(503), plays(says("c")), way=way, models=models) as it:
        answer = await ask(it.port, POST)
        assert answer.headers["x-headrace-model"] == "big"
        assert [model_in(it.calls(name)[0]) for name in "abc"] == ["m", "gpt-x", "very-big"]
        line = await it.ended("complete", 3)
        assert line["model"] == "big"


@both
async def test_the_last_answer_is_the_fallbacks(way: Way) -> None:
    """Its refusal passes under its own name as well."""
    async with pool(
        refuses_with(503), refuses_with(429), way=way, models=falls_back(), retry={"attempts": 2}
    ) as it:
        answer = await ask(it.port, POST)
        assert (answer.status, answer.headers["x-headrace-model"]) == (429, "other")
        line = await it.ended("complete", 2)
        assert line["model"] == "other"


@both
@pytest.mark.parametrize("allowed", [("m",), ("m", "other")])
async def test_fallback_of_a_caller_with_a_list(way: Way, allowed: tuple[str, ...], tmp_path: Path) -> None:
    """A key that may not use the other model is not led to it."""
    key = await make_key(tmp_path, models=allowed)
    sections = {"auth": auth_section(tmp_path), "models": falls_back(), "retry": {"attempts": 2}}
    async with pool(refuses_with(503), plays(says("b")), way=way, **sections) as it:
        answer = await ask(it.port, chat(bearer(key), stream=False))
        if "other" in allowed:
            assert answer.json() == {"from": "b"}
            assert it.hits == {"a": 1, "b": 1}
        else:
            assert answer.status == 503
            assert it.hits == {"a": 2}
        await it.settled()


@both
async def test_in_a_circle(way: Way) -> None:
    """Each model once around, then again with back-off, until the attempts are used."""
    models = {
        "m": {"upstreams": ["a"], "fallback": ["n"]},
        "n": {"upstreams": ["b"], "fallback": ["o"]},
        "o": {"upstreams": ["c"], "fallback": ["m", "n"]},
    }
    async with pool(*[refuses_with(503)] * 3, way=way, models=models, retry={"attempts": 5}) as it:
        assert (await ask(it.port, POST)).status == 503
        await it.ended("upstream_error", 5)
        assert [len(it.calls(name)) for name in "abc"][2] >= 1
        assert max(it.hits.values()) == 2


# ── uploads ─────────────────────────────────────────────────────────────────────────────────────────────


def upload(size: int = 200_000) -> bytes:
    body = form(size)
    return head(len(body), path="/v1/audio/transcriptions") + body


@both
async def test_an_upload_that_reached_nobody(way: Way) -> None:
    """Goes to the next one, whole, under its name for the model."""
    models = {"m": {"upstreams": [{"name": "a"}, {"name": "b", "tier": 2, "model": "real"}]}}
    async with pool(REFUSES, plays(says("b")), way=way, models=models) as it:
        assert (await ask(it.port, upload())).json() == {"from": "b"}
        assert it.calls("b")[0].body == form(200_000, model="real")
        await it.ended("complete", 2)


@both
@pytest.mark.parametrize("first", [refuses_with(503), hangs_up], ids=["503", "fin"])
async def test_an_upload_that_has_begun(way: Way, first: Script) -> None:
    """Never goes anywhere a second time."""
    async with pool(first, plays(says("b")), way=way) as it:
        answer = await ask(it.port, upload())
        assert answer.status in (502, 503)
        await it.ended("upstream_error", 1)
        assert it.hits == {"a": 1}


# ── several credentials ─────────────────────────────────────────────────────────────────────────────────

KEYS = {"api_key": None, "api_keys": ["canary-one", "canary-two"]}


def key_of(call: Call) -> str:
    (line,) = [line for line in call.head.split(b"\r\n") if line.lower().startswith(b"authorization:")]
    return line.partition(b"Bearer ")[2].decode()


def used(it: Pool, name: str = "a") -> list[str]:
    """The keys of the calls so far."""
    return [key_of(call).removeprefix("canary-") for call in it.calls(name)]


def refuses_key(key: str, status: int, *fields: str) -> Script:
    """One credential is bad; the answer quotes it, as OpenAI's does."""

    async def script(call: Call) -> None:
        if key_of(call) == f"canary-{key}":
            await call.send(response(status, b'{"error":{"message":"canary-%b"}}' % key.encode(), *fields))
        else:
            await call.send(says("a"))

    return script


@both
async def test_in_turn(way: Way) -> None:
    async with pool(*everybody("a"), way=way, upstream=KEYS) as it:
        for _ in range(4):
            await ask(it.port, POST)
        await it.settled(4)
        assert used(it) == ["one", "two", "one", "two"]


@both
async def test_a_bad_key_rests(way: Way) -> None:
    """The request goes on with the other, and so do all after it; nobody reads the bad one's answer."""
    async with pool(refuses_key("one", 401), way=way, upstream=KEYS, retry={"base": 8.0}) as it:
        raw = b""
        for _ in range(3):
            answer = await ask(it.port, POST)
            assert answer.json() == {"from": "a"}
            raw += answer.body + str(answer.headers).encode()
        await it.settled(3)
        assert used(it) == ["one", "two", "two", "two"]
        assert await it.attempts() == {"a": {"status": 1, "ok": 3}}
        assert b"canary" not in raw + b"".join(it.headrace.sink.lines)
        assert await it.level("breaker_state", "a") == State.CLOSED


@both
async def test_the_only_key_is_bad(way: Way) -> None:
    """An error of ours, without a word of its answer."""
    settings = {"api_key": "canary-one"}
    async with pool(refuses_key("one", 401), way=way, upstream=settings) as it:
        answer = await ask(it.port, POST)
        assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_auth")
        assert b"canary" not in answer.body
        await it.ended("upstream_error", 1)
        assert it.hits == {"a": 1}
        assert await it.attempts() == {"a": {"status": 1}}


@both
async def test_a_tired_key_rests(way: Way) -> None:
    """429: its Retry-After is the key's, and the other key needs not wait for it."""
    script = refuses_key("one", 429, "Retry-After: 60")
    async with pool(script, way=way, upstream=KEYS, retry={"base": 8.0}) as it:
        for _ in range(3):
            assert (await ask(it.port, POST)).json() == {"from": "a"}
        await it.settled(3)
        assert used(it) == ["one", "two", "two", "two"]


@both
async def test_all_keys_rest(way: Way) -> None:
    """The one whose rest ends first is used; its answer passes."""
    one = refuses_key("one", 429, "Retry-After: 90")
    two = refuses_key("two", 429, "Retry-After: 40")

    async def both_tired(call: Call) -> None:
        await (one if key_of(call) == "canary-one" else two)(call)

    async with pool(both_tired, way=way, upstream=KEYS) as it:
        answer = await ask(it.port, POST)
        assert (answer.status, answer.headers["retry-after"]) == (429, "40")
        await ask(it.port, POST)
        await ask(it.port, POST)
        await it.settled(3)
        assert used(it) == ["one", "two", "two", "two"]
        assert Counter(used(it))["one"] == 1


@both
async def test_another_upstream_before_another_key(way: Way) -> None:
    """Whoever was not asked yet comes first, whatever keys there are."""
    async with pool(refuses_key("one", 401), plays(says("b")), way=way, each={"a": KEYS}) as it:
        assert (await ask(it.port, POST)).json() == {"from": "b"}
        await it.ended("complete", 2)
