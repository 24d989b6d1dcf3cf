"""What a key store is, whatever it is made of.

Every verb is atomic and may be called from several processes at once. A verb that fails raises KeyStoreFailed
and may or may not have happened. Records are never deleted: revoking marks them.

`changes` is how a cache follows a store at the cost of a glance. Every write takes the next revision; a
cursor says how far somebody has read, and of which store: a database that was replaced, restored or emptied
has another epoch or an earlier revision, and is then read from its beginning.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Protocol

import msgspec

from proxy.errors import OperationError
from proxy.identity import KeyRecord


class KeyStoreFailed(OperationError):
    """The store cannot be read or written now; the text names it without its password."""


class IdTaken(Exception):
    """There is a key with this id: mint another."""


class Cursor(msgspec.Struct, frozen=True):
    """How far a reader has come."""

    epoch: str = ""
    revision: int = 0


class Changes(msgspec.Struct, frozen=True):
    """records: those written since the cursor; with `whole` all there are, and what is not here is gone."""

    records: list[KeyRecord]
    cursor: Cursor
    whole: bool


class NewSecret(msgspec.Struct, frozen=True):
    """What replaces a secret."""

    digest: bytes
    pepper_id: str


class KeyStore(Protocol):
    """Times are seconds of the wall clock. All verbs raise KeyStoreFailed."""

    async def prepare(self) -> None:
        """Makes the store where there is none. Raises StartError: it cannot be used at all."""

    async def create(self, record: KeyRecord) -> None:
        """Raises IdTaken."""

    async def list_all(self) -> list[KeyRecord]:
        """The oldest first."""

    async def get(self, key_id: str) -> KeyRecord | None: ...

    async def revoke(self, key_id: str, now: float) -> KeyRecord | None:
        """The record as it is now; a second time keeps the first time's date. None: unknown."""

    async def rotate(self, key_id: str, secret: NewSecret) -> KeyRecord | None:
        """The record as it is now: a revoked one is unchanged. None: unknown."""

    async def changes(self, since: Cursor) -> Changes: ...

    async def close(self) -> None: ...


def in_order(records: list[KeyRecord]) -> list[KeyRecord]:
    return sorted(records, key=lambda record: (record.created_at, record.id))


def revoked(record: KeyRecord, now: float) -> KeyRecord:
    if record.revoked_at is not None:
        return record
    return msgspec.structs.replace(record, revoked_at=now)


def rotated(record: KeyRecord, secret: NewSecret) -> KeyRecord:
    if record.revoked_at is not None:
        return record
    return msgspec.structs.replace(record, digest=secret.digest, pepper_id=secret.pepper_id)


def encode(record: KeyRecord) -> bytes:
    """As JSON; decimals are strings, so money stays exact."""
    return msgspec.json.encode(record)


def decode(raw: bytes | str) -> KeyRecord:
    """Raises msgspec.MsgspecError. Fields that a later version has added are passed over."""
    return msgspec.json.decode(raw, type=KeyRecord)


def decimal_text(value: Decimal | None) -> str | None:
    return None if value is None else format(value, "f")
