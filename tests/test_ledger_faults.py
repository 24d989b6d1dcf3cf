"""A database that is locked, full, read-only, damaged or gone costs rows at most, never a request (fault 29);
a process that is killed loses what it was doing (fault 24)."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.kit.callers import ask, chat
from tests.kit.fleet import fleet
from tests.kit.headrace import ROOT, running, settings_for, until
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.ledger import by_id, opened, row, written

pytestmark = pytest.mark.timeout(60)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program holds the database for itself."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


async def test_locked(tmp_path: Path) -> None:
    """Requests are served meanwhile, their rows wait and are written afterwards; one line for the outage, one
    for its end."""
    path = tmp_path / "l.db"
    settings = settings_for("mock:", ledger={"database": f"sqlite:{path}"})
    async with running(settings) as headrace:
        with capture_logs() as lines, locked(path):
            for _ in range(10):
                assert (await ask(headrace.port, chat(stream=False))).status == 200
            await until(lambda: len(lines) == 1, 10)
            assert headrace.state["ledger_pending"] == 10
            assert (await headrace.metrics())["headrace_ledger_pending"] == 10
            assert written(path) == []  # readers are not locked out
        await until(lambda: headrace.state["ledger_pending"] == 0, 20)
        assert len(written(path)) == 10
    assert [line["event"] for line in lines] == ["ledger_unavailable"]
    assert lines[0]["why"] == "database is locked"


async def test_memory_is_bounded(tmp_path: Path) -> None:
    """Past the bound the newest rows are dropped, counted, and told once, at the end."""
    path, rows = tmp_path / "l.db", [row() for _ in range(130)]
    with capture_logs() as lines:
        async with opened(path, limit=100) as ledger:
            with locked(path):
                for each in rows:
                    ledger.add(each)
                assert (ledger.pending, ledger.dropped) == (100, 30)
                await until(lambda: [line["event"] for line in lines] == ["ledger_unavailable"], 10)
            await until(lambda: ledger.pending == 0, 20)
            await until(lambda: len(lines) == 2)
            assert lines[1]["event"] == "ledger_available"
            assert lines[1]["dropped_rows"] == 30
            assert written(path) == by_id(rows[:100])


async def test_the_end_does_not_wait_for_ever(tmp_path: Path) -> None:
    """A database that stays locked holds a shutdown up for its bound, and what is lost is said."""
    path = tmp_path / "l.db"
    with capture_logs() as lines:
        async with opened(path) as ledger:
            with locked(path):
                ledger.add(row())
                async with asyncio.timeout(15):
                    await ledger.close(0.3)
            assert ledger.dropped == 1
    assert lines[-1]["event"] == "ledger_rows_lost"
    assert lines[-1]["rows"] == 1


async def test_a_start_while_it_is_locked(tmp_path: Path) -> None:
    """The server serves; its rows are written when the other has finished."""
    path = tmp_path / "l.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    settings = settings_for("mock:", ledger={"database": f"sqlite:{path}"})
    with ExitStack() as lock:
        lock.enter_context(locked(path))
        async with running(settings) as headrace:
            assert (await ask(headrace.port, chat(stream=False))).status == 200
            assert headrace.state["ledger_pending"] == 1
            lock.close()
            await until(lambda: headrace.state["ledger_pending"] == 0, 20)
            assert len(written(path)) == 1


async def test_disk_full(tmp_path: Path) -> None:
    """The file may not grow: requests go on and rows wait; when there is room all of them are written, none
    twice, and the file is whole."""
    path = tmp_path / "headrace.db"
    async with fleet(tmp_path, settings_for("mock:", log={"level": "warning"})) as server:
        assert (await ask(server.port, chat("Connection: close", stream=False))).status == 200
        await until(lambda: len(written(path)) == 1, 10)
        hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (4096, hard))
        for _ in range(30):
            assert (await ask(server.port, chat("Connection: close", stream=False))).status == 200
        async with asyncio.timeout(10):
            while (await server.state())["ledger_pending"] != 30:
                await asyncio.sleep(0.02)
        await until(lambda: len(server.logged("ledger_unavailable")) == 1, 10)
        assert await server.total("headrace_ledger_pending") == 30
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))
        await until(lambda: len(written(path)) == 31, 30)
        assert await server.total("headrace_ledger_dropped_total") == 0
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@contextmanager
def nothing_may_be_made(folder: Path) -> Iterator[None]:
    """The folder is as on a read-only file system; for root, who may write everywhere else, it is one."""
    if os.getuid():
        files = [(file, file.with_name(f"kept-{file.name}")) for file in folder.iterdir()]
        for here, aside in files:
            here.rename(aside)
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        for here, aside in files:
            aside.rename(here)
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("root without the right to mount: run as another user")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


async def test_read_only(tmp_path: Path) -> None:
    """The file is gone and cannot be made; when it is back the rows are written into it."""
    folder = tmp_path / "data"
    folder.mkdir()
    path, rows = folder / "l.db", [row() for _ in range(20)]
    with capture_logs() as lines:
        async with opened(path) as ledger:
            ledger.add(rows[0])
            await until(lambda: ledger.pending == 0)
            with nothing_may_be_made(folder):
                for each in rows[1:]:
                    ledger.add(each)
                await until(lambda: [line["event"] for line in lines] == ["ledger_unavailable"], 10)
                assert ledger.pending == 19
            await until(lambda: ledger.pending == 0, 20)
            assert written(path) == by_id(rows)


async def test_damaged(tmp_path: Path) -> None:
    """A file that is no database any more: rows wait until somebody has moved it away."""
    path, rows = tmp_path / "l.db", [row() for _ in range(3)]
    async with opened(path) as ledger:
        ledger.add(rows[0])
        await until(lambda: ledger.pending == 0)
        for file in ("l.db", "l.db-wal", "l.db-shm"):
            (tmp_path / file).rename(tmp_path / f"kept-{file}")
        (tmp_path / "garbage").write_bytes(b"no database" * 500)
        shutil.move(tmp_path / "garbage", path)
        with capture_logs() as lines:
            ledger.add(rows[1])
            await until(lambda: [line["event"] for line in lines] == ["ledger_unavailable"], 10)
            assert lines[0]["why"] == "file is not a database"
        assert ledger.pending == 1
        path.unlink()
        ledger.add(rows[2])
        await until(lambda: ledger.pending == 0, 20)
        assert written(path) == by_id(rows[1:])
        assert written(tmp_path / "kept-l.db") == rows[:1]


async def test_a_callers_usage_of_a_damaged_file(tmp_path: Path) -> None:
    """Unknown is not nothing: 503, and the requests themselves go on."""
    key = await make_key(tmp_path)
    ledger = {"ledger": {"database": f"sqlite:{tmp_path}/l.db"}, "auth": auth_section(tmp_path)}
    async with running(settings_for("mock:", **ledger)) as here:
        for file in ("l.db", "l.db-wal", "l.db-shm"):
            (tmp_path / file).rename(tmp_path / f"kept-{file}")
        (tmp_path / "l.db").write_bytes(b"no database" * 500)
        head = f"GET /v1/usage HTTP/1.1\r\nHost: h\r\n{bearer(key)}\r\nConnection: close\r\n\r\n"
        answer = await ask(here.port, head.encode())
        assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
        assert (await ask(here.port, chat(bearer(key)))).status == 200
        (tmp_path / "l.db").unlink()
        await until(lambda: here.state["ledger_pending"] == 0, 20)


# A writer that says which rows are safe: what it has said must be there, whenever it is killed.
_WRITER = """
import asyncio, sys
from pathlib import Path
from proxy.ledger import Ledger
from tests.kit.ledger import row

async def main() -> None:
    ledger = Ledger(Path(sys.argv[1]), 400)
    await ledger.start()
    added = []
    while True:
        for _ in range(40):
            fresh = row()
            added.append(fresh.id)
            ledger.add(fresh)
        await asyncio.sleep(0.002)
        safe = len(added) - ledger.pending
        print("\\n".join(added[:safe]), flush=True) if safe else None
        del added[:safe]

asyncio.run(main())
"""


@pytest.mark.parametrize("seed", range(4))
async def test_killed_in_the_middle(tmp_path: Path, seed: int) -> None:
    """SIGKILL at any moment: every row that was safe is there, once, and the next writer goes on."""
    path = tmp_path / "l.db"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _WRITER,
        str(path),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    safe = [(await process.stdout.readline()).decode().strip()]
    kill_at = time.monotonic() + 0.3 + random.Random(seed).random() / 2
    while time.monotonic() < kill_at:
        safe.append((await process.stdout.readline()).decode().strip())
    process.send_signal(signal.SIGKILL)
    rest = (await process.stdout.read()).decode()
    await process.wait()
    safe += [line for line in rest.split("\n")[:-1] if line]
    again = row()
    async with opened(path) as ledger:
        ledger.add(again)
        await until(lambda: ledger.pending == 0)
    ids = [each.id for each in written(path)]
    assert len(safe) > 100
    assert len(ids) == len(set(ids))
    assert set(safe) | {again.id} <= set(ids)
