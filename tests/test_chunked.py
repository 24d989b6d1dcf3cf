"""HTTP/1.1's chunks: the tables that stand for formatting and parsing, and reads that go past the parser."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import wire, wire_connection
from proxy.chunked import MOST_OPENINGS, OPENINGS, framed, inside, unframed

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("size", [1, 9, 10, 15, 16, 17, 255, 256, 1023, 1024, 1025, 4096, 70_000])
def test_framing(size: int) -> None:
    data = b"x" * size
    assert framed(data) == b"%x\r\n%b\r\n" % (size, data)
    assert unframed(framed(data)) == data
    assert unframed(b"%X\r\n%b\r\n" % (size, data)) == data


@pytest.mark.parametrize(
    "other", [b"0\r\n\r\n", b"3\r\nab\r\n", b"03\r\nabc\r\n", b"3;x\r\nabc\r\n", b"abc", b""]
)
def test_what_is_not_one_chunk(other: bytes) -> None:
    assert unframed(other) == other
    if len(other) < MOST_OPENINGS:
        assert not other.startswith(OPENINGS[len(other)][0])


def test_openings() -> None:
    """Of every size that fits one, in both cases; and no length that no chunk has is in the table."""
    lengths = set()
    for size in itertools.count(1):
        chunk = framed(b"x" * size)
        if len(chunk) >= MOST_OPENINGS:
            break
        lengths.add(len(chunk))
        lower, upper, start = OPENINGS[len(chunk)]
        assert chunk[:start] == lower
        assert upper == b"%X\r\n" % size
        assert chunk[start:-2] == b"x" * size
    for length in set(range(MOST_OPENINGS)) - lengths:
        lower, upper, start = OPENINGS[length]
        assert len(lower) == len(upper) > start, "a slice of that length would be taken for it"


class Heard:
    """What came of an answer: its bytes, its end, and how many reads went past the parser."""

    def __init__(self, *, past: bool) -> None:
        loop = asyncio.new_event_loop()
        loop.close()  # nothing is scheduled
        self.connection = wire_connection.WireConnection(loop)
        self.exchange = wire.WireExchange(None, b"", b"")  # type: ignore[arg-type] # no pool
        self.exchange._protocol = self.connection
        self.connection.begin(self.exchange)
        self.connection.data_received(HEAD)
        self.exchange.give_to(self)
        self.data = b""
        self.whole = 0
        self.end_: wire_connection.End | None = None
        self._receive = self.connection.data_received if past else self.connection._parse

    blocked = False

    def feed(self, data: bytes, start: int = 0) -> None:
        assert inside(data, start), "an empty chunk would end the caller's body"
        assert not start or unframed(data) == inside(data, start)
        self.data += inside(data, start)
        self.whole += bool(start)

    def end(self, how: wire_connection.End) -> None:
        self.end_ = how

    def read(self, data: bytes) -> None:
        if self.end_ is None:
            self._receive(data)


def both(reads: list[bytes]) -> tuple[Heard, Heard]:
    """The same reads as they are taken, and all of them through the parser."""
    taken, parsed = Heard(past=True), Heard(past=False)
    for data in reads:
        taken.read(data)
        parsed.read(data)
        assert (taken.data, taken.end_) == (parsed.data, parsed.end_)
    return taken, parsed


# What looks like framing inside of what is framed, and framing of all kinds that the parser lets pass or not.
_LIKE = [
    b"3\r\nabc\r\n",
    b"\r\n",
    b"1\r\nx\r\n",
    b"0\r\n\r\n",
    b"a",
    b"d",
    b"\n",
    b"b\r\n0123456789a\r\n",
    b"\r\n3\r\n",
]
_PARTS = [*_LIKE, b"1\r\n", b"3\r", b"3", b"zz\r\n", b"ab", b"a\n", b"3;x", b";", b'="', b"0", b"\r"]
_payloads = st.lists(st.sampled_from(_LIKE), min_size=1, max_size=4).map(b"".join)
_styles = st.sampled_from([b"%x\r\n", b"%X\r\n", b"0%x\r\n", b"%x;ext=1\r\n", b"%x ;e\r\n"])


@st.composite
def _chunks(draw: st.DrawFn) -> bytes:
    data = draw(_payloads)
    return draw(_styles) % len(data) + data + b"\r\n"


@settings(max_examples=400, deadline=None)
@given(st.lists(_chunks(), min_size=1, max_size=8), st.data())
def test_reads_cut_anywhere(chunks: list[bytes], data: st.DataObject) -> None:
    """Cut at chunks' ends or anywhere else: what is heard is what the parser says, read by read."""
    stream = b"".join([*chunks, b"0\r\n\r\n"])
    ends = list(itertools.accumulate(map(len, chunks)))
    cuts = data.draw(st.sets(st.sampled_from(ends) | st.integers(1, len(stream) - 1)))
    places = [0, *sorted(cuts), len(stream)]
    taken, _ = both([stream[a:b] for a, b in itertools.pairwise(places) if a < b])
    assert taken.end_ is wire_connection.End.FRAMED


@settings(max_examples=400, deadline=None)
@given(st.lists(_chunks() | st.sampled_from(_PARTS), max_size=10))
def test_reads_of_any_kind(reads: list[bytes]) -> None:
    """Rubbish between chunks ends the answer just where the parser would end it."""
    both(reads)


def test_one_chunk_a_read_goes_past_the_parser() -> None:
    events = [framed(b'data: {"n":%d}\n\n' % number) for number in range(50)]
    taken, parsed = both(events)
    assert (taken.whole, parsed.whole) == (49, 0)  # the first tells where the parser stands
    taken, _ = both([events[0], events[1][:5], events[1][5:], events[2], events[3]])
    assert taken.whole == 1  # the first whole one behind tells it anew


@pytest.mark.parametrize(
    "reads",
    [
        # The parser takes a size without its CR, and says only with the next byte that it will not have it.
        [framed(b"3\r\nabc\r\n"), b"a", b"\n", framed(b"3\r\nabc\r\n")],
        [framed(b"abc") + b"a\n", framed(b"abc")],
        [b"a\n", framed(b"abc")],
        [b"0", framed(b"abc"), framed(b"abc")],
        [b'1;x="', framed(b"a"), framed(b"a")],
    ],
)
def test_half_of_a_chunks_head(reads: list[bytes]) -> None:
    both([framed(b"x"), *reads, framed(b"y")])
    both(reads)


def test_a_chunk_inside_of_a_chunk() -> None:
    """An upstream that sends what looks like a chunk, in a read of its own, inside of one."""
    inner = b"3\r\nabc\r\n"
    taken, _ = both([framed(b"x"), b"%x\r\n" % len(inner), inner, b"\r\n", framed(b"y")])
    assert taken.data == b"x" + inner + b"y"


def test_chunks_around_the_end_of_the_table() -> None:
    taken, _ = both([framed(b"x" * size) for size in range(MOST_OPENINGS - 12, MOST_OPENINGS + 4)])
    assert len(taken.data) == sum(range(MOST_OPENINGS - 12, MOST_OPENINGS + 4))
    assert 0 < taken.whole < 12  # those that are in it, but for the first
