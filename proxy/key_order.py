"""What people write to get a key, read strictly: durations, dates, money, networks, models, plans.

Every mistake is an OperationError of one line. Times are seconds of the wall clock.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from decimal import Decimal

import msgspec

from proxy.errors import OperationError
from proxy.identity import KeyRecord
from proxy.yamlstruct import show, suggest

DEFAULT_PLAN = "basic"
_LONGEST_S = 36500 * 86400.0
_MAX_NAME = 100
#: As long as a model's name in a request may be.
_MAX_MODEL = 128
_MAX_ENTRIES = 1000


class KeyOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A key that somebody asks for, as they write it: the flags of `keys create`, the body of POST
    /admin/keys. Lists may be text with commas; budgets are US dollars."""

    name: str
    plan: str = DEFAULT_PLAN
    models: str | list[str] | None = None
    expires: str | None = None
    ip: str | list[str] | None = None
    budget_day: str | int | float | None = None
    budget_month: str | int | float | None = None


def parse_order(body: object) -> KeyOrder:
    """A KeyOrder from decoded JSON. Raises OperationError."""
    if not isinstance(body, dict):
        raise OperationError("expected a JSON object")
    known = [field.name for field in msgspec.structs.fields(KeyOrder)]
    for key in body:
        if key not in known:
            raise OperationError(f"unknown field {show(key)}{suggest(str(key), known)}")
    try:
        return msgspec.convert(body, KeyOrder)
    except msgspec.ValidationError as error:
        # "Expected `str`, got `int` - at `$.name`"
        problem, _, place = str(error).replace("`", "").partition(" - at $.")
        raise OperationError(f"{place}: {problem}" if place else problem) from None


def id_of(text: str) -> str:
    """The id in what somebody pastes: an id, or a whole key that has leaked."""
    parts = text.strip().split("_", 2)
    return parts[1] if len(parts) > 1 and parts[0] == "hr" else parts[0]


def duration(what: str, text: str) -> float:
    """Seconds of `30d`, `24h`, `15m`, `90s`. Raises OperationError."""
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([smhdw])", text.strip())
    seconds = 0.0 if found is None else float(found[1]) * _UNITS[found[2]]
    if not 0 < seconds <= _LONGEST_S:
        raise OperationError(f"{what}: expected a duration like 30d, 24h, 15m or 90s, got {show(text)}")
    return seconds


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def expiry(text: str, now: float) -> float:
    """The time that is a duration from now, or a date: `30d`, `2027-01-31`, `2027-01-31T12:00:00Z`.

    A date without a time zone is UTC, one without a time of day is its first moment. Raises OperationError.
    """
    if not re.match(r"[0-9]{4}-", text.strip()):
        return round(now + duration("expires", text), 3)
    try:
        date = datetime.fromisoformat(text.strip())
        at = (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise OperationError(f"expires: expected 30d or 2027-01-31, got {show(text)}") from None
    if not now < at <= now + _LONGEST_S:
        raise OperationError(f"expires: {show(text)} is not in the future, or too far in it")
    return at


def money(what: str, amount: str | int | float) -> Decimal:
    """US dollars, exact to a millionth (the ledger's unit). Raises OperationError."""
    # repr of a float is the shortest text that means it: 0.1 from JSON stays 0.1.
    text = amount.strip() if isinstance(amount, str) else repr(amount)
    if isinstance(amount, bool) or not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?", text):
        raise OperationError(f"{what}: expected US dollars like 5 or 0.25, got {show(amount)}")
    return Decimal(text)


def networks(entries: Sequence[str]) -> tuple[str, ...]:
    """Addresses and networks, each as a network. Raises OperationError."""
    found = []
    for text in entries:
        try:
            found.append(str(ipaddress.ip_network(text)))
        except ValueError:
            raise OperationError(
                f"ip: expected an IP address or a network without host bits, got {show(text)}"
            ) from None
    return tuple(found)


def model_names(entries: Sequence[str]) -> tuple[str, ...]:
    """Names and patterns. Raises OperationError."""
    for text in entries:
        if len(text) > _MAX_MODEL or not text.isprintable():
            raise OperationError(
                f"models: expected names or patterns like gpt-4.1,claude-*, got {show(text)}"
            )
    return tuple(entries)


def known_plan(plan: str, plans: Iterable[str]) -> str:
    """Raises OperationError."""
    if plan not in (names := list(plans)):
        raise OperationError(f"unknown plan {show(plan)}{suggest(plan, names)}")
    return plan


def _entries(what: str, written: str | list[str] | None) -> list[str]:
    """No model's name in a list is cut at its comma; addresses have none, and a flag may be repeated."""
    if what == "ip" and isinstance(written, list):
        written = ",".join(written)
    parts = written.split(",") if isinstance(written, str) else written or []
    entries = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if len(entries) > _MAX_ENTRIES:
        raise OperationError(f"{what}: at most {_MAX_ENTRIES}")
    return entries


def draft(order: KeyOrder, plan: str, now: float) -> KeyRecord:
    """The record without id and secret."""
    name = order.name.strip()
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise OperationError(f"name: expected 1 to {_MAX_NAME} printable characters, got {show(order.name)}")
    return KeyRecord(
        id="",
        name=name,
        digest=b"",
        pepper_id="",
        plan=plan,
        created_at=round(now, 3),
        models=model_names(_entries("models", order.models)),
        ip=networks(_entries("ip", order.ip)),
        expires_at=None if order.expires is None else expiry(order.expires, now),
        budget_day_usd=None if order.budget_day is None else money("budget_day", order.budget_day),
        budget_month_usd=None if order.budget_month is None else money("budget_month", order.budget_month),
    )
