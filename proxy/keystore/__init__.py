"""API keys at rest: one signature, two stores."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from proxy.errors import StartError
from proxy.keystore.base import KeyStore
from proxy.keystore.redis import RedisKeys
from proxy.keystore.sqlite import SqliteKeys


def sqlite_path(url: str) -> Path | None:
    """Of `sqlite:PATH`; None: it is another kind of store."""
    return Path(url.removeprefix("sqlite:")) if url.startswith("sqlite:") else None


def open_store(url: str) -> KeyStore:
    """The store of `auth.database`, not yet prepared. Raises StartError: its client is not installed."""
    path = sqlite_path(url)
    if path is not None:
        return SqliteKeys(path)
    if url.startswith(("redis://", "rediss://")):
        return RedisKeys(url)
    raise StartError("auth.database: expected sqlite:PATH, redis://… or rediss://…")


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[KeyStore]:
    """A prepared store for a command. Raises StartError."""
    store = open_store(url)
    try:
        await store.prepare()
        yield store
    finally:
        await store.close()
