#!/usr/bin/env python3
"""Builds the image of the Dockerfile into an archive: `make image`. With Docker where it is, else with buildah.

Without Docker no registry is asked: the base is the same release of Debian by debootstrap. Everything is kept in our
cache, so that a second build takes the layers of the first. Run as root, for chroot and mounts.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from sandkeeper import __version__
from sandkeeper.localcluster import preflight
from sandkeeper.localcluster.binaries import cache_root

ROOT = Path(__file__).resolve().parents[1]
NAME = f"docker.io/library/sandkeeper:{__version__}"  # as Kubernetes reads the manifests' `sandkeeper`
RELEASE, MIRROR = "bookworm", "http://deb.debian.org/debian"
BASE = f"localhost/debian:{RELEASE}"
CACHE = cache_root() / "image"
STORE = ("--root", str(CACHE / "store"), "--runroot", str(CACHE / "run"), "--storage-driver", "overlay")
SBOM = "/usr/share/sandkeeper/sbom.cdx.json"  # in the image; beside the archive as NAME.cdx.json
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
    run(tool, "build", "--quiet", *build_arguments(), "--tag", NAME, str(ROOT))
    run(tool, "save", "--output", str(archive), NAME)
    container = run(tool, "create", NAME).strip()
    try:
        run(tool, "cp", f"{container}:{SBOM}", str(sbom_beside(archive)))
    finally:
        run(tool, "rm", container)


def build_arguments() -> list[str]:
    """What the Dockerfile cannot know: version, commit and repository. Without git, or a remote, these are empty."""
    revision = git("rev-parse", "HEAD")
    if revision and git("status", "--porcelain"):
        revision += "-dirty"
    given = {
        "VERSION": __version__,
        "REVISION": revision,
        "SOURCE": public(git("remote", "get-url", "origin")),
    }
    return [f"--build-arg={name}={value}" for name, value in given.items()]


def git(*argv: str) -> str:
    """What git says of this tree; empty where it is none of git's, or there is no git."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return ""
    done = subprocess.run(["git", *argv], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def public(url: str) -> str:
    """A URL that others can use and that tells no secret; empty for a path, and for one with a user in it."""
    parts = urlsplit(url)
    return url if parts.scheme == "https" and "@" not in parts.netloc else ""


def sbom_beside(archive: Path) -> Path:
    return archive.with_suffix(".cdx.json")


def builder() -> str:
    """docker or podman where it answers, else buildah: a docker client without a daemon is nothing rare."""
    for name in ("docker", "podman"):
        if (
            shutil.which(name)
            and not subprocess.run([name, "info"], capture_output=True, check=False).returncode
        ):
            return name
    return "buildah"


def with_buildah(archive: Path) -> None:
    if not os.environ.get(_WITHIN):  # what it and debootstrap mount is nobody else's
        preflight.install(preflight.IMAGE)
        if lacking := preflight.missing(preflight.IMAGE):
            sys.exit(
                f"image: no docker answers; for buildah, as root: {' '.join(preflight.command(lacking))}"
            )
        argv = ["unshare", "--mount", "--propagation", "private", "--", sys.executable, *sys.argv]
        with (CACHE / "lock").open("w") as held:  # one at a time: each removes what the one before has left
            fcntl.flock(held, fcntl.LOCK_EX)
            sys.exit(subprocess.run(argv, env=os.environ | {_WITHIN: "1"}, check=False).returncode)
    if left := buildah("containers", "--quiet").split():  # of a build that was ended
        buildah("rm", *left)
    if not buildah("images", "--quiet", "--filter", f"reference={BASE}"):
        make_base()
    options = ["--isolation", "chroot", "--layers", "--pull-never", "--quiet", f"--build-arg=BASE={BASE}"]
    options += build_arguments()
    if authorities := os.environ.get("PIP_CERT"):  # a mirror's, where one stands between
        options += ["--volume", f"{authorities}:/run/authorities.crt:ro"]
        options.append("--build-arg=PIP_CERT=/run/authorities.crt")
    say(f"building {NAME} with buildah (some minutes the first time)")
    buildah("bud", *options, "--tag", NAME, str(ROOT))
    archive.unlink(missing_ok=True)
    buildah("push", "--quiet", NAME, f"oci-archive:{archive}:{NAME}")
    container = buildah("from", "--pull-never", NAME).strip()
    shutil.copyfile(buildah("mount", container).strip() + SBOM, sbom_beside(archive))
    buildah("rm", container)


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
        "--with", dest="tool", choices=("docker", "podman", "buildah"), help="default: what answers"
    )
    given = parser.parse_args()
    output = given.output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    tool = given.tool or ("buildah" if os.environ.get(_WITHIN) else builder())
    if tool == "buildah":
        with_buildah(output)
    else:
        with_docker(tool, output)
    sys.stdout.write(f"{NAME} {output} {sbom_beside(output)}\n")


if __name__ == "__main__":
    main()
