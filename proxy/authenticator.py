"""From the text of a credential to the Principal: keys, tokens, and the plans that both of them name."""

from __future__ import annotations

from collections.abc import Container
from hashlib import blake2b
from typing import TYPE_CHECKING

import structlog

from proxy.errors import InvalidCredential, InvalidToken
from proxy.identity import LONGEST_KEY, KeyRecord, Principal, pepper_id, verify_key
from proxy.keys import KeyCache, load_pepper
from proxy.keystore import open_store
from proxy.schema import Auth, Jwt

if TYPE_CHECKING:
    from proxy.jwtauth import TokenAuthenticator

#: Keys that are known again without an HMAC: 2 MB. Only valid ones come in, so a stranger cannot fill it.
_MOST_SHOWN = 8192


class Authenticator:
    """`identify` for each request; `start` and `close` bracket the life of the process. A reload that leaves
    `auth` as it is only replaces `plans`."""

    def __init__(self, auth: Auth, plans: Container[str]) -> None:
        """Raises StartError: the pepper, the store or the token secret cannot be used."""
        self.plans = plans
        self.cache = KeyCache(open_store(auth.database))
        self._pepper = load_pepper(auth.pepper, auth.database)
        self._shown: dict[bytes, KeyRecord] = {}  # valid keys that were shown: see `known`
        self.tokens = None if auth.jwt is None else _of_tokens(auth.jwt)

    async def start(self, now: float) -> None:
        """Loads the keys. Raises StartError: the store cannot be read."""
        await self.cache.start()
        foreign = self.cache.foreign(pepper_id(self._pepper), now)
        if foreign:
            advice = "these keys cannot be used: restore auth.pepper, or make new ones"
            structlog.get_logger().warning("keys_of_another_pepper", keys=foreign, advice=advice)
        if self.tokens is not None:
            await self.tokens.start()

    async def close(self) -> None:
        await self.cache.close()
        if self.tokens is not None:
            await self.tokens.close()

    def known(self, credential: str | None, now: float) -> Principal | None:
        """Who has shown this key before, while it is valid; None: `identify` has to tell.

        A key is known again by a hash of its text: the text itself would make a heap dump a list of every
        caller's secret. Believed is only what was verified against the very record that the cache holds now,
        so what a revocation, a rotation or another store replaces is unknown at that moment. Time tells the
        holder of a valid key that it was seen before, and nobody anything else: all other texts, with an id
        that exists or without, miss here and then cost what they always cost (`verify_key`).
        """
        if credential is None or len(credential) > LONGEST_KEY:
            return None
        record = self._shown.get(_hash(credential))
        if record is None or self.cache.get(record.id) is not record:
            return None
        return record.principal if record.is_live(now) and record.plan in self.plans else None

    async def identify(self, credential: str | None, now: float) -> Principal:
        """Who sends this credential; `now` is wall-clock seconds. It waits for nothing but the fetch that a
        token with an unknown key id may cause.

        Raises:
            InvalidCredential: nobody; ExpiredToken and InvalidToken are kinds of it.
        """
        if self.tokens is None or credential is None or not self.tokens.fits(credential):
            return self._by_key(credential or "", now)
        principal = await self.tokens.identify(credential, now)
        if principal.plan not in self.plans:
            raise InvalidToken
        return principal

    def _by_key(self, text: str, now: float) -> Principal:
        record = verify_key(text, self.cache.get, self._pepper, now)
        # A plan that was taken out of the configuration has no limits that could be applied.
        if record is None or record.plan not in self.plans:
            raise InvalidCredential
        if len(self._shown) >= _MOST_SHOWN:
            self._shown.clear()
        self._shown[_hash(text)] = record
        return record.principal


def _hash(credential: str) -> bytes:
    """Of 256 random bits: nobody finds the text again, nor another of the same hash. It takes a fifth of an
    HMAC."""
    return blake2b(credential.encode("utf-8", "surrogatepass")).digest()


def _of_tokens(settings: Jwt) -> TokenAuthenticator:
    """Raises StartError."""
    from proxy.jwtauth import TokenAuthenticator  # it costs every start that needs none: see there

    return TokenAuthenticator(settings)
