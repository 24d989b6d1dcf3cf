"""The ledger: one row a request, written by one thread.

A request hands its row over and goes on: a full, slow, locked or vanished database costs memory (bounded)
and then rows (counted), never a request. The thread writes what has gathered as soon as it can, and after
that every 50 ms: alone, a row is in the file a few milliseconds after its request; under load, `kill -9`
loses the rows of the last 50 ms. While the database cannot be written, up to `limit` rows wait; past it the
newest are dropped, so that what is missing is one stretch of time.

Rows have ids of their own: a row that comes twice (a worker was not sure, a commit failed after it was done)
is written once.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
import time
from collections import deque
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import structlog

from proxy import ledger_file, ledger_read
from proxy.ledger_file import LedgerFile, NewerLedger
from proxy.ledger_row import Row, Spent

#: Rows that may wait: about 45 MB. At 100 requests a second a database may be away for eight minutes.
_MOST_PENDING = 50_000
_BATCH = 500
#: Seconds between two commits: each is an fsync.
_PACE_S = 0.05
#: Seconds until the next attempt: doubled from the first to the last.
_BACK_OFF_S = (0.1, 5.0)
#: Old rows go in steps of some milliseconds, between two batches.
_DELETED_AT_ONCE = 500
_LOOK_FOR_OLD_EVERY_S = 3600.0
_DAY_S = 86400
#: How much longer than its bound `close` may take: one wait for a lock.
_LAST_WAIT_S = 1.5


class Ledger:
    """A RowSink. `keep_days` may be changed while it runs."""

    def __init__(self, path: Path, keep_days: int, *, limit: int = _MOST_PENDING) -> None:
        self.path = path
        self.keep_days = keep_days
        self.added = 0
        self._limit = limit
        self._rows: deque[Row] = deque()  # appended to by the loop, shortened by the thread alone
        self._refused = 0  # each counter has one writer
        self._spoiled = 0
        self._waiting = False  # the thread, for the first row
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._give_up_at = 0.0
        self._file: LedgerFile | None = None
        self._down = False
        self._refused_before = 0  # until the last batch that was written
        self._look_for_old_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # ── on the loop ──────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Makes the file ready. Raises StartError for what has to be mended by hand."""
        self._loop = asyncio.get_running_loop()
        passing = await asyncio.to_thread(ledger_file.check, self.path)
        if passing is not None:
            self._note_failure(passing)
        # A thread of its own and no executor: the interpreter waits at its end for an executor's threads,
        # and a disk that hangs would never let the process end.
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        return len(self._rows)

    @property
    def dropped(self) -> int:
        return self._refused + self._spoiled

    def add(self, row: Row) -> None:
        self.added += 1
        if len(self._rows) >= self._limit:
            self._refused += 1
            return
        self._rows.append(row)
        if self._waiting:
            self._waiting = False
            self._wake.put(None)

    async def usage_of(self, caller: str, since: float) -> Spent:
        return await asyncio.to_thread(self._usage_of, caller, since)

    def _usage_of(self, caller: str, since: float) -> Spent:
        # First what waits, then the file: a row that is written in between is found by its id.
        return ledger_read.usage_of(self.path, caller, since, list(self._rows))

    async def close(self, limit_s: float = 5.0) -> None:
        """Writes what waits, for at most about `limit_s` seconds; what is left then is lost, and counted."""
        self._give_up_at = time.monotonic() + limit_s
        self._closing.set()
        self._wake.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, limit_s + _LAST_WAIT_S)
        if lost := len(self._rows):
            self._refused += lost
            structlog.get_logger().error("ledger_rows_lost", rows=lost)

    # ── in the thread ────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        back_off_s = _BACK_OFF_S[0]
        while self._rows or not self._closing.is_set():
            began = time.monotonic()
            if not self._rows:
                self._delete_old()
                self._wait()
            elif self._write(list(islice(self._rows, _BATCH))):
                back_off_s = _BACK_OFF_S[0]
                if len(self._rows) < _BATCH:
                    self._delete_old()
                    self._closing.wait(began + _PACE_S - time.monotonic())
            elif self._closing.is_set():
                if time.monotonic() > self._give_up_at:
                    break
                time.sleep(_PACE_S)
            else:
                self._closing.wait(back_off_s)
                back_off_s = min(2 * back_off_s, _BACK_OFF_S[1])
        self._close_file()

    def _wait(self) -> None:
        self._waiting = True
        # A row may have come before anybody was said to be waiting.
        if not self._rows and not self._closing.is_set():
            try:
                self._wake.get(timeout=max(0.0, self._look_for_old_at - time.monotonic()))
            except queue.Empty:
                pass
        self._waiting = False

    def _write(self, rows: list[Row]) -> bool:
        try:
            spoiled = self._open().insert(rows)
        except Exception as error:  # whatever it is: a thread that has died writes nothing any more
            self._close_file()
            self._note_failure(error)
            return False
        for _ in rows:
            self._rows.popleft()
        self._note_success(spoiled)
        return True

    def _open(self) -> LedgerFile:
        if self._file is not None and self._file.was_replaced():
            self._close_file()
        if self._file is None:
            self._file = LedgerFile(self.path)
        return self._file

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except sqlite3.Error:
                pass  # it is not used again

    def _delete_old(self) -> None:
        """One step, if it is time for it."""
        if time.monotonic() < self._look_for_old_at:
            return
        try:
            oldest = time.time() - self.keep_days * _DAY_S
            deleted = self._open().delete_before(oldest, _DELETED_AT_ONCE)
        except (OSError, sqlite3.Error, NewerLedger):
            self._close_file()
            deleted = 0  # whoever wants to write says what is wrong
        more = deleted == _DELETED_AT_ONCE
        self._look_for_old_at = time.monotonic() + (_PACE_S if more else _LOOK_FOR_OLD_EVERY_S)

    # ── what an operator reads: one line an outage ───────────────────────────────────────────────────────

    def _note_failure(self, error: Exception) -> None:
        if not self._down:
            self._down = True
            self._log("error", "ledger_unavailable", database=str(self.path), why=str(error))

    def _note_success(self, spoiled: int) -> None:
        if spoiled:
            self._spoiled += spoiled
            self._log("error", "ledger_rows_spoiled", rows=spoiled)
        if self._down:
            self._down = False
            self._log("info", "ledger_available", dropped_rows=self._refused - self._refused_before)
        self._refused_before = self._refused

    def _log(self, level: str, event: str, **fields: Any) -> None:
        """The log belongs to the loop's thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(partial(_write_line, level, event, fields))
        except RuntimeError:
            pass  # the loop has ended, and its log with it


def _write_line(level: str, event: str, fields: dict[str, Any]) -> None:
    getattr(structlog.get_logger(), level)(event, **fields)
