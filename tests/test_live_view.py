"""The live view: its feed over raw sockets, who may ask it, and the page in a real Chromium."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, ViewportSize, expect

from proxy import live_view
from proxy.admin_guard import challenge, from_elsewhere, host_is_local, token_offered
from proxy.config import parse
from proxy.live_feed import MAX_READERS, Feed
from proxy.metrics import Metrics
from tests.kit.callers import Caller, ask, chat
from tests.kit.fleet import alive, fleet
from tests.kit.headrace import Headrace, running, settings_for, until
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.lab import hold, plays
from tests.kit.ledger import opened, row
from tests.kit.pages import STATIC, Watched, chromium
from tests.kit.upstreams import HEAD, Scripted, chunk, event, scripted
from tests.test_playground import LOW_CONTRAST, POLICY, UNNAMED, request

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

HELD = plays(HEAD, chunk(event("a")), hold)


class Reader:
    """One reader of the feed, on a connection of its own."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.raw = b""

    async def look(self) -> dict[str, Any] | None:
        """The next one; None: the feed has ended, whole."""
        while b"\n\n" not in self.raw:
            size = int(await self.caller.reader.readuntil(b"\r\n"), 16)
            self.raw += await self.caller.reader.readexactly(size)
            await self.caller.reader.readexactly(2)
            if size == 0:
                assert self.raw == b""
                return None
        one, _, self.raw = self.raw.partition(b"\n\n")
        if not one.startswith(b"data: "):
            assert one == b"retry: 1000"
            return await self.look()
        document: dict[str, Any] = json.loads(one.removeprefix(b"data: "))
        return document

    async def until(self, wanted: Any) -> dict[str, Any]:
        async with asyncio.timeout(15):
            while True:
                look = await self.look()
                assert look is not None
                if wanted(look):
                    return look


@asynccontextmanager
async def reading(port: int) -> AsyncIterator[Reader]:
    async with await Caller.connect(port) as caller:
        await caller.send(request("/admin/live"))
        head = await caller.head()
        assert (head.status, head.headers["content-type"]) == (200, "text/event-stream")
        assert head.headers["cache-control"] == "no-store"
        yield Reader(caller)


# ── the feed ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_two_workers_a_restart_and_a_drain(tmp_path: Path) -> None:
    """Sums over both workers; a restart ends the feed, and who comes again sees the old generation's streams;
    a drain is seen to its end, and does not wait for who watches it."""
    async with scripted(HELD) as upstream:
        settings = settings_for(upstream.url, workers=2, auth=auth_section(tmp_path), drain=30)
        key = await make_key(tmp_path)
        async with fleet(tmp_path, settings) as node, AsyncExitStack() as stack:
            await node.settle()
            for _ in range(3):
                caller = await stack.enter_async_context(await Caller.connect(node.port))
                await caller.send(chat(bearer(key)))
                await caller.piece(await caller.head())
            reader = await stack.enter_async_context(reading(node.admin_port))
            look = await reader.until(lambda look: len(look["streams"]) == 3)
            assert (look["workers"], look["draining"], look["running"]) == (2, False, {"stream": 3})
            assert {each["key_id"] for each in look["streams"]} == {key.split("_")[1]}
            assert (look["limits"]["slots"], look["limits"]["max_slots"]) == (3, 1000)
            (up,) = look["upstreams"]
            assert (up["name"], up["state"], up["in_flight"]) == ("up", "closed", 3)
            assert (await node.admin("POST", "/admin/restart")).status == 200
            async with asyncio.timeout(15):
                while await reader.look() is not None:
                    pass
            reader = await stack.enter_async_context(reading(node.admin_port))
            look = await reader.until(lambda look: len(look["streams"]) == 3)
            (front,) = {parent for parent in node.processes() if node.workers(parent)} - {node.pid}
            victim = look["streams"][0]["id"]
            assert (await node.admin("DELETE", f"/admin/streams/{victim}")).status == 200
            look = await reader.until(lambda look: len(look["streams"]) == 2)
            assert victim not in {each["id"] for each in look["streams"]}
            os.kill(front, signal.SIGTERM)
            await reader.until(lambda look: look["draining"])
            os.kill(front, signal.SIGTERM)  # at once, please
            async with asyncio.timeout(15):
                while await reader.look() is not None:
                    pass
            await until(lambda: not alive(front), 5)


async def test_readers_are_counted() -> None:
    """So many and no more; the place of one that leaves is free; nothing is looked at when all have left."""
    async with running(settings_for("mock:")) as headrace, AsyncExitStack() as stack:
        port, feed = headrace.front.admin_port, headrace.front._live._feed
        readers = [await stack.enter_async_context(reading(port)) for _ in range(MAX_READERS)]
        assert await readers[-1].look() is not None
        refused = await ask(port, request("/admin/live"))
        assert (refused.status, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "5"
        for reader in readers:
            reader.caller.reset()
        await until(lambda: feed.readers == 0)
        assert feed._sampling is None
        async with reading(port) as again:
            assert await again.look() is not None


async def test_looks_are_shared_and_a_slow_reader_misses_some() -> None:
    """One look for all; who comes later gets the newest at once; nothing is kept for who is slow."""
    looks, rests = 0, 0

    async def look() -> bytes:
        nonlocal looks
        looks += 1
        return b"%d" % looks

    def rested() -> None:
        nonlocal rests
        rests += 1

    feed = Feed(look, rested, every_s=0.001)
    assert looks == 0
    with feed.reader() as slow, feed.reader() as quick:
        assert await anext(slow) == b"1"
        while int(await anext(quick)) < 5:
            pass
        assert int(await anext(slow)) >= 5
        with feed.reader() as late:
            assert int(await anext(late)) >= 5
        assert rests == 0
    assert (feed.readers, rests) == (0, 1)
    before = looks
    with feed.reader() as events:  # not the one from before the rest
        assert int(await anext(events)) == before + 1
        await feed.end()
        assert [each async for each in events] == []


async def test_a_look_that_fails_ends_the_events() -> None:
    """Readers come again, and it begins anew; nobody waits for ever."""
    failing = True

    async def look() -> bytes:
        if failing:
            raise RuntimeError
        return b"well"

    feed = Feed(look, every_s=0.001)
    with feed.reader() as events:
        assert [each async for each in events] == []
        failing = False
    with feed.reader() as events:
        assert await anext(events) == b"well"


async def test_failures_are_dated_only_if_somebody_looked() -> None:
    """Counters have no times: what rose while nobody looked has none, and an older date goes with it."""
    failures = live_view.Failures()
    failures.look({("a", "timeout"): 3, ("a", "ok"): 9}, 10.0)
    assert failures.last("a", 10.0) is None
    failures.look({("a", "timeout"): 3, ("b", "reset"): 1, ("a", "cancelled"): 1}, 11.0)
    assert failures.last("a", 12.0) is None
    assert failures.last("b", 13.5) == live_view.LastFailure("reset", 2.5)
    failures.rest()
    failures.look({("a", "timeout"): 3, ("b", "reset"): 2}, 20.0)
    assert failures.last("b", 20.0) is None


# ── who may ask ──────────────────────────────────────────────────────────────────────────────────────────

SAME = {"Host": "127.0.0.1:9464", "Origin": "http://127.0.0.1:9464", "Sec-Fetch-Site": "same-origin"}


@pytest.mark.parametrize(
    ("method", "fields", "elsewhere"),
    [
        ("DELETE", {"Host": "h"}, False),  # a program
        ("DELETE", SAME, False),
        ("DELETE", {"Host": "admin.example", "Origin": "https://admin.example"}, False),  # TLS ends before us
        ("DELETE", {**SAME, "Origin": "https://evil.example"}, True),
        ("DELETE", {**SAME, "Origin": "http://127.0.0.1:3000"}, True),
        ("POST", {"Host": "h", "Origin": "null"}, True),
        ("POST", {"Host": "h", "Sec-Fetch-Site": "cross-site"}, True),
        ("GET", {"Host": "h", "Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}, True),
        ("GET", {"Host": "h", "Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, False),
    ],
)
async def test_where_a_request_comes_from(method: str, fields: dict[str, str], elsewhere: bool) -> None:
    assert from_elsewhere(method, fields) is elsewhere


async def test_a_link_from_elsewhere_is_followed() -> None:
    """As a page of its own, not inside another one, and never to change something."""
    link = {
        "Host": "h",
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "document",
    }
    assert not from_elsewhere("GET", link)
    assert from_elsewhere("POST", link)
    assert from_elsewhere("GET", {**link, "Sec-Fetch-Dest": "iframe"})


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1:9464", True),
        ("[::1]:9464", True),
        ("localhost", True),
        ("x.localhost:1", True),
        ("headrace:9464", True),
        ("", True),
        ("rebound.example:9464", False),
        ("127.0.0.1.example", False),
        ("[", False),
    ],
)
async def test_names_that_nobody_else_owns(host: str, local: bool) -> None:
    assert host_is_local(host) is local


def basic(text: str) -> dict[str, str]:
    return {"Authorization": f"Basic {b64encode(text.encode()).decode()}"}


async def test_the_token_as_a_password() -> None:
    """Browsers know no Bearer: whoever opens a page is asked for the token as they can."""
    for right in (basic("anybody:s3cret"), basic(":s3cret"), {"Authorization": "Bearer s3cret"}):
        assert token_offered(right, "s3cret")
    for wrong in (
        basic("s3cret:"),
        basic("s3cret"),
        {"Authorization": "Basic ?"},
        {"Authorization": "s3cret"},
        {},
    ):
        assert not token_offered(wrong, "s3cret")
    assert token_offered(basic("a:b:c"), "b:c")
    assert challenge({"Accept": "text/html,*/*"}).startswith("Bearer, Basic realm=")
    assert challenge({"Accept": "*/*"}) == "Bearer"
    async with running(settings_for("mock:", admin="0.0.0.0:0", admin_token="s3cret")) as headrace:
        port = headrace.front.admin_port
        for path in ("/live", "/live/live.js", "/admin/live"):
            assert (await ask(port, request(path))).status == 401
        field = f"Authorization: {basic('me:s3cret')['Authorization']}"
        page = await ask(port, request("/live", field, "Accept: text/html"))
        assert page.status == 200


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────

SCRIPTS = ("live.js", "live-dom.js", "live-streams.js", "live-text.js")


class Stage(NamedTuple):
    """A browser, and a Headrace before an upstream whose streams stand still."""

    browser: Browser
    headrace: Headrace
    upstream: Scripted


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage() -> AsyncIterator[Stage]:
    async with (
        chromium() as browser,
        scripted(HELD) as upstream,
        running(settings_for(upstream.url)) as headrace,
    ):
        yield Stage(browser, headrace, upstream)


class Desk:
    """The live view in a tab."""

    def __init__(self, page: Page, watched: Watched) -> None:
        self.page = page
        self.watched = watched

    def at(self, name: str) -> Locator:
        return self.page.locator(f"#{name}")

    @property
    def rows(self) -> Locator:
        return self.page.locator("#streams-rows tr")


@asynccontextmanager
async def desk(
    browser: Browser, headrace: Headrace, *, width: int = 1440, dark: bool = False, scale: float = 1
) -> AsyncIterator[Desk]:
    """Opens the page; at the end it must have complained of nothing and asked nobody else."""
    context = await browser.new_context(
        viewport=ViewportSize(width=width, height=900 if width > 600 else 740),
        color_scheme="dark" if dark else "light",
        device_scale_factor=scale,
        reduced_motion="reduce",
    )
    try:
        page = await context.new_page()
        watched = Watched(page, headrace.admin_url)
        await page.goto(f"{headrace.admin_url}/live")
        await expect(page.locator("#status")).to_have_attribute("data-phase", "streaming", timeout=15_000)
        yield Desk(page, watched)
        assert watched.problems == []
    finally:
        await context.close()


async def test_files(stage: Stage) -> None:
    """Under a policy that lets nothing else in; nothing inline; nothing that is not served."""
    port = stage.headrace.front.admin_port
    page = await ask(port, request("/live"))
    assert set(page.headers["content-security-policy"].split("; ")) == POLICY
    text = page.body.decode()
    links = {link for link in re.findall(r'(?:src|href)="([^"]+)"', text) if not link.startswith("data:")}
    assert links - {"/admin/spend"} == {"/live/page.css", "/live/live.css", "/live/live.js"}
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text)
    for file in ("page.css", "live.css", *SCRIPTS):
        answer = await ask(port, request(f"/live/{file}"))
        assert answer.status == 200
        async with await Caller.connect(port) as caller:
            await caller.send(request(f"/live/{file}", f"If-None-Match: {answer.headers['etag']}"))
            same = await caller.head()  # which is all of a 304
        assert same.status == 304
    for file in SCRIPTS:
        text = (STATIC / file).read_text()
        assert "innerHTML" not in text
        assert {name for name in re.findall(r'from "\./([^"]+)"', text)} <= set(SCRIPTS)
    assert (await ask(stage.headrace.port, request("/live"))).status == 404  # not on the data listener


async def test_a_page_of_elsewhere_stops_nothing(stage: Stage) -> None:
    """Neither by its own name nor by one that it has bent to this machine."""
    port = stage.headrace.front.admin_port
    async with await Caller.connect(stage.headrace.port) as caller:
        await caller.send(chat())
        await caller.piece(await caller.head())
        (stream,) = stage.headrace.server.streams()
        path = f"/admin/streams/{stream['id']}"
        foreign = await ask(port, request(path, "Origin: https://evil.example", method="DELETE"))
        assert (foreign.status, foreign.json()["error"]["code"]) == (403, "origin_not_allowed")
        rebound = request(path, method="DELETE").replace(b"Host: test", b"Host: evil.example")
        refused = await ask(port, rebound)
        assert (refused.status, refused.json()["error"]["code"]) == (403, "host_not_allowed")
        assert len(stage.headrace.server.streams()) == 1
    await stage.headrace.quiet()


async def test_stop(stage: Stage) -> None:
    """By keyboard: asked once more, then the stream ends for the reason `killed`, its upstream sees it, the
    other one goes on, and the focus is on its button."""
    headrace, before = stage.headrace, len(stage.headrace.log_lines())
    async with AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(await Caller.connect(headrace.port)) for _ in range(2)]
        calls = []
        for caller in callers:
            await caller.send(chat())
            await caller.piece(await caller.head())
            calls.append(stage.upstream.calls[-1])
        victim, other = [each["id"] for each in headrace.server.streams()]
        it = await stack.enter_async_context(desk(stage.browser, headrace))
        await expect(it.rows).to_have_count(2)
        await expect(it.at("f-streaming")).to_have_text("2")
        await expect(it.at("slots-text")).to_have_text("2 of 1,000")
        await expect(it.page.locator("#upstreams-rows td").nth(1)).to_have_text("Healthy")
        button = it.rows.first.get_by_role("button", name=f"Stop m, stream {victim}")
        await button.focus()
        await it.page.keyboard.press("Enter")
        sure = it.page.get_by_role("button", name="Sure? Press again")
        await expect(sure).to_be_focused()
        await it.page.keyboard.press("Escape")
        await expect(sure).to_have_count(0)
        assert len(headrace.server.streams()) == 2
        await it.page.keyboard.press("Enter")
        await it.page.keyboard.press("Enter")
        await asyncio.wait_for(calls[0].gone.wait(), 10)
        await until(lambda: len(headrace.log_lines()) == before + 1)
        assert headrace.log_lines()[-1]["reason"] == "killed"
        await expect(it.at("said")).to_have_text(f"Stopped stream {victim}")
        await expect(it.rows).to_have_count(1, timeout=10_000)
        await expect(it.rows).to_have_attribute("data-id", other)
        await expect(it.rows.get_by_role("button")).to_be_focused()
        assert not calls[1].gone.is_set()
        await it.page.route("**/admin/streams/*", lambda route: route.abort())
        for _ in range(2):
            await it.page.keyboard.press("Enter")
        await expect(it.at("notices")).to_have_text(f"Stream {other} was not stopped: no connection")
        await expect(it.rows.get_by_role("button", name=f"Stop m, stream {other}")).to_have_text("Stop")
        await it.at("pause").click()
        await expect(it.at("status")).to_have_text("Paused")
        await until(lambda: headrace.front._live._feed.readers == 0)
        callers[1].reset()
        await headrace.quiet()
        await expect(it.rows).to_have_count(1)
        await it.page.keyboard.press("Enter")
        await expect(it.at("streams-none")).to_be_visible(timeout=10_000)


# ── for everybody ────────────────────────────────────────────────────────────────────────────────────────


def town(tmp_path: Path) -> dict[str, Any]:
    """Three providers, all played by the mock: one is ejected, one is full."""
    mock = {"base_url": "mock:"}
    models = {"gpt-4.1": "openai", "claude-sonnet-4-5": "anthropic", "gemini-2.5-pro": "gemini"}
    return {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "auth": auth_section(tmp_path),
        "upstreams": {
            "openai": mock,
            "anthropic": {**mock, "max_in_flight": 3},
            "gemini": {**mock, "breaker": {"failures": 2, "cool_down": 60}},
        },
        "models": {name: {"upstreams": [up]} for name, up in models.items()},
        "limits": {"max_in_flight": 12, "queue": {"max_wait": 300}},
        "retry": {"attempts": 1},
        "ledger": {"database": f"sqlite:{tmp_path}/spent.db"},
    }


async def spent(tmp_path: Path) -> None:
    """Since this morning."""
    async with opened(tmp_path / "spent.db") as ledger:
        for model, cents in (("gpt-4.1", 1842), ("claude-sonnet-4-5", 1207), ("gemini-2.5-pro", 390)) * 50:
            cost, tokens = cents * 10**10 // 50, cents * 20
            ledger.add(row(time.time(), model=model, cost_picos=cost, prompt_tokens=tokens))


async def fill(headrace: Headrace, key: str, stack: AsyncExitStack) -> None:
    """What a busy afternoon looks like: failures, streams of all speeds, a queue."""

    async def begin(model: str, faults: str) -> Caller:
        caller = await stack.enter_async_context(await Caller.connect(headrace.port))
        await caller.send(chat(bearer(key), f"x-mock: {faults}", model=model))
        return caller

    for _ in range(2):
        assert (await (await begin("gemini-2.5-pro", "status=503")).head()).status == 503
    for number in range(3):
        await begin("claude-sonnet-4-5", f"words=9000, gap=0.0{5 + number}")
    for number in range(2):
        await begin("gpt-4.1", f"words=9000, gap=0.0{3 + number}")
    await begin("gpt-4.1", "ttfb=250")
    await until(lambda: headrace.state["streams"] >= 5, 20)
    for _ in range(2):
        await begin("claude-sonnet-4-5", "words=5")
    await until(lambda: headrace.state["queued"] == 2, 20, lambda: str(headrace.state))


@pytest.mark.parametrize(
    "screens",
    [
        pytest.param([(1440, False), (360, True)], id="light-dark"),
        pytest.param([(1440, True), (360, False)], id="dark-light", marks=pytest.mark.slow),
    ],
)
async def test_busy(stage: Stage, tmp_path: Path, screens: list[tuple[int, bool]]) -> None:
    """Names, contrast, and nothing wider than the screen, at both widths, light and dark.

    HEADRACE_SCREENSHOTS names a folder for the README's pictures."""
    folder = Path(os.environ.get("HEADRACE_SCREENSHOTS", tmp_path))
    key = await make_key(tmp_path)
    await spent(tmp_path)
    async with running(town(tmp_path)) as headrace, AsyncExitStack() as stack:
        watcher = await stack.enter_async_context(reading(headrace.front.admin_port))
        assert await watcher.look() is not None  # so that failures have a time
        await fill(headrace, key, stack)
        for width, dark in screens:
            scale = 1 if width > 600 else 2
            async with desk(stage.browser, headrace, width=width, dark=dark, scale=scale) as it:
                await shows_the_town(it)
                assert await it.page.evaluate("document.documentElement.scrollWidth") == width
                assert await it.page.evaluate(UNNAMED) == []
                assert await it.page.evaluate(LOW_CONTRAST) == []
                if "HEADRACE_SCREENSHOTS" in os.environ:  # a picture has to show some of the past
                    await it.page.evaluate("new Promise((done) => setTimeout(done, 20000))")
                name = f"live-{'dark' if dark else 'light'}{'' if width > 600 else '-narrow'}.png"
                picture = await it.page.screenshot(path=folder / name, full_page=width > 600)
                assert len(picture) > 10_000


async def shows_the_town(it: Desk) -> None:
    await expect(it.rows).to_have_count(8)
    await expect(it.page.locator("#spend dd").first).to_have_text("$18.42")
    for words in ("Ejected", "Full", "Error status, "):
        await expect(it.at("upstreams-rows")).to_contain_text(words)
    await expect(it.at("queue-note")).to_contain_text("longest")


async def test_refusals_by_limit() -> None:
    """Those that have refused anybody."""
    metrics = Metrics("1")
    for scope, result in (("key", "refused"), ("key", "refused"), ("ip", "allowed")):
        metrics.limit_decisions.add((scope, result))
    assert live_view.limits(
        parse("upstreams: {up: {base_url: 'mock:'}}", "FILE", {}), metrics, []
    ).refused == {"key": 2}
