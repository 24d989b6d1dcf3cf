"""GET /admin/spend: a page about money that runs nothing and asks nobody."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import struct
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from proxy import spend_page
from proxy.ledger_read import Group, Sums
from tests.kit.callers import ask
from tests.kit.headrace import running, settings_for, until
from tests.kit.ledger import opened, row, unknown
from tests.test_admin import fetch

pytestmark = pytest.mark.timeout(60)

DAY_S = 86400
USD = 10**12
#: 2024-10-31T12:00:00Z: the month has a day that is older than 30 days.
NOON = 20_027 * DAY_S + DAY_S / 2


class Reader(HTMLParser):
    """The text in order, and the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "path", "rect", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title", "desc"):
            self.words += filter(None, [data.strip()])


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def group(days_ago: int, key: str, model: str, picos: int, **sums: int) -> Group:
    values = {"requests": 1, "prompt_tokens": 10, "completion_tokens": 5, "cost_picos": picos, **sums}
    return Group((20_027 - days_ago, key, model), Sums(**values))


def test_what_is_on_it() -> None:
    """Today, this month, a projection; the picture; the sums by model and by key of the last 30 days."""
    groups = [
        group(0, "a", "m", 2 * USD),
        group(0, "", "n", 6_000_000_000),
        group(10, "a", "m", 3 * USD),
        group(30, "a", "m", 100 * USD),  # 1 October: of this month, not of the last 30 days
        group(1, "b", "m", 0, unknown=1),
    ]
    reader = read(spend_page.page(groups, NOON))
    words = reader.words
    assert words[:7] == ["Spend", "$2.01", "today", "$105.01", "this month", "$9.00", "30 days like these"]
    assert "$5.01" in words  # the picture's own sum
    by_model = words[words.index("By model") : words.index("By key")]
    assert by_model[-8:] == ["m", "3", "45", "$5.00", "n", "1", "15", "$0.01"]
    by_key = words[words.index("By key") + 4 : -1]
    assert by_key[:4] == ["a", "2", "30", "$5.00"]
    assert "without a key" in by_key
    assert "1 requests of unknown usage" in words[-1]


def test_it_runs_nothing_and_fetches_nothing() -> None:
    """No script, no link, no picture from elsewhere; a name is text."""
    page = spend_page.page([group(0, "<script>alert(1)</script>", "<img src=x>", USD)], NOON)
    reader = read(page)
    assert set(reader.tags) & {"script", "img", "link", "iframe", "a", "form", "object"} == set()
    assert "<script>alert(1)</script>" in reader.words
    shown = page.replace("&lt;img src=x", "")
    assert not re.search(r"(?:src|href|action)\s*=|url\(|@import|\son\w+\s*=", shown)


def test_nothing_yet() -> None:
    words = read(spend_page.page([], NOON)).words
    assert words.count("Nothing yet.") == 2
    assert words[1] == "$0.00"


async def test_on_the_admin_listener(tmp_path: Path) -> None:
    """Of the configured ledger, also while it is written; its policy forbids everything but its own style."""
    path = tmp_path / "l.db"
    async with running(settings_for("mock:", ledger={"database": f"sqlite:{path}"})) as headrace:
        answer = await fetch(headrace.front.admin_port, "/admin/spend")
        assert answer.status == 200
        assert "Nothing yet." in read(answer.body.decode()).words
        async with opened(path) as ledger:
            ledger.add(row(time.time(), cost_picos=7_400_000_000_000, model="gpt-4.1", key_id="k1"))
            ledger.add(unknown(time.time()))
        answer = await fetch(headrace.front.admin_port, "/admin/spend")
        assert "$7.40" in read(answer.body.decode()).words
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; style-src")
        assert answer.headers["cache-control"] == "no-store"


async def test_it_needs_the_admin_token() -> None:
    settings = settings_for("mock:", admin="0.0.0.0:0", admin_token="secret-admin-token")
    async with running(settings) as headrace:
        port = headrace.front.admin_port
        assert (await fetch(port, "/admin/spend")).status == 401
        assert (await fetch(port, "/admin/spend", "Authorization: Bearer secret-admin-token")).status == 200
        assert (await ask(headrace.port, b"GET /admin/spend HTTP/1.1\r\nHost: a\r\n\r\n")).status == 404


async def test_a_ledger_that_cannot_be_read(tmp_path: Path) -> None:
    """A line in JSON that says so, and nothing else happens."""
    path = tmp_path / "l.db"
    async with running(settings_for("mock:", ledger={"database": f"sqlite:{path}"})) as headrace:
        ledger = headrace.server.core.ledger
        await until(lambda: ledger._waiting)  # its thread has looked at the file once, and would make it anew
        for name in os.listdir(tmp_path):
            (tmp_path / name).unlink()
        answer = await fetch(headrace.front.admin_port, "/admin/spend")
        assert answer.status == 400
        assert "there is no ledger at" in answer.json()["error"]["message"]


@pytest.mark.alone
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_browser_draws_it(tmp_path: Path, scheme: str) -> None:
    """Chromium shows the page in the reader's colours: the paper is white, or nearly black."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium: install the Debian package chromium")
    page = tmp_path / "page.html"
    page.write_text(spend_page.page([group(0, "a", "m", USD)], NOON))
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    process = await asyncio.create_subprocess_exec(
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        *dark,
        "--window-size=200,200",
        f"--screenshot={tmp_path}/page.png",
        page.as_uri(),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await asyncio.wait_for(process.wait(), 50) == 0
    assert corner(tmp_path / "page.png") == ((243, 244, 246) if scheme == "light" else (13, 15, 19))


def corner(picture: Path) -> tuple[int, int, int]:
    """The colour of the first pixel of a PNG with 8 bits a channel."""
    data, at, packed = picture.read_bytes(), 8, b""
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    first = zlib.decompressobj().decompress(packed, 4)
    # Whatever the filter of the first line, its first pixel has no neighbours to differ from.
    return first[1], first[2], first[3]
