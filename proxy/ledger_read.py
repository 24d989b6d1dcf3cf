"""Questions to ledger files: sums of tokens and money, exact.

Everything here opens its own read-only connection and may take long: it runs in a thread or in a command.
Readers of a WAL database wait for nobody, and nobody for them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from proxy import sqlitefile
from proxy.errors import OperationError
from proxy.ledger_file import VERSION
from proxy.ledger_row import Row, Spent, first_id

_BUSY_S = 5.0
_DAY_S = 86400
#: SQLite's own sum fails past 64 bits, 9.2 million USD in picodollars: the halves of a number do not.
_HALF = 10**9

#: What rows can be grouped by -> its expression.
GROUPS = {
    "key": "key_id",
    "plan": "plan",
    "model": "model",
    "upstream": "upstream",
    "route": "route",
    "day": f"CAST(started_at / {_DAY_S} AS INTEGER)",
}
_KNOWN = "usage_source <> 'unknown'"
_COUNTED = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")


class LedgerFailed(OperationError):
    """A ledger cannot be read now; the text names the file."""


class Sums(msgspec.Struct):
    """Of some rows. Money is picodollars.

    unknown: requests whose usage nobody knows. unpriced: usage is known, the model has no price. Neither is
    in the cost. estimated: in it, by an estimate. list_cost_picos: of what is in the cost, by list prices; a
    model without one counts with its price, so that no saving is claimed for it.
    """

    requests: int = 0
    estimated: int = 0
    unknown: int = 0
    unpriced: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cost_picos: int = 0
    list_cost_picos: int = 0

    def add(self, other: Sums) -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Group(msgspec.Struct, frozen=True):
    """keys: in the order that was asked for; a day is a number since 1970-01-01 (UTC)."""

    keys: tuple[str | int, ...]
    sums: Sums


class Spending(msgspec.Struct, frozen=True):
    """What a caller has spent on a plan in the running day and month."""

    caller: str
    plan: str
    day_picos: int
    month_picos: int


def grouped(
    paths: Sequence[Path], by: Sequence[str], since: float | None, until: float | None
) -> list[Group]:
    """Sums of the requests that started in [since, until), by these of `GROUPS`. A row that is in several
    files is counted once. Raises LedgerFailed."""
    found: dict[tuple[str | int, ...], Sums] = {}
    # The merge is by ids that were seen, and not by one query over all: SQLite attaches ten files at most.
    with closing(sqlite3.connect(":memory:", uri=True, timeout=_BUSY_S)) as connection:
        connection.execute("CREATE TEMP TABLE seen (id TEXT PRIMARY KEY) WITHOUT ROWID")
        for path in paths:
            with _explained(path), _attached(connection, path):
                if _has_ledger(connection, path):
                    _collect(connection, by, _bounds(since, until), found, merge=len(paths) > 1)
    return [Group(keys, found[keys]) for keys in sorted(found)]


def usage_of(path: Path, caller: str, since: float, pending: Iterable[Row]) -> Spent:
    """Of one caller, in requests that started at `since` or later: what is in the file, and of these rows
    those that are not. Raises LedgerFailed."""
    sums = Sums()
    waiting = {row.id: row for row in pending if row.caller == caller and row.started_at >= since}
    if path.exists():
        with _opened(path) as connection:
            if _has_ledger(connection, path):
                where = "caller = ? AND id >= ?"
                sums = _sums(next(_select(connection, (), where, (caller, first_id(since))))[1])
                for row_id in list(waiting):
                    if connection.execute("SELECT 1 FROM f.ledger WHERE id = ?", (row_id,)).fetchone():
                        del waiting[row_id]
    for row in waiting.values():
        sums.add(_sums_of(row))
    return Spent(
        sums.requests,
        sums.prompt_tokens,
        sums.cached_tokens,
        sums.completion_tokens,
        sums.unknown,
        sums.cost_picos,
    )


def spending(path: Path, day: float, month: float) -> list[Spending]:
    """What every caller has spent since `day` and since `month` (when these began), for budgets that have
    just been started; with a month's rows this takes a second for each million. Raises LedgerFailed."""
    if not path.exists():
        return []
    with _opened(path) as connection:
        if not _has_ledger(connection, path):
            return []
        today = "CASE WHEN id >= ? THEN cost_picos ELSE 0 END"
        query = (
            f"SELECT caller, plan, {_halves(today)}, {_halves('cost_picos')} FROM f.ledger"  # noqa: S608 - ours
            " WHERE id >= ? AND caller <> '' AND cost_picos IS NOT NULL GROUP BY caller, plan"
        )
        first = first_id(day)
        rows = connection.execute(query, (first, first, first_id(min(day, month))))
        return [Spending(row[0], row[1], _whole(row[2:4]), _whole(row[4:6])) for row in rows]


# ── inside ──────────────────────────────────────────────────────────────────────────────────────────────


def _halves(expression: str) -> str:
    return f"coalesce(sum(({expression}) / {_HALF}), 0), coalesce(sum(({expression}) % {_HALF}), 0)"


def _whole(halves: Sequence[int]) -> int:
    high, low = halves
    return high * _HALF + low


_COST = "coalesce(cost_picos, 0)"
_LIST_COST = "CASE WHEN cost_picos IS NULL THEN 0 ELSE coalesce(list_cost_picos, cost_picos) END"
_AMOUNTS = (*(f"CASE WHEN {_KNOWN} THEN {name} ELSE 0 END" for name in _COUNTED), _COST, _LIST_COST)
_COUNTS = (
    "count(*)",
    "coalesce(sum(usage_source = 'estimated'), 0)",
    f"coalesce(sum(NOT {_KNOWN}), 0)",
    f"coalesce(sum({_KNOWN} AND cost_picos IS NULL), 0)",
)


def _select(
    connection: sqlite3.Connection, by: Sequence[str], where: str, values: Sequence[str]
) -> Iterator[tuple[tuple[str | int, ...], list[int]]]:
    """Keys and what `_sums` takes. Without keys always one."""
    columns = ", ".join([*(GROUPS[name] for name in by), *_COUNTS, *map(_halves, _AMOUNTS)])
    grouping = f" GROUP BY {', '.join(str(at + 1) for at in range(len(by)))}" if by else ""
    query = f"SELECT {columns} FROM f.ledger WHERE {where}{grouping}"  # noqa: S608 - of our own words
    for row in connection.execute(query, tuple(values)):
        yield tuple(row[: len(by)]), list(row[len(by) :])


def _sums(numbers: Sequence[int]) -> Sums:
    counts, amounts = numbers[: len(_COUNTS)], numbers[len(_COUNTS) :]
    return Sums(*counts, *(_whole(amounts[at : at + 2]) for at in range(0, len(amounts), 2)))


def _sums_of(row: Row) -> Sums:
    known, cost = row.usage_source != "unknown", row.cost_picos
    return Sums(
        requests=1,
        estimated=int(row.usage_source == "estimated"),
        unknown=int(not known),
        unpriced=int(known and cost is None),
        prompt_tokens=row.prompt_tokens if known else 0,
        cached_tokens=row.cached_tokens if known else 0,
        completion_tokens=row.completion_tokens if known else 0,
        reasoning_tokens=row.reasoning_tokens if known else 0,
        cost_picos=cost or 0,
    )


def _collect(
    connection: sqlite3.Connection,
    by: Sequence[str],
    bounds: tuple[str, list[str]],
    found: dict[tuple[str | int, ...], Sums],
    *,
    merge: bool,
) -> None:
    where, values = bounds
    unseen = f"{where} AND id NOT IN (SELECT id FROM temp.seen)" if merge else where  # noqa: S608 - ours
    for keys, numbers in _select(connection, by, unseen, values):
        sums = _sums(numbers)
        if sums.requests:
            found.setdefault(keys, Sums()).add(sums)
    if merge:
        with connection:
            query = f"INSERT OR IGNORE INTO temp.seen SELECT id FROM f.ledger WHERE {where}"  # noqa: S608 - ours
            connection.execute(query, values)


def _bounds(since: float | None, until: float | None) -> tuple[str, list[str]]:
    given = [("id >= ?", since), ("id < ?", until)]
    words = [(word, first_id(moment)) for word, moment in given if moment is not None]
    return " AND ".join(["1", *(word for word, _ in words)]), [value for _, value in words]


def _has_ledger(connection: sqlite3.Connection, path: Path) -> bool:
    """False: the key store lives there, and no ledger yet. Raises LedgerFailed for a newer one."""
    (version,) = connection.execute("PRAGMA f.user_version").fetchone()
    if version > VERSION:
        raise LedgerFailed(f"{path} was made by a newer Headrace: upgrade this one")
    return bool(version)


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with (
        _explained(path),
        closing(sqlite3.connect(":memory:", uri=True, timeout=_BUSY_S, isolation_level=None)) as connection,
        _attached(connection, path),
    ):
        connection.execute("BEGIN")  # all questions see one moment
        yield connection
        connection.execute("COMMIT")


@contextmanager
def _attached(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    """The file as schema `f`."""
    for options in ("mode=ro", "mode=ro&immutable=1"):
        connection.execute("ATTACH ? AS f", (sqlitefile.uri(path, options),))
        try:
            connection.execute("SELECT 1 FROM f.sqlite_master").fetchone()
            break
        except sqlite3.OperationalError:
            connection.execute("DETACH f")
            # A copy in a folder that cannot be written: SQLite wants to make its -shm file there. Without a
            # -wal file all that there is is in the file itself, and nobody changes it.
            if "immutable" in options or not path.exists() or Path(f"{path}-wal").exists():
                raise
    try:
        yield
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        connection.execute("DETACH f")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        if not path.exists():
            raise LedgerFailed(f"there is no ledger at {path}: `headrace serve` makes it") from None
        raise LedgerFailed(f"{path} cannot be read: {error}") from error
