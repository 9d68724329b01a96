#!/usr/bin/env python3
"""Writes what an image is made of, as CycloneDX JSON: `sbom.py VENV` within the image, to standard output.

Python's distributions in that environment and Debian's packages on this system, each with version, purl and, for
Python's, licence. The same contents give the same bytes: no time, no random number.
"""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

OURS = "sandkeeper"
_NAMESPACE = uuid.UUID(
    "6b1f0f2c-6d0e-5c0b-9a5e-3f5d1b2c7a90"
)  # any of our own: the serial number is made from it
_FORMAT = "${db:Status-Abbrev}\t${Package}\t${Version}\t${Architecture}\t${source:Package}\n"


def python_components(environment: Path) -> Iterator[Component]:
    """One for each distribution that is installed in a virtual environment."""
    paths = [str(path) for path in environment.glob("lib/python3*/site-packages")]
    for each in distributions(path=paths):
        name, version = each.metadata["Name"], each.version
        purl = PackageURL("pypi", name=name.lower().replace("_", "-"), version=version)
        yield _component(name, version, purl, _license(each))


def debian_components(said: str, release: str) -> Iterator[Component]:
    """One for each package that dpkg-query, asked with _FORMAT, calls installed. release: bookworm."""
    for line in said.splitlines():
        status, name, version, architecture, source = line.split("\t")
        if not status.startswith("ii"):
            continue
        qualifiers = {"arch": architecture, "distro": release}
        if source != name:
            qualifiers["upstream"] = source
        yield _component(name, version, PackageURL("deb", "debian", name, version, qualifiers))


def document(components: list[Component]) -> str:
    """The SBOM; the component of our own name is what it is about."""
    about = next(each for each in components if each.name == OURS)
    purls = sorted(str(each.purl) for each in components)
    bom = Bom(components=[each for each in components if each is not about])
    bom.metadata.component = about
    bom.serial_number = uuid.uuid5(_NAMESPACE, "\n".join(purls))
    bom.metadata.timestamp = None  # type: ignore[assignment]
    bom.register_dependency(about, [each for each in components if each is not about])
    return JsonV1Dot6(bom).output_as_string(indent=1)


def _component(name: str, version: str, purl: PackageURL, licence: License | None = None) -> Component:
    kind = ComponentType.APPLICATION if name == OURS else ComponentType.LIBRARY
    licenses = [licence] if licence else []
    return Component(type=kind, name=name, version=version, purl=purl, bom_ref=str(purl), licenses=licenses)


def _license(distribution: Distribution) -> License | None:
    """What it says of itself, where that is one line: some put the whole text there."""
    metadata = distribution.metadata
    classified = [each for each in metadata.get_all("Classifier", []) if each.startswith("License ::")]
    said = metadata.get("License-Expression") or metadata.get("License") or ""
    if not said or "\n" in said:
        said = classified[0].rpartition(" :: ")[2] if classified else ""
    return LicenseFactory().make_from_string(said) if said else None


def main() -> None:
    environment = Path(sys.argv[1])
    os_release = dict(line.partition("=")[::2] for line in Path("/etc/os-release").read_text().splitlines())
    said = subprocess.run(
        ["dpkg-query", "--show", f"--showformat={_FORMAT}"], check=True, capture_output=True, text=True
    ).stdout
    debian = debian_components(said, os_release["VERSION_CODENAME"].strip('"'))
    sys.stdout.write(document([*python_components(environment), *debian]) + "\n")


if __name__ == "__main__":
    main()
