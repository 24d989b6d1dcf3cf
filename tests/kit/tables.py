"""Tables of promises: each row names the tests that prove it. `python -m tests.kit.tables hostile faults`
runs those tests, and prints what became of each row.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest

from tests.kit.headrace import ROOT

_COLUMNS = (3, 36, 40, 62, 0)
_SIDE_BY_SIDE = ("-n", "2", "--dist", "worksteal")


@dataclass(frozen=True)
class Row:
    """proofs: node ids; one that ends inside the brackets stands for all that begin with it."""

    number: int
    what: str
    promise: str
    proofs: tuple[str, ...]
    extra: bool = False  # beside the numbered ones

    def proved_by(self, node: str) -> bool:
        return any(proves(proof, node) for proof in self.proofs)


@dataclass(frozen=True)
class Table:
    title: str
    rows: tuple[Row, ...]


def proves(proof: str, node: str) -> bool:
    return node.startswith(proof) and node[len(proof) : len(proof) + 1] in ("", "[", "-")


def table(name: str) -> Table:
    """Of tests/NAME/table.py."""
    found: Table = importlib.import_module(f"tests.{name}.table").TABLE
    return found


def to_run(rows: Iterable[Row]) -> list[str]:
    """What pytest is given: a test's whole function, where a proof is a part of its cases."""
    proofs = {proof for row in rows for proof in row.proofs}
    return sorted({proof if proof.endswith("]") else proof.partition("[")[0] for proof in proofs})


def complete(found: Table, count: int) -> None:
    """Rows 1 to `count` are there; each names tests, and pytest finds every one of those."""
    assert [row.number for row in found.rows if not row.extra] == list(range(1, count + 1))
    assert all(row.proofs for row in found.rows)
    words = (sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider")
    listed = subprocess.run([*words, *to_run(found.rows)], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stdout[-2000:] + listed.stderr
    nodes = listed.stdout.splitlines()
    missing = [
        proof for row in found.rows for proof in row.proofs if not any(proves(proof, node) for node in nodes)
    ]
    assert not missing, missing


@dataclass
class Recorder:
    """A pytest plugin that remembers how each test ended."""

    ended: dict[str, str] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        node = report.nodeid
        if report.when == "call" or report.outcome != "passed":
            worst = self.ended.get(node, "passed")
            self.ended[node] = report.outcome if worst == "passed" else worst


def result(row: Row, ended: dict[str, str]) -> str:
    """Every proof has to have run, and all of its cases to have passed."""
    cases = [outcome for node, outcome in ended.items() if row.proved_by(node)]
    ran = all(any(proves(proof, node) for node in ended) for proof in row.proofs)
    for bad in ("failed", "skipped"):
        if bad in cases:
            return f"{bad.upper()} ({cases.count(bad)} of {len(cases)})"
    return f"passed ({len(cases)})" if ran else "NOT RUN"


def printed(found: Table, ended: dict[str, str]) -> bool:
    """Prints the table; is every row proved?"""
    print(f"\n{found.title}\n")
    print(_line(("row", "what", "promise", "test", "result")))
    results = {row: result(row, ended) for row in found.rows}
    for row, text in results.items():
        print(_wrapped(row, text))
    good = {row for row, text in results.items() if text.startswith("passed")}
    for extra, name in ((False, "rows"), (True, "extras")):
        rows = [row for row in found.rows if row.extra is extra]
        if rows:
            print(f"{len(good.intersection(rows))} of {len(rows)} {name}")
    return len(good) == len(found.rows)


def _line(cells: Sequence[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, _COLUMNS, strict=True)).rstrip()


def _wrapped(row: Row, text: str) -> str:
    names = [proof.removeprefix("tests/") for proof in row.proofs]
    cells = ["+" if row.extra else str(row.number), row.what, row.promise]
    columns = [textwrap.wrap(cell, width) for cell, width in zip(cells, _COLUMNS, strict=False)]
    columns += [names, [text]]
    height = max(map(len, columns))
    lines = zip(*([*column, *[""] * (height - len(column))] for column in columns), strict=True)
    return "\n".join(map(_line, lines))


def main(names: Sequence[str]) -> int:
    tables = [table(name) for name in names]
    nodes = to_run(row for found in tables for row in found.rows)
    recorder = Recorder()
    quiet = ("-q", "-p", "no:cacheprovider", "--durations=0", "--durations-min=3")
    for extra in ((*_SIDE_BY_SIDE, "-m", "not slow and not alone"), ("-m", "not slow and alone")):
        code = pytest.main([*quiet, *extra, *nodes], plugins=[recorder])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return int(code)
    left = [row for found in tables for row in found.rows if result(row, recorder.ended) == "NOT RUN"]
    if left:  # their only proofs are slow
        pytest.main([*quiet, *to_run(left)], plugins=[recorder])
    return 0 if all([printed(found, recorder.ended) for found in tables]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
