"""The playground: as files, and in a real Chromium before a real Headrace, with and without keys."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, ViewportSize, expect

from proxy.endpoints import PAGE_FILES
from proxy.mock import NORMAL, override
from tests.kit.callers import Caller, ask
from tests.kit.headrace import Headrace, running, settings_for, until
from tests.kit.keys import auth_section, make_key
from tests.kit.pages import STATIC, Watched, chromium, node, packages, run
from tests.kit.upstreams import DONE, END, HEAD, Call, chunk, scripted

pytestmark = [pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

POLICY = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
}
#: What a model might say to get into the page as code.
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script></div>'
TYPES = {".css": "text/css", ".js": "text/javascript"}


def request(path: str, *fields: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: test", *fields, "", ""]).encode()


# ── as files ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_files_are_served_without_a_credential(tmp_path: Path) -> None:
    """Page and modules, with types and validators, also where all else needs a key; nothing is counted."""
    settings = {**settings_for("mock:"), "auth": auth_section(tmp_path)}
    async with running(settings) as headrace:
        page = await ask(headrace.port, request("/"))
        assert page.status == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert set(page.headers["content-security-policy"].split("; ")) == POLICY
        assert page.headers["referrer-policy"] == "no-referrer"
        for file in PAGE_FILES:
            answer = await ask(headrace.port, request(f"/static/{file}"))
            assert answer.status == 200
            assert answer.body == (STATIC / file).read_bytes()
            assert answer.headers["content-type"] == f"{TYPES[Path(file).suffix]}; charset=utf-8"
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert (await ask(headrace.port, request("/v1/models"))).status == 401


async def test_validators(tmp_path: Path) -> None:
    """A browser that has a file asks whether it is the same, and gets no second copy."""
    async with running(settings_for("mock:")) as headrace, await Caller.connect(headrace.port) as caller:
        for path in ("/", "/static/playground.js", "/?x=1"):
            whole = await caller.ask(request(path))
            tag = whole.headers["etag"]
            assert whole.headers["cache-control"] == "no-cache"
            for sent in (tag, f"W/{tag}", f'"other", {tag}', "*"):
                await caller.send(request(path, f"If-None-Match: {sent}"))
                same = await caller.head()  # which is all of a 304
                assert (same.status, same.headers["etag"]) == (304, tag)
            assert (await caller.ask(request(path, 'If-None-Match: "other"'))).body == whole.body
            await caller.send(request(path, method="HEAD"))
            head = await caller.head()
            assert head.headers["content-length"] == str(len(whole.body))
            assert head.headers["etag"] == tag


@pytest.mark.parametrize("path", ["/", *(f"/static/{file}" for file in PAGE_FILES)])
async def test_off(path: str) -> None:
    """`playground: false`: there is nothing at these paths; and they are never posted to."""
    async with running({**settings_for("mock:"), "playground": False}) as headrace:
        assert (await ask(headrace.port, request(path))).status == 404
    async with running(settings_for("mock:")) as headrace:
        assert (await ask(headrace.port, request(path, "Content-Length: 0", method="POST"))).status == 404


async def test_the_page_names_only_files_that_are_served() -> None:
    """Nothing inline, nothing of third parties, no module that the allow-list does not have."""
    page = (STATIC / "playground.html").read_text()
    found = set(re.findall(r'(?:src|href)="([^"]+)"', page))
    links = {link for link in found if not link.startswith("data:image/svg+xml,")}
    assert links == {"/static/playground.css", "/static/playground.js"}
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=)|javascript:", page)
    for file in PAGE_FILES:
        for name in re.findall(r'from "(\./[^"]+)"', (STATIC / file).read_text()):
            assert name.removeprefix("./") in PAGE_FILES
        assert "innerHTML" not in (STATIC / file).read_text()


async def test_models_of_the_mock_say_so() -> None:
    """Only a model that nobody but the mock serves: a fault is for nobody else."""
    upstreams = {"mock": {"base_url": "mock:"}, "real": {"base_url": "http://127.0.0.1:9/v1"}}
    models = {
        "a": {"upstreams": ["mock"]},
        "b": {"upstreams": ["real"]},
        "c": {"upstreams": ["mock", "real"]},
        "d*": {"upstreams": ["mock"]},
    }
    async with running({**settings_for("mock:"), "upstreams": upstreams, "models": models}) as headrace:
        listed = (await ask(headrace.port, request("/v1/models"))).json()["data"]
        assert {model["id"]: model.get("mock") for model in listed} == {"a": True, "b": None, "c": None}
        assert (await ask(headrace.port, request("/v1/models/d1"))).json()["mock"] is True


# ── in a browser ─────────────────────────────────────────────────────────────────────────────────────────


class Stage(NamedTuple):
    """A browser, and an open Headrace with the mock as `echo` and a scripted upstream as `real`."""

    browser: Browser
    headrace: Headrace


async def says_hostile(call: Call) -> None:
    """A stream with markup for text, and a price beside its usage as OpenRouter gives it."""
    first = {"choices": [{"index": 0, "delta": {"content": HOSTILE}, "finish_reason": "stop"}]}
    last = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7, "cost": 0.00123}}
    events = b"".join(b"data: %b\n\n" % json.dumps(each).encode() for each in (first, last))
    await call.send(HEAD + chunk(events + DONE) + END)


def settings(real: str) -> dict[str, Any]:
    return {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "auth": {"mode": "open"},
        "upstreams": {
            "mock": {"base_url": "mock:", "breaker": {"failures": 1000}},
            "scripted": {"base_url": real},
        },
        "models": {"echo": {"upstreams": ["mock"]}, "real": {"upstreams": ["scripted"]}},
        "retry": {"attempts": 1},
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage() -> AsyncIterator[Stage]:
    async with (
        chromium() as browser,
        scripted(says_hostile) as upstream,
        running(settings(upstream.url)) as headrace,
    ):
        yield Stage(browser, headrace)


class Desk:
    """The playground in a tab."""

    def __init__(self, page: Page, headrace: Headrace, watched: Watched) -> None:
        self.page = page
        self.headrace = headrace
        self.watched = watched
        self.before = len(headrace.log_lines())

    def at(self, name: str) -> Locator:
        return self.page.locator(f"#{name}")

    async def send(self, faults: str = "words=5") -> None:
        await self.at("x-mock").fill(faults)
        await self.at("send").click()

    async def phase(self, name: str) -> None:
        await expect(self.at("status")).to_have_attribute("data-phase", name, timeout=15_000)

    async def line(self) -> dict[str, Any]:
        """The log line of the one request that was sent."""

        def lines() -> list[dict[str, Any]]:
            asked = self.headrace.log_lines()[self.before :]
            return [line for line in asked if line["method"] == "POST"]

        await until(lambda: bool(lines()), 10)
        (line,) = lines()
        return line


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
    await context.grant_permissions(["clipboard-read", "clipboard-write"])
    try:
        page = await context.new_page()
        watched = Watched(page, headrace.url)
        await page.goto(headrace.url)
        await expect(page.locator(".access > :not([hidden])")).to_be_visible()
        yield Desk(page, headrace, watched)
        assert watched.problems == []
    finally:
        await context.close()
        await headrace.quiet(10)


async def test_type_send_read(stage: Stage) -> None:
    """Typed and sent by keyboard: the text, its figures, the request's id as it is in the log."""
    async with desk(*stage) as it:
        await expect(it.at("access-open")).to_be_visible()
        await expect(it.at("access-key")).to_be_hidden()
        await it.at("system").fill("Be brief.")
        await it.at("user").fill("")
        await it.at("x-mock").fill("words=5, gap=0.02")
        await it.at("temperature").fill("0.3")
        await it.at("max-tokens").fill("64")
        await it.at("user").focus()
        await it.page.keyboard.type("Hello there")
        sent = it.page.expect_request("**/v1/chat/completions")
        async with sent as asked:
            await it.page.keyboard.press("Control+Enter")
        body = (await asked.value).post_data_json
        assert body == {
            "model": "echo",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello there"},
            ],
            "temperature": 0.3,
            "max_tokens": 64,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        await it.phase("complete")
        await expect(it.at("answer")).to_have_text("the quick brown fox jumps")
        line = await it.line()
        assert line["reason"] == "complete"
        await expect(it.at("request-id")).to_have_text(line["request_id"])
        await expect(it.at("facts")).to_have_text("Status 200 · mock · 1 attempt")
        await expect(it.at("f-in")).to_have_text(str(line["prompt_tokens"]))
        await expect(it.at("f-out")).to_have_text("5")
        await expect(it.at("f-first")).to_have_text(re.compile(r"^\d+(\.\d+)? ?(ms|s)$"))
        await expect(it.at("f-speed")).to_have_text(re.compile(r"^\d+(\.\d)?$"))
        await expect(it.at("f-cost")).to_be_hidden()
        await expect(it.at("rhythm-note")).to_have_text(re.compile(r"^median .+ · p95 .+ · longest .+"))
        drawn = await it.at("rhythm-bars").get_attribute("d")
        assert drawn is not None
        assert drawn.count("M") == 4  # a bar between any two of five
        await it.at("copy-id").click()
        assert await it.page.evaluate("navigator.clipboard.readText()") == line["request_id"]


async def test_text_comes_while_it_streams_and_stop_reaches_the_upstream(stage: Stage) -> None:
    """Escape ends it: what came stays, Headrace sees a caller that has left; the focus is never lost."""
    async with desk(*stage) as it:
        await it.at("x-mock").fill("words=50, stall_after=4")
        await it.at("send").focus()
        await it.page.keyboard.press("Enter")
        await expect(it.at("answer")).to_have_text("the quick brown")
        await it.phase("streaming")
        await expect(it.at("answer")).to_have_attribute("aria-busy", "true")
        await expect(it.at("send")).to_be_disabled()
        await expect(it.at("stop")).to_be_focused()
        await it.page.keyboard.press("Escape")
        await it.phase("stopped")
        assert (await it.line())["reason"] == "client_gone"
        await expect(it.at("answer")).to_have_text("the quick brown")
        await expect(it.at("answer")).to_have_attribute("aria-busy", "false")
        await expect(it.at("send")).to_be_focused()
        await expect(it.at("notices")).to_be_empty()


async def test_an_error_its_countdown_and_another_try(stage: Stage) -> None:
    """Code and status are shown, the seconds go down, Retry asks again."""
    async with desk(*stage) as it:
        await it.send("status=429, retry_after=30")
        await it.phase("failed")
        box = it.page.locator(".notice.bad")
        await expect(box).to_contain_text("Too many requests")
        await expect(box).to_contain_text("Status 429 · rate_limit_error")
        countdown = box.locator(".countdown")
        await expect(countdown).to_have_text("The server asks to wait: 30 s")
        await expect(countdown).to_have_text(re.compile("wait: 2[5-9] s"), timeout=10_000)
        await it.at("x-mock").fill("words=2")
        await box.get_by_role("button", name="Retry").click()
        await it.phase("complete")
        await expect(it.at("answer")).to_have_text("the quick")
        await expect(it.at("notices")).to_be_empty()


@pytest.mark.parametrize("faults", ["cut_after=4, cut_mid_event", "no_done, words=5"])
async def test_a_stream_without_its_terminator(stage: Stage, faults: str) -> None:
    """The text that came is there, and a banner says that it may lack its end."""
    async with desk(*stage) as it:
        await it.send(f"{faults}, gap=0.3")
        await it.phase("incomplete")
        await expect(it.page.locator(".notice.warn")).to_contain_text("This answer is not complete")
        # A browser may drop what came right before the connection was cut.
        await expect(it.at("answer")).to_have_text(re.compile("^the quick"))


async def test_whole_answers(stage: Stage) -> None:
    """Without `stream`: one piece, with its usage."""
    async with desk(*stage) as it:
        await it.page.get_by_role("switch", name="Stream").uncheck()
        await it.send()
        await it.phase("complete")
        await expect(it.at("answer")).to_have_text("the quick brown fox jumps")
        await expect(it.at("f-out")).to_have_text("5")


async def test_what_a_model_says_is_text(stage: Stage) -> None:
    """Markup stays markup; the mock's faults are not offered for a real model; a price that is told is
    shown."""
    async with desk(*stage) as it:
        await expect(it.at("mock")).to_be_visible()
        await it.at("model").select_option("real")
        await expect(it.at("mock")).to_be_hidden()
        async with it.page.expect_request("**/v1/chat/completions") as asked:
            await it.at("send").click()
        assert "x-mock" not in (await asked.value).headers
        await it.phase("complete")
        await expect(it.at("answer")).to_have_text(HOSTILE)
        assert await it.page.locator("#answer *").count() == 0
        assert await it.page.title() == "Headrace playground"
        await expect(it.at("f-cost")).to_have_text("$0.001230")


async def test_another_model(stage: Stage) -> None:
    """A model that a pattern serves is in no list: its name can be typed."""
    async with desk(*stage) as it:
        await it.at("model").select_option(label="Another model…")
        await it.page.get_by_label("Name of the other model").fill("nobody-serves-this")
        await it.at("send").click()
        await it.phase("failed")
        await expect(it.page.locator(".notice.bad")).to_contain_text("Status 404 · model_not_found")


async def test_every_fault_on_offer_is_one(stage: Stage) -> None:
    """The mock knows every header of the list; a header of one's own is called so."""
    async with desk(*stage) as it:
        values = await it.at("fault").locator("option").evaluate_all("(all) => all.map((one) => one.value)")
        assert len(values) > 8
        await it.at("fault").select_option(values[4])
        await expect(it.at("x-mock")).to_have_value(values[4])
        await it.at("x-mock").fill("words=1")
        await expect(it.at("fault")).to_have_value(values[-1])
    for value in values[:-1]:
        assert override(NORMAL, value) != NORMAL


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_key_stays_in_its_tab(stage: Stage, tmp_path: Path) -> None:
    """Asked for where one is needed; sent in one header, kept in this tab's session storage, written nowhere
    else, not in the code to copy either."""
    key = await make_key(tmp_path)
    keyed = {**settings("http://127.0.0.1:9/v1"), "auth": auth_section(tmp_path)}
    async with running(keyed) as headrace, desk(stage.browser, headrace) as it:
        field = it.page.get_by_label("API key")
        await expect(it.at("access-open")).to_be_hidden()
        await field.fill("hr_wrong_key")
        await field.press("Enter")
        await expect(it.at("key-note")).to_have_text("This key is not valid")
        await expect(field).to_have_attribute("aria-invalid", "true")
        await field.fill(key)
        await field.press("Enter")
        await expect(it.at("model").locator("option")).to_have_count(3)
        await it.send()
        await it.phase("complete")
        line = await it.line()
        assert line["key_id"] == key.split("_")[1]
        for language in ("curl", "Python", "JavaScript"):
            await it.page.get_by_text(language, exact=True).click()
            await expect(it.at("code")).to_contain_text("HEADRACE_KEY")
            assert key not in await it.page.content()
        stored = await it.page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie]")
        assert stored == [{"headrace.key": key}, {}, ""]
        assert not [url for url in it.watched.requests if key in url]
        await it.page.reload()
        await expect(it.at("model").locator("option")).to_have_count(3)
        other = await it.page.context.new_page()
        await other.goto(headrace.url)
        await expect(other.get_by_label("API key")).to_have_value("")
        await it.page.get_by_label("API key").fill("")
        await it.page.get_by_label("API key").press("Enter")
        await expect(it.at("model").locator("option")).to_have_count(1)
        assert await it.page.evaluate("sessionStorage.length") == 0


# ── code to copy ─────────────────────────────────────────────────────────────────────────────────────────

AWKWARD = 'It\'s "quoted" \\ $HOME `x` 水車 {braces}\n%s'


@pytest.mark.parametrize("language", ["curl", "Python", pytest.param("JavaScript", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stream", [True, pytest.param(False, marks=pytest.mark.slow)])
async def test_the_code_does_what_the_page_does(
    stage: Stage, tmp_path: Path, language: str, stream: bool
) -> None:
    """Pasted into a terminal it sends the same request, whatever the message holds."""
    async with desk(*stage) as it:
        await it.at("model").select_option("echo")
        await it.at("user").fill(AWKWARD)
        await it.at("max-tokens").fill("9")
        await it.at("stream").set_checked(stream)
        await it.at("x-mock").fill("words=5")
        await it.page.get_by_text(language, exact=True).click()
        await it.at("copy-code").click()
        await expect(it.at("copy-code")).to_have_text("Copied")
        code = await it.page.evaluate("navigator.clipboard.readText()")
        printed = await execute(language, code, tmp_path)
        words = re.findall(r'"content":"( ?\w+)"', printed) if language == "curl" and stream else [printed]
        assert "the quick brown fox jumps" in "".join(words)
        mock = stage.headrace.server._mock
        assert mock is not None
        pasted = mock.record.last
        await it.send("words=5")
        await it.phase("complete")
        assert json.loads(pasted.body) == json.loads(mock.record.last.body)
        assert json.loads(pasted.body)["messages"] == [{"role": "user", "content": AWKWARD}]
        assert pasted.header("x-mock") == "words=5"


async def execute(language: str, code: str, folder: Path) -> str:
    if language == "curl":
        return await run("bash", "-c", code, cwd=folder)
    if language == "Python":
        (folder / "code.py").write_text(code)
        return await run(sys.executable, str(folder / "code.py"), cwd=folder)
    (folder / "code.mjs").write_text(code)
    (folder / "node_modules").symlink_to(packages("openai-node-7") / "node_modules")
    return await run(node(), str(folder / "code.mjs"), cwd=folder)


# ── for everybody ────────────────────────────────────────────────────────────────────────────────────────

#: Text whose contrast with what is behind it is too small (WCAG 2.2, 1.4.3), and how small.
LOW_CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (part) => ((part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const color = rgb(getComputedStyle(element).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  const judge = (element, color, what) => {
    const [a, b] = [luminance(rgb(color)), luminance(behind(element))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) found.push(`${what}: ${((a + 0.05) / (b + 0.05)).toFixed(2)}`);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const element = text.parentElement;
    if (!text.data.trim() || !element.checkVisibility() || element.closest(":disabled, option")) continue;
    judge(element, getComputedStyle(element).color, text.data.trim().slice(0, 40));
  }
  const typed = "input:not([type=checkbox], [type=radio]), textarea, select";
  for (const field of document.querySelectorAll(typed)) {
    if (field.checkVisibility()) judge(field, getComputedStyle(field).color, `#${field.id}`);
    if (field.checkVisibility() && field.placeholder)
      judge(field, getComputedStyle(field, "::placeholder").color, `placeholder of #${field.id}`);
  }
  return found;
}"""

#: Controls without a name, labels without a control, ids that stand twice.
UNNAMED = """() => {
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  const twice = ids.filter((id, at) => ids.indexOf(id) !== at);
  const controls = [...document.querySelectorAll("input, select, textarea, button, [tabindex], [role=img]")];
  const named = (one) => one.labels?.length || one.getAttribute("aria-label") || one.textContent.trim();
  const nameless = controls.filter((one) => !named(one)).map((one) => one.outerHTML);
  const labels = [...document.querySelectorAll("label")];
  const idle = labels.filter((label) => !label.control).map((one) => one.outerHTML);
  return [...twice, ...nameless, ...idle];
}"""

FOCUS = """() => {
  const at = document.activeElement;
  return at === document.body ? "" : at.id || at.value || at.tagName;
}"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
async def test_names_and_contrast(stage: Stage, dark: bool) -> None:
    """Every control has a name; all text can be read, that of notices too."""
    async with desk(*stage, dark=dark) as it:
        assert await it.page.evaluate(UNNAMED) == []
        for faults in ("words=5", "status=503", "cut_after=4, cut_mid_event, gap=0.05"):
            await it.send(faults)
            await expect(it.at("status")).not_to_have_attribute(
                "data-phase", re.compile("waiting|streaming|ready")
            )
            await it.page.mouse.move(0, 0)
            assert await it.page.evaluate(LOW_CONTRAST) == []
        assert await it.page.evaluate(UNNAMED) == []


async def test_the_order_of_the_focus(stage: Stage) -> None:
    """Tab goes through the page as it is read, and out of it at its end: there is no trap."""
    async with desk(*stage) as it:
        await it.at("model").focus()
        order = []
        for _ in range(30):
            order.append(await it.page.evaluate(FOCUS))
            await it.page.keyboard.press("Tab")
        first = ["model", "system", "user", "temperature", "max-tokens", "stream", "fault", "x-mock", "send"]
        assert order[: len(first)] == first
        assert order[len(first) :][:4] == ["answer", "curl", "copy-code", "PRE"]
        assert len(order) > order.index("PRE") + 1
        await it.at("user").focus()
        await it.page.keyboard.press("Shift+Tab")
        assert await it.page.evaluate(FOCUS) == "system"


@pytest.mark.parametrize(
    ("width", "dark", "name"),
    [
        (1440, False, "light"),
        (360, True, "dark-narrow"),
        pytest.param(1440, True, "dark", marks=pytest.mark.slow),
        pytest.param(360, False, "light-narrow", marks=pytest.mark.slow),
    ],
)
async def test_widths(stage: Stage, tmp_path: Path, width: int, dark: bool, name: str) -> None:
    """Nothing is wider than the screen, before, during and after; HEADRACE_SCREENSHOTS names a folder for the
    README's pictures."""
    folder = Path(os.environ.get("HEADRACE_SCREENSHOTS", tmp_path))
    async with desk(*stage, width=width, dark=dark, scale=1.75 if width < 600 else 1) as it:
        for faults in ("words=40, big_event=500", "status=503", "words=90, gap=0.03"):
            await it.send(faults)
            await expect(it.at("status")).not_to_have_attribute(
                "data-phase", re.compile("waiting|streaming|ready")
            )
            assert await it.page.evaluate("document.documentElement.scrollWidth") == width
        await it.page.mouse.move(0, 0)
        await it.page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
        if width < 600:  # of the long page, the part with the answer
            await it.page.evaluate("scrollTo(0, document.getElementById('result').offsetTop - 16)")
        file = folder / f"playground-{name}.png"
        picture = await it.page.screenshot(path=file, full_page=width >= 600)
        assert len(picture) > 10_000
