"""Rows 1 to 24, 27, 28 and 40, and the extras: what is wrong is in the head or in the framing."""

from __future__ import annotations

from tests.hostile.inputs import (
    BODY,
    CANARY,
    CHAT,
    CHUNKED,
    EXPECT,
    GOOD,
    HOST,
    JSON,
    LENGTH,
    NOTE,
    REQUIRED,
    SMUGGLED,
    Input,
    asks,
    gets,
    posts,
    raw,
)

EMPTY_CHUNKED = b"0\r\n\r\n" + SMUGGLED


def _chunked(row: int, name: str, body: bytes, *status: int) -> Input:
    return Input(row, name, asks(JSON, CHUNKED, body=body + SMUGGLED), status or (400,))


def _coding(row: int, name: str, *fields: str, status: tuple[int, ...]) -> Input:
    return Input(row, name, asks(JSON, *fields, body=EMPTY_CHUNKED), status)


def _length(row: int, name: str, *fields: str) -> Input:
    return Input(row, name, asks(JSON, *fields, body=BODY + SMUGGLED))


def _host(row: int, name: str, *hosts: str) -> Input:
    return Input(row, name, raw(CHAT, *hosts, GOOD, NOTE, JSON, LENGTH, body=BODY))


def _path(row: int, target: str, *status: int, method: str = "GET", closes: bool = False) -> Input:
    name = f"{method} {target}".replace("/", "|")
    return Input(row, name, gets(target, method=method), status or (404,), closes=closes)


def _target(row: int, target: str, *status: int) -> Input:
    """Refused for the form of its target, with a body that would be served."""
    name = target.replace("/", "|")
    line = f"POST {target} HTTP/1.1"
    return Input(row, name, posts(BODY, line=line), status or (400,), closes=404 not in status)


FRAMING = (
    _coding(1, "length and chunked", "Content-Length: 4", CHUNKED, status=(400,)),
    _coding(1, "chunked and length", CHUNKED, "Content-Length: 4", status=(400,)),
    _length(2, "two lengths", LENGTH, "Content-Length: 5"),
    _length(3, "equal lengths", LENGTH, LENGTH),
    _length(3, "length list", f"{LENGTH}, {len(BODY)}"),
    *(
        _length(4, f"length {value or 'empty'}", f"Content-Length: {value}")
        for value in ("+1", "-1", "1_0", "0x1", "1 0", "1.0", "", "9" * 30)
    ),
    *(
        _coding(5, f"coding {value}", f"Transfer-Encoding: {value}", status=(400, 501))
        for value in ("xchunked", "identity", "chunked, chunked", "chunked;q=1", "chunked, identity")
    ),
    _coding(5, "two fields", CHUNKED, CHUNKED, status=(400, 501)),
    _coding(6, "gzip", "Transfer-Encoding: gzip, chunked", status=(400, 501)),
    _coding(6, "gzip last", "Transfer-Encoding: chunked, gzip", status=(400, 501)),
    _coding(7, "empty coding", "Transfer-Encoding:", status=(400,)),
    Input(8, "chunked on 1.0", asks(JSON, CHUNKED, line=CHAT.replace("1.1", "1.0"), body=EMPTY_CHUNKED)),
    _chunked(9, "size -1", b"-1\r\n\r\n"),
    _chunked(9, "size of 17 digits", b"fffffffffffffffff\r\nx\r\n0\r\n\r\n", 400, 413),
    _chunked(9, "size 0x5", b"0x5\r\nhello\r\n0\r\n\r\n"),
    _chunked(9, "size with a blank", b"5 \r\nhello\r\n0\r\n\r\n"),
    _chunked(9, "bare LF", b"%x\n%b\n0\n\n" % (len(BODY), BODY)),
    _chunked(9, "LF in an extension", b'5;a="\n"\r\nhello\r\n0\r\n\r\n'),
    _chunked(9, "more than it says", b"2\r\nhello\r\n0\r\n\r\n"),
    _chunked(9, "no size", b"\r\nhello\r\n0\r\n\r\n"),
)

HOST_TRAILER = b"0\r\nHost: %b\r\nX-T: a\r\n\r\n" % CANARY.encode()
TRAILERS = (
    Input(10, "host as a trailer, and another", asks(JSON, CHUNKED, body=HOST_TRAILER)),
    Input(10, "length as a trailer", asks(JSON, CHUNKED, body=b"0\r\nContent-Length: 7\r\n\r\n")),
    Input(10, "NUL in a trailer", asks(JSON, CHUNKED, body=b"0\r\nX-T: \0%b\r\n\r\n" % CANARY.encode())),
)

LINES = (
    Input(11, "bare LF", asks(LENGTH, body=BODY).replace(b"\r\n", b"\n")),
    Input(11, "one bare LF", asks("X-A: b\nX-C: d", JSON, LENGTH, body=BODY)),
    *(
        Input(12, f"{name} in {field}", asks(f"{prefix}{CANARY}{control}x", JSON, LENGTH, body=BODY))
        for name, control in {"CR": "\r", "NUL": "\0", "0x01": "\x01", "DEL": "\x7f"}.items()
        for field, prefix in {"x-api-key": "X-Api-Key: ", "x-odd": "X-Odd: "}.items()
    ),
    Input(12, "0x01 in authorization", raw(CHAT, HOST, f"{GOOD}\x01", NOTE, JSON, LENGTH, body=BODY)),
    Input(12, "NUL in a name", asks(f"X-\0{CANARY}: a", JSON, LENGTH, body=BODY)),
    Input(13, "obs-fold", asks("X-Folded: a", f"  {CANARY}", JSON, LENGTH, body=BODY)),
    Input(13, "obs-fold of a length", asks(JSON, "Content-Length:", f" {len(BODY)}", body=BODY)),
    Input(14, "space before colon", asks(f"X-Space : {CANARY}", JSON, LENGTH, body=BODY)),
    Input(14, "length with a space", asks(JSON, LENGTH.replace(":", " :"), body=BODY)),
    Input(14, "empty name", asks(f": {CANARY}", JSON, LENGTH, body=BODY)),
    Input(14, "no colon", asks(CANARY, JSON, LENGTH, body=BODY)),
)

TARGETS = (
    _host(15, "no host"),
    _host(15, "two hosts", "Host: a", "Host: b"),
    _host(15, "equal hosts", HOST, HOST),
    _host(16, "empty", "Host:"),
    _host(16, "blank", "Host: a b"),
    _host(16, "user", f"Host: {CANARY}@test"),
    _host(16, "path", f"Host: test/{CANARY}"),
    _host(16, "port", "Host: test:99999"),
    _host(16, "port of ipv6", "Host: [::1]:99999"),
    _host(16, "port is text", f"Host: test:{CANARY}"),
    _target(17, f"http://{CANARY}.test/v1/chat/completions", 400, 421),
    _target(17, "https://127.0.0.1/v1/chat/completions", 400, 421),
    _target(17, "http://test/v1/chat/completions", 400, 421),
    _target(18, f"//{CANARY}.test/v1/chat/completions", 404),
    _target(18, "///v1/chat/completions", 404),
    _target(18, "/%5cevil", 404),
    _target(18, "/\\evil.test/v1/chat/completions", 404),
    _target(18, "\\\\evil\\v1\\models", 400),
    *(
        _path(19, path)
        for path in (
            "/v1/../admin",
            "/v1/%2e%2e/x",
            "/v1/files/..",
            "/v1/files/../models",
            "/v1/files/%2e%2e/%2e%2e/admin",
            "/v1/files/a%2fb",
            "/v1/files/a%2Fb",
            "/v1/files/a%5cb",
            "/v1/files/a%00b",
            "/v1/files/a%0d%0ab",
            "/v1/files/a%252fb",
            "/v1/files//b",
            "/v1/chat/%63ompletions",
            "/static/../__init__.py",
            "/static/%2e%2e/__init__.py",
        )
    ),
    Input(19, "GET |v1|models|..", gets("/v1/models/.."), (404,), "model_not_found", closes=False),
    _target(20, f"@{CANARY}.test/"),
    _target(20, CANARY),
    _target(20, "evil.test:80"),
    _target(20, "/v1/files/\xff\xfe"),
    Input(21, "CONNECT", gets(f"{CANARY}.test:443", method="CONNECT"), (405,)),
    Input(21, "CONNECT of a path", gets("/v1/models", method="CONNECT"), (400, 405)),
    Input(22, "TRACE", gets("/v1/models", method="TRACE"), (405,)),
    Input(22, "OPTIONS *", gets("*", method="OPTIONS"), (404,), closes=False),
    Input(23, "HTTP/0.9", f"GET /v1/models/{CANARY}\r\n\r\n".encode(), (400, 505)),
    *(
        Input(23, f"HTTP/{version}", gets("/v1/models", version=f"HTTP/{version}"), (400, 505))
        for version in ("0.9", "1.9", "2.0", "3.0", "1", "11.1")
    ),
    Input(23, "preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + CANARY.encode(), (400, 405, 505)),
    Input(24, "long request line", gets(f"/v1/files/{CANARY}{'a' * 9000}"), (414,)),
    Input(24, "long query", gets(f"/v1/files?q={CANARY}{'a' * 9000}"), (414,)),
    Input(24, "long field", asks(f"X-Long: {CANARY}{'a' * 20_000}"), (431,)),
    Input(24, "long credential", raw(CHAT, HOST, f"X-Api-Key: {CANARY}{'a' * 20_000}"), (431,)),
    Input(24, "long name", asks(f"{CANARY}{'X' * 20_000}: a"), (400, 431)),
    Input(24, "many fields", asks(*(f"X-{number}: a" for number in range(200))), (431,)),
)

EXPECTATIONS = (
    *(
        Input(27, name, raw(CHAT, HOST, *fields, NOTE, JSON, LENGTH, EXPECT), (401,), code, None, REQUIRED)
        for name, code, *fields in (
            ("no credential", "invalid_api_key"),
            ("unknown key", "invalid_api_key", f"X-Api-Key: {CANARY}"),
            ("bad token", "invalid_token", f"{GOOD}x"),
        )
    ),
    Input(
        27, "no such path", asks(JSON, LENGTH, EXPECT, line="POST /v1/nothing HTTP/1.1"), (404,), closes=None
    ),
    Input(28, "expect", asks(JSON, LENGTH, f"Expect: {CANARY}", body=BODY), (417,)),
    Input(28, "expect two", asks(JSON, LENGTH, EXPECT, f"Expect: {CANARY}", body=BODY), (417,)),
    Input(28, "expect list", asks(JSON, LENGTH, f"{EXPECT}, {CANARY}", body=BODY), (417,)),
)

PLACES = (
    *(
        Input(
            40,
            f"{path.replace('/', '|')} from 127.0.0.1",
            gets(path, f"{name}: {value}"),
            (404,),
            closes=False,
        )
        for path in ("/admin/streams", "/metrics", "/debug/state")
        for name, value in {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1"}.items()
    ),
    Input(42, "hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + CANARY.encode()),
    Input(42, "ssh", b"SSH-2.0-%b\r\n\r\n" % CANARY.encode()),
    Input(42, "nonsense", b"\r\n\r\n\0\xff%b\r\n\r\n" % CANARY.encode()),
    *(_path(43, path) for path in ("/metrics", "/healthz", "/readyz", "/admin/reload", "/debug/state")),
)

HEADS = (*FRAMING, *TRAILERS, *LINES, *TARGETS, *EXPECTATIONS, *PLACES)
