"""The ledger's table in its SQLite file, for the one that writes it: schema, rows, deletion of old ones.

WAL, so that readers (`headrace usage`, another generation) never wait for the writer. `synchronous = FULL`:
what is committed survives a power cut; at 20 commits a second its fsync costs a thread's time, not a
request's.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path

import msgspec

from proxy import sqlitefile
from proxy.errors import StartError
from proxy.ledger_row import Row, first_id

#: Of our table. `PRAGMA user_version` is one number for the whole file; the key store, which may live in it
#: too, keeps its version in a table.
VERSION = 1
#: Seconds that one attempt waits for another writer (the key store, another generation).
_BUSY_S = 1.0
#: What the -wal file shrinks to after a checkpoint that a long reader has held up.
_WAL_BYTES = 64 * 2**20

_COLUMNS = """
    id TEXT NOT NULL PRIMARY KEY, started_at REAL NOT NULL, ended_at REAL NOT NULL,
    request_id TEXT NOT NULL, key_id TEXT NOT NULL, caller TEXT NOT NULL, plan TEXT NOT NULL,
    route TEXT NOT NULL, model TEXT NOT NULL, upstream TEXT NOT NULL,
    status INTEGER NOT NULL, reason TEXT NOT NULL, attempts INTEGER NOT NULL, stream INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, reasoning_tokens INTEGER NOT NULL, usage_source TEXT NOT NULL,
    cost_picos INTEGER, list_cost_picos INTEGER"""
# For a caller's own usage: an entry holds the id as well, so a time range of one caller is a range of it.
_INDEX = "CREATE INDEX ledger_by_caller ON ledger (caller)"
_ROW = f"({', '.join('?' * len(Row.__struct_fields__))})"
_INSERT = f"INSERT OR IGNORE INTO ledger VALUES {_ROW}"  # noqa: S608 - column marks only
#: Rows that one statement takes (old SQLites stop at 999 marks). The interpreter's lock is let go and fetched
#: again for each statement, which beside a busy loop costs half as much as the row itself (measured: 14 us a
#: row alone, 9 in sixteens).
_AT_ONCE = 16
_INSERT_MANY = f"INSERT OR IGNORE INTO ledger VALUES {', '.join([_ROW] * _AT_ONCE)}"  # noqa: S608 - the same
_DELETE = "DELETE FROM ledger WHERE id IN (SELECT id FROM ledger WHERE id < ? ORDER BY id LIMIT ?)"

#: What a row can have wrong that its neighbours have not.
_ROW_ERRORS = (
    OverflowError,
    ValueError,
    sqlite3.IntegrityError,
    sqlite3.DataError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)
#: What a later attempt may find mended, at start too: somebody makes room, or ends a transaction.
_PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_PASSING_OS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EFBIG)


class NewerLedger(Exception):
    """The file was made by a Headrace that knows more than this one."""

    def __init__(self, version: int) -> None:
        super().__init__(
            f"it was made by a newer Headrace (ledger of version {version}, this one knows {VERSION})"
        )


class LedgerFile:
    """An open connection; belongs to one thread."""

    def __init__(self, path: Path) -> None:
        """Opens the file, made with its table if it is not there. Raises OSError, sqlite3.Error,
        NewerLedger."""
        self.path = path
        sqlitefile.create_private(path)
        self._connection = sqlite3.connect(
            sqlitefile.uri(path, "mode=rw"), uri=True, timeout=_BUSY_S, isolation_level=None
        )
        try:
            sqlitefile.switch_to_wal(self._connection, _BUSY_S)
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
            self._make_table()
            self._file = os.stat(path)
        except BaseException:
            self.close()
            raise

    def _make_table(self) -> None:
        with self._transaction() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise NewerLedger(version)
            if version == 0:
                connection.execute(f"CREATE TABLE ledger ({_COLUMNS}) WITHOUT ROWID")
                connection.execute(_INDEX)
                connection.execute(f"PRAGMA user_version = {VERSION}")

    def was_replaced(self) -> bool:
        """Somebody has moved or deleted the file: what is written now would be in none."""
        try:
            return not os.path.samestat(os.stat(self.path), self._file)
        except OSError:
            return True

    def insert(self, rows: Sequence[Row]) -> int:
        """Writes rows, each once however often it comes. Returns how many no database could hold; raises
        sqlite3.Error, and then none is written."""
        values = [msgspec.structs.astuple(row) for row in rows]
        packed = len(values) - len(values) % _AT_ONCE
        packs = [list(chain.from_iterable(values[at : at + _AT_ONCE])) for at in range(0, packed, _AT_ONCE)]
        try:
            with self._transaction() as connection:
                connection.executemany(_INSERT_MANY, packs)
                connection.executemany(_INSERT, values[packed:])
            return 0
        except _ROW_ERRORS:
            return self._insert_one_by_one(values)

    def _insert_one_by_one(self, values: Sequence[tuple[object, ...]]) -> int:
        spoiled = 0
        with self._transaction() as connection:
            for value in values:
                try:
                    connection.execute(_INSERT, value)
                except _ROW_ERRORS:
                    spoiled += 1
        return spoiled

    def delete_before(self, moment: float, most: int) -> int:
        """How many rows of requests that started before were deleted."""
        with self._transaction() as connection:
            return connection.execute(_DELETE, (first_id(moment), most)).rowcount

    def close(self) -> None:
        self._connection.close()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._connection)


class _Transaction:
    """All or nothing. IMMEDIATE: one that reads first and writes later would fail instead of waiting."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> sqlite3.Connection:
        self._connection.execute("BEGIN IMMEDIATE")
        return self._connection

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._connection.execute("COMMIT")
        elif self._connection.in_transaction:  # a full disk ends it by itself
            self._connection.execute("ROLLBACK")


def check(path: Path) -> Exception | None:
    """Makes the file ready, or returns what may pass by itself (a full disk, a lock). Raises StartError for
    what somebody has to mend."""
    try:
        with closing(LedgerFile(path)):
            return None
    except NewerLedger as newer:
        raise StartError(f"ledger.database: {path}: {newer}: upgrade, or name another file") from None
    except OSError as error:
        if error.errno in _PASSING_OS:
            return error
        raise StartError(_explain_os(path, error)) from None
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # extended codes keep the plain one below
        if code in _PASSING:
            return error
        raise StartError(_explain(path, error, code)) from None


def _explain_os(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"ledger.database: the folder {path.parent} does not exist: make it, or name another file"
    return (
        f"ledger.database: {path} cannot be made ({error.strerror}): make its folder writable, "
        "or name another file"
    )


def _explain(path: Path, error: sqlite3.Error, code: int) -> str:
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return f"ledger.database: {path} is damaged or no SQLite database: move it away, or name another file"
    return (
        f"ledger.database: {path} cannot be used ({error}): make it and its folder writable, "
        "or name another file"
    )
