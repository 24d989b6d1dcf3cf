"""The commands. `headrace COMMAND -h` explains each; every failure is one line that names the fix."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

import msgspec
import uvloop

from proxy import __version__, config, log, mock, wire
from proxy.server import Server, StartError, serve
from proxy.yamlstruct import ConfigError


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 for what the user can mend, 2 for a wrong command line."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ConfigError, StartError) as error:
        print(f"headrace: {error}" if isinstance(error, StartError) else str(error), file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    # -c is accepted before and after the command's name.
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "-c", dest="config", metavar="FILE", default=argparse.SUPPRESS, help="configuration file"
    )
    parser = argparse.ArgumentParser(
        prog="headrace",
        description="A streaming reverse proxy for OpenAI-compatible LLM APIs.",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("serve", parents=[common], help="run the proxy")
    command.add_argument(
        "--listen", metavar="ADDRESS", help="data listener, e.g. 127.0.0.1:8080 or unix:/path"
    )
    command.add_argument("--admin", metavar="ADDRESS", help="admin listener")
    command.set_defaults(run=_serve)

    command = commands.add_parser(
        "check", parents=[common], help="validate the configuration, print the routes"
    )
    command.set_defaults(run=_check)

    command = commands.add_parser("mock", help="run the mock upstream on its own")
    command.add_argument("--port", type=int, default=9100)
    for field in msgspec.structs.fields(mock.Behaviour):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            command.add_argument(flag, action="store_true", default=argparse.SUPPRESS)
        else:
            command.add_argument(flag, default=argparse.SUPPRESS, metavar="VALUE")
    command.set_defaults(run=_mock)
    return parser


def _settings(arguments: argparse.Namespace) -> config.Config:
    path = config.find(getattr(arguments, "config", None), os.environ, Path.cwd())
    return config.built_in(os.environ) if path is None else config.load(path, os.environ)


def _check(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    print(f"{settings.source}: ok")
    for line in config.describe_routes(settings):
        print(f"  {line}")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    settings = config.with_overrides(_settings(arguments), arguments.listen, arguments.admin)
    if not wire.c_parser_loaded():
        raise StartError("aiohttp runs without its C parser: install a wheel, unset AIOHTTP_NO_EXTENSIONS")
    try:
        sink, request_log = log.configure(
            path=settings.log.file, level=settings.log.level, text=settings.log.format == "text"
        )
    except OSError as error:
        raise StartError(f"log.file: {error.strerror}: {settings.log.file}") from error
    try:
        uvloop.run(serve(Server(settings, sink, request_log, push=True), _announce))
    finally:
        sink.close()
    return 0


def _announce(server: Server) -> None:
    """Standard error: standard output holds the log lines, which something may be reading."""
    print(server.banner(), file=sys.stderr, flush=True)


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
