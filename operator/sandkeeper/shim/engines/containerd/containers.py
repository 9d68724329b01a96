"""One sandbox's containers as tasks of a containerd; the steps are the oci engine's."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.containerd import content, monitor_process, tasks, ttrpc, unpack
from sandkeeper.shim.engines.containerd.client import CallError, Client, start_error
from sandkeeper.shim.engines.containerd.images import chain_of
from sandkeeper.shim.engines.oci import containers, monitor, notes
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.shim.engines.oci.folders import AttemptFolder, SandboxFolder
from sandkeeper.shim.engines.oci.images.types import Image
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.processes import ProcessRef, read_json, reap, write_json
from sandkeeper.shim.engines.oci.seccomp import Seccomp
from sandkeeper.shim.engines.oci.threads import Threads
from sandkeeper.shim.engines.oci.tools import ENVIRONMENT
from sandkeeper.wire.containerd import leases_pb2, snapshots_pb2

_SHIM_SECONDS = 5.0
_FIFOS = ("stdout", "stderr")


def _open_outputs(folder: AttemptFolder) -> list[int]:
    """Makes the fifos, and has them open for reading before anybody can write: what was written stays as long as
    they are open somewhere."""
    fds: list[int] = []
    try:
        for each in _FIFOS:
            path = folder.run / each
            with contextlib.suppress(FileExistsError):
                os.mkfifo(path, 0o600)
            fds.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def _task_file(folder: AttemptFolder) -> Path:
    """For the monitor: see there."""
    return folder.run / "task"


def shim_address(folder: AttemptFolder) -> ttrpc.Address | None:
    """Where the shim of containerd's that has an attempt's task can be asked."""
    try:
        path, version, _ = _task_file(folder).read_text().splitlines()
        return ttrpc.Address(path, int(version))
    except (OSError, ValueError):
        return None


def _monitor_file(folder: AttemptFolder) -> Path:
    return folder.run / "monitor.json"


def lease_of(sandbox_id: str) -> str:
    return f"sandkeeper-{sandbox_id}"


class TaskContainers(containers.Containers):
    def __init__(
        self,
        options: Options,
        cgroups: Cgroups,
        seccomp: Seccomp,
        threads: Threads,
        client: Client,
        snapshotter: str,
    ) -> None:
        super().__init__(options, cgroups, seccomp, threads)
        self._client = client
        self._snapshotter = snapshotter

    def runtime_root(self) -> Path:
        """Where runc keeps what it knows: containerd's own place is shared by all its namespaces' users."""
        return self._options.run_root / "runc"

    # -- an attempt

    def _make_root(self, folder: AttemptFolder, image: Image) -> None:
        """A snapshot, held by the sandbox's lease until there is a container that names it."""
        made = folder.run / "snapshot"
        if made.exists():
            return
        for each in (folder.path, folder.run):
            each.mkdir(parents=True, exist_ok=True, mode=0o700)
        lease = lease_of(folder.sandbox_id)
        try:
            content.make_lease(self._client, lease, {tasks.SANDBOX: folder.sandbox_id})
            request = snapshots_pb2.PrepareSnapshotRequest(
                snapshotter=self._snapshotter, key=tasks.name_of(folder.runtime_id), parent=chain_of(image)
            )
            self._client.made(self._client.snapshots.Prepare, request, lease=lease)
            made.touch()
        except CallError as error:
            if error.away:
                raise
            raise EngineError("NodeError", f"root file system: {error.words}", retryable=True) from None

    def _place(self, sandbox: SandboxFolder, runtime: str) -> tuple[str, tasks.Inside | None]:
        """What a container runs with, and whose sandbox of containerd's it is in: none. Raises EngineError."""
        return runtime, None

    def _create(self, sandbox: SandboxFolder, folder: AttemptFolder, runtime: str) -> int:
        name = tasks.name_of(folder.runtime_id)
        document = json.loads(folder.config.read_text())
        # One shim process of containerd's for all containers of a sandbox.
        document["annotations"][tasks.GROUP] = sandbox.sandbox_id
        try:
            runtime, inside = self._place(sandbox, runtime)
            mounts = self._client.call(
                self._client.snapshots.Mounts,
                snapshots_pb2.MountsRequest(snapshotter=self._snapshotter, key=name),
            ).mounts
            tasks.create_container(
                self._client,
                name,
                document,
                runtime,
                self.runtime_root(),
                {tasks.SANDBOX: sandbox.sandbox_id},
                snapshotter=self._snapshotter,
                snapshot=name,
                inside=inside,
            )
            outputs = _open_outputs(folder)
            try:
                files = tasks.Files(*("", *(str(folder.run / each) for each in _FIFOS)))
                pid = tasks.create(
                    self._client, name, runtime, self.runtime_root(), mounts, files,
                    self._options.runtime_timeout, inside=inside,
                )  # fmt: skip
                folder.pid_file.write_text(str(pid))
                shim = tasks.shim_of(pid)
                address = inside.shim if inside else shim[1] if shim else None
                if address is not None:
                    _task_file(folder).write_text(f"{address.path}\n{address.version}\n{name}\n")
                self._watch(folder, outputs)
            finally:
                for fd in outputs:
                    os.close(fd)
        except CallError as error:
            raise start_error(error) from None
        return pid

    def _run(self, sandbox: SandboxFolder, folder: AttemptFolder, runtime: str) -> None:
        try:
            tasks.start(self._client, tasks.name_of(folder.runtime_id), self._options.runtime_timeout)
        except CallError as error:
            raise start_error(error) from None

    def _watch(self, folder: AttemptFolder, outputs: Sequence[int]) -> None:
        """Starts the monitor, before the program. It is not waited for: what it reads from is open."""
        argv = [
            *(sys.executable, "-ISEB", monitor_process.__file__, monitor.MARK.decode(), folder.runtime_id),
            *(str(folder.run), *map(str, outputs), str(folder.log), str(self._options.log_max_bytes // 2)),
            *(str(folder.exit_file), str(self._cgroups.oom_events(folder.sandbox_id, folder.container))),
        ]
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=ENVIRONMENT,
                pass_fds=outputs,
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError("NodeError", f"the monitor cannot be run: {error}", retryable=True) from None
        # It is to outlive this object: whoever waits for it reaps it by its pid.
        child.returncode = 0
        found = ProcessRef.of(child.pid)
        if found is None:
            reap(child.pid)
            raise EngineError("NodeError", "the monitor ended at once", retryable=True)
        write_json(_monitor_file(folder), found.to_json())
        if self._cgroups.v2:
            self._cgroups.adopt(child.pid)

    def _monitor(self, folder: AttemptFolder) -> ProcessRef | None:
        # Also one that has ended: as long as it is our child somebody must reap it.
        return ProcessRef.from_json(read_json(_monitor_file(folder)))

    def _state(self, sandbox: SandboxFolder, folder: AttemptFolder, runtime: str) -> str:
        found = tasks.get(self._client, tasks.name_of(folder.runtime_id))
        if found.state != "stopped":
            return found.state
        # Started by a shim that was killed before it told the monitor whom to ask.
        self.keep_exit(folder, found.exit_status, found.exited_at.timestamp() if found.exited_at else 0.0)
        return "running"

    def keep_exit(self, folder: AttemptFolder, code: int, at: float) -> None:
        """As the monitor does."""
        events = self._cgroups.oom_events(folder.sandbox_id, folder.container)
        if code and monitor_process.killed_for_memory(str(events)):
            monitor_process.note(str(folder.oom_file), "", at)
        for each in (folder.exit_copy, folder.exit_file):
            if each.parent.is_dir():
                monitor_process.note(str(each), str(code), at)

    def keep_kills(self, folder: AttemptFolder) -> None:
        """Notes that the kernel has killed for memory while its count is there: it goes with the task, which others
        may delete."""
        killed = self._cgroups.oom_kills(folder.sandbox_id, folder.container) > 0
        if killed and folder.run.is_dir() and not folder.oom_file.exists():
            monitor_process.note(str(folder.oom_file), "", 0.0)

    def task_state(self, folder: AttemptFolder) -> str:
        """As `tasks.Task` has it. Raises CallError."""
        return tasks.get(self._client, tasks.name_of(folder.runtime_id)).state

    def find_exit(self, folder: AttemptFolder) -> bool:
        """Asks how a process ended whose monitor could not tell: containerd's shim, then containerd. Whether it is
        known now. Raises CallError where containerd is away."""
        name = tasks.name_of(folder.runtime_id)
        address = shim_address(folder)
        with contextlib.suppress(ttrpc.ShimError):
            if address is not None:
                code, at = ttrpc.wait(address, name, _SHIM_SECONDS)
                self.keep_exit(folder, code, at.timestamp())
                return True
        found = tasks.get(self._client, name)
        if found.state == "stopped" and found.exited_at is not None:
            self.keep_exit(folder, found.exit_status, found.exited_at.timestamp())
            return True
        return False

    def _delete(self, sandbox: SandboxFolder, folder: AttemptFolder, runtime: str) -> None:
        name = tasks.name_of(folder.runtime_id)
        image = notes.read_image(sandbox, folder.container)
        if image is not None:
            # Until the next attempt there may be no snapshot on the image's, which may have been removed.
            lease, kind = lease_of(sandbox.sandbox_id), f"snapshots/{self._snapshotter}"
            with contextlib.suppress(CallError):
                content.hold(self._client, lease, kind, chain_of(image))
        tasks.delete(self._client, name)
        unpack.remove(self._client, self._snapshotter, name)

    # -- the end

    def signal(self, folder: SandboxFolder, process: ProcessRef, number: int) -> None:
        """To the sandbox process. Raises CallError."""
        process.send(number)

    def asks_for_exit(self, folder: SandboxFolder) -> bool:
        """Whether it is others who know how the sandbox process ended."""
        return False

    def _remove_rest(self, folder: SandboxFolder) -> None:
        names = {tasks.name_of(each.runtime_id) for each in folder.attempts()}
        shims = [address for each in folder.attempts() if (address := shim_address(each)) is not None]
        names |= set(tasks.labelled(self._client, folder.sandbox_id))
        for name in sorted(names):
            tasks.delete(self._client, name)
            unpack.remove(self._client, self._snapshotter, name)
        for address in shims:
            # containerd 2 forgets the socket of a shim that several containers had.
            Path(address.path).unlink(missing_ok=True)
        # With what else it held: returns when the files of the snapshots are gone.
        request = leases_pb2.DeleteRequest(id=lease_of(folder.sandbox_id), sync=True)
        self._client.found(self._client.leases.Delete, request)

    def list(self) -> frozenset[str]:
        """What containerd has of a sandbox as well, as long as it can be asked."""
        found = super().list()
        with contextlib.suppress(CallError):
            found |= frozenset(tasks.labelled(self._client).values())
            request = leases_pb2.ListRequest(filters=[f'labels."{tasks.SANDBOX}"'])
            leases = self._client.call(self._client.leases.List, request).leases
            found |= {each.labels[tasks.SANDBOX] for each in leases}
        return found
