"""What comes before an answer, in any chunking."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.preamble import leading

PREAMBLE = st.lists(
    st.sampled_from(
        [b"\n", b"\r\n", b"\r", b"\n\n", b" \n", b"\t", b": keep-alive\n", b":\r\n", b": a: b\n\n"]
    ),
    max_size=8,
).map(b"".join)
ANSWER = st.sampled_from([b"", b"data: x\n\n", b'{"a": ":\\n"}\n', b"event: y\n: late\n", b"[1]", b"x:"])


def by_line(data: bytes) -> int:
    """The same in the plainest way: byte by byte."""
    at, line_begins = 0, True
    while at < len(data):
        if data[at] in b"\r\n":
            line_begins = True
        elif data[at] in b" \t":
            line_begins = False
        elif data[at : at + 1] == b":" and line_begins:
            while at + 1 < len(data) and data[at + 1] not in b"\r\n":
                at += 1
        else:
            return at
        at += 1
    return at


def fed(data: bytes, cuts: list[int]) -> tuple[int, int]:
    """Position of the first byte of the answer, found while the data arrives; and where that was noticed."""
    at = 0
    for end in [*sorted(cut for cut in cuts if cut < len(data)), len(data)]:
        at = leading(data[:end], at)
        if at < end:
            return at, end
    return at, len(data)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"", 0),
        (b"data: x", 0),
        (b'{"a":1}', 0),
        (b"\n\n\n{", 3),
        (b" \t{", 2),
        (b": keep-alive\n\n", 14),
        (b": keep-alive\n\ndata", 14),
        (b": keep", 6),
        (b"\r\n: OPENROUTER PROCESSING\r\n\r\nevent: x", 29),
        (b":", 1),
        (b":\rx", 2),
        (b" : no comment", 1),
        (b"\n\t: no comment", 2),
        (b"\n\n", 2),
    ],
)
def test_shapes(data: bytes, count: int) -> None:
    """Blank lines and comments, whole or not, are no part of the answer."""
    assert leading(data) == leading(bytearray(data)) == count


@given(PREAMBLE, ANSWER, st.lists(st.integers(0, 60), max_size=8))
@example(b": keep-alive\n", b"data: x\n\n", [3, 5])
@example(b": keep", b"", [1])
@example(b"", b"x: y", [1])
def test_any_chunking(preamble: bytes, answer: bytes, cuts: list[int]) -> None:
    """However the bytes come, the first of the answer is found where it is, with the read that brings it."""
    data = preamble + answer
    at, noticed = fed(data, cuts)
    assert at == by_line(data)
    before = [cut for cut in cuts if cut <= at]
    assert noticed == len(data) or noticed > max(before, default=0)


@given(
    st.binary(max_size=40).map(
        lambda raw: raw.translate(bytes(b": \t\r\nx{"[byte % 7] for byte in range(256)))
    )
)
def test_any_bytes(data: bytes) -> None:
    """The same as byte by byte, whole and in single bytes."""
    assert leading(data) == by_line(data)
    assert fed(data, list(range(1, len(data))))[0] == by_line(data)


@pytest.mark.parametrize("piece", [b"\n", b": keep-alive\n\n", b":" + b"x" * 40 + b"\r\n"])
def test_what_was_seen_is_not_read_again(piece: bytes) -> None:
    """Ten thousand pieces, looked at after each: beginning anew each time took 8.5 s."""
    data, at = bytearray(), 0
    began = time.perf_counter()
    for _ in range(10_000):
        data += piece
        at = leading(data, at)
        assert at == len(data)
    assert time.perf_counter() - began < 2
