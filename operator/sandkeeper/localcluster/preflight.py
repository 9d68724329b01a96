"""What the oci engine and its tests need of the machine. `python -m sandkeeper.localcluster.preflight [--install]`.

Quiet when nothing is missing. Package names are Debian's and Ubuntu's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


@dataclass(frozen=True, slots=True)
class Need:
    """One thing that is looked for: any of `programs` (names or absolute paths), else `package` brings it."""

    programs: tuple[str, ...]
    package: str
    purpose: str


ENGINE = (
    Need(("crun", "runc"), "crun", "an OCI runtime"),
    Need(("conmon",), "conmon", "each container's monitor"),
    Need(("catatonit", "/usr/libexec/podman/catatonit"), "catatonit", "the sandbox process"),
    Need(("skopeo",), "skopeo", "fetches images"),
    Need(("umoci",), "umoci", "unpacks images"),
    Need(("/bin/busybox",), "busybox-static", "the demo's image"),
    Need(
        ("/usr/share/containers/seccomp.json", "/etc/containers/seccomp.json"),
        "golang-github-containers-common",
        "the seccomp profile",
    ),
)
TESTS = (
    Need(("crun",), "crun", "the tests run every example with both runtimes"),
    Need(("runc",), "runc", "the tests run every example with both runtimes"),
    Need(("/usr/lib/cni/bridge", "/opt/cni/bin/bridge"), "containernetworking-plugins", "the tests' pods"),
    Need(("docker-registry",), "docker-registry", "the tests' registry on loopback"),
    Need(
        tuple(f"/usr/lib/{arch}-linux-gnu/faketime/libfaketime.so.1" for arch in ("x86_64", "aarch64")),
        "libfaketime",
        "the tests set the clocks of operator and shim",
    ),
)
E2E = (
    Need(("ip",), "iproute2", "the node's network"),
    Need(("gcc",), "gcc", "builds runc"),
    Need(("pkg-config",), "pkg-config", "builds runc"),
    Need(("/usr/include/seccomp.h",), "libseccomp-dev", "builds runc"),
)
IMAGE = (
    Need(("buildah",), "buildah", "builds the image"),
    Need(("debootstrap",), "debootstrap", "the image's base"),
)
NO_ROOT = "The oci engine needs root (it makes namespaces, mounts and cgroups): run as root, or use --engine simulated"


def missing(needs: Sequence[Need], *, present: Callable[[str], bool] | None = None) -> list[Need]:
    """Those of `needs` that the machine lacks, one per package."""
    present = present or _present
    lacking = {need.package: need for need in needs if not any(present(p) for p in need.programs)}
    return list(lacking.values())


def command(needs: Sequence[Need]) -> list[str]:
    """The command that installs them, without sudo."""
    return ["apt-get", "install", "--no-install-recommends", "-y", *(need.package for need in needs)]


def problems(needs: Sequence[Need]) -> str:
    """One message with what is missing and what would help; empty when all is there."""
    lines = []
    if lacking := missing(needs):
        lines.append("Missing: " + ", ".join(f"{need.package} ({need.purpose})" for need in lacking))
        lines.append("  " + " ".join(command(lacking)))
    if os.geteuid() != 0:
        lines.append(NO_ROOT)
    return "\n".join(lines)


def install(needs: Sequence[Need]) -> bool:
    """Installs what is missing, as root with apt-get; says what. Returns whether all is there now."""
    lacking = missing(needs)
    if not lacking:
        return True
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return False
    packages = ", ".join(need.package for need in lacking)
    click.echo(f"==> Debian packages: {packages}", err=True)
    if not apt_knows([need.package for need in lacking]):
        _apt(["apt-get", "update", "-qq"])
    return _apt(command(lacking)) and not missing(needs)


def _present(program: str) -> bool:
    if program.startswith("/"):
        return Path(program).exists()
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_SBIN))
    return shutil.which(program, path=path) is not None


def apt_knows(packages: Sequence[str]) -> bool:
    """Whether the package lists have candidates for all: on a fresh machine there are no lists."""
    answer = subprocess.run(
        ["apt-cache", "policy", *packages], capture_output=True, text=True, check=False, cwd="/"
    )
    candidates = [line for line in answer.stdout.splitlines() if line.strip().startswith("Candidate:")]
    return len(candidates) == len(packages) and not any("(none)" in line for line in candidates)


def _apt(argv: Sequence[str]) -> bool:
    result = subprocess.run(
        list(argv),
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd="/",
    )
    if result.returncode != 0:
        click.echo(f"{' '.join(argv)}:\n" + "\n".join(result.stdout.splitlines()[-10:]), err=True)
    return result.returncode == 0


@click.command()
@click.option("--install", "wanted", is_flag=True, help="Install what is missing with apt-get, when root.")
@click.option("--tests/--no-tests", default=True, help="Also what only the tests need.")
@click.option("--e2e", is_flag=True, help="Also what a node of our own needs.")
@click.option("--image", is_flag=True, help="Also what builds the image without Docker.")
def main(wanted: bool, tests: bool, e2e: bool, image: bool) -> None:
    """Check that this machine has what the oci engine needs. Exit status 1 when it has not."""
    chosen = ((tests, TESTS), (e2e, E2E), (image, IMAGE))
    needs = (*ENGINE, *(need for wished, needs in chosen if wished for need in needs))
    if wanted:
        install(needs)
    if message := problems(needs):
        click.echo(message, err=True)
        sys.exit(1)


if __name__ == "__main__":
    main(prog_name="preflight")
