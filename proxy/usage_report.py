"""Sums of the ledger as people and programs read them: a table, CSV, JSON; the saving, and a month ahead.

Days are those of UTC. All money is exact.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import msgspec

from proxy.errors import OperationError
from proxy.key_order import duration
from proxy.ledger_read import GROUPS, Group, Sums
from proxy.pricing import format_usd, usd
from proxy.yamlstruct import show, suggest

_DAY_S = 86400
#: What a month is in a projection: comparable between months.
MONTH_DAYS = 30
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PICOS_PER_CENT = 10**10


class Line(msgspec.Struct, frozen=True):
    """keys: as text, in the order that was asked for."""

    keys: tuple[str, ...]
    sums: Sums


def fields_of(text: str) -> tuple[str, ...]:
    """`key,model,day`. Raises OperationError."""
    fields = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for field in fields:
        if field not in GROUPS:
            known = ", ".join(GROUPS)
            raise OperationError(f"by: unknown field {show(field)}{suggest(field, GROUPS)}: expected {known}")
    return fields


def moment(what: str, text: str, now: float) -> float:
    """Seconds since the epoch of `2026-11-01` (its first moment, UTC), `2026-11-01T12:00:00Z`, or a duration
    back from now: `7d`, `24h`. Raises OperationError."""
    if not re.match(r"[0-9]{4}-", text.strip()):
        return now - duration(what, text)
    try:
        date = datetime.fromisoformat(text.strip())
        return (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise OperationError(f"{what}: expected 2026-11-01, 7d or 24h, got {show(text)}") from None


def folded(groups: Iterable[Group], have: Sequence[str], want: Sequence[str]) -> list[Group]:
    """Of groups by `have`, those by `want`, which are among them."""
    at = [have.index(field) for field in want]
    found: dict[tuple[str | int, ...], Sums] = {}
    for group in groups:
        found.setdefault(tuple(group.keys[each] for each in at), Sums()).add(group.sums)
    return [Group(keys, sums) for keys, sums in found.items()]


def lines(groups: Iterable[Group], by: Sequence[str]) -> list[Line]:
    """One a group, sorted: days in order, everything else by what it cost."""
    made = [Line(tuple(map(_text, by, group.keys)), group.sums) for group in groups]
    days = [at for at, field in enumerate(by) if field == "day"]
    return sorted(made, key=lambda line: ([line.keys[at] for at in days], -line.sums.cost_picos, line.keys))


def _text(field: str, value: str | int) -> str:
    return day_text(int(value)) if field == "day" else str(value)


def day_text(number: int) -> str:
    """2026-11-21, of a number of days since 1970-01-01."""
    return (_EPOCH + timedelta(days=number)).strftime("%Y-%m-%d")


def total(groups: Iterable[Group]) -> Sums:
    sums = Sums()
    for group in groups:
        sums.add(group.sums)
    return sums


# ── columns ─────────────────────────────────────────────────────────────────────────────────────────────


def _saved(sums: Sums) -> int:
    return sums.list_cost_picos - sums.cost_picos


def saved_percent(sums: Sums) -> str:
    """Of what list prices would have cost; two decimals."""
    if not sums.list_cost_picos:
        return "0.00"
    share = Fraction(_saved(sums) * 100, sums.list_cost_picos)
    return f"{Decimal(round(share * 100)).scaleb(-2):.2f}"


def money(picos: int) -> str:
    """All digits: `7.40`, `0.0000075`, `-0.5`."""
    return format_usd(usd(picos))


_Cell = Callable[[Sums], object]
_COLUMNS: Mapping[str, _Cell] = {
    "requests": lambda sums: sums.requests,
    "prompt_tokens": lambda sums: sums.prompt_tokens,
    "cached_tokens": lambda sums: sums.cached_tokens,
    "completion_tokens": lambda sums: sums.completion_tokens,
    "unknown": lambda sums: sums.unknown,
    "unpriced": lambda sums: sums.unpriced,
    "estimated": lambda sums: sums.estimated,
    "cost_usd": lambda sums: money(sums.cost_picos),
}
_BASELINE: Mapping[str, _Cell] = {
    "list_cost_usd": lambda sums: money(sums.list_cost_picos),
    "saved_usd": lambda sums: money(_saved(sums)),
    "saved_percent": saved_percent,
}


def _columns(baseline: bool) -> Mapping[str, _Cell]:
    return {**_COLUMNS, **_BASELINE} if baseline else _COLUMNS


def documents(rows: Iterable[Line], by: Sequence[str], *, baseline: bool) -> list[dict[str, object]]:
    """For JSON: counts are numbers, money and percentages exact decimals as text."""
    columns = _columns(baseline)
    return [
        {**dict(zip(by, row.keys, strict=True)), **{name: cell(row.sums) for name, cell in columns.items()}}
        for row in rows
    ]


def as_csv(rows: Iterable[Line], by: Sequence[str], *, baseline: bool) -> str:
    """With a line of names; what a spreadsheet would take for a formula is kept from it by a quote."""
    columns = _columns(baseline)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*by, *columns])
    for row in rows:
        writer.writerow([*map(_harmless, row.keys), *(cell(row.sums) for cell in columns.values())])
    return out.getvalue()


def _harmless(text: str) -> str:
    # A JWT's subject is chosen by somebody else (OWASP, "CSV Injection").
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


# ── a table ─────────────────────────────────────────────────────────────────────────────────────────────


def table(rows: Sequence[Line], by: Sequence[str], whole: Sums, *, baseline: bool) -> str:
    """With a total line. Columns that are zero everywhere are left out where they are only warnings."""
    columns = {
        name: cell
        for name, cell in _columns(baseline).items()
        if name not in ("cached_tokens", "unknown", "unpriced", "estimated") or cell(whole)
    }
    heads = [*by, *(_head(name) for name in columns)]
    body = [[*(key or "-" for key in row.keys), *_shown(columns, row.sums)] for row in rows]
    foot = [*("total" if at == 0 else "" for at in range(len(by))), *_shown(columns, whole)]
    widths = [max(map(len, column)) for column in zip(heads, *body, foot, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    made = [_aligned(row, widths, len(by)) for row in (heads, *body, foot)]
    return "\n".join([made[0], rule, *made[1:-1], *([rule] if body else []), made[-1]])


def _head(name: str) -> str:
    """Short: a table with everything has to fit a terminal."""
    short = name.removesuffix("_tokens").replace("list_cost", "list")
    return short.replace("_usd", " USD").replace("_percent", " %")


def _shown(columns: Mapping[str, _Cell], sums: Sums) -> list[str]:
    return [_grouped(cell(sums)) for cell in columns.values()]


def _grouped(value: object) -> str:
    """Thousands are set apart; money keeps all its digits."""
    if isinstance(value, int):
        return f"{value:,}"
    whole, point, decimals = str(value).partition(".")
    return f"{int(whole):,}{point}{decimals}" if whole.lstrip("-") != "0" else str(value)


def _aligned(cells: Sequence[str], widths: Sequence[int], texts: int) -> str:
    """Names to the left, numbers to the right."""
    padded = [
        cell.ljust(width) if at < texts else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def notes(whole: Sums) -> list[str]:
    """What the cost does not hold, or holds as a guess."""
    parts = [
        (whole.unknown, "whose usage nobody reported: not in the cost"),
        (whole.unpriced, "of models without a price: not in the cost"),
        (whole.estimated, "with an estimated usage: in the cost"),
    ]
    return [f"{count:,} request{'s' * (count != 1)} {text}" for count, text in parts if count]


# ── a month ahead ───────────────────────────────────────────────────────────────────────────────────────


class Projection(msgspec.Struct, frozen=True):
    """What 30 days cost if they are like these. days: whole ones; 0: there is none yet."""

    picos: int
    days: int

    def text(self) -> str:
        basis = f"mean of {self.days} whole day{'s' * (self.days != 1)}" if self.days else "so far"
        day, month = (_grouped(_to_cents(picos)) for picos in (-(-self.picos // MONTH_DAYS), self.picos))
        return f"{day} USD a day ({basis}), {month} USD for {MONTH_DAYS} days"


def _to_cents(picos: int) -> str:
    return f"{Decimal(-(-picos // _PICOS_PER_CENT)).scaleb(-2):.2f}"


def projection(
    by_day: Mapping[int, int], since: float | None, until: float | None, now: float
) -> Projection | None:
    """by_day: day -> picodollars of the days with rows, of [since, until).

    Only whole days count: a morning would promise too little, and the first of the month too much. Without
    one, what there is stands for one day (for as many as there are, if the period is longer than one).
    A day without rows after the first one counts as well.
    """
    if not by_day:
        return None
    begin = max(min(by_day) * _DAY_S, since or 0)
    end = now if until is None else min(until, now)
    first, last = -int(-begin // _DAY_S), int(end // _DAY_S)  # whole days: [first, last)
    if last > first:
        spent = sum(picos for day, picos in by_day.items() if first <= day < last)
        return Projection(spent * MONTH_DAYS // (last - first), last - first)
    length = max(Fraction(1), Fraction(end - begin) / _DAY_S)
    return Projection(int(sum(by_day.values()) * MONTH_DAYS / length), 0)
