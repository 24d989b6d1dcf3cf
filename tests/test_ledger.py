"""The ledger: rows, each once, in a file that others may read; where they come from, and what becomes old."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from proxy import ledger_link, ledger_read
from proxy.control import Channel
from proxy.errors import StartError
from proxy.ledger import Ledger
from proxy.ledger_file import LedgerFile
from proxy.ledger_link import LedgerLink
from proxy.ledger_read import LedgerFailed
from proxy.ledger_row import MOST, UNIQUE_BYTES, first_id, row_id, storable
from tests.kit.callers import Caller, ask, chat
from tests.kit.fleet import LOOK_EVERY_S, fleet, write
from tests.kit.headrace import running, settings_for, until
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.ledger import by_id, opened, row, unknown, written
from tests.kit.upstreams import DONE, END, HEAD, Call, chunk, event, scripted

pytestmark = pytest.mark.timeout(60)

DAY_S = 86400
PRICED = {"m": {"upstreams": ["up"], "price": {"input": 2, "output": 32}}}


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


async def settled(ledger: Ledger | LedgerLink) -> None:
    await until(lambda: ledger.pending == 0, 10)


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_every_field_comes_back(tmp_path: Path) -> None:
    """Known, unknown and estimated, in the order of their start; alone and by the thousand."""
    path = tmp_path / "l.db"
    rows = [row(), unknown(), row(usage_source="estimated", stream=False, cost_picos=MOST), row(caller="ü|☃")]
    async with opened(path) as ledger:
        for each in rows:
            ledger.add(each)
        await settled(ledger)
        assert written(path) == by_id(rows)
        more = [row() for _ in range(3000)]
        for each in more:
            ledger.add(each)
        await settled(ledger)
        assert written(path) == by_id(rows + more)
        assert (ledger.added, ledger.dropped) == (3004, 0)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 33])
def test_rows_in_one_statement(count: int, tmp_path: Path) -> None:
    """Whether a row shares its statement with others or has one of its own: it is written once, and one that
    no database can hold spoils nobody else's."""
    path, rows = tmp_path / "l.db", [row() for _ in range(count)]
    with closing(LedgerFile(path)) as file:
        assert file.insert(rows) == 0
        assert file.insert(list(reversed(rows))) == 0
        assert written(path) == by_id(rows)
        more = [row() for _ in range(count)]
        assert file.insert([*more, row(caller="\ud800")]) == 1
        assert written(path) == by_id(rows + more)


async def test_a_row_is_written_once(tmp_path: Path) -> None:
    """However often it is handed over, to whichever of two writers of one file."""
    path, rows = tmp_path / "l.db", [row() for _ in range(700)]
    async with opened(path) as one, opened(path) as other:
        for each in rows:
            one.add(each)
            other.add(each)
            one.add(each)
        await settled(one)
        await settled(other)
        assert written(path) == by_id(rows)


async def test_close_writes_what_waits(tmp_path: Path) -> None:
    """Added and closed in the same breath."""
    path, rows = tmp_path / "l.db", [row() for _ in range(2000)]
    async with opened(path) as ledger:
        for each in rows:
            ledger.add(each)
    assert written(path) == by_id(rows)
    assert ledger.pending == 0


async def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    """Mode 0600, the files beside it too; an existing file keeps its mode."""
    path = tmp_path / "l.db"
    async with opened(path) as ledger:
        ledger.add(row())
        await settled(ledger)
        modes = {file.name: file.stat().st_mode & 0o777 for file in files_in(tmp_path)}
        assert modes == {"l.db": 0o600, "l.db-wal": 0o600, "l.db-shm": 0o600}


async def test_a_row_that_no_database_can_hold(tmp_path: Path) -> None:
    """Half a surrogate pair, a number past 64 bits: it is dropped and counted, its neighbours are written."""
    path, good = tmp_path / "l.db", [row() for _ in range(5)]
    with structlog.testing.capture_logs() as lines:
        async with opened(path) as ledger:
            for each in (*good[:3], row(caller="\ud800"), row(cost_picos=MOST + 1), *good[3:]):
                ledger.add(each)
            await settled(ledger)
            await until(lambda: ledger.dropped == 2)
            await until(lambda: bool(lines))
    assert written(path) == by_id(good)
    assert [line["event"] for line in lines].count("ledger_rows_spoiled") == len(lines)
    assert sum(line["rows"] for line in lines) == 2


async def test_old_rows_go(tmp_path: Path) -> None:
    """In steps, and only the old ones; with a shorter `keep_days` more of them."""
    path, now = tmp_path / "l.db", time.time()
    old = [row(now - 11 * DAY_S) for _ in range(1700)]
    young = [row(now - 9 * DAY_S) for _ in range(40)]
    async with opened(path) as ledger:
        for each in old + young:
            ledger.add(each)
        await settled(ledger)
        assert len(written(path)) == 1740
    async with opened(path, keep_days=10):
        await until(lambda: len(written(path)) == 40, 20)
    assert written(path) == by_id(young)


MOMENTS = st.integers(0, 4_000_000_000_000).map(lambda ms: ms / 1000)


@given(MOMENTS, st.floats(0, 4e9), st.binary(min_size=UNIQUE_BYTES, max_size=UNIQUE_BYTES))
def test_an_id_knows_when(moment: float, started_at: float, random: bytes) -> None:
    """A range of time is a range of ids, exactly to the millisecond."""
    found = row_id(started_at, int.from_bytes(random, "big"))
    assert len(found) == 32
    assert (found >= first_id(moment)) == (int(started_at * 1000) >= int(moment * 1000))


def test_a_cost_that_cannot_be_true() -> None:
    assert storable(MOST) == MOST
    assert storable(MOST + 1) is None
    assert storable(None) is None


@pytest.mark.alone
async def test_handing_over_costs_little(tmp_path: Path) -> None:
    """A few microseconds of the loop, also for the row that has to wake the writer."""
    async with opened(tmp_path / "l.db") as ledger:
        took = []
        for _ in range(5):
            rows = [row() for _ in range(2000)]
            began = time.perf_counter()
            for each in rows:
                ledger.add(each)
            took.append((time.perf_counter() - began) / len(rows))
            await settled(ledger)
        assert min(took) < 5e-6


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("keys_first", [True, False])
async def test_keys_live_in_the_same_file(tmp_path: Path, keys_first: bool) -> None:
    """Whoever makes it, both find their tables, and each its own version."""
    path = tmp_path / "keys.db"  # the one that `make_key` uses
    if keys_first:
        await make_key(tmp_path)
        assert ledger_read.grouped([path], (), None, None) == []
    async with opened(path) as ledger:
        ledger.add(row())
        await settled(ledger)
        await make_key(tmp_path)
        ledger.add(row())
        await settled(ledger)
    assert len(written(path)) == 2
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert connection.execute("SELECT count(*) FROM api_keys").fetchone() == (1 + keys_first,)


async def refused(path: Path) -> str:
    with pytest.raises(StartError) as error:
        await Ledger(path, 400).start()
    assert "\n" not in str(error.value)
    return str(error.value)


async def test_what_has_to_be_mended_by_hand(tmp_path: Path) -> None:
    """One line each, that names the fix; nothing is touched."""
    assert "does not exist: make it" in await refused(tmp_path / "no" / "l.db")
    (tmp_path / "garbage.db").write_bytes(b"this is no database\n" * 100)
    assert "no SQLite database: move it away" in await refused(tmp_path / "garbage.db")
    newer = tmp_path / "newer.db"
    with closing(sqlite3.connect(newer)) as connection:
        connection.execute("PRAGMA user_version = 2")
        connection.commit()
    assert "newer Headrace (ledger of version 2, this one knows 1): upgrade" in await refused(newer)
    with pytest.raises(LedgerFailed, match="newer Headrace"):
        ledger_read.grouped([newer], (), None, None)
    (tmp_path / "folder.db").mkdir()
    assert "name another file" in await refused(tmp_path / "folder.db")


async def test_the_server_does_not_start_without_it(tmp_path: Path) -> None:
    settings = settings_for("mock:", ledger={"database": f"sqlite:{tmp_path}/no/l.db"})
    with pytest.raises(StartError, match=r"ledger\.database: the folder .* does not exist"):
        async with running(settings):
            pass


async def test_a_reload_keeps_the_file(tmp_path: Path) -> None:
    """Another file needs a restart; another `keep_days` is used at once."""
    settings = settings_for("mock:", ledger={"database": f"sqlite:{tmp_path}/headrace.db"})
    async with fleet(tmp_path, settings) as server:
        write(server.file, {**settings, "ledger": {"database": f"sqlite:{tmp_path}/other.db"}})
        code, _, err = await server.tell("reload")
        assert code == 1
        assert "ledger.database: cannot change while running: use `headrace restart`" in err[0]
        write(server.file, {**settings, "ledger": {**settings["ledger"], "keep_days": 30}})
        assert (await server.tell("reload"))[0] == 0
        assert not (tmp_path / "other.db").exists()


async def test_a_file_that_was_moved(tmp_path: Path) -> None:
    """The next row makes a new one; nothing is written into the old one under its new name."""
    path, rows = tmp_path / "l.db", [row(), row()]
    async with opened(path) as ledger:
        ledger.add(rows[0])
        await settled(ledger)
        for file in files_in(tmp_path):
            file.rename(tmp_path / file.name.replace("l.db", "old.db"))
        ledger.add(rows[1])
        await settled(ledger)
        assert written(path) == [rows[1]]
        assert written(tmp_path / "old.db") == [rows[0]]


# ── what a caller has used ───────────────────────────────────────────────────────────────────────────────


async def test_usage_of_one_caller(tmp_path: Path) -> None:
    """Others' rows and earlier ones are not in it; what is still on its way is, once."""
    path, now = tmp_path / "l.db", time.time()
    async with opened(path) as ledger:
        nothing = await ledger.usage_of("key:a", now - 60)
        assert (nothing.requests, nothing.cost_picos) == (0, 0)
        for each in (row(now), row(now, caller="key:b"), row(now - 120), unknown(now)):
            ledger.add(each)
        spent = await ledger.usage_of("key:a", now - 60)  # whether they are in the file yet or not
        assert (spent.requests, spent.unknown, spent.cost_picos) == (2, 1, 7_000)
        assert (spent.prompt_tokens, spent.cached_tokens, spent.completion_tokens) == (10, 4, 5)
        await settled(ledger)
        assert await ledger.usage_of("key:a", now - 60) == spent
    pending = [row(now), row(now, caller="key:b")]
    both = ledger_read.usage_of(path, "key:a", now - 60, [*written(path), *pending])
    assert (both.requests, both.cost_picos) == (3, 14_000)


async def test_spending_of_all_callers(tmp_path: Path) -> None:
    """Day and month of each caller and plan, exact beyond 64 bits; open mode has no callers."""
    path, now = tmp_path / "l.db", time.time()
    day, month = now - 100, now - 1000
    rows = [row(now, cost_picos=MOST) for _ in range(3)]
    rows += [
        row(now - 500, cost_picos=1),
        row(now - 2000),
        row(now, caller="key:b", plan="basic"),
        unknown(now),
    ]
    rows += [row(now, caller="", plan="")]
    assert ledger_read.spending(path, day, month) == []
    async with opened(path) as ledger:
        for each in rows:
            ledger.add(each)
        await settled(ledger)
    found = {(s.caller, s.plan): (s.day_picos, s.month_picos) for s in ledger_read.spending(path, day, month)}
    assert found == {("key:a", "pro"): (3 * MOST, 3 * MOST + 1), ("key:b", "basic"): (7000, 7000)}


# ── from a worker ────────────────────────────────────────────────────────────────────────────────────────


class Supervisor:
    """The other end of a link: takes rows, or does not."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.willing = True
        self.deaf = False  # takes them, and its answer is lost
        self.calls = 0

    async def answer(self, verb: str, payload: Any) -> Any:
        assert verb == ledger_link.LEDGER
        self.calls += 1
        if not self.willing:
            raise ValueError("not now")
        taken = ledger_link.take(self.ledger, payload)
        if self.deaf:
            raise ValueError("the answer is lost")
        return taken


async def linked(tmp_path: Path, ledger: Ledger, **options: Any) -> tuple[LedgerLink, Supervisor, Channel]:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    supervisor = Supervisor(ledger)
    far = await Channel.open(theirs, supervisor.answer, lambda *_: None)
    near = await Channel.open(ours, supervisor.answer, lambda *_: None)
    return LedgerLink(near, tmp_path / "l.db", **options), supervisor, far


async def test_rows_of_a_worker(tmp_path: Path) -> None:
    """A thousand and one; one that no message can hold costs nothing but itself; close waits for all."""
    rows = [row() for _ in range(1001)]
    async with opened(tmp_path / "l.db") as ledger:
        link, _, far = await linked(tmp_path, ledger)
        for each in rows:
            link.add(each)
        link.add(row(caller="\ud800"))
        await link.close()
        assert (link.pending, link.dropped, link.added) == (0, 1, 1002)
        await settled(ledger)
        assert written(tmp_path / "l.db") == by_id(rows)
        far.close()


async def test_a_supervisor_that_does_not_take_them(tmp_path: Path) -> None:
    """They are kept and sent again; what arrived although nobody said so is written once; past the bound the
    newest are dropped."""
    rows = [row() for _ in range(20)]
    async with opened(tmp_path / "l.db") as ledger:
        link, supervisor, far = await linked(tmp_path, ledger, limit=20)
        supervisor.willing = False
        for each in [*rows, row(), row()]:
            link.add(each)
        await until(lambda: supervisor.calls > 1)
        assert (link.pending, link.dropped, ledger.added) == (20, 2, 0)
        assert (await link.usage_of("key:a", 0)).requests == 20
        supervisor.willing = supervisor.deaf = True
        await until(lambda: ledger.added > 20, 10)
        supervisor.deaf = False
        await settled(link)
        await settled(ledger)
        assert written(tmp_path / "l.db") == by_id(rows)
        await link.close()
        far.close()


async def test_close_does_not_wait_for_ever(tmp_path: Path) -> None:
    async with opened(tmp_path / "l.db") as ledger:
        link, supervisor, far = await linked(tmp_path, ledger)
        supervisor.willing = False
        link.add(row())
        async with asyncio.timeout(5):
            await link.close(0.2)
        assert link.dropped == 1
        far.close()


async def test_close_does_not_wait_for_a_supervisor_that_is_gone(tmp_path: Path) -> None:
    """Gone before, or while it waits: the rows are lost at once, and counted."""
    async with opened(tmp_path / "l.db") as ledger:
        for gone_before in (True, False):
            link, supervisor, far = await linked(tmp_path, ledger)
            supervisor.willing = False
            link.add(row())
            await until(lambda it=supervisor: it.calls > 0)  # type: ignore[misc]  # a default binds the value of now
            closing = None if gone_before else asyncio.ensure_future(link.close(600))
            await asyncio.sleep(0)
            far.close()
            async with asyncio.timeout(10):
                await (closing or link.close(600))
            assert (link.pending, link.dropped) == (1, 1)


# ── through a running server ─────────────────────────────────────────────────────────────────────────────


async def test_a_request_leaves_a_row(tmp_path: Path) -> None:
    """What reached an upstream, and nothing else; a caller that repeats its request id changes nothing."""
    path = tmp_path / "l.db"
    settings = settings_for(
        "mock:",
        models=PRICED,
        auth=auth_section(tmp_path),
        ledger={"database": f"sqlite:{path}"},
    )
    key = await make_key(tmp_path)
    async with running(settings) as headrace:
        before = time.time()
        for _ in range(2):
            request = chat(bearer(key), "x-request-id: same", "x-mock: words=7", stream=False)
            assert (await ask(headrace.port, request)).status == 200
        assert (await ask(headrace.port, chat(bearer(key), model="nothing"))).status == 404
        assert (await ask(headrace.port, chat())).status == 401
        await until(lambda: headrace.state["ledger_pending"] == 0 and len(written(path)) == 2)
        one, other = written(path)
        metrics = await headrace.metrics()
    assert one.id != other.id
    assert {one.request_id, other.request_id} == {"same"}
    assert before - 0.01 <= one.started_at <= one.ended_at <= time.time()
    assert (one.key_id, one.caller, one.plan) == (key.split("_")[1], f"key:{key.split('_')[1]}", "enterprise")
    assert (one.route, one.model, one.upstream) == ("/v1/chat/completions", "m", "up")
    assert (one.status, one.reason, one.attempts, one.stream) == (200, "complete", 1, False)
    assert (one.prompt_tokens, one.completion_tokens, one.usage_source) == (1, 7, "reported")
    assert one.cost_picos == 1 * 2_000_000 + 7 * 32_000_000
    assert metrics["headrace_ledger_rows_total"] == 2
    assert metrics["headrace_ledger_dropped_total"] == metrics["headrace_ledger_pending"] == 0


class Held:
    """Whole answers at once; streams stay open after their first event until the test lets them go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, call: Call) -> None:
        if b'"stream": true' not in call.body:
            await call.send(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
            )
            return
        await call.send(HEAD + chunk(event("a")))
        await self.go.wait()
        await call.send(chunk(DONE) + END)


@pytest.mark.parametrize("workers", [1, 2])
async def test_every_worker_and_every_generation(tmp_path: Path, workers: int) -> None:
    """Rows of all workers, of streams that end in the old generation after a restart, of a drain."""
    script, path = Held(), tmp_path / "headrace.db"
    async with (
        scripted(script) as upstream,
        fleet(tmp_path, settings_for(upstream.url, workers=workers)) as server,
    ):
        caller = await Caller.connect(server.port)
        await caller.send(chat())
        answer = await caller.head()
        await caller.piece(answer)
        for _ in range(30):
            assert (await ask(server.port, chat("Connection: close", stream=False))).status == 200
        await until(lambda: len(written(path)) == 30, 10)
        code, out, err = await server.tell("restart")
        assert (code, err) == (0, [])
        heir = int(out[0].removeprefix("pid: "))
        assert (await ask(server.port, chat("Connection: close", stream=False))).status == 200
        await until(lambda: len(written(path)) == 31, 10)
        script.go.set()
        await caller.rest(answer)
        caller.leave()
        await until(lambda: len(written(path)) == 32, 10)
        await asyncio.wait_for(server.first.process.wait(), 20)
        async with asyncio.timeout(10):  # a worker that is slow to answer counts with what it said last
            while await server.total("headrace_ledger_rows_total") != 32:
                await asyncio.sleep(LOOK_EVERY_S)
        last = await Caller.connect(server.port)
        script.go.clear()
        await last.send(chat())
        held = await last.head()
        await last.piece(held)
        os.kill(heir, signal.SIGTERM)
        script.go.set()
        await last.rest(held)
        last.leave()
        await server.all_gone(20)
    assert len(written(path)) == 33
    assert sum(each.stream for each in written(path)) == 2


async def test_a_killed_worker_loses_only_what_it_was_doing(tmp_path: Path) -> None:
    """SIGKILL right after an answer: that request's row is there, its open stream's is not (fault 24)."""
    script, path = Held(), tmp_path / "headrace.db"
    async with (
        scripted(script) as upstream,
        fleet(tmp_path, settings_for(upstream.url, workers=2)) as server,
        await Caller.connect(server.port) as caller,
    ):
        await caller.send(chat())
        await caller.piece(await caller.head())
        for _ in range(40):
            assert (await ask(server.port, chat("Connection: close", stream=False))).status == 200
        # A row leaves its worker within 10 ms; the counters are of the same moment.
        await until(lambda: len(written(path)) == 40, 10)
        for pid in server.workers():
            os.kill(pid, signal.SIGKILL)
        await until(lambda: len(server.logged("worker_replaced")) == 2, 20)
        await server.settle(2)
        assert (await ask(server.port, chat("Connection: close", stream=False))).status == 200
        await until(lambda: len(written(path)) == 41, 10)
        assert not any(each.stream for each in written(path))
