"""The key store of one machine: a SQLite database, perhaps the one that holds the ledger too.

Every verb opens a connection of its own in a thread (0.16 ms measured, with the query): nothing is shared
between threads or processes, and a database that was replaced is seen at the next glance. WAL, so that
readers never wait for a writer.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from proxy import sqlitefile
from proxy.errors import StartError
from proxy.identity import KeyRecord
from proxy.keystore.base import (
    Changes,
    Cursor,
    IdTaken,
    KeyStoreFailed,
    NewSecret,
    decode,
    encode,
    in_order,
    revoked,
    rotated,
)

T = TypeVar("T")

#: Of our tables. `PRAGMA user_version` is one number for the whole file, and the ledger lives in it too.
_VERSION = 1
#: Seconds that a writer waits for other writers.
_BUSY_S = 5.0

# The record is JSON in one column: what nobody selects by needs no column, and a new field no migration. The
# revision is on the row, so that `changes` is a range of an index.
_STORE_TABLE = (
    "CREATE TABLE IF NOT EXISTS key_store (one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER NOT NULL,"
    " epoch TEXT NOT NULL)"
)
_KEYS_TABLE = (
    "CREATE TABLE IF NOT EXISTS api_keys (id TEXT PRIMARY KEY, revision INTEGER NOT NULL UNIQUE,"
    " record TEXT NOT NULL) WITHOUT ROWID"
)


class SqliteKeys:
    """A KeyStore in a file."""

    def __init__(self, path: Path) -> None:
        """A relative path is relative to the working directory of this moment."""
        self.path = sqlitefile.path_of(str(path))
        self._uri = sqlitefile.uri(self.path, "mode=rw")

    async def prepare(self) -> None:
        await asyncio.to_thread(self._prepare)

    async def create(self, record: KeyRecord) -> None:
        await asyncio.to_thread(self._write, lambda connection: _insert(connection, record))

    async def list_all(self) -> list[KeyRecord]:
        return await asyncio.to_thread(self._read, _select_all)

    async def get(self, key_id: str) -> KeyRecord | None:
        return await asyncio.to_thread(self._read, lambda connection: _select(connection, key_id))

    async def revoke(self, key_id: str, now: float) -> KeyRecord | None:
        return await self._change(key_id, lambda record: revoked(record, now))

    async def rotate(self, key_id: str, secret: NewSecret) -> KeyRecord | None:
        return await self._change(key_id, lambda record: rotated(record, secret))

    async def changes(self, since: Cursor) -> Changes:
        return await asyncio.to_thread(self._read, lambda connection: _changes(connection, since))

    async def close(self) -> None:
        """Nothing is open."""

    async def _change(self, key_id: str, change: Callable[[KeyRecord], KeyRecord]) -> KeyRecord | None:
        return await asyncio.to_thread(self._write, lambda connection: _update(connection, key_id, change))

    # ── in a thread ─────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _connection(self, begin: str) -> Iterator[sqlite3.Connection]:
        """One transaction; an exception undoes it."""
        try:
            # isolation_level=None: transactions begin where we say, not where the module guesses.
            with closing(
                sqlite3.connect(self._uri, uri=True, timeout=_BUSY_S, isolation_level=None)
            ) as connection:
                connection.execute(begin)
                yield connection
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise KeyStoreFailed(f"auth.database: {self.path}: {error}") from error
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise KeyStoreFailed(f"auth.database: {self.path}: a record cannot be read") from error

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._connection("BEGIN") as connection:
            return work(connection)

    def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        # IMMEDIATE: a transaction that reads first and writes later would fail instead of waiting.
        with self._connection("BEGIN IMMEDIATE") as connection:
            return work(connection)

    def _prepare(self) -> None:
        self._create_file()
        try:
            self._switch_to_wal()
            with self._connection("BEGIN IMMEDIATE") as connection:
                version = _make_schema(connection)
        except (KeyStoreFailed, sqlite3.Error) as error:
            raise StartError(self._explain(error)) from error
        if version > _VERSION:
            raise StartError(
                f"auth.database: {self.path} was made by a newer Headrace (keys of version {version}, "
                f"this one knows {_VERSION}): upgrade, or name another file"
            )

    def _create_file(self) -> None:
        try:
            sqlitefile.create_private(self.path)
        except FileNotFoundError:
            raise StartError(
                f"auth.database: the folder {self.path.parent} does not exist: make it, or name another file"
            ) from None
        except OSError as error:
            raise StartError(
                f"auth.database: {self.path} cannot be made ({error.strerror}): "
                "make its folder writable, or name another file"
            ) from None

    def _switch_to_wal(self) -> None:
        with closing(sqlite3.connect(self._uri, uri=True, timeout=_BUSY_S)) as connection:
            sqlitefile.switch_to_wal(connection, _BUSY_S)

    def _explain(self, error: Exception) -> str:
        cause = error.__cause__ if isinstance(error, KeyStoreFailed) else error
        if getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
            return f"auth.database: {self.path} is no SQLite database: name another file"
        return (
            f"auth.database: {self.path} cannot be opened ({cause}): make it and its folder writable, "
            "or name another file"
        )


# ── inside a transaction ────────────────────────────────────────────────────────────────────────────────


def _make_schema(connection: sqlite3.Connection) -> int:
    """The version that is there; a newer one's tables are left alone."""
    connection.execute(_STORE_TABLE)
    row = (_VERSION, secrets.token_hex(8))
    connection.execute("INSERT OR IGNORE INTO key_store (one, version, epoch) VALUES (1, ?, ?)", row)
    version = int(connection.execute("SELECT version FROM key_store").fetchone()[0])
    if version <= _VERSION:
        connection.execute(_KEYS_TABLE)
    return version


def _revision(connection: sqlite3.Connection) -> int:
    """Of the newest write: no row is ever deleted, so this never goes back."""
    return int(connection.execute("SELECT coalesce(max(revision), 0) FROM api_keys").fetchone()[0])


def _insert(connection: sqlite3.Connection, record: KeyRecord) -> None:
    row = (record.id, _revision(connection) + 1, encode(record).decode())
    try:
        connection.execute("INSERT INTO api_keys (id, revision, record) VALUES (?, ?, ?)", row)
    except sqlite3.IntegrityError as error:
        raise IdTaken(record.id) from error


def _update(
    connection: sqlite3.Connection, key_id: str, change: Callable[[KeyRecord], KeyRecord]
) -> KeyRecord | None:
    record = _select(connection, key_id)
    if record is None:
        return None
    changed = change(record)
    row = (encode(changed).decode(), _revision(connection) + 1, key_id)
    connection.execute("UPDATE api_keys SET record = ?, revision = ? WHERE id = ?", row)
    return changed


def _select(connection: sqlite3.Connection, key_id: str) -> KeyRecord | None:
    row = connection.execute("SELECT record FROM api_keys WHERE id = ?", (key_id,)).fetchone()
    return None if row is None else decode(row[0])


def _select_all(connection: sqlite3.Connection) -> list[KeyRecord]:
    return in_order([decode(row[0]) for row in connection.execute("SELECT record FROM api_keys")])


def _changes(connection: sqlite3.Connection, since: Cursor) -> Changes:
    epoch = str(connection.execute("SELECT epoch FROM key_store").fetchone()[0])
    revision = _revision(connection)
    whole = since.epoch != epoch or since.revision > revision
    rows = connection.execute(
        "SELECT record FROM api_keys WHERE revision > ?", (0 if whole else since.revision,)
    )
    return Changes([decode(row[0]) for row in rows], Cursor(epoch, revision), whole)
