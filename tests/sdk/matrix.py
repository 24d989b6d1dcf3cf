"""What the last runs found, and the README's table of it.

python -m tests.sdk.matrix      writes the table into README.md
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.kit.headrace import ROOT
from tests.sdk.cases import CASES, ROWS, Case, title
from tests.sdk.columns import COLUMNS, HERE, NODE, Column, pinned_version

RESULTS = HERE / "matrix.json"
README = ROOT / "README.md"
START, END = "<!-- sdk-matrix -->\n", "<!-- /sdk-matrix -->\n"

Cells = Mapping[str, Mapping[str, str]]


def recorded() -> dict[str, Any]:
    """`versions` by SDK, and `cells`: column -> case -> `ok` or what is wrong."""
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    with (directory / ".matrix.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def record(column: Column, case: Case, outcome: str, locks: Path) -> None:
    """Writes one cell; a column whose SDK has another version than before begins anew."""
    with _alone(locks):
        before = recorded()
        versions = {sdk: pinned_version(sdk) for sdk in (NODE, *(column.sdk for column in COLUMNS))}
        cells = {
            known.name: dict(before["cells"].get(known.name, {}))
            for known in COLUMNS
            if before["versions"].get(known.sdk) == versions[known.sdk]
        }
        cells.setdefault(column.name, {})[case.__name__] = outcome
        fresh = RESULTS.with_suffix(".new")
        text = json.dumps({"versions": versions, "cells": cells}, indent=2, sort_keys=True) + "\n"
        fresh.write_text(text)
        fresh.replace(RESULTS)


def _cell(case: Case, sdk: str, cells: Cells) -> str:
    """One cell of the README: of a Python SDK, the sync and the async client together."""
    columns = [column for column in COLUMNS if column.sdk == sdk]
    if case not in CASES[columns[0].dialect]:
        return ""
    outcomes = {cells.get(column.name, {}).get(case.__name__, "not run") for column in columns}
    return ", ".join(sorted(outcomes - {"ok"} or outcomes))


def _heading(sdk: str, versions: Mapping[str, str]) -> str:
    package, language, _ = sdk.split("-")
    return f"{package} {versions[sdk]} ({language.capitalize()})"


def table(results: Mapping[str, Any]) -> str:
    """The matrix as Markdown: a row for each case, a column for each SDK."""
    sdks = list(dict.fromkeys(column.sdk for column in COLUMNS))
    lines = [
        "| | " + " | ".join(_heading(sdk, results["versions"]) for sdk in sdks) + " |",
        "|---" * (len(sdks) + 1) + "|",
    ]
    for case in ROWS:
        cells = [_cell(case, sdk, results["cells"]) for sdk in sdks]
        lines.append(f"| {title(case)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def printed(readme: str) -> str:
    """The table that a README has."""
    return readme.partition(START)[2].partition(END)[0]


def _write() -> None:
    readme = README.read_text()
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    README.write_text(before + START + table(recorded()) + END + after)


if __name__ == "__main__":
    _write()
