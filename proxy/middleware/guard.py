"""Requests that HTTP allows, or that our parser lets pass, but that must never reach an upstream.

Each check is a dictionary look-up for a good request. The rows are hazards that were measured on aiohttp
3.14.5: it serves absolute-form targets, empty or layered transfer codings, and any Host.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from aiohttp import HttpVersion10, hdrs, web

from proxy.errors import NotFound, Refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.context import Context

_HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_MAX_PORT = 65535


def check(request: web.Request, ctx: Context) -> None:
    """Raises NotFound, Refused."""
    if ctx.endpoint is None:  # the allow-list has none of what is refused there
        _check_line(request, ctx.method)
    fields = ctx.fields
    hosts = fields.getall(hdrs.HOST, ())
    if len(hosts) != 1 or not _is_host(hosts[0]):
        _miss_host(request, hosts)
    if hdrs.TRANSFER_ENCODING in fields:
        _check_transfer_encoding(request)
    if hdrs.CONTENT_ENCODING in fields and not _only(fields.getall(hdrs.CONTENT_ENCODING), "identity"):
        raise Refused(415)  # forwarding it coded would hide the model, decoding it would invite bombs
    if hdrs.EXPECT in fields and not _only(fields.getall(hdrs.EXPECT), "100-continue"):
        raise Refused(417)


def _only(values: list[str], allowed: str) -> bool:
    """Of two fields the first is what we read, and the second may be what the upstream reads."""
    return all(value.lower() == allowed for value in values)


def _check_line(request: web.Request, method: str) -> None:
    if method in ("CONNECT", "TRACE"):
        raise Refused(405)
    path = request.raw_path
    if path.startswith("/") and not path.startswith("//"):
        return
    if path.startswith(("//", "*")):
        raise NotFound
    raise Refused(400)


def _miss_host(request: web.Request, hosts: Sequence[str]) -> None:
    """Only HTTP/1.0 may come without one."""
    if hosts or request.version != HttpVersion10:
        raise Refused(400)


@lru_cache(maxsize=64)
def _is_host(host: str) -> bool:
    """Callers send the same few; 64 of the longest that a head may hold are a megabyte."""
    if not _HOST.fullmatch(host):
        return False
    _, _, port = host.rpartition(":")
    return not port.isdigit() or int(port) <= _MAX_PORT


def _check_transfer_encoding(request: web.Request) -> None:
    codings = [coding.strip().lower() for coding in request.headers.getall(hdrs.TRANSFER_ENCODING)]
    if request.version == HttpVersion10 or codings == [""]:
        raise Refused(400)
    if codings != ["chunked"]:
        raise Refused(501)
