"""What Headrace has to know of a JSON body: the model, whether it streams, and what it may cost.

The body itself is forwarded as it came. Only the fields that route, authorise or bill are decoded; the
rest is checked for syntax and skipped (1 us for 2 KB where a full parse takes 2 to 9).

Upstreams do not agree on which of two equal keys counts, so two `model` keys would let a caller be
authorised for one model and served another: they are refused. No fast parser reports duplicates, so a body
that could hold one (a second literal key, or a key spelt with \\u escapes) takes the slow, strict way.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Annotated, Any

import msgspec

from proxy.errors import BadRequest

_Count = Annotated[int, msgspec.Meta(ge=1, le=2**31)]


class Peek(msgspec.Struct):
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


def _wrong_type(text: str) -> BadRequest:
    """msgspec names the field as `$.stream`; the object itself has no such path."""
    _, _, field = text.partition("`$.")
    name = field.rstrip("`")
    if name in _ROUTING:
        return BadRequest("bad_request", f"The field '{name}' has a wrong type or value.", param=name)
    return BadRequest("invalid_json", "The request body has to be a JSON object.")


def _suspicious(body: bytes) -> bool:
    return _repeats_a_key(body) or _ESCAPED_LETTER.search(body) is not None or _long_number(body)


def _repeats_a_key(body: bytes) -> bool:
    """Could a routing field be there twice in the outermost object? Most bodies that hold one of the names
    twice hold it deeper inside: those that the outermost object's members account for are no repetition."""
    found = _KEYS.findall(body)
    if len(found) == len(set(found)):
        return False
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
            message = f"The field '{name}' is given more than once."
            raise BadRequest("duplicate_key", message, param=name)


def with_model(body: bytes, model: str) -> bytes:
    """The body with another model name; every other member keeps its own bytes."""
    members = _members.decode(body)
    members["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(members)
