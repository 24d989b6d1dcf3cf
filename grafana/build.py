"""Writes grafana/dashboards/*.json from `boards.py`: `python -m grafana.build`. A test compares them.

Grafana's classic model (schemaVersion 39), which versions 10 to 13 load from files: fixed uids, one
datasource variable, and panels that flow from left to right in rows of 24 columns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
SCHEMA_VERSION = 39
COLUMNS = 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
#: Grafana's names of the colours that thresholds pass through.
_COLOURS = ("green", "orange", "red")


@dataclass(frozen=True)
class Panel:
    """One picture. queries: legend (Grafana's template) and expression; steps: where a value becomes
    worrying, then bad; words: what a value of a state is called."""

    title: str
    about: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    steps: tuple[float, ...] = ()
    stacked: bool = False
    falling: bool = False  # low values are the bad ones
    most: float | None = None
    words: tuple[tuple[int, str, str], ...] = ()  # value, text, colour


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Board:
    """A dashboard. variables: the labels that one can choose by, with the metric that knows their values."""

    uid: str
    title: str
    about: str
    rows: tuple[Row, ...]
    variables: tuple[tuple[str, str], ...]


def stat(title: str, about: str, unit: str, expr: str, *, width: int = 4, **more: Any) -> Panel:
    return Panel(title, about, unit, (("", expr),), kind="stat", width=width, height=4, **more)


def graph(title: str, about: str, unit: str, *queries: tuple[str, str], **more: Any) -> Panel:
    return Panel(title, about, unit, queries, **more)


def heat(title: str, about: str, expr: str, **more: Any) -> Panel:
    """How a histogram's observations lie over time; the expression is its buckets by `le`, in seconds."""
    return Panel(title, about, "s", (("{{le}}", expr),), kind="heatmap", **more)


def states(title: str, about: str, words: Sequence[tuple[int, str, str]], expr: str, **more: Any) -> Panel:
    return Panel(
        title, about, "none", (("{{upstream}}", expr),), kind="state-timeline", words=tuple(words), **more
    )


def document(board: Board) -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    return {
        "uid": board.uid,
        "id": None,
        "title": board.title,
        "description": board.about,
        "tags": ["headrace"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "graphTooltip": 1,
        "links": [
            {
                "type": "dashboards",
                "title": "Headrace",
                "tags": ["headrace"],
                "keepTime": True,
                "includeVars": True,
            }
        ],
        "templating": {"list": [_datasource(), *(_variable(*each) for each in board.variables)]},
        "annotations": {"list": [_restarts()]},
        "panels": list(_laid_out(board.rows)),
    }


def _datasource() -> dict[str, Any]:
    return {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"}


def _variable(name: str, metric: str) -> dict[str, Any]:
    query = f"label_values({metric}, {name})"
    return {
        "type": "query",
        "name": name,
        "label": name.capitalize(),
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _restarts() -> dict[str, Any]:
    """A vertical line where the counters began anew."""
    return {
        "name": "Starts",
        "datasource": _SOURCE,
        "enable": True,
        "iconColor": "blue",
        "expr": 'changes(headrace_start_time_seconds{instance=~"$instance"}[1m]) > 0',
        "titleFormat": "Headrace started",
    }


def _laid_out(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    number = y = 0
    for row in rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
            "panels": [],
        }
        x, y, tallest = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            number += 1
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            yield {"id": number, "gridPos": place, **_panel(panel)}
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest


def _panel(panel: Panel) -> dict[str, Any]:
    heat = {"format": "heatmap"} if panel.kind == "heatmap" else {}
    targets = [
        {"refId": chr(ord("A") + at), "datasource": _SOURCE, "expr": expr, "legendFormat": legend, **heat}
        for at, (legend, expr) in enumerate(panel.queries)
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _options(panel),
    }


def _field(panel: Panel) -> dict[str, Any]:
    colours = _COLOURS[: len(panel.steps) + 1]
    if panel.falling:
        colours = colours[::-1]
    steps = [{"color": colours[0], "value": None}]
    steps += [{"color": colour, "value": at} for colour, at in zip(colours[1:], panel.steps, strict=True)]
    field: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "noValue": "none yet",
        "thresholds": {"mode": "absolute", "steps": steps},
        "color": {"mode": "thresholds" if panel.kind == "stat" else "palette-classic"},
    }
    if panel.most is not None:
        field["max"] = panel.most
    if panel.words:
        named = {str(value): {"text": text, "color": colour} for value, text, colour in panel.words}
        field["mappings"] = [{"type": "value", "options": named}]
        field["color"] = {"mode": "thresholds"}
    if panel.kind == "timeseries":
        field["custom"] = _lines(panel)
    return field


def _lines(panel: Panel) -> dict[str, Any]:
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 40 if panel.stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if panel.steps else "off"},
    }


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        return {"reduceOptions": last, "colorMode": "value", "graphMode": "area", "textMode": "value"}
    if panel.kind == "heatmap":
        return {
            "calculate": False,
            "color": {
                "mode": "scheme",
                "scheme": "Oranges",
                "scale": "exponential",
                "exponent": 0.5,
                "steps": 64,
            },
            "yAxis": {"unit": "s", "axisPlacement": "left"},
            "cellGap": 1,
            "filterValues": {"le": 1e-9},
            "legend": {"show": False},
            "tooltip": {"mode": "single", "yHistogram": True},
        }
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
    if panel.kind == "state-timeline":
        return {"showValue": "auto", "mergeValues": True, "rowHeight": 0.8, "legend": legend}
    return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


def text(board: Board) -> str:
    return json.dumps(document(board), indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    from grafana.boards import BOARDS  # which stands on this module

    for board in BOARDS:
        file = FOLDER / f"{board.uid.removeprefix('headrace-')}.json"
        file.write_text(text(board))
        sys.stdout.write(f"{file.relative_to(FOLDER.parent.parent)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
