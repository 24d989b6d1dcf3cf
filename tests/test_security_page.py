"""SECURITY.md: its table names tests that are there, and what it says of a stolen database is so."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.kit.callers import ask, chat
from tests.kit.headrace import ROOT, until
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.lab import PLAIN, lab, plays, response

PAGE = (ROOT / "SECURITY.md").read_text()
#: asset, attacker, defence, proofs
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.partition("\n## Threats\n")[2].splitlines()
    if line.startswith("|")
][2:]
_PROOF = re.compile(r"`(tests/[a-z_/]+\.py)::(test_[a-z0-9_]+)`")


@cache
def collected(file: str) -> frozenset[str]:
    """The test functions of a file, as pytest collects them."""
    tree = ast.parse((ROOT / file).read_text())
    functions = (each for each in tree.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(each.name for each in functions if each.name.startswith("test_"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}: {row[1]}")
def test_every_threat_names_tests_that_are_there(row: list[str]) -> None:
    assert len(row) == 4
    assert all(row)
    proofs = _PROOF.findall(row[3])
    assert proofs
    assert not _PROOF.sub("", row[3]).strip(), "something that is no test"
    for file, name in proofs:
        assert Path(file).name.startswith("test_")
        assert name in collected(file), f"{file}::{name}"


def test_the_table_is_read() -> None:
    """Every table row of the section is one of the rows above."""
    assert len(ROWS) >= 20
    assert len(ROWS) == PAGE.partition("\n## Threats\n")[2].count("\n|") - 2


ANSWER = b"ANSWER-CANARY"
STREAM = (
    b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":7}}\n\ndata: [DONE]\n\n' % ANSWER
)
REFUSAL = b'{"error":{"message":"%b"}}' % ANSWER


def everything_in(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "answer",
    [response(200, STREAM, "Content-Type: text/event-stream"), response(500, REFUSAL)],
    ids=["a stream", "an error"],
)
async def test_what_a_stolen_folder_gives(tmp_path: Path, answer: bytes) -> None:
    """Keys, ledger, pepper and log: the key's id and the count of tokens, no secret, no prompt, no answer."""
    key = await make_key(tmp_path)
    _, key_id, secret = key.split("_", 2)
    upstream = {"api_key": "UPSTREAM-CANARY"}
    sections = {"auth": auth_section(tmp_path), "upstream": upstream}
    sections["ledger"] = {"database": f"sqlite:{tmp_path}/ledger.db"}
    sections["log"] = {"level": "debug"}
    prompt = [{"role": "user", "content": "PROMPT-CANARY"}]
    async with lab(plays(answer), PLAIN[0], **sections) as it:
        told = await ask(it.port, chat(bearer(key), messages=prompt))
        assert ANSWER in told.body
        await until(lambda: bool(it.headrace.log_lines()))
        shown = b"".join([*it.headrace.sink.lines, repr(await it.headrace.metrics()).encode()])
    stolen = everything_in(tmp_path)
    assert key_id.encode() in stolen
    assert key_id.encode() in shown
    assert b"/v1/chat/completions" in stolen
    for hidden in (secret.encode(), b"UPSTREAM-CANARY", b"PROMPT-CANARY", ANSWER):
        assert hidden not in stolen
        assert hidden not in shown
