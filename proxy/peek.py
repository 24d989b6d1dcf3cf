"""What Headrace has to know of a JSON body: the model, whether it streams, and what it may cost.

The body itself is forwarded as it came. Only the fields that route, authorise or bill are decoded; the
rest is checked for syntax and skipped (1 us for 2 KB where a full parse takes 2 to 9).

Upstreams do not agree on which of two equal keys counts, so two `model` keys would let a caller be
authorised for one model and served another: they are refused. No fast parser reports duplicates, so a body
that could hold one (a second literal key, or a key spelt with \\u escapes) takes the slow, strict way.

All that costs 3 ms for 2 MB, and 98 for one that is made to cost (measured): chunks of other streams would
wait for it. A large body is therefore looked at in steps (`peeking`), and its outermost keys one by one.
"""

from __future__ import annotations

import itertools
import json
import re
from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import Generator
from typing import Annotated, Any

import msgspec

from proxy.errors import BadRequest

_Count = Annotated[int, msgspec.Meta(ge=1, le=2**31)]


class Peek(msgspec.Struct, gc=False):
    """The fields that route, authorise or bill."""

    model: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    stream: bool | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    max_output_tokens: _Count | None = None


_decoder = msgspec.json.Decoder(Peek)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ROUTING = frozenset(Peek.__struct_fields__)
_KEYS = re.compile(rb'"(%b)"\s*:' % b"|".join(sorted(name.encode() for name in _ROUTING)))
# An ASCII letter has no reason to be escaped (other than to hide a key): \u0041 to \u007a.
_ESCAPED_LETTER = re.compile(rb"\\u00[4-7]")
# Python refuses integers of more digits than this (CVE-2020-10735); some upstreams hang on them.
_MAX_DIGITS = 4300
#: json takes 50 ms for this much, on the event loop.
_STRICT_BYTES = 2**20

#: Bodies above this are looked at in steps of it. A whole look at this much takes 0.4 ms, a step of a larger
#: one 0.1 ms; what cannot be divided is the decoder's own 0.45 ms for each MB.
STEP_BYTES = 2**17
_STEP_KEYS = 200
# Strings as the decoder has already found them to be well-formed; possessive, so that nothing is tried twice.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_MEMBER = re.compile(rb"\s*[{,]\s*(%b)\s*:\s*" % _STRING, re.DOTALL)
_MEMBER_END = re.compile(rb"\s*[,}]")
_OBJECT_END = re.compile(rb"\s*\{?\s*\}\s*")
_STRUCTURE = re.compile(rb"%b|[\[\]{},]" % _STRING, re.DOTALL)
_names = msgspec.json.Decoder(str)
# An integer that is too long; behind a point or in an exponent any number of digits is read.
_LONG_INTEGER = re.compile(rb"(?<![.0-9eE])(?<![eE][+-])[0-9]{%d,}+(?![.eE])" % (_MAX_DIGITS + 1))

Steps = Generator[None, None, None]


def peek(body: bytes) -> Peek:
    """Decodes what counts of a JSON object, or raises BadRequest (never anything else)."""
    try:
        found = _decoder.decode(body)
        if not body.isascii():
            body.decode()
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequest("invalid_json", "The request body is not valid JSON.") from None
    if _suspicious(body):
        _strictly(body)
    return found


def peeking(body: bytes, step_bytes: int = STEP_BYTES) -> Generator[None, None, Peek]:
    """`peek` in steps, for large bodies: between two of them others may have their turn. What it returns or
    raises is the same, but where a body is wrong in two ways it may be the other one."""
    try:
        members = _members.decode(body)
        yield
        found = _routing_fields(members)
        yield from _check_utf8(body, step_bytes)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequest("invalid_json", "The request body is not valid JSON.") from None
    yield from _check_names(body, members)
    yield from _check_numbers(body, step_bytes)
    return found


def _routing_fields(members: dict[str, msgspec.Raw]) -> Peek:
    return _decoder.decode(
        msgspec.json.encode({name: raw for name, raw in members.items() if name in _ROUTING})
    )


def _check_utf8(body: bytes, step_bytes: int) -> Steps:
    """Raises UnicodeDecodeError."""
    if body.isascii():
        return
    decoder = getincrementaldecoder("utf-8")()
    for at in range(0, len(body), step_bytes):
        decoder.decode(body[at : at + step_bytes])
        yield
    decoder.decode(b"", final=True)


def _check_names(body: bytes, members: dict[str, msgspec.Raw]) -> Steps:
    """Walks over the outermost object, key by key. A value that is the one which its name has in `members` is
    stepped over at once; only of a name that is there twice it may be another."""
    seen: set[str] = set()
    at = 0
    for number in itertools.count(1):
        member = _MEMBER.match(body, at)
        if member is None:
            break
        name = _names.decode(member[1])
        if name in seen and name in _ROUTING:
            raise _duplicate(name)
        seen.add(name)
        at, value = member.end(), members[name]
        if body.startswith(value, at) and _MEMBER_END.match(body, at + len(memoryview(value))):
            at += len(memoryview(value))
        else:
            at = yield from _value_end(body, at)
        if number % _STEP_KEYS == 0:
            yield
    if not _OBJECT_END.fullmatch(body, at):
        raise BadRequest("invalid_json", "The request body is not plain JSON.")


def _value_end(body: bytes, at: int) -> Generator[None, None, int]:
    """Where the value ends that begins at `at`, in an object that is known to be well-formed."""
    depth = 0
    for number, token in enumerate(_STRUCTURE.finditer(body, at)):
        mark = token[0]
        if depth == 0 and mark in (b",", b"}"):
            return token.start()
        depth += (mark in (b"{", b"[")) - (mark in (b"}", b"]"))
        if number % _STEP_KEYS == 0:
            yield
    return len(body)


def _check_numbers(body: bytes, step_bytes: int) -> Steps:
    """Digits in a text are no number: with a letter in their place it is still JSON. Looking that closely
    costs 13 ms for 1 MiB, so it is bounded as in `_strictly`."""
    half = _MAX_DIGITS // 2
    for start in range(0, len(body), step_bytes):
        end = min(start + step_bytes, len(body) - half)
        if any(body[at : at + half].isdigit() for at in range(start, end, half)):
            break
        yield
    else:
        return
    if len(body) > _STRICT_BYTES:
        raise BadRequest("invalid_json", "The request body is not plain JSON.")
    try:
        _decoder.decode(_LONG_INTEGER.sub(b"x", body))
    except msgspec.ValidationError:
        pass
    except msgspec.DecodeError:
        raise BadRequest("invalid_json", "The request body is not valid JSON.") from None


def _duplicate(name: str) -> BadRequest:
    return BadRequest("duplicate_key", f"The field '{name}' is given more than once.", param=name)


def _wrong_type(text: str) -> BadRequest:
    """msgspec names the field as `$.stream`; the object itself has no such path."""
    _, _, field = text.partition("`$.")
    name = field.rstrip("`")
    if name in _ROUTING:
        return BadRequest("bad_request", f"The field '{name}' has a wrong type or value.", param=name)
    return BadRequest("invalid_json", "The request body has to be a JSON object.")


def _suspicious(body: bytes) -> bool:
    found = _KEYS.findall(body)
    return (
        (len(found) > len(set(found)) and _repeats_a_key(body, found))
        or _ESCAPED_LETTER.search(body) is not None
        or (len(body) > _MAX_DIGITS and _long_number(body))
    )


def _repeats_a_key(body: bytes, found: list[bytes]) -> bool:
    """Could a routing field be there twice in the outermost object? Most bodies that hold one of the names
    twice (`found`) hold it deeper inside: those that the outermost object's members account for are no
    repetition."""
    everywhere = Counter(found)
    for member in _members.decode(body).values():
        everywhere.subtract(_KEYS.findall(member))
    return max(everywhere.values()) > 1


def _long_number(body: bytes) -> bool:
    """A run of that many digits covers at least one aligned block of half its length."""
    half = _MAX_DIGITS // 2
    return any(body[at : at + half].isdigit() for at in range(0, len(body) - half, half))


def _strictly(body: bytes) -> None:
    """The reference: every key of the outermost object, decoded. Its cost is bounded: no honest body of that
    size escapes plain letters or counts in thousands of digits."""
    if len(body) > _STRICT_BYTES:
        raise BadRequest("invalid_json", "The request body is not plain JSON.")
    outermost: list[tuple[str, Any]] = []

    def remember(pairs: list[tuple[str, Any]]) -> None:
        # json calls this hook for inner objects first: the last call is the outermost one.
        outermost[:] = pairs

    try:
        json.loads(body, object_pairs_hook=remember)
    except (ValueError, RecursionError):
        raise BadRequest("invalid_json", "The request body is not valid JSON.") from None
    names = [name for name, _ in outermost]
    for name in _ROUTING.intersection(names):
        if names.count(name) > 1:
            raise _duplicate(name)


def with_model(body: bytes, model: str) -> bytes:
    """The body with another model name; every other member keeps its own bytes."""
    members = _members.decode(body)
    members["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(members)
