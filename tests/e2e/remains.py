"""What a Sandbox may leave on a node: found from outside, by its id on the node, in the kernel's lists and on disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from tests.cluster import eventually

from sandkeeper.localcluster.onenode import OneNode

_PROC = Path("/proc")


def assert_none(node: OneNode, ids: Collection[str], seconds: float = 60.0) -> None:
    """Of these sandboxes nothing is on the node. Raises AssertionError with what is after `seconds`."""
    assert ids
    eventually(lambda: not remains(node, ids), timeout=seconds, seen=lambda: remains(node, ids))


def assert_no_sandbox(node: OneNode, seconds: float = 60.0) -> None:
    """There is none on the node, of whomever."""
    eventually(lambda: not all_ids(node), timeout=seconds, seen=lambda: all_ids(node))
    eventually(lambda: not _cgroups(node, ""), timeout=seconds, seen=lambda: _cgroups(node, ""))


def all_ids(node: OneNode) -> list[str]:
    """Those that have a folder on the node."""
    root = node.outside("/var/lib/sandkeeper")
    return sorted({each.name for pattern in ("sandboxes/*", "*/sandboxes/*") for each in root.glob(pattern)})


def remains(node: OneNode, ids: Collection[str]) -> list[str]:
    """One line for each thing."""
    found: list[str] = []
    for name in ids:
        found += [f"cgroup {each}" for each in _cgroups(node, name)]
        for folder in ("/var/lib/sandkeeper", "/run/sandkeeper"):
            for root in (node.outside(folder), node.outside(f"{folder}-edge")):
                found += [f"folder {each}" for each in _below(root) if name in each.name]
        found += _in_proc(name.encode())
    return found


def cgroups(pattern: str) -> list[Path]:
    """Those at the top of a hierarchy. None of others below: these come and go while one looks."""
    points = [
        line.split()[4]
        for line in _PROC.joinpath("self", "mountinfo").read_text().splitlines()
        if line.partition(" - ")[2].startswith("cgroup")
    ]
    return [each for point in points for each in Path(point).glob(pattern) if each.is_dir()]


def _cgroups(node: OneNode, name: str) -> list[Path]:
    """Those of a sandbox; of all but the engine's own where no name is given."""
    found: list[Path] = []
    for root in cgroups(f"{node.cgroup}-*"):
        folders = _below(root) if name else root.iterdir()
        found += [each for each in folders if name in each.name and each != root and each.is_dir()]
    return [each for each in found if not each.name.startswith("_")]


def _below(root: Path) -> list[Path]:
    """The folders there, those that go meanwhile left out (which Path.glob does not)."""
    return [Path(folder) for folder, _, _ in os.walk(root)]


def _in_proc(name: bytes) -> Iterator[str]:
    """Processes that name it, and mounts in whatever namespace any process is in."""
    seen: set[str] = set()
    for pid in (each for each in os.listdir(_PROC) if each.isdigit()):  # noqa: PTH208 - names, no paths
        with contextlib.suppress(OSError):
            if name in (_PROC / pid / "cmdline").read_bytes() + (_PROC / pid / "environ").read_bytes():
                yield f"process {pid}"
            namespace = os.readlink(_PROC / pid / "ns" / "mnt")  # noqa: PTH115 - not a path
            if namespace not in seen and name in (_PROC / pid / "mountinfo").read_bytes():
                yield f"mount as {pid} sees it"
            seen.add(namespace)
