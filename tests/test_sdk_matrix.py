"""The SDK matrix: every SDK in its own environment, with a key, through a Headrace in its own process."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from tests.kit.callers import ask
from tests.kit.fleet import Fleet, fleet
from tests.kit.headrace import until
from tests.kit.keys import auth_section, make_key
from tests.sdk import cases, matrix
from tests.sdk.cases import CASES, Case, Line, Seen
from tests.sdk.columns import COLUMNS, NODE, Column, pinned_version
from tests.sdk.environments import Environments, Unavailable
from tests.sdk.provider import provider

# The first test of an SDK may install it.
pytestmark = pytest.mark.timeout(300)

#: What is being built: such a cell may fail until it has been seen to work.
NOT_YET: tuple[str, ...] = ()
#: What `make test` runs: the newest of both languages, Node in full.
NEWEST = {"openai-python-3-sync": ("stream", "tools", "errors", "abort"), "openai-node-7": None}


class Stage(NamedTuple):
    """A Headrace, and the callers' keys by plan and column."""

    fleet: Fleet
    keys: dict[tuple[str, str], str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.fleet.port}"

    def lines(self, request_id: str) -> list[dict[str, Any]]:
        return [line for line in self.fleet.logged("request") if line["request_id"] == request_id]


def settings(directory: Path, provider_url: str) -> dict[str, Any]:
    """Two attempts for each request; a breaker that the errors of all these cases do not open."""
    return {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "auth": auth_section(directory),
        "default_upstream": "provider",
        "upstreams": {
            "mock": {"base_url": "mock:", "breaker": {"failures": 1000}},
            "provider": {"base_url": provider_url},
        },
        "models": {"m": {"upstreams": ["mock"]}, "provided": {"upstreams": ["provider"]}},
        "plans": {
            "fast": {"requests_per_minute": 100_000},
            "small": {"requests_per_minute": 60, "burst": 1},
        },
        "retry": {"attempts": 2, "base": 0.01, "max": 0.05, "budget": 1},
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    directory = tmp_path_factory.mktemp("sdk")
    keys = {
        (plan, column.name): await make_key(directory, name=column.name, plan=plan)
        for plan in ("fast", "small")
        for column in COLUMNS
    }
    async with provider() as url, fleet(directory, settings(directory, url)) as running:
        yield Stage(running, keys)


@pytest.fixture(scope="module")
def environments() -> Iterator[Environments]:
    return Environments()


async def run(stage: Stage, column: Column, case: Case, command: tuple[list[str], Path]) -> None:
    """One case in a process of its own, which stays until Headrace has been looked at."""
    words, home = command
    base_url = stage.url + column.path
    key = stage.keys["small" if case is cases.waits else "fast", column.name]
    request_id = f"{column.name}.{case.__name__}.{uuid.uuid4().hex[:8]}"
    process = await asyncio.create_subprocess_exec(
        *[*words, base_url, key, case.__name__, request_id, *column.words],
        cwd=home,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(40):
            line = await process.stdout.readline()
            lines = await logged(stage, request_id, 1.0 if case in cases.LEAVING else 5.0)
            process.stdin.close()
            problem = await process.stderr.read()
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, problem) == (0, b""), f"{lines}\n{problem.decode()}"
    seen: Seen = json.loads(line)
    assert seen["version"] == pinned_version(column.sdk)
    case({"own_id": request_id, **seen}, lines)


async def logged(stage: Stage, request_id: str, limit_s: float) -> list[Line]:
    """Waits until nothing of a request is left; then its log lines."""
    await stage.fleet.quiet(limit_s)
    # The log is written in order: once the line of a later request is there, so are all before it.
    last = uuid.uuid4().hex
    head = f"GET /v1/models HTTP/1.1\r\nHost: test\r\nConnection: close\r\nx-request-id: {last}\r\n\r\n"
    await ask(stage.fleet.port, head.encode())
    await until(lambda: bool(stage.lines(last)))
    return [(line["status"], line["reason"], line["attempts"]) for line in stage.lines(request_id)]


def every_cell() -> list[Any]:
    return [
        pytest.param(column, case, id=f"{column.name}-{case.__name__}")
        for column in COLUMNS
        for case in CASES[column.dialect]
    ]


def newest_cells() -> list[Any]:
    """Those of `every_cell` that are quick to have."""
    wanted = {
        f"{column}-{name}"
        for column, names in NEWEST.items()
        for name in names or [case.__name__ for case in CASES["openai"]]
    }
    return [cell for cell in every_cell() if cell.id in wanted]


def command(environments: Environments, column: Column) -> tuple[list[str], Path]:
    try:
        return environments.command(column)
    except Unavailable as error:
        pytest.skip(str(error))


async def attempt(stage: Stage, column: Column, case: Case, command: tuple[list[str], Path]) -> None:
    """Runs a cell; one that has never worked and is being built is an expected failure."""
    try:
        await run(stage, column, case, command)
    except AssertionError as error:
        before = matrix.recorded()["cells"].get(column.name, {}).get(case.__name__)
        if case.__name__ not in NOT_YET or before == "ok":
            raise
        pytest.xfail(f"being built: {str(error).strip().splitlines()[0]}")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("column", "case"), newest_cells())
async def test_newest(stage: Stage, environments: Environments, column: Column, case: Case) -> None:
    """The newest SDKs, so that `make test` knows."""
    await attempt(stage, column, case, command(environments, column))


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("column", "case"), every_cell())
async def test_cell(stage: Stage, environments: Environments, column: Column, case: Case) -> None:
    """Every cell; what was found is written down for the README."""
    words = command(environments, column)
    outcome = "fails"
    try:
        await attempt(stage, column, case, words)
        outcome = "ok"
    except pytest.xfail.Exception:
        outcome = "not yet"
        raise
    finally:
        matrix.record(column, case, outcome, environments.root)


def test_the_readme_has_this_table() -> None:
    """`python -m tests.sdk.matrix` writes it."""
    assert matrix.printed(matrix.README.read_text()) == matrix.table(matrix.recorded())


def test_the_table_is_of_these_versions_and_cases() -> None:
    """What was recorded is of the pinned SDKs, and of every case."""
    results = matrix.recorded()
    assert results["versions"] == {
        sdk: pinned_version(sdk) for sdk in (NODE, *(column.sdk for column in COLUMNS))
    }
    assert {name: set(cells) for name, cells in results["cells"].items()} == {
        column.name: {case.__name__ for case in CASES[column.dialect]} for column in COLUMNS
    }


def test_nothing_fails() -> None:
    """A cell that was recorded as failing is a bug of ours."""
    cells = matrix.recorded()["cells"]
    assert not [
        (name, case) for name, row in cells.items() for case, found in row.items() if found == "fails"
    ]


def test_every_case_is_a_row() -> None:
    """No case is left out of the README."""
    assert set(cases.ROWS) == {case for known in CASES.values() for case in known}
