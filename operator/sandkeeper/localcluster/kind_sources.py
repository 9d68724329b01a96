"""kind, and a program of ours that reads a configuration as kind does, without Docker (gomodules/kind).

Built from their pinned Go module into our cache. PATH is not looked at: which version reads it is decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sandkeeper.localcluster import binaries, gobuild
from sandkeeper.localcluster.binaries import BinariesError

CLUSTER, CONFIG = "kind", "kind-config"
"""Programs: kind itself, and the one that says whether a configuration is good."""

Say = Callable[[str], None]


def ensure(name: str, *, say: Say | None = None) -> Path:
    """Where one of them is; it is built first where it is missing. Raises BinariesError."""
    say = say or (lambda _line: None)
    target = binaries.cache_dir(gobuild.KIND.folder)
    if not binaries.executable(target / name):
        with binaries.lock(say):  # whoever held it may have made it
            if not binaries.executable(target / name):
                gobuild.build([name], target, say, gobuild.KIND)
    if not binaries.executable(target / name):
        raise BinariesError(f"{name} could not be built from its Go module; what go said is above")
    return target / name
