"""Row 26: the wall clock jumps an hour, forwards or back, while requests run."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.inputs import JWT_SECTION, token
from tests.kit.callers import Caller, ask, chat
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.lab import Gate, Way, both, lab, plays, response
from tests.kit.upstreams import DONE, END, HEAD, chunk, event

HOUR_S = 3600.0
Jump = Callable[[float], None]


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Jump:
    """Sets the wall clock, and only that, so many seconds off."""
    right = time.time

    def to(off_s: float) -> None:
        for module in (time, *(sys.modules[f"proxy.middleware.{name}"] for name in ("auth", "observe"))):
            monkeypatch.setattr(module, "time", lambda: right() + off_s)

    return to


@both
@pytest.mark.parametrize("off_s", [HOUR_S, -HOUR_S], ids=["forwards", "back"])
async def test_a_stream_goes_on(way: Way, off_s: float, jump: Jump) -> None:
    """No timer of it is due, none is put off, and no duration is negative."""
    gate = Gate()
    script = plays(HEAD, chunk(event("a")), gate, chunk(DONE), END)
    timers = {"idle": 30, "total": 60}
    async with (
        lab(script, way, upstream={"timeouts": timers}, streams={"heartbeat": 0.1}) as it,
        asyncio.timeout(10),
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(chat())
        answer = await caller.head()
        assert await caller.piece(answer) == event("a")
        jump(off_s)
        for _ in range(2):
            assert await caller.piece(answer) == b": headrace\n"
        gate.open()
        assert (await caller.rest(answer)).clean
        line = await it.ended("complete")
        assert 0 <= line["ttfb_ms"] <= line["duration_ms"] < 10_000


@pytest.mark.parametrize("off_s", [HOUR_S, -HOUR_S], ids=["forwards", "back"])
async def test_timers_and_limits_are_monotonic(off_s: float, jump: Jump, tmp_path: Path) -> None:
    """A bucket neither fills nor stays empty by it; a stalled upstream is noticed in its own time."""
    key = await make_key(tmp_path, plan="small")
    sections = {
        "auth": auth_section(tmp_path),
        "plans": {"small": {"requests_per_minute": 120, "burst": 1}},
        "upstream": {"timeouts": {"first_byte": 0.3}},
    }
    async with lab(plays(lambda call: call.watch()), Way(push=True), **sections) as it:
        loop = asyncio.get_running_loop()
        jump(off_s)
        began_at = loop.time()
        assert (await ask(it.port, chat(bearer(key)))).status == 504
        assert 0.25 < loop.time() - began_at < 1.5
        refused = await ask(it.port, chat(bearer(key)))
        while refused.status == 504:  # half a second had passed: one more was allowed
            refused = await ask(it.port, chat(bearer(key)))
        assert refused.status == 429
        assert int(refused.headers["retry-after-ms"]) <= 500
        jump(0.0)
        await asyncio.sleep(int(refused.headers["retry-after-ms"]) / 1000)
        assert (await ask(it.port, chat(bearer(key)))).status == 504


async def test_tokens_end_by_the_wall_clock(jump: Jump, tmp_path: Path) -> None:
    """`exp` and `nbf` are dates."""
    text = token(exp=int(time.time()) + 1800)
    later = token(nbf=int(time.time()) + 1800)
    section = {**auth_section(tmp_path), "jwt": JWT_SECTION}
    async with lab(plays(response(200, b"{}")), Way(push=True), auth=section) as it:

        async def status(text: str) -> int:
            return (await ask(it.port, chat(bearer(text), stream=False))).status

        assert (await status(text), await status(later)) == (200, 401)
        jump(HOUR_S)
        assert (await status(text), await status(later)) == (401, 200)
        jump(-HOUR_S)
        assert (await status(text), await status(later)) == (200, 401)
