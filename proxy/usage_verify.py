"""`headrace usage --verify`: what a running server has counted, against the rows in its ledger.

Both begin at the same moment: the counters say when they began (`start_time_seconds`; a restart hands it on
with the figures), and rows count from requests that started then. A request that runs is in neither. What can
differ although nothing is wrong: the last second of a worker that was killed (rows, but no counters), rows
older than `keep_days`, a clock that was set back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal

import msgspec

from proxy import metrics
from proxy.ledger_read import Group, Sums
from proxy.pricing import format_usd, usd
from proxy.usage_report import total

#: Counters of money are floating point sums: exact to this share.
_TOLERANCE = Decimal("1e-9")
_TYPES = {
    "prompt": "prompt_tokens",
    "cached": "cached_tokens",
    "completion": "completion_tokens",
    "reasoning": "reasoning_tokens",
}


class Counted(msgspec.Struct):
    """What the metrics page says about the ledger."""

    since: float = 0.0
    rows: int = 0
    dropped: int = 0
    pending: int = 0
    replaced: int = 0
    asked: int = 0  # requests that were sent to an upstream; some of them never reached it
    tokens: dict[tuple[str, str], int] = msgspec.field(default_factory=dict)
    cost: dict[str, Decimal] = msgspec.field(default_factory=dict)


class Check(msgspec.Struct, frozen=True):
    """One counter, and the same from the rows."""

    name: str
    counted: str
    written: str
    ok: bool


def counted(page: str) -> Counted:
    """Raises ValueError: this is no metrics page."""
    found = Counted()
    for name, labels, value in metrics.samples(page):
        if name == "tokens_total":
            found.tokens[labels["model"], labels["type"]] = int(value)
        elif name == "cost_usd_total":
            found.cost[labels["model"]] = Decimal(repr(value))
        elif name == "requests_total" and labels["upstream"] != "none":
            found.asked += int(value)
        elif name == "start_time_seconds":
            found.since = value
        elif field := _COUNTS.get(name):
            setattr(found, field, int(value))
    return found


_COUNTS = {
    "ledger_rows_total": "rows",
    "ledger_dropped_total": "dropped",
    "ledger_pending": "pending",
    "workers_replaced_total": "replaced",
}


def checks(page: Counted, by_model: Iterable[Group]) -> list[Check]:
    """by_model: the rows of requests that started at `page.since` or later."""
    groups = {str(group.keys[0]): group.sums for group in by_model}
    rows = total(Group((), sums) for sums in groups.values()).requests
    kept = page.rows - page.dropped
    made = [Check("rows", f"{kept:,}", f"{rows:,}", kept == rows)]
    made.append(Check("requests to upstreams, at least", f"{page.asked:,}", f"{rows:,}", page.asked >= rows))
    for model in sorted({*groups, *page.cost, *(model for model, _ in page.tokens)}):
        made += _of_model(model, page, groups.get(model, Sums()))
    return made


def _of_model(model: str, page: Counted, sums: Sums) -> Iterable[Check]:
    for kind, field in _TYPES.items():
        count, written = page.tokens.get((model, kind), 0), getattr(sums, field)
        yield Check(f"{model}: {kind} tokens", f"{count:,}", f"{written:,}", count == written)
    cost, exact = page.cost.get(model, Decimal(0)), usd(sums.cost_picos)
    near = abs(cost - exact) <= _TOLERANCE * max(Decimal(1), exact)
    yield Check(f"{model}: cost in USD", format_usd(cost), format_usd(exact), near)


def text(found: Iterable[Check], page: Counted, notes: Mapping[str, bool]) -> str:
    """A table; notes: what is said if it is so."""
    table = [("", "counted", "in the ledger", ""), *_rows(found)]
    widths = [max(len(row[at]) for row in table) for at in range(4)]
    made = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()
        for row in table
    ]
    return "\n".join([*made, *(note for note, so in notes.items() if so)])


def _rows(found: Iterable[Check]) -> Iterable[tuple[str, str, str, str]]:
    for check in found:
        yield check.name, check.counted, check.written, "ok" if check.ok else "DIFFERS"
