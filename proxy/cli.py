"""The commands. `headrace COMMAND -h` explains each; every failure is one line that names the fix."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
import sys
from pathlib import Path
from typing import Literal

import aiohttp
import msgspec
import uvloop

from proxy import __version__, cli_admin, cli_bench, cli_keys, cli_tools, cli_usage, config, log, mock, wire
from proxy.errors import OperationError, StartError
from proxy.supervisor import Front
from proxy.worker import WorkerProcess
from proxy.yamlstruct import ConfigError

#: Before 3.14.3 a malicious upstream can make the C parser read out of bounds (GHSA-cq5v-8q36-5273); 3.14.4
#: crashed on decompression errors (aiohttp #13203).
_AIOHTTP = (3, 14, 5)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 for what the user can mend, 2 for a wrong command line."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ConfigError, OperationError) as error:
        print(f"headrace: {error}" if isinstance(error, OperationError) else str(error), file=sys.stderr)
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
    command.add_argument("--workers", type=_worker_count, metavar="N|auto", help="processes")
    command.set_defaults(run=_serve)

    command = commands.add_parser(
        "check", parents=[common], help="validate the configuration, print the routes"
    )
    command.set_defaults(run=_check)

    for verb, text in (
        ("reload", "read the configuration again, without touching running streams"),
        ("restart", "hand the sockets to a new generation that runs the code on disk"),
    ):
        command = commands.add_parser(verb, parents=[common], help=text)
        command.add_argument("--admin", metavar="ADDRESS", help="admin listener of the running server")
        command.set_defaults(run=_tell_server, verb=verb)

    cli_keys.add_parsers(commands, common, _settings)
    cli_usage.add_parser(commands, common, _settings)
    cli_tools.add_parsers(commands, common, _settings)
    cli_bench.add_parser(commands)

    command = commands.add_parser("worker")
    command.add_argument("control", type=int)
    command.add_argument("listener", type=int)
    command.add_argument("counters", type=int)
    command.set_defaults(run=_worker)

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


def _worker_count(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number or auto, got {text!r}")


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
    def load() -> config.Config:
        return config.with_overrides(
            _settings(arguments), arguments.listen, arguments.admin, arguments.workers
        )

    settings = load()
    _check_installation()
    sink, request_log = _open_log(settings)
    try:
        uvloop.run(Front(settings, load, sink, request_log, push=True, environ=os.environ).run(_announce))
    finally:
        sink.close()
    return 0


def _check_installation() -> None:
    """What an installation can have wrong that would only show under attack or load."""
    found = tuple(int(part) for part in re.findall(r"\d+", aiohttp.__version__)[:3])
    if found < _AIOHTTP:
        floor = ".".join(map(str, _AIOHTTP))
        raise StartError(f"aiohttp {aiohttp.__version__} is too old: pip install 'aiohttp>={floor}'")
    if not wire.c_parser_loaded():
        raise StartError("aiohttp runs without its C parser: install a wheel, unset AIOHTTP_NO_EXTENSIONS")


def _open_log(settings: config.Config) -> tuple[log.Sink, log.RequestLog]:
    try:
        return log.configure(
            path=settings.log.file, level=settings.log.level, text=settings.log.format == "text"
        )
    except OSError as error:
        raise StartError(f"log.file: {error.strerror}: {settings.log.file}") from error


def _announce(front: Front) -> None:
    """Standard error: standard output holds the log lines, which something may be reading."""
    print(_banner(front), file=sys.stderr, flush=True)


def _banner(front: Front) -> str:
    """What a newcomer needs first."""
    settings, base = front.settings, front.address()
    names = list(settings.models)
    model = next((name for name in names if "*" not in name and "?" not in name), "…")
    body = f'{{"model":"{model}","stream":true,"messages":[{{"role":"user","content":"Hello"}}]}}'
    unix = settings.listen_address.unix_path
    flag = f"--unix-socket {unix} " if unix else ""
    return "\n".join(
        [
            f"headrace {__version__}, configuration: {settings.source}",
            f"  data   {base}/v1",
            f"  admin  {front.admin_address()}/metrics",
            f"  models {', '.join(names)}",
            *([f"  page   {base}/"] if settings.playground and not unix else []),
            "",
            f"  curl -N {flag}{base}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
            "",
        ]
    )


def _worker(arguments: argparse.Namespace) -> int:
    """Started by the supervisor only."""

    async def run() -> None:
        control = socket.socket(fileno=arguments.control)
        control.setblocking(False)
        listener = socket.socket(fileno=arguments.listener)
        await WorkerProcess().run(control, listener, arguments.counters)

    uvloop.run(run())
    return 0


def _tell_server(arguments: argparse.Namespace) -> int:
    """reload, restart: of the running server, through its admin listener."""
    settings = config.with_overrides(_settings(arguments), None, arguments.admin)
    _, body = uvloop.run(cli_admin.ask(settings, "POST", f"/admin/{arguments.verb}"))
    document = msgspec.json.decode(body)
    if "error" in document:
        raise StartError(document["error"]["message"])
    print(", ".join(f"{name}: {value}" for name, value in document.items()))
    return 0


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
