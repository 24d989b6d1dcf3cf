"""What is asked of a running server through its admin listener: `headrace reload`, `restart`, `kill`; and the
asking, for other commands."""

from __future__ import annotations

import argparse
from urllib.parse import quote

import aiohttp
import msgspec
import uvloop

from proxy import listen
from proxy.cli_source import Source
from proxy.config import Config
from proxy.errors import OperationError, StartError


def reload_parser(parser: argparse.ArgumentParser, source: Source) -> None:
    _add_admin(parser)
    parser.set_defaults(run=lambda arguments: _tell(source.of_server(arguments), "reload"))


def restart_parser(parser: argparse.ArgumentParser, source: Source) -> None:
    _add_admin(parser)
    parser.set_defaults(run=lambda arguments: _tell(source.of_server(arguments), "restart"))


def kill_parser(parser: argparse.ArgumentParser, source: Source) -> None:
    parser.add_argument("stream", metavar="STREAM_ID", help="as `headrace top` shows it")
    _add_admin(parser)
    parser.set_defaults(run=lambda arguments: _kill(source.of_server(arguments), arguments.stream))


def _add_admin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--admin", metavar="ADDRESS", help="admin listener of the running server")


def _tell(settings: Config, verb: str) -> int:
    status, body = uvloop.run(ask(settings, "POST", f"/admin/{verb}"))
    try:
        document = msgspec.json.decode(body)
    except msgspec.DecodeError:
        raise OperationError(refusal(status, body)) from None
    if "error" in document:
        raise StartError(document["error"]["message"])
    print(", ".join(f"{name}: {value}" for name, value in document.items()))
    return 0


def _kill(settings: Config, stream: str) -> int:
    status, body = uvloop.run(ask(settings, "DELETE", f"/admin/streams/{quote(stream, safe='')}"))
    if status == 404:
        raise OperationError(f"no request {stream!r} is running: see `headrace top`")
    if status != 200:
        raise OperationError(refusal(status, body))
    print(f"killed: {stream}")
    return 0


async def ask(settings: Config, method: str, path: str) -> tuple[int, bytes]:
    """Status and body. Raises StartError if nobody answers."""
    address = settings.admin_address
    unix = address.unix_path
    connector = aiohttp.UnixConnector(unix) if unix else aiohttp.TCPConnector()
    base = listen.url(address, address.port, "http")
    headers = {"Authorization": f"Bearer {settings.admin_token}"} if settings.admin_token else {}
    try:
        async with (
            aiohttp.ClientSession(connector=connector, trust_env=False) as session,
            session.request(method, f"{base}{path}", headers=headers) as response,
        ):
            return response.status, await response.read()
    except (aiohttp.ClientError, OSError) as error:
        raise StartError(f"no server answers at {settings.admin}: start it, or give --admin") from error


def refusal(status: int, body: bytes) -> str:
    """What the admin listener, or whatever answers in its place, has to say."""
    try:
        message = msgspec.json.decode(body)["error"]["message"]
    except (msgspec.DecodeError, KeyError, TypeError):
        message = "not Headrace's admin listener"
    return f"the admin listener answered {status}: {message}"
