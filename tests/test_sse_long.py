"""Cases of the scanner that tests/test_sse.py may not have yet."""

from __future__ import annotations

import itertools

import pytest

from proxy.errors import Dialect
from proxy.sse import Scanner

FIRST = {
    Dialect.OPENAI: b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n',
    Dialect.ANTHROPIC: b'data: {"type":"content_block_delta","delta":{"text":"a"}}\n\n',
    Dialect.RESPONSES: b'data: {"type":"response.output_text.delta","delta":"a"}\n\n',
}


def fed(stream: bytes, size: int) -> Scanner:
    scanner = Scanner(Dialect.OPENAI, expects_terminator=True)
    for at in range(0, len(stream), size):
        scanner.feed(stream[at : at + size])
    return scanner


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize("size", [100, 4000, 5000, 200_000])
def test_a_first_token_in_a_large_read(dialect: Dialect, size: int) -> None:
    """The read that brings the first token says so, however long it is: whoever only looks then sees it."""
    scanner = Scanner(dialect, expects_terminator=True)
    assert scanner.feed(b": " + b"k" * size + b"\n\n" + FIRST[dialect])
    assert scanner.first_token


@pytest.mark.parametrize("size", [1, 1000, 4096, 100_000])
def test_a_finish_reason_far_before_the_end(size: int) -> None:
    """A finish_reason counts though later events push it out of what a scanner keeps, in any cut."""
    stream = b'data: {"choices":[{"finish_reason":"stop"}]}\n\n' + b": %b\n\n" % (b"k" * 6000)
    assert fed(stream, size).succeeded(framed=True)


@pytest.mark.parametrize("size", [1, 1000, 4096, 100_000])
def test_an_error_far_before_the_end(size: int) -> None:
    """An in-band error is one though comments follow it for long, in any cut."""
    assert fed(b'data: {"error":{"message":"m"}}\n\n' + b": keep-alive\n\n" * 500, size).in_band_error()


def test_a_kept_tail_may_begin_inside_a_line() -> None:
    """Talk of a terminator is none, wherever the start of what is kept falls."""
    for kept, read in itertools.product(range(2030, 2060), (2100, 3000)):
        scanner = Scanner(Dialect.OPENAI, expects_terminator=True)
        talk = b": data: [DONE]" + b"r" * (kept - 12)
        for part in (b": " + b"k" * 2500 + b"\n\n", talk, b"s" * read + b"[DONE]"):
            scanner.feed(part)
        assert not scanner.terminated, (kept, read)
