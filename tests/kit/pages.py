"""Pages under test: a real Chromium, and Node with what the tests of `proxy/static` need."""

from __future__ import annotations

import asyncio
import functools
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from playwright.async_api import Browser, Page, async_playwright

from tests.kit.headrace import ROOT
from tests.sdk.environments import Environments, Unavailable

STATIC = ROOT / "proxy" / "static"
#: No sandbox: CI runs as root. No traffic of its own.
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Debian's Chromium; without it the test is skipped."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=list(_FLAGS))
        try:
            yield browser
        finally:
            await browser.close()


class Watched:
    """A page, and what it complained about: exceptions, breaches of its policy, requests to elsewhere."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.problems: list[str] = []
        self.requests: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        page.on("console", lambda message: self._console(message.text))
        page.on("request", lambda request: self._request(request.url, origin))

    def _console(self, text: str) -> None:
        # The browser notes every answer that is not a 2xx, and every cut: what the tests are about.
        if not re.match(r"Failed to load resource", text):
            self.problems.append(f"console: {text}")

    def _request(self, url: str, origin: str) -> None:
        self.requests.append(url)
        if not url.startswith((f"{origin}/", "data:")):
            self.problems.append(f"asked elsewhere: {url}")


@functools.cache
def _environments() -> Environments:
    return Environments()


def packages(sdk: str = "pages") -> Path:
    """The folder with React, esbuild and TypeScript (or another pin); it is made on first use."""
    try:
        return _environments().home(sdk)
    except Unavailable as error:
        pytest.skip(str(error))


def node() -> str:
    """Node's program."""
    try:
        return str(_environments().node())
    except Unavailable as error:
        pytest.skip(str(error))


async def run(*words: str, cwd: Path, environ: dict[str, str] | None = None, limit_s: float = 60) -> str:
    """What a command prints; fails with all of it if the command fails."""
    process = await asyncio.create_subprocess_exec(
        *words,
        cwd=cwd,
        env={**os.environ, **(environ or {})},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(limit_s):
            printed, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, printed.decode()
    return printed.decode()


async def bundle(source: Path, folder: Path) -> bytes:
    """A module with everything that it imports, put together by esbuild: bare names are packages."""
    home = packages()
    out = folder / "bundle.js"
    await run(
        str(home / "node_modules" / ".bin" / "esbuild"),
        str(source),
        "--bundle",
        "--format=esm",
        "--jsx=automatic",
        "--define:process.env.NODE_ENV='development'",
        f"--outfile={out}",
        cwd=folder,
        environ={"NODE_PATH": str(home / "node_modules")},
    )
    return out.read_bytes()


@asynccontextmanager
async def site(files: dict[str, tuple[str, bytes]]) -> AsyncIterator[str]:
    """A web server of somebody else: path -> type and bytes. Yields its origin."""

    async def answer(request: web.Request) -> web.Response:
        kind, body = files.get(request.path, ("text/plain", b""))
        return web.Response(body=body, headers={"Content-Type": kind})

    app = web.Application()
    app.router.add_route("GET", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
