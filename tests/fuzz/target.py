"""What atheris drives: `python -m tests.fuzz.target scanner -max_total_time=30 [CORPUS]`, or `peek`.

The rest of the command line is libFuzzer's. A finding prints its case as tests/test_fuzz.py would write it,
and becomes a row there; the file that libFuzzer leaves repeats it: `… scanner .fuzz/crash-…`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import atheris

#: A new way through what is watched makes an input worth keeping. For peek the oracle too: what the decoder
#: in C does not show, the reading beside it does.
_WATCHED = {
    "scanner": ["proxy.sse", "proxy.sse_events", "proxy.usage"],
    "peek": ["proxy.peek", "tests.fuzz.oracles"],
}
with atheris.instrument_imports(include=_WATCHED[sys.argv[1]]):
    from tests.fuzz.oracles import (
        DIALECTS,
        PEEK_WORDS,
        SCANNER_WORDS,
        check_events,
        check_json_tail,
        check_peek,
        check_scanner,
        members,
        soup,
    )

_HEAD = 4
#: Watching costs: four streams are worth more than the last stream in four times the pieces.
_PIECES = 40


def scanner(data: bytes) -> None:
    """One byte for dialect and route, three for the cuts, the rest is the stream."""
    if len(data) <= _HEAD:
        return
    dialect, expects = DIALECTS[data[0] % len(DIALECTS)], data[0] < 192
    stream = soup(data[_HEAD:], SCANNER_WORDS)
    sizes = [size**2 // 8 + 1 + len(stream) // _PIECES // 4 for size in data[1:_HEAD]]
    with Told(dialect=dialect, expects=expects, sizes=sizes, stream=stream):
        check_scanner(stream, sizes, dialect, expects, _PIECES)
        check_events(stream, sizes, _PIECES)
        check_json_tail(stream, sizes, dialect)


def peeked(data: bytes) -> None:
    """Members with a byte that is wrong, words, or the bytes themselves."""
    if len(data) <= _HEAD:
        return
    kind, rest = data[0] % 4, data[1:]
    body = rest if kind == 0 else soup(rest, PEEK_WORDS) if kind == 1 else members(rest[:3], rest[3:])
    with Told(body=body):
        check_peek(body)


class Told:
    """Says which case it was, if it fails."""

    def __init__(self, **case: object) -> None:
        self._case = case

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            print(f"\nfound: {self._case}", file=sys.stderr)


TARGETS: dict[str, Callable[[bytes], None]] = {"scanner": scanner, "peek": peeked}


def main(words: list[str]) -> None:
    atheris.Setup([words[0], *words[2:]], TARGETS[words[1]])
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
