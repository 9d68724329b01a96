"""A pod's host name and resolv.conf, where containerd looks for them when it makes a container of the pod.

containerd leaves these files to the sandboxer: what is there it mounts into every container, what is not it passes
over (internal/cri/server, linuxContainerMounts). Below its root: io.containerd.grpc.v1.cri/sandboxes/ID.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sandkeeper.shim.settings import SandboxerSettings
from sandkeeper.wire import node_pb2


class PodFiles:
    """Those of all pods. Blocking; every method is safe to repeat."""

    def __init__(self, settings: SandboxerSettings) -> None:
        root = settings.containerd_root
        self._folder = root / "io.containerd.grpc.v1.cri" / "sandboxes" if root else None

    def write(self, config: node_pb2.SandboxConfig) -> None:
        """Raises OSError."""
        folder = self._of(config)
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        (folder / "resolv.conf").write_text("".join(f"{each}\n" for each in config.containerd.resolv_conf))
        if config.hostname and config.network != node_pb2.NETWORK_HOST:
            (folder / "hostname").write_text(f"{config.hostname}\n")

    def remove(self, config: node_pb2.SandboxConfig) -> None:
        folder = self._of(config)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _of(self, config: node_pb2.SandboxConfig) -> Path | None:
        """Only a pod's has a resolv.conf; the id is an identifier, and so a safe name."""
        if self._folder is None or not config.containerd.resolv_conf:
            return None
        return self._folder / config.containerd.sandbox_id
