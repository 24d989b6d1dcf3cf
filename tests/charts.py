"""The picture in the README: panels of the dashboards as Prometheus saw them while a Headrace was busy.

`python -m tests.charts` runs two workers for a minute and a half: thirty seconds of ordinary traffic, thirty
in which things go wrong, thirty of ordinary traffic. The queries are those of the dashboards; only the
drawing is not Grafana's.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from grafana.build import FOLDER
from tests.kit.fleet import Fleet, fleet
from tests.kit.headrace import ROOT
from tests.kit.prometheus import Prometheus, filled_in, scraping
from tests.kit.traffic import VISITS, settings, traffic

TARGET = ROOT / "docs" / "img" / "dashboards.svg"
#: Dashboard and panel of each picture, and what its axis is called.
PICTURES = (
    ("overview", "Requests by end", "requests/s"),
    ("streams", "First token by model, p95", "seconds"),
    ("streams", "Gaps by upstream, p99", "seconds"),
    ("upstreams", "Attempts by result", "attempts/s"),
    ("upstreams", "Waiting for a slot", "requests"),
    ("spend", "Dollars an hour by model", "US dollars"),
)
ORDINARY = ("streams", "quick streams", "slow starts", "whole answers")
PHASE_S = 30
#: Before the first: so that a rate has its window.
_WARM_S = 10
_WINDOW = "6s"
_WIDTH, _HEIGHT, _ACROSS = 400, 250, 3
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 34, 62
_COLOURS = ("#3b6fb6", "#d9822b", "#3f9b63", "#c0453e", "#8561b5", "#8a6d4b", "#c86aa4", "#6b7280", "#a3a53a")
_FONT = "font-family='system-ui, sans-serif'"

Points = list[tuple[float, float]]


class Picture(NamedTuple):
    """One panel: series by name, points in seconds since the start."""

    title: str
    unit: str
    stacked: bool
    series: dict[str, Points]


async def busy(running: Fleet) -> float:
    """The three phases; when the first began (seconds since the epoch)."""
    async with traffic(running.port, *ORDINARY):
        await asyncio.sleep(_WARM_S)
        began = time.time()
        await asyncio.sleep(PHASE_S)
        async with traffic(running.port, *(set(VISITS) - set(ORDINARY))):
            await asyncio.sleep(PHASE_S)
        await asyncio.sleep(PHASE_S)
    return began


async def seen(folder: Path) -> list[Picture]:
    """Runs everything, and asks Prometheus."""
    async with fleet(folder, settings()) as running, scraping(folder, running.admin_port) as prometheus:
        await running.settle(2)
        began = await busy(running)
        return [await picture(prometheus, began, *each) for each in PICTURES]


async def picture(prometheus: Prometheus, began: float, board: str, title: str, unit: str) -> Picture:
    document = json.loads((FOLDER / f"{board}.json").read_text())
    (panel,) = (each for each in document["panels"] if each["title"] == title)
    (target,) = panel["targets"]
    found = await prometheus.range(filled_in(target["expr"], _WINDOW), began, began + 3 * PHASE_S, 1)
    stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    series = {" ".join(each["metric"].values()): _points(each["values"], began) for each in found}
    some = {name: points for name, points in series.items() if any(value > 0 for _, value in points)}
    return Picture(title, unit, stacked, dict(sorted(some.items())))


def _points(values: list[Any], began: float) -> Points:
    found = [(float(at) - began, float(value)) for at, value in values]
    return [(at, value) for at, value in found if math.isfinite(value)]


# ── drawing ──────────────────────────────────────────────────────────────────────────────────────────────


def svg(pictures: list[Picture], caption: str) -> str:
    rows = -(-len(pictures) // _ACROSS)
    width, height = _ACROSS * _WIDTH, rows * _HEIGHT + 34
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' {_FONT}>",
        f"<rect width='{width}' height='{height}' fill='#ffffff'/>",
    ]
    for number, each in enumerate(pictures):
        x, y = number % _ACROSS * _WIDTH, number // _ACROSS * _HEIGHT
        parts += [f"<g transform='translate({x} {y})'>", *_draw(each), "</g>"]
    parts.append(_text(14, height - 14, caption, 12, "#555555"))
    return "\n".join([*parts, "</svg>", ""])


def _draw(drawn: Picture) -> Iterator[str]:
    layers = list(_layers(drawn))
    top = _round_up(max((value for _, _, upper in layers for _, value in upper), default=1))
    yield _text(_LEFT, 18, drawn.title, 13, "#111111", weight=600)
    yield from _grid(top, drawn.unit)
    for number, (_, lower, upper) in enumerate(layers):
        colour = _COLOURS[number % len(_COLOURS)]
        line = _path(upper, top)
        if drawn.stacked:
            back = " ".join(f"L{_x(at)} {_y(value, top)}" for at, value in reversed(lower))
            yield f"<path d='{line} {back} Z' fill='{colour}' fill-opacity='0.75'/>"
        else:
            yield f"<path d='{line}' fill='none' stroke='{colour}' stroke-width='1.8'/>"
    yield from _legend([name for name, _, _ in layers])


def _layers(drawn: Picture) -> Iterator[tuple[str, Points, Points]]:
    """Name, lower and upper edge of each series; where one has no value a stack goes on without it."""
    times = sorted({at for points in drawn.series.values() for at, _ in points})
    floor = dict.fromkeys(times, 0.0)
    for name, points in drawn.series.items():
        if not drawn.stacked:
            yield name, [], points
            continue
        values = dict(points)
        roof = {at: floor[at] + values.get(at, 0.0) for at in times}
        yield name, list(floor.items()), list(roof.items())
        floor = roof


def _grid(top: float, unit: str) -> Iterator[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    trouble = (
        f"x='{_x(PHASE_S)}' y='{_TOP}' width='{_x(2 * PHASE_S) - _x(PHASE_S):g}' height='{bottom - _TOP}'"
    )
    yield f"<rect {trouble} fill='#f3f4f6'/>"
    for step in range(5):
        value = top * step / 4
        y = _y(value, top)
        yield f"<path d='M{_LEFT} {y}H{right}' stroke='#e2e4e8' stroke-width='1'/>"
        yield _text(_LEFT - 6, y + 4, f"{value:g}", 10, "#777777", anchor="end")
    for at in range(0, 3 * PHASE_S + 1, 15):
        yield _text(_x(at), bottom + 14, f"{at} s", 10, "#777777", anchor="middle")
    yield _text(right, 18, unit, 10, "#777777", anchor="end")


def _legend(names: list[str]) -> Iterator[str]:
    x, y = float(_LEFT), _HEIGHT - _BOTTOM + 32
    for number, name in enumerate(names):
        wide = 18 + 5.6 * len(name)
        if x + wide > _WIDTH - _RIGHT and x > _LEFT:
            x, y = float(_LEFT), y + 14
        yield f"<rect x='{x:g}' y='{y - 8}' width='9' height='9' fill='{_COLOURS[number % len(_COLOURS)]}'/>"
        yield _text(x + 13, y, name, 10, "#333333")
        x += wide + 8


def _path(points: Points, top: float) -> str:
    """Broken where values are missing."""
    words, before = [], -math.inf
    for at, value in points:
        words.append(f"{'L' if at - before < 2 else 'M'}{_x(at)} {_y(value, top)}")
        before = at
    return " ".join(words)


def _x(at: float) -> float:
    return round(_LEFT + at / (3 * PHASE_S) * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(value: float, top: float) -> float:
    return round(_HEIGHT - _BOTTOM - value / top * (_HEIGHT - _TOP - _BOTTOM), 1)


def _round_up(value: float) -> float:
    """The next number whose quarters can be read."""
    power: float = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.2, 1.6, 2, 2.4, 4, 5, 6, 8, 10) if step * power >= value)


def _text(
    x: float, y: float, words: str, size: int, colour: str, *, anchor: str = "start", weight: int = 400
) -> str:
    style = f"font-size='{size}' fill='{colour}' text-anchor='{anchor}' font-weight='{weight}'"
    return f"<text x='{x:g}' y='{y:g}' {style}>{escape(words)}</text>"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        pictures = asyncio.run(seen(Path(folder)))
    caption = (
        "Drawn from Prometheus with the dashboards' own queries: two workers, half a minute of ordinary "
        "traffic, half a minute of faults (shaded), half a minute after."
    )
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(svg(pictures, caption))
    return 0


if __name__ == "__main__":
    sys.exit(main())
