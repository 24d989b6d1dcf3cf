"""The command line: what is printed, what is refused in one line, where the configuration comes from."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from proxy import __version__, cli_serve
from proxy.errors import StartError
from tests.kit.callers import Answer, Caller, ask, chat
from tests.kit.headrace import Command, command, settings_for
from tests.kit.lab import last_event

pytestmark = pytest.mark.timeout(40)

#: Nothing of the machine's own environment decides what these tests see; an empty value is an absent one.
PROVIDERS = {
    "OPENAI_API_KEY": ("gpt-*", "openai (https://api.openai.com/v1)"),
    "ANTHROPIC_API_KEY": ("claude-*", "claude (https://api.anthropic.com/v1)"),
    "GEMINI_API_KEY": ("gemini-*", "gemini (https://generativelanguage.googleapis.com/v1beta/openai)"),
    "DEEPSEEK_API_KEY": ("deepseek-*", "deepseek (https://api.deepseek.com/v1)"),
}
CLEAN = {"HEADRACE_CONFIG": "", **dict.fromkeys(PROVIDERS, "")}
ANYWHERE = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")


def written(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump(settings_for("mock:", **sections)))
    return path


def run(*words: str, environ: Mapping[str, str] | None = None, **how: Any) -> Any:
    return command(*words, environ={**CLEAN, **(environ or {})}, **how)


async def refused(process: Command, code: int = 1) -> str:
    """Checks that it ended with this code and one line on standard error, which it returns."""
    assert await process.ended(5) == code, (process.out, process.err)
    assert len(process.err) == 1, process.err
    assert process.out == []
    return process.err[0]


async def stopped(process: Command) -> None:
    process.signal(signal.SIGTERM)
    assert await process.ended() == 0, process.err


# ── serve ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("workers", "count"), [("2", 2), ("auto", os.cpu_count())])
async def test_workers(tmp_path: Path, workers: str, count: int) -> None:
    async with run("serve", *ANYWHERE, "--workers", workers, cwd=tmp_path) as process:
        _, admin_port = await process.serving()
        request = b"GET /debug/state HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
        assert (await ask(admin_port, request)).json()["workers"] == count
        await stopped(process)


async def test_workers_that_are_no_number() -> None:
    async with run("serve", "--workers", "0") as process:
        assert await process.ended() == 2
    assert process.err[-1].endswith("--workers: expected a number or auto, got '0'")


def test_an_aiohttp_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some installers ignore what a package needs."""
    monkeypatch.setattr(aiohttp, "__version__", "3.13.3")
    with pytest.raises(StartError, match=r"aiohttp 3\.13\.3 is too old: pip install 'aiohttp>=3\."):
        cli_serve._check_installation()


async def test_banner(tmp_path: Path) -> None:
    """A newcomer is told version, configuration, listeners, models, and a curl line that works."""
    async with run("serve", *ANYWHERE, cwd=tmp_path) as process:
        port, admin_port = await process.serving()
        await process.line("curl")
        assert process.err[0] == f"headrace {__version__}, configuration: built-in"
        assert f"  data   http://127.0.0.1:{port}/v1" in process.err
        assert f"  admin  http://127.0.0.1:{admin_port}/metrics" in process.err
        assert "  models echo" in process.err
        line = (await process.line(r"^  (curl .*)$"))[1]
        shell = await asyncio.create_subprocess_shell(f"{line} -sS -i", stdout=asyncio.subprocess.PIPE)
        async with asyncio.timeout(10):
            out, _ = await shell.communicate()
        if shell.returncode == 127:
            pytest.skip("curl is not on this machine: apt install curl")
        assert shell.returncode == 0
        assert out.startswith(b"HTTP/1.1 200 OK\r\n")
        assert out.endswith(b"data: [DONE]\n\n")
        await stopped(process)
    assert not any("curl" in text for text in process.out)  # standard output is the log's


async def test_banner_names_the_file_and_its_models(tmp_path: Path) -> None:
    """With a file its path and all its models are shown, and the curl line asks for one that has a name."""
    models = {"gpt-*": {"upstreams": ["up"]}, "own": {"upstreams": ["up"]}}
    file = written(tmp_path / "some.yaml", models=models)
    async with run("-c", str(file), "serve") as process:
        await process.serving()
        await process.line("curl")
        assert process.err[0].endswith(f"configuration: {file}")
        assert "  models gpt-*, own" in process.err
        assert '"model":"own"' in (await process.line(r"^  (curl .*)$"))[1]


@pytest.mark.parametrize("taken", ["--listen", "--admin"])
async def test_port_in_use(tmp_path: Path, taken: str) -> None:
    """One line with the address and the way out, exit code 1."""
    other = "--admin" if taken == "--listen" else "--listen"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        async with run("serve", taken, address, other, "127.0.0.1:0", cwd=tmp_path) as process:
            line = await refused(process)
    assert line.startswith(f"headrace: {address} is in use: ")
    for fix in (taken, "PORT="):
        assert fix in line


async def test_an_address_of_another_machine(tmp_path: Path) -> None:
    """Open mode there is refused before the address is tried; an address that is not ours is one line."""
    async with run("serve", "--listen", "192.0.2.1:8080", "--admin", "127.0.0.1:0", cwd=tmp_path) as process:
        line = await refused(process)
    assert line.startswith("built-in: auth.mode: open is allowed only while listen is loopback")
    file = written(tmp_path / "a.yaml", listen="192.0.2.1:8080", auth={"mode": "required"})
    async with run("serve", "-c", str(file)) as process:
        line = await refused(process)
    assert "192.0.2.1:8080" in line


@pytest.mark.parametrize(
    "words", [("serve", "--listen", "nonsense"), ("serve", "--admin", "127.0.0.1:99999")]
)
async def test_bad_addresses(words: tuple[str, ...], tmp_path: Path) -> None:
    """A listener on the command line is checked like one in the file."""
    async with run(*words, cwd=tmp_path) as process:
        line = await refused(process)
    assert line.startswith(f"command line: {words[1][2:]}: ")


@pytest.mark.parametrize("words", [(), ("nonsense",), ("serve", "--nonsense"), ("mock", "--port", "x")])
async def test_wrong_command_lines(words: tuple[str, ...]) -> None:
    """argparse's usage, exit code 2, no traceback."""
    async with run(*words) as process:
        assert await process.ended() == 2
    assert process.err[0].startswith("usage: headrace")
    assert not any("Traceback" in line for line in process.err)


async def test_version() -> None:
    """`--version` says it and ends."""
    async with run("--version") as process:
        assert await process.ended() == 0
    assert process.out == [f"headrace {__version__}"]


# ── check, and where the configuration comes from ────────────────────────────────────────────────────────


async def test_check_ok(tmp_path: Path) -> None:
    """A good file: its routes, exit code 0, no secret."""
    models = {"m": {"upstreams": ["up", {"name": "up", "model": "other"}]}, "x-*": {"upstreams": ["up"]}}
    file = written(tmp_path / "good.yaml", models=models)
    async with run("check", "-c", str(file)) as process:
        assert await process.ended() == 0
    assert process.out == [
        f"{file}: ok",
        "  m -> up (mock:)",
        "  m -> up (mock:) as other",
        "  x-* -> up (mock:)",
    ]
    assert process.err == []


async def test_check_points_at_the_mistake(tmp_path: Path) -> None:
    """The contract's own example, word for word, and exit code 1; `serve` says the same."""
    file = tmp_path / "bad.yaml"
    file.write_text(
        "upstreams: {openai: {base_url: https://api.openai.com/v1}}\n"
        "models: {gpt-4.1: {upstreams: [opnai]}}\n"
    )
    for name in ("check", "serve"):
        async with run(name, "-c", str(file)) as process:
            line = await refused(process)
        assert (
            line == f"{file}: models.gpt-4.1.upstreams[0]: unknown upstream 'opnai' (did you mean 'openai'?)"
        )


async def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """A configuration that was asked for and is missing is an error, never the built-in one."""
    missing = str(tmp_path / "missing.yaml")
    for words, environ in ((("-c", missing, "check"), {}), (("check",), {"HEADRACE_CONFIG": missing})):
        async with run(*words, environ=environ, cwd=tmp_path) as process:
            assert (await refused(process)) == f"{missing}: cannot be read: No such file or directory", words


async def test_the_order_of_sources(tmp_path: Path) -> None:
    """-c before or after the command, then $HEADRACE_CONFIG, then ./headrace.yaml, then the built-in one."""
    option, variable = written(tmp_path / "option.yaml"), written(tmp_path / "variable.yaml")

    async def source(*words: str, environ: Mapping[str, str] | None = None) -> str:
        async with run(*words, environ=environ, cwd=tmp_path) as process:
            assert await process.ended() == 0, process.err
        assert process.out[0].endswith(": ok")
        return process.out[0].removesuffix(": ok")

    named = {"HEADRACE_CONFIG": str(variable)}
    assert await source("check") == "built-in"
    written(tmp_path / "headrace.yaml")
    assert Path(await source("check")).name == "headrace.yaml"
    assert await source("check", environ=named) == str(variable)
    assert await source("-c", str(option), "check", environ=named) == str(option)
    assert await source("check", "-c", str(option), environ=named) == str(option)


async def test_built_in_models_of_providers(tmp_path: Path) -> None:
    """A provider's key in the environment adds its models, and `check` and the banner say so."""
    keys = {name: f"canary-{name}" for name in PROVIDERS}
    async with run("check", environ=keys, cwd=tmp_path) as process:
        assert await process.ended() == 0
    assert process.out == [
        "built-in: ok",
        "  echo -> mock (mock:)",
        *(f"  {pattern} -> {shown}" for pattern, shown in PROVIDERS.values()),
    ]
    async with run("serve", *ANYWHERE, environ={"DEEPSEEK_API_KEY": "canary"}, cwd=tmp_path) as serving:
        await serving.serving()
        await serving.line("^  models echo, deepseek-\\*")
        await stopped(serving)
    assert "canary" not in "\n".join([*process.out, *process.err, *serving.out, *serving.err])


# ── the limit of file descriptors ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("limit", [72, 264])
async def test_too_many_connections_written(tmp_path: Path, limit: int) -> None:
    """A written number that the descriptors do not allow is refused with the fix, and the fix works."""
    file = written(tmp_path / "headrace.yaml", max_connections=500)
    async with run("serve", "-c", str(file), before=f"ulimit -n {limit}") as process:
        line = await refused(process)
    found = re.fullmatch(
        rf"headrace: max_connections: 500 need (\d+) file descriptors, the limit is {limit}: "
        r"raise it \(ulimit -n, LimitNOFILE=\) or write (\d+)",
        line,
    )
    assert found is not None, line
    for fix, descriptors in ((500, int(found[1])), (int(found[2]), limit)):
        written(file, max_connections=fix)
        async with run("serve", "-c", str(file), before=f"ulimit -n {descriptors}") as process:
            port, _ = await process.serving()
            assert (await ask(port, chat())).clean
            await stopped(process)
        assert not any('"warning"' in text for text in process.out)


async def test_too_many_connections_by_default(tmp_path: Path) -> None:
    """The default is lowered to what fits, with a warning, and the server works."""
    file = written(tmp_path / "headrace.yaml")
    async with run("serve", "-c", str(file), before="ulimit -n 264") as process:
        port, _ = await process.serving()
        assert (await ask(port, chat())).clean
        await stopped(process)
    warnings = [line for line in map(json.loads, process.out) if line["level"] == "warning"]
    assert [line["event"] for line in warnings] == ["max_connections_lowered"]
    assert 1 < warnings[0]["to"] < 132  # a stream takes at least two


async def test_the_soft_limit_is_raised(tmp_path: Path) -> None:
    """A low soft limit under a high hard one is no reason for a warning."""
    file = written(tmp_path / "headrace.yaml", max_connections=500)
    async with run("serve", "-c", str(file), before="ulimit -Sn 64") as process:
        port, _ = await process.serving()
        assert (await ask(port, chat())).clean
        await stopped(process)
    assert not any('"warning"' in line for line in process.out)


# ── unix sockets ─────────────────────────────────────────────────────────────────────────────────────────


async def over_unix(path: Path) -> Answer:
    async with asyncio.timeout(10):
        caller = Caller(*await asyncio.open_unix_connection(str(path)))
        async with caller:
            return await caller.ask(chat())


def serving_on(path: Path, **how: Any) -> Any:
    words = ("serve", "--listen", f"unix:{path}", "--admin", "127.0.0.1:0")
    return run(*words, cwd=path.parent, **how)


async def test_unix_socket(tmp_path: Path) -> None:
    """A stream over a unix socket, named in the banner's curl line; the file goes with the server."""
    path = tmp_path / "headrace.sock"
    written(tmp_path / "headrace.yaml")
    async with serving_on(path) as process:
        line = (await process.line(r"^  (curl .*)$"))[1]
        assert f"--unix-socket {path} http://localhost/v1/chat/completions" in line
        answer = await over_unix(path)
        assert answer.clean
        assert answer.body.endswith(b"data: [DONE]\n\n")
        await stopped(process)
    lines = process.requests()
    assert [(line["client_ip"], line["reason"]) for line in lines] == [("unix", "complete")]


async def test_stale_socket_file(tmp_path: Path) -> None:
    """What a crash left behind does not stop the next start."""
    path = tmp_path / "headrace.sock"
    written(tmp_path / "headrace.yaml")
    async with serving_on(path) as process:
        await process.line("curl")
        process.signal(signal.SIGKILL)
        await process.ended()
    assert path.is_socket()
    async with serving_on(path) as process:
        await process.line("curl")
        assert (await over_unix(path)).clean
        await stopped(process)


async def test_a_socket_in_use(tmp_path: Path) -> None:
    """A socket that another server listens on is not taken away from it."""
    path = tmp_path / "headrace.sock"
    written(tmp_path / "headrace.yaml")
    async with serving_on(path) as first:
        await first.line("curl")
        async with serving_on(path) as second:
            assert f"unix:{path} is in use" in await refused(second)
        assert (await over_unix(path)).clean
        await stopped(first)


async def test_a_file_that_is_no_socket(tmp_path: Path) -> None:
    """A path with something else on it is refused, and what is there stays."""
    path = tmp_path / "precious.txt"
    path.write_text("precious")
    written(tmp_path / "headrace.yaml")
    async with serving_on(path) as process:
        line = await refused(process)
    assert f"unix:{path}" in line
    assert path.read_text() == "precious"


# ── mock ─────────────────────────────────────────────────────────────────────────────────────────────────


async def mock_port(process: Command) -> int:
    return int((await process.line(r"^mock upstream at http://127\.0\.0\.1:(\d+)/v1$"))[1])


async def test_mock_with_faults() -> None:
    """Every request of a mock that was started with fault flags meets the fault."""
    async with run("mock", "--port", "0", "--status", "429", "--retry-after", "2") as process:
        answer = await ask(await mock_port(process), chat())
        assert (answer.status, answer.headers["retry-after"]) == (429, "2")
    async with run("mock", "--port", "0", "--words", "3", "--error-after", "1") as process:
        answer = await ask(await mock_port(process), chat())
        assert "error" in last_event(answer)
    async with run("mock", "--port", "0", "--no-done") as process:
        answer = await ask(await mock_port(process), chat())
        assert answer.clean
        assert b"[DONE]" not in answer.body


async def test_mock_refusals(tmp_path: Path) -> None:
    """A bad value and a taken port are one line each."""
    async with run("mock", "--port", "0", "--words", "many") as process:
        assert "words" in await refused(process)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        async with run("mock", "--port", str(port)) as process:
            line = await refused(process)
    assert line.startswith(f"headrace: port {port}: ")
    assert "--port" in line


async def test_mock_ends_on_request() -> None:
    """Ctrl-C ends it without a traceback, exit code 0."""
    async with run("mock", "--port", "0") as process:
        await mock_port(process)
        process.signal(signal.SIGINT)
        assert await process.ended() == 0
    assert process.err == []
