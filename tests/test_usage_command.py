"""`headrace usage` as people run it, on ledgers that real requests have left; the shipped example."""

from __future__ import annotations

import asyncio
import csv
import json
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from decimal import Decimal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from proxy import config
from tests.kit.callers import Caller, ask, chat
from tests.kit.fleet import Fleet, fleet
from tests.kit.headrace import ROOT, command, running, settings_for
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.ledger import opened, unknown

pytestmark = pytest.mark.timeout(60)

MODELS = {
    "m": {
        "upstreams": ["up"],
        "price": {"input": 2.00, "output": 32.00},
        "list_price": {"input": 10, "output": 60},
    },
    "free": {"upstreams": ["up"]},
}


def section(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    ledger = {"ledger": {"database": f"sqlite:{tmp_path}/l.db"}}
    return settings_for("mock:", **{"models": MODELS, **ledger, **sections})


async def run(tmp_path: Path, settings: Mapping[str, Any], *words: str) -> tuple[int, str, str]:
    """The exit code, standard output, standard error."""
    file = tmp_path / "headrace.yaml"
    file.write_text(yaml.safe_dump(dict(settings)))
    async with command("-c", str(file), "usage", *words, cwd=tmp_path) as running_command:
        code = await running_command.ended(20)
        return code, "\n".join(running_command.out), "\n".join(running_command.err)


async def rows(tmp_path: Path, settings: Mapping[str, Any], *words: str) -> list[dict[str, Any]]:
    code, out, err = await run(tmp_path, settings, *words, "--format", "json")
    assert (code, err) == (0, "")
    found: list[dict[str, Any]] = json.loads(out)
    return found


def asking(prompt: int, answer: int, *headers: str, **fields: Any) -> bytes:
    """A request for that many tokens."""
    messages = [{"role": "user", "content": "w " * prompt}]
    return chat(f"x-mock: words={answer}", *headers, stream=False, messages=messages, **fields)


async def test_a_day_and_a_month(tmp_path: Path) -> None:
    """500,000 input and 200,000 output tokens at 2 and 32 dollars a million: 7.40 a day, 222.00 for 30 days,
    and what the list price would have been; in all three forms."""
    settings = section(tmp_path)
    async with running(settings) as headrace:
        for _ in range(5):
            assert (await ask(headrace.port, asking(100_000, 40_000))).status == 200
        assert (await headrace.metrics())['headrace_cost_usd_total{model="m"}'] == pytest.approx(7.40)
    (found,) = await rows(tmp_path, settings, "--baseline")
    assert found == {
        "model": "m",
        "requests": 5,
        "prompt_tokens": 500_000,
        "cached_tokens": 0,
        "completion_tokens": 200_000,
        "unknown": 0,
        "unpriced": 0,
        "estimated": 0,
        "cost_usd": "7.40",
        "list_cost_usd": "17.00",
        "saved_usd": "9.60",
        "saved_percent": "56.47",
    }
    code, out, _ = await run(tmp_path, settings, "--baseline")
    assert code == 0
    assert out.splitlines()[-1] == "7.40 USD a day (so far), 222.00 USD for 30 days"
    assert out.splitlines()[-2].split() == [
        "total",
        "5",
        "500,000",
        "200,000",
        "7.40",
        "17.00",
        "9.60",
        "56.47",
    ]
    _, out, _ = await run(tmp_path, settings, "--format", "csv", "--by", "day,model")
    (line,) = csv.DictReader(out.splitlines())
    assert (line["model"], line["cost_usd"], line["requests"]) == ("m", "7.40", "5")


async def test_by_key_model_and_day(tmp_path: Path) -> None:
    """Two keys, two models, one of them without a price; what nobody reported is unknown, not zero."""
    settings = section(tmp_path, auth=auth_section(tmp_path))
    one, other = [await make_key(tmp_path) for _ in range(2)]
    async with running(settings) as headrace:
        for key, model, number in ((one, "m", 3), (other, "m", 1), (other, "free", 2)):
            for _ in range(number):
                request = asking(10, 4, bearer(key), model=model)
                assert (await ask(headrace.port, request)).status == 200
    async with opened(tmp_path / "l.db") as ledger:
        ledger.add(unknown(key_id=one.split("_")[1]))
    by_key = {each["key"]: each for each in await rows(tmp_path, settings, "--by", "key")}
    first, second = by_key[one.split("_")[1]], by_key[other.split("_")[1]]
    assert (first["requests"], first["unknown"], first["prompt_tokens"]) == (4, 1, 30)
    assert Decimal(first["cost_usd"]) == 3 * (10 * Decimal("0.000002") + 4 * Decimal("0.000032"))
    assert (second["requests"], second["unpriced"], second["completion_tokens"]) == (3, 2, 12)
    found = await rows(tmp_path, settings, "--by", "key,model,day")
    assert len(found) == 3
    assert list(found[0])[:3] == ["key", "model", "day"]
    assert await rows(tmp_path, settings, "--since", "2020-01-01", "--until", "2020-02-01") == []
    assert len(await rows(tmp_path, settings, "--since", "24h")) == 2


async def test_many_machines(tmp_path: Path) -> None:
    """Files are merged, whatever they share."""
    settings = section(tmp_path)
    async with running(settings) as headrace:
        assert (await ask(headrace.port, asking(10, 4))).status == 200
    elsewhere = section(tmp_path, ledger={"database": f"sqlite:{tmp_path}/other.db"})
    async with running(elsewhere) as headrace:
        assert (await ask(headrace.port, asking(10, 4))).status == 200
    (found,) = await rows(tmp_path, settings, "l.db", "other.db", "l.db")
    assert found["requests"] == 2


async def test_mistakes_are_one_line(tmp_path: Path) -> None:
    settings = section(tmp_path)
    for words, why in (
        ((), "there is no ledger at"),
        (("--by", "modle"), "by: unknown field 'modle' (did you mean 'model'?)"),
        (("--since", "soon"), "since: expected"),
        (("--verify", "--since", "1d"), "--verify compares"),
        (("--verify",), "no server answers at"),
    ):
        code, out, err = await run(tmp_path, {**settings, "admin": "127.0.0.1:9"}, *words)
        assert (code, out) == (1, "")
        assert why in err
        assert len(err.splitlines()) == 1


async def test_a_picture(tmp_path: Path) -> None:
    settings = section(tmp_path)
    async with running(settings) as headrace:
        assert (await ask(headrace.port, asking(1000, 400))).status == 200
    code, _, err = await run(tmp_path, settings, "--chart", "spend.svg")
    assert (code, err) == (0, "drawn: spend.svg")
    picture = ElementTree.parse(tmp_path / "spend.svg")
    assert "$0.015" in "".join(picture.getroot().itertext())
    code, _, err = await run(tmp_path, settings, "--chart", "no/spend.svg")
    assert (code, err) == (1, "headrace: --chart: no/spend.svg: No such file or directory")


# ── counters against rows ────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def busy(tmp_path: Path, workers: int) -> AsyncIterator[Fleet]:
    """A server with some requests of all kinds behind it."""
    settings = settings_for("mock:", models=MODELS, workers=workers, log={"level": "warning"})
    async with fleet(tmp_path, settings) as server:
        for model in ("m", "free"):
            for _ in range(10):
                assert (await ask(server.port, asking(10, 4, "Connection: close", model=model))).status == 200
        assert (await ask(server.port, chat("Connection: close", "x-mock: status=500"))).status == 500
        assert (await ask(server.port, chat("Connection: close", model="nothing"))).status == 404
        caller = await Caller.connect(server.port)
        await caller.send(chat("x-mock: stall_after=3"))
        await caller.piece(await caller.head())
        caller.leave()
        await server.quiet()
        yield server


async def verify(server: Fleet) -> tuple[int, list[str]]:
    words = ("-c", str(server.file), "usage", "--verify", "--admin", f"127.0.0.1:{server.admin_port}")
    async with command(*words) as verifying:
        code = await verifying.ended(30)
    assert verifying.err == []
    return code, verifying.out


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
async def test_counters_are_proved(tmp_path: Path, workers: int) -> None:
    """They agree, also over a restart and with a stream still open; a row that is missing is found."""
    async with busy(tmp_path, workers) as server:
        code, out = await verify(server)
        assert code == 0, out
        assert any(line.split() == ["rows", "22", "22", "ok"] for line in out), out
        assert any(line.startswith("m: cost in USD") and line.endswith("ok") for line in out)
        assert not any("DIFFERS" in line for line in out)
        caller = await Caller.connect(server.port)
        await caller.send(chat("x-mock: stall_after=3"))
        await caller.piece(await caller.head())
        assert (await server.tell("restart"))[0] == 0
        for _ in range(5):
            assert (await ask(server.port, asking(10, 4, "Connection: close"))).status == 200
        code, out = await verify(server)
        assert code == 0, out
        caller.leave()
        await asyncio.wait_for(server.first.process.wait(), 20)
        code, out = await verify(server)
        assert code == 0, out
        assert any(line.split() == ["rows", "28", "28", "ok"] for line in out), out
        path = tmp_path / "headrace.db"
        with closing(sqlite3.connect(path, timeout=10)) as connection:
            (lost,) = connection.execute("SELECT min(id) FROM ledger WHERE model = 'm'").fetchone()
            connection.execute("DELETE FROM ledger WHERE id = ?", (lost,))
            connection.commit()
        code, out = await verify(server)
        assert code == 1
        assert any(line.split() == ["rows", "28", "27", "DIFFERS"] for line in out), out
        assert any(line.startswith("m: completion tokens") and line.endswith("DIFFERS") for line in out)


# ── the example ──────────────────────────────────────────────────────────────────────────────────────────


async def test_the_shipped_example() -> None:
    """`headrace check` accepts it; what it names has both prices."""
    file = ROOT / "deploy" / "headrace.example.yaml"
    names = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "DEEPSEEK_API_KEY")
    environ = dict.fromkeys(names, "x")
    async with command("-c", str(file), "check", environ=environ) as checking:
        assert await checking.ended(20) == 0
        assert checking.out[0] == f"{file}: ok"
    models = config.load(file, environ).models
    for family in ("gpt-4.1", "claude-", "gemini-", "deepseek-"):
        assert any(name.startswith(family) for name in models)
    for name, model in models.items():
        assert model.price is not None, name
        assert model.list_price is not None, name
        assert (model.price.cached_input or 0) < model.price.input < model.price.output
