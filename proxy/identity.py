"""Who is calling: API keys, and what a caller may do.

A key reads `hr_<id>_<secret>`: an id of 10 of [a-z2-7], a secret of 256 bits as 43 characters of base64url.
At rest there is the id and HMAC-SHA256(pepper, secret). A slow password hash would protect nothing here,
since nobody guesses 256 bits, and would cost every request 50 ms. Whether a key is unknown, malformed,
revoked or expired: the same work is done, and the same error is raised.

Times are seconds of the wall clock; budgets are US dollars.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import cached_property, lru_cache
from typing import TypeAlias

import msgspec

from proxy.errors import BadRequest, IpNotAllowed, ModelNotAllowed
from proxy.patterns import matches

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
#: `count` random bytes: secrets.token_bytes.
RandomBytes: TypeAlias = Callable[[int], bytes]

_KEY = re.compile(r"hr_([a-z0-9]{8,12})_([A-Za-z0-9_-]{43})", re.ASCII)
#: Characters of a key.
LONGEST_KEY = 3 + 12 + 1 + 43
#: Compared with when there is nothing to compare with.
_NOBODY = bytes(32)


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """A caller who has shown a valid credential.

    name: stable over rotations of the secret: `key:<id>` or `jwt:<issuer>|<subject>`. Limits and the ledger
        know the caller by it.
    key_id: the same for the log: printable, at most 160 characters.
    models: names and patterns; empty allows all. networks: empty allows all.
    """

    name: str
    key_id: str
    plan: str
    models: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()
    budget_day_usd: Decimal | None = None
    budget_month_usd: Decimal | None = None
    expires_at: float | None = None


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A key as it is stored: everything but the secret. A key is never deleted, so that the ledger can still
    say whose it was; `pepper_id` tells which pepper the digest was made with."""

    id: str
    name: str
    digest: bytes
    pepper_id: str
    plan: str
    created_at: float
    models: tuple[str, ...] = ()
    ip: tuple[str, ...] = ()
    expires_at: float | None = None
    revoked_at: float | None = None
    budget_day_usd: Decimal | None = None
    budget_month_usd: Decimal | None = None

    def is_live(self, now: float) -> bool:
        """Neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    @cached_property
    def principal(self) -> Principal:
        """Made once: parsing networks costs more than checking the secret."""
        return Principal(
            name=f"key:{self.id}",
            key_id=self.id,
            plan=self.plan,
            models=self.models,
            networks=tuple(ipaddress.ip_network(text) for text in self.ip),
            budget_day_usd=self.budget_day_usd,
            budget_month_usd=self.budget_month_usd,
            expires_at=self.expires_at,
        )


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────


def mint_id(random_bytes: RandomBytes) -> str:
    """50 random bits: among a million keys two are the same once in two thousand times, and then `create`
    takes another."""
    return base64.b32encode(random_bytes(10))[:10].decode().lower()


def mint_secret(random_bytes: RandomBytes) -> str:
    """256 random bits as 43 characters."""
    return base64.urlsafe_b64encode(random_bytes(32)).rstrip(b"=").decode()


def key_text(key_id: str, secret: str) -> str:
    """What the caller sends."""
    return f"hr_{key_id}_{secret}"


def split_key(text: str) -> tuple[str, str] | None:
    """Id and secret, or None. The secret may hold `_`, the id does not."""
    found = _KEY.fullmatch(text)
    return None if found is None else (found[1], found[2])


def digest(pepper: bytes, secret: str) -> bytes:
    """What is stored of a secret."""
    mac = _keyed(pepper).copy()
    mac.update(secret.encode())
    return mac.digest()


@lru_cache(maxsize=4)
def _keyed(pepper: bytes) -> hmac.HMAC:
    """Made once: for each call of `hmac.digest` OpenSSL looks its algorithms up again (3 % of a short
    request's CPU, measured)."""
    return hmac.new(pepper, digestmod="sha256")


def pepper_id(pepper: bytes) -> str:
    """Names a pepper without telling anything about it."""
    return hashlib.sha256(b"headrace pepper id\0" + pepper).hexdigest()[:8]


def verify_key(
    text: str, lookup: Callable[[str], KeyRecord | None], pepper: bytes, now: float
) -> KeyRecord | None:
    """The key's record, if text is a key that is valid now. Never raises, whatever the text is.

    Every text costs one HMAC and one comparison, so time does not tell which ids exist.
    """
    key_id, secret = split_key(text) or ("", "")
    record = lookup(key_id)
    offered = digest(pepper, secret)
    same = hmac.compare_digest(offered, _NOBODY if record is None else record.digest)
    return record if record is not None and same and record.is_live(now) else None


# ── credentials ─────────────────────────────────────────────────────────────────────────────────────────


def credential_of(authorization: Sequence[str], api_key_fields: Sequence[str]) -> str | None:
    """The one credential among the values of `Authorization` and those of `x-api-key` and `api-key`.

    Empty values are as good as none: SDKs send `Bearer ` when they were given no key. What is there and is no
    bearer credential (`Basic …`) stays as it is, and is then unknown like any other text.

    Raises:
        BadRequest: there are several, and they differ.
    """
    if len(authorization) == 1 and not api_key_fields:  # nearly always
        value = authorization[0]
        return (value[7:].strip() if value.startswith("Bearer ") else _bearer(value)) or None
    found = {_bearer(value) for value in authorization} | {value.strip() for value in api_key_fields}
    found.discard("")
    if len(found) > 1:
        raise BadRequest("ambiguous_credentials", "The request carries two different credentials.")
    return next(iter(found), None)


def _bearer(value: str) -> str:
    """The scheme's name is compared without case (RFC 9110 section 11.1)."""
    scheme, _, rest = value.strip().partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else value.strip()


# ── what a caller may do ────────────────────────────────────────────────────────────────────────────────


def may_use_model(principal: Principal, name: str) -> bool:
    """Is a model, as the caller names it, in the caller's allow-list?"""
    return not principal.models or matches(name, principal.models)


def may_come_from(principal: Principal, ip: str) -> bool:
    """Is an address in the caller's networks? An address that cannot be read (a unix socket's) is in none."""
    if not principal.networks:
        return True
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return False
    # A dual-stack listener sees IPv4 callers as ::ffff:a.b.c.d (RFC 4291 section 2.5.5.2).
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return any((mapped or address) in network for network in principal.networks)


def check_model(principal: Principal, name: str) -> None:
    """Raises ModelNotAllowed."""
    if not may_use_model(principal, name):
        raise ModelNotAllowed


def check_address(principal: Principal, ip: str) -> None:
    """Raises IpNotAllowed."""
    if principal.networks and not may_come_from(principal, ip):
        raise IpNotAllowed
