"""The dashboards and rules: as files, and against a real Prometheus that scrapes a busy Headrace."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from grafana import build
from grafana.boards import BOARDS
from tests import charts
from tests.kit import traffic
from tests.kit.fleet import fleet
from tests.kit.headrace import ROOT
from tests.kit.prometheus import SHIPPED, Prometheus, filled_in, scraping, tool

pytestmark = pytest.mark.timeout(120)

FOLDER = ROOT / "grafana"
RULES = FOLDER / "rules"
SCENARIOS = (RULES / "tests.yml", RULES / "tests-of-days.yml")
DASHBOARDS = {file.stem: json.loads(file.read_text()) for file in sorted(build.FOLDER.glob("*.json"))}
UNITS = {"reqps", "cps", "Bps", "bytes", "percentunit", "s", "short", "none", "currencyUSD", "suffix: tok/s"}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
#: Labels that come from the scrape.
SCRAPED = {"job", "instance"}
#: Everything that a panel asks has an answer after this long on a busy machine; 6 s measured.
ALL_THERE_S = 60.0


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that show something."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def questions() -> Iterator[tuple[str, str, str]]:
    """Dashboard and panel, legend, expression: of every query that a dashboard makes."""
    for name, dashboard in DASHBOARDS.items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}", target["legendFormat"], target["expr"]


def rules() -> list[dict[str, Any]]:
    files = [yaml.safe_load(file.read_text()) for file in (RULES / "alerts.yml", RULES / "recording.yml")]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


# ── as files ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_files_are_what_is_built() -> None:
    """Nobody has edited one by hand, or forgotten to write them."""
    built = {board.uid.removeprefix("headrace-"): build.text(board) for board in BOARDS}
    assert built == {file.stem: file.read_text() for file in build.FOLDER.iterdir()}


def test_dashboards_differ() -> None:
    """Fixed and different uids and titles: links keep working."""
    assert len(DASHBOARDS) == 4
    assert {each["uid"] for each in DASHBOARDS.values()} == {f"headrace-{name}" for name in DASHBOARDS}
    assert len({each["title"] for each in DASHBOARDS.values()}) == 4


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_one(name: str) -> None:
    """Grafana's classic model; the datasource is chosen, never fixed."""
    dashboard = DASHBOARDS[name]
    assert dashboard["schemaVersion"] == 39
    assert dashboard["id"] is None
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    text = json.dumps(dashboard)
    for variable in variables:
        assert variable == "datasource" or f'=~\\"${variable}\\"' in text, f"{variable} chooses nothing"
    for used in re.findall(r"\$([a-z]\w*)", text):
        assert used in variables


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_panel_can_be_read(name: str) -> None:
    """A title of its own, what it means, a unit, a source, an end of the scale."""
    shown = panels(DASHBOARDS[name])
    titles = [panel["title"] for panel in shown]
    assert len(set(titles)) == len(titles)
    for panel in shown:
        field = panel["fieldConfig"]["defaults"]
        assert panel["description"].endswith((".", "!")), panel["title"]
        assert field["unit"] in UNITS, panel["title"]
        steps = [step["value"] for step in field["thresholds"]["steps"]]
        assert steps[0] is None
        assert steps[1:] == sorted(steps[1:])
        assert panel["datasource"] == SOURCE
        assert panel["targets"]
        assert all(target["datasource"] == SOURCE for target in panel["targets"])
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_nothing_overlaps(name: str) -> None:
    """Panels lie side by side in 24 columns, and each row's title above its panels."""
    places = [panel["gridPos"] for panel in DASHBOARDS[name]["panels"]]
    for place in places:
        assert place["w"] > 0
        assert place["h"] > 0
        assert 0 <= place["x"] <= place["x"] + place["w"] <= 24
    for one, two in combinations(places, 2):
        beside = one["x"] + one["w"] <= two["x"] or two["x"] + two["w"] <= one["x"]
        above = one["y"] + one["h"] <= two["y"] or two["y"] + two["h"] <= one["y"]
        assert beside or above, (one, two)
    for row in (panel for panel in DASHBOARDS[name]["panels"] if panel["type"] == "row"):
        assert any(place["y"] == row["gridPos"]["y"] + 1 for place in places)


@pytest.mark.parametrize(("where", "legend", "expr"), list(questions()))
def test_legends_and_windows(where: str, legend: str, expr: str) -> None:
    """A legend shows labels that the expression has; a window follows the scrape interval or is long."""
    grouped = {name.strip() for names in re.findall(r"by \(([^)]*)\)", expr) for name in names.split(",")}
    for label in re.findall(r"{{(\w+)}}", legend):
        assert label in grouped or (label == "instance" and " by " not in expr)
    assert set(re.findall(r"\[([^\]]*)\]", expr)) <= {"$__rate_interval", "$__range", "1h"}
    assert expr.count("{") == expr.count('{instance=~"$instance"'), "not of the chosen instance"


@pytest.mark.parametrize("file", sorted((FOLDER / "provisioning").rglob("*.yml")), ids=lambda file: file.stem)
def test_provisioning(file: Path) -> None:
    """Files that Grafana reads at its start."""
    document = yaml.safe_load(file.read_text())
    assert document["apiVersion"] == 1
    (entry,) = document.get("datasources") or document["providers"]
    if "datasources" in document:
        assert (entry["type"], entry["uid"], entry["isDefault"]) == ("prometheus", "prometheus", True)
    else:
        assert entry["type"] == "file"
        assert entry["options"]["path"].startswith("/")


def test_the_readmes_picture() -> None:
    """Its panels are those of the dashboards; values lie where they belong, gaps stay gaps."""
    titles = {(name, panel["title"]) for name, each in DASHBOARDS.items() for panel in panels(each)}
    assert {(board, title) for board, title, _ in charts.PICTURES} <= titles
    flat = [(float(at), 3.0) for at in range(90) if not 40 < at < 50]
    lines = charts.Picture("a < b", "s", False, {"one": flat, "two": [(at, 1.0) for at, _ in flat]})
    drawn = ElementTree.fromstring(charts.svg([lines, lines._replace(stacked=True)], "what it is"))
    paths = [path.attrib for path in drawn.iter("{http://www.w3.org/2000/svg}path")]
    curves = [each["d"] for each in paths if each.get("stroke-width") == "1.8"]
    assert len(curves) == 2
    assert all(curve.count("M") == 2 for curve in curves), "the missing ten seconds are not drawn over"
    assert len([each for each in paths if "fill-opacity" in each]) == 2
    assert "a < b" in {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────


def promtool(*words: str) -> None:
    found = subprocess.run([tool("promtool"), *words], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_promtool_takes_the_configuration() -> None:
    """With the rules that it names."""
    promtool("check", "config", str(SHIPPED))


def test_rules_do_what_they_say() -> None:
    """promtool plays scenarios: which alerts fire, and that no other does."""
    promtool("test", "rules", *map(str, SCENARIOS))


def test_every_alert_is_played() -> None:
    """Each fires in a scenario, and says who is woken, what is wrong and what to do."""
    played = "".join(file.read_text() for file in SCENARIOS)
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len({rule["alert"] for rule in alerts}) == len(alerts) > 15
    for rule in alerts:
        assert f'{{alertname="{rule["alert"]}"}}' in played, rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "action"}


# ── against a real Prometheus ────────────────────────────────────────────────────────────────────────────


class Known:
    """What Prometheus has learned from the scrapes: metrics, their kinds, their labels."""

    def __init__(self, metadata: dict[str, Any], series: list[dict[str, str]]) -> None:
        self._metadata = metadata
        self._labels: dict[str, set[str]] = {}
        for each in series:
            self._labels.setdefault(each["__name__"], set()).update(set(each) - {"__name__"})

    @classmethod
    async def of(cls, prometheus: Prometheus) -> Known:
        everything = await prometheus.get("series", **{"match[]": '{job="headrace"}'})
        return cls(await prometheus.get("metadata"), everything)

    def kind(self, metric: str) -> str:
        base = re.sub("_(bucket|sum|count)$", "", metric)
        described = self._metadata.get(metric) or self._metadata.get(base)
        return described[0]["type"] if described else "unknown"

    def mistakes(self, expr: str) -> list[str]:
        """Metrics and labels that do not exist, and rates of what is no counter."""
        found = []
        grouped = {name.strip() for names in re.findall(r"by \(([^)]*)\)", expr) for name in names.split(",")}
        used = re.findall(r"\b(headrace_\w+|up)\b(?:{([^}]*)})?(\[)?", expr)
        for metric, selector, window in used:
            labels = self._labels.get(metric)
            if labels is None:
                found.append(f"no metric {metric}")
                continue
            asked = set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', selector)) | grouped
            found += [f"{metric} has no label {label}" for label in asked - labels - SCRAPED]
            level = self.kind(metric) == "gauge"
            if window and level and not re.search(r"\b(changes|deriv|\w+_over_time)\(", expr):
                found.append(f"{metric} is a gauge")
        return found


def finite(samples: list[Any]) -> bool:
    """Is there a number among them?"""
    return any(math.isfinite(float(sample["value"][1])) for sample in samples)


async def unanswered(prometheus: Prometheus, waiting: dict[str, str]) -> dict[str, str]:
    return {
        expr: where
        for expr, where in waiting.items()
        if not finite(await prometheus.query(filled_in(expr, "15s")))
    }


@pytest.mark.alone
async def test_every_panel_shows_something(tmp_path: Path) -> None:
    """Two workers under load: each expression is understood, uses metrics and labels that exist, and has a
    number; each rule is evaluated without an error."""
    asked = {expr: where for where, _, expr in questions()}
    async with (
        fleet(tmp_path, traffic.settings()) as it,
        traffic.traffic(it.port),
        scraping(tmp_path, it.admin_port) as prometheus,
        asyncio.timeout(ALL_THERE_S + 20),
    ):
        waiting, loop = dict(asked), asyncio.get_running_loop()
        give_up_at = loop.time() + ALL_THERE_S
        while waiting and loop.time() < give_up_at:
            waiting = await unanswered(prometheus, waiting)
            await asyncio.sleep(0.2)
        assert not waiting, [f"{where}: {expr}" for expr, where in waiting.items()]
        known = await Known.of(prometheus)
        assert known.mistakes("headrace_nothing") == ["no metric headrace_nothing"]
        assert known.mistakes('sum by (le) (headrace_streams_active{model="m"})') != []
        assert known.mistakes("rate(headrace_streams_active[1m])") == ["headrace_streams_active is a gauge"]
        for expr, where in asked.items():
            assert known.mistakes(expr) == [], where
        for rule in rules():
            recorded = re.sub(r"\b\w+:headrace_[\w:]+", "1", rule["expr"])
            assert known.mistakes(recorded) == [], rule
        await rules_are_well(prometheus)
        await variables_have_values(prometheus)


async def rules_are_well(prometheus: Prometheus) -> None:
    """Each is evaluated, and none fails."""
    found: dict[str, Any] = {}
    while not found or "unknown" in {rule["health"] for rule in found.values()}:
        await asyncio.sleep(0.1)
        groups = (await prometheus.get("rules"))["groups"]
        found = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert {rule["health"] for rule in found.values()} == {"ok"}, found
    assert len(found) == len(rules())


async def variables_have_values(prometheus: Prometheus) -> None:
    """What the menus of the dashboards offer."""
    for dashboard in DASHBOARDS.values():
        for variable in dashboard["templating"]["list"][1:]:
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]  # None would fail the test
            values = await prometheus.get(f"label/{label}/values", **{"match[]": metric})
            assert values, variable["name"]
