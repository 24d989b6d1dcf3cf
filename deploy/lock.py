"""`make lock`: deploy/requirements.lock anew, from what setup.cfg and pyproject.toml declare.

Every release that a server runs (with the extra `redis`) or is built by, for all platforms and Pythons from
3.11 on, with the hashes of its files: `pip install --require-hashes` takes nothing else, whoever serves it.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
LOCK = _ROOT / "deploy" / "requirements.lock"
#: The floor of setup.cfg's python_requires.
_PYTHON = "3.11"


def build_requirements() -> list[str]:
    """What builds the package: locked too, so that `--no-build-isolation` needs nothing else."""
    with (_ROOT / "pyproject.toml").open("rb") as file:
        found: list[str] = tomllib.load(file)["build-system"]["requires"]
    return found


def main() -> int:
    words = [sys.executable, "-m", "uv", "pip", "compile", "setup.cfg", "-", "--extra", "redis", "--upgrade"]
    words += ["--universal", "--python-version", _PYTHON, "--generate-hashes", "--quiet", "--no-config"]
    words += ["--custom-compile-command", "make lock", "--output-file", str(LOCK.relative_to(_ROOT))]
    given = "\n".join(build_requirements()).encode()
    return subprocess.run(words, cwd=_ROOT, input=given, stdout=subprocess.DEVNULL).returncode  # noqa: S603 - our own words


if __name__ == "__main__":
    sys.exit(main())
