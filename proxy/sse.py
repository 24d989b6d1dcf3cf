"""Where an event stream stands: at an event boundary, past its first token, past its terminator.

No event is parsed while it passes. Most reads of a stream are one event, the same as before but for its text:
two comparisons and a look at that text say so, and who passes it on need not show it here (`shape`). It is
forgotten at once: what is kept is out of the processor's cache when it is looked at (keeping sixteen reads
cost 1.5 us more a chunk with 400 streams, measured). Others are whole events of plain content all the same:
five substring searches say so. Of the rest the last few kilobytes are kept, and asked:

- has the terminator of this dialect come by?
- was there a first token (content, reasoning or a tool call)?
- at the end: is this an event boundary, was there a finish_reason, was there an in-band error, what was
  reported as used?

Everything is anchored to line starts (`data:` or `event:`), and JSON strings cannot hold a bare quote or a
line end, so text that merely talks about `[DONE]` or `"error"` is never mistaken for the real thing. The
answers do not depend on how the bytes were cut into reads (tests/test_sse.py draws the cuts).
"""

from __future__ import annotations

import math
import re

import msgspec

from proxy.errors import Dialect
from proxy.usage import KEY, Report, Usage, estimate, latest, line_start, only_null, unfinished

#: A usage or error event is a few hundred bytes; the rest is slack for a long last content event.
_KEEP = 2048
_LIMIT = 2 * _KEEP

_EVENT_ENDS = (b"\n\n", b"\n\r\n")
_NO_USAGE = KEY + b":null"  # as in each chunk but the last of OpenAI's streams

_NEEDLES: dict[Dialect, tuple[bytes, ...]] = {
    Dialect.OPENAI: (b"[DONE]",),
    Dialect.ANTHROPIC: (b"message_stop",),
    Dialect.RESPONSES: (b"response.completed", b"response.failed", b"response.incomplete"),
}
#: One substring of every event that ends a stream, and of few others.
_HINTS: dict[Dialect, bytes] = {
    Dialect.OPENAI: b"[DONE]",
    Dialect.ANTHROPIC: b"message_stop",
    Dialect.RESPONSES: b'"response":',
}
_NEVER = b"\0\0\0\0"
_TERMINATORS: dict[Dialect, re.Pattern[bytes]] = {
    Dialect.OPENAI: re.compile(rb"data: ?\[DONE\]"),
    Dialect.ANTHROPIC: re.compile(rb'event: ?message_stop[\r\n]|data: ?\{\s*"type": ?"message_stop"'),
    Dialect.RESPONSES: re.compile(
        rb"event: ?response\.(?:completed|failed|incomplete)[\r\n]"
        rb'|data: ?\{\s*"type": ?"response\.(?:completed|failed|incomplete)"'
    ),
}

# The first delta that is worth showing, in all three dialects; a role-only chunk has "content":"", and may
# have "tool_calls":[].
_SHOWN = rb"content|refusal|reasoning|reasoning_content|thinking|text|delta|arguments|partial_json"
_FIRST_TOKEN = re.compile(
    rb'"(?:' + _SHOWN + rb')": ?"[^"]'
    rb'|"tool_calls": ?\[ ?\{|"function_call": ?\{|"type": ?"[a-z_]{0,24}(?:tool_use|_call)"'
)
_TEXT = re.compile(rb'"(?:' + _SHOWN + rb')": ?"((?:[^"\\]|\\.)+)"')
# Responses opens with events that repeat the request: its texts are not the answer's.
_PRELUDE = re.compile(rb'"type": ?"response\.(?:created|queued|in_progress)"')
_FIRST_TOKEN_REACH = 48  # a match is at most this long: how far to look back over a cut
_FINISH_HINTS = (b'"finish_reason":"', b'"finish_reason": "')  # the same, without a regex
_BLANK_LINE = re.compile(rb"\n\r?\n|\r\r")
_LINE_END = re.compile(rb"[\r\n]")
_FINISH_REASON = re.compile(rb'"finish_reason": ?"[^"]')
# OpenAI's and most others' event, and older llama.cpp's field of its own (llama.cpp issue 14566). Gemini's is
# no event at all (vercel/ai issue 5217): SDKs skip it, so such a stream has to end as a cut one does.
_IN_BAND_ERROR = re.compile(
    rb"(?:\A|[\r\n])(?:event: ?error[\r\n]"
    rb'|data: ?\{\s*"error": ?["{]'
    rb'|data: ?\{\s*"(?:type|object)": ?"error"'
    rb"|error: ?\{)"
)
# OpenRouter's is a chunk like all others (openrouter.ai/docs/api/reference/errors-and-debugging).
_FINISH_ERROR = re.compile(rb'"finish_reason": ?"error"')


def ends_event(tail: bytes | bytearray) -> bool:
    """Do these bytes end with an event's blank line? A lone CR at the end may be half of a CRLF, so it only
    counts after another CR."""
    if tail.endswith(b"\n"):
        return tail.endswith((b"\n\n", b"\n\r\n", b"\r\r\n"))
    return tail.endswith(b"\r\r")


#: What is around the text of an event that is a chunk by itself: before it, and after it to the chunk's end,
#: each with where it ends or begins, counted from its side of the read.
Shape = tuple[bytes, int, bytes, int]


class Scanner:
    """Follows one event stream; `feed` gets the bytes exactly as they arrived.

    terminated: the terminator has passed (for two dialects: its whole event).
    first_token: something worth showing has passed.
    shape: an event like this but for its text is plain content and need not be fed; None: all have to be.
    """

    __slots__ = (
        "_announced",
        "_announced_at",
        "_calm",
        "_dialect",
        "_events",
        "_failed",
        "_finished",
        "_gone",
        "_hint",
        "_limit",
        "_needles",
        "_reach",
        "_report",
        "_shape",
        "_skipped",
        "_skips",
        "_tail",
        "_terminator",
        "_text_share",
        "first_token",
        "shape",
        "terminated",
    )

    def __init__(self, dialect: Dialect, *, expects_terminator: bool) -> None:
        self._dialect = dialect
        self._tail = bytearray()
        self._limit = _LIMIT
        self._gone = 0  # bytes that are no longer in the tail
        self._report: Report | None = None  # what they reported
        self._needles = _NEEDLES[dialect] if expects_terminator else ()
        self._reach = max((len(needle) for needle in self._needles), default=0)
        self._terminator = _TERMINATORS[dialect]
        self._announced = False
        self._announced_at = 0  # where that ends, in bytes of the stream
        self._finished = False
        self._failed = False
        self._calm = False  # true between the first token and the announcement of the terminator
        self._skips = False  # it is, and the stream is at an event boundary
        self._skipped = 0  # bytes of reads that were
        self._text_share = 0.0  # how much of such a read is text
        self._events = 0
        self._shape: Shape | None = None  # of the last event of plain content
        self._hint = _HINTS[dialect] if expects_terminator else _NEVER
        self.shape: Shape | None = None
        self.terminated = False
        self.first_token = False

    def feed(self, data: bytes) -> bool:
        """Takes one read; True if it may have brought the first token or the terminator."""
        if self._skips and self._is_plain(data):
            self._skip(data)
            return False
        return self._read(data)

    def passed(self, events: int, size: int) -> None:
        """So many events of this shape, with so many bytes in all, have gone by unseen."""
        self._events += events
        self._skipped += size

    def _is_plain(self, data: bytes) -> bool:
        """Whole events, in which there is nothing that anybody will ask for. `find` and no `in`: it takes
        half the time where nothing is found."""
        return (
            data.endswith(_EVENT_ENDS)
            and data.find(self._hint) < 0
            and data.find(b"error") < 0
            and (data.find(KEY) < 0 or data.count(KEY) == data.count(_NO_USAGE))
            and data.find(_FINISH_HINTS[0]) < 0
            and data.find(_FINISH_HINTS[1]) < 0
        )

    def _skip(self, data: bytes) -> None:
        """Plain content; if it is one event, the next may be like it."""
        events = data.count(b"data:")
        self._skipped += len(data)
        self._events += events
        if events != 1 and self._text_share:
            return
        text = _TEXT.search(data)
        if text is None:
            return
        self._text_share = len(text[1]) * events / len(data)
        if events == 1:
            head, foot = data[: text.start(1)], data[text.end(1) :] + b"\r\n"
            self._shape = self.shape = (head, len(head), foot, -len(foot))

    def _read(self, data: bytes) -> bool:
        tail = self._tail
        if len(tail) > self._limit:
            self._forget()
        fresh = len(tail)
        tail += data
        start = fresh - self._reach if fresh > self._reach else 0
        for needle in self._needles:
            if (at := tail.find(needle, start)) >= 0:
                self._announce(needle, at)
        news = not self._calm or self._announced
        if news:
            self._look(fresh)
        self._skips = self._calm and ends_event(tail)
        self.shape = self._shape if self._skips else None
        return news

    def _announce(self, needle: bytes, at: int) -> None:
        """Is there a terminator in this line, or in a later one with its needle? A search for a line's start
        and what follows looks at each byte for 30 ns; so little is left to the regex."""
        tail = self._tail
        while at >= 0 and not self._announced:
            if found := self._terminator.match(tail, line_start(tail, at)):
                self._announced = True
                self._announced_at = self._gone + found.end()
            line_end = _LINE_END.search(tail, at)  # a line may hold the needle ten thousand times
            at = tail.find(needle, line_end.end()) if line_end is not None else -1

    def _look(self, fresh: int) -> None:
        if not self.first_token:
            self.first_token = self._shows_something(max(0, fresh - _FIRST_TOKEN_REACH))
        if self._announced and not self.terminated:
            self.terminated = self._ends_stream(fresh)
        self._calm = self.first_token and not self._announced

    def _shows_something(self, start: int) -> bool:
        """Is there content, reasoning or a tool call from here on, in a line that is the answer's own?"""
        tail = self._tail
        while match := _FIRST_TOKEN.search(tail, start):
            if not self._is_idle(line_start(tail, match.start()), match.start()):
                return True
            line_end = _LINE_END.search(tail, match.end())
            if line_end is None:
                return False
            start = line_end.start()
        return False

    def _is_idle(self, line: int, end: int) -> bool:
        """Is this line a comment, or one that repeats the request?"""
        if self._tail.startswith(b":", line):
            return True
        return self._dialect is Dialect.RESPONSES and _PRELUDE.search(self._tail, line, end) is not None

    def _forget(self) -> None:
        """Makes room. What is wanted only at the end is looked for in what goes; substring searches first,
        because this happens every ten events or so and a regex over 4 KB costs 50 us."""
        tail = self._tail
        if not self._finished:
            self._finished = any(map(self._holds_finish, _FINISH_HINTS))
        if not self._failed:
            self._failed = self._shows_error()
        cut = self._remember(len(tail) - _KEEP)
        # So that the tail's start is no line start; a comment stays one.
        tail[:cut] = b":" if self._is_idle(line_start(tail, cut), cut) else b" "
        self._gone += cut - 1
        # What reports once may report in each event: then there is less often something to remember.
        self._limit = max(_LIMIT if self._report is None else 3 * _LIMIT, 2 * len(tail))

    def _holds_finish(self, hint: bytes) -> bool:
        """An empty finish_reason, which some servers write into every chunk, says nothing."""
        at = self._tail.find(hint)
        while at >= 0 and self._tail.startswith(b'"', at + len(hint)):
            at = self._tail.find(hint, at + len(hint))
        return 0 <= at < len(self._tail) - len(hint)

    def _remember(self, cut: int) -> int:
        """Takes the usage out of what goes; an event that still brings some is kept, from there on."""
        tail = self._tail
        if only_null(tail, cut + len(KEY) - 1):
            return cut
        kept = unfinished(tail)
        # What is kept may still turn out to be no report.
        self._report = latest(self._dialect, tail if kept == len(tail) else tail[:kept], self._report)
        return min(cut, kept)

    def _ends_stream(self, fresh: int) -> bool:
        # [DONE] counts as soon as it is there, with or without its blank line (contract 6.3); the other two
        # terminators are events with data of their own, which has to arrive as well.
        if self._needles == _NEEDLES[Dialect.OPENAI]:
            return True
        start = max(self._announced_at - self._gone, fresh - 2, 0)  # a blank line has three bytes at most
        return _BLANK_LINE.search(self._tail, start) is not None

    def at_boundary(self) -> bool:
        """Is the stream between two events, so that a comment or an event may be added?"""
        return not self._tail or ends_event(self._tail)

    def succeeded(self, *, framed: bool) -> bool:
        """Did the stream end well? `framed`: HTTP's own framing says that the body was complete."""
        if not self._needles:
            return framed
        if self.terminated:
            return True
        if self._announced and self._last_line_is_whole(framed):
            return True  # the last event lacks only its blank line
        return framed and (self._finished or _FINISH_REASON.search(self._tail) is not None)

    def _last_line_is_whole(self, framed: bool) -> bool:
        """A cut can fall behind an inner brace of the last event: only a line end, HTTP's own framing or
        the JSON itself can tell."""
        tail = self._tail
        if tail.endswith((b"}\n", b"}\r")) or (framed and tail.endswith(b"}")):
            return True
        line = tail[max(tail.rfind(b"\n"), tail.rfind(b"\r")) + 1 :]
        try:
            msgspec.json.decode(line.removeprefix(b"data:"))
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        return line.startswith(b"data:")

    def in_band_error(self) -> bool:
        """Did the upstream report an error inside the stream?"""
        return self._failed or self._shows_error()

    def _shows_error(self) -> bool:
        if self._tail.find(b"error") < 0:  # a regex over as many bytes takes twenty times as long
            return False
        if _IN_BAND_ERROR.search(self._tail):
            return True
        places = [match.start() for match in _FINISH_ERROR.finditer(self._tail)]
        return any(not self._is_idle(line_start(self._tail, at), at) for at in places)

    def usage(self) -> Usage | None:
        """What the stream reported so far, None if nothing; for its end."""
        report = self._latest()
        return report.usage() if report is not None else None

    def estimate(self, prompt_tokens: int) -> Usage:
        """Flagged: for a stream that ended without a report. `prompt_tokens` is the estimate of its request.

        The tail stands for what it is the end of, one read that was skipped for all of them. An event is
        one token with most servers and many with others: so many as there are lines of data, or a quarter of
        the bytes of the texts if that is more.
        """
        report = self._latest()
        tail = self._tail
        if not self.first_token:
            return estimate(report, prompt_tokens, 0)
        share = (self._gone + len(tail)) / len(tail)
        events = self._events + tail.count(b"data:") * share
        texts = sum(map(len, _TEXT.findall(tail))) * share + self._skipped * self._text_share
        return estimate(report, prompt_tokens, math.ceil(max(events, texts / 4)))

    def _latest(self) -> Report | None:
        return latest(self._dialect, self._tail, self._report)


class BlindScanner(Scanner):
    """For those who do not want to know the usage: nothing is remembered of what goes."""

    __slots__ = ()

    def _remember(self, cut: int) -> int:
        return cut
