"""Which SDKs are driven, and by what: the columns of the matrix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PINS = HERE / "pins"
NODE = "node"


class Column(NamedTuple):
    """One client of one SDK; `sdk` names its folder of pins."""

    name: str
    sdk: str
    dialect: str
    words: tuple[str, ...] = ()

    @property
    def driver(self) -> Path:
        return HERE / f"drive_{self.dialect}{'.py' if self.words else '.mjs'}"

    @property
    def path(self) -> str:
        """What follows the address in this SDK's base URL."""
        return "/v1" if self.dialect == "openai" else ""


def _python(sdk: str, dialect: str) -> Iterator[Column]:
    return (Column(f"{sdk}-{mode}", sdk, dialect, (mode,)) for mode in ("sync", "async"))


COLUMNS = (
    *_python("openai-python-3", "openai"),
    *_python("openai-python-2", "openai"),
    Column("openai-node-7", "openai-node-7", "openai"),
    Column("openai-node-6", "openai-node-6", "openai"),
    *_python("anthropic-python-2", "anthropic"),
    Column("anthropic-node-1", "anthropic-node-1", "anthropic"),
)


def pin(sdk: str) -> Path:
    """The file that pins an SDK."""
    python = PINS / sdk / "requirements.txt"
    return python if python.exists() else PINS / sdk / "package.json"


def pinned_version(sdk: str) -> str:
    """The exact version that the pin asks for; of several packages, all of them."""
    file = pin(sdk)
    if file.name == "requirements.txt":
        return file.read_text().strip().partition("==")[2]
    return " ".join(json.loads(file.read_text())["dependencies"].values())
