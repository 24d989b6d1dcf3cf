"""The commands and samples of the README and of docs/, as they stand there: run, or checked."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio
import yaml

from proxy import config
from tests.kit.callers import ask, chat
from tests.kit.headrace import ROOT, Headrace, command, running, settings_for
from tests.kit.keys import auth_section, bearer, make_key
from tests.sdk.environments import Environments, Unavailable

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Who runs the blocks of a page, where not this file.
ELSEWHERE = {"operations.md": "test_operations.py"}
DATA, ADMIN = "127.0.0.1:8080", "127.0.0.1:9464"
ANYWHERE = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
#: `make` targets that would run this very test, or ten minutes: only that they exist is looked at.
DRY = {"test", "test-all", "test-hostile", "test-faults", "soak", "check"}


class Block(NamedTuple):
    """A fenced block. info: what stands behind its fence; heading: the one above it."""

    page: str
    heading: str
    info: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}, {self.heading}"


def blocks_of(page: Path) -> list[Block]:
    """In order."""
    found = []
    heading = ""
    for match in re.finditer(r"^## (.+)$|^```(.*)\n((?:.*\n)*?)```$", page.read_text(), re.MULTILINE):
        heading = match[1] or heading
        if match[1] is None:
            found.append(Block(page.name, heading, match[2], match[3]))
    return found


BLOCKS = [block for page in PAGES if page.name not in ELSEWHERE for block in blocks_of(page)]
#: The configuration that a newcomer writes.
FIRST = next(block for block in BLOCKS if block.info == "yaml")


def of(*infos: str) -> list[Any]:
    return [pytest.param(block, id=block.name) for block in BLOCKS if block.info in infos]


def variables(text: str) -> dict[str, str]:
    """Something for every variable that a configuration names."""
    return dict.fromkeys(re.findall(r"\$\{([A-Z]\w*)", text), "x")


def commands(block: Block) -> list[str]:
    """The lines of a shell block without comments, those that end with a backslash with what follows."""
    text = re.sub(r"\\\n\s*", "", block.text)
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


# ── where they run ───────────────────────────────────────────────────────────────────────────────────────


class Desk(NamedTuple):
    """A reader's desk: an open Headrace as `make run` starts it, another with keys, the README's first
    configuration in a file, and a shell."""

    folder: Path
    open: Headrace
    keyed: Headrace
    first: dict[str, str]
    environ: dict[str, str]

    def here(self, text: str, headrace: Headrace) -> str:
        """With the addresses of a server that runs."""
        admin = headrace.admin_url.removeprefix("http://")
        return text.replace(DATA, f"127.0.0.1:{headrace.port}").replace(ADMIN, admin)

    async def run(self, *words: str, cwd: Path | None = None, **environ: str) -> str:
        """What a program that has to succeed writes."""
        process = await asyncio.create_subprocess_exec(
            *words,
            cwd=cwd or self.folder,
            env={**self.environ, **environ},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(40):
            out, err = await process.communicate()
        assert process.returncode == 0, f"{words}\n{out.decode()}\n{err.decode()}"
        return out.decode()

    async def shell(self, line: str, headrace: Headrace, **environ: str) -> str:
        return await self.run("bash", "-euc", self.here(line, headrace), **environ)


def _shims(folder: Path) -> Path:
    """`headrace` of this checkout, and a curl to which an error status is a failure."""
    shims = folder / "bin"
    shims.mkdir()
    (shims / "headrace").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m proxy "$@"\n')
    (shims / "headrace").chmod(0o755)
    (folder / ".curlrc").write_text("fail\nmax-time = 20\n")
    return shims


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def desk(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    key, other = [await make_key(folder, name=name, plan="pro") for name in ("reader", "other")]
    settings = settings_for(
        "mock:",
        auth={**auth_section(folder), "jwt": {"secret": "s" * 32}},
        models={name: {"upstreams": ["up"], "price": {"input": 1, "output": 2}} for name in ("m", "gpt-4.1")},
        plans={"vip": {"requests_per_minute": 300}},
        ledger={"database": f"sqlite:{folder}/headrace.db"},
    )
    anonymous = settings_for("mock:", models={"echo": {"upstreams": ["up"]}}, browser_api={"model": "echo"})
    async with running(anonymous) as open_one, running(settings) as keyed:
        file, first = folder / "headrace.yaml", folder / "first.yaml"
        file.write_text(yaml.safe_dump({**settings, "admin": keyed.admin_url.removeprefix("http://")}))
        first.write_text(FIRST.text)
        environ = {
            **os.environ,
            "PATH": f"{_shims(folder)}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HEADRACE_CONFIG": str(file),
            "CURL_HOME": str(folder),
            "HEADRACE_KEY": key,
            "KEY_ID": other.split("_")[1],
        }
        await ask(keyed.port, chat(bearer(key)))  # something to report on
        await keyed.quiet()
        yield Desk(folder, open_one, keyed, {"HEADRACE_CONFIG": str(first), **variables(FIRST.text)}, environ)


# ── shell ────────────────────────────────────────────────────────────────────────────────────────────────

#: What has to be in the output of a line that holds the text on the left.
SAYS = {
    '"stream":true': "data: [DONE]\n\n",
    "/api/chat/stream": "data: [DONE]\n\n",
    "/v1/limits": '"plan":"pro"',
    "/v1/usage": '"cost_usd"',
    "keys create": "hr_",
    "keys rotate": "hr_",
    "keys list": "reader",
    "token issue": "ey",
    "usage --by": "total",
    "headrace check": "gpt-4.1 -> openai (https://api.openai.com/v1)",
    "usage --format csv": "requests,",
    "--verify": "requests",
    "/metrics": "headrace_requests_total",
    "/readyz": "ready",
    "doctor": "ok",
    "top --once": "STREAM",
}


async def run_line(desk: Desk, line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        await make(desk, words[1])
    elif words == ["headrace", "serve"]:
        async with command(*words[1:], *ANYWHERE, environ=desk.first) as process:
            await process.serving()
    else:
        printed = await run_there(desk, line)
        for part, expected in SAYS.items():
            if part in line:
                assert expected in printed, f"{line}\n{printed}"


async def run_there(desk: Desk, line: str) -> str:
    """Beside the server that the line speaks of."""
    if line == "headrace check":
        return await desk.shell(line, desk.open, **desk.first)
    needs_keys = any(part in line for part in ("HEADRACE_KEY", "headrace ", ADMIN))
    return await desk.shell(line, desk.keyed if needs_keys else desk.open)


async def make(desk: Desk, target: str) -> None:
    """`run` runs, on free ports and with this interpreter's packages."""
    if target in DRY:
        assert await desk.run("make", "-n", target, cwd=ROOT)
        return
    assert target == "run"
    home = desk.folder / "home"  # its ledger would lie in the repository
    home.mkdir()
    process = await asyncio.create_subprocess_exec(
        *("make", "-f", str(ROOT / "Makefile"), "-o", ".venv/run.stamp"),
        *("run", f"BIN={desk.folder}/bin", "PORT=0", "ADMIN_PORT=0"),
        cwd=home,
        env={**desk.environ, "HEADRACE_CONFIG": ""},
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(20):
            banner = [(await process.stderr.readline()).decode() for _ in range(4)]
    finally:
        process.terminate()  # make has become Headrace
        await process.communicate()
    assert banner[3].strip().startswith("models echo"), banner


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("block", of("sh"))
async def test_shell(desk: Desk, block: Block) -> None:
    """Every line of a shell block does what it says."""
    lines = commands(block)
    assert lines
    for line in lines:
        await run_line(desk, line)


# ── other languages ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("block", of("python"))
async def test_python(desk: Desk, block: Block) -> None:
    """The program gets its stream."""
    printed = await desk.run(sys.executable, "-c", desk.here(block.text, desk.open))
    assert printed.startswith("the quick brown fox")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("block", of("js"))
async def test_javascript(desk: Desk, block: Block) -> None:
    """The same with Node and the newest SDK."""
    environments = Environments()
    try:
        home, node = environments.home("openai-node-7"), environments.node()
    except Unavailable as error:
        pytest.skip(str(error))
    script = home / f"readme.{os.getpid()}.mjs"  # Node finds packages from where a script lies
    try:
        script.write_text(desk.here(block.text, desk.open))
        assert (await desk.run(str(node), str(script))).startswith("the quick brown fox")
    finally:
        script.unlink(missing_ok=True)


@pytest.mark.parametrize("block", of("yaml"))
def test_configuration(tmp_path: Path, block: Block) -> None:
    """Every YAML sample is a whole configuration, and routes its models (what `headrace check` does)."""
    path = tmp_path / "headrace.yaml"
    path.write_text(block.text)
    loaded = config.load(path, variables(block.text))
    assert config.describe_routes(loaded)


def test_the_first_configuration_is_short() -> None:
    """One sees it at a glance."""
    assert len(FIRST.text.splitlines()) <= 12


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("block", of("nginx"))
async def test_nginx(desk: Desk, block: Block) -> None:
    """nginx takes it; the provider's name is not looked up."""
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    file = desk.folder / "nginx.conf"
    text = block.text.replace("api.openai.com", "127.0.0.1")
    log = f"error_log {desk.folder}/error.log; pid {desk.folder}/nginx.pid;"
    server = f"listen unix:{desk.folder}/nginx.sock; {text}"
    file.write_text(f"{log} events {{}} http {{ access_log off; server {{ {server} }} }}")
    await desk.run(nginx, "-t", "-q", "-p", str(desk.folder), "-c", str(file))


@pytest.mark.parametrize("block", of("json"))
def test_json(block: Block) -> None:
    """Is JSON."""
    assert json.loads(block.text)


# ── that nothing is left out ─────────────────────────────────────────────────────────────────────────────


def test_no_block_is_left_out() -> None:
    """A block is run or checked above, or has no language; the LiteLLM sample is looked at in test_docs."""
    known = {"sh", "python", "js", "yaml", "yaml litellm", "nginx", "json", ""}
    assert [block.name for block in BLOCKS if block.info not in known] == []
    plain = [block for block in BLOCKS if not block.info]
    commanding = r"^(\$ |curl|headrace|make|pip|docker|kubectl|python|npm)\b"
    assert [block.name for block in plain if re.search(commanding, block.text, re.MULTILINE)] == []
    assert all(
        (ROOT / "tests" / name).exists()
        for page, name in ELSEWHERE.items()
        if (ROOT / "docs" / page).exists()
    )


def inline(pattern: str) -> set[str]:
    return {found for page in PAGES for found in re.findall(pattern, page.read_text())}


async def test_inline_commands() -> None:
    """Every `headrace X`, `make X` and `python -m X` between words exists, with its flags."""
    makefile = (ROOT / "Makefile").read_text()
    for target in inline(r"`make ([a-z-]+)"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in inline(r"`(?:\.venv/bin/)?python -m ([a-z._]+)"):
        assert find_spec(module), module
    async with command("-h") as process:
        assert await process.ended() == 0
    usage = "\n".join(process.out)
    for verb in inline(r"`headrace ([a-z]+)"):
        assert re.search(rf"^ +{verb}\b", usage, re.MULTILINE), verb
