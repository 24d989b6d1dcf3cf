"""From the text of a credential to the Principal: keys, tokens, and the plans that both of them name."""

from __future__ import annotations

from collections.abc import Container

import structlog

from proxy.errors import InvalidCredential, InvalidToken, StartError
from proxy.identity import Principal, pepper_id, verify_key
from proxy.jwks import Jwks
from proxy.keys import KeyCache, load_pepper
from proxy.keystore import open_store
from proxy.schema import Auth, Jwt
from proxy.webtoken import (
    SharedSecret,
    SigningKeys,
    TokenRules,
    UnknownSigningKey,
    looks_like_token,
    verify_token,
)


class Authenticator:
    """`identify` for each request; `start` and `close` bracket the life of the process. A reload that leaves
    `auth` as it is only replaces `plans`."""

    def __init__(self, auth: Auth, plans: Container[str]) -> None:
        """Raises StartError: the pepper, the store or the token secret cannot be used."""
        self.plans = plans
        self.cache = KeyCache(open_store(auth.database))
        self.jwks: Jwks | None = None
        self._pepper = load_pepper(auth.pepper, auth.database)
        self._rules: TokenRules | None = None
        if auth.jwt is not None:
            keys = signing_keys(auth.jwt)
            self.jwks = keys if isinstance(keys, Jwks) else None
            self._rules = token_rules(auth.jwt, keys)

    async def start(self, now: float) -> None:
        """Loads the keys. Raises StartError: the store cannot be read."""
        await self.cache.start()
        if self.jwks is not None:
            await self.jwks.start()
        foreign = self.cache.foreign(pepper_id(self._pepper), now)
        if foreign:
            advice = "these keys cannot be used: restore auth.pepper, or make new ones"
            structlog.get_logger().warning("keys_of_another_pepper", keys=foreign, advice=advice)
        keys = self._rules.keys if self._rules is not None else None
        if isinstance(keys, SharedSecret) and keys.is_short:
            advice = "auth.jwt.secret has less than 32 bytes, and can be guessed from one token"
            structlog.get_logger().warning("jwt_secret_is_short", advice=advice)

    async def close(self) -> None:
        await self.cache.close()
        if self.jwks is not None:
            await self.jwks.close()

    async def identify(self, credential: str | None, now: float) -> Principal:
        """Who sends this credential; `now` is wall-clock seconds. It waits for nothing but the fetch that a
        token with an unknown key id may cause.

        Raises:
            InvalidCredential: nobody; ExpiredToken and InvalidToken are kinds of it.
        """
        if self._rules is None or credential is None or not looks_like_token(credential):
            return self._by_key(credential or "", now)
        try:
            return self._by_token(credential, self._rules, now)
        except UnknownSigningKey:
            if self.jwks is None or not await self.jwks.refetch():
                raise
            return self._by_token(credential, self._rules, now)

    def _by_key(self, text: str, now: float) -> Principal:
        record = verify_key(text, self.cache.get, self._pepper, now)
        # A plan that was taken out of the configuration has no limits that could be applied.
        if record is None or record.plan not in self.plans:
            raise InvalidCredential
        return record.principal

    def _by_token(self, text: str, rules: TokenRules, now: float) -> Principal:
        principal = verify_token(text, rules, now)
        if principal.plan not in self.plans:
            raise InvalidToken
        return principal


def signing_keys(settings: Jwt) -> SigningKeys:
    """The shared secret, or the keys behind the URL, not yet fetched. Raises StartError."""
    if "HS256" not in settings.algorithms:
        assert settings.jwks_url is not None  # checked by proxy.config
        return Jwks(settings.jwks_url, settings.algorithms)
    try:
        return SharedSecret(settings.secret or "")
    except ValueError as error:
        raise StartError(f"auth.jwt.secret: {error}") from None


def token_rules(settings: Jwt, keys: SigningKeys) -> TokenRules:
    return TokenRules(
        algorithms=settings.algorithms,
        issuer=settings.issuer,
        audience=settings.audience,
        plan_claim=settings.plan_claim,
        keys=keys,
    )
