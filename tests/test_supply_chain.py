"""What runs is what was declared, locked and listed: the lock, the SBOM, the imports, the parser in C."""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy import lock, sbom
from tests.kit.headrace import ROOT

#: One release of the lock: name, version, marker, hashes.
_RELEASE = re.compile(
    r"^([a-z0-9-]+)==([0-9][0-9a-z.]*)(?: ; ([^\\\n]+?))?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.M
)
_LINE = re.compile(r" *(#.*|[a-z0-9-]+==[^\\]+ \\|--hash=sha256:[0-9a-f]{64}(?: \\)?)")
#: What it has to be good for; `platform_machine` as well as all else is this machine's.
PLACES = [
    {"python_version": version, "python_full_version": f"{version}.9", "platform_machine": machine}
    for version in ("3.11", "3.12", "3.13")
    for machine in ("x86_64", "aarch64")
]


def locked(place: dict[str, str]) -> dict[str, str]:
    """Name -> version of what is installed there."""
    return {
        name: version
        for name, version, marker, _ in _RELEASE.findall(lock.LOCK.read_text())
        if not marker or Requirement(f"{name} ; {marker}").marker.evaluate(place)
    }


def declared() -> list[Requirement]:
    """What setup.cfg says a server needs, with Redis, and what pyproject.toml says builds it."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"] + setup["options.extras_require"]["redis"]
    return [Requirement(line) for line in [*lines.split("\n"), *lock.build_requirements()] if line.strip()]


# ── the lock ─────────────────────────────────────────────────────────────────────────────────────────────


def test_every_release_has_hashes() -> None:
    """Nothing but names, versions, markers and hashes: no index, no URL, nothing that is not pinned."""
    text = lock.LOCK.read_text()
    assert "://" not in text
    assert all(_LINE.fullmatch(line) for line in text.splitlines())
    names = [name for name, *_ in _RELEASE.findall(text)]
    assert len(names) == len(set(names)) == len(re.findall(r"^[a-z0-9]", text, re.M))


@pytest.mark.parametrize("place", PLACES, ids=lambda place: "-".join(place.values()))
def test_the_lock_satisfies_what_is_declared(place: dict[str, str]) -> None:
    """On every Python and both machines; `make lock` if it does not."""
    versions = locked(place)
    for requirement in declared():
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, requirement
        assert requirement.specifier.contains(version), requirement


def test_the_lock_holds_what_is_needed_and_no_more() -> None:
    """What the declared pull in here is in it, each in a version that all who need it take; nothing else is,
    but what builds."""
    versions = locked({})
    building = {canonicalize_name(Requirement(line).name) for line in lock.build_requirements()}
    needed = sbom.runtime_set()
    assert versions.keys() - building == needed.keys() - {sbom.NAME}
    for name in needed:
        for requirement in map(Requirement, distribution(name).requires or ()):
            version = versions.get(canonicalize_name(requirement.name))
            if version is not None and requirement.marker is None:
                assert requirement.specifier.contains(version), (name, requirement)


def test_make_run_installs_from_the_lock() -> None:
    """With hashes, and nothing else: no dependency that is not locked, no tool to build with."""
    words = ("make", "-n", "-W", "setup.cfg", ".venv/run.stamp")
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installs = [line for line in said.splitlines() if "pip install" in line]
    assert len(installs) == 2
    assert "--require-hashes -r deploy/requirements.lock" in installs[0]
    assert "--no-deps --no-build-isolation -e ." in installs[1]


# ── the SBOM ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_sbom(tmp_path: Path) -> None:
    """Valid CycloneDX; the whole runtime set with versions and licences, and nothing that only tests."""
    file = tmp_path / "headrace.cdx.json"
    assert sbom.main([str(file)]) == 0
    text = file.read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text.replace('"library"', '"x"')) is not None
    document: dict[str, Any] = json.loads(text)
    assert document["metadata"]["component"]["name"] == "headrace"
    components = {each["name"]: each for each in document["components"]}
    assert components.keys() == sbom.runtime_set().keys() - {"headrace"}
    assert {"aiohttp", "cryptography", "redis", "yarl"} <= components.keys()
    assert not {"pytest", "hypothesis", "setuptools", "pip"} & components.keys()
    for name, each in components.items():
        assert each["version"] == distribution(name).version
        assert each["licenses"], name
    edges = {each["ref"]: each.get("dependsOn", []) for each in document["dependencies"]}
    assert "yarl" in edges["aiohttp"]
    assert "cryptography" in edges["pyjwt"]


# ── what is loaded ───────────────────────────────────────────────────────────────────────────────────────

#: What is not allowed is not found; libraries may look (structlog for greenlet), modules of ours may not.
_LOAD = """
import importlib, pkgutil, sys

class Gate:
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ALLOWED:
            specs = (finder.find_spec(name, path, target) for finder in self.finders)
            return next((spec for spec in specs if spec is not None), None)
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        asks = frame.f_globals["__name__"]
        if asks.partition(".")[0] == "proxy":
            sys.exit(f"{asks} imports {name}")

ALLOWED = {*sys.stdlib_module_names, *sys.argv[1:]}
sys.meta_path[:] = [Gate(sys.meta_path[:])]
import proxy.cli
for module in pkgutil.walk_packages(proxy.__path__, "proxy."):
    if module.name != "proxy.__main__":
        importlib.import_module(module.name)
print(len(sys.modules))
"""


def test_nothing_else_is_loaded(tmp_path: Path) -> None:
    """In a fresh interpreter, the command and every module: with the standard library, the declared
    dependencies and what these need, and not even a try at more."""
    runtime = sbom.runtime_set().keys()
    tops = [
        top
        for top, owners in packages_distributions().items()
        if runtime & set(map(canonicalize_name, owners))
    ]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}

    def loaded(allowed: list[str]) -> subprocess.CompletedProcess[str]:
        words = (sys.executable, "-c", _LOAD, "proxy", *allowed)
        return subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True)

    done = loaded(tops)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > len(tops)
    less = loaded([top for top in tops if top != "msgspec"])
    assert re.fullmatch(r"proxy[.\w]* imports msgspec\n", less.stderr)


def test_no_server_without_the_parser_in_c(tmp_path: Path) -> None:
    """aiohttp's parser in Python has had request smuggling that the one in C has not: no start, one line."""
    config = tmp_path / "headrace.yaml"
    config.write_text("listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\nupstreams: {up: {base_url: 'mock:'}}\n")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "AIOHTTP_NO_EXTENSIONS": "1"}
    words = (sys.executable, "-m", "proxy", "serve", "-c", str(config))
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "headrace: aiohttp runs without its C parser: install a wheel, unset AIOHTTP_NO_EXTENSIONS"
    ]
    assert not done.stdout
