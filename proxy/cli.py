"""The commands. `headrace COMMAND -h` explains each; every failure is one line that names the fix."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from proxy import __version__
from proxy.cli_source import Source, config_flag
from proxy.errors import OperationError
from proxy.yamlstruct import ConfigError


class Command(NamedTuple):
    """module: its `NAME_parser(parser, source)` adds the flags, and says what is run."""

    module: str
    help: str | None  # None: not for people


#: By name, in the order of `headrace -h`. A module is imported when its command is called: `keys list` takes
#: 0.1 s, the imports of all of them four times as long.
COMMANDS = {
    "serve": Command("proxy.cli_serve", "run the proxy"),
    "check": Command("proxy.cli_check", "validate the configuration, print the routes"),
    "reload": Command("proxy.cli_admin", "read the configuration again, without touching running streams"),
    "restart": Command("proxy.cli_admin", "hand the sockets to a new generation that runs the code on disk"),
    "keys": Command("proxy.cli_keys", "API keys: create, list, show, revoke, rotate"),
    "token": Command("proxy.cli_token", "JSON Web Tokens: issue"),
    "usage": Command("proxy.cli_usage", "requests, tokens and cost, from the ledger"),
    "top": Command("proxy.cli_top", "live table of the running requests; q ends it"),
    "kill": Command("proxy.cli_admin", "end a running request"),
    "doctor": Command(
        "proxy.cli_doctor", "who between callers and Headrace buffers, compresses, cuts or drops"
    ),
    "bench": Command("proxy.cli_bench", "measure Headrace beside nginx and others (in a checkout)"),
    "worker": Command("proxy.cli_serve", None),
    "mock": Command("proxy.cli_mock", "run the mock upstream on its own"),
}


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 for what the user can mend, 2 for a wrong command line."""
    arguments = _parser(Source(os.environ, Path.cwd())).parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ConfigError, OperationError) as error:
        print(f"headrace: {error}" if isinstance(error, OperationError) else str(error), file=sys.stderr)
        return 1


def _parser(source: Source) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace",
        description="A streaming reverse proxy for OpenAI-compatible LLM APIs.",
        parents=[config_flag()],
    )
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    commands: Any = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_LateParser)
    for name, command in COMMANDS.items():
        shown = {} if command.help is None else {"help": command.help}
        late = commands.add_parser(name, parents=[config_flag()], **shown)
        late.fill = partial(_fill, late, name, source)
    return parser


class _LateParser(argparse.ArgumentParser):
    """Learns its flags when it is chosen."""

    fill: Callable[[], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        fill, self.fill = self.fill, None
        if fill is not None:
            fill()
        return super().parse_known_args(args, namespace)


def _fill(parser: argparse.ArgumentParser, name: str, source: Source) -> None:
    module = importlib.import_module(COMMANDS[name].module)
    getattr(module, f"{name}_parser")(parser, source)
