"""GET /live on the admin listener: what runs now, as a page; GET /admin/live: the events behind it.

The page stops a stream with what `headrace kill` uses, DELETE /admin/streams/{id}.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

from aiohttp import web

from proxy import page_files
from proxy.config import Config
from proxy.live_feed import Feed, Looks, Source

#: Path -> file. The playground's look is the page's own.
_FILES = {
    "/live": "live.html",
    "/live/page.css": "playground.css",
    "/live/live.css": "live.css",
    "/live/live.js": "live.js",
    "/live/live-dom.js": "live-dom.js",
    "/live/live-streams.js": "live-streams.js",
    "/live/live-text.js": "live-text.js",
}
#: How soon a browser comes again whose stream has ended, milliseconds: a restart is hardly seen.
_AGAIN = b"retry: 1000\n\n"
#: A reader that takes nothing for so long is a laptop that sleeps: its place is for somebody else.
_WRITE_S = 30.0
_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
}


class LivePage:
    """settings: the configuration in use."""

    def __init__(self, source: Source, settings: Callable[[], Config]) -> None:
        looks = Looks(source, settings)
        self._feed = Feed(looks.event, looks.rest)

    def add_routes(self, router: web.UrlDispatcher) -> None:
        for path, name in _FILES.items():
            router.add_get(path, functools.partial(_file, name))
        router.add_get("/admin/live", self._events, allow_head=False)

    async def end(self) -> None:
        """All readers' streams end now: this process leaves the admin listener. They come again, to whoever
        serves it then."""
        await self._feed.end()

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self._feed.full:
            raise web.HTTPServiceUnavailable(headers={"Retry-After": "5"})
        response = web.StreamResponse(headers=_HEADERS)
        response.force_close()  # what comes next may be for the next generation
        await response.prepare(request)
        try:
            await self._pass_on(response)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _pass_on(self, response: web.StreamResponse) -> None:
        with self._feed.reader() as events:
            await response.write(_AGAIN)
            async for event in events:
                async with asyncio.timeout(_WRITE_S):
                    await response.write(event)


async def _file(name: str, request: web.Request) -> web.Response:
    return page_files.answer(request, name)
