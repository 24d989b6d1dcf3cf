"""Pages and their parts: files of `static/`, held in memory, with their type, policy and validator."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import msgspec
from aiohttp import web
from multidict import CIMultiDict

_FOLDER = Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
#: Nothing but the page's own files runs there or is asked by it (CSP level 3): text of strangers that gets
#: into the page as code, against all care, finds nobody to send anything to. Nobody frames it, so no click is
#: stolen.
POLICY = "; ".join(
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


def answer(request: web.Request, name: str) -> web.Response:
    """The file of this name, or 304 for who has it. The name is the caller's choice of code, never of a
    request."""
    file = _read(name)
    fields = CIMultiDict(file.fields)
    if any(tag.value in (file.etag, "*") for tag in request.if_none_match or ()):
        return web.Response(status=304, headers=fields)
    return web.Response(body=file.body, headers=fields)


@functools.cache
def _read(name: str) -> _File:
    """Read once: an update comes with a new process."""
    body = (_FOLDER / name).read_bytes()
    etag = hashlib.sha256(body).hexdigest()[:32]
    kind = Path(name).suffix
    fields = [
        ("Content-Type", f"{_TYPES[kind]}; charset=utf-8"),
        # Kept, but asked for again: no page runs with scripts of another version.
        ("Cache-Control", "no-cache"),
        ("ETag", f'"{etag}"'),
        ("X-Content-Type-Options", "nosniff"),
    ]
    if kind == ".html":
        fields += [
            ("Content-Security-Policy", POLICY),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
        ]
    return _File(body, tuple(fields), etag)
