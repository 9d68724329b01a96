"""The oci engine's steps with a containerd's images, snapshots and tasks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sandkeeper.shim.engines.base import ExecSession, ProcessExit
from sandkeeper.shim.engines.containerd import server, sessions, tasks
from sandkeeper.shim.engines.containerd.client import CallError, Client
from sandkeeper.shim.engines.containerd.containers import TaskContainers, shim_address
from sandkeeper.shim.engines.containerd.images import ContainerdImages
from sandkeeper.shim.engines.containerd.probe import Prober
from sandkeeper.shim.engines.oci import exits, notes, runtimes
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.shim.engines.oci.engine import OCIEngine
from sandkeeper.shim.engines.oci.folders import AttemptFolder
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.seccomp import Seccomp
from sandkeeper.shim.engines.oci.threads import Threads

log = logging.getLogger(__name__)

_ASK_SECONDS = 1.0


class ContainerdEngine(OCIEngine):
    """runc and its like as tasks, joined to a catatonit sandbox process."""

    name: ClassVar[str] = "containerd"

    def __init__(self, settings: Any) -> None:
        """settings: ShimSettings."""
        chosen = settings.containerd
        self._client = Client(chosen.socket, chosen.namespace)
        self._snapshotter = chosen.snapshotter
        options = Options.from_settings(settings, "containerd")
        # Below the oci engine's store, which another engine of this node may have used before.
        folder = Path(settings.oci.image_dir or settings.state_dir / "images").absolute() / "containerd"
        self._store = ContainerdImages(self._client, self._snapshotter, settings.oci, folder)
        super().__init__(options, images=self._store)

    async def open(self) -> None:
        found = await asyncio.to_thread(server.look, self._client, self._snapshotter)
        log.info(
            "containerd found",
            extra={"version": found.version, "sandboxers": sorted(found.sandboxers)},
        )
        if found.snapshotter_root:
            self._store.snapshots = Path(found.snapshotter_root)
        await super().open()

    async def close(self) -> None:
        await super().close()
        self._client.close()

    def _programs(self) -> tuple[str, ...]:
        return (self._options.catatonit,)

    def _make_cgroups(self) -> Cgroups:
        return Cgroups(self._options.cgroup_parent, hide_v2=False)

    def _make_threads(self) -> Threads:
        # containerd mounts and runs where it is itself: what we mount for it must be seen there.
        return Threads(self._options.concurrency, adopt=os.getpid(), prepare=self._cgroups.enter_thread)

    def _probe(self, profile: Seccomp) -> Mapping[str, runtimes.Runtime]:
        return Prober(self._client, self._options, self._cgroups, profile).all()

    def _make_containers(self, profile: Seccomp) -> TaskContainers:
        self._tasks = TaskContainers(
            self._options, self._cgroups, profile, self._threads, self._client, self._snapshotter
        )
        return self._tasks

    async def _container_exit(self, folder: AttemptFolder, started: notes.Started) -> ProcessExit:
        if started.monitor is not None:
            await started.monitor.ended()
        ended = exits.read(folder, self._cgroups)
        if ended is None:
            # Its monitor was killed, or does not know whom to ask.
            await started.process.ended()
            ended = await self._asked_exit(folder)
        return ended

    async def _asked_exit(self, folder: AttemptFolder) -> ProcessExit:
        """Waits for containerd where only that can tell."""
        while True:

            def ask() -> ProcessExit | None:
                known = folder.run.exists() and self._tasks.find_exit(folder)
                return exits.read(folder, self._cgroups) if known else None

            with contextlib.suppress(CallError):
                ended = await self._locked(folder.sandbox_id, ask)
                return ended or exits.lost("containerd forgot it, and its exit with it")
            await asyncio.sleep(_ASK_SECONDS)

    def _execute(
        self,
        folder: AttemptFolder,
        files: Path,
        process: dict[str, Any],
        *,
        stdin: bool,
        size: tuple[int, int] | None,
    ) -> ExecSession:
        name, address = tasks.name_of(folder.runtime_id), shim_address(folder)
        return sessions.begin(self._client, name, address, files, process, stdin=stdin, size=size)


__all__ = ["ContainerdEngine"]
