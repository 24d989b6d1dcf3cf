"""The running requests of a server as a table: once, or live on a terminal (ANSI sequences only).

An island: it is handed a function that fetches `GET /admin/streams`, and draws what that says.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import termios
import tty
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any, NamedTuple, TextIO

Stream = Mapping[str, Any]
#: The running requests, or one line that says why there are none to show.
Fetch = Callable[[], Awaitable[Sequence[Stream] | str]]

#: The alternate screen without a cursor, and back.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _END_LINE, _END_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
_INVERSE, _PLAIN = "\x1b[7m", "\x1b[0m"
_QUIT_KEYS = frozenset("qQ\x03\x04\x1b")
_WIDEST_TEXT = 28
_MISSING = "-"


class Column(NamedTuple):
    """`text` of a stream and its rate in bytes a second. The highest `rank` is the first to go where the
    terminal is narrow."""

    title: str
    rank: int
    right: bool
    text: Callable[[Stream, float | None], str]


def _seconds(value: float | None) -> str:
    """At most five characters."""
    if value is None:
        return _MISSING
    if value < 100:
        return f"{value:.1f}s"
    if value < 6000:
        return f"{int(value) // 60}m{int(value) % 60:02}"
    return f"{int(value) // 3600}h{int(value) % 3600 // 60:02}"


def _size(value: float | None) -> str:
    """At most five characters: 0, 999, 1.0k, 99k, 1.2M."""
    if value is None:
        return _MISSING
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.0f}{unit}" if not unit or value >= 9.95 else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.0f}T"


def _plain(value: object) -> str:
    """Names come from a configuration, but a terminal obeys whatever is not printable."""
    text = _MISSING if value is None or value == "" else str(value)
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= _WIDEST_TEXT else text[: _WIDEST_TEXT - 1] + "…"


def _named(field: str) -> Callable[[Stream, float | None], str]:
    return lambda stream, _: _plain(stream.get(field))


COLUMNS = (
    Column("STREAM", 0, False, _named("id")),
    Column("KEY", 5, False, _named("key_id")),
    Column("MODEL", 1, False, _named("model")),
    Column("UPSTREAM", 6, False, _named("upstream")),
    Column("PHASE", 4, False, _named("phase")),
    Column("QUEUE", 9, True, _named("queue_place")),
    Column("AGE", 2, True, lambda stream, _: _seconds(stream.get("age_s"))),
    Column("TTFT", 7, True, lambda stream, _: _seconds(stream.get("ttft_s"))),
    Column("B/S", 3, True, lambda _, rate: _size(rate)),
    Column("IDLE", 8, True, lambda stream, _: _seconds(stream.get("idle_s"))),
    Column("BUFFER", 10, True, lambda stream, _: _size(stream.get("buffered_bytes"))),
)


class Rates:
    """Bytes a second of each stream: between two looks, at the first one since its beginning."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[float, int]] = {}

    def of(self, streams: Sequence[Stream], now: float) -> dict[str, float | None]:
        """By id; None: not known. `now`: seconds of any clock that does not go back."""
        seen: dict[str, tuple[float, int]] = {}
        rates: dict[str, float | None] = {}
        for stream in streams:
            name, size = stream["id"], stream.get("bytes_out")
            if size is None:
                rates[name] = None
                continue
            then, before = self._before.get(name, (now - stream["age_s"], 0))
            rates[name] = max(0, size - before) / (now - then) if now > then else None
            seen[name] = now, size
        self._before = seen
        return rates


def table(streams: Sequence[Stream], rates: Mapping[str, float | None], width: int) -> list[str]:
    """The lines of the table, the titles first, none of them wider than `width`."""
    cells = [
        [column.title, *(column.text(each, rates.get(each["id"])) for each in streams)] for column in COLUMNS
    ]
    widths = [max(map(len, column)) for column in cells]
    shown = _that_fit(widths, width)
    lines = []
    for row in range(len(streams) + 1):
        texts = [
            cells[at][row].rjust(widths[at]) if COLUMNS[at].right else cells[at][row].ljust(widths[at])
            for at in shown
        ]
        lines.append("  ".join(texts).rstrip()[:width])
    return lines


def _that_fit(widths: Sequence[int], width: int) -> list[int]:
    """Columns by their place; the first one always."""
    shown = list(range(len(COLUMNS)))
    while len(shown) > 1 and sum(widths[at] + 2 for at in shown) - 2 > width:
        shown.remove(max(shown, key=lambda at: COLUMNS[at].rank))
    return shown


def summary(streams: Sequence[Stream]) -> str:
    """One line on all of them."""
    phases = [stream.get("phase") for stream in streams]
    return f"{len(streams)} running, {phases.count('stream')} streaming, {phases.count('queue')} waiting"


def page(streams: Sequence[Stream], rates: Mapping[str, float | None], width: int, height: int) -> list[str]:
    """What fits on a screen, the oldest first."""
    lines = table(sorted(streams, key=lambda each: -each["age_s"]), rates, width)
    room = max(height - 1, 2)
    if len(lines) > room:
        lines[room - 1 :] = [f"… and {len(lines) - room + 1} more"[:width]]
    return [f"headrace: {summary(streams)} (q quits)"[:width], *lines]


async def once(fetch: Fetch, out: TextIO) -> str | None:
    """One table, as wide as it is. The answer is why there is none."""
    found = await fetch()
    if isinstance(found, str):
        return found
    width = shutil.get_terminal_size((10_000, 0)).columns if out.isatty() else 10_000
    rows = sorted(found, key=lambda each: -each["age_s"])
    out.write("\n".join(table(rows, Rates().of(found, monotonic()), width)) + "\n")
    return None


async def live(fetch: Fetch, out: TextIO, keyboard: TextIO | None = None, every_s: float = 1.0) -> None:
    """Redraws until q or Ctrl-C, or when the terminal changes its size; leaves the terminal as it was.

    keyboard: where keys come from, if that is a terminal (default: standard input).
    """
    end, wake = asyncio.Event(), asyncio.Event()
    rates = Rates()
    with _screen(out), _listening(keyboard or sys.stdin, end, wake):
        while not end.is_set():
            _draw(await fetch(), rates, out)
            wake.clear()
            try:
                async with asyncio.timeout(every_s):
                    await wake.wait()
            except TimeoutError:
                pass


def _draw(found: Sequence[Stream] | str, rates: Rates, out: TextIO) -> None:
    size = os.get_terminal_size(out.fileno())
    # A terminal that does not know its size says 0.
    width, height = size.columns or 80, size.lines or 24
    if isinstance(found, str):
        lines = [_plain_line(found)[:width]]
    else:
        lines = page(found, rates.of(found, monotonic()), width, height)
    if len(lines) > 1:
        lines[1] = f"{_INVERSE}{lines[1].ljust(width)}{_PLAIN}"
    out.write(_HOME + f"{_END_LINE}\r\n".join(lines) + _END_LINE + _END_SCREEN)
    out.flush()


def _plain_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


@contextmanager
def _screen(out: TextIO) -> Iterator[None]:
    out.write(_ENTER)
    out.flush()
    try:
        yield
    finally:
        out.write(_LEAVE)
        out.flush()


@contextmanager
def _listening(keyboard: TextIO, end: asyncio.Event, wake: asyncio.Event) -> Iterator[None]:
    """Keys without Enter, and the signals of a terminal."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        end.set()
        wake.set()

    def read() -> None:
        typed = os.read(keyboard.fileno(), 64).decode("latin-1")
        if not typed:
            loop.remove_reader(keyboard.fileno())  # it is closed, and would be ready for ever
        if not typed or _QUIT_KEYS.intersection(typed):
            stop()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGWINCH, wake.set)
    if not keyboard.isatty():
        yield
        return
    before = termios.tcgetattr(keyboard.fileno())
    tty.setcbreak(keyboard.fileno(), termios.TCSANOW)
    loop.add_reader(keyboard.fileno(), read)
    try:
        yield
    finally:
        loop.remove_reader(keyboard.fileno())
        termios.tcsetattr(keyboard.fileno(), termios.TCSANOW, before)
