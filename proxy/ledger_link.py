"""A worker's way to the ledger, which the supervisor writes.

A row leaves with the turn of the loop in which its request ended, or, if rows left less than 10 ms ago, with
the next ones then: `kill -9` of a worker loses its requests in flight and at most the rows of 10 ms. A row is
kept until the supervisor has said that it has it; what was not answered is sent again, and the id of a row
keeps it from being written twice.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import structlog

from proxy import ledger_read
from proxy.control import Channel, ControlError
from proxy.ledger_row import Row, RowSink, Spent
from proxy.tasks import spawn

#: The verb of a call: rows as msgpack, answered when they are in the supervisor's memory.
LEDGER = "ledger"
#: Rows that may wait here, for a supervisor that does not answer: about 10 MB.
_MOST_PENDING = 10_000
_BATCH = 500
_PACE_S = 0.01
#: Seconds until rows that were not taken are sent again: doubled from the first to the last.
_BACK_OFF_S = (0.05, 2.0)


class LedgerLink:
    """A RowSink. path: of the ledger's file, to read it."""

    def __init__(self, channel: Channel, path: Path, *, limit: int = _MOST_PENDING) -> None:
        self.added = 0
        self.dropped = 0
        self._channel = channel
        self._path = path
        self._limit = limit
        self._rows: deque[tuple[Row, bytes]] = deque()
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._sending = spawn(self._send_all(), "ledger rows")

    @property
    def pending(self) -> int:
        return len(self._rows)

    def add(self, row: Row) -> None:
        self.added += 1
        if len(self._rows) >= self._limit:
            self.dropped += 1
            return
        try:
            raw = msgspec.msgpack.encode(row)
        except (
            ValueError,
            OverflowError,
        ):  # half a surrogate pair in a name
            self.dropped += 1
            structlog.get_logger().error("ledger_rows_spoiled", rows=1)
            return
        self._rows.append((row, raw))
        self._wake.set()
        self._empty.clear()

    async def usage_of(self, caller: str, since: float) -> Spent:
        """What other workers have ended within the last tenth of a second may be missing."""
        pending = [row for row, _ in self._rows]
        return await asyncio.to_thread(ledger_read.usage_of, self._path, caller, since, pending)

    async def close(self, limit_s: float = 5.0) -> None:
        """Hands over what is left, for at most this long, and only as long as somebody could take it."""
        emptied = spawn(self._empty.wait(), "last ledger rows")
        ends: list[asyncio.Future[Any]] = [emptied, self._channel.closed]
        try:
            await asyncio.wait(ends, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            emptied.cancel()
            self._sending.cancel()
        if self._rows:
            self.dropped += len(self._rows)
            structlog.get_logger().error("ledger_rows_lost", rows=len(self._rows))

    async def _send_all(self) -> None:
        back_off_s = _BACK_OFF_S[0]
        while True:
            await self._wake.wait()
            if await self._send([raw for _, raw in islice(self._rows, _BATCH)]):
                back_off_s = _BACK_OFF_S[0]
                await asyncio.sleep(_PACE_S)
            else:
                await asyncio.sleep(back_off_s)
                back_off_s = min(2 * back_off_s, _BACK_OFF_S[1])

    async def _send(self, rows: list[bytes]) -> bool:
        try:
            await self._channel.call(LEDGER, rows)
        except ControlError:
            return False
        for _ in rows:
            self._rows.popleft()
        if not self._rows:
            self._wake.clear()
            self._empty.set()
        return True


def take(ledger: RowSink, payload: object) -> int:
    """The supervisor's end of `LEDGER`: how many rows it has taken. Raises msgspec.ValidationError."""
    rows = [msgspec.msgpack.decode(raw, type=Row) for raw in msgspec.convert(payload, list[bytes])]
    for row in rows:
        ledger.add(row)
    return len(rows)
