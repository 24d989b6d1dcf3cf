"""`headrace bench`: hands over to the repository's bench/, which no installed package has."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from proxy.cli_source import Source
from proxy.errors import StartError

#: Beside the package in a checkout, and nowhere else.
_REPOSITORY = Path(__file__).resolve().parent.parent
#: Its tools that are not the bench itself.
_TOOLS = ("check", "chart", "features", "profile", "report", "retries")


def bench_parser(parser: argparse.ArgumentParser, _: Source) -> None:
    # No character begins an option here: the bench reads its own flags, -h included.
    parser.prefix_chars = "\0"
    parser.add_argument("rest", nargs="*")
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    """Becomes `python -m bench …`, or one of its tools: `headrace bench profile short`. Paths among the flags
    are the repository's."""
    if not (_REPOSITORY / "bench" / "__main__.py").exists():
        raise StartError("bench needs the repository: clone it, and run `make bench` there")
    rest: list[str] = arguments.rest
    module = "bench"
    if rest and rest[0] in _TOOLS:
        module, rest = f"bench.{rest[0]}", rest[1:]
    os.chdir(_REPOSITORY)
    os.execv(sys.executable, [sys.executable, "-m", module, *rest])  # noqa: S606 - our own interpreter
