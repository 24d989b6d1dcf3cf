"""`headrace token issue`: the work is `token_commands`."""

from __future__ import annotations

import argparse
import time

from proxy import token_commands
from proxy.cli_source import Source, config_flag
from proxy.config import Config


def token_parser(parser: argparse.ArgumentParser, source: Source) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    issue = verbs.add_parser("issue", parents=[config_flag()], help="sign a token with auth.jwt.secret")
    issue.add_argument("--subject", required=True)
    issue.add_argument("--plan", required=True)
    issue.add_argument("--ttl", default="24h", metavar="24h")
    issue.set_defaults(run=lambda arguments: _issue(arguments, source.settings(arguments)))


def _issue(arguments: argparse.Namespace, settings: Config) -> int:
    print(token_commands.issue(settings, arguments.subject, arguments.plan, arguments.ttl, time.time()))
    return 0
