"""What holds after every case, however it went: nothing is held, nothing is lost, all is told once.

The ledger invariant: every request that was counted in has ended for one reason, in the metric and in the
log; slots, queue and reservations are zero; sockets are back at where they began; the ledger has a row for
each request that reached an upstream, once, and none for another; tokens and money in the metrics are those
of the rows.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kit.fleet import Fleet, summed
from tests.kit.headrace import Headrace, until
from tests.kit.ledger import written
from tests.kit.upstreams import Call

_REQUEST_ID = re.compile(rb"\r\nx-request-id: ([^\r\n]+)", re.IGNORECASE)
_PICOS_PER_USD = 1e12


def sockets(pid: int | None = None) -> int:
    """Open sockets of a process, of this one unless told otherwise."""
    folder = Path(f"/proc/{pid or 'self'}/fd")
    links = []
    for name in os.listdir(folder):
        try:
            links.append(os.readlink(folder / name))
        except FileNotFoundError:
            continue  # the listing's own descriptor
    return sum(link.startswith("socket:") for link in links)


@asynccontextmanager
async def invariant(
    headrace: Headrace, *calls: list[Call], started: int | None = None, timeout_s: float = 5.0
) -> AsyncIterator[None]:
    """Around all that a fresh Headrace is asked. calls: what each of its upstreams was sent; started: how
    many requests were begun, where a test knows. A test that fails is not looked at."""
    before, ledger = sockets(), _ledger(headrace)
    known = len(written(ledger))
    yield
    await headrace.quiet(timeout_s)
    await until(
        lambda: sockets() <= before + 2 * headrace.state["upstream_idle"],
        timeout_s,
        lambda: f"{before} sockets before, {sockets()} now, {headrace.state}",
    )
    await until(lambda: headrace.state["ledger_pending"] == 0)
    lines, samples = headrace.log_lines(), await headrace.metrics()
    assert started is None or len(lines) == started, lines
    told_once(lines, samples)
    rows_are_right(lines, written(ledger)[known:], [call for each in calls for call in each], samples)


async def balanced(running: Fleet, *calls: list[Call]) -> None:
    """The same of processes that nobody has killed, once nothing goes on in them."""
    await running.quiet()
    async with asyncio.timeout(10):
        while (await running.state())["ledger_pending"]:
            await asyncio.sleep(0.02)
    samples = await running.metrics()
    total = summed(samples, "headrace_requests_total")
    await until(lambda: len(running.logged("request")) >= total)
    lines, rows = running.logged("request"), written(running.file.parent / "headrace.db")
    told_once(lines, samples)
    rows_are_right(lines, rows, [call for each in calls for call in each], samples)


def _ledger(headrace: Headrace) -> Path:
    """Where it writes; a reload does not change that."""
    return Path(headrace.server.core.config.ledger.database.removeprefix("sqlite:"))


def told_once(lines: list[dict[str, Any]], samples: Mapping[str, float]) -> None:
    """Each request has one end in the log, and the metric knows the same ends; none is still counted in."""
    ended = Counter[str]()
    for name, value in samples.items():
        if name.startswith("headrace_requests_total{"):
            found = re.search(r'reason="([a-z_]+)"', name)
            assert found is not None
            ended[found[1]] += int(value)
    assert ended == Counter(line["reason"] for line in lines)
    running = {name: value for name, value in samples.items() if "requests_in_flight{" in name and value}
    assert not running, running


def rows_are_right(
    lines: list[dict[str, Any]], rows: Iterable[Any], calls: list[Call], samples: Mapping[str, float]
) -> None:
    """Rows of what reached an upstream, once each, with the tokens and the money of the metrics."""
    rows = list(rows)
    asked = Counter(line["request_id"] for line in lines if line["attempts"])
    entered = Counter(row.request_id for row in rows)
    assert entered <= asked, entered - asked
    seen = {found[1].decode() for call in calls if (found := _REQUEST_ID.search(call.head))}
    assert seen <= set(entered), seen - set(entered)
    known = [row for row in rows if row.usage_source != "unknown"]
    for kind in ("prompt", "cached", "completion", "reasoning"):
        counted = sum(
            value
            for name, value in samples.items()
            if name.startswith("headrace_tokens_total{") and f'type="{kind}"' in name
        )
        assert counted == sum(getattr(row, f"{kind}_tokens") for row in known), (kind, rows)
    money = sum(value for name, value in samples.items() if name.startswith("headrace_cost_usd_total"))
    assert money == pytest.approx(sum(row.cost_picos or 0 for row in known) / _PICOS_PER_USD)
