"""What has to hold for any bytes: the same checks for hypothesis (tests/test_fuzz.py) and for atheris (here).

A check raises AssertionError, or whatever the code under it should not have raised.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

from proxy.errors import BadRequest, Dialect
from proxy.peek import Peek, peek
from proxy.sse import BlindScanner, Scanner
from proxy.sse_events import EventReader, UnreadableError
from proxy.usage import REACH, JsonTail, Usage

DIALECTS = tuple(Dialect)
#: A stream that is no longer goes byte by byte, others in as many pieces: time is for other streams.
PIECES = 200
#: Words that mean something to the scanner, in any order and half cut: a soup is seldom a stream, but each
#: part of it stands where only a stranger would put it.
SCANNER_WORDS: tuple[bytes, ...] = (
    *(b"data: ", b"data:", b"event: ", b"event:", b"error:", b": "),
    *(b"\n", b"\n\n", b"\r\n", b"\r", b"\r\n\r\n"),
    *(b"[DONE]", b"[DO", b"NE]", b"message_stop", b"response.completed", b"response.failed", b"error"),
    *(b'{"type":"message_stop"}', b'{"type":"response.completed","response":'),
    *(b'{"type":"response.created",', b'"response":', b'"message":', b'{"choices":['),
    *(b'"type": "error"', b'"object":"error"', b'"error":{', b'"error": "x"'),
    *(b'"delta":{"content":"Hi"}', b'"content":""', b'"delta":"a"', b'"text":"\\"usage\\""'),
    *(b'"tool_calls":[{', b'"tool_calls":[]', b'"finish_reason":"stop"', b'"finish_reason":""'),
    *(b'"finish_reason": "error"', b'"finish_reason":null', b'"usage":null', b'"usage":'),
    *(b'"usage":{"prompt_tokens":5,"completion_tokens":7}', b'"total_tokens":9'),
    *(b'"usage":{"input_tokens":3}', b'"usage":{"output_tokens":4}'),
    *(b"{", b"}", b"[", b"]", b",", b'"', b"\\", b" ", b"\xff", b"\xef\xbb\xbf"),
    *(b"x" * 70, b"y" * 2100, b"z" * 4200, b"w" * 13000),
)
_PEEKED = tuple(Peek.__struct_fields__)
#: What routes, what nearly does, and what only some readers of JSON take.
PEEK_WORDS: tuple[bytes, ...] = (
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b" ", b"\n", b"\t"),
    *(b"-", b".", b"e", b"0", b"1", b"12", b"1.0", b"1e400", b"-0", b"01", b"2147483649", b"9" * 4301),
    *(b"true", b"false", b"null", b"NaN", b"Infinity"),
    *(b'"%b"' % name.encode() for name in _PEEKED),
    *(b'"%b":' % name.encode() for name in _PEEKED),
    *(b'"mod\\u0065l":', b'"messages":', b'"a":', b'{"model":"m"', b'{"model":"m","stream":true}'),
    *(b'"m"', b'"\\u0041"', b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\\x"'),
    *(b"\x01", b"\xff", b"\xc3\xa9", b"\xed\xa0\x80"),
)


def cut(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """Pieces of these sizes, over and over."""
    pieces, at = [], 0
    for size in cycle(sizes):
        if at >= len(data):
            return pieces
        pieces.append(data[at : at + size])
        at += size
    return [data]


# ── the scanner ──────────────────────────────────────────────────────────────────────────────────────────

#: What a scanner may hold of a stream (bytes): a report of REACH that is arriving, twice that before it is
#: looked at again, and two batches of sixteen reads below 2 KiB: one put aside, one looked at last.
_HELD = 2 * (REACH + 4096) + 2 * 16 * 2049

_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")

Answers = tuple[bool, bool, bool, bool, bool, bool, Usage | None]


def _held(scanner: Scanner) -> int:
    head, _, foot, _ = scanner._shape or (b"", 0, b"", 0)
    return len(scanner._tail) + len(head) + len(foot)


def _scan(kind: type[Scanner], dialect: Dialect, expects: bool, pieces: Iterable[bytes]) -> Answers:
    """What it answers at the end. On the way: nothing that was seen is forgotten, no news come unannounced,
    and what is kept has a bound."""
    scanner = kind(dialect, expects_terminator=expects)
    for piece in pieces:
        before = (scanner.first_token, scanner.terminated)
        told = scanner.feed(piece)
        after = (scanner.first_token, scanner.terminated)
        assert told or after == before
        assert after >= before
        assert _held(scanner) <= _HELD + len(piece)
    guess = scanner.estimate(3)
    assert guess.completion_tokens >= 0
    return (
        scanner.terminated,
        scanner.first_token,
        scanner.at_boundary(),
        scanner.succeeded(framed=True),
        scanner.succeeded(framed=False),
        scanner.in_band_error(),
        scanner.usage(),
    )


def check_scanner(
    stream: bytes, sizes: Sequence[int], dialect: Dialect, expects: bool, pieces: int = PIECES
) -> None:
    """The answers are those of the whole, however it is cut; what reports usage does not change the rest.
    The last of them, usage, has a bound: of an event that is longer it may say one thing or the other."""
    count = 7 if max(map(len, _BLANK_LINE.split(stream))) <= REACH else 6
    whole = _scan(Scanner, dialect, expects, [stream])
    for parts in (cut(stream, sizes), cut(stream, [1 + len(stream) // pieces])):
        assert _scan(Scanner, dialect, expects, parts)[:count] == whole[:count]
        assert _scan(BlindScanner, dialect, expects, parts)[:6] == whole[:6]


def _events(pieces: Iterable[bytes]) -> tuple[list[bytes], bytes] | None:
    reader, events = EventReader(), []
    try:
        for piece in pieces:
            events += reader.feed(piece)
    except UnreadableError:
        return None
    found = [event.lstrip(b"\r\n") for event in events]
    return [event for event in found if event], reader.rest().lstrip(b"\r\n")


def check_events(stream: bytes, sizes: Sequence[int], pieces: int = PIECES) -> None:
    """The same events in any cut, but for empty ones: half a line end may stand before each."""
    whole = _events([stream])
    assert whole is not None
    assert _events(cut(stream, sizes)) == whole
    assert _events(cut(stream, [1 + len(stream) // pieces])) == whole


def check_json_tail(body: bytes, sizes: Sequence[int], dialect: Dialect) -> None:
    """An answer below 64 KiB is read whole, however it arrives."""
    found = []
    for pieces in ([body], cut(body, sizes)):
        tail = JsonTail()
        for piece in pieces:
            tail.feed(piece)
        found.append(tail.usage(dialect))
    assert found[0] == found[1]


# ── the peek ─────────────────────────────────────────────────────────────────────────────────────────────


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _is_odd(value: Any) -> bool:
    """Half a surrogate pair, or a number that no double holds: RFC 8259 lets a reader refuse both."""
    if isinstance(value, list):
        return any(map(_is_odd, value))
    if isinstance(value, str):
        return any("\ud800" <= character <= "\udfff" for character in value)
    return isinstance(value, float) and not math.isfinite(value)


def _fits(name: str, value: Any) -> bool:
    """Is this a value that the contract knows for a routing field?"""
    if value is None:
        return True
    if name == "stream":
        return isinstance(value, bool)
    if name == "model":
        return isinstance(value, str) and len(value) <= 256
    return type(value) is int and 1 <= value <= (1024 if name == "n" else 2**31)


def _verdict(body: bytes) -> tuple[set[str], bool, dict[str, Any]]:
    """How the standard library reads it, as strictly as RFC 8259: the codes of which a refusal has one (none:
    there may be no refusal), whether it has to be refused, and what is in the body otherwise."""
    outermost: list[tuple[str, Any]] = []
    odd = []

    def remember(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        outermost[:] = pairs
        odd.extend(pair for pair in pairs if _is_odd(list(pair)))
        return dict(pairs)

    try:
        document = json.loads(body.decode(), object_pairs_hook=remember, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return {"invalid_json", "bad_request"}, True, {}  # whatever was wrong first
    if not isinstance(document, dict):
        return {"invalid_json"}, True, {}
    routing = [name for name, _ in outermost if name in _PEEKED]
    reasons = set()
    if not all(_fits(name, value) for name, value in outermost if name in _PEEKED):
        reasons.add("bad_request")
    if len(routing) > len(set(routing)):
        reasons.add("duplicate_key")
    return reasons | ({"invalid_json"} if odd else set()), bool(reasons), document


def _attempt(body: bytes) -> Peek | BadRequest:
    try:
        return peek(body)
    except BadRequest as error:
        return error


def check_peek(body: bytes) -> None:
    """A Peek or a BadRequest, whichever the standard library's reading asks for, with the same values."""
    reasons, has_to, document = _verdict(body)
    found = _attempt(body)
    if isinstance(found, BadRequest):
        assert found.status == 400
        assert found.code in reasons
        assert found.param in (None, *_PEEKED)
        return
    assert not has_to
    assert all(getattr(found, name) == document.get(name) for name in _PEEKED)


# ── bytes into cases, for atheris ────────────────────────────────────────────────────────────────────────


#: The values of fields that route, and of others.
PEEK_VALUES: tuple[bytes, ...] = (
    *(word for word in PEEK_WORDS if re.fullmatch(rb'["\\\w.+-]+', word)),
    *(b"[]", b"{}", b'{"model":"x"}', b'[{"n":1}]', b'"%b"' % (b"x" * 257)),
    *(b"1024", b"1025", b"1" * 401 + b".5", b'"model"', b'"\\"n\\":1"'),
)
PEEK_NAMES: tuple[bytes, ...] = tuple(word for word in PEEK_WORDS if word.endswith(b'":'))


def members(wrong: bytes, data: bytes) -> bytes:
    """An object: two bytes a member. `wrong`: where a byte is another, and which; 255 leaves it whole."""
    pairs = zip(data[::2], data[1::2], strict=False)
    body = b"{%b}" % b",".join(
        PEEK_NAMES[name % len(PEEK_NAMES)] + PEEK_VALUES[value % len(PEEK_VALUES)] for name, value in pairs
    )
    if len(wrong) < 3 or wrong[2] == 255:
        return body
    at = int.from_bytes(wrong[:2]) % len(body)
    return body[:at] + wrong[2:3] + body[at + 1 :]


def soup(data: bytes, words: Sequence[bytes]) -> bytes:
    """Each byte is a word; those above stand for themselves, less what the words need."""
    return b"".join(words[byte] if byte < len(words) else bytes([byte - len(words)]) for byte in data)
