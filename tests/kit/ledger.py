"""Rows for a ledger, and what is in one."""

from __future__ import annotations

import itertools
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

from proxy.ledger import Ledger
from proxy.ledger_row import UNIQUE_BYTES, Row, row_id

_numbers = itertools.count(1)


def row(started_at: float | None = None, **fields: Any) -> Row:
    """A finished request for 10 + 5 tokens; fields override."""
    at = time.time() if started_at is None else started_at
    values = {
        "id": row_id(at, int.from_bytes(os.urandom(UNIQUE_BYTES), "big")),
        "started_at": at,
        "ended_at": at + 0.5,
        "request_id": f"req_{next(_numbers)}",
        "key_id": "a",
        "caller": "key:a",
        "plan": "pro",
        "route": "/v1/chat/completions",
        "model": "m",
        "upstream": "up",
        "status": 200,
        "reason": "complete",
        "attempts": 1,
        "stream": True,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 5,
        "reasoning_tokens": 1,
        "usage_source": "reported",
        "cost_picos": 7_000,
        "list_cost_picos": 10_000,
    }
    return Row(**{**values, **fields})


def unknown(started_at: float | None = None, **fields: Any) -> Row:
    """A request whose usage nobody knows."""
    counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens"), 0)
    costs = {"cost_picos": None, "list_cost_picos": None}
    return row(started_at, usage_source="unknown", **{**counts, **costs, **fields})


def written(path: Path) -> list[Row]:
    """All rows in the file, by id."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as connection:
        found = connection.execute("SELECT * FROM ledger ORDER BY id").fetchall()
    assert all(value[13] in (0, 1) for value in found)
    return [Row(*value[:13], bool(value[13]), *value[14:]) for value in found]


def by_id(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda each: each.id)


@asynccontextmanager
async def opened(path: Path, keep_days: int = 400, **options: Any) -> AsyncIterator[Ledger]:
    """A running ledger."""
    ledger = Ledger(path, keep_days, **options)
    await ledger.start()
    try:
        yield ledger
    finally:
        await ledger.close()
