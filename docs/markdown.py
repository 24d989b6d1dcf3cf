"""The few pieces of Markdown that the pages are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def code(text: str) -> str:
    return f"`{text}`"


def link(text: str, heading: str) -> str:
    """To a heading of the same page, with the anchor that GitHub makes of it."""
    return f"[{text}](#{re.sub(r'[^a-z0-9_-]', '', heading.lower().replace(' ', '-'))})"


def plain(number: float) -> str:
    """As a file writes it: 10, 0.25, 1048576."""
    return f"{number:.12g}"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(titles)} |",
        "|" + "---|" * len(titles),
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]
