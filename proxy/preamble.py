"""What an upstream sends while its answer is not there yet, and what is no part of one.

DeepSeek keeps a queued request alive with blank lines before a JSON body and with `: keep-alive` comments in
a stream (api-docs.deepseek.com/quick_start/rate_limit), OpenRouter with blank lines and `: OPENROUTER
PROCESSING` (openrouter.ai/docs/api/reference/streaming). None of these bytes is an answer's first byte.
"""

from __future__ import annotations

import re

from proxy.usage import line_start

_IDLE = frozenset(b": \t\r\n")
# Whitespace, and comments where a line begins. A lone blank in front of a colon makes it a field, no comment.
_PREAMBLE = re.compile(rb"(?:[ \t\r\n]+|(?:\A|(?<=[\r\n])):[^\r\n]*)*+")
_REST_OF_LINE = re.compile(rb"[^\r\n]*")


def leading(data: bytes | bytearray, start: int = 0) -> int:
    """How many bytes at the start of an answer's body are only whitespace and SSE comments; the last comment
    may be incomplete. Below `len(data)`: the position of the first byte that is the answer's own.

    start: what the last call returned, when it returned all that there was; what it saw is not read again.
    """
    if not start:
        if not data or data[0] not in _IDLE:
            return 0
    elif _in_comment(data, start):
        start = _end(_REST_OF_LINE, data, start)
    return _end(_PREAMBLE, data, start)


def _in_comment(data: bytes | bytearray, at: int) -> bool:
    """Is this position inside a comment, given that all before it is preamble?"""
    line = line_start(data, at)
    return line < at and data.startswith(b":", line)


def _end(pattern: re.Pattern[bytes], data: bytes | bytearray, start: int) -> int:
    match = pattern.match(data, start)
    return match.end() if match else start
