"""`headrace check`."""

from __future__ import annotations

import argparse

from proxy import config
from proxy.cli_source import Source


def check_parser(parser: argparse.ArgumentParser, source: Source) -> None:
    parser.set_defaults(run=lambda arguments: _check(source.settings(arguments)))


def _check(settings: config.Config) -> int:
    print(f"{settings.source}: ok")
    for line in config.describe_routes(settings):
        print(f"  {line}")
    return 0
