"""API keys and tokens as rules: what is accepted, and that everything else is refused alike."""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
import secrets
import time
from decimal import Decimal
from typing import Any

import jwt
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from proxy import identity
from proxy.errors import (
    BadRequest,
    ExpiredToken,
    InvalidCredential,
    InvalidToken,
    IpNotAllowed,
    ModelNotAllowed,
)
from proxy.identity import KeyRecord, Principal
from proxy.webtoken import (
    KeyRing,
    SharedSecret,
    SigningKey,
    TokenRules,
    UnknownSigningKey,
    issue_token,
    looks_like_token,
    parse_jwks,
    verify_token,
)

NOW = 1_800_000_000.0
PEPPER = b"p" * 32
SECRET = "s3cret-of-the-house-0123456789abcdef"

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
SHORT_RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=1024)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
PUBLIC_PEM = RSA_KEY.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)

RING = KeyRing(
    [
        SigningKey("r1", "RS256", RSA_KEY.public_key()),
        SigningKey("r2", "RS256", OTHER_RSA_KEY.public_key()),
        SigningKey("e1", "ES256", EC_KEY.public_key()),
    ]
)
HS = TokenRules(("HS256",), "headrace", "headrace", "plan", SharedSecret(SECRET))
RS = TokenRules(("RS256", "ES256"), "headrace", "headrace", "plan", RING)
CLAIMS: dict[str, Any] = {
    "iss": "headrace",
    "aud": "headrace",
    "sub": "alice",
    "plan": "pro",
    "exp": int(NOW) + 600,
}


def claims(*without: str, **changed: Any) -> dict[str, Any]:
    return {name: value for name, value in {**CLAIMS, **changed}.items() if name not in without}


def hs(body: Any = CLAIMS, secret: str = SECRET, **header: Any) -> str:
    return raw({"alg": "HS256", "typ": "JWT", **header}, body, secret.encode())


def rs(
    body: Any = CLAIMS, key: Any = RSA_KEY, kid: str | None = "r1", algorithm: str = "RS256", **header: Any
) -> str:
    return jwt.encode(body, key, algorithm, headers={**({} if kid is None else {"kid": kid}), **header})


def raw(header: Any, body: Any, secret: bytes) -> str:
    """A token by hand: libraries refuse to make the bad ones."""
    parts = [
        encode(part if isinstance(part, bytes) else json.dumps(part).encode()) for part in (header, body)
    ]
    signed = ".".join(parts)
    return f"{signed}.{encode(hmac.digest(secret, signed.encode(), 'sha256'))}"


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jwk(key: Any, kid: str, **more: Any) -> dict[str, Any]:
    algorithm = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, **more}


def new_key(**fields: Any) -> tuple[str, KeyRecord]:
    key_id, secret = identity.mint_id(secrets.token_bytes), identity.mint_secret(secrets.token_bytes)
    record = KeyRecord(
        id=key_id,
        name="n",
        digest=identity.digest(PEPPER, secret),
        pepper_id=identity.pepper_id(PEPPER),
        plan="pro",
        created_at=NOW,
        **fields,
    )
    return identity.key_text(key_id, secret), record


def check(text: str, *records: KeyRecord, pepper: bytes = PEPPER, now: float = NOW) -> KeyRecord | None:
    return identity.verify_key(text, {record.id: record for record in records}.get, pepper, now)


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_has_the_promised_shape() -> None:
    """`hr_<id>_<secret>`: the first two underscores split it, whatever the secret holds."""
    for byte in range(256):
        key_id, secret = (
            identity.mint_id(lambda n, b=byte: bytes([b] * n)),
            identity.mint_secret(lambda n, b=byte: bytes([b] * n)),
        )
        assert 8 <= len(key_id) <= 12
        assert key_id.isascii()
        assert key_id.isalnum()
        assert key_id == key_id.lower()
        assert len(base64.urlsafe_b64decode(secret + "=")) == 32
        text = identity.key_text(key_id, secret)
        assert text.split("_", 2) == ["hr", key_id, secret]
        assert identity.split_key(text) == (key_id, secret)


def test_at_rest_there_is_an_hmac_with_the_pepper() -> None:
    assert identity.digest(b"pepper", "secret") == hmac.new(b"pepper", b"secret", hashlib.sha256).digest()


def test_the_right_key_is_known() -> None:
    text, record = new_key()
    _, other = new_key()
    assert check(text, record, other) is record


def test_every_wrong_key_is_nobody() -> None:
    """Another secret, another pepper, another id, cut, longer, padded, revoked, expired."""
    text, record = new_key()
    other_text, other = new_key()
    swapped = identity.key_text(record.id, other_text.split("_", 2)[2])
    assert check(swapped, record, other) is None
    assert check(text, record, pepper=b"q" * 32) is None
    assert check(text, other) is None
    for wrong in (text[:-1], text + "A", text + "=", text + "\n", " " + text, text.upper(), f"hr__{text}"):
        assert check(wrong, record) is None, wrong
    assert check(text, msgspec.structs.replace(record, revoked_at=NOW - 1)) is None
    expiring = msgspec.structs.replace(record, expires_at=NOW)
    assert check(text, expiring, now=NOW - 0.001) is expiring
    assert check(text, expiring, now=NOW) is None


def test_a_record_that_is_no_digest_is_nobody() -> None:
    text, record = new_key()
    assert check(text, msgspec.structs.replace(record, digest=b"")) is None


@given(
    st.text()
    | st.from_regex(r"hr_[a-z0-9]{0,14}_[\w-]{0,50}")
    | st.binary().map(lambda b: b.decode("utf-8", "surrogateescape"))
)
def test_no_text_is_a_key_by_chance(text: str) -> None:
    """Nothing raises, nothing matches."""
    assert check(text, new_key()[1]) is None


def test_a_principal_carries_what_the_key_may_do() -> None:
    _, record = new_key(
        models=("gpt-4.1",), ip=("10.0.0.0/8",), budget_day_usd=Decimal("0.10"), expires_at=NOW + 5
    )
    principal = record.principal
    assert (principal.name, principal.key_id, principal.plan) == (f"key:{record.id}", record.id, "pro")
    assert principal.budget_day_usd == Decimal("0.10")
    assert principal.expires_at == NOW + 5
    assert record.principal is principal
    narrowed = msgspec.structs.replace(record, ip=("192.0.2.0/24",))
    assert not identity.may_come_from(narrowed.principal, "10.1.1.1")


# ── what a caller may do ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("models", "name", "allowed"),
    [
        ((), "anything", True),
        (("gpt-4.1",), "gpt-4.1", True),
        (("gpt-4.1",), "gpt-4x1", False),
        (("gpt-4.1",), "gpt-4.1-mini", False),
        (("claude-*",), "claude-opus", True),
        (("claude-*",), "my-claude-opus", False),
        (("gpt-?",), "gpt-5", True),
        (("gpt-?",), "gpt-55", False),
        (("a*b*c",), "axxbyyc", True),
        (("a*b*c",), "axxbyy", False),
        (("[a-z]*",), "b", False),
        (("x", "y-*"), "y-1\n", True),
        (("*",), "", True),
    ],
)
def test_the_model_allow_list(models: tuple[str, ...], name: str, allowed: bool) -> None:
    principal = Principal(name="key:a", key_id="a", plan="pro", models=models)
    assert identity.may_use_model(principal, name) is allowed
    if allowed:
        identity.check_model(principal, name)
    else:
        with pytest.raises(ModelNotAllowed) as caught:
            identity.check_model(principal, name)
        assert (caught.value.status, caught.value.code) == (403, "model_not_allowed")


def test_a_long_name_costs_no_more_than_its_length() -> None:
    """Seven stars against a megabyte: with backtracking this would not end."""
    principal = Principal(name="key:a", key_id="a", plan="pro", models=("*a*b*a*b*a*b*c",))
    started = time.perf_counter()
    assert not identity.may_use_model(principal, "ab" * 500_000)
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize(
    ("networks", "ip", "allowed"),
    [
        ((), "", True),
        (("10.0.0.0/8",), "10.255.0.1", True),
        (("10.0.0.0/8",), "11.0.0.1", False),
        (("10.0.0.0/8",), "::ffff:10.0.0.1", True),
        (("10.0.0.0/8",), "::10.0.0.1", False),
        (("10.0.0.0/8", "2001:db8::/32"), "2001:db8::1", True),
        (("2001:db8::/32",), "10.0.0.1", False),
        (("0.0.0.0/0",), "", False),
        (("0.0.0.0/0",), "not an address", False),
        (("fe80::/10",), "fe80::1%eth0", True),
    ],
)
def test_the_address_allow_list(networks: tuple[str, ...], ip: str, allowed: bool) -> None:
    principal = new_key(ip=networks)[1].principal
    assert identity.may_come_from(principal, ip) is allowed
    if allowed:
        identity.check_address(principal, ip)
    else:
        with pytest.raises(IpNotAllowed) as caught:
            identity.check_address(principal, ip)
        assert (caught.value.status, caught.value.code) == (403, "ip_not_allowed")


# ── where a credential is ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("authorization", "others", "credential"),
    [
        ([], [], None),
        (["Bearer abc"], [], "abc"),
        (["bearer  abc "], [], "abc"),
        ([], ["abc"], "abc"),
        (["Bearer abc"], ["abc", "abc"], "abc"),
        (["Bearer abc", "Bearer abc"], [], "abc"),
        ([""], ["abc"], "abc"),
        (["Bearer"], [], None),
        (["Bearer "], ["abc"], "abc"),
        (["Basic YTpi"], [], "Basic YTpi"),
        (["abc"], [], "abc"),
    ],
)
def test_the_one_credential(authorization: list[str], others: list[str], credential: str | None) -> None:
    assert identity.credential_of(authorization, others) == credential


@given(st.text(" \tab", max_size=8), st.text(" \t", max_size=2))
def test_the_scheme_in_any_spelling(rest: str, before: str) -> None:
    """The usual one is looked for first, and means the same."""
    usual, other = f"{before}Bearer {rest}", f"{before}bEARER {rest}"
    assert identity.credential_of([usual], []) == identity.credential_of([other], [])
    assert identity.credential_of([usual], []) == identity.credential_of([usual, usual], [])


@pytest.mark.parametrize(
    ("authorization", "others"),
    [
        (["Bearer a", "Bearer b"], []),
        (["Bearer a"], ["b"]),
        ([], ["a", "b"]),
        (["Basic YTpi"], ["a"]),
        (["Bearer a"], ["A"]),
    ],
)
def test_two_different_credentials_are_ambiguous(authorization: list[str], others: list[str]) -> None:
    with pytest.raises(BadRequest) as caught:
        identity.credential_of(authorization, others)
    assert caught.value.code == "ambiguous_credentials"


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        (hs(), HS),
        (hs(kid="whatever"), HS),
        (rs(), RS),
        (rs(key=OTHER_RSA_KEY, kid="r2"), RS),
        (rs(key=EC_KEY, kid="e1", algorithm="ES256"), RS),
        (rs(key=EC_KEY, kid=None, algorithm="ES256"), RS),  # the only key of ES256
        (hs(typ="at+jwt"), HS),
        (hs(typ="application/jwt"), HS),
        (hs(claims(aud=["other", "headrace"])), HS),
        (hs(claims(exp=NOW - 29)), HS),  # within the leeway
        (hs(claims(nbf=NOW + 29, iat=NOW + 29)), HS),
        (hs(claims(exp=NOW + 0.5, extra={"deep": [1]})), HS),
    ],
)
def test_good_tokens(text: str, rules: TokenRules) -> None:
    assert looks_like_token(text)
    principal = verify_token(text, rules, NOW)
    assert (principal.name, principal.key_id, principal.plan) == (
        "jwt:headrace|alice",
        "headrace|alice",
        "pro",
    )
    assert (principal.models, principal.networks) == ((), ())


ENDLESS = b'{"iss":"headrace","aud":"headrace","sub":"a","plan":"pro","exp":1e999}'
HOSTILE: dict[str, tuple[str, TokenRules]] = {
    "alg none": (raw({"alg": "none"}, CLAIMS, b"").rpartition(".")[0] + ".", HS),
    "alg none, RSA": (raw({"alg": "none", "kid": "r1"}, CLAIMS, b"").rpartition(".")[0] + ".", RS),
    "alg nOnE": (raw({"alg": "nOnE"}, CLAIMS, b"").rpartition(".")[0] + ".", HS),
    "no alg": (raw({"typ": "JWT"}, CLAIMS, SECRET.encode()), HS),
    "alg is a list": (hs(alg=["HS256"]), HS),
    "HS256 with the public key as secret": (raw({"alg": "HS256", "kid": "r1"}, CLAIMS, PUBLIC_PEM), RS),
    "HS512": (jwt.encode(CLAIMS, SECRET * 2, "HS512"), HS),
    "RS512": (rs(algorithm="RS512"), RS),
    "PS256": (rs(algorithm="PS256"), RS),
    "RS256 where HS256 is configured": (rs(), HS),
    "HS256 where RS256 is configured": (hs(kid="r1"), RS),
    "a key of the other algorithm": (rs(key=EC_KEY, kid="r1", algorithm="ES256"), RS),
    "signed with another key": (rs(key=OTHER_RSA_KEY), RS),
    "another secret": (hs(secret="another-secret-of-32-characters!!"), HS),
    "no kid, several keys": (rs(kid=None), RS),
    "unknown kid": (rs(kid="r9"), RS),
    "kid is a path": (rs(kid="../../x"), RS),
    "kid is a number": (raw({"alg": "RS256", "kid": 1}, CLAIMS, b""), RS),
    "its own key": (rs(key=OTHER_RSA_KEY, kid="r9", jwk=jwk(OTHER_RSA_KEY, "r9")), RS),
    "its own key under our name": (rs(key=OTHER_RSA_KEY, jwk=jwk(OTHER_RSA_KEY, "r1")), RS),
    "typ": (hs(typ="logout+jwt"), HS),
    "typ is null": (hs(typ=None), HS),
    "crit": (hs(crit=["exp"], exp=1), HS),
    "b64": (hs(b64=False, crit=["b64"]), HS),
    "wrong aud": (hs(claims(aud="other")), HS),
    "wrong aud in a list": (hs(claims(aud=["other", "x"])), HS),
    "aud part": (hs(claims(aud="head")), HS),
    "no aud": (hs(claims("aud")), HS),
    "wrong iss": (hs(claims(iss="other")), HS),
    "iss is a list": (hs(claims(iss=["headrace"])), HS),
    "no iss": (hs(claims("iss")), HS),
    "no exp": (hs(claims("exp")), HS),
    "exp is text": (hs(claims(exp=str(int(NOW) + 600))), HS),
    "exp is true": (hs(claims(exp=True)), HS),
    "exp is null": (hs(claims(exp=None)), HS),
    "exp is endless": (raw({"alg": "HS256"}, ENDLESS, SECRET.encode()), HS),
    "exp is NaN": (hs(claims(exp=float("nan"))), HS),
    "exp has 400 digits": (hs(claims(exp=10**400)), HS),
    "nbf future": (hs(claims(nbf=NOW + 31)), HS),
    "iat future": (hs(claims(iat=NOW + 31)), HS),
    "no sub": (hs(claims("sub")), HS),
    "empty sub": (hs(claims(sub="")), HS),
    "sub of 256 characters": (hs(claims(sub="a" * 256)), HS),
    "sub is a number": (hs(claims(sub=7)), HS),
    "no plan": (hs(claims("plan")), HS),
    "plan is a list": (hs(claims(plan=["pro"])), HS),
    "9 kB": (hs(claims(extra="a" * 7000)), HS),
    "claims are a list": (hs([1]), HS),
    "claims are no JSON": (raw({"alg": "HS256"}, b"{", SECRET.encode()), HS),
    "claims are deep": (raw({"alg": "HS256"}, b'{"a":' + b"[" * 5000, SECRET.encode()), HS),
    "claims are no UTF-8": (raw({"alg": "HS256"}, b'{"a":"\xff"}', SECRET.encode()), HS),
    "header is deep": (raw(b"[" * 5000, CLAIMS, SECRET.encode()), HS),
    "header is a list": (raw([], CLAIMS, SECRET.encode()), HS),
    "no signature": (hs().rpartition(".")[0] + ".", HS),
    "not base64": ("ey!.é.x", HS),
    "surrogates": ("ey\udcff.a.b", HS),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tokens(name: str) -> None:
    """All are invalid_token, 401, with the challenge that RFC 9110 section 11.6.1 asks for."""
    text, rules = HOSTILE[name]
    with pytest.raises(InvalidToken) as caught:
        verify_token(text, rules, NOW)
    assert (caught.value.status, caught.value.code) == (401, "invalid_token")
    assert caught.value.headers["WWW-Authenticate"] == "Bearer"


def test_the_hostile_tokens_would_pass_but_for_their_fault() -> None:
    """The parts the table is made of are good: else it would prove nothing."""
    for text, rules in ((hs(), HS), (raw({"alg": "HS256"}, CLAIMS, SECRET.encode()), HS), (rs(), RS)):
        assert verify_token(text, rules, NOW).plan == "pro"
    size = 5000
    assert verify_token(hs(claims(extra="a" * size)), HS, NOW).plan == "pro"


def test_an_expired_token_says_so_only_when_all_else_is_right() -> None:
    late = claims(exp=NOW - 31)
    with pytest.raises(ExpiredToken) as caught:
        verify_token(hs(late), HS, NOW)
    assert (caught.value.status, caught.value.code) == (401, "expired_token")
    for text in (hs(late, secret="x" * 40), hs({**late, "iss": "other"}), hs({**late, "aud": "other"})):
        with pytest.raises(InvalidToken):
            verify_token(text, HS, NOW)


def test_an_unknown_key_is_told_apart_from_a_bad_signature() -> None:
    """Only the first is a reason to look for new keys."""
    with pytest.raises(UnknownSigningKey):
        verify_token(rs(kid="r9"), RS, NOW)
    with pytest.raises(InvalidToken) as caught:
        verify_token(rs(key=OTHER_RSA_KEY), RS, NOW)
    assert not isinstance(caught.value, UnknownSigningKey)


@given(
    st.text()
    | st.tuples(st.text(), st.text(), st.text()).map(lambda parts: "ey" + ".".join(parts))
    | st.tuples(st.binary(), st.binary(), st.binary()).map(lambda parts: ".".join(map(encode, parts)))
)
def test_any_text_is_refused_alike(text: str) -> None:
    for rules in (HS, RS):
        with pytest.raises(InvalidToken):
            verify_token(text, rules, NOW)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from([*CLAIMS, "nbf", "iat"]), _JSON),
    st.dictionaries(st.sampled_from(["typ", "kid", "crit", "alg", "b64", "jwk"]), _JSON),
)
def test_any_signed_claims_give_a_principal_or_the_two_errors(
    changed: dict[str, Any], header: dict[str, Any]
) -> None:
    try:
        principal = verify_token(hs(claims(**changed), **header), HS, NOW)
    except (InvalidToken, ExpiredToken):
        return
    assert principal.key_id.isprintable()
    principal.name.encode()
    assert len(principal.key_id) <= 160


@given(st.text(min_size=1, max_size=255), st.text(min_size=1, max_size=255))
def test_different_subjects_are_different_callers(one: str, other: str) -> None:
    """Also with line ends, lone surrogates and whatever looks like an escape."""
    try:
        names = {verify_token(hs(claims(sub=sub)), HS, NOW).name for sub in (one, other)}
    except InvalidToken:
        return  # lone surrogates are no JSON
    assert len(names) == (1 if one == other else 2)


def test_subjects_that_would_break_a_log_are_escaped() -> None:
    assert verify_token(hs(claims(sub="a\nb")), HS, NOW).key_id == "headrace|a\\nb"
    assert verify_token(hs(claims(sub="a\\nb")), HS, NOW).key_id == "headrace|a\\\\nb"
    assert verify_token(hs(claims(sub="Zoë|x")), HS, NOW).key_id == "headrace|Zoë|x"


@pytest.mark.parametrize("text", ["hr_abcdefgh_x", "", "ey", "a.b.c", "ey.b", "eyJ.a.b.c.d", "sk-ey.a.b"])
def test_other_credentials_do_not_look_like_tokens(text: str) -> None:
    assert not looks_like_token(text)


def test_an_issued_token_is_accepted_until_its_end() -> None:
    text = issue_token(HS, "bob", "basic", 60, NOW)
    principal = verify_token(text, HS, NOW + 59)
    assert (principal.name, principal.plan, principal.expires_at) == ("jwt:headrace|bob", "basic", NOW + 60)
    with pytest.raises(ExpiredToken):
        verify_token(text, HS, NOW + 90)
    assert jwt.get_unverified_header(text) == {"alg": "HS256", "typ": "JWT"}
    with pytest.raises(ValueError, match="HS256"):
        issue_token(RS, "bob", "basic", 60, NOW)


def certificate() -> str:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder(name, name, RSA_KEY.public_key(), 1, day, day + datetime.timedelta(1))
    return builder.sign(RSA_KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize(
    "secret", [PUBLIC_PEM.decode(), certificate(), ""], ids=["pem", "certificate", "empty"]
)
def test_a_public_key_is_no_secret(secret: str) -> None:
    with pytest.raises(ValueError, match=r"is a public key|is empty"):
        SharedSecret(secret)


def test_a_short_secret_works_and_is_known_to_be_short() -> None:
    """The operator is told once; PyJWT's own warning at every token would be an error here."""
    rules = TokenRules(("HS256",), "headrace", "headrace", "plan", SharedSecret("short"))
    assert verify_token(hs(secret="short"), rules, NOW).plan == "pro"
    assert SharedSecret("short").is_short
    assert not SharedSecret(SECRET).is_short


# ── the keys of others ──────────────────────────────────────────────────────────────────────────────────


def jwks(*entries: Any) -> bytes:
    return json.dumps({"keys": entries}).encode()


def test_a_jwks_gives_the_keys_of_the_configured_algorithms() -> None:
    body = jwks(jwk(RSA_KEY, "r1"), jwk(EC_KEY, "e1", use="sig", alg="ES256"))
    both = parse_jwks(body, ("RS256", "ES256"))
    assert len(both) == 2
    rules = msgspec.structs.replace(RS, keys=both)
    assert verify_token(rs(), rules, NOW).plan == "pro"
    assert verify_token(rs(key=EC_KEY, kid="e1", algorithm="ES256"), rules, NOW).plan == "pro"
    assert parse_jwks(body, ("ES256",)).find("r1", "RS256") is None


@pytest.mark.parametrize(
    "entry",
    [
        {"kty": "oct", "k": encode(SECRET.encode()), "kid": "r1", "alg": "HS256"},
        {"kty": "oct", "k": encode(SECRET.encode()), "kid": "r1", "alg": "RS256"},
        jwk(RSA_KEY, "r1", use="enc"),
        jwk(RSA_KEY, "r1", alg="RS512"),
        jwk(RSA_KEY, "r1", alg="HS256"),
        jwk(SHORT_RSA_KEY, "r1"),
        jwk(ec.generate_private_key(ec.SECP384R1()), "r1"),
        {**RSAAlgorithm.to_jwk(RSA_KEY, as_dict=True), "kid": "r1"},  # a private key
        {**jwk(RSA_KEY, "r1"), "n": "AA"},
        {**jwk(RSA_KEY, "r1"), "n": 5},
        {"kty": "RSA", "kid": "r1"},
        {**jwk(EC_KEY, "r1"), "x": encode(b"\1" * 32)},
        {**jwk(EC_KEY, "r1"), "crv": ["P-256"]},
        {**jwk(RSA_KEY, "r1"), "kid": ["r1"]},
        {"kty": ["RSA"]},
        {},
    ],
)
def test_unusable_keys_are_passed_over(entry: dict[str, Any]) -> None:
    ring = parse_jwks(jwks(entry, jwk(OTHER_RSA_KEY, "good")), ("RS256", "ES256"))
    assert len(ring) == 1
    with pytest.raises(ValueError, match="no key for RS256 or ES256"):
        parse_jwks(jwks(entry), ("RS256", "ES256"))


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"keys": {}}', b'{"keys": [1]}', b"[" * 100_000, b"\xff"]
)
def test_garbage_is_no_jwks(body: bytes) -> None:
    with pytest.raises(ValueError, match="is not a JSON Web Key Set"):
        parse_jwks(body, ("RS256",))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first one on a busy machine
@given(
    st.dictionaries(
        st.sampled_from(["kty", "kid", "n", "e", "x", "y", "crv", "alg", "use"]),
        _JSON | st.sampled_from(["RSA", "EC", "P-256", "AQAB"]),
    )
)
def test_any_jwk_is_a_key_or_is_passed_over(entry: dict[str, Any]) -> None:
    try:
        body = json.dumps({"keys": [entry]}, allow_nan=False).encode()
    except ValueError:
        return
    with pytest.raises(ValueError, match=r"has no key|is not a JSON"):
        parse_jwks(body, ("RS256", "ES256"))


def test_errors_of_tokens_are_errors_of_credentials() -> None:
    """Whoever counts failed authentication catches one class."""
    assert issubclass(ExpiredToken, InvalidCredential)
    assert issubclass(InvalidToken, InvalidCredential)
