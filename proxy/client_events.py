"""An event stream as deltas, in any chunking: bytes in, deltas out, no I/O.

It reads what the browser client's EventStreamParser reads (WHATWG HTML, 9.2.6): line ends CR, LF and CRLF,
comments, data of several lines, UTF-8 characters cut in two, a byte order mark at the beginning. `sse_events`
cuts streams as well, for the proxy: it keeps events as they are, and none above 1 MiB, which is less than an
answer with an image in it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any, NamedTuple

from proxy.client_errors import Category, ChatError, Head, decoded, said_in, told, truncated, unreadable

#: Bytes of one event: an endless line must not fill the memory.
LONGEST_EVENT = 16 * 2**20


class Event(NamedTuple):
    """`name` is "message" unless the event has another."""

    name: str
    data: str


class Delta(NamedTuple):
    """One step of an answer: `chunk` is the whole event. `content` may be empty (a role, a tool call)."""

    content: str
    finish_reason: str | None
    usage: dict[str, Any] | None
    chunk: dict[str, Any]


class EventReader:
    """Takes reads of any size, gives whole events."""

    __slots__ = ("_after_cr", "_begun", "_begun_bytes", "_data", "_data_bytes", "_first", "_name")

    def __init__(self) -> None:
        self._begun: list[bytes] = []  # of a line whose end has not come; never searched again
        self._begun_bytes = 0
        self._after_cr = False  # an LF that comes now belongs to the CR before it
        self._first = True
        self._name = b""
        self._data: list[bytes] = []
        self._data_bytes = 0

    def feed(self, data: bytes) -> list[Event]:
        """The events that this read completes. Raises ChatError if one never ends."""
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        lines = data.splitlines()  # of bytes: CR, LF and CRLF, and nothing else
        rest = lines.pop() if lines and not data.endswith((b"\r", b"\n")) else b""
        events = []
        if lines:
            # A CR ends its line at once, so that no event waits for the next one's first byte.
            self._after_cr = data.endswith(b"\r")
            self._begin(lines[0])
            lines[0] = self._line()
            events = [event for line in lines if (event := self._take(line)) is not None]
        self._begin(rest)
        if self._begun_bytes + self._data_bytes > LONGEST_EVENT:
            raise ChatError(Category.PARSE, "An event is too large.")
        return events

    def end(self) -> list[Event]:
        """The event that lacks its blank line, if there is one: some servers leave the last one out."""
        self._take(self._line())
        last = self._dispatch()
        return [] if last is None else [last]

    def _begin(self, piece: bytes) -> None:
        self._begun.append(piece)
        self._begun_bytes += len(piece)

    def _line(self) -> bytes:
        line = b"".join(self._begun)
        self._begun, self._begun_bytes = [], 0
        if self._first:
            self._first = False
            line = line.removeprefix(codecs.BOM_UTF8)
        return line

    def _take(self, line: bytes) -> Event | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(b":")  # a comment's field is empty
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
            self._data_bytes += len(value) + 1
        elif field == b"event":
            self._name = value.removeprefix(b" ")
        return None

    def _dispatch(self) -> Event | None:
        name, data = self._name, self._data
        self._name, self._data, self._data_bytes = b"", [], 0
        if not data:
            return None
        return Event(name.decode(errors="replace") or "message", b"\n".join(data).decode(errors="replace"))


class DeltaReader:
    """The deltas of one event stream. `over`: its terminator has come. Raises ChatError."""

    def __init__(self, head: Head) -> None:
        self.over = False
        self._head = head
        self._events = EventReader()
        self._finished = False

    def feed(self, data: bytes) -> Iterator[Delta]:
        """The deltas that this read completes, up to an error that stands behind them."""
        for event in () if self.over else self._events.feed(data):
            if (delta := self._delta(event)) is not None:
                yield delta
            if self.over:
                return

    def end(self, *, framed: bool) -> Iterator[Delta]:
        """At the end of all bytes. Without its terminator an answer is whole after a `finish_reason`, if the
        framing of HTTP says that nothing is missing; else it is truncated."""
        for event in self._events.end():
            if decoded(event.data) is None and event.data.strip() != "[DONE]":
                raise truncated(self._head)  # half an event
            if (delta := self._delta(event)) is not None:
                yield delta
        if not self.over and not (framed and self._finished):
            raise truncated(self._head)

    def _delta(self, event: Event) -> Delta | None:
        data = event.data.strip()
        self.over = data == "[DONE]"
        if self.over or not data or event.name == "ping":
            return None  # the terminator, or signs of life
        chunk = decoded(data)
        if not isinstance(chunk, (dict, list)):
            raise unreadable(self._head)
        said = said_in(chunk)
        if said is None and event.name == "error":
            said = said_in({"error": chunk})
        if said is not None:
            raise told(said, self._head)
        delta = delta_of(chunk)
        if delta is None:
            raise unreadable(self._head)
        self._finished = self._finished or delta.finish_reason is not None
        return delta


def whole_answer(document: Any, head: Head) -> Delta:
    """An answer of one piece. Raises ChatError."""
    said = said_in(document)
    if said is not None:
        raise told(said, head)
    delta = delta_of(document)
    if delta is None or not (document.get("choices") or isinstance(document.get("content"), str)):
        raise unreadable(head)
    return delta


def delta_of(chunk: Any) -> Delta | None:
    """None: its shape is none that a chat completion has."""
    if not isinstance(chunk, dict):
        return None
    choices = chunk.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    if not isinstance(choice, dict):
        return None
    # {"content": …} by itself is the browser API's.
    said = choice.get("delta") or choice.get("message") or ({} if "choices" in chunk else chunk)
    content = said.get("content") if isinstance(said, dict) else None
    reason, usage = choice.get("finish_reason"), chunk.get("usage")
    return Delta(
        _text(content),
        reason if isinstance(reason, str) else None,
        usage if isinstance(usage, dict) else None,
        chunk,
    )


def _text(content: Any) -> str:
    """Some models give a list of parts."""
    if isinstance(content, list):
        return "".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return content if isinstance(content, str) else ""
