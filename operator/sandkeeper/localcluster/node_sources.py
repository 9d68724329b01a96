"""What a node needs beyond the API server and containerd: the other Kubernetes programs and a runc.

Built from their pinned Go modules into our cache. PATH is not looked at: which version is tested is decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sandkeeper.localcluster import binaries, gobuild
from sandkeeper.localcluster.binaries import BinariesError

MODULES = (gobuild.NODE, gobuild.RUNC)

Say = Callable[[str], None]


def find() -> dict[str, Path]:
    """program -> where it is, of those that are there."""
    paths = {name: binaries.cache_dir(each.folder) / name for each in MODULES for name in each.programs}
    return {name: path for name, path in paths.items() if binaries.executable(path)}


def ensure(*, say: Say | None = None) -> dict[str, Path]:
    """program -> where it is; what is missing is built first. Raises BinariesError."""
    say = say or (lambda _line: None)
    wanted = {name for each in MODULES for name in each.programs}
    if len(found := find()) == len(wanted):
        return found
    with binaries.lock(say):  # whoever held it may have made it
        for module in MODULES:
            if missing := [name for name in module.programs if name not in find()]:
                gobuild.build(missing, binaries.cache_dir(module.folder), say, module)
    if missing := sorted(wanted - set(found := find())):
        raise BinariesError(f"{', '.join(missing)} could not be built from Go modules; what go said is above")
    return found
