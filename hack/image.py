#!/usr/bin/env python3
"""Builds the image of the Dockerfile into an archive: `make image`. With Docker where it is, else with buildah.

Without Docker no registry is asked: the base is the same release of Debian by debootstrap. Everything is kept in our
cache, so that a second build takes the layers of the first. Run as root, for chroot and mounts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sandkeeper import __version__
from sandkeeper.localcluster.binaries import cache_root

ROOT = Path(__file__).resolve().parents[1]
NAME = f"docker.io/library/sandkeeper:{__version__}"  # as Kubernetes reads the manifests' `sandkeeper`
RELEASE, MIRROR = "bookworm", "http://deb.debian.org/debian"
BASE = f"localhost/debian:{RELEASE}"
CACHE = cache_root() / "image"
STORE = ("--root", str(CACHE / "store"), "--runroot", str(CACHE / "run"), "--storage-driver", "overlay")
_WITHIN = "SANDKEEPER_IMAGE_WITHIN"
# No program reads these, and the slim base of the Dockerfile lacks them too.
_NEEDLESS = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "var/cache/apt",
    "var/lib/apt/lists",
    "var/log",
)


def with_docker(tool: str, archive: Path) -> None:
    version = f"--build-arg=VERSION={__version__}"
    run(tool, "build", "--quiet", version, "--tag", NAME, str(ROOT))
    run(tool, "save", "--output", str(archive), NAME)


def with_buildah(archive: Path) -> None:
    if not os.environ.get(_WITHIN):  # what it and debootstrap mount is nobody else's
        argv = ["unshare", "--mount", "--propagation", "private", "--", sys.executable, *sys.argv]
        sys.exit(subprocess.run(argv, env=os.environ | {_WITHIN: "1"}, check=False).returncode)
    if left := buildah("containers", "--quiet").split():  # of a build that was ended
        buildah("rm", *left)
    if not buildah("images", "--quiet", "--filter", f"reference={BASE}"):
        make_base()
    options = ["--isolation", "chroot", "--layers", "--pull-never", "--quiet", f"--build-arg=BASE={BASE}"]
    options.append(f"--build-arg=VERSION={__version__}")
    if authorities := os.environ.get("PIP_CERT"):  # a mirror's, where one stands between
        options += ["--volume", f"{authorities}:/run/authorities.crt:ro"]
        options.append("--build-arg=PIP_CERT=/run/authorities.crt")
    say(f"building {NAME} with buildah (some minutes the first time)")
    buildah("bud", *options, "--tag", NAME, str(ROOT))
    archive.unlink(missing_ok=True)
    buildah("push", "--quiet", NAME, f"oci-archive:{archive}:{NAME}")


def make_base() -> None:
    say(f"making a base: Debian {RELEASE} by debootstrap")
    with tempfile.TemporaryDirectory(prefix="sandkeeper-base-") as folder:
        root, tar = Path(folder) / "root", Path(folder) / "base.tar"
        run("debootstrap", "--variant=minbase", RELEASE, str(root), MIRROR)
        for name in _NEEDLESS:
            for each in (root / name).iterdir():
                shutil.rmtree(each) if each.is_dir() else each.unlink()
        run("tar", "--create", "--file", str(tar), "--directory", str(root), ".")
        container = buildah("from", "scratch").strip()
        buildah("add", "--quiet", container, str(tar), "/")
        buildah("commit", "--quiet", "--rm", container, BASE)


def buildah(*argv: str) -> str:
    return run("buildah", *STORE, *argv)


def run(*argv: str) -> str:
    """What it prints. Ends the program with what it has said when it fails."""
    result = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{' '.join(argv)}:\n" + (result.stdout + result.stderr)[-4000:])
    return result.stdout


def say(line: str) -> None:
    sys.stderr.write(f"image: {line}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "sandkeeper.tar", help="the archive")
    parser.add_argument(
        "--with", dest="tool", choices=("docker", "podman", "buildah"), help="default: what is there"
    )
    given = parser.parse_args()
    output = given.output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    tool = given.tool or next((name for name in ("docker", "podman", "buildah") if shutil.which(name)), "")
    if tool == "buildah":
        with_buildah(output)
    elif tool:
        with_docker(tool, output)
    else:
        sys.exit("image: neither docker, podman nor buildah: apt-get install buildah debootstrap")
    sys.stdout.write(f"{NAME} {output}\n")


if __name__ == "__main__":
    main()
