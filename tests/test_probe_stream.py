"""GET /api/health/stream: paced events that anybody may ask for, within bounds."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise

import pytest

from tests.kit.callers import Answer, Caller, ask
from tests.kit.headrace import Headrace, running, settings_for, until

pytestmark = pytest.mark.timeout(30)

PATH = "/api/health/stream"
AT_ONCE = 8


def get(query: str = "", *fields: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {PATH}{query} HTTP/1.1", "Host: test", *fields, "", ""]).encode()


def documents(body: bytes) -> list[dict[str, float]]:
    lines = [line for line in body.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line[6:]) for line in lines]


async def probe(headrace: Headrace, query: str) -> Answer:
    return await ask(headrace.port, get(query))


async def test_events_tell_when_they_were_sent() -> None:
    """So many events, each in a write of its own, at least a gap apart."""
    async with running(settings_for("mock:")) as headrace, await Caller.connect(headrace.port) as caller:
        await caller.send(get("?events=4&gap=0.05&padding=100"))
        answer = await caller.head()
        pieces = []
        while piece := await caller.piece(answer):
            pieces.append(piece)
        events = [documents(piece)[0] for piece in pieces]
        assert [event["event"] for event in events] == [1, 2, 3, 4]
        gaps = [later["sent_s"] - earlier["sent_s"] for earlier, later in pairwise(events)]
        assert min(gaps) >= 0.049
        assert all(b"\n: " + b"." * 100 + b"\n\n" in piece for piece in pieces)
        fields = {
            name: answer.headers[name] for name in ("x-accel-buffering", "cache-control", "x-headrace-probe")
        }
        assert fields == {
            "x-accel-buffering": "no",
            "cache-control": "no-cache, no-transform",
            "x-headrace-probe": "1",
        }
        await until(lambda: len(headrace.log_lines()) == 1)
        (line,) = headrace.log_lines()
        assert (line["reason"], line["chunks"], line["bytes_out"]) == ("complete", 4, len(answer.body))


@pytest.mark.parametrize(("heartbeat", "comments"), [(0, 0), (0.1, 2)])
async def test_silence(heartbeat: float, comments: int) -> None:
    """A pause before the last event, with heartbeats or without any."""
    async with running(settings_for("mock:")) as headrace:
        answer = await probe(headrace, f"?events=2&silence=0.3&heartbeat={heartbeat}")
    first, last = documents(answer.body)
    assert last["sent_s"] - first["sent_s"] >= 0.299
    assert answer.body.count(b": headrace\n") >= comments
    assert (b": headrace" in answer.body) == bool(comments)


@pytest.mark.parametrize(
    "query",
    ["?events=0", "?events=31", "?gap=5.1", "?gap=-1", "?silence=301", "?padding=16385", "?events=canary"],
)
async def test_bounds(query: str) -> None:
    """Longer ones are refused, without a word of the caller's."""
    async with running(settings_for("mock:")) as headrace:
        answer = await probe(headrace, query)
    assert (answer.status, answer.json()["error"]["code"]) == (400, "bad_request")
    assert b"canary" not in answer.body


async def test_odd_queries() -> None:
    """What it does not know it does not mind; what is no number does no harm."""
    async with running(settings_for("mock:")) as headrace:
        for query in ("?t=1", "?events=1&events=1", "?gap=nan&events=2"):
            answer = await probe(headrace, query)
            assert answer.status in (200, 400), query
        assert len(documents((await probe(headrace, "?t=1")).body)) == 1
        head = await ask(headrace.port, get("?events=30&gap=5", "Connection: close", method="HEAD"))
    assert head.status == 200


async def test_their_number_is_bounded() -> None:
    """Past eight at once: 503. The plain one is always answered; a free place can be taken again."""
    async with running(settings_for("mock:")) as headrace, asyncio.timeout(20):
        callers = [await Caller.connect(headrace.port) for _ in range(AT_ONCE)]
        for caller in callers:
            await caller.send(get("?events=2&silence=60"))
            await caller.piece(await caller.head())
        refused = await probe(headrace, "?events=2")
        assert (refused.status, refused.json()["error"]["code"]) == (503, "overloaded")
        assert (await probe(headrace, "")).status == 200
        assert headrace.state["streams"] == AT_ONCE
        callers[0].leave()
        await until(lambda: headrace.state["streams"] == AT_ONCE - 1)
        assert (await probe(headrace, "?events=2")).status == 200
        for caller in callers[1:]:
            caller.reset()
        await headrace.quiet()
        reasons = [line["reason"] for line in headrace.log_lines()]
        assert reasons.count("client_gone") == AT_ONCE
        assert reasons.count("rejected") == 1


async def test_one_can_be_killed() -> None:
    """It ends visibly, and for the reason that it has."""
    async with running(settings_for("mock:")) as headrace, await Caller.connect(headrace.port) as caller:
        await caller.send(get("?events=2&silence=60"))
        answer = await caller.head()
        await caller.piece(answer)
        assert headrace.server.kill(headrace.server.streams()[0]["id"])
        async with asyncio.timeout(5):
            await caller.rest(answer)
        assert not answer.clean
        await until(lambda: len(headrace.log_lines()) == 1)
        assert headrace.log_lines()[0]["reason"] == "killed"


async def test_a_drain_does_not_wait_for_one() -> None:
    """A process that is to end finishes them early."""
    async with running(settings_for("mock:")) as headrace, await Caller.connect(headrace.port) as caller:
        await caller.send(get("?events=30&gap=5"))
        answer = await caller.head()
        await caller.piece(answer)
        async with asyncio.timeout(10):
            await headrace.server.drain(60, asyncio.Event())
            await caller.rest(answer)
        assert answer.clean
        assert len(documents(answer.body)) < 30
