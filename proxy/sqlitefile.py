"""SQLite databases as files: made private, in WAL mode, and opened by a path that says what it means."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from urllib.parse import quote


def path_of(database: str) -> Path:
    """Of `sqlite:PATH` in the configuration. A relative path is relative to the working directory of this
    moment."""
    text = str(Path(database.removeprefix("sqlite:")).absolute())
    return Path("/" + text.lstrip("/"))  # `//x` would be a host in a file: URI


def uri(path: Path, options: str) -> str:
    """options: `mode=rw` (never makes a file), `mode=ro`, …"""
    return f"file:{quote(str(path))}?{options}"


def create_private(path: Path) -> None:
    """Mode 0600 from its first moment; an existing file is left as it is. Raises OSError.

    SQLite gives its -wal and -shm files the mode of the database. An existing file is not even opened:
    closing it would drop the locks that SQLite holds on it elsewhere in this process
    (sqlite.org/howtocorrupt.html section 2.2).
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return


def switch_to_wal(connection: sqlite3.Connection, busy_s: float) -> None:
    """Several processes may start at once, and this switch does not wait for others by itself."""
    deadline = time.monotonic() + busy_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
