"""Rows 25, 26, 29 to 37: the head is good HTTP, and what it says or brings is not."""

from __future__ import annotations

import gzip
import zlib

from tests.hostile.inputs import (
    BODY,
    CANARY,
    CHAT,
    CHUNKED,
    CREDENTIAL,
    EXPECT,
    GOOD,
    HOST,
    JSON,
    LENGTH,
    NOTE,
    REQUIRED,
    Input,
    asks,
    posts,
    raw,
    token,
)

SMALL = {"max_body_bytes": 1000}
#: 20 MB of zeros in 20 kB.
BOMB = zlib.compress(bytes(20_000_000), 9, 31)


def _json(row: int, name: str, body: bytes, code: str = "invalid_json", status: int = 400) -> Input:
    return Input(row, name, posts(body), (status,), code, closes=False)


def _who(row: int, name: str, *fields: str, status: int = 401, code: str = "invalid_api_key") -> Input:
    sent = raw(CHAT, HOST, *fields, NOTE, JSON, LENGTH, body=BODY)
    return Input(row, name, sent, (status,), code, closes=False, modes=REQUIRED)


def _bearer(text: str) -> str:
    return f"Authorization: Bearer {text}"


def _token(row: int, name: str, text: str, code: str = "invalid_token") -> Input:
    return _who(row, name, _bearer(text), code=code)


SIZES = (
    Input(25, "declared", asks(JSON, "Content-Length: 1001"), (413,), "request_too_large", settings=SMALL),
    Input(
        25,
        "with expect",
        asks(JSON, "Content-Length: 1001", EXPECT),
        (413,),
        "request_too_large",
        settings=SMALL,
    ),
    Input(25, "huge", asks(JSON, f"Content-Length: {2**60}"), (413,), "request_too_large"),
    Input(
        26,
        "one chunk",
        asks(JSON, CHUNKED, body=b"3e9\r\n" + b" " * 1001 + b"\r\n"),
        (413,),
        "request_too_large",
        settings=SMALL,
    ),
    Input(
        26,
        "many chunks",
        asks(JSON, CHUNKED, body=b"1\r\n \r\n" * 1001),
        (413,),
        "request_too_large",
        settings=SMALL,
    ),
    *(
        Input(29, coding, asks(JSON, LENGTH, f"Content-Encoding: {coding}", body=BODY), (415,))
        for coding in ("gzip", "GZIP", "deflate", "br", "zstd", "gzip, identity", CANARY)
    ),
    Input(29, "coded JSON", posts(gzip.compress(BODY), "Content-Encoding: gzip"), (415,)),
    Input(29, "bomb", posts(BOMB, "Content-Encoding: gzip"), (415,)),
    Input(29, "two types", posts(BODY, "Content-Type: text/plain"), (400, 415), closes=None),
    Input(29, "two codings", posts(BODY, "Content-Encoding: identity", "Content-Encoding: gzip"), (415,)),
    *(
        Input(
            29,
            f"type {kind or 'empty'}".replace("/", "|"),
            asks(f"Content-Type: {kind}", LENGTH, body=BODY),
            (415,),
            closes=False,
        )
        for kind in ("text/plain", "application/jsonp", "application/json; charset=utf-16", "")
    ),
)

TWO = {"status": 400, "code": "ambiguous_credentials"}
CALLERS = (
    _who(30, "two authorizations", GOOD, _bearer(CANARY), **TWO),
    _who(30, "authorization and x-api-key", GOOD, f"X-Api-Key: {CANARY}", **TWO),
    _who(30, "authorization and api-key", GOOD, f"Api-Key: {CANARY}", **TWO),
    _who(30, "two x-api-keys", f"X-Api-Key: {CREDENTIAL}", f"X-Api-Key: {CANARY}", **TWO),
    _who(31, "none"),
    _who(31, "empty", "Authorization:"),
    _who(31, "basic", f"Authorization: Basic {CANARY}"),
    _who(31, "bearer of nothing", "Authorization: Bearer"),
    _who(31, "bearer of a blank", "Authorization: Bearer "),
    _who(31, "10 kB", _bearer(CANARY + "a" * 10_000)),
    _who(31, "not ASCII", _bearer(f"hr_{CANARY}\xe9")),
    _who(31, "unknown", _bearer("hr_aaaaaaaaaa_" + CANARY.ljust(43, "A"))),
    _who(31, "only with an underscore", f"X_Api_Key: {CREDENTIAL}"),
    _token(32, "alg none", token("", "none")),
    _token(32, "another secret", token("another-secret-of-the-tests-" * 3)),
    _token(32, "another algorithm", token(algorithm="HS512")),
    _token(32, "cut signature", CREDENTIAL[:-6]),
    _token(33, "expired", token(exp=1_700_000_000), "expired_token"),
    _token(33, "wrong aud", token(aud=CANARY)),
    _token(33, "wrong iss", token(iss=CANARY)),
    _token(33, "no exp", token(without="exp")),
    _token(33, "nbf in the future", token(nbf=4_000_000_000)),
    _token(33, "9 kB", token(pad="a" * 6_500)),
    _token(33, "unknown plan", token(plan=CANARY)),
)

NOTED = b'"user":"%b"' % CANARY.encode()
BODIES = (
    _json(34, "empty", b""),
    _json(34, "text", CANARY.encode()),
    _json(34, "half", b'{"model":"m",' + NOTED),
    _json(34, "two", BODY + BODY),
    _json(34, "array", b"[" + BODY + b"]"),
    _json(34, "string", b'"%b"' % CANARY.encode()),
    _json(34, "null", b"null"),
    _json(34, "number", b"1"),
    _json(34, "utf-16", BODY.decode().encode("utf-16")),
    _json(34, "bom", b"\xef\xbb\xbf" + BODY),
    _json(34, "latin-1", b'{"model":"m","user":"%b\xe9"}' % CANARY.encode()),
    _json(34, "NaN", b'{"model":"m",%b,"temperature":NaN}' % NOTED),
    _json(34, "Infinity", b'{"model":"m",%b,"temperature":-Infinity}' % NOTED),
    _json(34, "trailing comma", b'{"model":"m",%b,}' % NOTED),
    _json(34, "single quotes", b"{'model':'m'}"),
    _json(34, "comment", BODY + b" // x"),
    _json(34, "control character", b'{"model":"m","user":"%b\n"}' % CANARY.encode()),
    _json(34, "lone surrogate in a model", b'{"model":"\\ud800"}'),
    _json(34, "integer of 5000 digits", b'{"model":"m","seed":' + b"9" * 5000 + b"}"),
    _json(34, "depth 100000", b'{"model":"m","a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    _json(34, "objects 100000 deep", b'{"model":"m","a":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001),
    _json(34, "unclosed", b"[" * 100_000),
    _json(35, "two models", b'{"model":"m","model":"%b"}' % CANARY.encode(), "duplicate_key"),
    _json(35, "equal models", b'{"model":"m",%b,"model":"m"}' % NOTED, "duplicate_key"),
    _json(35, "escaped", b'{"model":"m","mod\\u0065l":"%b"}' % CANARY.encode(), "duplicate_key"),
    _json(35, "both escaped", b'{"\\u006dodel":"m","mod\\u0065l":"m"}', "duplicate_key"),
    _json(35, "two streams", b'{"model":"m","stream":true,"stream":false}', "duplicate_key"),
    _json(35, "two max_tokens", b'{"model":"m","max_tokens":1,"max_tokens":9}', "duplicate_key"),
    _json(36, "missing", b'{"messages":[]}', "missing_model"),
    _json(36, "empty", b'{"model":""}', "missing_model"),
    _json(36, "null", b'{"model":null}', "missing_model"),
    _json(36, "number", b'{"model":1}', "bad_request"),
    _json(36, "list", b'{"model":["%b"]}' % CANARY.encode(), "bad_request"),
    _json(36, "100 kB", b'{"model":"%b"}' % CANARY.encode().ljust(100_000, b"m"), "bad_request"),
    _json(36, "unknown", b'{"model":"%b"}' % CANARY.encode(), "model_not_found", 404),
    _json(36, "path", b'{"model":"../m"}', "model_not_found", 404),
    _json(37, "stream is text", b'{"model":"m","stream":"false"}', "bad_request"),
    _json(37, "stream is a number", b'{"model":"m","stream":1}', "bad_request"),
    _json(37, "n 10^9", b'{"model":"m","n":1000000000}', "bad_request"),
    _json(37, "n 0", b'{"model":"m","n":0}', "bad_request"),
    _json(37, "max_tokens -1", b'{"model":"m","max_tokens":-1}', "bad_request"),
    _json(37, "max_tokens is text", b'{"model":"m","max_tokens":"%b"}' % CANARY.encode(), "bad_request"),
    _json(37, "max_completion_tokens -1", b'{"model":"m","max_completion_tokens":-1}', "bad_request"),
    _json(37, "max_output_tokens 1e400", b'{"model":"m","max_output_tokens":1e400}', "bad_request"),
)

REFUSED_LATER = (*SIZES, *CALLERS, *BODIES)
