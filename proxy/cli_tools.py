"""`headrace top`, `kill` and `doctor`: flags in, tables and findings out; the work is `top` and `doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec
import uvloop

from proxy import cli_admin, doctor, top
from proxy.cli_keys import Settings
from proxy.config import Config, with_overrides
from proxy.errors import OperationError, StartError


def add_parsers(commands: Any, common: argparse.ArgumentParser, settings: Settings) -> None:
    """commands: what `add_subparsers` gave."""

    def running_server(arguments: argparse.Namespace) -> Config:
        address = arguments.admin and arguments.admin.removeprefix("http://").rstrip("/")
        return with_overrides(settings(arguments), None, address)

    parser = commands.add_parser(
        "top",
        parents=[common],
        help="live table of the running requests; q ends it",
        description="Without a terminal: the table once. B/S, IDLE and BUFFER are the caller's connection's.",
    )
    parser.set_defaults(run=lambda arguments: _top(running_server(arguments), once=arguments.once))
    parser.add_argument("--once", action="store_true", help="the table once, on a terminal too")
    parser.add_argument("--admin", metavar="URL", help="admin listener of the running server")

    parser = commands.add_parser("kill", parents=[common], help="end a running request")
    parser.set_defaults(run=lambda arguments: _kill(running_server(arguments), arguments.stream))
    parser.add_argument("stream", metavar="STREAM_ID", help="as `headrace top` shows it")
    parser.add_argument("--admin", metavar="URL", help="admin listener of the running server")

    parser = commands.add_parser(
        "doctor",
        parents=[common],
        help="who between callers and Headrace buffers, compresses, cuts or drops",
        description="Asks a public address as a caller does; exit code 1 if there is a problem.",
    )
    parser.set_defaults(run=_doctor)
    parser.add_argument("url", metavar="URL", help="e.g. https://llm.example.com")
    parser.add_argument("--key", metavar="KEY", help="also one short chat stream, which costs a few tokens")
    parser.add_argument("--model", metavar="NAME", help="of that chat; left out: the key's first")
    parser.add_argument(
        "--patience",
        type=float,
        default=doctor.Options().patience_s,
        metavar="SECONDS",
        help="how long a stream is kept silent, at most 300; 0: not at all; default 65, for nginx cuts at 60",
    )
    parser.add_argument("--json", action="store_true", help="a JSON document instead of text")


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
        raise OperationError(_refusal(status, body))
    streams: Sequence[top.Stream] = msgspec.json.decode(body)["streams"]
    return streams


def _kill(settings: Config, stream: str) -> int:
    status, body = uvloop.run(cli_admin.ask(settings, "DELETE", f"/admin/streams/{quote(stream, safe='')}"))
    if status == 404:
        raise OperationError(f"no request {stream!r} is running: see `headrace top`")
    if status != 200:
        raise OperationError(_refusal(status, body))
    print(f"killed: {stream}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    """Needs no configuration: it may run anywhere."""
    url = arguments.url if "://" in arguments.url else f"https://{arguments.url}"
    if not url.startswith(("http://", "https://")) or not urlsplit(url).hostname:
        raise OperationError(f"expected a URL such as https://llm.example.com, got {arguments.url!r}")
    options = doctor.Options(arguments.patience, arguments.key, arguments.model)
    report = uvloop.run(doctor.examine(url, options))
    print(report.json() if arguments.json else report.text())
    return 0 if report.healthy else 1


def _refusal(status: int, body: bytes) -> str:
    """What the admin listener, or whatever answers in its place, has to say."""
    try:
        message = msgspec.json.decode(body)["error"]["message"]
    except (msgspec.DecodeError, KeyError, TypeError):
        message = "not Headrace's admin listener"
    return f"the admin listener answered {status}: {message}"
