"""Writes the reference pages from the code: `python -m docs.build`. A test compares them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from docs import configuration, errors, metrics

FOLDER = Path(__file__).parent
_NOTE = "*Made from {source} by `python -m docs.build`.*"
#: Page: what makes it, given the line that says so.
PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": lambda: configuration.page(_NOTE.format(source="`proxy/schema.py`")),
    "errors.md": lambda: errors.page(_NOTE.format(source="`proxy/errors.py`")),
    "metrics.md": lambda: metrics.page(_NOTE.format(source="`proxy/metrics.py` and `proxy/log.py`")),
}


def main() -> int:
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make())
        sys.stdout.write(f"docs/{name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
