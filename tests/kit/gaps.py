"""Every gap in the branch coverage of `proxy/` has a reason: `python -m tests.kit.gaps REPORT.json`.

`tests/coverage_gaps.toml` has a table a file and a line a gap, `"function: text of its line" = "reason"`:
lines move, their text less so. Fails when there is a gap without a reason, or a reason without its gap.
A reason that begins with "sometimes:" is for what depends on timing: it may be covered.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.kit.headrace import ROOT

LIST = ROOT / "tests" / "coverage_gaps.toml"
SOMETIMES = "sometimes:"
#: What coverage says of a file or of one of its functions.
Figures = Mapping[str, Any]


def where(figures: Figures) -> Iterator[int]:
    """The lines that a reason is given for: where a branch was never taken, and where a run of lines begins
    that no such branch leads to (an except clause, the lines after a wait that never ended)."""
    executed, missing = set(figures["executed_lines"]), set(figures["missing_lines"])
    led_to = set()
    for source, target in figures["missing_branches"]:
        if source in executed:
            yield source
            led_to.add(target)
    before = None
    for line in sorted(executed | missing):
        if line in missing and before not in missing and line not in led_to:
            yield line
        before = line


def gaps(report: Figures, root: Path = ROOT) -> dict[str, set[str]]:
    """File -> its gaps, as the list names them."""
    found = {}
    for name, figures in sorted(report["files"].items()):
        text = (root / name).read_text().splitlines()
        found[name] = {
            f"{function}: {text[line - 1].strip()}".removeprefix(": ")
            for function, inside in figures["functions"].items()
            for line in where(inside)
        }
    return found


def wrong(found: Mapping[str, set[str]], reasons: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """What to add to the list, as it would stand there, and what to take out."""
    for name in sorted({*found, *reasons}):
        there, said = found.get(name, set()), reasons.get(name, {})
        for gap in sorted(there - said.keys()):
            yield f'not covered, no reason: ["{name}"]\n{json.dumps(gap, ensure_ascii=False)} = ""'
        for gap, reason in said.items():
            if gap not in there and not reason.startswith(SOMETIMES):
                yield f"covered, or not there any more: {name}: {gap}"


def listed() -> dict[str, dict[str, str]]:
    read: dict[str, dict[str, str]] = tomllib.loads(LIST.read_text())
    return read


def main(words: Sequence[str]) -> int:
    report = json.loads(Path(words[0]).read_text())
    totals, reasons = report["totals"], listed()
    mistakes = list(wrong(gaps(report), reasons))
    for mistake in mistakes:
        print(mistake)
    share = 100 * totals["covered_branches"] / totals["num_branches"]
    lines = 100 * totals["covered_lines"] / totals["num_statements"]
    print(f"{share:.1f} % of {totals['num_branches']} branches, {lines:.1f} % of the lines", end="; ")
    print(f"{sum(map(len, reasons.values()))} gaps with a reason, {len(mistakes)} mistakes in the list")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
