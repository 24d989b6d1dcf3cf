"""The pages in docs/: made from the code where they can be, and true where they speak of it."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

import proxy.server  # so that every error there is has been defined
from docs import build, errors, metrics
from proxy import config
from proxy.context import Phase
from proxy.errors import HeadraceError, Reason
from proxy.log import RequestLine
from tests.kit.headrace import ROOT
from tests.test_architecture import SOURCES

DOCS = ROOT / "docs"
LIFE = (DOCS / "life-of-a-request.md").read_text()
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


# ── made from the code ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", build.PAGES)
def test_pages_are_up_to_date(name: str) -> None:
    """`python -m docs.build` would write what is there."""
    assert (DOCS / name).read_text() == build.PAGES[name](), "run `python -m docs.build`"


def every_key(settings: type[msgspec.Struct]) -> set[str]:
    return {field.name for field in msgspec.structs.fields(settings)}


def test_every_section_is_in_the_reference() -> None:
    """Whatever Struct a configuration may hold, each of its keys has a row."""
    text = (DOCS / "configuration.md").read_text()
    rows = re.findall(r"^\| `([\w.\[\]]+)` ", text, re.MULTILINE)
    last = {row.rpartition(".")[2] for row in rows}
    structs = [each for each in vars(proxy.schema).values() if _is_section(each)]
    assert len(structs) > 20
    for struct in structs:
        assert every_key(struct) <= last, struct
    assert len(rows) == len(set(rows))


def _is_section(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, proxy.schema.Section)


def subclasses(kind: type[HeadraceError]) -> list[type[HeadraceError]]:
    return [kind, *(below for each in kind.__subclasses__() for below in subclasses(each))]


def test_every_error_is_explained() -> None:
    """Whatever error may be raised anywhere, its code has a row."""
    known = errors.codes()
    assert {kind.code for kind in subclasses(HeadraceError)} <= known.keys()
    text = (DOCS / "errors.md").read_text()
    assert all(f"| `{code}` |" in text for code in known)


def test_an_unexplained_code_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new code without a line of explanation fails, and so does an explanation without a code."""
    found = errors.codes()
    rows = {"brand_new": found["overloaded"]}
    monkeypatch.setattr(errors, "codes", lambda: found | rows)
    with pytest.raises(LookupError, match="brand_new"):
        errors.page("")


def test_an_unexplained_field_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of the log line's fields."""
    monkeypatch.delitem(metrics._FIELDS, "queue_ms")
    with pytest.raises(LookupError, match="queue_ms"):
        metrics.page("")


# ── the life of a request ────────────────────────────────────────────────────────────────────────────────


def rows_below(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    section = LIFE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_phases() -> None:
    """Exactly those there are, each once, in their order."""
    named = [cells[0].strip("`") for cells in rows_below("The way") if cells[0]]
    assert named == [phase.value for phase in Phase]


def test_reasons() -> None:
    """Exactly those there are."""
    assert [cells[0].strip("`") for cells in rows_below("How a request ends")] == [
        reason.value for reason in Reason
    ]


def test_modules_of_the_way() -> None:
    """Each step names modules that exist, and the long ones of the data path are all named."""
    named = {name for cells in rows_below("The way") for name in re.findall(r"`([\w.]+)`", cells[2])}
    assert named <= SOURCES.keys(), named - SOURCES.keys()
    assert {"proxied", "admission", "forward", "attempt", "wire", "deliver", "pipe"} <= named


def resolved(dotted: str) -> object:
    """`pipe.Pipe.feed`. Raises ImportError, AttributeError."""
    parts = dotted.split(".")
    depth = next(size for size in range(len(parts), 0, -1) if ".".join(parts[:size]) in SOURCES)
    found: Any = importlib.import_module(".".join(["proxy", *parts[:depth]]))
    for part in parts[depth:]:
        if part not in getattr(found, "__annotations__", {}):
            found = getattr(found, part)
    return found


def is_key(dotted: str) -> bool:
    """Of the configuration, from its top or from a section: `limits.queue.max_wait`, `timeouts.idle`."""
    reference = (DOCS / "configuration.md").read_text()
    row = rf"^(?:\| |## )`(?:[\w.\[\]]+\.)?{re.escape(dotted)}`"
    return re.search(row, reference, re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names(page: Path) -> None:
    """What a page calls `module.Class.function`, `section.key` or `proxy/module.py` is there."""
    text = page.read_text()
    heads = "|".join(map(re.escape, [*SOURCES, *every_key(config.Settings)]))
    for dotted in re.findall(rf"`((?:{heads})\.[A-Za-z_][\w.]*)`", text):
        if not re.search(r"\.(md|yaml|db|conf|service)$", dotted) and not is_key(dotted):
            resolved(dotted)
    for file in re.findall(r"`((?:proxy|tests|bench|deploy|grafana|nginx|docs)/[\w./-]+)`", text):
        assert (ROOT / file).exists(), file


def test_the_example_line_is_one() -> None:
    """The log line on the page has every field, in order."""
    (text,) = re.findall(r"^```json\n(.*?)```", LIFE, re.MULTILINE | re.DOTALL)
    line = json.loads(text)
    assert list(line) == [field.name for field in msgspec.structs.fields(RequestLine)]
    assert msgspec.convert(line, RequestLine).reason in list(Reason)


# ── links, figures, samples ──────────────────────────────────────────────────────────────────────────────


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    """What a page links to is there, to the heading."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_linked_from_the_readme() -> None:
    """A newcomer finds them all."""
    readme = PAGES[0].read_text()
    assert [page.name for page in PAGES[1:] if f"](docs/{page.name}" not in readme] == []


def test_figures_of_retries() -> None:
    """As `python -m bench.retries` has found them."""
    found = json.loads((ROOT / "bench" / "results" / "retries.json").read_text())
    text = (DOCS / "upstreams.md").read_text()
    for rate in found["rates"]:
        row = f"| {rate['share']:.0%} | {rate['success_percent']} % | {rate['attempts_per_request']} |"
        assert row.replace("%", " %", 1) in text
    for tier in found["first_byte"]:
        figures = f"| {tier['breaker_closed_ms']} | {tier['breaker_open_ms']} |"
        assert re.search(rf"^\| {tier['first_tier']}.*{re.escape(figures)}$", text, re.MULTILINE)
    first = found["rates"][0]
    wanted = f"{first['success_percent']} % of {first['requests']:,} requests"
    readme = " ".join(PAGES[0].read_text().split())
    assert f"{wanted} succeeded with {first['attempts_per_request']:.2f} attempts" in readme


def test_migration_from_litellm(tmp_path: Path) -> None:
    """The sample of LiteLLM's configuration has become the one below it: every name, every place."""
    text = (DOCS / "migrating.md").read_text()
    (old,) = re.findall(r"^```yaml litellm\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    new = text.split("```yaml litellm")[1].split("```yaml\n")[1].split("```")[0]
    before: dict[str, Any] = yaml.safe_load(old)
    path = tmp_path / "headrace.yaml"
    path.write_text(new)
    after = config.load(path, dict.fromkeys(re.findall(r"\$\{(\w+)", new), "x"))
    assert {entry["model_name"] for entry in before["model_list"]} == set(after.models)
    for entry in before["model_list"]:
        wanted = entry["litellm_params"]["model"].partition("/")[2]
        targets = after.models[entry["model_name"]].upstreams
        assert wanted in [target.model or entry["model_name"] for target in targets]
    assert after.retry.attempts == before["litellm_settings"]["num_retries"] + 1
    for fallbacks in before["litellm_settings"]["fallbacks"]:
        for model, others in fallbacks.items():
            assert after.models[model].fallback == tuple(others)
