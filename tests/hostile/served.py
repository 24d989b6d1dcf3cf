"""Rows 10, 14, 38 to 40: odd, and served all the same; the odd part goes nowhere."""

from __future__ import annotations

from tests.hostile.inputs import BODY, CANARY, CHUNKED, JSON, NOTE, Served, asks, posts


def _with(row: int, name: str, *fields: str) -> Served:
    return Served(row, name, posts(BODY, *fields).replace(f"{NOTE}\r\n".encode(), b""))


def _chunked(row: int, name: str, *trailers: str, extension: str = "") -> Served:
    last = "".join(f"{trailer}\r\n" for trailer in trailers)
    body = f"{len(BODY):x}{extension}\r\n{BODY.decode()}\r\n0\r\n{last}\r\n".encode()
    return Served(row, name, asks(JSON, CHUNKED, body=body).replace(f"{NOTE}\r\n".encode(), b""))


SERVED = (
    _chunked(10, "authorization", f"Authorization: Bearer {CANARY}"),
    _chunked(10, "key and host", f"X-Api-Key: {CANARY}", f"Host: {CANARY}"),
    _chunked(10, "extension", extension=f';{CANARY}="x"'),
    _with(14, "underscore", f"X_Api_Key: {CANARY}", f"Content_Length: {CANARY}"),
    _with(38, "request id with CRLF", f"X-Request-ID: {CANARY}%0d%0aX-Evil: 1"),
    _with(38, "request id of 1 kB", f"X-Request-ID: {CANARY.ljust(1000, 'x')}"),
    _with(38, "request id with an emoji", f"X-Request-ID: {CANARY}\xf0\x9f\x98\x80"),
    _with(38, "request id that looks things up", f"X-Request-ID: ${{jndi:ldap://{CANARY}}}"),
    _with(38, "empty request id", "X-Request-ID:"),
    _with(39, "connection names our credential", "Connection: authorization, x-note", NOTE),
    _with(39, "connection names our length", f"Connection: content-length, host, via, {CANARY}"),
    _with(39, "connection names an inner field", "Connection: X-Internal-Key", f"X-Internal-Key: {CANARY}"),
    _with(39, "upgrade to websocket", "Connection: Upgrade, X-Note", "Upgrade: websocket", NOTE),
    _with(
        39,
        "upgrade to h2c",
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        f"HTTP2-Settings: {CANARY}",
    ),
    _with(40, "origin", f"Origin: https://{CANARY}.test", f"Cookie: session={CANARY}"),
    _with(40, "null origin", "Origin: null", f"Cookie: session={CANARY}"),
    _with(
        40, "forwarded for", "X-Forwarded-For: 127.0.0.1", f"Forwarded: for={CANARY}", f"X-Real-IP: {CANARY}"
    ),
)
