"""What is recorded of a request: every value under the name that it has."""

from __future__ import annotations

import msgspec
import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from proxy import endpoints
from proxy.accounting import row_of
from proxy.context import Context
from proxy.errors import Reason
from proxy.identity import Principal
from proxy.metrics import Metrics, Summed
from proxy.middleware import observe
from proxy.usage import Source, Usage

_PATH = "/v1/chat/completions"
_TRACE = "0af7651916cd43dd8448eb211c80319c"
_WALL_OFFSET_S = 1_700_000_000.0


def ended() -> Context:
    """No two of its values are the same."""
    ctx = Context("req-1", endpoints.match("POST", _PATH), _PATH, 1.0)
    ctx.principal = Principal(name="key:k", key_id="k", plan="pro")
    ctx.model, ctx.upstream, ctx.attempts, ctx.status = "m", "up", 3, 200
    ctx.queue_s, ctx.first_byte_at, ctx.first_token_at, ctx.ended_at = 0.25, 1.5, 1.75, 3.0000004
    ctx.chunks, ctx.bytes_in, ctx.bytes_out, ctx.streaming = 17, 18, 19, True
    ctx.usage = Usage(20, 21, 22, 23, Source.REPORTED)
    ctx.cost_picos, ctx.list_cost_picos = 24_500_000_000_000, 25
    ctx.client_ip, ctx.error_code, ctx.method = "192.0.2.1", "a_code", "POST"
    ctx.fields = CIMultiDictProxy(CIMultiDict({"traceparent": f"00-{_TRACE}-b7ad6b7169203331-01"}))
    return ctx


async def test_a_line() -> None:
    ctx = ended()
    outcome = Metrics("").outcome(ctx.route, ctx.model, ctx.upstream, ctx.status, Reason.COMPLETE)
    line = msgspec.to_builtins(observe._line(ctx, outcome, _WALL_OFFSET_S))
    assert line == {
        "ts": "2023-11-14T22:13:23.000Z",
        "level": "info",
        "event": "request",
        "request_id": "req-1",
        "key_id": "k",
        "plan": "pro",
        "method": "POST",
        "route": _PATH,
        "model": "m",
        "upstream": "up",
        "attempts": 3,
        "status": 200,
        "reason": "complete",
        "queue_ms": 250.0,
        "ttfb_ms": 500.0,
        "ttft_ms": 750.0,
        "duration_ms": 2000.0,
        "chunks": 17,
        "bytes_in": 18,
        "bytes_out": 19,
        "prompt_tokens": 20,
        "completion_tokens": 22,
        "usage_source": "reported",
        "cost_usd": "24.50",
        "client_ip": "192.0.2.1",
        "error": "a_code",
        "trace_id": _TRACE,
    }


async def test_a_row() -> None:
    ctx = ended()
    outcome = Metrics("").outcome(ctx.route, ctx.model, ctx.upstream, ctx.status, Reason.COMPLETE)
    row = msgspec.structs.asdict(row_of(ctx, outcome, _WALL_OFFSET_S))
    assert row.pop("id").startswith(f"{1_700_000_001_000:012x}")
    assert row == {
        "started_at": 1_700_000_001.0,
        "ended_at": 3.0000004 + _WALL_OFFSET_S,
        "request_id": "req-1",
        "key_id": "k",
        "caller": "key:k",
        "plan": "pro",
        "route": _PATH,
        "model": "m",
        "upstream": "up",
        "status": 200,
        "reason": "complete",
        "attempts": 3,
        "stream": True,
        "prompt_tokens": 20,
        "cached_tokens": 21,
        "completion_tokens": 22,
        "reasoning_tokens": 23,
        "usage_source": "reported",
        "cost_picos": 24_500_000_000_000,
        "list_cost_picos": 25,
    }


async def test_series_begin_when_something_is_counted() -> None:
    """Not when an outcome is first seen; and two outcomes of one model share its counters."""
    metrics = Metrics("")
    before = metrics.snapshot()
    one = metrics.outcome(_PATH, "m", "up", 200, Reason.COMPLETE)
    other = metrics.outcome(_PATH, "m", "up", 200, Reason.CLIENT_GONE)
    assert metrics.outcome(_PATH, "m", "up", 200, Reason.COMPLETE) is one
    assert one is not other
    assert metrics.snapshot() == before
    ctx = ended()
    row = row_of(ctx, one, _WALL_OFFSET_S)
    one.spend(row)
    other.spend(row)
    expected = {
        "tokens": {
            ("m", "prompt"): 40,
            ("m", "cached"): 42,
            ("m", "completion"): 44,
            ("m", "reasoning"): 46,
        },
        "cost_usd": {("m",): 49.0},
    }
    for _ in range(2):  # to be read changes nothing
        after = metrics.snapshot()
        assert {name: dict(after[name]) for name in expected} == expected
    assert {name: series for name, series in after.items() if name not in expected} == before
    one.spend(row)
    assert dict(metrics.snapshot()["cost_usd"]) == {("m",): 73.5}


async def test_what_an_outcome_counts() -> None:
    """Requests, bytes and times, each in its series and only where it was reached."""
    metrics = Metrics("")
    outcome = metrics.outcome(_PATH, "m", "up", 200, Reason.COMPLETE)
    before = metrics.snapshot()
    observe._count(outcome, ended())
    observe._count(outcome, ended())
    after = metrics.snapshot()
    changed = {name: dict(series) for name, series in after.items() if series != before.get(name)}
    assert changed.pop("requests") == {(_PATH, "m", "up", "200", "complete"): 2}
    assert changed.pop("response_bytes") == {(): 38}
    sums = {
        name: {labels: (sum(row[:-1]), row[-1]) for labels, row in series.items()}  # type: ignore[index]
        for name, series in changed.items()
    }
    assert sums == {
        "request_duration": {(_PATH, "up"): (2, pytest.approx(4.0))},
        "time_to_first_byte": {("up",): (2, pytest.approx(1.0))},
        "time_to_first_token": {("m", "up"): (2, pytest.approx(1.5))},
    }


def test_the_sum_of_a_level() -> None:
    """Whatever changed it, it is that of all its series."""
    level = Summed("level", "", ("upstream",))
    for labels, amount in ((("a",), 1), (("b",), 2), (("a",), -1)):
        level.add(labels, amount)
        assert level.total == sum(level.values.values())
    level.set(("b",), 5)
    level.absorb(("c",), 3)
    assert level.total == sum(level.values.values()) == 8
