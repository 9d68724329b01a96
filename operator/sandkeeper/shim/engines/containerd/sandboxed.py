"""The steps for a runtime that is served by a sandboxer of containerd's: it makes the sandbox process, and ends it;
the containers are tasks in its sandbox. All other runtimes, and all other steps, as ever."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime

from sandkeeper.shim.engines.base import EngineError, ProcessExit, RuntimeInfo
from sandkeeper.shim.engines.containerd import server, tasks
from sandkeeper.shim.engines.containerd.client import CallError, Client, start_error
from sandkeeper.shim.engines.containerd.containers import TaskContainers
from sandkeeper.shim.engines.containerd.sandboxes import PROBE, Asked, Sandboxes, Target
from sandkeeper.shim.engines.oci import exits, notes, runtimes, spec
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.shim.engines.oci.folders import SandboxFolder
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.processes import ProcessRef, boot_id, read_json, write_json
from sandkeeper.shim.engines.oci.seccomp import Seccomp
from sandkeeper.shim.engines.oci.threads import Threads
from sandkeeper.wire import node_pb2
from sandkeeper.wire.containerd import tasks_pb2

_PROBE_SECONDS = 20.0
_AWAY_SECONDS = 10.0
"""Longer than containerd waits before it looks again for a sandboxer that was away."""
_UNKNOWN_STATUS = 255


class SandboxedContainers(TaskContainers):
    def __init__(
        self,
        options: Options,
        cgroups: Cgroups,
        seccomp: Seccomp,
        threads: Threads,
        client: Client,
        snapshotter: str,
        sandboxes: Sandboxes,
    ) -> None:
        super().__init__(options, cgroups, seccomp, threads, client, snapshotter)
        self._sandboxes = sandboxes

    def start(self, sandbox_id: str, config: node_pb2.SandboxConfig) -> int:
        folder = self.folder(sandbox_id)
        target = target_of(folder)
        if target is None:
            return super().start(sandbox_id, config)
        recorded = self.process(folder)
        if recorded is not None:
            if recorded.alive():
                return recorded.pid
            raise EngineError("StartError", "the sandbox process has ended")
        if not folder.etc.exists():
            self._make(folder, config)
        notes.begin(folder)
        asked = Asked.of(config, spec.host_name(sandbox_id, config))
        found = ProcessRef.of(self._sandboxes.start(target, sandbox_id, asked))
        if found is None:
            raise EngineError(
                "StartError", f"sandboxer {target.sandboxer!r}: its sandbox process ended at once"
            )
        write_json(folder.process, found.to_json())
        return found.pid

    def _place(self, sandbox: SandboxFolder, runtime: str) -> tuple[str, tasks.Inside | None]:
        target = Target.parse(runtime)
        if target is None:
            return super()._place(sandbox, runtime)
        return target.runtime, self._sandboxes.inside(target, sandbox.sandbox_id)

    def _seen(self, sandbox: SandboxFolder, pid: int) -> ProcessRef | None:
        """A pid of a sandboxer's may be one inside a virtual machine: another process has it here. One of ours is in
        the cgroup that we named."""
        if target_of(sandbox) is not None and pid not in self._cgroups.pids(sandbox.sandbox_id):
            return None
        return super()._seen(sandbox, pid)

    # -- the sandbox process's end

    def signal(self, folder: SandboxFolder, process: ProcessRef, number: int) -> None:
        target = target_of(folder)
        try:
            at_once = number == exits.KILLED
            if target is not None and self._sandboxes.stop(target, folder.sandbox_id, at_once=at_once):
                return
        except CallError as error:
            if not error.away:
                raise
        super().signal(folder, process, number)

    def asks_for_exit(self, folder: SandboxFolder) -> bool:
        return target_of(folder) is not None

    def sandbox_exit(self, folder: SandboxFolder, process: ProcessRef) -> ProcessExit:
        """What the sandboxer says is kept at first sight: containerd has it no longer than the sandbox. Raises
        CallError where that is away, and has not said it before."""
        target = target_of(folder)
        killed = (read_json(folder.killed) or {}).get("signal")
        if target is None or killed or not folder.run.exists() or process.boot != boot_id():
            return super().sandbox_exit(folder, process)
        recorded = read_json(folder.exit) or {}
        if "status" not in recorded:
            known = self._sandboxes.wait(target, folder.sandbox_id)
            status, at = known or (_UNKNOWN_STATUS, datetime.now(UTC))
            recorded = {"at": at.timestamp(), "status": status}
            write_json(folder.exit, recorded)
        status = int(recorded["status"])
        words = f"the sandbox ended by itself, with exit status {status}"
        return exits.lost(words, datetime.fromtimestamp(float(recorded["at"]), UTC), status)

    def _end_process(self, folder: SandboxFolder) -> None:
        if target_of(folder) is None:
            super()._end_process(folder)

    def _remove_rest(self, folder: SandboxFolder) -> None:
        # The tasks first: they are in it.
        super()._remove_rest(folder)
        target = target_of(folder)
        if target is not None and folder.run.exists():
            notes.note_kill(folder, exits.KILLED)
        self._sandboxes.remove(folder.sandbox_id, target.sandboxer if target else "")

    def list(self) -> frozenset[str]:
        found = super().list()
        with contextlib.suppress(CallError):
            found |= self._sandboxes.list()
        return found


def target_of(folder: SandboxFolder) -> Target | None:
    """None where the sandbox process is the engine's own."""
    return Target.parse(notes.read_runtime(folder))


class Prober:
    """Tries runtimes that a sandboxer serves: a sandbox of it, and a container in that."""

    def __init__(
        self,
        client: Client,
        sandboxes: Sandboxes,
        found: server.Server,
        options: Options,
        cgroups: Cgroups,
        seccomp: Seccomp,
    ) -> None:
        self._client = client
        self._sandboxes = sandboxes
        self._found = found
        self._options = options
        self._cgroups = cgroups
        self._seccomp = seccomp

    def all(self, targets: Mapping[str, Target]) -> Mapping[str, runtimes.Runtime]:
        """Those that do not work too: a sandboxer that is away takes nothing else with it."""
        found = {name: self._one(name, target) for name, target in targets.items()}
        if targets:
            self._remove_earlier()  # now, when containerd has found the sandboxers again
        return found

    def _one(self, name: str, target: Target) -> runtimes.Runtime:
        message = server.why_no_sandboxer(self._found, target.sandboxer)
        try:
            if not message:
                self._patiently(target)
        except CallError as error:
            message = start_error(error).message
        except EngineError as error:
            message = error.message
        except OSError as error:
            message = str(error)
        # Without a time: it is the node's default only where it is named so, or nothing else works.
        version = "" if message else f"sandboxer {target.sandboxer}"
        return runtimes.Runtime(RuntimeInfo(name, version, not message, message), str(target))

    def _remove_earlier(self) -> None:
        """What a shim left that was killed, or whose sandboxer went away."""
        with contextlib.suppress(EngineError):
            for name in self._sandboxes.list(PROBE):
                self._remove(name)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(EngineError):
            tasks.delete(self._client, name)
        with contextlib.suppress(EngineError):
            self._sandboxes.remove(name)

    def _patiently(self, target: Target) -> None:
        deadline, name = time.monotonic() + _AWAY_SECONDS, f"probe-{uuid.uuid4()}"
        while True:
            try:
                self._run(target, name)
                return
            except CallError as error:
                if not error.away or time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def _run(self, target: Target, name: str) -> None:
        with runtimes.bundle(self._options, self._cgroups, self._seccomp) as made:
            root = made.folder / "runtime"
            began = time.monotonic()
            try:
                self._sandboxes.start(target, name, Asked("probe"), PROBE)
                inside = self._sandboxes.inside(target, name)
                tasks.create_container(
                    self._client, name, made.document, target.runtime, root, {}, inside=inside
                )
                tasks.create(
                    self._client, name, target.runtime, root, (), tasks.Files(), _PROBE_SECONDS, inside=inside
                )
                tasks.start(self._client, name, _PROBE_SECONDS)
                wait = tasks_pb2.WaitRequest(container_id=name)
                left = max(1.0, began + _PROBE_SECONDS - time.monotonic())
                status = self._client.call(self._client.tasks.Wait, wait, seconds=left).exit_status
                if status != 0:
                    raise EngineError("NodeUnsupported", f"exit status {status}")
            finally:
                self._remove(name)
