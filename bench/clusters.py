"""The clusters that the parts run on, each with a fresh folder and nothing left of it afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandkeeper.localcluster.cluster import LocalCluster
from sandkeeper.localcluster.containerd import Containerd

SIMULATED_SHIMS = 20
_MEMORY = Path("/dev/shm")  # noqa: S108
_ROOM = {"MEMORY_BYTES": str(1 << 40), "PIDS": str(1 << 22)}  # nothing is used of it


def say(line: str) -> None:
    print(f"==> {line}", flush=True)


@contextmanager
def real() -> Iterator[LocalCluster]:
    """One node with the oci engine."""
    with tempfile.TemporaryDirectory(prefix="sbx-bench-") as name:
        cluster = LocalCluster(Path(name) / "c")
        try:
            cluster.up(shims=1, engine="oci", tied=True, say=say)
            yield cluster
        finally:
            cluster.down(delete=False)


@contextmanager
def containerd() -> Iterator[LocalCluster]:
    """One node with the containerd engine, runc, and a containerd of its own."""
    with Containerd("module", say=say) as daemon, tempfile.TemporaryDirectory(prefix="sbx-bench-") as name:
        cluster = LocalCluster(Path(name) / "c")
        shim = {"CONTAINERD__SOCKET": str(daemon.socket), "OCI__RUNTIMES": '["runc"]'}
        try:
            cluster.up(shims=1, engine="containerd", shim_env=shim, tied=True, say=say)
            yield cluster
        finally:
            cluster.down(delete=False)


@contextmanager
def simulated(shims: int = SIMULATED_SHIMS) -> Iterator[LocalCluster]:
    """Nodes without containers, each a shim process of its own. In memory where there is room: one disk would
    have to fsync for all of them."""
    folder = _MEMORY if _MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="sbx-bench-", dir=folder) as name:
        cluster = LocalCluster(Path(name) / "c")
        try:
            cluster.up(shims=shims, engine="simulated", shim_env=_ROOM, tied=True, say=say)
            yield cluster
        finally:
            for node in cluster.nodes:  # nothing runs there: what was simulated need not be shut down
                cluster.processes.kill(node)
            cluster.down(delete=False)
