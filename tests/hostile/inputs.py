"""What a hostile input is, and how its bytes are put together.

Each carries a canary, and most of them a credential that is valid: neither may be seen again. The rows are
those of the table in tests/hostile/table.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jwt

#: In no input is it where it may cross, be answered or be logged.
CANARY = "c4n4ry-5d1c7e"
SECRET = "a-secret-of-the-tests-" * 4
JWT_SECTION = {"algorithms": ["HS256"], "secret": SECRET, "issuer": "headrace", "audience": "headrace"}
CLAIMS = {"iss": "headrace", "aud": "headrace", "sub": "alice", "plan": "enterprise", "exp": 4102444800}


def token(secret: str = SECRET, algorithm: str = "HS256", without: str = "", **changed: Any) -> str:
    """A token; the good one of `CREDENTIAL` unless told otherwise."""
    headers = changed.pop("headers", None)
    claims = {name: value for name, value in {**CLAIMS, **changed}.items() if name != without}
    return jwt.encode(claims, secret, algorithm=algorithm, headers=headers)


CREDENTIAL = token()
#: What must not be seen again: the canary, and the part of the credential that makes it one.
NEEDLES = (CANARY.encode(), CREDENTIAL.rpartition(".")[2].encode())

CHAT = "POST /v1/chat/completions HTTP/1.1"
HOST = "Host: test"
JSON = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"
EXPECT = "Expect: 100-continue"
GOOD = f"Authorization: Bearer {CREDENTIAL}"
NOTE = f"X-Note: {CANARY}"
BODY = b'{"model":"m","user":"%b"}' % CANARY.encode()
LENGTH = f"Content-Length: {len(BODY)}"
#: Behind an input that frames it: whoever reads the framing otherwise sees a second request.
SMUGGLED = b"GET /v1/files HTTP/1.1\r\nHost: test\r\nX-Note: %b\r\n\r\n" % CANARY.encode()


def raw(line: str, *fields: str, body: bytes = b"") -> bytes:
    """These lines and nothing else."""
    return "\r\n".join([line, *fields, "", ""]).encode("latin-1") + body


def asks(*fields: str, line: str = CHAT, body: bytes = b"") -> bytes:
    """A request of somebody who may ask, with these fields as well."""
    return raw(line, HOST, GOOD, NOTE, *fields, body=body)


def posts(body: bytes, *fields: str, line: str = CHAT) -> bytes:
    """The same with a body that is framed well."""
    return asks(JSON, f"Content-Length: {len(body)}", *fields, line=line, body=body)


def gets(target: str, *fields: str, method: str = "GET", version: str = "HTTP/1.1") -> bytes:
    return asks(*fields, line=f"{method} {target} {version}")


EVERYWHERE = ("open", "required")
REQUIRED = ("required",)


@dataclass(frozen=True)
class Input:
    """Refused, whatever else happens.

    status, code: which answers are right. closes: does the connection end with the answer; None: the body
    was not sent, so it cannot be used anyhow. modes: of `auth.mode`. settings: further sections.
    """

    row: int
    name: str
    sent: bytes
    status: tuple[int, ...] = (400,)
    code: str | None = None
    closes: bool | None = True
    modes: tuple[str, ...] = EVERYWHERE
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"row{self.row:02d}-{self.name}"


@dataclass(frozen=True)
class Served:
    """Served like any other request, but for what makes it odd: that goes nowhere."""

    row: int
    name: str
    sent: bytes
    body: bytes = BODY  # as the upstream has to get it
    modes: tuple[str, ...] = EVERYWHERE

    def __str__(self) -> str:
        return f"row{self.row:02d}-{self.name}"
