"""Where the containerds that the tests run come from: one built from its pinned Go module, one that is Debian's.

Neither is installed: they are in our cache, and the machine's own containerd is never used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from sandkeeper.localcluster import binaries, gobuild, preflight
from sandkeeper.localcluster.binaries import BinariesError, Found

Source = Literal["module", "debian"]
SOURCES: tuple[Source, ...] = ("module", "debian")
PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr")

Say = Callable[[str], None]


def folder(source: Source) -> Path:
    """Where its programs are, or will be."""
    if source == "module":
        return binaries.cache_dir(gobuild.CONTAINERD.folder)
    return binaries.cache_root() / "bin" / f"containerd-{_release()}"


def find(source: Source) -> Found | None:
    """The folder of its programs, or None where they have not been made yet. PATH is not looked at: which version
    is tested is decided here."""
    found = folder(source)
    if not all(binaries.executable(found / name) for name in PROGRAMS):
        return None
    return Found(_named(source), found, "cache")


def ensure(source: Source, *, say: Say | None = None) -> Found:
    """The folder of its programs; what is missing is built, or fetched, first. Raises BinariesError."""
    say = say or (lambda _line: None)
    if found := find(source):
        return found
    with binaries.lock(say):  # whoever held it may have made it
        if found := find(source):
            return found
        if source == "debian":
            _fetch(folder(source), say)
            return Found(_named(source), folder(source), "apt-get download")
        names = [name for name in PROGRAMS if not binaries.executable(folder(source) / name)]
        made = gobuild.build(names, folder(source), say, gobuild.CONTAINERD)
        if len(made) != len(names):
            raise BinariesError("containerd could not be built from its Go module; what go said is above")
        return Found(_named(source), folder(source), "built")


def _named(source: Source) -> str:
    return "containerd" if source == "module" else "containerd (apt)"


def _release() -> str:
    """Debian's (or Ubuntu's) name for itself: another release has another containerd."""
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except OSError:
        lines = []
    known = dict(line.partition("=")[::2] for line in lines)
    return known.get("VERSION_CODENAME", "").strip('"') or "unknown"


def _fetch(target: Path, say: Say) -> None:
    """The distribution's package, unpacked and not installed."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise BinariesError("Debian's containerd cannot be had without apt-get and dpkg-deb")
    say("Fetching Debian's containerd package")
    with tempfile.TemporaryDirectory(prefix="sandkeeper-deb-") as work:
        if not preflight.apt_knows(["containerd"]):
            _run(["apt-get", "update", "-qq"], work)
        _run(["apt-get", "download", "-qq", "containerd"], work)
        package = next(Path(work).glob("containerd_*.deb"), None)
        if package is None:
            raise BinariesError("apt-get download containerd brought no package")
        _run(["dpkg-deb", "-x", str(package), f"{work}/unpacked"], work)
        target.mkdir(parents=True, exist_ok=True)
        for name in PROGRAMS:
            with (Path(work) / "unpacked/usr/bin" / name).open("rb") as content:
                gobuild.place(content, target / name)


def _run(argv: list[str], folder: str) -> None:
    try:
        result = subprocess.run(
            argv,
            cwd=folder,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    except subprocess.TimeoutExpired:
        raise BinariesError(f"{' '.join(argv)} did not end within 5 minutes") from None
    if result.returncode != 0:
        words = (result.stderr.strip() or result.stdout.strip()).splitlines()[-5:]
        raise BinariesError(f"{' '.join(argv)}: " + "\n".join(words))
