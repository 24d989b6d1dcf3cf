"""Requests that HTTP allows, or that our parser lets pass, but that must never reach an upstream.

Each check is a dictionary look-up for a good request. The rows are hazards that were measured on aiohttp
3.14.5: it serves absolute-form targets, empty or layered transfer codings, and any Host.
"""

from __future__ import annotations

import re

from aiohttp import HttpVersion10, web
from aiohttp.typedefs import Handler

from proxy.context import CONTEXT
from proxy.errors import NotFound, Refused

_HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_MAX_PORT = 65535


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    _check_line(request)
    fields = request.headers
    _check_host(request, fields.getall("Host", []))
    if "Transfer-Encoding" in fields:
        _check_transfer_encoding(request)
    if "Content-Encoding" in fields and not _only(fields.getall("Content-Encoding"), "identity"):
        raise Refused(415)  # forwarding it coded would hide the model, decoding it would invite bombs
    if "Expect" in fields and not _only(fields.getall("Expect"), "100-continue"):
        raise Refused(417)
    return await handler(request)


def _only(values: list[str], allowed: str) -> bool:
    """Of two fields the first is what we read, and the second may be what the upstream reads."""
    return all(value.lower() == allowed for value in values)


def _check_line(request: web.Request) -> None:
    if request.method in ("CONNECT", "TRACE"):
        raise Refused(405)
    path = request.raw_path
    if path.startswith("/") and not path.startswith("//"):
        return
    if request[CONTEXT].endpoint is None and path.startswith(("//", "*")):
        raise NotFound
    raise Refused(400)


def _check_host(request: web.Request, hosts: list[str]) -> None:
    if not hosts and request.version == HttpVersion10:
        return
    if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
        raise Refused(400)
    _, _, port = hosts[0].rpartition(":")
    if port.isdigit() and int(port) > _MAX_PORT:
        raise Refused(400)


def _check_transfer_encoding(request: web.Request) -> None:
    codings = [coding.strip().lower() for coding in request.headers.getall("Transfer-Encoding")]
    if request.version == HttpVersion10 or codings == [""]:
        raise Refused(400)
    if codings != ["chunked"]:
        raise Refused(501)
