"""API keys for tests: made in the store that the server under test reads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from proxy import key_commands
from proxy.key_order import KeyOrder
from proxy.keys import load_pepper
from proxy.keystore import opened

#: Plans that a key may name; a test writes into its configuration what is not shipped.
_NAMES = ("basic", "pro", "enterprise", "anonymous", "fast", "small")


def database(tmp_path: Path) -> str:
    return f"sqlite:{tmp_path / 'keys.db'}"


def auth_section(tmp_path: Path) -> dict[str, Any]:
    return {"mode": "required", "database": database(tmp_path)}


def bearer(key: str) -> str:
    """A header line."""
    return f"Authorization: Bearer {key}"


async def make_key(tmp_path: Path, *, now: float | None = None, **order: Any) -> str:
    """What the caller sends. A server that already runs learns of it within half a second."""
    wanted = KeyOrder(**{"name": "test", "plan": "enterprise", **order})
    url = database(tmp_path)
    async with opened(url) as store:
        _, text = await key_commands.create(
            store, load_pepper(None, url), _NAMES, wanted, time.time() if now is None else now
        )
    return text


async def revoke_key(tmp_path: Path, key: str) -> None:
    async with opened(database(tmp_path)) as store:
        await key_commands.revoke(store, key.split("_")[1], time.time())
