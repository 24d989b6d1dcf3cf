"""The playground at `/` and the modules for web pages at `/static/…`.

Nobody needs a credential for them, so they cost little: one look-up and one write. The page sends what it
is told to the API of this very listener, with the key that its user types.
"""

from __future__ import annotations

from aiohttp import web

from proxy import page_files
from proxy.context import CORE
from proxy.errors import NotFound

_PAGE = "playground.html"


async def serve(request: web.Request) -> web.Response:
    """`GET /` and `GET /static/{file}`: the allow-list has chosen the name. Raises NotFound where the
    configuration wants no playground."""
    if not request.app[CORE].config.playground:
        raise NotFound
    path = request.raw_path.partition("?")[0]
    return page_files.answer(request, path.removeprefix("/static/") if path != "/" else _PAGE)
