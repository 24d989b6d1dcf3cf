"""The playground at `/` and the modules for web pages at `/static/…`: files of the package, held in memory.

Nobody needs a credential for them, so they cost little: one look-up and one write. The page sends what it
is told to the API of this very listener, with the key that its user types.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from proxy.context import CORE
from proxy.errors import NotFound

_FOLDER = Path(__file__).parent / "static"
_PAGE = "playground.html"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
#: Nothing but the page's own files runs there or is asked by it: an answer of a model that gets into the page
#: as code, against all care, finds nobody to send a key to (CSP level 3).
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


class _File(msgspec.Struct, frozen=True):
    body: bytes
    fields: tuple[tuple[str, str], ...]
    etag: str  # without its quotes


async def serve(request: web.Request) -> web.Response:
    """`GET /` and `GET /static/{file}`. Raises NotFound where the configuration wants no playground."""
    if not request.app[CORE].config.playground:
        raise NotFound
    path = request.raw_path.partition("?")[0]
    file = _read(path.removeprefix("/static/") if path != "/" else _PAGE)
    fields = CIMultiDict(file.fields)
    if any(tag.value in (file.etag, "*") for tag in request.if_none_match or ()):
        return web.Response(status=304, headers=fields)
    return web.Response(body=file.body, headers=fields)


@functools.cache
def _read(name: str) -> _File:
    """The allow-list has chosen the name. Read once: an update comes with a new process."""
    body = (_FOLDER / name).read_bytes()
    etag = hashlib.sha256(body).hexdigest()[:32]
    fields = [
        ("Content-Type", f"{_TYPES[Path(name).suffix]}; charset=utf-8"),
        (
            "Cache-Control",
            "no-cache",
        ),  # kept, but asked for again: no page runs with scripts of another version
        ("ETag", f'"{etag}"'),
        ("X-Content-Type-Options", "nosniff"),
    ]
    if name == _PAGE:
        fields += [
            ("Content-Security-Policy", _POLICY),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
        ]
    return _File(body, tuple(fields), etag)
