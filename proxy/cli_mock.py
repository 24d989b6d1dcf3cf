"""`headrace mock`: the mock upstream on its own. Needs no configuration."""

from __future__ import annotations

import argparse
import asyncio

import msgspec
import uvloop

from proxy import mock
from proxy.cli_source import Source
from proxy.errors import StartError


def mock_parser(parser: argparse.ArgumentParser, _: Source) -> None:
    parser.add_argument("--port", type=int, default=9100)
    for field in msgspec.structs.fields(mock.Behaviour):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, default=argparse.SUPPRESS, metavar="VALUE")
    parser.set_defaults(run=_mock)


def _mock(arguments: argparse.Namespace) -> int:
    given = {
        field.name: getattr(arguments, field.name)
        for field in msgspec.structs.fields(mock.Behaviour)
        if hasattr(arguments, field.name)
    }
    try:
        behaviour = msgspec.convert(given, mock.Behaviour, strict=False)
    except msgspec.ValidationError as error:
        raise StartError(str(error)) from error

    async def run() -> None:
        running = await mock.start(port=arguments.port, behaviour=behaviour)
        print(f"mock upstream at {running.url}", flush=True)
        await asyncio.Event().wait()

    try:
        uvloop.run(run())
    except KeyboardInterrupt:
        return 0
    except OSError as error:
        raise StartError(f"port {arguments.port}: {error.strerror}: choose another with --port") from error
    return 0
