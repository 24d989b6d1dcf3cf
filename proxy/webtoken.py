"""JSON Web Tokens as credentials: what is accepted, and how `headrace token issue` makes one.

RFC 8725 is the check-list. The algorithms are the configuration's, never the token's; a key is bound to one
algorithm; of a token's header only `alg`, `kid` and `typ` are read, and `kid` only chooses among keys that
are already here. Signatures are PyJWT's work. The claims are looked at here, because PyJWT reads a clock of
its own.

Times are seconds of the wall clock.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

import jwt
import msgspec
from jwt.algorithms import AllowedPublicKeys, ECAlgorithm, HMACAlgorithm, RSAAlgorithm

from proxy.errors import ExpiredToken, InvalidToken
from proxy.identity import Principal

#: A longer token is refused before anything of it is decoded.
MAX_BYTES = 8192
#: How far clocks may be apart (RFC 7519 section 4.1.4: "no more than a few minutes").
LEEWAY_S = 30
#: OpenID Connect Core section 2: a subject has at most 255 characters.
_MAX_SUBJECT = 255
#: Of the log's `key_id`.
_MAX_SHOWN = 160
#: A token made for something else (`logout+jwt`, `dpop+jwt`) is none of ours (RFC 8725 section 3.11).
_TYPES = frozenset({"jwt", "at+jwt"})
#: RFC 7518 section 3.3.
_MIN_RSA_BITS = 2048
#: RFC 7518 section 3.2: a shorter secret can be guessed offline by everyone who holds one token.
MIN_SECRET_BYTES = 32
#: What PyJWT and the codecs under it raise for bytes that are no token.
_MALFORMED = (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError)

Algorithm: TypeAlias = str


class SigningKey(msgspec.Struct, frozen=True):
    """A key that verifies one algorithm and no other; `key` is a public key, or the bytes of a secret."""

    kid: str | None
    algorithm: Algorithm
    key: AllowedPublicKeys | bytes


class SigningKeys(Protocol):
    """Where keys come from."""

    def find(self, kid: str | None, algorithm: Algorithm) -> SigningKey | None: ...


class UnknownSigningKey(InvalidToken):
    """The token names a key that is not here: it may have been published a moment ago."""


class SharedSecret:
    """The one key of HS256, whatever `kid` says."""

    def __init__(self, secret: str) -> None:
        """Raises ValueError for a secret that everybody knows: none, or a public key."""
        if not secret:
            raise ValueError("is empty: HS256 has no default secret")
        try:
            key = HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
        except jwt.InvalidKeyError:
            raise ValueError("is a public key or a certificate, which is no secret") from None
        self._key = SigningKey(None, "HS256", key)
        self.is_short = len(key) < MIN_SECRET_BYTES

    def find(self, kid: str | None, algorithm: Algorithm) -> SigningKey | None:
        return self._key if algorithm == "HS256" else None


class KeyRing:
    """The public keys of a JWKS."""

    def __init__(self, keys: Iterable[SigningKey] = ()) -> None:
        self._keys = {(key.kid, key.algorithm): key for key in keys}

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, kid: str | None, algorithm: Algorithm) -> SigningKey | None:
        """Without `kid` it is the only key of its algorithm; where there are several, none."""
        if kid is not None:
            return self._keys.get((kid, algorithm))
        fitting = [key for key in self._keys.values() if key.algorithm == algorithm]
        return fitting[0] if len(fitting) == 1 else None


class TokenRules(msgspec.Struct, frozen=True):
    """What a token has to be; the configuration's `auth.jwt` and its keys."""

    algorithms: tuple[Algorithm, ...]
    issuer: str
    audience: str
    plan_claim: str
    keys: SigningKeys


def looks_like_token(credential: str) -> bool:
    """Three parts, of which the first is base64url of `{"`: no API key looks like this."""
    return credential.startswith("ey") and credential.count(".") == 2


# ── verifying ───────────────────────────────────────────────────────────────────────────────────────────


def verify_token(text: str, rules: TokenRules, now: float) -> Principal:
    """Whose token this is, and on which plan (whose existence the caller of this function checks).

    Raises:
        ExpiredToken: all is well but its time.
        UnknownSigningKey: it is signed with a key that is not here.
        InvalidToken: anything else, whatever the text is.
    """
    if len(text) > MAX_BYTES or not text.isascii():
        raise InvalidToken
    claims = _verified(text, _signing_key(text, rules))
    plan = claims.get(rules.plan_claim)
    try:
        known = msgspec.convert(claims, _Claims)
    except _MALFORMED:
        raise InvalidToken from None
    _check_claims(known, rules, now)
    if not isinstance(plan, str):
        raise InvalidToken
    caller = f"{rules.issuer}|{_printable(known.sub)}"
    return Principal(name=f"jwt:{caller}", key_id=caller[:_MAX_SHOWN], plan=plan, expires_at=known.exp)


class _Claims(msgspec.Struct, frozen=True):
    """Strict types: `"exp": "soon"` and `"exp": true` are no times."""

    iss: str
    aud: str | list[str]
    sub: str
    exp: float
    nbf: float | None = None
    iat: float | None = None


class _Header(msgspec.Struct, frozen=True):
    """All that is read of it: `jku`, `x5u`, `jwk` and `x5c` would let a token bring its own key."""

    alg: str
    kid: str | None = None
    typ: str = "JWT"


def _signing_key(text: str, rules: TokenRules) -> SigningKey:
    encoded = text.partition(".")[0]
    try:
        header = msgspec.json.decode(
            base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)), type=_Header
        )
    except _MALFORMED:
        raise InvalidToken from None
    if header.alg not in rules.algorithms:
        raise InvalidToken
    if header.typ.lower().removeprefix("application/") not in _TYPES:
        raise InvalidToken
    key = rules.keys.find(header.kid, header.alg)
    if key is None:
        raise UnknownSigningKey
    return key


class _AnyLength(HMACAlgorithm):
    """PyJWT warns of a short secret at every token; `SharedSecret.is_short` says it once."""

    def check_key_length(self, key: bytes) -> str | None:
        return None


def _verifier() -> jwt.PyJWS:
    verifier = jwt.PyJWS()
    verifier.unregister_algorithm("HS256")
    verifier.register_algorithm("HS256", _AnyLength(HMACAlgorithm.SHA256))
    return verifier


_VERIFIER = _verifier()


def _verified(text: str, key: SigningKey) -> dict[str, Any]:
    """The claims of a token whose signature is right."""
    try:
        payload = _VERIFIER.decode_complete(text, key.key, algorithms=[key.algorithm])["payload"]
        return msgspec.json.decode(payload, type=dict[str, Any])
    except _MALFORMED:
        raise InvalidToken from None


def _check_claims(claims: _Claims, rules: TokenRules, now: float) -> None:
    audience = [claims.aud] if isinstance(claims.aud, str) else claims.aud
    if claims.iss != rules.issuer or rules.audience not in audience:
        raise InvalidToken
    if not 0 < len(claims.sub) <= _MAX_SUBJECT:
        raise InvalidToken
    if any(start is not None and start > now + LEEWAY_S for start in (claims.nbf, claims.iat)):
        raise InvalidToken
    if claims.exp <= now - LEEWAY_S:
        raise ExpiredToken


def _printable(subject: str) -> str:
    """Different subjects stay different: what is escaped has a backslash, what is not has none."""
    if subject.isprintable() and "\\" not in subject:
        return subject
    return subject.encode("unicode_escape").decode("ascii")


# ── the keys of others ──────────────────────────────────────────────────────────────────────────────────


def parse_jwks(body: bytes, algorithms: tuple[Algorithm, ...]) -> KeyRing:
    """The keys of a JWK Set that can be used here; all others are passed over (RFC 7517 section 5).

    Raises:
        ValueError: it is no JWK Set, or there is no such key in it.
    """
    try:
        entries = msgspec.json.decode(body, type=_Jwks).keys
    except (msgspec.MsgspecError, RecursionError):
        raise ValueError("is not a JSON Web Key Set") from None
    found = [key for entry in entries[:_MAX_KEYS] if (key := _public_key(entry, algorithms)) is not None]
    if not found:
        raise ValueError(f"has no key for {' or '.join(algorithms)}")
    return KeyRing(found)


class _Jwks(msgspec.Struct):
    keys: list[dict[str, Any]]


#: Building an RSA key costs 50 µs; providers publish two or three.
_MAX_KEYS = 100
#: Key type and curve -> the one algorithm it serves.
_ALGORITHM_OF = {("RSA", None): "RS256", ("EC", "P-256"): "ES256"}


def _public_key(entry: dict[str, Any], algorithms: tuple[Algorithm, ...]) -> SigningKey | None:
    kind, kid = entry.get("kty"), entry.get("kid")
    curve = entry.get("crv") if kind == "EC" else None
    if not isinstance(kind, str) or not isinstance(curve, str | None) or not isinstance(kid, str | None):
        return None
    algorithm = _ALGORITHM_OF.get((kind, curve))
    if algorithm not in algorithms or entry.get("alg", algorithm) != algorithm:
        return None
    if entry.get("use", "sig") != "sig" or "d" in entry:
        return None  # for encryption, or a private key that somebody has published
    try:
        key: Any = (RSAAlgorithm if kind == "RSA" else ECAlgorithm).from_jwk(entry)
    except (*_MALFORMED, KeyError):
        return None
    return SigningKey(kid, algorithm, key) if kind == "EC" or key.key_size >= _MIN_RSA_BITS else None


# ── tokens of our own ───────────────────────────────────────────────────────────────────────────────────


def issue_token(rules: TokenRules, subject: str, plan: str, ttl_s: float, now: float) -> str:
    """A token signed with the shared secret, which verify_token accepts for `ttl_s` seconds.

    Raises:
        ValueError: there is no shared secret, or verify_token would refuse the subject.
    """
    key = rules.keys.find(None, "HS256") if "HS256" in rules.algorithms else None
    if key is None:
        raise ValueError("no HS256 secret is configured")
    if not 0 < len(subject) <= _MAX_SUBJECT:
        raise ValueError(f"a subject has 1 to {_MAX_SUBJECT} characters")
    claims = {
        "iss": rules.issuer,
        "aud": rules.audience,
        "sub": subject,
        rules.plan_claim: plan,
        "iat": int(now),
        "exp": int(now + ttl_s),
    }
    assert isinstance(key.key, bytes)
    return _VERIFIER.encode(msgspec.json.encode(claims), key.key, algorithm="HS256", headers={"typ": "JWT"})
