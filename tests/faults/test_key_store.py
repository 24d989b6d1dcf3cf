"""Row 29, the other half: the disk is full while a key is made."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from tests.kit.callers import ask, chat
from tests.kit.fleet import fleet, write
from tests.kit.headrace import command, settings_for
from tests.kit.invariant import balanced
from tests.kit.keys import auth_section, bearer, make_key


async def test_a_full_disk_makes_no_half_key(tmp_path: Path) -> None:
    """The command fails in one line; the keys that were there are there, and the file is whole."""
    key = await make_key(tmp_path)
    settings = settings_for("mock:", auth=auth_section(tmp_path))
    file = tmp_path / "headrace.yaml"
    write(file, settings)
    make = ("-c", str(file), "keys", "create", "--name", "second")
    async with command(*make, before="unset COVERAGE_PROCESS_CONFIG; ulimit -f 0") as full:
        assert await full.ended() == 1
    assert len(full.err) == 1, full.err
    assert full.out == []
    with closing(sqlite3.connect(tmp_path / "keys.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT count(*) FROM api_keys").fetchone() == (1,)
    async with command(*make) as again:
        assert await again.ended() == 0
    async with fleet(tmp_path, settings) as here:
        for each in (key, again.out[-1]):
            assert (await ask(here.port, chat(bearer(each), stream=False))).status == 200
        await balanced(here)
