"""headrace top and headrace kill, against a real server and on a real terminal."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy import top
from tests.kit.callers import Caller, ask, chat
from tests.kit.fleet import Fleet, fleet
from tests.kit.headrace import ROOT, command, end, running, settings_for, until
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.lab import hold, plays, response
from tests.kit.upstreams import DONE, END, HEAD, Call, chunk, event, scripted

pytestmark = pytest.mark.timeout(60)

HELD = plays(HEAD, chunk(event("a")), hold)
TITLES = ["STREAM", "KEY", "MODEL", "UPSTREAM", "PHASE", "QUEUE", "AGE", "TTFT", "B/S", "IDLE", "BUFFER"]


def stream(number: int = 1, **fields: Any) -> dict[str, Any]:
    """As `GET /admin/streams` lists it."""
    return {
        "id": f"a-{number}",
        "key_id": "k1",
        "model": "gpt-4.1",
        "upstream": "openai",
        "phase": "stream",
        "queue_place": None,
        "age_s": 10.0,
        "ttft_s": 0.4,
        "bytes_out": 5000,
        "idle_s": 0.1,
        "buffered_bytes": 0,
        **fields,
    }


# ── drawing ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_table() -> None:
    """One line a stream under the titles, each figure with its unit."""
    streams = [
        stream(1),
        stream(2, key_id=None, idle_s=250.0, buffered_bytes=1_234_567, age_s=7300, bytes_out=None),
        stream(3, phase="queue", queue_place=2, upstream=None, ttft_s=None, bytes_out=0, age_s=1),
    ]
    titles, *rows = top.table(streams, top.Rates().of(streams, 100.0), 200)
    assert titles.split() == TITLES
    assert rows[0].split() == [
        "a-1",
        "k1",
        "gpt-4.1",
        "openai",
        "stream",
        "-",
        "10.0s",
        "0.4s",
        "500",
        "0.1s",
        "0",
    ]
    assert rows[1].split()[-6:] == ["-", "2h01", "0.4s", "-", "4m10", "1.2M"]
    assert rows[2].split() == ["a-3", "k1", "gpt-4.1", "-", "queue", "2", "1.0s", "-", "0", "0.1s", "0"]


def test_rates_are_between_two_looks() -> None:
    """First since the beginning, then since the look before; each stream has its own."""
    rates = top.Rates()
    assert rates.of([stream(1), stream(2, bytes_out=0)], 100.0) == {"a-1": 500, "a-2": 0}
    later = [stream(1, bytes_out=7000, age_s=12), stream(3, bytes_out=None)]
    assert rates.of(later, 102.0) == {"a-1": 1000, "a-3": None}
    assert rates.of([stream(1, bytes_out=7000, age_s=14)], 104.0) == {"a-1": 0}
    assert top.Rates().of([stream(age_s=0.0)], 5.0) == {"a-1": None}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1.0k"),
        (9_960, "10k"),
        (99_400, "99k"),
        (1_200_000, "1.2M"),
        (3e12, "3T"),
    ],
)
def test_sizes_are_short(value: float, text: str) -> None:
    assert top._size(value) == text


@pytest.mark.parametrize("width", [4, 20, 40, 60, 79, 80, 120])
def test_it_fits(width: int) -> None:
    """No line is wider than the terminal; what matters least goes first, the id never."""
    streams = [stream(number, model="m" * 60) for number in range(3)]
    lines = top.page(streams, {}, width, 24)
    assert max(map(len, lines)) <= width
    assert lines[1].startswith("STREAM"[:width])
    if width >= 60:
        assert {"STREAM", "MODEL", "AGE", "B/S"} <= set(lines[1].split())


def test_what_is_too_much_for_the_screen() -> None:
    """The oldest are shown, and how many are not."""
    streams = [stream(number, age_s=number) for number in range(100)]
    lines = top.page(streams, {}, 120, 24)
    assert len(lines) == 24
    assert lines[2].startswith("a-99 ")
    assert lines[-1] == "… and 79 more"
    assert lines[0].startswith("headrace: 100 running, 100 streaming, 0 waiting")


def test_a_terminal_is_told_nothing_by_names() -> None:
    """A model's name cannot move the cursor."""
    lines = top.table([stream(model="\x1b[2Jgone\n", key_id="k\r")], {}, 200)
    assert all(line.isprintable() for line in lines)
    assert "?[2Jgone?" in lines[1]


# ── what the server says ─────────────────────────────────────────────────────────────────────────────────


async def streams_of(url: str) -> list[dict[str, Any]]:
    answer = await ask(int(url.rpartition(":")[2]), b"GET /admin/streams HTTP/1.1\r\nHost: t\r\n\r\n")
    listed: list[dict[str, Any]] = answer.json()["streams"]
    return listed


async def test_progress_of_a_stream() -> None:
    """Bytes that the caller has, of this request alone; how long nothing was sent; nothing waits."""
    big = event("x" * 5000)
    async with (
        scripted(plays(HEAD, chunk(big), hold)) as upstream,
        running(settings_for(upstream.url)) as headrace,
        await Caller.connect(headrace.port) as caller,
    ):
        for _ in range(2):  # the second one on a connection that has had bytes before
            upstream.script = plays(HEAD + chunk(big), chunk(DONE) + END)
            assert (await caller.ask(chat())).clean
        upstream.script = plays(HEAD, chunk(big), hold)
        await caller.send(chat())
        await caller.piece(await caller.head())
        await until(lambda: headrace.server.streams()[0]["bytes_out"] >= len(big))
        (first,) = await streams_of(headrace.admin_url)
        assert len(big) <= first["bytes_out"] < len(big) + 2000
        assert (first["buffered_bytes"], first["queue_place"], first["phase"]) == (0, None, "stream")
        assert 0 <= first["idle_s"] <= first["age_s"]
        await until(lambda: headrace.server.streams()[0]["idle_s"] > first["idle_s"])
        caller.reset()
        await headrace.quiet()


async def test_a_slow_reader_shows() -> None:
    """What waits for a reader that takes nothing, until it takes it."""

    async def pumps(call: Call) -> None:
        await call.send(HEAD)
        for _ in range(400):
            await call.send(chunk(event("x" * 50_000)))

    async with (
        scripted(pumps) as upstream,
        running(settings_for(upstream.url)) as headrace,
        await Caller.connect(headrace.port, receive_buffer=4096) as caller,
    ):
        caller.writer.transport.pause_reading()
        await caller.send(chat())
        await until(
            lambda: (
                bool(headrace.server.streams()) and headrace.server.streams()[0]["buffered_bytes"] > 50_000
            )
        )
        (seen,) = headrace.server.streams()
        assert seen["bytes_out"] < 400 * 50_000
        caller.reset()
        await headrace.quiet()


async def test_over_a_unix_socket(tmp_path: Path) -> None:
    """There is no TCP to ask; nothing is made up."""
    path = f"{tmp_path}/h.sock"
    async with (
        scripted(HELD) as upstream,
        running(settings_for(upstream.url, listen=f"unix:{path}")) as headrace,
    ):
        caller = Caller(*await asyncio.open_unix_connection(path))
        await caller.send(chat())
        await caller.piece(await caller.head())
        (seen,) = headrace.server.streams()
        assert [seen[name] for name in ("bytes_out", "idle_s", "buffered_bytes")] == [None] * 3
        caller.leave()
        await headrace.quiet()


async def test_places_in_the_queue() -> None:
    """Who waits has a place by arrival; who does not has none."""
    async with (
        scripted(HELD) as upstream,
        running(settings_for(upstream.url, limits={"max_in_flight": 1})) as headrace,
    ):
        callers = [await Caller.connect(headrace.port) for _ in range(4)]
        for number, caller in enumerate(callers):
            await caller.send(chat(f"x-request-id: r{number}"))
            await until(lambda count=number + 1: len(headrace.server.streams()) == count)
        await until(lambda: headrace.state["queued"] == 3)
        listed = await streams_of(headrace.admin_url)
        assert {each["request_id"]: each["queue_place"] for each in listed} == {
            "r0": None,
            "r1": 1,
            "r2": 2,
            "r3": 3,
        }
        for caller in callers:
            caller.reset()
        await headrace.quiet()


# ── the commands ─────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def two_streams(tmp_path: Path) -> AsyncIterator[tuple[Fleet, list[Caller]]]:
    """Two workers, two streams of one key that stand still."""
    async with scripted(HELD) as upstream:
        settings = settings_for(upstream.url, workers=2, auth=auth_section(tmp_path), drain=1)
        key = await make_key(tmp_path)
        async with fleet(tmp_path, settings) as node:
            await node.settle()
            callers = [await Caller.connect(node.port) for _ in range(2)]
            for caller in callers:
                await caller.send(chat(bearer(key)))
                await caller.piece(await caller.head())
            try:
                yield node, callers
            finally:
                for caller in callers:
                    caller.leave()


def admin(node: Fleet) -> tuple[str, ...]:
    return ("--admin", f"http://127.0.0.1:{node.admin_port}/")


async def test_a_table_without_a_terminal(tmp_path: Path) -> None:
    """Both workers' streams, once."""
    async with two_streams(tmp_path) as (node, _), command("top", *admin(node)) as process:
        assert await process.ended() == 0, process.err
        assert process.err == []
        titles, *rows = process.out
        assert titles.split() == TITLES
        assert len(rows) == 2
        assert all(re.match(r"[0-9a-f]+-\d+ +\w+ +m +up +stream +- ", row) for row in rows), rows


async def test_kill(tmp_path: Path) -> None:
    """One stream ends, visibly, for the reason `killed`; the other goes on. There is no second time."""
    async with two_streams(tmp_path) as (node, _):
        victim, other = [each["id"] for each in await node.streams()]
        async with command("kill", victim, *admin(node)) as process:
            assert await process.ended() == 0, process.err
            assert process.out == [f"killed: {victim}"]
        await until(lambda: len(node.logged("request")) == 1)
        assert node.logged("request")[0]["reason"] == "killed"
        assert [each["id"] for each in await node.streams()] == [other]
        async with command("kill", victim, *admin(node)) as process:
            assert await process.ended() == 1
            assert process.out == []
            assert process.err == [f"headrace: no request '{victim}' is running: see `headrace top`"]


@pytest.mark.parametrize("words", [("top",), ("kill", "1-1")])
async def test_no_server(words: tuple[str, ...]) -> None:
    """Said in one line."""
    async with command(*words, "--admin", "127.0.0.1:1") as process:
        assert await process.ended() == 1
        assert process.err == ["headrace: no server answers at 127.0.0.1:1: start it, or give --admin"]


async def test_the_token_is_the_configurations(tmp_path: Path) -> None:
    """Where the admin listener asks for a token, it is sent; a wrong one is said."""
    settings = settings_for("mock:", admin="0.0.0.0:0", admin_token="right")
    async with fleet(tmp_path, settings) as node:
        for token, code in (("right", 0), ("wrong", 1)):
            text = node.file.read_text().replace("admin_token: right", f"admin_token: {token}")
            own = tmp_path / f"{token}.yaml"
            own.write_text(text)
            for words in (("top",), ("kill", "1-1")):
                async with command("-c", str(own), *words, *admin(node)) as process:
                    assert await process.ended() == (code if words == ("top",) else 1)
                if code:
                    assert process.err == ["headrace: the admin listener answered 401: invalid admin token"]
        verify = ("usage", "--verify", "--admin", f"127.0.0.1:{node.admin_port}")
        async with command("-c", str(own), *verify) as process:
            assert await process.ended() == 1
        assert process.err[0].endswith("answers 401: is admin_token the running server's?")


@pytest.mark.parametrize("words", [("top",), ("kill", "1-1"), ("reload",)])
async def test_another_server(words: tuple[str, ...]) -> None:
    """Said in one line."""
    async with scripted(plays(response(502, b"<html>Bad Gateway</html>"))) as server:
        address = server.url.removeprefix("http://").partition("/")[0]
        async with command(*words, "--admin", address) as process:
            assert await process.ended() == 1
    assert process.err == ["headrace: the admin listener answered 502: not Headrace's admin listener"]


# ── on a terminal ────────────────────────────────────────────────────────────────────────────────────────


class Terminal:
    """A pseudo-terminal with a program on it."""

    def __init__(
        self, process: asyncio.subprocess.Process, master: int, slave: int, before: list[Any]
    ) -> None:
        self.process = process
        self.master = master
        self.slave = slave
        self.before = before  # the terminal's settings
        self.shown = b""

    def read(self) -> None:
        try:
            self.shown += os.read(self.master, 65536)
        except OSError:
            asyncio.get_running_loop().remove_reader(self.master)

    def resize(self, columns: int, rows: int = 24) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    async def shows(self, wanted: Callable[[bytes], bool], since: int = 0) -> None:
        await until(lambda: wanted(self.shown[since:]), 25, lambda: repr(self.shown[-500:]))

    async def ended(self) -> int:
        async with asyncio.timeout(20):
            return await self.process.wait()


@asynccontextmanager
async def terminal(
    *words: str, cwd: Path, columns: int = 120, keyboard: bool = True
) -> AsyncIterator[Terminal]:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", *words),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=slave if keyboard else asyncio.subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
    )
    it = Terminal(process, master, slave, before)
    it.resize(columns)
    loop = asyncio.get_running_loop()
    loop.add_reader(master, it.read)
    try:
        yield it
    finally:
        await end(process.send_signal, lambda: process.returncode is not None)
        await process.wait()
        loop.remove_reader(master)
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("how", ["q", "SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
async def test_live(tmp_path: Path, how: str) -> None:
    """It redraws, and leaves the terminal as it was, whichever way it ends."""
    async with (
        two_streams(tmp_path) as (node, callers),
        terminal("top", *admin(node), cwd=tmp_path) as it,
    ):
        await it.shows(lambda seen: b"2 running, 2 streaming" in seen)
        assert termios.tcgetattr(it.slave) != it.before
        os.write(it.master, b"x")  # means nothing
        callers[0].leave()
        await it.shows(lambda seen: b"1 running, 1 streaming" in seen)
        if how == "q":
            os.write(it.master, b"q")
        else:
            it.process.send_signal(signal.Signals[how])
        assert await it.ended() == 0
        assert termios.tcgetattr(it.slave) == it.before
        await it.shows(lambda seen: seen.endswith(b"\x1b[?25h\x1b[?1049l"))
        assert it.shown.startswith(b"\x1b[?1049h\x1b[?25l")
        assert b"\x1b[7mSTREAM" in it.shown


async def test_live_without_a_keyboard(tmp_path: Path) -> None:
    """As from a script: it shows, and ends by a signal."""
    async with (
        running(settings_for("mock:")) as here,
        terminal("top", "--admin", here.admin_url, cwd=tmp_path, keyboard=False) as it,
    ):
        await it.shows(lambda seen: b"0 running" in seen)
        it.process.send_signal(signal.SIGTERM)
        assert await it.ended() == 0
        assert termios.tcgetattr(it.slave) == it.before


async def test_live_adapts_and_outlives_the_server(tmp_path: Path) -> None:
    """A narrower window takes effect at once; a server that goes away is said, one that is back is shown."""
    async with two_streams(tmp_path) as (node, _), terminal("top", *admin(node), cwd=tmp_path) as it:
        await it.shows(lambda seen: b"UPSTREAM" in seen)
        mark = len(it.shown)
        it.resize(40)
        it.process.send_signal(signal.SIGWINCH)
        await it.shows(lambda seen: seen.count(b"STREAM  ") >= 2 and b"UPSTREAM" not in seen[-300:], mark)
        os.kill(node.pid, signal.SIGKILL)
        await it.shows(lambda seen: b"no server answers at 127.0.0.1" in seen, mark)
        os.write(it.master, b"q")
        assert await it.ended() == 0
