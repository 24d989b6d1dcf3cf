"""Parts of pages that are made from measured figures: all between `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations


def put(text: str, name: str, section: str) -> str:
    """The page with that part written anew. ValueError: it has no such part."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, mark, rest = text.partition(begin)
    _, close, after = rest.partition(end)
    if not (mark and close):
        raise ValueError(f"the page has no {begin.strip()} and {end.strip()}")
    return before + mark + section + close + after
