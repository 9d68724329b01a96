"""The oci engine's steps with a containerd's images, snapshots and tasks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from sandkeeper.shim.engines.base import (
    SANDBOX_PROCESS,
    EngineError,
    ExecSession,
    ProcessExit,
    ProcessState,
    UsageSample,
)
from sandkeeper.shim.engines.containerd import sandboxed, server, sessions, tasks, usage
from sandkeeper.shim.engines.containerd.client import CallError, Client
from sandkeeper.shim.engines.containerd.containers import TaskContainers, shim_address
from sandkeeper.shim.engines.containerd.events import Events, first
from sandkeeper.shim.engines.containerd.images import ContainerdImages
from sandkeeper.shim.engines.containerd.probe import Prober
from sandkeeper.shim.engines.containerd.sandboxes import Sandboxes, Target, wait_request
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
_RUNS = ("created", "running")
_AGAIN_SECONDS = (0.2, 1.0, 5.0)
"""After an event: the kernel tells of a lack of memory before it has killed for it, and counted that."""
_MONITOR_SECONDS = 15.0
"""How long a monitor may take to note an end that others have seen: it has output to write first."""


class ContainerdEngine(OCIEngine):
    """runc and its like as tasks, joined to a catatonit sandbox process."""

    name: ClassVar[str] = "containerd"

    def __init__(self, settings: Any) -> None:
        """settings: ShimSettings."""
        chosen = settings.containerd
        self._client = Client(chosen.socket, chosen.namespace)
        self._events = Events(chosen.socket, chosen.namespace)
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
        self._events.open()

    async def close(self) -> None:
        await self._events.close()
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
        if container != SANDBOX_PROCESS and (pid := await self._unseen(sandbox_id, container, attempt)):
            return ProcessState(pid=pid)
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

    async def _unseen(self, sandbox_id: str, container: str, attempt: int) -> int:
        """The pid of a process that runs by what containerd says, and is not seen from here; else 0."""
        folder = self._attempt(sandbox_id, container, attempt)
        started = notes.read_started(folder)
        if started is None or started.process.boot or exits.read(folder, self._cgroups) is not None:
            return 0
        try:
            return 0 if await self._is_over(folder, started.process) else started.process.pid
        except CallError:
            return started.process.pid

    async def _signal(self, folder: SandboxFolder, process: ProcessRef, number: int) -> None:
        await self._threads.run(lambda: self._tasks.signal(folder, process, number))

    def _target(self, folder: SandboxFolder) -> Target | None:
        """Whose sandbox it is; None where the sandbox process is ours."""
        return sandboxed.target_of(folder) if self._sandboxed else None

    async def _process_ended(self, folder: SandboxFolder, process: ProcessRef) -> None:
        """A sandboxer may call a sandbox ended whose process, its hypervisor for one, is still there."""
        target = self._target(folder)
        if target is None:
            await process.ended()
            return
        with self._events.watching(tasks.name_of(folder.sandbox_id)) as woken:
            await first(process.ended(), self._sandbox_ended(target, folder.sandbox_id, woken))

    async def _sandbox_ended(self, target: Target, sandbox_id: str, woken: asyncio.Event) -> None:
        """Returns when its sandboxer says so."""
        over = asyncio.Event()

        async def ask() -> None:
            await self._events.sandbox_ended(wait_request(target, sandbox_id))
            over.set()

        while not over.is_set():
            woken.clear()
            with contextlib.suppress(CallError):
                if await self._threads.run(lambda: self._sandboxes.is_over(target, sandbox_id)):
                    return
            await first(woken.wait(), ask())

    async def usage(self, sandbox_id: str) -> UsageSample | None:
        """Of a sandboxer's sandbox, what that says, unless its containers are processes of our cgroup: that counts
        their CPU time from the first moment on, and for good."""
        ours = await super().usage(sandbox_id)
        target = self._target(self._tasks.folder(sandbox_id))
        if ours is None or ours.cpu_usage_usec or target is None:
            return ours
        said = await self._threads.run(lambda: self._sandboxes.metrics(target, sandbox_id))
        if said is None:
            return ours
        return usage.read(said) or replace(ours, foreign=said)

    async def _kept_exit(self, folder: SandboxFolder, process: ProcessRef) -> ProcessExit:
        """Waits for containerd where only that can tell."""
        while True:
            with contextlib.suppress(CallError):
                return await super()._kept_exit(folder, process)
            await asyncio.sleep(_ASK_SECONDS)

    # -- containers

    async def _container_exit(self, folder: AttemptFolder, started: notes.Started) -> ProcessExit:
        with self._events.watching(tasks.name_of(folder.runtime_id)) as woken:

            async def late() -> None:
                await self._over(folder, started, woken)
                await asyncio.sleep(_MONITOR_SECONDS)

            if started.monitor is not None:
                await first(started.monitor.ended(), late())
            ended = exits.read(folder, self._cgroups)
            if ended is None:
                # Its monitor was killed, or stands still, or does not know whom to ask.
                await self._over(folder, started, woken)
                ended = await self._asked_exit(folder)
        return ended

    async def _over(self, folder: AttemptFolder, started: notes.Started, woken: asyncio.Event) -> None:
        """Returns when a container's first process has ended: the kernel tells of that, or containerd."""
        process = started.process
        again: Iterator[float] = iter(())
        while True:
            woken.clear()
            try:
                if await self._is_over(folder, process):
                    return
            except CallError:
                await asyncio.sleep(_ASK_SECONDS)
                continue
            wakers: list[Coroutine[Any, Any, object]] = [woken.wait()]
            if process.boot:
                wakers.append(process.ended())
            if seconds := next(again, 0.0):
                wakers.append(asyncio.sleep(seconds))
            await first(*wakers)
            if woken.is_set():
                again = iter(_AGAIN_SECONDS)

    async def _is_over(self, folder: AttemptFolder, process: ProcessRef) -> bool:
        """Raises CallError where only containerd can tell, and is away: of a process that is not seen from here."""
        self._tasks.keep_kills(folder)
        if process.boot:
            return process.join(0.0)
        return await self._threads.run(lambda: self._tasks.task_state(folder) in ("", "stopped"))

    async def _asked_exit(self, folder: AttemptFolder) -> ProcessExit:
        """Waits for containerd where only that can tell."""
        while True:

            def ask() -> ProcessExit | None:
                known = folder.run.exists() and self._tasks.find_exit(folder)
                if not known and folder.run.exists() and self._tasks.task_state(folder) in _RUNS:
                    return None
                ended = exits.read(folder, self._cgroups) if known else None
                return ended or exits.lost("containerd forgot it, and its exit with it")

            with contextlib.suppress(CallError):
                ended = await self._locked(folder.sandbox_id, ask)
                if ended is not None:
                    return ended
            await asyncio.sleep(_ASK_SECONDS)

    async def _send(self, folder: AttemptFolder, process: ProcessRef, number: int) -> None:
        if process.boot:
            process.send(number)
        else:
            await self._threads.run(
                lambda: tasks.kill(self._client, tasks.name_of(folder.runtime_id), number)
            )

    async def pause(self, sandbox_id: str) -> None:
        for each in self._tasks.folder(sandbox_id).attempts():
            if await self._unseen(sandbox_id, each.container, each.attempt):
                raise EngineError("PauseFailed", f"container {each.container!r} is not in our cgroup")
        await super().pause(sandbox_id)

    def _may_run(self, process: ProcessRef) -> bool:
        """Of one that is not seen from here containerd will say so."""
        return process.alive() or not process.boot

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
