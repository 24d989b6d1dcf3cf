"""A real Prometheus that scrapes a running Headrace, and what it knows."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.kit.headrace import ROOT, until

SHIPPED = ROOT / "grafana" / "prometheus.yml"
#: Seconds in which it has started; 0.3 s measured.
_START_S = 20.0
_LISTENING = re.compile(r'msg="Listening on" address=127\.0\.0\.1:(\d+)')


def tool(name: str) -> str:
    """The program's path; without it the test is skipped."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: install the Debian package prometheus")
    return found


class Prometheus:
    """Its query API."""

    def __init__(self, port: int, session: aiohttp.ClientSession) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._session = session

    async def get(self, path: str, **query: str) -> Any:
        """The `data` of an answer that has to be a success."""
        async with self._session.get(f"{self.url}/api/v1/{path}", params=query) as response:
            answer = json.loads(await response.read())
        assert answer["status"] == "success", (query, answer)
        assert not answer.get("warnings"), (query, answer)
        return answer["data"]

    async def query(self, expr: str) -> list[Any]:
        """The samples of an instant vector now."""
        result: list[Any] = (await self.get("query", query=expr))["result"]
        return result

    async def range(self, expr: str, start: float, end: float, step: float) -> list[Any]:
        """Each series of the expression over time."""
        times = {"start": str(start), "end": str(end), "step": str(step)}
        result: list[Any] = (await self.get("query_range", query=expr, **times))["result"]
        return result


def _configuration(folder: Path, target: int, interval: str) -> Path:
    """The shipped file with another target and pace; its rules are those that are shipped."""
    document = yaml.safe_load(SHIPPED.read_text())
    document["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    document["rule_files"] = [str(SHIPPED.parent / path) for path in document["rule_files"]]
    (job,) = document["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{target}"]}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(document))
    return file


@asynccontextmanager
async def scraping(tmp_path: Path, target: int, interval: str = "500ms") -> AsyncIterator[Prometheus]:
    """A Prometheus that scrapes the admin listener at port `target`; it is stopped at the end."""
    binary = tool("prometheus")
    file, log = _configuration(tmp_path, target, interval), tmp_path / "prometheus.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(binary, f"--config.file={file}", f"--storage.tsdb.path={tmp_path}/tsdb"),
            "--web.listen-address=127.0.0.1:0",  # it says which port it got
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        await until(lambda: "ready to receive web requests" in log.read_text(), _START_S, log.read_text)
        listening = _LISTENING.search(log.read_text())
        assert listening is not None
        async with aiohttp.ClientSession() as session:
            yield Prometheus(int(listening[1]), session)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


def filled_in(expr: str, window: str, values: Mapping[str, str] | None = None) -> str:
    """An expression as Grafana sends it: `window` for its intervals, everything for its variables."""
    expr = expr.replace("$__rate_interval", window).replace("$__range", window)
    for name, value in (values or {}).items():
        expr = expr.replace(f"${name}", value)
    return re.sub(r"\$[a-z]+", ".*", expr)
