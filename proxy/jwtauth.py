"""From a JSON Web Token to its Principal, with the keys that the configuration names.

Only who configures `auth.jwt` imports this: PyJWT brings cryptography, which is 30 ms of a start and 8 MiB of
every process.
"""

from __future__ import annotations

import structlog

from proxy.errors import StartError
from proxy.identity import Principal
from proxy.jwks import Jwks
from proxy.schema import Jwt
from proxy.webtoken import (
    SharedSecret,
    SigningKeys,
    TokenRules,
    UnknownSigningKey,
    looks_like_token,
    verify_token,
)


class TokenAuthenticator:
    """`identify` for each token; `start` and `close` bracket the life of the process."""

    def __init__(self, settings: Jwt) -> None:
        """Raises StartError: the secret cannot be used."""
        self.keys = signing_keys(settings)
        self.rules = token_rules(settings, self.keys)
        self._jwks = self.keys if isinstance(self.keys, Jwks) else None

    async def start(self) -> None:
        """Begins to follow the published keys."""
        if self._jwks is not None:
            await self._jwks.start()
        if isinstance(self.keys, SharedSecret) and self.keys.is_short:
            advice = "auth.jwt.secret has less than 32 bytes, and can be guessed from one token"
            structlog.get_logger().warning("jwt_secret_is_short", advice=advice)

    async def close(self) -> None:
        if self._jwks is not None:
            await self._jwks.close()

    def fits(self, credential: str) -> bool:
        """Is it a token at all?"""
        return looks_like_token(credential)

    async def identify(self, token: str, now: float) -> Principal:
        """Whose token this is, on whatever plan it names; `now` is wall-clock seconds. It waits for nothing
        but the fetch that an unknown key id may cause. Raises InvalidToken, or its kind ExpiredToken."""
        try:
            return verify_token(token, self.rules, now)
        except UnknownSigningKey:
            if self._jwks is None or not await self._jwks.refetch():
                raise
            return verify_token(token, self.rules, now)


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
