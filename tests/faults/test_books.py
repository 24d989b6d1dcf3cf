"""The books after each way in which a request can end: what was reserved less what was given back is what
is charged; in tokens of a plan, in dollars of a budget, and in the ledger's row.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from tests.kit.callers import Caller, ask, chat
from tests.kit.headrace import until
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.lab import Lab, Way, both, hold, lab, plays, response
from tests.kit.ledger import written
from tests.kit.pool import REFUSES
from tests.kit.upstreams import DONE, END, HEAD, Call, Script, chunk, event

pytestmark = pytest.mark.timeout(30)

#: A token costs a dollar.
PRICE = {"input": 1_000_000, "output": 1_000_000}
RATE, MOST = 6000, 400
USAGE = b'"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}'
WHOLE = response(200, b'{"choices":[],%b}' % USAGE)
TOLD = b'data: {"choices":[],%b}\n\n' % USAGE


@dataclass(frozen=True)
class Ending:
    """How one request ends. leaves: the caller does, once the upstream has it."""

    name: str
    reason: str
    script: Script
    stream: bool = True
    leaves: Callable[[Caller], None] | None = None
    timers: dict[str, float] | None = None

    def __str__(self) -> str:
        return self.name


A = event("a")
ENDINGS = (
    Ending("whole answer", "complete", plays(WHOLE), stream=False),
    Ending("whole stream", "complete", plays(HEAD, chunk(A), chunk(TOLD), chunk(DONE), END)),
    Ending("stream without usage", "complete", plays(HEAD, chunk(A), chunk(DONE), END)),
    Ending("503", "upstream_error", plays(response(503, b'{"error":{"message":"no"}}'))),
    Ending("429", "complete", plays(response(429, b'{"error":{"message":"no"}}'))),
    Ending("401", "upstream_error", plays(response(401, b'{"error":{"message":"no"}}'))),
    Ending("FIN before an answer", "upstream_error", plays(Call.close)),
    Ending("RST before an answer", "upstream_error", plays(Call.reset)),
    Ending("rubbish", "upstream_error", plays(b"SSH-2.0-x\r\n\r\n", Call.close)),
    Ending("no first byte", "upstream_stall", plays(hold), timers={"first_byte": 0.2}),
    Ending("FIN in the stream", "upstream_cut", plays(HEAD, chunk(A), 0.05, Call.close)),
    Ending("RST in the stream", "upstream_cut", plays(HEAD, chunk(A), 0.05, Call.reset)),
    Ending("cut in a whole answer", "upstream_cut", plays(WHOLE[:-9], 0.05, Call.close), stream=False),
    Ending("stall in the stream", "upstream_stall", plays(HEAD, chunk(A), hold), timers={"idle": 0.2}),
    Ending("total deadline", "deadline", plays(HEAD, chunk(A), hold), timers={"total": 0.3}),
    Ending("caller leaves while it thinks", "client_gone", plays(hold), leaves=Caller.leave),
    Ending("caller resets while it thinks", "client_gone", plays(hold), leaves=Caller.reset),
    Ending("caller leaves in the stream", "client_gone", plays(HEAD, chunk(A), hold), leaves=Caller.leave),
)


async def happens(it: Lab, ending: Ending, request: bytes) -> None:
    async with await Caller.connect(it.port) as caller, asyncio.timeout(15):
        await caller.send(request)
        if ending.leaves is not None:
            await it.called()
            await until(lambda: it.headrace.state["reservations"] == 1)
            ending.leaves(caller)
        else:
            await caller.rest(await caller.head())


async def balance(it: Lab, key: str) -> tuple[int, Decimal]:
    """What is left of the tokens, and dollars spent today."""
    fields = f"Host: test\r\n{bearer(key)}\r\nConnection: close\r\n\r\n"
    limits = (await ask(it.port, f"GET /v1/limits HTTP/1.1\r\n{fields}".encode())).json()
    usage = (await ask(it.port, f"GET /v1/usage HTTP/1.1\r\n{fields}".encode())).json()
    return limits["tokens"]["remaining"], Decimal(usage["day"]["budget"]["spent_usd"])


def sections(tmp_path: Path, ending: Ending) -> dict[str, Any]:
    return {
        "auth": auth_section(tmp_path),
        "plans": {"fast": {"requests_per_minute": 1000, "tokens_per_minute": RATE}},
        "models": {"m": {"upstreams": ["up"], "price": PRICE}},
        "ledger": {"database": f"sqlite:{tmp_path}/ledger.db"},
        "upstream": {"timeouts": ending.timers or {}},
    }


async def balances(it: Lab, tmp_path: Path, key: str, request: bytes, began_at: float) -> None:
    """Tokens and dollars are those of the row; where nobody knows them, what was reserved stays spent."""
    reserved = MOST + math.ceil(len(request.partition(b"\r\n\r\n")[2]) / 4)
    remaining, spent = await balance(it, key)
    came_back = (monotonic() - began_at) * RATE / 60 + 1
    charged, dollars = 0, Decimal(0)
    for row in written(tmp_path / "ledger.db"):
        known = row.usage_source != "unknown"
        tokens = row.prompt_tokens + row.completion_tokens
        charged += tokens if known else reserved * (row.status == 200)
        dollars += Decimal(row.cost_picos or 0) / 10**12 if known else reserved
    assert dollars == spent
    assert RATE - charged <= remaining <= min(RATE, RATE - charged + came_back)


@both
@pytest.mark.parametrize("ending", ENDINGS, ids=str)
async def test_reserved_less_refunded_is_charged(way: Way, ending: Ending, tmp_path: Path) -> None:
    key = await make_key(tmp_path, plan="fast", budget_day=10_000)
    async with lab(ending.script, way, **sections(tmp_path, ending)) as it:
        began_at = monotonic()
        request = chat(bearer(key), stream=ending.stream, max_tokens=MOST)
        await happens(it, ending, request)
        line = await it.line()
        assert line["reason"] == ending.reason, line
        await it.headrace.quiet()
        await until(lambda: it.headrace.state["ledger_pending"] == 0)
        assert len(written(tmp_path / "ledger.db")) == 1
        await balances(it, tmp_path, key, request, began_at)


@both
async def test_nothing_is_charged_where_nothing_was_reached(way: Way, tmp_path: Path) -> None:
    """Nobody listens: no row, and all that was reserved is back."""
    key = await make_key(tmp_path, plan="fast", budget_day=10_000)
    async with REFUSES.make() as nowhere:
        settings = sections(tmp_path, ENDINGS[0])
        settings["upstream"] = {"base_url": nowhere.url}
        async with lab(plays(WHOLE), way, **settings) as it:
            request = chat(bearer(key), max_tokens=MOST)
            assert (await ask(it.port, request)).status == 502
            await it.ended("upstream_error")
            assert written(tmp_path / "ledger.db") == []
            assert await balance(it, key) == (RATE, 0)
