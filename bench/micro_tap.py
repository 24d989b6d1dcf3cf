"""What knowing the usage costs: microseconds of CPU, the minimum of five rounds.

    python -m bench.micro_tap

`without` is the scanner of `streams.usage: off`; `inject` is what the filter of `inject` adds to `with`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from proxy.chunked import framed
from proxy.context import Context
from proxy.errors import Dialect
from proxy.inject import UsageChunkFilter
from proxy.metrics import GAPS
from proxy.pipe import Clocks, Pipe
from proxy.sse import BlindScanner, Scanner
from proxy.tokens import estimate_prompt
from proxy.usage import find_in_json

ROUNDS = 5
CHUNKS = 320
STREAMS = 200

_HEAD = b'data: {"id":"chatcmpl-0123456789","object":"chat.completion.chunk","created":1,"model":"gpt-4.1",'
_DELTA = b'"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]'
_USAGE = b'"usage":{"prompt_tokens":1200,"completion_tokens":320,"total_tokens":1520}'
_EXTRA = _HEAD + b'"choices":[],' + _USAGE + b"}\n\n"
_END = [_EXTRA, b"data: [DONE]\n\n"]
STREAM_KINDS = {
    "no usage in the chunks": _HEAD + _DELTA + b"}\n\n",
    "usage: null in each": _HEAD + _DELTA + b',"usage":null}\n\n',
    "a running total in each": _HEAD + _DELTA + b"," + _USAGE + b"}\n\n",
}


def best(run: Callable[[], object]) -> float:
    """Seconds of CPU time, the minimum."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def feed_all(kind: type[Scanner], chunk: bytes) -> Callable[[], None]:
    reads = [chunk] * CHUNKS + _END

    def run() -> None:
        for _ in range(STREAMS):
            scanner = kind(Dialect.OPENAI, expects_terminator=True)
            feed = scanner.feed
            for read in reads:
                feed(read)

    return run


class Nowhere:
    """A transport that takes everything, and the writer and the answer above it."""

    chunked = True

    def set_write_buffer_limits(self, high: int) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: bytes) -> None: ...


async def pass_all(kind: type[Scanner] | None, chunk: bytes) -> float:
    """Seconds for the pipes of these streams, each event a chunk by itself; None: nobody looks at them."""
    reads = [(framed(event), len(b"%x" % len(event)) + 2) for event in [chunk] * CHUNKS + _END]
    way: Any = Nowhere()
    caller: Any = SimpleNamespace(transport=way)
    clocks = Clocks(60.0, 60.0, 15.0, 60.0, [0.0] * (len(GAPS) + 2))

    def run() -> None:
        for _ in range(STREAMS):
            scanner = None if kind is None else kind(Dialect.OPENAI, expects_terminator=True)
            feed = Pipe(Context("id", None, "/", 0.0), caller, way, way, scanner, clocks).feed
            for read, start in reads:
                feed(read, start)

    return best(run)


def ask_all(chunk: bytes) -> float:
    """Microseconds of `usage()` a stream."""
    scanners = [Scanner(Dialect.OPENAI, expects_terminator=True) for _ in range(STREAMS)]
    for scanner in scanners:
        for read in [chunk] * CHUNKS + _END:
            scanner.feed(read)

    def run() -> None:
        for scanner in scanners:
            assert scanner.usage() is not None

    return best(run) / STREAMS * 1e6


def sift_all(chunk: bytes) -> Callable[[], None]:
    reads = [chunk] * CHUNKS + _END

    def run() -> None:
        for _ in range(STREAMS):
            feed = UsageChunkFilter().feed
            for read in reads:
                feed(read)

    return run


def main() -> None:
    reads = STREAMS * (CHUNKS + len(_END))
    print(f"{f'a stream of {CHUNKS} chunks':26} {'without':>9} {'with':>9} {'usage()':>9} {'inject':>9}")
    print(f"{'':26} {'us/chunk':>9} {'us/chunk':>9} {'us/stream':>9} {'us/chunk':>9}")
    for name, chunk in STREAM_KINDS.items():
        without = best(feed_all(BlindScanner, chunk)) / reads * 1e6
        tapped = best(feed_all(Scanner, chunk)) / reads * 1e6
        sifted = best(sift_all(chunk)) / reads * 1e6
        print(f"{name:26} {without:9.3f} {tapped:9.3f} {ask_all(chunk):9.2f} {sifted:9.3f}")
    answer = b'{"object":"chat.completion","choices":[{"text":"' + b"x" * 2000 + b'"}],' + _USAGE + b"}"
    in_json = best(lambda: [find_in_json(Dialect.OPENAI, answer) for _ in range(1000)]) * 1e3
    images = b'{"messages":["' + b'","data:image/png;base64,'.join([b"A" * 2**20] * 32) + b'"]}'
    print(f"usage of a JSON answer of 2 KB {in_json:.2f} us")
    print(f"prompt estimate of 32 MB of images {best(lambda: estimate_prompt(images)) * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
