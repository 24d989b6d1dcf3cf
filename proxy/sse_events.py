"""Cuts an event stream into its events, in any chunking, for those few streams that are changed."""

from __future__ import annotations

import re

#: An event that is longer is none: what a stream keeps in memory has a bound (bytes).
LONGEST_EVENT = 2**20
# Two line ends of any kind (WHATWG HTML 9.2.5). A CR at the very end may be half of a CRLF, whose other half
# then stands before the next event, where it says nothing.
_BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")
_REACH = 3  # bytes of a blank line that may have come with an earlier read
_LINE_END = re.compile(rb"\r\n|\n|\r")


class UnreadableError(Exception):
    """An event stream that cannot be read, because it is none."""


class EventReader:
    """Takes reads, gives whole events without their blank line."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that this read completes. Raises UnreadableError if one never ends."""
        start = max(0, len(self._held) - _REACH)
        held, events, at = self._held + data, [], 0
        for blank in _BLANK_LINE.finditer(held, start):
            events.append(held[at : blank.start()])
            at = blank.end()
        self._held = held[at:]
        if len(self._held) > LONGEST_EVENT:
            raise UnreadableError
        return events

    def rest(self) -> bytes:
        """What came after the last blank line."""
        rest, self._held = self._held, b""
        return rest


def data_of(event: bytes) -> bytes:
    """The data lines of an event, joined; empty for comments and for events without any."""
    lines = _LINE_END.split(event)
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))
