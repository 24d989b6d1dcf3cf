"""The keys that a process knows: all of the store's, in memory, never more than half a second old.

A request looks into a dict. A background task asks the store for its changes; while the store fails, the last
good answer stays, so callers do not notice, and a revocation waits for the store to come back.
"""

from __future__ import annotations

import asyncio
import base64
import os
import secrets
from pathlib import Path

import structlog

from proxy import tasks
from proxy.errors import StartError
from proxy.identity import KeyRecord
from proxy.keystore import sqlite_path
from proxy.keystore.base import Changes, Cursor, KeyStore, KeyStoreFailed

#: Seconds between two looks at the changes: a revocation is promised everywhere within 1 s.
POLL_S = 0.4
_PEPPER_BYTES = 32


class KeyCache:
    """`get` is the hot path; `start` and `close` bracket the life of the process."""

    def __init__(self, store: KeyStore, poll_s: float = POLL_S) -> None:
        self.store = store
        self.failing = False
        self._poll_s = poll_s
        self._records: dict[str, KeyRecord] = {}
        self._cursor = Cursor()
        self._looking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def get(self, key_id: str) -> KeyRecord | None:
        """The record, revoked and expired ones too."""
        return self._records.get(key_id)

    def __len__(self) -> int:
        return len(self._records)

    async def start(self) -> None:
        """Loads everything, then follows. Raises StartError: the store cannot be read."""
        await self.store.prepare()
        try:
            await self.refresh()
        except KeyStoreFailed as failure:
            raise StartError(str(failure)) from failure
        self._task = tasks.spawn(self._follow(), "key changes")

    async def close(self) -> None:
        """Ends the following, then the store's connections."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self.store.close()

    async def refresh(self) -> None:
        """Learns at once what has changed. Raises KeyStoreFailed."""
        async with self._looking:
            self._take(await self.store.changes(self._cursor))

    def foreign(self, pepper_id: str, now: float) -> int:
        """How many live keys were hashed with another pepper, so that nobody can use them."""
        return sum(record.pepper_id != pepper_id and record.is_live(now) for record in self._records.values())

    def _take(self, changes: Changes) -> None:
        fresh = {record.id: record for record in changes.records}
        if changes.whole:
            self._records = fresh
        else:
            self._records.update(fresh)
        self._cursor = changes.cursor

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self.refresh()
            except Exception as error:  # whatever it is: if this ended, no revocation would ever arrive
                self._note(error)
            else:
                self._note(None)

    def _note(self, error: Exception | None) -> None:
        """One line for each change of state, not for each look."""
        if (error is not None) == self.failing:
            return
        self.failing = error is not None
        log = structlog.get_logger()
        if error is None:
            log.info("key_store_recovered", keys=len(self._records))
        else:
            why = str(error) if isinstance(error, KeyStoreFailed) else type(error).__name__
            log.error("key_store_failed", why=why)


# ── the pepper ──────────────────────────────────────────────────────────────────────────────────────────


def load_pepper(configured: str | None, database_url: str) -> bytes:
    """What keys are hashed with: `auth.pepper`, else the file beside the database, made if it is not there.

    Raises:
        StartError: there is none and no place for one, or the file is not what was written into it.
    """
    if configured:
        return configured.encode()
    database = sqlite_path(database_url)
    if database is None:
        raise StartError(
            "auth.pepper: is missing: keys in Redis need one that all machines share (32 random bytes: "
            "openssl rand -base64 32)"
        )
    path = database.with_name(database.name + ".pepper")
    try:
        if not path.exists():
            _make_pepper(path)
        return _read_pepper(path)
    except FileNotFoundError:
        raise StartError(
            f"auth.database: the folder {path.parent.absolute()} does not exist: make it"
        ) from None
    except OSError as error:
        raise StartError(
            f"auth.pepper: {path} cannot be used ({error.strerror}): set auth.pepper, or mend its permissions"
        ) from None


def _make_pepper(path: Path) -> None:
    """Complete and on disk before it has its name, and a name is given once: of two processes that start
    together one wins, and both then read the same file."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(base64.b64encode(secrets.token_bytes(_PEPPER_BYTES)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink()


def _read_pepper(path: Path) -> bytes:
    try:
        pepper = base64.b64decode(path.read_bytes().strip(), validate=True)
    except ValueError:
        pepper = b""
    if len(pepper) != _PEPPER_BYTES:
        raise StartError(
            f"auth.pepper: {path} is damaged: restore it from a backup; without it no key made so far works"
        )
    return pepper
