"""Key stores: one suite for both, then processes, files and faults; the cache that follows; the pepper."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
import structlog

from proxy import stores
from proxy.errors import StartError
from proxy.identity import KeyRecord
from proxy.keys import POLL_S, KeyCache, load_pepper
from proxy.keystore import open_store, opened
from proxy.keystore.base import Cursor, IdTaken, KeyStore, KeyStoreFailed, NewSecret
from proxy.schema import Limits
from tests.kit.headrace import ROOT, end, until
from tests.kit.redis import RedisServer, redis_server

NOW = 1_800_000_000.0


def record(key_id: str, **fields: object) -> KeyRecord:
    base = KeyRecord(id=key_id, name=key_id, digest=b"\0\xff" * 16, pepper_id="p", plan="pro", created_at=NOW)
    return msgspec.structs.replace(base, **fields)


FULL = record(
    "full",
    models=("gpt-4.1", "claude-*"),
    ip=("10.0.0.0/8",),
    created_at=NOW + 0.125,
    expires_at=NOW + 60.5,
    budget_day_usd=Decimal("0.10"),
    budget_month_usd=Decimal("123456789012.123456"),
)


@pytest.fixture(params=["sqlite", "redis"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """An empty store."""
    if request.param == "sqlite":
        yield f"sqlite:{tmp_path / 'keys.db'}"
        return
    async with redis_server() as server:
        yield server.url


@pytest.fixture
async def store(url: str) -> AsyncIterator[KeyStore]:
    async with opened(url) as store:
        yield store


@contextlib.asynccontextmanager
async def cache(url: str, poll_s: float = POLL_S) -> AsyncIterator[KeyCache]:
    """A running cache with a store of its own."""
    running = KeyCache(open_store(url), poll_s)
    await running.start()
    try:
        yield running
    finally:
        await running.close()


@contextlib.asynccontextmanager
async def python(code: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another process that runs `async def main(*arguments)`."""
    frame = f"import asyncio, sys\n{code}\nasyncio.run(main(*sys.argv[1:]))\n"
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", frame, *arguments, cwd=ROOT, stdin=pipe, stdout=pipe
    )
    try:
        yield process
    finally:
        await end(process.send_signal, lambda: process.returncode is not None)
        await process.communicate()


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(20):
        return (await process.stdout.readline()).decode().strip()


# ── the verbs ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_record_comes_back_as_it_was(store: KeyStore) -> None:
    """Money to the last digit, times to the millisecond, bytes as bytes."""
    assert await store.get("full") is None
    assert await store.list_all() == []
    await store.create(FULL)
    assert await store.get("full") == FULL
    assert str((await store.list_all())[0].budget_day_usd) == "0.10"


async def test_an_id_is_given_once(store: KeyStore) -> None:
    await store.create(FULL)
    with pytest.raises(IdTaken):
        await store.create(record("full", name="another"))
    assert await store.list_all() == [FULL]


async def test_the_oldest_comes_first(store: KeyStore) -> None:
    for number, key_id in enumerate(("c", "a", "b")):
        await store.create(record(key_id, created_at=NOW + number))
    assert [one.id for one in await store.list_all()] == ["c", "a", "b"]


async def test_revoking_keeps_the_first_date(store: KeyStore) -> None:
    await store.create(FULL)
    first = await store.revoke("full", NOW + 1)
    assert first == msgspec.structs.replace(FULL, revoked_at=NOW + 1)
    assert await store.revoke("full", NOW + 2) == first
    assert await store.get("full") == first
    assert await store.revoke("nobody", NOW) is None


async def test_rotating_changes_the_secret_only_and_not_of_a_revoked_key(store: KeyStore) -> None:
    await store.create(FULL)
    fresh = NewSecret(b"n" * 32, "q")
    changed = msgspec.structs.replace(FULL, digest=b"n" * 32, pepper_id="q")
    assert await store.rotate("full", fresh) == changed
    assert await store.get("full") == changed
    revoked = await store.revoke("full", NOW)
    assert await store.rotate("full", NewSecret(b"m" * 32, "q")) == revoked
    assert await store.rotate("nobody", fresh) is None


async def test_changes_since_a_cursor(store: KeyStore) -> None:
    """First everything, then what was written since, each record once, in its last state."""
    await store.create(record("a"))
    await store.create(record("b"))
    first = await store.changes(Cursor())
    assert (first.whole, {one.id for one in first.records}) == (True, {"a", "b"})
    nothing = await store.changes(first.cursor)
    assert (nothing.whole, nothing.records, nothing.cursor) == (False, [], first.cursor)
    await store.revoke("a", NOW)
    await store.rotate("b", NewSecret(b"", "x"))
    await store.rotate("b", NewSecret(b"n", "y"))
    await store.create(record("c"))
    later = await store.changes(first.cursor)
    assert not later.whole
    assert {one.id: (one.revoked_at, one.pepper_id) for one in later.records} == {
        "a": (NOW, "p"),
        "b": (None, "y"),
        "c": (None, "p"),
    }
    assert len(later.records) == 3


@pytest.mark.parametrize("cursor", [Cursor("another store", 1), Cursor("", 0)])
async def test_a_cursor_of_another_store_reads_everything(store: KeyStore, cursor: Cursor) -> None:
    await store.create(record("a"))
    await store.create(record("b"))
    changes = await store.changes(cursor)
    assert (changes.whole, len(changes.records)) == (True, 2)


async def test_a_cursor_of_the_future_reads_everything(store: KeyStore) -> None:
    """A restored backup has the epoch that the cursor knows, and an earlier revision."""
    await store.create(record("a"))
    known = (await store.changes(Cursor())).cursor
    changes = await store.changes(Cursor(known.epoch, known.revision + 1))
    assert (changes.whole, len(changes.records), changes.cursor) == (True, 1, known)


async def test_preparing_again_changes_nothing(url: str, store: KeyStore) -> None:
    await store.create(FULL)
    before = await store.changes(Cursor())
    async with opened(url) as again:
        assert await again.changes(Cursor()) == before


# ── several processes ───────────────────────────────────────────────────────────────────────────────────

CREATOR = """
from proxy.keystore import opened
from proxy.keystore.base import NewSecret
from proxy.identity import KeyRecord

async def main(url, name):
    print("ready", flush=True)
    sys.stdin.readline()
    async with opened(url) as store:
        for number in range(20):
            await store.create(KeyRecord(
                id=f"{name}{number}", name="n", digest=b"d", pepper_id="p", plan="pro", created_at=0
            ))
            assert await store.rotate("nobody", NewSecret(b"r", name)) is None
"""


async def test_eight_processes_write_at_once(url: str) -> None:
    """The store is made by all of them together; nothing is lost and nobody is refused."""
    async with contextlib.AsyncExitStack() as stack:
        processes = [await stack.enter_async_context(python(CREATOR, url, f"p{n}-")) for n in range(8)]
        for process in processes:
            assert await line(process) == "ready"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
        async with asyncio.timeout(50):
            assert [await process.wait() for process in processes] == [0] * 8
    async with opened(url) as store:
        assert {one.id for one in await store.list_all()} == {
            f"p{n}-{number}" for n in range(8) for number in range(20)
        }
        assert (await store.changes(Cursor())).cursor.revision == 160


async def test_concurrent_changes_of_one_key_are_all_made(store: KeyStore) -> None:
    """Each is an atomic step: a rotation that comes after the revocation has no effect."""
    await store.create(FULL)
    start = (await store.changes(Cursor())).cursor.revision
    rotations = [store.rotate("full", NewSecret(bytes([n]), str(n))) for n in range(8)]
    await asyncio.gather(*rotations[:4], store.revoke("full", NOW), *rotations[4:])
    assert (await store.changes(Cursor())).cursor.revision == start + 9
    final = await store.get("full")
    assert final is not None
    assert final.revoked_at == NOW
    assert await store.rotate("full", NewSecret(b"late", "late")) == final


FOLLOWER = """
import time
from proxy.keys import KeyCache
from proxy.keystore import open_store

async def main(url, key_id):
    cache = KeyCache(open_store(url))
    await cache.start()
    print("ready", cache.get(key_id).revoked_at, flush=True)
    while cache.get(key_id).revoked_at is None:
        await asyncio.sleep(0.005)
    print(time.time(), flush=True)
    await cache.close()
"""


async def test_a_revocation_is_everywhere_within_a_second(url: str, store: KeyStore) -> None:
    """Two processes follow; each tells when it knew."""
    await store.create(FULL)
    async with python(FOLLOWER, url, "full") as one, python(FOLLOWER, url, "full") as other:
        assert await line(one) == await line(other) == "ready None"
        await store.revoke("full", NOW)
        at = time.time()
        delays = [float(await line(process)) - at for process in (one, other)]
        assert max(delays) < 1.0, delays


# ── the cache ───────────────────────────────────────────────────────────────────────────────────────────


async def test_the_cache_knows_everything_at_once_and_follows(url: str, store: KeyStore) -> None:
    await store.create(FULL)
    async with cache(url) as known:
        assert known.get("full") == FULL
        assert known.get("nobody") is None
        await store.create(record("later"))
        await until(lambda: known.get("later") is not None)
        await store.rotate("full", NewSecret(b"n", "q"))
        await until(lambda: known.get("full").digest == b"n")  # type: ignore[union-attr]  # a default binds the value of now
        assert len(known) == 2


async def test_refresh_does_not_wait_for_the_next_look(url: str, store: KeyStore) -> None:
    async with cache(url) as known:
        await store.create(FULL)
        await known.refresh()
        assert known.get("full") == FULL


async def test_keys_of_another_pepper_are_counted(url: str, store: KeyStore) -> None:
    await store.create(record("a"))
    await store.create(record("b", pepper_id="q"))
    await store.create(record("c", pepper_id="q", revoked_at=NOW))
    await store.create(record("d", pepper_id="q", expires_at=NOW))
    async with cache(url) as known:
        assert known.foreign("p", NOW) == 1
        assert known.foreign("z", NOW) == 2


async def test_closing_ends_the_following(url: str) -> None:
    before = asyncio.all_tasks()
    async with cache(url):
        assert asyncio.all_tasks() - before
    assert asyncio.all_tasks() - before == set()


async def test_redis_that_dies_leaves_the_last_good_answer() -> None:
    """One log line when it goes, one when it comes back; after it has come back empty, too, the keys stay,
    until somebody makes a new one there."""
    async with redis_server() as server, opened(server.url) as store:
        await store.create(FULL)
        async with cache(server.url, poll_s=0.01) as known:
            with structlog.testing.capture_logs() as lines:
                await server.kill()
                await until(lambda: known.failing)
                await asyncio.sleep(0.2)  # many more looks, none of which says anything
                assert known.get("full") == FULL
                assert [entry["event"] for entry in lines] == ["key_store_failed"]
                await server.restart()
                with pytest.raises(KeyStoreFailed, match="has lost its keys"):
                    await known.refresh()
                assert known.get("full") == FULL
                async with opened(server.url) as fresh:
                    await fresh.create(record("new"))
                await until(lambda: known.get("new") is not None)
                assert known.get("full") is None
                await until(lambda: not known.failing)
                assert [entry["event"] for entry in lines] == ["key_store_failed", "key_store_recovered"]


async def test_redis_that_was_flushed_gets_its_first_key_by_create() -> None:
    async with redis_server() as server, opened(server.url) as store:
        await store.create(FULL)
        before = (await store.changes(Cursor())).cursor
        async with server.client() as client:
            await client.flushall()
        await store.create(record("new"))
        after = await store.changes(before)
        assert (after.whole, [one.id for one in after.records]) == (True, ["new"])


async def test_redis_that_hangs_is_given_up_in_time() -> None:
    """The cache says so within the client's 2 s and goes on serving."""
    async with redis_server() as server, opened(server.url) as store:
        await store.create(FULL)
        async with cache(server.url) as known, server.client() as client:
            sleeping = asyncio.gather(client.execute_command("DEBUG", "SLEEP", "4"))
            await until(lambda: known.failing, 8)
            assert known.get("full") == FULL
            await sleeping
            await until(lambda: not known.failing)


async def test_redis_errors_show_no_password() -> None:
    store = open_store("redis://user:hunter2@127.0.0.1:1/0")
    with pytest.raises(StartError) as caught:
        await store.prepare()
    assert "redis://127.0.0.1:1 does not answer" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    await store.close()


async def test_redis_with_records_of_somebody_else(redis: RedisServer) -> None:
    async with opened(redis.url) as store, redis.client() as client:
        await store.create(FULL)
        await client.hset("headrace:{keys}:records", "full", b"not json")  # type: ignore[misc]  # redis-py: one type for sync and async
        with pytest.raises(KeyStoreFailed, match="a record cannot be read"):
            await store.get("full")
        await client.delete("headrace:{keys}:records")
        await client.set("headrace:{keys}:records", "x")
        with pytest.raises(KeyStoreFailed, match="ResponseError"):
            await store.list_all()


async def test_redis_of_a_newer_version(redis: RedisServer) -> None:
    async with redis.client() as client:
        await client.hset("headrace:{keys}:meta", "version", "2")  # type: ignore[misc]  # redis-py: one type for sync and async
    with pytest.raises(StartError, match="made by a newer Headrace"):
        async with opened(redis.url):
            pass


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    async with redis_server() as server:
        yield server


NO_REDIS = """
sys.modules["redis"] = None
from proxy.errors import StartError
from proxy.keystore import open_store
from proxy.schema import Limits
from proxy.stores import _guarded

async def main():
    url = "redis://127.0.0.1:1"
    for make in (lambda: open_store(url), lambda: _guarded(Limits(store=url), None, None)):
        try:
            make()
        except StartError as error:
            print(error, flush=True)
"""


async def test_redis_without_its_client_names_the_extra() -> None:
    async with python(NO_REDIS) as process:
        for key in ("auth.database", "limits.store"):
            assert await line(process) == f"{key}: Redis needs its client: pip install 'headrace[redis]'"


def test_addresses_that_no_client_takes() -> None:
    """What the configuration's check let pass; no password is shown."""
    url = "redis://user:hunter2@127.0.0.1/0?health_check_interval=x"
    limits = Limits(store=url)
    guarded = functools.partial(stores._guarded, limits, None, lambda _: None)  # type: ignore[arg-type] # never asked
    for make in (lambda: open_store(url), guarded):
        with pytest.raises(StartError, match="health_check_interval") as caught:
            make()
        assert "hunter2" not in str(caught.value)
    with pytest.raises(StartError, match="expected sqlite:PATH"):
        open_store("mysql://h")


# ── SQLite files ────────────────────────────────────────────────────────────────────────────────────────


def modes_in(folder: Path) -> dict[str, int]:
    return {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}


async def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    before = os.umask(0)
    try:
        async with opened(f"sqlite:{path}") as store:
            await store.create(FULL)
            load_pepper(None, f"sqlite:{path}")
            with contextlib.closing(sqlite3.connect(path)) as reader:  # so that -wal and -shm exist
                reader.execute("SELECT * FROM api_keys").fetchall()
                modes = modes_in(tmp_path)
    finally:
        os.umask(before)
    assert modes == {name: 0o600 for name in ("keys.db", "keys.db-wal", "keys.db-shm", "keys.db.pepper")}


@pytest.mark.parametrize("name", ["plain.db", "with space?.db", "ünï#%20.db", "a:b.db"])
async def test_any_file_name_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Also a relative one, whose meaning is that of the moment it was named."""
    monkeypatch.chdir(tmp_path)
    async with opened(f"sqlite:{name}") as store:
        monkeypatch.chdir("/")
        await store.create(FULL)
        assert (tmp_path / name).exists()
        assert await store.list_all() == [FULL]


async def test_two_slashes_are_one(tmp_path: Path) -> None:
    async with opened(f"sqlite://{tmp_path}/keys.db") as store:
        await store.create(FULL)
    assert (tmp_path / "keys.db").exists()


def _missing_folder(tmp_path: Path) -> Path:
    return tmp_path / "nowhere" / "keys.db"


def _folder(tmp_path: Path) -> Path:
    return tmp_path


def _no_database(tmp_path: Path) -> Path:
    (tmp_path / "notes.txt").write_text("no database at all\n" * 100)
    return tmp_path / "notes.txt"


def _newer(tmp_path: Path) -> Path:
    path = tmp_path / "newer.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE key_store (one INTEGER PRIMARY KEY, version INTEGER, epoch TEXT)")
        database.execute("INSERT INTO key_store VALUES (1, 2, 'e')")
        database.commit()
    return path


def _unwritable(tmp_path: Path) -> Path:
    return Path("/sys/headrace.db")  # no file can be made there, not even by root


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (_missing_folder, "the folder .*/nowhere does not exist: make it, or name another file"),
        (_folder, "cannot be opened .*: make it and its folder writable, or name another file"),
        (_no_database, "notes.txt is no SQLite database: name another file"),
        (_newer, r"was made by a newer Headrace \(keys of version 2, this one knows 1\): upgrade"),
        (_unwritable, "cannot be made .*: make its folder writable, or name another file"),
    ],
)
async def test_a_database_that_cannot_be_used(
    tmp_path: Path, place: Callable[[Path], Path], text: str
) -> None:
    path = place(tmp_path)
    with pytest.raises(StartError, match=text) as caught:
        async with opened(f"sqlite:{path}"):
            pass
    assert str(caught.value).startswith("auth.database: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "nowhere").exists()


async def test_a_newer_database_is_left_as_it_is(tmp_path: Path) -> None:
    path = _newer(tmp_path)
    with pytest.raises(StartError):
        async with opened(f"sqlite:{path}"):
            pass
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall() == [
            ("key_store",)
        ]


async def test_other_tables_live_beside_the_keys(tmp_path: Path) -> None:
    """The ledger's, in the default configuration, whatever it keeps in user_version."""
    path = tmp_path / "headrace.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE ledger (a)")
        database.execute("PRAGMA user_version = 77")
    async with opened(f"sqlite:{path}") as store:
        await store.create(FULL)
        assert await store.list_all() == [FULL]
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (77,)


async def test_a_database_that_is_removed_and_replaced(tmp_path: Path) -> None:
    """Removed, or replaced by rubbish: the last good keys. Replaced by another database: that one's keys."""
    path = tmp_path / "keys.db"
    async with opened(f"sqlite:{path}") as store:
        await store.create(FULL)
        async with cache(f"sqlite:{path}") as known:
            path.rename(tmp_path / "old.db")
            await until(lambda: known.failing)
            assert not path.exists()  # looking makes no file
            for rubbish in (b"", b"rubbish" * 1000):
                path.write_bytes(rubbish)
                with pytest.raises(KeyStoreFailed):
                    await known.refresh()
            assert known.get("full") == FULL
            with pytest.raises(KeyStoreFailed):
                await store.get("full")
            async with opened(f"sqlite:{tmp_path / 'other.db'}") as other:
                for number in range(3):
                    await other.create(record(f"other{number}"))
            (tmp_path / "other.db").rename(path)
            await until(lambda: known.get("other2") is not None)
            assert known.get("full") is None
            (tmp_path / "old.db").rename(path)
            await until(lambda: known.get("full") == FULL)
            assert len(known) == 1
            await until(lambda: not known.failing)


async def test_a_damaged_record_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    async with opened(f"sqlite:{path}") as store:
        await store.create(FULL)
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("UPDATE api_keys SET record = '{}'")
            database.commit()
        with pytest.raises(KeyStoreFailed, match="a record cannot be read"):
            await store.list_all()


async def test_readers_do_not_wait_for_a_writer_and_writers_do(tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    async with opened(f"sqlite:{path}") as store:
        await store.create(FULL)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            writing = asyncio.gather(store.revoke("full", NOW))
            async with asyncio.timeout(4):
                assert await store.list_all() == [FULL]
            assert not writing.done()
            writer.execute("COMMIT")
        [revoked] = await writing
        assert revoked is not None
        assert revoked.revoked_at == NOW


async def test_a_disk_that_is_full_loses_nothing(tmp_path: Path) -> None:
    """The write fails as one error, whole, and the keys stay readable."""
    path = tmp_path / "keys.db"
    async with opened(f"sqlite:{path}") as store:
        await store.create(FULL)
    async with python(FULL_DISK, f"sqlite:{path}") as process:
        assert await line(process) == "KeyStoreFailed ['full']"


FULL_DISK = """
import resource, signal
from proxy.keystore import opened
from proxy.keystore.base import KeyStoreFailed
from proxy.identity import KeyRecord

async def main(url):
    async with opened(url) as store:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        try:
            await store.create(KeyRecord(
                id="huge", name="n" * 100_000, digest=b"d", pepper_id="p", plan="pro", created_at=0
            ))
        except KeyStoreFailed:
            print("KeyStoreFailed", [record.id for record in await store.list_all()])
"""


# ── the pepper ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_configured_pepper_wins(tmp_path: Path) -> None:
    assert load_pepper("pepper", f"sqlite:{tmp_path / 'keys.db'}") == b"pepper"
    assert load_pepper("pepper", "redis://x") == b"pepper"
    assert list(tmp_path.iterdir()) == []


def test_a_pepper_is_made_once(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path / 'keys.db'}"
    pepper = load_pepper(None, url)
    assert len(pepper) == 32
    assert load_pepper(None, url) == pepper
    assert load_pepper("", url) == pepper
    assert [file.name for file in tmp_path.iterdir()] == ["keys.db.pepper"]
    assert load_pepper(None, f"sqlite:{tmp_path / 'other.db'}") != pepper


def test_all_who_start_together_have_one_pepper(tmp_path: Path) -> None:
    """Sixteen at the same barrier, forty times over."""
    for turn in range(40):
        url = f"sqlite:{tmp_path / f'{turn}.db'}"
        barrier = threading.Barrier(16)
        found: list[bytes] = []

        def start(url: str = url, barrier: threading.Barrier = barrier, found: list[bytes] = found) -> None:
            barrier.wait()
            found.append(load_pepper(None, url))

        threads = [threading.Thread(target=start) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 16
        assert len(set(found)) == 1
    assert len(list(tmp_path.iterdir())) == 40  # no drafts left


@pytest.mark.parametrize("content", [b"", b"short", b"AAAA\n", b"!" * 44])
def test_a_damaged_pepper_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys.db.pepper"
    path.write_bytes(content)
    with pytest.raises(StartError, match="is damaged: restore it"):
        load_pepper(None, f"sqlite:{tmp_path / 'keys.db'}")
    assert path.read_bytes() == content


def test_redis_needs_a_configured_pepper() -> None:
    with pytest.raises(StartError, match=r"^auth.pepper: is missing"):
        load_pepper(None, "redis://127.0.0.1")


@pytest.mark.parametrize(
    ("folder", "text"),
    [("nowhere", "auth.database: the folder .* does not exist"), ("/sys", "auth.pepper: .* cannot be used")],
)
def test_a_place_for_no_pepper(tmp_path: Path, folder: str, text: str) -> None:
    with pytest.raises(StartError, match=text):
        load_pepper(None, f"sqlite:{tmp_path / folder / 'keys.db'}")
