"""Model names with `*` and `?`, as the configuration and the allow-list of a key write them."""

from __future__ import annotations

import re
from functools import lru_cache


def is_pattern(name: str) -> bool:
    return "*" in name or "?" in name


# A pattern comes from a file or from the key store, never from a caller: a few dozen of them exist.
@lru_cache(maxsize=1024)
def compile_pattern(glob: str) -> re.Pattern[str]:
    """`*` and `?` only. Atomic groups keep it linear: the name is the caller's, and may be megabytes long."""
    first, *rest = (re.escape(part).replace(r"\?", ".") for part in glob.split("*"))
    if not rest:
        return re.compile(first, re.DOTALL)
    middle = "".join(f"(?>.*?{part})" for part in rest[:-1] if part)
    return re.compile(f"{first}{middle}.*{rest[-1]}", re.DOTALL)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Is the name one of these, or does it fit one of them?"""
    return name in patterns or any(
        compile_pattern(pattern).fullmatch(name) for pattern in patterns if is_pattern(pattern)
    )
