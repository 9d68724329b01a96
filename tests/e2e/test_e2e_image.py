"""The image: what it says of itself is true, and it runs as manifests/ run it, by a real runtime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tomllib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.install import ROOT, image_archive

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

SBOM = "/usr/share/sandkeeper/sbom.cdx.json"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# What Python itself says is installed, without a package of ours or pip.
INSTALLED = (
    "import importlib.metadata, json, sys;"
    "json.dump(sorted((d.metadata['Name'], d.version) for d in importlib.metadata.distributions()), sys.stdout)"
)


@dataclass(frozen=True, slots=True)
class Image:
    """bundle: the image unpacked, with a config.json as umoci makes it. config: the image's own."""

    archive: Path
    bundle: Path
    config: dict[str, Any]

    def run(self, *argv: str, read_only: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command as a container of the image, as its user."""
        path = self.bundle / "config.json"
        spec = json.loads(path.read_text())
        spec["process"] |= {"args": list(argv), "terminal": False}
        spec["root"]["readonly"] = read_only
        spec["linux"].pop("resources", None)
        path.write_text(json.dumps(spec))
        root = self.bundle / "runc"
        name = f"image-{uuid.uuid4().hex[:8]}"
        # The mounts are the runtime's own; what it leaves goes with the folder.
        return subprocess.run(
            ["runc", "--root", str(root), "run", "--bundle", str(self.bundle), name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    if os.geteuid() != 0:
        pytest.skip("images are unpacked and run by root")
    folder = tmp_path_factory.mktemp("image")
    archive = image_archive(folder)
    bundle, layout = folder / "bundle", folder / "layout"
    told("skopeo", "copy", "--quiet", f"oci-archive:{archive}", f"oci:{layout}:image")
    told("umoci", "unpack", "--image", f"{layout}:image", str(bundle))
    config = json.loads(told("skopeo", "inspect", "--config", f"oci:{layout}:image"))
    shutil.rmtree(layout)
    yield Image(archive, bundle, config)
    shutil.rmtree(bundle)


def told(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sbom(image: Image) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((image.bundle / "rootfs" / SBOM.lstrip("/")).read_text())
    return found


def test_it_is_labelled_and_its_user_is_not_root(image: Image) -> None:
    labels = image.config["config"]["Labels"]
    prefix = "org.opencontainers.image."
    found = {name.removeprefix(prefix): value for name, value in labels.items() if name.startswith(prefix)}
    assert (found["title"], found["version"], found["licenses"]) == ("sandkeeper", VERSION, "Apache-2.0")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if head.returncode == 0 and "SANDKEEPER_TEST_IMAGE" not in os.environ:
        assert found["revision"].removesuffix("-dirty") == head.stdout.strip()
    assert found["source"] == "" or found["source"].startswith("https://")
    assert image.config["config"]["User"] == "65532:65532"
    assert image.config["config"]["Entrypoint"] == ["sandkeeper"]


def test_it_runs_with_a_root_that_cannot_be_written(image: Image) -> None:
    done = image.run("sandkeeper", "--version")
    assert done.returncode == 0, done.stderr
    assert VERSION in done.stdout
    assert image.run("id", "-u").stdout.strip() == "65532"
    assert image.run("touch", "/usr/share/sandkeeper/mine").returncode != 0


def test_the_sbom_names_what_is_installed_and_nothing_else(image: Image, sbom: dict[str, Any]) -> None:
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    about = sbom["metadata"]["component"]
    assert (about["name"], about["version"]) == ("sandkeeper", VERSION)
    components = [about, *sbom["components"]]
    named = {
        kind: sorted([c["name"], c["version"]] for c in components if c["purl"].startswith(f"pkg:{kind}/"))
        for kind in ("pypi", "deb")
    }
    python = image.run("/opt/sandkeeper/bin/python", "-c", INSTALLED)
    assert python.returncode == 0, python.stderr
    assert named["pypi"] == sorted(json.loads(python.stdout))
    debian = image.run("dpkg-query", "--show", "--showformat=${Package}\t${Version}\n")
    assert named["deb"] == sorted(line.split("\t") for line in debian.stdout.splitlines())
    assert {"crun", "runc", "conmon", "skopeo"} <= {name for name, _ in named["deb"]}
    assert len(named["pypi"]) + len(named["deb"]) == len(components)


def test_the_sbom_lies_beside_the_archive(image: Image, sbom: dict[str, Any]) -> None:
    beside = image.archive.with_suffix(".cdx.json")
    assert json.loads(beside.read_text()) == sbom
