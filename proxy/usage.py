"""How many tokens an answer used: found in what the upstream sent, without parsing what passes.

Three states, kept apart everywhere: reported by the upstream, estimated (and flagged), unknown. Unknown is
never billed as zero.

A report is found backwards: from the last `"usage"` to the end of its event, and only if what follows closes
exactly as many objects as the dialect nests around it (`{"usage": …}`, `{"response": {"usage": …}}`). That
check needs nothing of what stands before, so a tail may begin anywhere, and a member of the same name that is
nested deeper (a tool's schema, echoed) is no report. Text that talks about usage is none either: inside a
JSON string its quotes are escaped.

Reports are cumulative and the last one wins; none are ever summed (OpenAI sends one extra chunk, Gemini's
endpoint repeats a running total, Anthropic completes in message_delta what message_start began).
"""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import msgspec

from proxy.errors import Dialect

KEY = b'"usage"'
#: How far behind its key the event of a report may end: a Responses event can carry 16 pairs of metadata of
#: 64 + 512 characters there.
REACH = 16384
#: Integers above this are not exact in every JSON reader (RFC 8259, section 6): no honest count is one.
_MOST = 2**53
#: Mentions that are decoded; an event has one, or a few more if it echoes a tool's schema.
_TRIES = 32
#: What is kept of a JSON answer that is too large to hold.
_JSON_TAIL = 65536
_NOT_NULL = re.compile(rb'"usage"(?!:null)')
_BLANK_LINE = re.compile(rb"\n[\r\n]|\r\r")
_NULL = b":null"
_KEY_BYTES, _NULL_END = len(KEY), len(KEY) + len(_NULL)


class Source(StrEnum):
    REPORTED = "reported"
    ESTIMATED = "estimated"
    UNKNOWN = "unknown"


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one answer. `cached_tokens` are part of the prompt, `reasoning_tokens` of the completion.

    With source `unknown` the counts mean nothing.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    source: Source = Source.UNKNOWN


UNKNOWN = Usage()
#: By these names: a member that is looked up in its class costs 0.1 us (Python 3.11), a global a twentieth.
_REPORTED = Source.REPORTED
_ANTHROPIC = Dialect.ANTHROPIC
_RESPONSES = Dialect.RESPONSES


class Report(msgspec.Struct, frozen=True, gc=False):
    """What one usage object says; None where it says nothing. `fresh`: prompt tokens from no cache."""

    fresh: int | None = None
    cached: int | None = None
    written: int | None = None  # prompt tokens that were put into the cache
    completion: int | None = None
    reasoning: int | None = None

    def over(self, older: Report | None) -> Report:
        """Of each count the last that was given."""
        if older is None or self.is_whole:
            return self
        return Report(
            older.fresh if self.fresh is None else self.fresh,
            older.cached if self.cached is None else self.cached,
            older.written if self.written is None else self.written,
            older.completion if self.completion is None else self.completion,
            older.reasoning if self.reasoning is None else self.reasoning,
        )

    @property
    def is_whole(self) -> bool:
        return (
            self.completion is not None
            and self.fresh is not None
            and self.cached is not None
            and self.written is not None
        )

    @property
    def prompt(self) -> int | None:
        """All tokens of the prompt, from a cache or not."""
        return None if self.fresh is None else self.fresh + (self.cached or 0) + (self.written or 0)

    def usage(self) -> Usage | None:
        """None unless both sides are known: the first half of a stream's report is no report."""
        fresh, completion = self.fresh, self.completion
        if fresh is None or completion is None:
            return None
        cached = self.cached or 0
        return Usage(fresh + cached + (self.written or 0), cached, completion, self.reasoning or 0, _REPORTED)


# ── what upstreams send ──────────────────────────────────────────────────────────────────────────────────


class Counts(msgspec.Struct, gc=False):
    """A usage object, in all dialects. Any: a value of a wrong type spoils itself, not its neighbours."""

    prompt_tokens: Any = None
    completion_tokens: Any = None
    total_tokens: Any = None
    prompt_tokens_details: Any = None
    completion_tokens_details: Any = None
    prompt_cache_hit_tokens: Any = None  # DeepSeek
    input_tokens: Any = None
    output_tokens: Any = None
    input_tokens_details: Any = None
    output_tokens_details: Any = None
    cache_read_input_tokens: Any = None
    cache_creation_input_tokens: Any = None

    def report(self, dialect: Dialect) -> Report | None:
        return self._split() if dialect is _ANTHROPIC else self._inclusive()

    def _split(self) -> Report:
        """Anthropic: input_tokens leaves out what was read from or written to the cache."""
        return Report(
            _count(self.input_tokens),
            _count(self.cache_read_input_tokens),
            _count(self.cache_creation_input_tokens),
            _count(self.output_tokens),
        )

    def _inclusive(self) -> Report | None:
        """OpenAI and all that follow it: the totals include their details."""
        sides = self._sides()
        if sides is None:
            return None
        prompt, completion = sides
        cached = self._cached() or 0
        if cached > prompt:
            cached = prompt
        details = self.completion_tokens_details or self.output_tokens_details
        reasoning = _detail(details, "reasoning_tokens") if details else None
        total = self.total_tokens
        if total != prompt + completion:
            beside = (_count(total) or 0) - prompt - completion
            if beside > 0 and reasoning in (None, beside):
                # xAI (docs.x.ai) and Gemini count reasoning beside the completion, Gemini's compatible
                # endpoint in the total alone (new-api issue 1014); it is billed as output.
                reasoning = beside
                completion += beside
        if reasoning is None or reasoning > completion:
            reasoning = completion if reasoning else 0
        return Report(prompt - cached, cached, 0, completion, reasoning)

    def _cached(self) -> int | None:
        details = self.prompt_tokens_details or self.input_tokens_details
        hit = _detail(details, "cached_tokens") if details else None
        if hit is None and self.prompt_cache_hit_tokens is not None:
            return _count(self.prompt_cache_hit_tokens)
        return hit

    def _sides(self) -> tuple[int, int] | None:
        """Prompt and completion. Embeddings and rerankers leave out the completion, some also the prompt."""
        given_in = self.input_tokens if self.prompt_tokens is None else self.prompt_tokens
        given_out = self.output_tokens if self.completion_tokens is None else self.completion_tokens
        prompt, completion = _count(given_in), _count(given_out)
        if prompt is not None and completion is not None:
            return prompt, completion
        total = _count(self.total_tokens)
        if total is None or given_out is not None:
            return None
        if given_in is None:
            return total, 0
        return (prompt, total - prompt) if prompt is not None and prompt <= total else None


class _Inner(msgspec.Struct, gc=False):
    usage: Counts | None = None


class _Response(msgspec.Struct):
    response: _Inner


class _Message(msgspec.Struct):
    message: _Inner


_inner = msgspec.json.Decoder(_Inner)
_response = msgspec.json.Decoder(_Response)
_message = msgspec.json.Decoder(_Message)
_MALFORMED = (msgspec.DecodeError, ValueError, RecursionError)


def _count(value: object) -> int | None:
    """A number of tokens; a bool, a float, a string, a negative or an absurd number is none."""
    return value if type(value) is int and 0 <= value <= _MOST else None


def _detail(details: object, name: str) -> int | None:
    return _count(details.get(name)) if isinstance(details, dict) else None


# ── finding it ───────────────────────────────────────────────────────────────────────────────────────────


def find_in_tail(dialect: Dialect, first: bytes, tail: bytes) -> Usage | None:
    """The usage that a stream reported, None if it did not. Never raises.

    `tail` holds the stream's last bytes and may begin anywhere; `first` its first events (Anthropic's
    message_start says what the prompt took).
    """
    report = latest(dialect, tail, latest(dialect, first), begins_anywhere=True)
    return report.usage() if report is not None else None


def find_in_json(dialect: Dialect, body: bytes) -> Usage | None:
    """The usage of an answer that is no stream, None if it has none. The answer's last bytes are enough."""
    for at in _mentions(body):
        report = _decoded(dialect, body[at:], streamed=False)
        if report is not None and (usage := report.usage()) is not None:
            return usage
    return None


class JsonTail:
    """The last reads of a JSON answer that is too large to hold: at least 64 KiB, if it has as many."""

    __slots__ = ("_reads", "_size")

    def __init__(self) -> None:
        self._reads: deque[bytes] = deque()
        self._size = 0

    def feed(self, data: bytes) -> None:
        self._reads.append(data)
        self._size += len(data)
        while self._size - len(self._reads[0]) >= _JSON_TAIL:
            self._size -= len(self._reads.popleft())

    def usage(self, dialect: Dialect) -> Usage | None:
        return find_in_json(dialect, b"".join(self._reads))


def latest(
    dialect: Dialect, tail: bytes | bytearray, older: Report | None = None, *, begins_anywhere: bool = False
) -> Report | None:
    """The last report in these bytes of a stream, over an older one. Comments are not looked at; a colon that
    begins a tail which `begins_anywhere` is more likely JSON's."""
    report: Report | None = None
    for at in _mentions(tail):
        line = line_start(tail, at)
        if tail.startswith(b":", line) and (line or not begins_anywhere):
            continue
        found = _decoded(dialect, _rest_of_event(tail, at), streamed=True)
        if found is not None:
            report = found if report is None else report.over(found)
            if report.is_whole:
                return report
    return older if report is None else report.over(older)


def line_start(tail: bytes | bytearray, at: int) -> int:
    """Where the line begins that holds position `at`."""
    after_lf = tail.rfind(b"\n", 0, at) + 1
    return max(after_lf, tail.rfind(b"\r", after_lf, at) + 1)


def only_null(tail: bytes | bytearray, end: int = sys.maxsize) -> bool:
    """Is every mention of usage before `end` a null, as in all chunks but the last of an OpenAI stream?"""
    # A regex only where there is a mention: it takes 1.4 times as long as `find`.
    return (
        tail.find(KEY, 0, end) < 0 or _NOT_NULL.search(tail, 0, min(end, len(tail)) + len(b":null")) is None
    )


def unfinished(tail: bytes | bytearray) -> int:
    """Where the usage of the event that is still arriving begins (at most REACH back); the end if nowhere."""
    last = tail.rfind(KEY)
    if last < 0 or _BLANK_LINE.search(tail, last):
        return len(tail)
    event = max(tail.rfind(b"\n\n", 0, last), tail.rfind(b"\n\r", 0, last), tail.rfind(b"\r\r", 0, last), 0)
    at = tail.find(KEY, max(event, len(tail) - REACH))
    return at if at >= 0 else len(tail)


def _mentions(tail: bytes | bytearray) -> Iterator[int]:
    """Positions of the key, last first; those that are plainly null cost nothing."""
    at, tries = tail.rfind(KEY), 0
    while at >= 0 and tries < _TRIES:
        if tail[at + _KEY_BYTES : at + _NULL_END] != _NULL:  # `startswith` takes twice as long
            tries += 1
            yield at
        at = tail.rfind(KEY, 0, at)


def _rest_of_event(tail: bytes | bytearray, at: int) -> bytes | bytearray:
    """The data of an event from a position on; further `data:` lines are joined as SSE says."""
    end = tail.find(b"\n\n", at)
    rest = tail[at : end if end >= 0 else len(tail)]
    if b"\r" in rest and (blank := _BLANK_LINE.search(rest)):
        rest = rest[: blank.start()]
    if b"\n" not in rest and b"\r" not in rest:
        return rest
    first, *more = rest.splitlines()
    return b"\n".join([first, *(line[5:] for line in more if line.startswith(b"data:"))])


def _decoded(dialect: Dialect, rest: bytes | bytearray, *, streamed: bool) -> Report | None:
    """`rest` begins with the key, and has to end where the objects around it end."""
    try:
        if streamed and dialect is _RESPONSES:
            counts = _response.decode(b'{"response":{' + rest).response.usage
        else:
            counts = _inner.decode(b"{" + rest).usage
    except _MALFORMED:
        return _opening(rest) if streamed and dialect is _ANTHROPIC else None
    return counts.report(dialect) if counts is not None else None


def _opening(rest: bytes | bytearray) -> Report | None:
    """message_start: its output_tokens are a first guess, not a count."""
    try:
        counts = _message.decode(b'{"message":{' + rest).message.usage
    except _MALFORMED:
        return None
    if counts is None:
        return None
    counts.output_tokens = None
    return counts.report(_ANTHROPIC)


# ── when nothing was reported ────────────────────────────────────────────────────────────────────────────


def estimate(report: Report | None, prompt_tokens: int, completion_tokens: int) -> Usage:
    """For a stream that was cut off before its report: flagged, and with what was reported until then."""
    prompt = report.prompt if report is not None else None
    if report is None or prompt is None:
        return Usage(prompt_tokens, 0, completion_tokens, 0, Source.ESTIMATED)
    return Usage(prompt, report.cached or 0, completion_tokens, 0, Source.ESTIMATED)
