"""The README's charts, drawn from a result: one dot a proxy on a logarithmic axis, for light and dark pages.

    python -m bench.chart [FILE] [--into FOLDER]

Dots and not bars: from nginx to the slowest gateway is a factor of forty, and the length of a bar means
nothing on a logarithmic axis. The line through a dot goes from the smallest round to the largest.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from bench import report
from bench.targets import DIRECT

_WIDTH, _LEFT, _RIGHT = 880, 206, 136
_ROW, _TITLE, _AXIS, _FOOT = 28, 58, 34, 40
#: Numbers that fit below an axis.
_MARKS = 11
_NAMES = {
    "headrace-full": "Headrace, everything on",
    "headrace-open": "Headrace, open mode",
    "litellm": "LiteLLM",
    "portkey": "Portkey",
    "haproxy": "HAProxy",
}
_STYLE = """
svg { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; }
.paper { fill: #ffffff; } .text { fill: #1f2328; } .quiet { fill: #59636e; }
.title { font-weight: 600; font-size: 15px; } .ours .text { font-weight: 600; }
.grid { stroke: #d1d9e0; } .lead { stroke: #b7bfc8; stroke-dasharray: 1 4; }
.dot { fill: #6e7781; stroke: #6e7781; } .spread { stroke: #6e7781; }
.ours .dot { fill: #0969da; stroke: #0969da; } .ours .spread { stroke: #0969da; }
.dot.hollow, .ours .dot.hollow { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
.paper { fill: #0d1117; } .text { fill: #e6edf3; } .quiet { fill: #9198a1; }
.grid { stroke: #30363d; } .lead { stroke: #4b535d; }
.dot { fill: #9198a1; stroke: #9198a1; } .spread { stroke: #9198a1; }
.ours .dot { fill: #4493f8; stroke: #4493f8; } .ours .spread { stroke: #4493f8; }
.dot.hollow, .ours .dot.hollow { fill: #0d1117; }
}
"""


class Row(NamedTuple):
    """value with its smallest and largest round; second: another value on the same line, hollow."""

    name: str
    ours: bool
    value: float
    low: float
    high: float
    second: float | None = None


class Panel(NamedTuple):
    title: str
    remark: str
    rows: list[Row]


def write(document: dict[str, Any], folder: Path) -> list[Path]:
    """cpu.svg and ttfb.svg, as far as there are figures for them."""
    found = []
    for name, panels in (("cpu.svg", _cpu(document)), ("ttfb.svg", _ttfb(document))):
        if drawn := [panel for panel in panels if panel.rows]:
            (folder / name).write_text(svg(drawn, report.headline(document)))
            found.append(folder / name)
    return found


def _cpu(document: dict[str, Any]) -> list[Panel]:
    return [
        Panel(
            "CPU per streamed chunk, µs",
            "200 streams x 50 chunks a second (fewer streams where a proxy cannot)",
            _rows(document, "chunk_200_us"),
        ),
        Panel("CPU per short request, µs", "32 callers, answers of 1 KiB", _rows(document, "request_us")),
    ]


def _ttfb(document: dict[str, Any]) -> list[Panel]:
    rows = []
    direct = document["peers"].get(DIRECT, {}).get("figures", {})
    for peer, found in document["peers"].items():
        both = [_differences(found["figures"], direct, name) for name in ("ttfb_p50_us", "ttfb_p99_us")]
        if peer != DIRECT and all(both):
            half, most = both
            typical = statistics.median(half)
            rows.append(Row(_name(peer), _ours(peer), typical, typical, typical, statistics.median(most)))
    rows.sort(key=lambda row: row.value)
    return [Panel("Added time to first byte, µs", "one stream; filled: p50, hollow: p99", rows)]


def _differences(mine: dict[str, Any], theirs: dict[str, Any], name: str) -> list[float]:
    both = (each.get(name, {}).get("values", []) for each in (mine, theirs))
    return [max(1.0, a - b) for a, b in zip(*both, strict=False)]


def _rows(document: dict[str, Any], figure: str) -> list[Row]:
    rows = [
        Row(_name(peer), _ours(peer), found["median"], found["min"], found["max"])
        for peer, entry in document["peers"].items()
        if (found := entry["figures"].get(figure)) and found["median"] > 0
    ]
    return sorted(rows, key=lambda row: row.value)


def _name(peer: str) -> str:
    return _NAMES.get(peer, peer)


def _ours(peer: str) -> bool:
    return peer.startswith("headrace")


# ── drawing ──────────────────────────────────────────────────────────────────────────────────────────────


class _Scale:
    """Logarithmic, from the smallest value to the largest, each rounded outwards to 1, 2 or 5."""

    def __init__(self, values: list[float]) -> None:
        marks = [base * 10.0**power for power in range(-1, 8) for base in (1, 2, 5)]
        low = max(mark for mark in marks if mark <= max(min(values), marks[0]))
        high = min(mark for mark in marks if mark >= max(values))
        self.marks = [mark for mark in marks if low <= mark <= high]
        crowded = len(self.marks) > _MARKS
        self.named = [mark for mark in self.marks if not crowded or math.log10(mark).is_integer()]
        self._low, self._span = math.log(low), math.log(high / low) or 1.0

    def x(self, value: float) -> float:
        share = (math.log(max(value, 1e-9)) - self._low) / self._span
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def svg(panels: list[Panel], foot: str) -> str:
    heights = [_TITLE + len(panel.rows) * _ROW + _AXIS for panel in panels]
    height = sum(heights) + _FOOT
    described = "; ".join(
        f"{panel.title}: " + ", ".join(f"{row.name} {_number(row.value)}" for row in panel.rows)
        for panel in panels
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}"'
        f' height="{height}" role="img" aria-labelledby="title desc">',
        f'<title id="title">{escape("; ".join(panel.title for panel in panels))}</title>',
        f'<desc id="desc">{escape(described)}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{height}" rx="6"/>',
    ]
    top = 0
    for panel, used in zip(panels, heights, strict=True):
        parts += _panel(panel, top)
        top += used
    parts += _foot(foot, height)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, top: int) -> Iterator[str]:
    ends = [end for row in panel.rows for end in (row.low, row.high, row.second or row.value)]
    scale = _Scale(ends)
    first, last = top + _TITLE, top + _TITLE + len(panel.rows) * _ROW
    yield f'<text class="text title" x="24" y="{top + 28}">{escape(panel.title)}</text>'
    yield f'<text class="quiet" x="24" y="{top + 46}">{escape(panel.remark)}</text>'
    for mark in scale.marks:
        x = scale.x(mark)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{first}" y2="{last}"/>'
        if mark in scale.named:
            place = f'x="{x:.1f}" y="{last + 18}" text-anchor="middle"'
            yield f'<text class="quiet" {place}>{_number(mark)}</text>'
    for number, row in enumerate(panel.rows):
        yield from _row(row, scale, first + number * _ROW + _ROW // 2)


def _row(row: Row, scale: _Scale, y: int) -> Iterator[str]:
    x, low, high = scale.x(row.value), scale.x(row.low), scale.x(row.high)
    right = max(high, x)
    yield '<g class="ours">' if row.ours else "<g>"
    yield f'<text class="text" x="{_LEFT - 14}" y="{y + 4}" text-anchor="end">{escape(row.name)}</text>'
    yield f'<line class="lead" x1="{_LEFT}" x2="{x:.1f}" y1="{y}" y2="{y}"/>'
    text = _number(row.value)
    if row.second is not None:
        right = scale.x(row.second)
        text = f"{text} / {_number(row.second)}"
        yield f'<line class="spread" x1="{x:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}"/>'
        yield f'<circle class="dot hollow" cx="{right:.1f}" cy="{y}" r="4.5" stroke-width="1.5"/>'
    yield f'<line class="spread" stroke-width="2" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
    yield f'<circle class="dot" cx="{x:.1f}" cy="{y}" r="5"/>'
    yield f'<text class="text" x="{right + 11:.1f}" y="{y + 4}">{text}</text></g>'


def _foot(text: str, height: int) -> Iterator[str]:
    """Two lines of small print."""
    words, lines = text.split(" "), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 140:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    for number, line in enumerate(lines[:2]):
        yield (
            f'<text class="quiet" font-size="11" x="24" y="{height - 24 + number * 14}">{escape(line)}</text>'
        )


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}".removesuffix(".0") if value >= 1 else f"{value:.2f}".rstrip("0")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.chart", description="charts of a result")
    parser.add_argument("file", nargs="?", type=Path, default=report.LATEST)
    parser.add_argument("--into", type=Path, default=report.RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    for file in write(json.loads(arguments.file.read_text()), arguments.into):
        print(file)


if __name__ == "__main__":
    main()
