"""The operations page: every alert has its heading, every command is one, and what it says to do works."""

from __future__ import annotations

import asyncio
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy import cli
from proxy.metrics import Metrics
from tests.kit.callers import ask, chat
from tests.kit.fleet import Fleet, fleet
from tests.kit.headrace import ROOT, command, settings_for, until
from tests.kit.invariant import balanced
from tests.kit.keys import bearer
from tests.kit.ledger import written

PAGE = (ROOT / "docs" / "operations.md").read_text()
RULES = yaml.safe_load((ROOT / "grafana" / "rules" / "alerts.yml").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}


def section(heading: str) -> str:
    """What stands below a heading of any depth, up to the next one."""
    return re.split(rf"^##+ {re.escape(heading)}\n", PAGE, flags=re.MULTILINE)[1].split("\n##")[0]


def blocks(heading: str) -> list[str]:
    """Its shell lines, block by block."""
    return re.findall(r"^```sh\n(.*?)^```", section(heading), re.MULTILINE | re.DOTALL)


# ── alerts ───────────────────────────────────────────────────────────────────────────────────────────────


def test_every_alert_has_its_heading() -> None:
    """And no heading is of an alert that is gone; in the order of the rules."""
    assert re.findall(r"^### (Headrace\w+)$", PAGE, re.MULTILINE) == list(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_is_explained(name: str) -> None:
    """Who is woken and when, as in the rule; and what the alert itself says to look at is named as well."""
    rule, text = ALERTS[name], section(name)
    when = f"after {rule['for']}" if "for" in rule else "at once"
    assert text.startswith(f"{rule['labels']['severity']} {when}. ")
    assert len(text.split()) > 20
    for named in re.findall(r"`headrace (\w+)|(/debug/state|/healthz)", rule["annotations"]["action"]):
        assert "".join(named) in text


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────


def commands() -> list[str]:
    """Every `headrace …` of the page, in a sentence or in a block."""
    inline = re.findall(r"`headrace ((?:[a-z]+)[^`]*)`", PAGE)
    lines = [
        line
        for text in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
        for line in text.splitlines()
    ]
    shown = [
        line.partition("#")[0].removeprefix("headrace ") for line in lines if line.startswith("headrace ")
    ]
    return [each.replace("…", "").replace("\n", " ").strip() for each in inline + shown]


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_a_command_exists(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command knows its own help, and the flags are in it."""
    words = shlex.split(line)
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "-h"])
    told = capsys.readouterr()
    assert ended.value.code == 0, told.err
    verbs = [word for word in words if word.islower() and word.isalpha()][: 1 + (words[0] == "keys")]
    assert told.out.startswith(f"usage: headrace {' '.join(verbs)} ")
    for flag in (word for word in words if word.startswith("-")):
        assert re.search(rf"^ +{flag}\b", told.out, re.MULTILINE), flag


def test_there_are_commands() -> None:
    assert {line.split()[0] for line in commands()} >= {
        "reload",
        "restart",
        "keys",
        "usage",
        "top",
        "kill",
        "doctor",
        "check",
    }


def test_names_exist() -> None:
    """Metrics, and events of the log."""
    known = {each.name for each in Metrics("")}
    assert set(re.findall(r"`(headrace_\w+)`", PAGE)) <= known
    source = "".join(path.read_text() for path in (ROOT / "proxy").rglob("*.py"))
    rows = re.findall(r"^\| (`.*?) \| ", section("Log"), re.MULTILINE)
    events = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(events) > 20
    assert [name for name in events if f'"{name}"' not in source] == []


# ── what it says to do ───────────────────────────────────────────────────────────────────────────────────


class Site:
    """A folder as the page has it: headrace.db with keys and ledger, its pepper beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        database = f"sqlite:{folder}/headrace.db"
        self.settings: dict[str, Any] = settings_for(
            "mock:", auth={"mode": "required", "database": database}, ledger={"database": database}
        )

    def running(self) -> Any:
        return fleet(self.folder, self.settings)

    async def headrace(self, *words: str) -> str:
        """The last line that the command prints."""
        async with command("-c", str(self.folder / "headrace.yaml"), *words) as process:
            assert await process.ended() == 0, process.err
        return process.out[-1]

    async def shell(self, text: str) -> None:
        process = await asyncio.create_subprocess_exec("bash", "-euc", text, cwd=self.folder)
        async with asyncio.timeout(20):
            assert await process.wait() == 0


async def status(here: Fleet, key: str) -> int:
    return (await ask(here.port, chat(bearer(key), "Connection: close", stream=False))).status


async def accepted(here: Fleet, key: str) -> None:
    """Within the second that is promised, and its slack."""
    async with asyncio.timeout(5):
        while await status(here, key) != 200:
            await asyncio.sleep(0.1)


async def stopped(here: Fleet) -> None:
    here.first.signal(signal.SIGTERM)
    assert await here.first.ended(20) == 0


async def test_backup_and_restore(tmp_path: Path) -> None:
    """The page's lines, while it serves; afterwards that is what there is, and it goes on."""
    site = Site(tmp_path)
    (backup,), (restore,) = blocks("Backup")[:1], blocks("Backup")[1:]
    before, _, after = restore.partition("systemctl stop headrace\n")
    restore, _, after = after.partition("systemctl start headrace\n")
    assert (before, after) == ("", "")
    async with site.running() as here:
        old = await site.headrace("keys", "create", "--name", "old")
        await accepted(here, old)
        await balanced(here)
        await site.shell(backup)
        new = await site.headrace("keys", "create", "--name", "new")
        await accepted(here, new)
        assert await site.headrace("keys", "revoke", old.split("_")[1])
        await stopped(here)
    kept = written(tmp_path / "backup.db")
    assert 0 < len(kept) < len(written(tmp_path / "headrace.db"))
    for name in ("backup.db", "backup.db.pepper", "headrace.db"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0
    await site.shell(restore)
    assert written(tmp_path / "headrace.db") == kept
    async with site.running() as here:
        assert await status(here, old) == 200
        assert await status(here, new) == 401
        await until(lambda: len(written(tmp_path / "headrace.db")) == len(kept) + 1, 10)


async def test_a_new_pepper(tmp_path: Path) -> None:
    """As the page says: all keys end and it is told, the old pepper brings them back, `rotate` makes new
    secrets for the same ids."""
    site = Site(tmp_path)
    move, restart, *_ = blocks("Secrets")[0].splitlines()
    assert restart.startswith("headrace restart")
    async with site.running():
        key = await site.headrace("keys", "create", "--name", "one", "--plan", "pro")
    await site.shell(move)
    async with site.running() as here:
        assert await status(here, key) == 401
        await until(lambda: [line["keys"] for line in here.logged("keys_of_another_pepper")] == [1], 10)
        fresh = await site.headrace("keys", "rotate", key.split("_")[1])
        assert fresh.split("_")[1] == key.split("_")[1]
        await accepted(here, fresh)
        assert await status(here, key) == 401
    (tmp_path / "old.pepper").replace(tmp_path / "headrace.db.pepper")
    async with site.running() as here:
        assert await status(here, fresh) == 401
