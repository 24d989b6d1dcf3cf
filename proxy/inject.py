"""`streams.usage: inject`: asks for usage on behalf of a caller who did not, and takes the answer out again.

OpenAI's endpoints report a stream's usage only if the request says so, in one extra chunk with an empty list
of choices; programs that did not ask fail on it (`chunk.choices[0]`). Everything else stays as it came, byte
by byte and without delay; `"usage":null` in the other chunks too.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from proxy.errors import Dialect
from proxy.sse import ends_event
from proxy.usage import KEY, Counts, Usage

#: An event that is longer is none that only reports usage (they have 300 to 900 bytes).
LONGEST_EVENT = 8192
_MALFORMED = (msgspec.DecodeError, ValueError, RecursionError)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_OPTION = b',"stream_options":{"include_usage":true}}'


class _Asked(msgspec.Struct):
    stream: msgspec.Raw = msgspec.Raw(b"")  # empty: left out
    stream_options: msgspec.Raw = msgspec.Raw(b"")


_asked = msgspec.json.Decoder(_Asked)


def with_include_usage(body: bytes) -> bytes | None:
    """The body with `stream_options.include_usage: true`; every other member keeps its own bytes.

    None if nothing has to be added: the caller asked already, the request does not stream, or its
    stream_options are nothing that could be added to (the upstream will say so). An upstream that does not
    know stream_options at all refuses the request, and its 400 is the caller's answer: `streams.usage` has to
    be `observe` where such a one is asked.
    """
    try:
        asked = _asked.decode(body)
        if bytes(asked.stream) != b"true":
            return None
        given = bytes(asked.stream_options)
        if not given:
            return body[: body.rindex(b"}")] + _OPTION  # a body of 32 MB need not be written anew
        return _with_option(body, given)
    except _MALFORMED:
        return None


def _with_option(body: bytes, given: bytes) -> bytes | None:
    options = {} if given == b"null" else _members.decode(given)
    if bytes(options.get("include_usage", b"null")) not in (b"false", b"null"):
        return None
    options["include_usage"] = msgspec.Raw(b"true")
    members = _members.decode(body)
    members["stream_options"] = msgspec.Raw(msgspec.json.encode(options))
    return msgspec.json.encode(members)


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw]
    usage: Counts
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk)
_BLANK_LINE = re.compile(rb"\n\r\n|\n[\r\n]|\r\r\n?")
_BLANK_ENDS = (b"\n\n", b"\n\r\n")
_COMMENT = re.compile(rb"(?:\A|(?<=[\r\n])):[^\r\n]*(?:\r\n?|\n)")
# What may stand between two events: blank lines and comments.
_BETWEEN = re.compile(rb"(?:[\r\n]+|:[^\r\n]*)*+")
_LINE_END = re.compile(rb"[\r\n]")
_CHOICES = re.compile(rb'"choices"\s*+:\s*+')
_NULL = KEY + b":null"
_ANY_CHOICE = b'"choices":[{'


class UsageChunkFilter:
    """Takes out each event whose data has `"choices": []` and a usage object, with its blank line.

    `feed` gets the reads of a stream and returns what to deliver; only an event that is still incomplete and
    may yet be such an event is held back, up to LONGEST_EVENT bytes. Comments inside it are delivered.
    removed: the last usage that was taken out.
    """

    __slots__ = ("_commenting", "_given", "_held", "_last", "_swallows", "removed")

    def __init__(self) -> None:
        self._held = b""  # the start of an event that may be one
        self._last = b""  # the last byte of an event that is none, while it is incomplete
        self._commenting = False  # inside a comment between two events
        self._swallows = False  # the blank line that was taken out may have another half
        self._given = b""  # the last bytes that were given
        self.removed: Usage | None = None

    def feed(self, data: bytes) -> bytes:
        if self._is_between() and data.endswith(_BLANK_ENDS) and _is_plainly_none(data):
            self._given = b"\n\n"
            return data
        out = self._sift(data) if data else data
        self._given = (self._given + out[-3:])[-3:]
        return out

    def held(self) -> bytes:
        """What is held back: the start of an event."""
        return self._held

    def flush(self) -> bytes:
        """The same, for the end of the stream: an event that never became whole."""
        held, self._held = self._held, b""
        return held

    def at_boundary(self) -> bool:
        """Is what was given between two events? What is held back comes after it."""
        return not self._given or ends_event(self._given)

    def _is_between(self) -> bool:
        return not (self._held or self._last or self._commenting or self._swallows)

    def _sift(self, data: bytes) -> bytes:
        at, out = 0, []
        if self._last or self._commenting:
            at = self._rest(data)
            out.append(data[:at])
        elif self._swallows:
            at = 1 if data.startswith(b"\n") else 0
        self._swallows = False
        data, self._held = self._held + data, b""
        while at < len(data):
            at = self._next_event(data, at, out)
        return b"".join(out)

    def _rest(self, data: bytes) -> int:
        """Where that ends which is delivered whatever it is: a comment, or an event that is not held."""
        if self._commenting:
            end = _LINE_END.search(data)
            self._commenting = end is None
            return end.start() if end else len(data)
        blank = _BLANK_LINE.search(self._last + data)
        if blank is None:
            self._last = data[-1:]
            return len(data)
        end_of_blank = blank.end() - len(self._last)
        self._last = b""
        return end_of_blank

    def _next_event(self, data: bytes, at: int, out: list[bytes]) -> int:
        """Delivers, drops or holds one event and what stands before it; returns where the next begins."""
        between = _BETWEEN.match(data, at)
        start = between.end() if between else at
        if start > at:
            out.append(data[at:start])
            if start == len(data):
                line = max(data.rfind(b"\n", at), data.rfind(b"\r", at), at - 1) + 1
                self._commenting = data.startswith(b":", line)
                return start
        blank = _BLANK_LINE.search(data, start)
        if blank is None:
            self._keep_or_deliver(data[start:], out)
            return len(data)
        event = data[start : blank.end()]
        if self._is_extra(event):
            self._swallows = blank.end() == len(data) and event.endswith(b"\r")
            out.extend(_COMMENT.findall(event))
        else:
            out.append(event)
        return blank.end()

    def _keep_or_deliver(self, part: bytes, out: list[bytes]) -> None:
        if _is_short(part) and _may_be_extra(_data_of(part)):
            self._held = part
        else:
            out.append(part)
            self._last = part[-1:]

    def _is_extra(self, event: bytes) -> bool:
        if not _is_short(event) or KEY not in event:
            return False
        data = _data_of(event)
        if not _may_be_extra(data):
            return False
        try:
            chunk = _chunk.decode(data)
        except _MALFORMED:
            return False
        if chunk.choices or chunk.error is not None:
            return False
        report = chunk.usage.report(Dialect.OPENAI)
        self.removed = (report.usage() if report is not None else None) or self.removed
        return True


def _is_plainly_none(data: bytes) -> bool:
    """Holds none of these whole events a usage to take out? Cheap, and True only if it is certain."""
    if KEY not in data or data.count(KEY) == data.count(_NULL):  # for a read, a third of what a regex takes
        return True
    # A running total in each chunk (Gemini, vLLM's continuous_usage_stats): one line of data a read.
    if not data.startswith(b"data:") or data.count(b"\n") != 2 or b"\r" in data:
        return False
    return data.startswith(_ANY_CHOICE, data.find(b'"choices"'))


def _is_short(event: bytes) -> bool:
    """Measured without its line ends: a part has to be judged as the whole will be."""
    return len(event.rstrip(b"\r\n")) <= LONGEST_EVENT


def _data_of(event: bytes) -> bytes:
    """The data of an event, or of the part of it that is there."""
    lines = event.splitlines()
    return b"\n".join([line[5:] for line in lines if line.startswith(b"data:")]).lstrip()


def _may_be_extra(data: bytes) -> bool:
    """Can this data, or what it is the start of, still be the extra chunk?

    Its first `choices` decide, so that the answer is the same for a part and for the whole.
    """
    if data and not data.startswith(b"{"):
        return False
    choices = _CHOICES.search(data)
    if choices is None:
        return True
    value = data[choices.end() :]
    if not value.startswith(b"["):
        return not value
    inside = value[1:].lstrip()
    return not inside or inside.startswith(b"]")
