"""The list of what no test reaches: `make coverage` holds it against the figures, this against the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.kit import gaps
from tests.kit.headrace import ROOT

SOURCE = """\
def both(given):
    if given:
        say()
        say()
    try:
        work()
    except OSError:
        say()
"""


def report(missing: list[int], branches: list[list[int]]) -> dict[str, Any]:
    lines = [line for line in range(2, 9) if line not in missing]
    figures = {"executed_lines": lines, "missing_lines": missing, "missing_branches": branches}
    return {"files": {"a.py": {"functions": {"both": figures}}}}


@pytest.mark.parametrize(
    ("missing", "branches", "found"),
    [
        ([], [], set()),
        ([], [[2, 5]], {"both: if given:"}),  # always true
        ([3, 4], [[2, 3]], {"both: if given:"}),  # never true: once, not for each of its lines
        ([7, 8], [], {"both: except OSError:"}),
        ([3, 4, 7, 8], [[2, 3]], {"both: if given:", "both: except OSError:"}),
    ],
)
def test_a_gap_is_named_once(
    tmp_path: Path, missing: list[int], branches: list[list[int]], found: set[str]
) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    assert gaps.gaps(report(missing, branches), tmp_path) == {"a.py": found}


def test_what_is_wrong_with_a_list() -> None:
    """A gap without a reason, and a reason without its gap unless it says "sometimes"."""
    reasons = {"a.py": {"f: x": "because", "f: y": "closed", "f: z": "sometimes: a race"}}
    first, second = gaps.wrong({"a.py": {"f: x", 'f: "new"'}}, reasons)
    assert first.endswith('["a.py"]\n"f: \\"new\\"" = ""')
    assert second.endswith("a.py: f: y")


def test_the_list_names_lines_of_the_source() -> None:
    for name, reasons in gaps.listed().items():
        lines = {line.strip() for line in (ROOT / name).read_text().splitlines()}
        for gap, reason in reasons.items():
            assert gap.partition(": ")[2] in lines or gap in lines, f"{name}: {gap}"
            assert len(reason.removeprefix(gaps.SOMETIMES)) > 10, f"{name}: {gap}"
