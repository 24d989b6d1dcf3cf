"""`make sbom`: what a server runs, as a CycloneDX document, from the metadata of what is installed.

python -m deploy.sbom FILE

Names, versions, licences and who needs whom; nothing that only tests or builds it. The hashes of the files of
each release stand in deploy/requirements.lock.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NAME = "headrace"
#: What a server may be asked to run with.
EXTRAS = ("redis",)
#: Longer than the name of any licence: its whole text.
_LONGEST_LICENCE = 80


def needs(found: Distribution, extras: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Name -> extras of what a distribution needs in this environment."""
    needed: dict[str, tuple[str, ...]] = {}
    for requirement in map(Requirement, found.requires or ()):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            name = canonicalize_name(requirement.name)
            needed[name] = (*needed.get(name, ()), *sorted(requirement.extras))
    return needed


def runtime_set() -> dict[str, dict[str, tuple[str, ...]]]:
    """Every distribution that is needed, by name, with what it needs. Raises PackageNotFoundError."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    waiting: list[tuple[str, tuple[str, ...]]] = [(NAME, EXTRAS)]
    while waiting:
        name, extras = waiting.pop()
        fresh = needs(distribution(name), extras)
        if name in found and fresh.keys() <= found[name].keys():
            continue
        found[name] = {**found.get(name, {}), **fresh}
        waiting += found[name].items()
    return found


def component(name: str) -> Component:
    found = distribution(name)
    # An old field may hold a licence's whole text.
    licence = found.metadata.get("License-Expression") or found.metadata.get("License") or ""
    known = licence if licence and len(licence) <= _LONGEST_LICENCE and "\n" not in licence else None
    return Component(
        type=ComponentType.APPLICATION if name == NAME else ComponentType.LIBRARY,
        name=name,
        version=found.version,
        bom_ref=name,
        purl=PackageURL("pypi", name=name, version=found.version),
        licenses=[LicenseFactory().make_from_string(known)] if known else [],
    )


def document() -> str:
    """The whole, as JSON. Raises PackageNotFoundError."""
    needed = runtime_set()
    components = {name: component(name) for name in sorted(needed)}
    bom = Bom(components=[each for name, each in components.items() if name != NAME])
    bom.metadata.component = components[NAME]
    for name, others in needed.items():
        bom.register_dependency(components[name], [components[other] for other in others])
    return JsonV1Dot6(bom).output_as_string(indent=2)


def main(words: list[str]) -> int:
    try:
        text = document()
    except PackageNotFoundError as error:
        sys.stderr.write(f"sbom: {error.name} is not installed here: make sbom\n")
        return 1
    Path(words[0]).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
