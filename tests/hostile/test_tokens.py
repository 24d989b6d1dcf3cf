"""Rows 32 and 33 where an identity service's public keys are known: what a forger can make of those.

On the wire, with the service and an evil one listening; `verify_token` alone, kind by kind, is in
tests/test_identity.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm
from jwt.utils import base64url_encode

from tests.hostile.inputs import BODY, CHAT, CLAIMS, HOST, JSON, LENGTH, raw
from tests.kit.callers import ask
from tests.kit.keys import auth_section
from tests.kit.lab import PLAIN, lab, plays, response
from tests.kit.upstreams import scripted

OURS = rsa.generate_private_key(public_exponent=65537, key_size=2048)
FORGER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
PUBLIC_PEM = OURS.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)


def jwk(key: rsa.RSAPrivateKey, kid: str) -> dict[str, object]:
    return {**RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid}


def signed(
    key: rsa.RSAPrivateKey, *without: str, header: dict[str, object] | None = None, **claims: object
) -> str:
    said = {name: value for name, value in {**CLAIMS, **claims}.items() if name not in without}
    return jwt.encode(said, key, "RS256", headers={"kid": "ours", **(header or {})})


def confused() -> str:
    """HS256 with the public key, which everybody has, as its secret. PyJWT refuses to make one."""
    head = base64url_encode(json.dumps({"alg": "HS256", "typ": "JWT", "kid": "ours"}).encode())
    text = head + b"." + base64url_encode(json.dumps(CLAIMS).encode())
    key = jwt.get_algorithm_by_name("HS256")
    return (text + b"." + base64url_encode(key.sign(text, PUBLIC_PEM))).decode()


def unsigned() -> str:
    return jwt.encode(CLAIMS, None, "none", headers={"kid": "ours"})


def bearing(token: str) -> bytes:
    return raw(CHAT, HOST, f"Authorization: Bearer {token}", JSON, LENGTH, body=BODY)


@pytest.mark.timeout(30)
async def test_forged_tokens(tmp_path: Path) -> None:
    """401 each, and of the addresses that they name none is ever asked."""
    published = response(200, json.dumps({"keys": [jwk(OURS, "ours")]}).encode())
    forged = response(200, json.dumps({"keys": [jwk(FORGER, "ours"), jwk(FORGER, "evil")]}).encode())
    async with scripted(plays(published)) as service, scripted(plays(forged)) as evil:
        rows = {
            "alg none": unsigned(),
            "HS256 with the public key": confused(),
            "another key": signed(FORGER),
            "kid is a path": signed(FORGER, header={"kid": "../../x"}),
            "kid is an address": signed(FORGER, header={"kid": evil.url}),
            "jku": signed(FORGER, header={"jku": f"{evil.url}/keys", "kid": "evil"}),
            "x5u": signed(FORGER, header={"x5u": f"{evil.url}/keys"}),
            "jwk": signed(FORGER, header={"jwk": jwk(FORGER, "ours")}),
            "jku, and a good key id": signed(FORGER, header={"jku": f"{evil.url}/keys"}),
            "wrong aud": signed(OURS, aud="x"),
            "wrong iss": signed(OURS, iss="x"),
            "no exp": signed(OURS, "exp"),
            "nbf in the future": signed(OURS, nbf=4_000_000_000),
            "9 kB": signed(OURS, pad="a" * 6_500),
        }
        tokens = {
            "algorithms": ["RS256"],
            "jwks_url": f"{service.url}/keys",
            "issuer": "headrace",
            "audience": "headrace",
        }
        sections = {"auth": {**auth_section(tmp_path), "jwt": tokens}}
        async with lab(plays(response(200, b"{}")), PLAIN[0], **sections) as it:
            assert (await ask(it.port, bearing(signed(OURS)))).status == 200
            for name, token in rows.items():
                answer = await ask(it.port, bearing(token))
                assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_token"), name
                assert answer.headers["www-authenticate"] == "Bearer"
            expired = await ask(it.port, bearing(signed(OURS, exp=1_700_000_000)))
            assert (expired.status, expired.json()["error"]["code"]) == (401, "expired_token")
            assert len(it.upstream.calls) == 1
        assert evil.connections == 0
