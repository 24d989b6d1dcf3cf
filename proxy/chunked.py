"""HTTP/1.1's chunks (RFC 9112 section 7.1): bytes into one, and the bytes of what is exactly one.

Most reads of a stream are one event in one chunk, and two comparisons say so. They touch a fraction of the
code that formatting and parsing touch, and with hundreds of streams it is code that is out of the processor's
cache at each read (callgrind counts 960 misses of 64 bytes a chunk, 150 of them in the parser).
"""

from __future__ import annotations

_END = b"\r\n"
#: The end of a body, without trailers.
LAST_CHUNK = b"0\r\n\r\n"
_join = b"".join
#: Both tables end here: events are a few hundred bytes, and above that the copy costs more than the framing.
_TABLE_BYTES = 1024

#: An opening that no slice of that length is.
_NONE = b"?"
#: What stands before so many bytes.
_HEADS = tuple(b"%x\r\n" % size for size in range(_TABLE_BYTES))


def framed(data: bytes) -> bytes:
    """One chunk with these bytes in it; they must not be empty, an empty chunk ends a body."""
    size = len(data)
    if size < _TABLE_BYTES:
        return _join((_HEADS[size], data, _END))
    return b"%x\r\n%b\r\n" % (size, data)


def _opening(total: int) -> tuple[bytes, bytes, int]:
    """How a chunk of so many bytes in all begins, if any has so many; without extensions or leading zeros. In
    lower and in upper case (most servers; Rust's hyper). And where its bytes begin."""
    for digits in (1, 2, 3):
        size = total - digits - 4
        if 16 ** (digits - 1) <= size < 16**digits:
            return b"%x\r\n" % size, b"%X\r\n" % size, digits + 2
    return _NONE, _NONE, 0


def inside(data: bytes, start: int) -> bytes:
    """The bytes of a read. start: 0, or it is exactly one chunk and they begin there."""
    return data[start:-2] if start else data


def unframed(chunk: bytes) -> bytes | memoryview:
    """What is in one chunk. What is not exactly one is taken as it is."""
    at = chunk.find(_END)
    size = len(chunk) - at - 4
    if size > 0 and chunk.endswith(_END) and chunk[:at].lower() == b"%x" % size:
        return memoryview(chunk)[at + 2 : -2]
    return chunk


#: By the length of a read: what it begins with if it is one chunk, and where that ends.
OPENINGS = tuple(_opening(total) for total in range(_TABLE_BYTES))
MOST_OPENINGS = len(OPENINGS)


def is_chunk_of(data: bytes, size: int) -> bool:
    """Is this exactly one chunk, with so many bytes in it?"""
    total = len(data)
    if total >= MOST_OPENINGS:
        return False
    lower, upper, start = OPENINGS[total]
    return size == total - start - 2 and data[:start] in (lower, upper) and data[-2:] == _END
