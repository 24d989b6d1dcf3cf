"""The browser client and its React hook: under Node, and in a real Chromium with a real React before a real
Headrace with a mock's faults."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from tests.kit.headrace import ROOT, Headrace, running, until
from tests.kit.pages import STATIC, Watched, bundle, chromium, node, packages, run, site

# The first of them may install Node and packages for it.
pytestmark = [pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

HTML = (
    b'<!doctype html><meta charset="utf-8"><title>Chat</title><div id="root"></div>'
    b'<script type="module" src="/app.js"></script>'
)
TYPED = ("stream-client", "use-chat-stream")
TSC = (
    *("--allowJs", "--checkJs", "--strict", "--noUncheckedIndexedAccess"),
    *("--target", "es2022", "--lib", "es2022,dom,dom.iterable,dom.asynciterable"),
    *("--module", "esnext", "--moduleResolution", "bundler"),
)


# ── under Node ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["events", "client"])
async def test_under_node(name: str) -> None:
    """The parser in every chunking, and every kind of failure against a server of Node's own."""
    words = (node(), "--test", "--test-reporter=tap", f"tests/js/{name}.test.mjs")
    printed = await run(*words, cwd=ROOT)
    assert re.search(r"^# fail 0$", printed, re.M), printed
    assert re.search(r"^# pass [1-9]", printed, re.M), printed


@pytest.fixture
def typescript(tmp_path: Path) -> tuple[list[str], Path]:
    """The compiler's words, in a folder with the modules and React's types."""
    home = packages()
    for file in STATIC.glob("*.js"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "node_modules").symlink_to(home / "node_modules")
    return [node(), str(home / "node_modules" / "typescript" / "bin" / "tsc"), *TSC], tmp_path


async def test_the_types_are_those_of_the_source(typescript: tuple[list[str], Path]) -> None:
    """What is committed is what TypeScript makes of the comments."""
    words, folder = typescript
    sources = [f"{name}.js" for name in TYPED]
    await run(*words, "--declaration", "--emitDeclarationOnly", "--outDir", "types", *sources, cwd=folder)
    for name in TYPED:
        made = (folder / "types" / f"{name}.d.ts").read_text()
        assert made == (STATIC / f"{name}.d.ts").read_text(), f"{name}.d.ts is not up to date"


@pytest.mark.slow
async def test_every_module_is_typed(typescript: tuple[list[str], Path]) -> None:
    """The playground's modules as well; and a wrong use of the client is found."""
    words, folder = typescript
    await run(*words, "--noEmit", *(file.name for file in folder.glob("*.js")), cwd=folder)
    use = folder / "use.ts"
    use.write_text('import { streamChat } from "./stream-client.js";\nvoid streamChat({ messages: "hi" });\n')
    (folder / "stream-client.d.ts").write_bytes((STATIC / "stream-client.d.ts").read_bytes())
    with pytest.raises(AssertionError, match="TS2322"):
        await run(*words, "--noEmit", "use.ts", cwd=folder)


# ── in a browser ─────────────────────────────────────────────────────────────────────────────────────────


class Stage(NamedTuple):
    """A Headrace, and two sites with the same application: it lists the first one's origin."""

    headrace: Headrace
    browser: Browser
    site: str
    stranger: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    script = await bundle(ROOT / "tests" / "js" / "chat-app.jsx", tmp_path_factory.mktemp("bundle"))
    files = {"/": ("text/html", HTML), "/app.js": ("text/javascript", script)}
    async with (
        chromium() as browser,
        site(files) as origin,
        site(files) as stranger,
        running(settings(origin)) as headrace,
    ):
        yield Stage(headrace, browser, origin, stranger)


def settings(origin: str) -> dict[str, object]:
    """One attempt a request, and a breaker that all these faults do not open."""
    return {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "auth": {"mode": "open"},
        "upstreams": {"mock": {"base_url": "mock:", "breaker": {"failures": 1000}}},
        "models": {"m": {"upstreams": ["mock"]}},
        "browser_api": {"model": "m"},
        "cors": {"origins": [origin]},
        "retry": {"attempts": 1},
    }


class Chat:
    """The application in a tab."""

    def __init__(self, watched: Watched, stage: Stage) -> None:
        self.page: Page = watched.page
        self.watched = watched
        self.headrace = stage.headrace
        self.before = len(stage.headrace.log_lines())

    async def send(self, faults: str) -> None:
        await self.page.fill("#faults", faults)
        await self.page.click("#send")

    async def ended(self) -> None:
        """Waits for the end of the answer that was asked for; the question is shown first."""
        await expect(self.page.locator("#messages li[data-role=user]").last).to_be_visible()
        await expect(self.page.locator("#state")).to_have_text("idle")

    async def answer(self) -> tuple[str, bool] | None:
        """The last message if it is the assistant's: its text, and whether it is called incomplete."""
        last = self.page.locator("#messages li").last
        if await last.get_attribute("data-role") != "assistant":
            return None
        return await last.inner_text(), await last.get_attribute("data-incomplete") == "true"

    async def category(self) -> str | None:
        return await self.page.locator("#error").get_attribute("data-category")

    async def reasons(self, count: int) -> list[str]:
        """How Headrace's requests for this page ended, once there are `count`."""

        def lines() -> list[str]:
            asked = self.headrace.log_lines()[self.before :]
            return [line["reason"] for line in asked if line["method"] == "POST"]

        await until(lambda: len(lines()) >= count, 10)
        return lines()


@asynccontextmanager
async def chat(
    stage: Stage, *, origin: str | None = None, path: str = "/v1/chat/completions", retries: int = 0
) -> AsyncIterator[Chat]:
    origin = origin or stage.site
    query = urlencode({"url": stage.headrace.url + path, "model": "m", "retries": retries})
    context = await stage.browser.new_context()
    try:
        page = await context.new_page()
        watched = Watched(page, origin)
        await page.goto(f"{origin}/?{query}")
        yield Chat(watched, stage)
        assert not [problem for problem in watched.problems if problem.startswith("exception")]
    finally:
        await context.close()
        await stage.headrace.quiet(10)


#: x-mock, the error's category (several where the browser may lose what came right before a reset), and
#: whether a part of the answer was there. When a connection is cut, a browser forgets what nobody
#: has read yet: hence the gaps.
FAULTS = [
    ("words=5", None, False),
    ("words=5, plain_json", None, False),
    ("status=429, retry_after=1", "rate_limit", False),
    ("error_after=4, gap=0.05", "server", True),
    ("cut_after=4, cut_mid_event, gap=0.05", "truncated", True),
    ("no_done, words=5, gap=0.05", "server truncated", True),
]
MORE_FAULTS = [
    ("words=5, half_events", None, False),
    ("words=5, one_byte", None, False),
    ("words=5, crlf", None, False),
    ("words=5, keepalive_comments=3", None, False),
    ("words=5, close_delimited", None, False),
    ("status=400", "request", False),
    ("status=401", "server", False),
    ("status=500", "server", False),
    ("rst_after=-1", "server", False),
    ("cut_after=4, gap=0.05", "server truncated", True),
    ("rst_after=4, gap=0.05", "server truncated", True),
    ("bad_json=4, gap=0.05", "parse", True),
]
CASES = [
    *(pytest.param(*row, id=row[0]) for row in FAULTS),
    *(pytest.param(*row, id=row[0], marks=pytest.mark.slow) for row in MORE_FAULTS),
]


@pytest.mark.parametrize(("faults", "category", "partial"), CASES)
async def test_every_fault_has_its_category(
    stage: Stage, faults: str, category: str | None, partial: bool
) -> None:
    """What the hook says of an answer, and that what came is kept and called incomplete."""
    async with chat(stage) as it:
        await it.send(faults)
        await it.ended()
        found = await it.category()
        assert (found in category.split()) if category else (found is None), found
        answer = await it.answer()
        if category is None:
            assert answer == ("the quick brown fox jumps", False)
        elif partial:
            assert answer is not None
            assert answer[0].startswith("the quick")
            assert answer[1]
        else:
            assert answer is None


async def test_stop_keeps_what_came_and_reaches_the_upstream(stage: Stage) -> None:
    """The text is there while it streams; Stop is no error, and Headrace sees a caller that has left."""
    async with chat(stage) as it:
        await it.send("words=50, stall_after=4")
        await expect(it.page.locator("#current")).to_have_text("the quick brown")
        await expect(it.page.locator("#state")).to_have_text("streaming")
        await it.page.click("#send")  # asks nothing while an answer is being given
        await it.page.click("#stop")
        await expect(it.page.locator("#state")).to_have_text("idle")
        assert await it.answer() == ("the quick brown", True)
        assert await it.category() is None
        await expect(it.page.locator("#current")).to_have_text("")
        assert await it.reasons(1) == ["client_gone"]


async def test_retry_asks_the_same_again_in_place_of_what_broke(stage: Stage) -> None:
    """The incomplete answer goes, the question stays once, the conversation goes on."""
    async with chat(stage) as it:
        await it.send("cut_after=4, gap=0.05")
        await expect(it.page.locator("#error")).to_have_attribute("data-partial", "true")
        await it.page.fill("#faults", "words=2")
        await it.page.click("#retry")
        await expect(it.page.locator("#messages li[data-incomplete=false]").last).to_have_text("the quick")
        assert await it.category() is None
        await it.page.click("#retry")  # of a whole answer there is nothing to retry
        await it.send("words=3")
        await expect(it.page.locator("#messages li").last).to_have_text("the quick brown")
        roles = await it.page.locator("#messages li").evaluate_all(
            "(all) => all.map((li) => li.dataset.role)"
        )
        assert roles == ["system", "user", "assistant", "user", "assistant"]
        assert await it.reasons(3) == ["upstream_cut", "complete", "complete"]


async def test_second_tries_are_the_clients(stage: Stage) -> None:
    """A failure before the first delta is asked again, one after it is not."""
    async with chat(stage, retries=2) as it:
        await it.send("status=503")
        await expect(it.page.locator("#error")).to_have_attribute("data-category", "server")
        assert len(await it.reasons(3)) == 3
    async with chat(stage, retries=2) as it:
        await it.send("cut_after=4, cut_mid_event, gap=0.05")
        await expect(it.page.locator("#error")).to_have_attribute("data-category", "truncated")
        assert await it.reasons(1) == ["upstream_cut"]


async def test_a_component_that_goes_stops_its_stream(stage: Stage) -> None:
    """Nobody pays for an answer that no component shows."""
    async with chat(stage) as it:
        await it.send("stall_after=4")
        await expect(it.page.locator("#current")).to_have_text("the quick brown")
        await it.page.click("#leave")
        assert await it.reasons(1) == ["client_gone"]


@pytest.mark.parametrize(
    "path",
    [
        "/api/chat/stream",
        pytest.param("/api/chat/stream?format=content", marks=pytest.mark.slow),
        pytest.param("/v1/chat/completions", marks=pytest.mark.slow),
    ],
)
async def test_pages_of_listed_origins(stage: Stage, path: str) -> None:
    """A page of the listed origin is served; one of another gets nothing that it may read."""
    async with chat(stage, path=path) as it:
        await it.send("words=5")
        await it.ended()
        assert await it.answer() == ("the quick brown fox jumps", False)
    async with chat(stage, path=path, origin=stage.stranger) as it:
        await it.send("words=5")
        await it.ended()
        assert await it.category() == "network"
        assert await it.answer() is None
        assert any("CORS policy" in problem for problem in it.watched.problems)
