"""The README's own commands and snippets, as they stand there."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from tests.kit.headrace import ROOT, command

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


async def output(*words: str) -> str:
    """What a program that has to succeed writes."""
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_first_requests() -> None:
    """The first curl and the Python snippet get their streams."""
    curl = next(block for block in blocks("sh") if block.startswith("curl"))
    snippet = next(block for block in blocks("python") if "OpenAI(" in block)
    async with command("serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0") as process:
        port, _ = await process.serving()
        here = f"127.0.0.1:{port}"
        assert "127.0.0.1:8080" in curl
        assert "127.0.0.1:8080" in snippet
        streamed = await output("bash", "-c", curl.replace("127.0.0.1:8080", here))
        assert streamed.endswith("data: [DONE]\n\n")
        printed = await output(sys.executable, "-c", snippet.replace("127.0.0.1:8080", here))
        assert printed.startswith("the quick brown fox")


async def test_provider_configuration(tmp_path: Path) -> None:
    """The YAML for real providers is accepted, and routes as it says."""
    text = blocks("yaml")[0]
    path = tmp_path / "headrace.yaml"
    path.write_text(text)
    names = ("OPENAI", "ANTHROPIC", "GEMINI", "DEEPSEEK")
    environ = {f"{name}_API_KEY": "x" for name in names}
    async with command("check", "-c", str(path), environ=environ) as process:
        assert await process.ended() == 0
    assert any("gpt-4.1 -> openai (https://api.openai.com/v1)" in line for line in process.out)
    assert len(text.splitlines()) <= 12


def test_make_targets() -> None:
    """Every `make` target that the README names exists."""
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
