"""`headrace top`: the running requests as a table; the work is `top`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import msgspec
import uvloop

from proxy import cli_admin, top
from proxy.cli_source import Source
from proxy.config import Config
from proxy.errors import OperationError, StartError


def top_parser(parser: argparse.ArgumentParser, source: Source) -> None:
    parser.description = (
        "Without a terminal: the table once. B/S, IDLE and BUFFER are the caller's connection's."
    )
    parser.add_argument("--once", action="store_true", help="the table once, on a terminal too")
    parser.add_argument("--admin", metavar="URL", help="admin listener of the running server")
    parser.set_defaults(run=lambda arguments: _top(source.of_server(arguments), once=arguments.once))


def _top(settings: Config, *, once: bool) -> int:
    async def fetch() -> Sequence[top.Stream] | str:
        try:
            return _streams(*await cli_admin.ask(settings, "GET", "/admin/streams"))
        except OperationError as error:
            return str(error)

    if once or not sys.stdout.isatty():
        failure = uvloop.run(top.once(fetch, sys.stdout))
        if failure is not None:
            raise StartError(failure)
    else:
        uvloop.run(top.live(fetch, sys.stdout))
    return 0


def _streams(status: int, body: bytes) -> Sequence[top.Stream]:
    """Raises OperationError."""
    if status != 200:
        raise OperationError(cli_admin.refusal(status, body))
    streams: Sequence[top.Stream] = msgspec.json.decode(body)["streams"]
    return streams
