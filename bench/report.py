"""A result as a table: for the terminal, and as Markdown for the README.

python -m bench.report [FILE] [--markdown]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from bench.measures import FIGURES, Figure
from bench.targets import DIRECT

RESULTS = Path(__file__).resolve().parent / "results"
#: What a run writes; the commited one is what the README shows.
LATEST = RESULTS / "latest.json"
_ACROSS = 4
_BASE = "nginx"


def lines(document: dict[str, Any]) -> list[str]:
    """Median, and smallest to largest of the rounds; below it, what it is beside `direct` or nginx."""
    found = [headline(document), ""]
    peers = list(document["peers"])
    for start in range(0, len(peers), _ACROSS):
        found += _block(document, peers[start : start + _ACROSS])
    found += [f"skipped {peer}: {why}" for peer, why in document["skipped"].items()]
    found += [f"failed in part: {text}" for text in document["troubles"]]
    return found


def headline(document: dict[str, Any]) -> str:
    """Where and of what these figures are."""
    machine = document["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    changed = " with local changes" if machine["changed"] else ""
    quick = " (quick: seconds-long rounds, for a look only)" if document["quick"] else ""
    return (
        f"{document['when']}, commit {machine['commit']}{changed}; "
        f"{machine['cores']} cores, {machine['cpu']}, Linux {machine['kernel']}, Python {machine['python']}, "
        f"{packages}; {document['rounds']} rounds{quick}"
    )


def _block(document: dict[str, Any], peers: list[str]) -> list[str]:
    found = [f"{'':<50}" + "".join(f"{peer:>27}" for peer in peers)]
    for name, figure in FIGURES.items():
        cells = [_cell(document, peer, name, figure) for peer in peers]
        if any(cells):
            label = f"{figure.label}, {figure.unit}" if figure.unit else figure.label
            found.append(f"{label:<50}" + "".join(f"{cell:>27}" for cell in cells))
            seconds = [beside(document, peer, name, figure) for peer in peers]
            if any(seconds):
                found.append(f"{'':<50}" + "".join(f"{text:>27}" for text in seconds))
    return [*found, ""]


def _cell(document: dict[str, Any], peer: str, name: str, figure: Figure) -> str:
    found = document["peers"][peer]["figures"].get(name)
    if not found:
        return ""
    digits = figure.digits if found["median"] < 1000 else 0
    median, low, high = (f"{found[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low}-{high})"


def beside(document: dict[str, Any], peer: str, name: str, figure: Figure) -> str:
    """`+34 added` over direct, or `1.52x nginx`: the median of what each round says."""
    base = DIRECT if figure.added else _BASE
    mine, theirs = (_values(document, each, name) for each in (peer, base))
    pairs = list(zip(mine, theirs, strict=False))
    if peer in (base, DIRECT) or not pairs:
        return ""
    if figure.added:
        return f"{statistics.median(a - b for a, b in pairs):+,.{figure.digits}f} added"
    if not all(b for _, b in pairs):
        return ""
    return f"{statistics.median(a / b for a, b in pairs):,.2f}x nginx"


def _values(document: dict[str, Any], peer: str, name: str) -> list[float]:
    found: list[float] = document["peers"].get(peer, {}).get("figures", {}).get(name, {}).get("values", [])
    return found


def markdown(document: dict[str, Any], names: list[str] | None = None) -> list[str]:
    """One row a peer would be too wide for a README: one row a figure."""
    peers = list(document["peers"])
    found = ["| | " + " | ".join(peers) + " |", "|---|" + "--:|" * len(peers)]
    for name, figure in FIGURES.items():
        if names and name not in names:
            continue
        medians = [document["peers"][peer]["figures"].get(name, {}).get("median") for peer in peers]
        if any(median is not None for median in medians):
            cells = ["" if each is None else f"{each:,.{figure.digits}f}" for each in medians]
            label = f"{figure.label}, {figure.unit}" if figure.unit else figure.label
            found.append(f"| {label} | " + " | ".join(cells) + " |")
    return [*found, "", headline(document)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="a result as a table")
    parser.add_argument("file", nargs="?", type=Path, default=LATEST)
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    document = json.loads(arguments.file.read_text())
    print("\n".join((markdown if arguments.markdown else lines)(document)))


if __name__ == "__main__":
    main()
