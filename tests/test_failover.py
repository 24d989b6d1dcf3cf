"""A request that fails at one upstream goes on at another, as long as its caller has seen nothing: who is
asked again, who is not, after how long, and what the caller and the operator are told."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.kit.callers import Answer, Caller, ask, chat, post
from tests.kit.headrace import until
from tests.kit.lab import Gate, Way, both, last_event, plays, response
from tests.kit.pool import (
    BLACKHOLE,
    REFUSES,
    UNKNOWN_NAME,
    UNTRUSTED,
    Place,
    Pool,
    hangs_up,
    in_order,
    in_turn,
    pool,
    refuses_with,
    resets,
    says,
    silent,
    streams,
)
from tests.kit.upstreams import DONE, END, HEAD, Call, Script, chunk, event

pytestmark = pytest.mark.timeout(30)

#: Where no wait is meant, a test waits no longer than this for an answer.
AT_ONCE_S = 1.0
WIRE = Way(push=True)
NO_BREAKER = {"breaker": {"failures": 1000}}


def get(model: str | None = "m") -> bytes:
    """A safe method. Its body names the model: routes without one have a single upstream."""
    body = b"" if model is None else b'{"model":"%b"}' % model.encode()
    head = f"GET /v1/files HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


METHODS = {"post": chat(stream=False), "stream": chat(), "get": get()}
methods = pytest.mark.parametrize("request_", METHODS.values(), ids=METHODS)
places = pytest.mark.parametrize(
    "place",
    [REFUSES, BLACKHOLE, UNKNOWN_NAME, UNTRUSTED],
    ids=["refused", "blackhole", "no name", "wrong certificate"],
)
RETRIED = (429, 502, 503, 504, 529)


def told(answer: Answer, upstream: str, attempts: int) -> None:
    """What the caller reads about it."""
    assert answer.headers["x-headrace-upstream"] == upstream
    assert answer.headers["x-headrace-attempts"] == str(attempts)


async def timed(it: Pool, request: bytes) -> tuple[Answer, float]:
    began_at = time.monotonic()
    answer = await ask(it.port, request)
    return answer, time.monotonic() - began_at


def code(answer: Answer) -> Any:
    return answer.json()["error"]["code"]


# ── no connection ───────────────────────────────────────────────────────────────────────────────────────


@both
@places
@methods
async def test_no_connection(way: Way, place: Place, request_: bytes) -> None:
    """Nothing was sent, so the next one is asked at once, whatever the method."""
    script = plays(streams("b") if request_ is METHODS["stream"] else says("b"))
    async with pool(place, script, way=way, retry={"base": 8.0}) as it:
        answer, took_s = await timed(it, request_)
        assert answer.status == 200
        assert answer.clean
        assert b"b" in answer.body
        assert took_s < 0.2 + AT_ONCE_S
        told(answer, "b", 2)
        line = await it.ended("complete", 2)
        assert (line["upstream"], line["status"], line["model"]) == ("b", 200, "m")
        assert it.hits == {"b": 1}
        assert await it.attempts() == {"a": {"connect_error": 1}, "b": {"ok": 1}}


@both
@places
async def test_none_left(way: Way, place: Place) -> None:
    async with pool(place, REFUSES, way=way, retry={"attempts": 2}) as it:
        answer = await ask(it.port, METHODS["post"])
        assert (answer.status, code(answer)) == (502, "upstream_unreachable")
        told(answer, "b", 2)
        assert "x-should-retry" not in answer.headers
        line = await it.ended("upstream_error", 2)
        assert line["error"] == "upstream_unreachable"
        assert await it.attempts() == {"a": {"connect_error": 1}, "b": {"connect_error": 1}}


@both
async def test_the_same_one_after_a_back_off(way: Way) -> None:
    """A single upstream that cannot be reached is asked `attempts` times."""
    async with pool(REFUSES, way=way, retry={"attempts": 4}) as it:
        answer = await ask(it.port, METHODS["post"])
        assert (answer.status, code(answer)) == (502, "upstream_unreachable")
        await it.ended("upstream_error", 4)
        assert await it.attempts() == {"a": {"connect_error": 4}}


@both
async def test_connect_failures_are_free(way: Way) -> None:
    """They have hit nobody: a budget of nothing allows them."""
    async with pool(REFUSES, REFUSES, plays(says("c")), way=way, retry={"budget": 0}) as it:
        answer = await ask(it.port, METHODS["post"])
        assert answer.json() == {"from": "c"}
        await it.ended("complete", 3)


# ── answers that are tried again ────────────────────────────────────────────────────────────────────────


@both
@methods
@pytest.mark.parametrize("status", RETRIED)
async def test_elsewhere_at_once(way: Way, request_: bytes, status: int) -> None:
    script = plays(streams("b") if request_ is METHODS["stream"] else says("b"))
    async with pool(refuses_with(status), script, way=way, retry={"base": 8.0}) as it:
        answer, took_s = await timed(it, request_)
        assert answer.status == 200
        assert took_s < AT_ONCE_S
        told(answer, "b", 2)
        await it.ended("complete", 2)
        assert it.hits == {"a": 1, "b": 1}
        assert await it.attempts() == {"a": {"status": 1}, "b": {"ok": 1}}


@both
@pytest.mark.parametrize("status", RETRIED)
async def test_the_same_one_again(way: Way, status: int) -> None:
    """With nobody else to ask."""
    script = in_turn(refuses_with(status), plays(says("a")))
    async with pool(script, way=way) as it:
        answer = await ask(it.port, METHODS["post"])
        assert answer.json() == {"from": "a"}
        told(answer, "a", 2)
        await it.ended("complete", 2)
        assert it.hits == {"a": 2}
        assert await it.attempts() == {"a": {"status": 1, "ok": 1}}


@both
@pytest.mark.parametrize("status", [400, 404, 408, 422, 500, 501])
async def test_not_in_the_list(way: Way, status: int) -> None:
    """Passed at once, whoever else there is."""
    async with pool(refuses_with(status), plays(says("b")), way=way) as it:
        answer = await ask(it.port, METHODS["post"])
        assert answer.status == status
        assert answer.body == b'{"error":{"message":"no"}}'
        told(answer, "a", 1)
        assert "x-should-retry" not in answer.headers
        await it.ended("upstream_error" if status >= 500 else "complete", 1)
        assert it.hits == {"a": 1}


@both
@pytest.mark.parametrize("status", RETRIED)
async def test_the_last_answer_passes_as_it_is(way: Way, status: int) -> None:
    last = response(status, b'{"mine": "of b"}', "X-Of-Mine: 1", "x-request-id: up-7")
    async with pool(refuses_with(status), plays(last), way=way, retry={"attempts": 2}) as it:
        answer = await ask(it.port, METHODS["post"])
        assert (answer.status, answer.body) == (status, b'{"mine": "of b"}')
        assert answer.headers["x-of-mine"] == "1"
        assert answer.headers["x-upstream-request-id"] == "up-7"
        told(answer, "b", 2)
        assert answer.headers.get("x-should-retry") == ("false" if status >= 500 else None)
        await it.ended("upstream_error" if status >= 500 else "complete", 2)
        assert await it.attempts() == {"a": {"status": 1}, "b": {"status": 1}}


@both
async def test_told_not_to_ask_again(way: Way) -> None:
    """An upstream that says so is not asked again; an SDK is told so too."""
    final = refuses_with(503, "x-should-retry: false")
    async with pool(final, way=way) as it:
        answer = await ask(it.port, METHODS["post"])
        assert (answer.status, answer.headers["x-should-retry"]) == (503, "false")
        await it.ended("upstream_error", 1)
        assert it.hits == {"a": 1}


@both
@pytest.mark.parametrize("second", ["own 502", "own 504", "429"])
async def test_two_that_ended_in_5xx(way: Way, second: str) -> None:
    """Whoever answers in the end: an SDK need not go on for us. A 429 is worth another try."""
    third: Script | Place = {"own 502": REFUSES, "own 504": silent, "429": refuses_with(429)}[second]
    each = {"c": {"timeouts": {"first_byte": 0.1}}} if second == "own 504" else {}
    async with pool(refuses_with(503), refuses_with(502), third, way=way, each=each) as it:
        answer = await ask(it.port, METHODS["post"])
        assert answer.status == {"own 502": 502, "own 504": 504, "429": 429}[second]
        assert answer.headers.get("x-should-retry") == (None if second == "429" else "false")
        told(answer, "c", 3)
        await it.settled()


# ── how long ────────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("field", ["Retry-After: 0.3", "retry-after-ms: 300"])
async def test_retry_after_is_waited_for(way: Way, field: str) -> None:
    script = in_turn(refuses_with(429, field), plays(says("a")))
    async with pool(script, way=way) as it:
        answer, took_s = await timed(it, METHODS["post"])
        assert answer.status == 200
        assert took_s >= 0.3
        await it.ended("complete", 2)


@both
async def test_another_one_meanwhile(way: Way) -> None:
    """One that asked for time gets it, whoever has time is asked at once."""
    scripts = in_turn(refuses_with(503, "Retry-After: 5"), plays(says("a"))), plays(says("b"))
    async with pool(*scripts, way=way) as it:
        answer, took_s = await timed(it, METHODS["post"])
        assert answer.json() == {"from": "b"}
        assert took_s < AT_ONCE_S
        await it.ended("complete", 2)


@both
@pytest.mark.parametrize("others", [0, 1])
async def test_a_retry_after_beyond_max(way: Way, others: int) -> None:
    """Is for the caller to wait for, at once."""
    script = refuses_with(429, "Retry-After: 9")
    async with pool(*[script] * (1 + others), way=way, retry={"attempts": 5}) as it:
        answer, took_s = await timed(it, METHODS["post"])
        assert (answer.status, answer.headers["retry-after"]) == (429, "9")
        assert took_s < AT_ONCE_S
        await it.ended("complete", 1 + others)


@both
async def test_one_deadline_over_all(way: Way) -> None:
    """`timeouts.total` of the first upstream; a Retry-After beyond it is not waited for."""
    scripts = refuses_with(503, "Retry-After: 2"), silent
    async with pool(*scripts, way=way, each={"a": {"timeouts": {"total": 0.4}}}) as it:
        answer, took_s = await timed(it, METHODS["post"])
        assert (answer.status, code(answer)) == (504, "upstream_timeout")
        assert 0.35 < took_s < 0.4 + AT_ONCE_S
        await it.ended("deadline", 2)
        assert it.hits == {"a": 1, "b": 1}
        assert await it.attempts() == {"a": {"status": 1}, "b": {"timeout": 1}}


@both
async def test_no_attempt_begins_after_the_deadline(way: Way) -> None:
    """Whoever could still be asked: the time of a request is over in the middle of a connect."""
    timeouts = {"timeouts": {"connect": 0.5, "total": 0.25}}
    async with pool(BLACKHOLE, plays(says("b")), way=way, each={"a": timeouts}) as it:
        answer, took_s = await timed(it, METHODS["post"])
        assert (answer.status, code(answer)) == (504, "upstream_timeout")
        assert took_s < 0.25 + AT_ONCE_S
        await it.ended("deadline", 1)
        assert it.hits == {}


@both
async def test_an_answer_that_comes_to_its_end_after_the_deadline(way: Way) -> None:
    """A refusal whose body takes as long as there is time: nobody else is asked after it."""
    gate = Gate()
    slow = plays(b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\n{", gate)
    each = {"a": {"timeouts": {"total": 0.3}}}
    async with pool(slow, plays(says("b")), way=way, each=each) as it:
        answer, took_s = await timed(it, get())
        gate.open()
        assert answer.status == 504
        assert took_s < 0.3 + AT_ONCE_S
        await it.ended("deadline", 1)
        assert it.hits == {"a": 1}


# ── a request that was sent ─────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("ending", [hangs_up, resets], ids=["fin", "rst"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_post_is_not_sent_twice(way: Way, ending: Script, stream: bool) -> None:
    """It died on a fresh connection: it may have been read, and may be generating."""
    async with pool(ending, plays(says("b")), way=way) as it:
        answer = await ask(it.port, chat(stream=stream))
        assert (answer.status, code(answer)) == (502, "upstream_unreachable")
        told(answer, "a", 1)
        await it.ended("upstream_error", 1)
        assert it.hits == {"a": 1}
        assert await it.attempts() == {"a": {"reset": 1}}


@both
@pytest.mark.parametrize("ending", [hangs_up, resets], ids=["fin", "rst"])
async def test_a_get_is_sent_elsewhere(way: Way, ending: Script) -> None:
    async with pool(ending, plays(says("b")), way=way) as it:
        answer = await ask(it.port, get())
        assert answer.json() == {"from": "b"}
        await it.ended("complete", 2)
        assert it.hits == {"a": 1, "b": 1}
        assert await it.attempts() == {"a": {"reset": 1}, "b": {"ok": 1}}


async def test_half_an_answer_to_a_get() -> None:
    """Nothing of it has gone to the caller. (The public way loses bytes that come together with a break, and
    then there is no answer at all.)"""
    half = plays(b'HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{"half', Call.close)
    async with pool(half, plays(says("b")), way=WIRE) as it:
        answer = await ask(it.port, get())
        assert answer.json() == {"from": "b"}
        await it.ended("complete", 2)
        assert await it.attempts() == {"a": {"reset": 1}, "b": {"ok": 1}}


@both
@pytest.mark.parametrize(
    ("request_", "hits"),
    [(chat(), 1), (chat(stream=False), 1), (get(), 2)],
    ids=["stream", "post", "get"],
)
async def test_no_first_byte_in_time(way: Way, request_: bytes, hits: int) -> None:
    timeouts = {"timeouts": {"first_byte": 0.1}}
    async with pool(silent, plays(says("b")), way=way, each={"a": timeouts}) as it:
        answer = await ask(it.port, request_)
        assert answer.status == (504 if hits == 1 else 200)
        await it.ended("upstream_stall" if hits == 1 else "complete", hits)
        assert sum(it.hits.values()) == hits
        assert (await it.attempts())["a"] == {"timeout": 1}


@both
@pytest.mark.parametrize("answer_", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 302 F\r\nLocation: /x\r\n\r\n"])
async def test_what_nobody_can_use(way: Way, answer_: bytes) -> None:
    async with pool(plays(answer_, Call.close), plays(says("b")), way=way) as it:
        answer = await ask(it.port, METHODS["post"])
        assert (answer.status, code(answer)) == (502, "upstream_invalid_response")
        await it.ended("upstream_error", 1)
        assert it.hits == {"a": 1}


# ── a kept connection that is dead ──────────────────────────────────────────────────────────────────────
# The public way cannot know that a connection was a kept one: there it is a break like any other.


@pytest.mark.parametrize("ending", [hangs_up, resets], ids=["fin", "rst"])
@pytest.mark.parametrize("request_", METHODS.values(), ids=METHODS)
async def test_stale(ending: Script, request_: bytes) -> None:
    """It ends in the very moment in which it is used again: asked once more, on a fresh one."""
    good = plays(streams("a") if request_ is METHODS["stream"] else says("a"))
    async with pool(in_turn(good, ending, good), way=WIRE, retry={"base": 8.0}) as it:
        assert (await ask(it.port, request_)).status == 200
        answer, took_s = await timed(it, request_)
        assert answer.status == 200
        assert took_s < AT_ONCE_S
        told(answer, "a", 2)
        await it.ended("complete", 2, count=2)
        up = it.upstreams["a"]
        assert (it.hits, up.connections) == ({"a": 3}, 2)  # type: ignore[union-attr]  # None would fail the test
        assert await it.attempts() == {"a": {"ok": 2, "reset": 1}}
        assert not it.core.upstreams["a"].breaker._failed_at


async def test_stale_stays_at_its_upstream() -> None:
    """Others are not troubled: nothing is wrong with it."""
    a = in_turn(plays(says("a")), hangs_up, plays(says("a")))
    async with pool(a, plays(says("b")), way=WIRE) as it:
        await ask(it.port, METHODS["post"])
        answer = await ask(it.port, METHODS["post"])
        assert answer.json() == {"from": "a"}
        assert it.hits == {"a": 3}
        await it.ended("complete", 2, count=2)


@pytest.mark.parametrize("retry", [{"stale_connection": False}, {"attempts": 1}, {"budget": 0}])
async def test_stale_is_not_allowed(retry: dict[str, Any]) -> None:
    async with pool(in_turn(plays(says("a")), hangs_up), plays(says("b")), way=WIRE, retry=retry) as it:
        await ask(it.port, METHODS["post"])
        answer = await ask(it.port, METHODS["post"])
        assert (answer.status, code(answer)) == (502, "upstream_unreachable")
        await it.ended("upstream_error", 1, count=2)
        assert it.hits == {"a": 2}


async def test_stale_only_once() -> None:
    """The fresh one breaks as well: that is no stale connection."""
    async with pool(in_turn(plays(says("a")), hangs_up), plays(says("b")), way=WIRE) as it:
        await ask(it.port, METHODS["post"])
        answer = await ask(it.port, METHODS["post"])
        assert answer.status == 502
        await it.ended("upstream_error", 2, count=2)
        assert it.hits == {"a": 3}


@pytest.mark.parametrize("part", [b"H", b"HTTP/1.1 200 OK\r\nContent-Ty"])
async def test_a_byte_is_an_answer(part: bytes) -> None:
    """Half a status line: the request was read."""
    async with pool(in_turn(plays(says("a")), plays(part, Call.close)), plays(says("b")), way=WIRE) as it:
        await ask(it.port, METHODS["post"])
        answer = await ask(it.port, METHODS["post"])
        assert answer.status == 502
        await it.ended("upstream_error", 1, count=2)
        assert it.hits == {"a": 2}


# ── the budget ──────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.alone
async def test_a_storm(way: Way) -> None:
    """Half of all answers are 503, 200 requests at once: an upstream sees at most 1.2 times as many (and
    from 50 requests on no more than that: the floor of 10 is in it)."""
    requests = 200
    count = 0

    async def half(call: Call) -> None:
        nonlocal count
        count += 1
        await call.send(says("x") if count % 2 else response(503, b"{}"))

    async with pool(half, half, way=way, upstream=NO_BREAKER) as it:
        answers = await asyncio.gather(*[ask(it.port, METHODS["post"]) for _ in range(requests)])
        assert {answer.status for answer in answers} <= {200, 503}
        await it.settled(requests)
        hits = sum(it.hits.values())
        assert requests < hits <= 1.2 * requests
        assert sum(answer.status == 200 for answer in answers) >= requests // 2


# ── after an early 200 ──────────────────────────────────────────────────────────────────────────────────

EARLY = {"commit_after": 0.05, "heartbeat": 0.05}


async def heartbeats(caller: Caller, answer: Answer, count: int = 2) -> None:
    """Reads that many."""
    for _ in range(count):
        assert await caller.piece(answer) == b": headrace\n"


@both
@pytest.mark.parametrize("fault", ["503", "connect"])
async def test_failover_after_an_early_200(way: Way, fault: str) -> None:
    """The caller sees comments, and one clean stream."""
    gate = Gate()
    first = plays(gate, response(503, b"{}"))
    scripts = (first, REFUSES, plays(streams("c"))) if fault == "connect" else (first, plays(streams("c")))
    async with pool(*scripts, way=way, streams=EARLY) as it, await Caller.connect(it.port) as caller:
        await caller.send(chat())
        answer = await caller.head()
        await heartbeats(caller, answer)
        gate.open()
        await caller.rest(answer)
        assert answer.clean
        assert answer.body.replace(b": headrace\n", b"") == event("c") + DONE
        line = await it.ended("complete", len(scripts))
        assert line["upstream"] == ("c" if fault == "connect" else "b")


@both
async def test_all_fail_after_an_early_200(way: Way) -> None:
    gate = Gate()
    scripts = plays(gate, response(503, b"{}")), refuses_with(429)
    async with (
        pool(*scripts, way=way, streams=EARLY, retry={"attempts": 2}) as it,
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(chat())
        answer = await caller.head()
        await heartbeats(caller, answer)
        gate.open()
        await caller.rest(answer)
        assert not answer.clean
        assert last_event(answer)["error"]["code"] == "upstream_error"
        await it.ended("upstream_error", 2)


@both
async def test_heartbeats_in_a_back_off(way: Way) -> None:
    gate = Gate()
    script = in_turn(plays(gate, response(503, b"{}", "Retry-After: 0.4")), plays(streams("a")))
    async with pool(script, way=way, streams=EARLY) as it, await Caller.connect(it.port) as caller:
        await caller.send(chat())
        answer = await caller.head()
        await heartbeats(caller, answer)
        gate.open()
        await heartbeats(caller, answer, 4)
        await caller.rest(answer)
        assert answer.body.endswith(event("a") + DONE)
        await it.ended("complete", 2)


@both
async def test_the_first_heartbeat_in_a_back_off(way: Way) -> None:
    """`commit_after` runs on while nobody is asked."""
    script = in_turn(refuses_with(503, "Retry-After: 0.4"), plays(streams("a")))
    async with pool(script, way=way, streams=EARLY) as it, await Caller.connect(it.port) as caller:
        await caller.send(chat())
        answer = await caller.head()
        assert answer.status == 200
        await heartbeats(caller, answer)
        await caller.rest(answer)
        assert answer.clean
        await it.ended("complete", 2)


@both
async def test_heartbeats_go_on_after_a_slow_refusal(way: Way) -> None:
    """A refusal's head came before the early 200 was due, its body after that: what comes then is a stream
    again, and its caller is kept warm."""
    gate, other = Gate(), Gate()
    slow = plays(b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\n", gate, b"{}")
    async with (
        pool(slow, plays(other, streams("b")), way=way, streams=EARLY) as it,
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(chat())
        await it.called("a")
        await asyncio.sleep(0.15)  # nothing is due, and that is what is seen here
        gate.open()
        answer = await caller.head()
        await heartbeats(caller, answer)
        other.open()
        await caller.rest(answer)
        assert answer.clean
        await it.ended("complete", 2)


@both
@pytest.mark.parametrize("status", [400, 404, 413])
async def test_a_late_refusal_is_no_fault_of_the_upstream(way: Way, status: int) -> None:
    """A caller's bad request, found out late, opens no breaker."""
    gate = Gate()
    script = plays(gate, response(status, b'{"error":{"message":"bad"}}'))
    settings = {"breaker": {"failures": 1}}
    async with (
        pool(script, way=way, streams=EARLY, upstream=settings) as it,
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(chat())
        answer = await caller.head()
        await heartbeats(caller, answer, 1)
        gate.open()
        await caller.rest(answer)
        assert not answer.clean
        await it.ended("upstream_error", 1)
        assert await it.level("breaker_state", "a") == 0


# ── readers that leave ──────────────────────────────────────────────────────────────────────────────────


async def left(it: Pool, *calls: Call) -> None:
    """Everything is closed within a second."""
    async with asyncio.timeout(1.0):
        for call in calls:
            await call.gone.wait()
    line = await it.settled()
    assert line["reason"] == "client_gone"


leaves = pytest.mark.parametrize("leave", [Caller.leave, Caller.reset], ids=["fin", "rst"])


@both
@leaves
async def test_leaves_in_a_back_off(way: Way, leave: Any) -> None:
    async with pool(refuses_with(503, "Retry-After: 7"), way=way) as it:
        caller = await Caller.connect(it.port)
        await caller.send(chat())
        await it.called("a")
        await until(lambda: it.headrace.state["permits"] == 0)  # the attempt is over, the request is not
        leave(caller)
        async with asyncio.timeout(1.0):
            await left(it)
        assert await it.attempts() == {"a": {"status": 1}}
        assert it.core.retry_budget._retries == 0  # it has hit nobody


@both
@leaves
async def test_leaves_in_the_second_connect(way: Way, leave: Any) -> None:
    slow = {"b": {"timeouts": {"connect": 20}}}
    async with pool(refuses_with(503), BLACKHOLE, way=way, each=slow) as it:
        caller = await Caller.connect(it.port)
        await caller.send(chat())
        await until(lambda: it.core.upstreams["b"].in_flight == 1)
        leave(caller)
        async with asyncio.timeout(1.0):
            await left(it)
        assert await it.attempts() == {"a": {"status": 1}, "b": {"cancelled": 1}}


@both
@leaves
async def test_leaves_while_the_second_thinks(way: Way, leave: Any) -> None:
    async with pool(refuses_with(503), silent, way=way) as it:
        caller = await Caller.connect(it.port)
        await caller.send(chat())
        call = await it.called("b")
        leave(caller)
        await left(it, call)
        assert await it.attempts() == {"a": {"status": 1}, "b": {"cancelled": 1}}


@both
async def test_leaves_while_a_refusal_is_read(way: Way) -> None:
    """Its head is here, its body is not."""
    slow = plays(b"HTTP/1.1 503 No\r\nContent-Length: 9\r\n\r\n{", Call.watch)
    async with pool(slow, plays(says("b")), way=way) as it:
        caller = await Caller.connect(it.port)
        await caller.send(chat())
        call = await it.called("a")
        caller.leave()
        await left(it, call)
        assert it.hits == {"a": 1}


# ── from outside ────────────────────────────────────────────────────────────────────────────────────────


@both
async def test_killed_in_a_back_off(way: Way) -> None:
    async with pool(refuses_with(503, "Retry-After: 7"), way=way) as it:
        asking = asyncio.ensure_future(ask(it.port, chat()))
        await it.called("a")
        await until(lambda: it.headrace.state["permits"] == 0)
        (running,) = it.headrace.server.streams()
        assert it.headrace.server.kill(running["id"])
        answer = await asking
        assert answer.status == 503
        await it.ended("killed", 1)


@both
async def test_an_upload_of_json_is_the_same_for_all(way: Way) -> None:
    """A large body is sent whole to each."""
    body = {"model": "m", "messages": [{"role": "user", "content": "x" * 300_000}]}
    request = post("/v1/chat/completions", body)
    async with pool(refuses_with(503), plays(says("b")), way=way) as it:
        assert (await ask(it.port, request)).status == 200
        assert it.calls("a")[0].body == it.calls("b")[0].body == request.partition(b"\r\n\r\n")[2]
        await it.ended("complete", 2)


@both
async def test_a_stream_that_breaks_is_not_begun_again(way: Way) -> None:
    """A byte has gone to the caller."""
    gate = Gate()
    cut = plays(HEAD, chunk(event("a")), gate, Call.close)
    async with pool(cut, plays(streams("b")), way=way) as it, await Caller.connect(it.port) as caller:
        await caller.send(chat())
        answer = await caller.head()
        assert await caller.piece(answer) == event("a")
        gate.open()
        await caller.rest(answer)
        assert not answer.clean
        await it.ended("upstream_cut", 1)
        assert it.hits == {"a": 1}
        assert await it.attempts() == {"a": {"reset": 1}}


@both
async def test_an_error_that_calls_itself_a_success(way: Way) -> None:
    """In a stream it is counted as in a whole answer."""
    error = b'data: {"error":{"message":"overloaded","code":529}}\n\n'
    async with pool(plays(HEAD, chunk(error), END), way=way) as it:
        await ask(it.port, chat())
        await it.ended("upstream_error", 1)
        assert await it.attempts() == {"a": {"status": 1}}


# ── no slot ──────────────────────────────────────────────────────────────────────────────────────────────


@both
async def test_a_failover_waits_for_no_slot(way: Way) -> None:
    """Who is full is passed over; if nobody else is left, what was lost is the answer, at once."""
    gate = Gate()
    models = {"m": {"upstreams": in_order("ab")}, "mm": {"upstreams": in_order("abc")}}
    models["full"] = {"upstreams": in_order("b")}
    scripts = refuses_with(503), plays(gate, says("b")), plays(says("c"))
    each = {"b": {"max_in_flight": 1}}
    async with pool(*scripts, way=way, each=each, models=models) as it:
        holding = asyncio.ensure_future(ask(it.port, chat(stream=False, model="full")))
        await it.called("b")
        answer, took_s = await timed(it, chat(stream=False, model="mm"))
        assert (answer.status, answer.json()) == (200, {"from": "c"})
        told(answer, "c", 2)
        answer, took_m_s = await timed(it, METHODS["post"])
        assert answer.status == 503
        told(answer, "a", 3)
        assert max(took_s, took_m_s) < AT_ONCE_S
        gate.open()
        assert (await holding).json() == {"from": "b"}
        await it.settled(3)


# ── in one read, or in several ──────────────────────────────────────────────────────────────────────────

_USAGE = b'"usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12}'
WHOLE = {
    "answer": response(200, b'{"from":"a",%b}' % _USAGE),
    "after blank lines": response(200, b'\n\n{"from":"a",%b}' % _USAGE),
    "blank lines only": response(200, b"\n\n"),
    "empty": response(200, b""),
    "refusal": response(404, b'{"error":{"message":"no such thing"}}'),
    "array of errors": response(400, b'[{"error":{"code":400,"message":"no","status":"INVALID"}}]'),
    "fault": response(500, b'{"error":{"message":"broken"}}'),
    "tried again": response(503, b'{"error":{"message":"busy"}}'),
    "credential": response(401, b'{"error":{"message":"who?"}}'),
    "error as a success": response(200, b'{"error":{"message":"in band"}}'),
    "stream": response(200, event("a") + b"data: [DONE]\n\n", content_type="text/event-stream"),
    "cut": response(200, b'{"from":"a"}').replace(b"Length: 12", b"Length: 99"),
}
#: What differs from request to request.
VOLATILE = ("server-timing", "date", "x-request-id", "request-id")


async def seen(way: Way, request: bytes, raw: bytes, pieces: int) -> tuple[Any, ...]:
    """All that a caller and an operator are told of an answer that comes in so many pieces."""

    async def script(call: Call) -> None:
        size = -(-len(raw) // pieces)
        for at in range(0, len(raw), size):
            await call.send(raw[at : at + size])
            await asyncio.sleep(0.02)
        call.close()

    async with pool(script, way=way, retry={"attempts": 1}) as it:
        answer = await ask(it.port, request)
        line = await it.settled(1)
        told = ("reason", "status", "attempts", "error", "bytes_out", "prompt_tokens", "completion_tokens")
        fields = {name: value for name, value in answer.headers.items() if name.lower() not in VOLATILE}
        body = answer.body if answer.status == 200 else answer.json()
        if isinstance(body, dict):
            body["error"].pop("request_id", None)
        return answer.status, fields, body, {key: line.get(key) for key in told}, await it.attempts()


@both
@pytest.mark.parametrize("kind", WHOLE)
async def test_in_one_read_or_in_several(way: Way, kind: str) -> None:
    """What is here whole with its first byte is passed on without waiting: the same in every respect."""
    request = chat() if kind == "stream" else METHODS["post"]
    once = await seen(way, request, WHOLE[kind], 1)
    assert await seen(way, request, WHOLE[kind], 4) == once
    assert (once[0] == 200) == (
        kind in ("answer", "after blank lines", "blank lines only", "empty", "stream")
    )
