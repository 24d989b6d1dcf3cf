"""What `headrace keys …` does, and /admin/keys with it.

The verbs take what people write, and give records; `document` is a record as JSON, `table` and `describe` as
text. Nothing here ever shows a digest, and a secret only from the verb that made it. Every mistake is an
OperationError of one line.

Times are seconds of the wall clock; those in documents are ISO 8601 in UTC.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

import msgspec

from proxy import identity
from proxy.errors import OperationError
from proxy.identity import KeyRecord
from proxy.key_order import KeyOrder, draft, id_of, known_plan
from proxy.keystore.base import IdTaken, KeyStore, NewSecret, decimal_text
from proxy.yamlstruct import show as shown
from proxy.yamlstruct import suggest


class UnknownKey(OperationError):
    """No key has this id."""


# ── the verbs ───────────────────────────────────────────────────────────────────────────────────────────


async def create(
    store: KeyStore, pepper: bytes, plans: Iterable[str], order: KeyOrder, now: float
) -> tuple[KeyRecord, str]:
    """The new key, and the text that its owner sends: shown this once, and nowhere to be found again.

    Raises:
        OperationError: something in the order is wrong, or the store fails.
    """
    wanted = draft(order, known_plan(order.plan, plans), now)
    while True:
        key_id = identity.mint_id(secrets.token_bytes)
        secret = identity.mint_secret(secrets.token_bytes)
        fresh = _hashed(pepper, secret)
        record = msgspec.structs.replace(wanted, id=key_id, digest=fresh.digest, pepper_id=fresh.pepper_id)
        try:
            await store.create(record)
        except IdTaken:
            continue
        return record, identity.key_text(key_id, secret)


async def show(store: KeyStore, key_id: str) -> KeyRecord:
    """Raises UnknownKey."""
    key_id = id_of(key_id)
    return await store.get(key_id) or await _unknown(store, key_id)


async def revoke(store: KeyStore, key_id: str, now: float) -> KeyRecord:
    """The key stops working everywhere within 1 s; a second time changes nothing. Raises UnknownKey."""
    key_id = id_of(key_id)
    return await store.revoke(key_id, now) or await _unknown(store, key_id)


async def rotate(store: KeyStore, pepper: bytes, key_id: str, now: float) -> tuple[KeyRecord, str]:
    """The same key with another secret; the old one stops working everywhere within 1 s.

    Raises:
        UnknownKey: no key has this id.
        OperationError: the key is revoked or has expired.
    """
    record = await show(store, key_id)
    if record.is_live(now):
        secret = identity.mint_secret(secrets.token_bytes)
        record = await store.rotate(record.id, _hashed(pepper, secret)) or await _unknown(store, record.id)
    if not record.is_live(now):  # looked at again: it may have been revoked in between
        raise OperationError(f"the key {record.id} is {_state(record, now)}: create a new one")
    return record, identity.key_text(record.id, secret)


def _hashed(pepper: bytes, secret: str) -> NewSecret:
    return NewSecret(identity.digest(pepper, secret), identity.pepper_id(pepper))


async def _unknown(store: KeyStore, key_id: str) -> NoReturn:
    """Raises UnknownKey, with the nearest id that exists."""
    known = [record.id for record in await store.list_all()]
    raise UnknownKey(f"unknown key {shown(key_id)}{suggest(key_id, known)}")


# ── what people read ────────────────────────────────────────────────────────────────────────────────────


def document(record: KeyRecord, secret: str | None = None) -> dict[str, Any]:
    """A key as JSON; `secret` is the whole key text, only where it was made."""
    shape = {
        "id": record.id,
        "name": record.name,
        "plan": record.plan,
        "models": list(record.models),
        "expires": _moment(record.expires_at),
        "ip": list(record.ip),
        "budget_day": decimal_text(record.budget_day_usd),
        "budget_month": decimal_text(record.budget_month_usd),
        "created": _moment(record.created_at),
        "revoked": _moment(record.revoked_at),
    }
    return shape if secret is None else {**shape, "secret": secret}


def describe(record: KeyRecord, secret: str | None = None) -> str:
    """A key as lines of text; a secret stands alone on the last one."""
    rows = [
        (name, ", ".join(value) if isinstance(value, list) else value)
        for name, value in document(record).items()
    ]
    lines = [f"{name.replace('_', ' '):<13} {value or '-'}" for name, value in rows]
    if secret is not None:
        lines += ["Keep the secret now: it cannot be shown again.", secret]
    return "\n".join(lines)


def table(records: Sequence[KeyRecord], now: float) -> str:
    """All keys, a line each."""
    if not records:
        return "no keys yet: headrace keys create --name NAME"
    rows: list[tuple[str, ...]] = [
        ("ID", "NAME", "PLAN", "STATE", "EXPIRES", "MODELS", "IP", "DAY USD", "MONTH USD")
    ]
    rows += [_row(record, now) for record in records]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(record: KeyRecord, now: float) -> tuple[str, ...]:
    return (
        record.id,
        record.name,
        record.plan,
        _state(record, now),
        (_moment(record.expires_at) or "never")[:16],
        ",".join(record.models) or "all",
        ",".join(record.ip) or "any",
        decimal_text(record.budget_day_usd) or "-",
        decimal_text(record.budget_month_usd) or "-",
    )


def _state(record: KeyRecord, now: float) -> str:
    if record.revoked_at is not None:
        return "revoked"
    return "live" if record.is_live(now) else "expired"


def _moment(at: float | None) -> str | None:
    """`2027-01-31T12:00:00.000Z`."""
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
