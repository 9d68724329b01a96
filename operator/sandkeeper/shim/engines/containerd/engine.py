"""The oci engine's steps with a containerd's images, snapshots and tasks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sandkeeper.shim.engines.base import SANDBOX_PROCESS, ExecSession, ProcessExit, ProcessState
from sandkeeper.shim.engines.containerd import sandboxed, server, sessions, tasks
from sandkeeper.shim.engines.containerd.client import CallError, Client
from sandkeeper.shim.engines.containerd.containers import TaskContainers, shim_address
from sandkeeper.shim.engines.containerd.images import ContainerdImages
from sandkeeper.shim.engines.containerd.probe import Prober
from sandkeeper.shim.engines.containerd.sandboxes import Sandboxes, Target
from sandkeeper.shim.engines.oci import exits, notes, runtimes
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.shim.engines.oci.engine import OCIEngine
from sandkeeper.shim.engines.oci.folders import AttemptFolder, SandboxFolder
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.processes import ProcessRef
from sandkeeper.shim.engines.oci.seccomp import Seccomp
from sandkeeper.shim.engines.oci.threads import Threads

log = logging.getLogger(__name__)

_ASK_SECONDS = 1.0
_EXIT_SECONDS = 5.0


class ContainerdEngine(OCIEngine):
    """runc and its like as tasks, joined to a catatonit sandbox process."""

    name: ClassVar[str] = "containerd"

    def __init__(self, settings: Any) -> None:
        """settings: ShimSettings."""
        chosen = settings.containerd
        self._client = Client(chosen.socket, chosen.namespace)
        self._sandboxes = Sandboxes(self._client, {})
        self._snapshotter = chosen.snapshotter
        self._targets = {
            name: Target(each.sandboxer, each.runtime) for name, each in chosen.sandboxers.items()
        }
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
        self._found = found
        self._sandboxes = Sandboxes(self._client, found.sandboxers)
        if found.snapshotter_root:
            self._store.snapshots = Path(found.snapshotter_root)
        await super().open()

    async def close(self) -> None:
        await super().close()
        self._sandboxes.close()
        self._client.close()

    def _programs(self) -> tuple[str, ...]:
        return (self._options.catatonit,)

    def _make_cgroups(self) -> Cgroups:
        return Cgroups(self._options.cgroup_parent, hide_v2=False)

    def _make_threads(self) -> Threads:
        # containerd mounts and runs where it is itself: what we mount for it must be seen there.
        return Threads(self._options.concurrency, adopt=os.getpid(), prepare=self._cgroups.enter_thread)

    def _probe(self, profile: Seccomp) -> Mapping[str, runtimes.Runtime]:
        common = (self._options, self._cgroups, profile)
        plain = Prober(self._client, *common).all()
        prober = sandboxed.Prober(self._client, self._sandboxes, self._found, *common)
        # Those of a runtime that is no longer configured are to be ended as well.
        self._sandboxed = bool(self._targets) or bool(self._found.sandboxers and self._sandboxes.list())
        return {**plain, **prober.all(self._targets)}

    def _make_containers(self, profile: Seccomp) -> TaskContainers:
        parts = (self._options, self._cgroups, profile, self._threads, self._client, self._snapshotter)
        self._tasks = (
            sandboxed.SandboxedContainers(*parts, self._sandboxes)
            if self._sandboxed
            else TaskContainers(*parts)
        )
        return self._tasks

    # -- a sandbox process that others may have made

    async def inspect(self, sandbox_id: str, container: str, attempt: int) -> ProcessState:
        found = await super().inspect(sandbox_id, container, attempt)
        folder = self._tasks.folder(sandbox_id)
        lost = container == SANDBOX_PROCESS and found.exit is not None and found.exit.reason == "SandboxLost"
        if lost and self._tasks.asks_for_exit(folder):
            # Its status is worth a while, and not that a shim does not start while others are away.
            with contextlib.suppress(TimeoutError):
                return ProcessState(
                    exit=await asyncio.wait_for(self.wait(sandbox_id, container, attempt), _EXIT_SECONDS)
                )
        return found

    async def _signal(self, folder: SandboxFolder, process: ProcessRef, number: int) -> None:
        await self._threads.run(lambda: self._tasks.signal(folder, process, number))

    async def _kept_exit(self, folder: SandboxFolder, process: ProcessRef) -> ProcessExit:
        """Waits for containerd where only that can tell."""
        while True:
            with contextlib.suppress(CallError):
                return await super()._kept_exit(folder, process)
            await asyncio.sleep(_ASK_SECONDS)

    # -- containers

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
