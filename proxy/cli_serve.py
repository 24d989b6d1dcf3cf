"""`headrace serve`, and the workers that it starts."""

from __future__ import annotations

import argparse
import re
import socket
import sys
from typing import Literal

import aiohttp
import uvloop

from proxy import __version__, config, log
from proxy.cli_source import Source
from proxy.errors import StartError
from proxy.supervisor import Front
from proxy.wire_connection import c_parser_loaded
from proxy.worker import WorkerProcess

#: Before 3.14.3 a malicious upstream can make the C parser read out of bounds (GHSA-cq5v-8q36-5273); 3.14.4
#: crashed on decompression errors (aiohttp #13203).
_AIOHTTP = (3, 14, 5)


def serve_parser(parser: argparse.ArgumentParser, source: Source) -> None:
    parser.add_argument(
        "--listen", metavar="ADDRESS", help="data listener, e.g. 127.0.0.1:8080 or unix:/path"
    )
    parser.add_argument("--admin", metavar="ADDRESS", help="admin listener")
    parser.add_argument("--workers", type=_worker_count, metavar="N|auto", help="processes")
    parser.set_defaults(run=lambda arguments: _serve(arguments, source))


def worker_parser(parser: argparse.ArgumentParser, _: Source) -> None:
    """The numbers are descriptors that the process inherits."""
    parser.add_argument("control", type=int)
    parser.add_argument("listener", type=int)
    parser.add_argument("counters", type=int)
    parser.set_defaults(run=_worker)


def _worker_count(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number or auto, got {text!r}")


def _serve(arguments: argparse.Namespace, source: Source) -> int:
    def load() -> config.Config:
        return config.with_overrides(
            source.settings(arguments), arguments.listen, arguments.admin, arguments.workers
        )

    settings = load()
    _check_installation()
    sink, request_log = _open_log(settings)
    try:
        uvloop.run(Front(settings, load, sink, request_log, push=True, environ=source.environ).run(_announce))
    finally:
        sink.close()
    return 0


def _check_installation() -> None:
    """What an installation can have wrong that would only show under attack or load."""
    found = tuple(int(part) for part in re.findall(r"\d+", aiohttp.__version__)[:3])
    if found < _AIOHTTP:
        floor = ".".join(map(str, _AIOHTTP))
        raise StartError(f"aiohttp {aiohttp.__version__} is too old: pip install 'aiohttp>={floor}'")
    if not c_parser_loaded():
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
