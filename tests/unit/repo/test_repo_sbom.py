"""hack/sbom.py, and the Dockerfile beside hack/image.py."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DPKG = """\
ii \tcrun\t1.8.1-1+deb12u1\tamd64\tcrun
ii \tlibc6\t2.36-9+deb12u13\tamd64\tglibc
rc \tgone\t1.0\tall\tgone
"""


def hack(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hack_{name}", ROOT / "hack" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sbom() -> dict[str, Any]:
    made = hack("sbom")
    python = list(made.python_components(Path(sys.prefix)))
    text = made.document([*python, *made.debian_components(DPKG, "bookworm")])
    assert text == made.document([*reversed(python), *made.debian_components(DPKG, "bookworm")])
    found: dict[str, Any] = json.loads(text)
    return found


def test_every_distribution_is_named_with_its_version(sbom: dict[str, Any]) -> None:
    there = {(each.metadata["Name"], each.version) for each in distributions(path=_site_packages())}
    named = {
        (each["name"], each["version"])
        for each in [sbom["metadata"]["component"], *sbom["components"]]
        if each["purl"].startswith("pkg:pypi/")
    }
    assert named == there
    assert sbom["metadata"]["component"]["name"] == "sandkeeper"


def test_debians_packages_are_those_that_are_installed(sbom: dict[str, Any]) -> None:
    purls = [each["purl"] for each in sbom["components"] if each["purl"].startswith("pkg:deb/")]
    assert purls == [
        "pkg:deb/debian/crun@1.8.1-1%2Bdeb12u1?arch=amd64&distro=bookworm",
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u13?arch=amd64&distro=bookworm&upstream=glibc",
    ]


def _site_packages() -> list[str]:
    return [str(path) for path in Path(sys.prefix).glob("lib/python3*/site-packages")]


# The two ways to build are one Dockerfile; this is what the other way must know of it.


def test_what_is_given_to_the_dockerfile_is_what_it_asks_for() -> None:
    image = hack("image")
    asked = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    given = {each.removeprefix("--build-arg=").partition("=")[0] for each in image.build_arguments()}
    assert given | {"BASE", "PIP_CERT"} == asked
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"^ARG VERSION=(.*)$", DOCKERFILE, re.MULTILINE) == [version]
    assert image.NAME.endswith(f":{version}")


def test_both_have_the_same_release_of_debian_and_the_sbom_in_one_place() -> None:
    image = hack("image")
    assert re.findall(r"^ARG BASE=\S+debian:(\w+)-slim@sha256:[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE) == [
        image.RELEASE
    ]
    assert f" {image.SBOM}\n" in DOCKERFILE


def test_what_the_dockerfile_copies_is_let_through() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for word in line.split()[:-1]
    ]
    assert copied
    for each in copied:
        assert (ROOT / each).exists()
        assert any(Path(each).match(allowed.removeprefix("!")) for allowed in ignored if allowed[0] == "!"), (
            each
        )


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://git.example/team/sandkeeper", "https://git.example/team/sandkeeper"),
        ("https://user:token@git.example/team/sandkeeper", ""),
        ("git@git.example:team/sandkeeper.git", ""),
        ("/srv/git/sandkeeper", ""),
        ("", ""),
    ],
)
def test_no_path_or_secret_gets_into_a_label(url: str, told: str) -> None:
    assert hack("image").public(url) == told
