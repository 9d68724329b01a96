"""One sandbox's processes, step by step; blocking, for the engine's threads, one caller per sandbox at a time.

Each step leaves on disk what the next needs, so that a shim that was killed
between two of them goes on, or clears away, from what it finds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sandkeeper.shim.engines.base import EngineError, ProcessExit
from sandkeeper.shim.engines.oci import exits, files, filesystems, monitor, notes, pause, rootfs, spec, tools
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.shim.engines.oci.folders import AttemptFolder, SandboxFolder
from sandkeeper.shim.engines.oci.images.types import Image
from sandkeeper.shim.engines.oci.notes import Started
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.processes import ProcessRef, read_json, reap, write_json
from sandkeeper.shim.engines.oci.sealed import Sealed
from sandkeeper.shim.engines.oci.seccomp import Seccomp
from sandkeeper.shim.engines.oci.threads import Threads
from sandkeeper.wire import node_pb2
from sandkeeper.wire.ids import valid_id

log = logging.getLogger(__name__)

_GONE = ProcessRef(0, 0, "")
"""A process that is known to have been there, and not to be any more."""

_MONITOR_SECONDS = 3.0
_MAX_USERS = 256
_LEAST_FREE = 1024 * 1024
"""Bytes. With less than this where it writes, a start that fails may well have failed for that."""


def container_config(config: node_pb2.SandboxConfig, name: str) -> node_pb2.ContainerConfig:
    for container in config.containers:
        if container.name == name:
            return container
    raise EngineError("InvalidConfig", f"containers: there is no {name!r}")


def around(folder: SandboxFolder, config: node_pb2.SandboxConfig) -> pause.Around:
    """What is around the sandbox process: for a Sandbox namespaces of its own, for containerd what it asks for."""
    asked = config.containerd
    return pause.Around(
        hostname=spec.host_name(folder.sandbox_id, config),
        host_network=config.network == node_pb2.NETWORK_HOST,
        netns=asked.netns_path,
        host_ipc=asked.host_ipc,
        # A Sandbox's containers each have their own, and no use for one more.
        own_pids=config.HasField("containerd") and not asked.host_pid,
        rootfs=tuple(asked.rootfs),
        root=folder.path / "rootfs",
    )


class Containers:
    def __init__(self, options: Options, cgroups: Cgroups, seccomp: Seccomp, threads: Threads) -> None:
        self._options = options
        self._cgroups = cgroups
        self._seccomp = seccomp
        self._threads = threads
        self._users: dict[tuple[str, str], rootfs.User] = {}
        self.sealed = Sealed(options.run_root / "sealed")

    def folder(self, sandbox_id: str) -> SandboxFolder:
        return SandboxFolder.under(self._options.root_dir, self._options.run_root, sandbox_id)

    # -- prepare

    def prepare(
        self, sandbox_id: str, config: node_pb2.SandboxConfig, runtime: str, images: Mapping[str, Image]
    ) -> None:
        """Everything that needs no process. Raises EngineError `InvalidConfig`, `InvalidImage`."""
        folder = self.folder(sandbox_id)
        self.check(sandbox_id, config, images)
        folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        notes.write_prepared(folder, runtime, images)
        self._make(folder, config)
        for container in config.containers:
            first = folder.container(container.name).attempt(0)
            if not first.started.exists():
                self._make_root(first, images[container.name])

    def _make(self, folder: SandboxFolder, config: node_pb2.SandboxConfig) -> None:
        """What a restart of the machine takes."""
        folder.run.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._cgroups.make(folder.sandbox_id)
        host_network = config.network == node_pb2.NETWORK_HOST
        filesystems.make_etc(folder, spec.host_name(folder.sandbox_id, config), host_network=host_network)
        filesystems.make_volumes(folder, config, self._options)

    def check(
        self, sandbox_id: str, config: node_pb2.SandboxConfig, images: Mapping[str, Image]
    ) -> dict[str, dict[str, Any]]:
        """Raises EngineError `InvalidConfig` or `InvalidImage` for what can never run.

        Returns the OCI configurations by container: whole but for the sandbox process's pid and the binds.
        """
        folder = self.folder(sandbox_id)
        spec.check_volumes(config)
        found = {}
        for container in config.containers:
            rootfs.check(images[container.name].rootfs)
            spec.check_mounts(config, container)
            found[container.name] = self._spec(folder, config, container, images[container.name], 0, ())
        return found

    def _spec(
        self,
        folder: SandboxFolder,
        config: node_pb2.SandboxConfig,
        container: node_pb2.ContainerConfig,
        image: Image,
        sandbox_pid: int,
        binds: tuple[spec.Bind, ...],
        root: str = "rootfs",
    ) -> dict[str, Any]:
        user = self._user(image, image.config.user)
        uid, _ = spec.asked_ids(container)
        known_gid = self._user(image, str(uid)).gid if uid is not None else None
        joined = dict(pause.NAMESPACES)
        if config.network == node_pb2.NETWORK_HOST:
            if not self._options.allow_host_network:
                raise EngineError("InvalidConfig", "network: this node does not allow Host")
            del joined["network"]
        around = spec.Surroundings(
            rootfs=root,
            user=spec.identity(container, user, known_gid),
            hostname=spec.host_name(folder.sandbox_id, config),
            cgroups_path=self._cgroups.path(folder.sandbox_id, container.name),
            namespaces={kind: f"/proc/{sandbox_pid}/ns/{name}" for kind, name in joined.items()},
            cgroup_v2=self._cgroups.v2,
            swap_accounting=self._cgroups.has_swap_accounting,
            binds=binds,
        )
        return spec.build(container, image.config, around, self._options, self._seccomp)

    def _user(self, image: Image, text: str) -> rootfs.User:
        """As `rootfs.resolve_user`, which reads two of the image's files: they are what its digest says."""
        known = self._users.get((image.digest, text))
        if known is None:
            if len(self._users) >= _MAX_USERS:
                self._users.clear()
            known = self._users[image.digest, text] = rootfs.resolve_user(image.rootfs, text)
        return known

    # -- the sandbox process

    def start(self, sandbox_id: str, config: node_pb2.SandboxConfig) -> int:
        """Starts the sandbox process, or finds it running. Raises EngineError `StartError`."""
        folder = self.folder(sandbox_id)
        recorded = self.process(folder)
        if recorded is not None:
            if recorded.alive():
                self._threads.submit(lambda: self._cgroups.settle(recorded.pid))
                return recorded.pid
            raise EngineError("StartError", "the sandbox process has ended")
        if not folder.prepared.exists():
            raise EngineError("StartError", "the sandbox is not prepared", retryable=True)
        if not folder.etc.exists():
            self._make(folder, config)
        notes.begin(folder)
        ref = pause.start(
            self._threads.apart,
            shutil.which(self._options.catatonit, path=tools.ENVIRONMENT["PATH"]) or self._options.catatonit,
            self._options.root_dir,
            sandbox_id,
            around(folder, config),
        )
        write_json(folder.process, ref.to_json())
        self._threads.submit(lambda: self._cgroups.settle(ref.pid))
        return ref.pid

    def process(self, folder: SandboxFolder) -> ProcessRef | None:
        """The sandbox process as recorded; None where none was started. One whose record is damaged is found by
        its environment."""
        document = read_json(folder.process)
        recorded = ProcessRef.from_json(document)
        if recorded is not None or not folder.starting.exists():
            return recorded
        if notes.of_earlier_boot(folder):
            return _GONE
        found = next(iter(pause.find(self._options.root_dir, folder.sandbox_id)), None)
        if found is not None:
            with contextlib.suppress(OSError):
                write_json(folder.process, found.to_json())
            return found
        return None if document is None else _GONE

    def sandbox_exit(self, folder: SandboxFolder, process: ProcessRef) -> ProcessExit:
        """How the sandbox process ended, which it has; its time is kept as it is first seen. Raises OSError."""
        ended = exits.of_sandbox(folder, process)
        if folder.run.exists() and not folder.exit.exists():
            write_json(folder.exit, {"at": ended.exited_at.timestamp()})
        return ended

    # -- containers

    def start_container(
        self, sandbox_id: str, config: node_pb2.SandboxConfig, name: str, attempt: int, runtime: str
    ) -> int:
        """Starts an attempt of a container, or finds it started. Raises EngineError `StartError`, and
        `NodeError` where the disk is full."""
        try:
            return self._start_container(self.folder(sandbox_id), config, name, attempt, runtime)
        except EngineError as error:
            free = [os.statvfs(each) for each in (self._options.root_dir, self._options.run_root)]
            if all(each.f_bavail * each.f_frsize >= _LEAST_FREE for each in free):
                raise
            # Whatever the runtime says, the container is not to blame.
            raise EngineError("NodeError", f"no space left: {error.message}", retryable=True) from error

    def _start_container(
        self, sandbox: SandboxFolder, config: node_pb2.SandboxConfig, name: str, attempt: int, runtime: str
    ) -> int:
        process = self.process(sandbox)
        if process is None or not process.alive():
            raise EngineError("StartError", "the sandbox process does not run")
        container, below = container_config(config, name), sandbox.container(name)
        folder = below.attempt(attempt)
        started = self._half_made(sandbox, folder, runtime)
        if started is not None:
            return started.process.pid
        image = notes.read_image(sandbox, name)
        if image is None:
            raise EngineError("StartError", "the sandbox is not prepared", retryable=True)
        for older in below.attempts() if attempt else ():
            if older.attempt < attempt:
                self._clear(sandbox, older, runtime, keep_log=older.attempt == attempt - 1)
        began = time.perf_counter()
        filesystems.make_volumes(sandbox, config, self._options)
        self._make_root(folder, image)
        binds = filesystems.binds(sandbox, folder, container)
        document = self._spec(sandbox, config, container, image, process.pid, binds)
        files.write(folder.config, json.dumps(document).encode())
        built = time.perf_counter()
        try:
            pid = self._create(sandbox, folder, runtime)
            created = time.perf_counter()
            caps = spec.capabilities(container, self._options.allowed_capabilities)
            self._seccomp.learn(caps, sandbox.runtime_root / folder.runtime_id)
            ref = self._seen(sandbox, pid)
            self._run(sandbox, folder, runtime)
        except EngineError:
            self._clear(sandbox, folder, runtime, keep_log=True)
            raise
        self._record(folder, ref or ProcessRef(pid, 0, ""))
        log.debug(
            "container started",
            extra={
                "sandbox": sandbox.sandbox_id,
                "container": name,
                "ms_bundle": round((built - began) * 1e3, 2),
                "ms_create": round((created - built) * 1e3, 2),
                "ms_start": round((time.perf_counter() - created) * 1e3, 2),
            },
        )
        return pid

    def _record(self, folder: AttemptFolder, process: ProcessRef) -> Started:
        watching = self._monitor(folder)
        started = Started(process, watching)
        write_json(
            folder.started,
            {"process": process.to_json(), "monitor": watching.to_json() if watching else None},
        )
        return started

    def started(self, sandbox_id: str, name: str, attempt: int) -> Started | None:
        """An attempt of which it is known that it was started, found again where the note of it is damaged."""
        sandbox = self.folder(sandbox_id)
        runtime = notes.read_runtime(sandbox)
        folder = sandbox.container(name).attempt(attempt)
        return self._half_made(sandbox, folder, runtime) if runtime else notes.read_started(folder)

    def _half_made(self, sandbox: SandboxFolder, folder: AttemptFolder, runtime: str) -> Started | None:
        """What a killed shim left of an attempt: adopted where its process was started, else cleared away."""
        started = notes.read_started(folder)
        if started is not None:
            return started
        ended = exits.read(folder, self._cgroups) is not None
        if not ended and not folder.config.exists():
            return None
        pid = monitor.read_pid(folder.pid_file)
        if ended or self._state(sandbox, folder, runtime) == "running":
            return self._record(folder, self._seen(sandbox, pid) or ProcessRef(pid, 0, ""))
        self._clear(sandbox, folder, runtime, keep_log=False)
        return None

    # -- one attempt's parts: what another engine does in another way

    def _make_root(self, folder: AttemptFolder, image: Image) -> None:
        """Its root file system and folders; what is there already is kept. Raises EngineError."""
        filesystems.make_attempt(folder, str(image.rootfs))

    def _create(self, sandbox: SandboxFolder, folder: AttemptFolder, runtime: str) -> int:
        """Has the runtime create what folder.config says, and a monitor watch it. Returns the pid of the process,
        which waits for `_run`. Raises EngineError."""
        return monitor.create(
            self._options.conmon, self.sealed.of(runtime), sandbox.runtime_root, folder,
            self._options.log_max_bytes // 2, self._cgroups, self._options.runtime_timeout,
        )  # fmt: skip

    def _seen(self, sandbox: SandboxFolder, pid: int) -> ProcessRef | None:
        """The process that a runtime has just named; None where it is not this node's."""
        return ProcessRef.of(pid)

    def _monitor(self, folder: AttemptFolder) -> ProcessRef | None:
        """Who watches it; may have ended."""
        return monitor.find(folder)

    def _run(self, sandbox: SandboxFolder, folder: AttemptFolder, runtime: str) -> None:
        self._runtime(sandbox, runtime, "start", folder.runtime_id)

    def _state(self, sandbox: SandboxFolder, folder: AttemptFolder, runtime: str) -> str:
        """The runtime's word for a container (OCI runtime-spec, State); empty where it knows none."""
        if not (sandbox.runtime_root / folder.runtime_id).exists():
            return ""
        argv = [runtime, f"--root={sandbox.runtime_root}", "state", folder.runtime_id]
        result = tools.run(argv, self._options.runtime_timeout)
        try:
            return str(json.loads(result.output)["status"]) if result.status == 0 else ""
        except (ValueError, KeyError, TypeError):
            return ""

    def _runtime(self, sandbox: SandboxFolder, runtime: str, *arguments: str) -> None:
        argv = [self.sealed.of(runtime), f"--root={sandbox.runtime_root}", *arguments]
        try:
            result = tools.run(argv, self._options.runtime_timeout)
        except OSError as error:
            raise EngineError("StartError", str(error)) from None
        if result.status != 0:
            raise EngineError("StartError", result.words or f"{arguments[0]} ended with {result.status}")

    def _delete(self, sandbox: SandboxFolder, folder: AttemptFolder, runtime: str) -> None:
        """Ends it, and has the runtime forget it."""
        if (sandbox.runtime_root / folder.runtime_id).exists():
            tools.run(
                [runtime, f"--root={sandbox.runtime_root}", "delete", "--force", folder.runtime_id],
                self._options.runtime_timeout,
            )

    def _remove_rest(self, folder: SandboxFolder) -> None:
        """What a sandbox has left outside of its folders and cgroups. Its processes have ended. Raises EngineError."""

    def _clear(self, sandbox: SandboxFolder, folder: AttemptFolder, runtime: str, *, keep_log: bool) -> None:
        """Leaves nothing of an attempt but, where asked, its log."""
        watching = self._monitor(folder)
        self._delete(sandbox, folder, runtime)
        if watching is not None:
            monitor.end(watching, _MONITOR_SECONDS)
        self._cgroups.remove_container(folder.sandbox_id, folder.container)
        filesystems.unmount_attempt(folder)
        _discard(folder.run)
        for each in folder.path.iterdir() if folder.path.exists() else ():
            if keep_log and each.name == folder.log.name:
                continue
            _discard(each)
        if not keep_log:
            _discard(folder.path)

    # -- the end

    def remove(self, sandbox_id: str) -> None:
        """Leaves nothing. Raises EngineError `RemoveFailed` where something does not go."""
        folder = self.folder(sandbox_id)
        if not any((folder.path.exists(), folder.run.exists(), self._cgroups.exists(sandbox_id))):
            self._remove_rest(folder)
            return
        watching = [ref for attempt in folder.attempts() if (ref := self._monitor(attempt)) is not None]
        self._cgroups.kill(sandbox_id)
        for ref in watching:
            monitor.end(ref, _MONITOR_SECONDS)
        # A runtime that was just making a process under a monitor may have made it after the first look.
        self._cgroups.kill(sandbox_id)
        self._end_process(folder)
        self._remove_rest(folder)
        filesystems.unmount_all(folder)
        self._cgroups.remove(sandbox_id)
        for each in (folder.run, folder.path):
            _discard(each)
            if each.exists():
                raise EngineError("RemoveFailed", f"{each} cannot be removed", retryable=True)

    def _end_process(self, folder: SandboxFolder) -> None:
        recorded = self.process(folder)
        if recorded is None or not recorded.pid:
            return
        if recorded.alive():
            notes.note_kill(folder, signal.SIGKILL)
        if recorded.send(signal.SIGKILL) and not recorded.join(5.0):
            raise EngineError("RemoveFailed", f"process {recorded.pid} does not end", retryable=True)
        reap(recorded.pid)

    def list(self) -> frozenset[str]:
        """Sandboxes of which anything is left. What has another name (`lost+found`) is not ours."""
        roots = (self._options.root_dir, self._options.run_root)
        found = self._cgroups.list().union(*(_names(root / "sandboxes") for root in roots))
        return frozenset(filter(valid_id, found))


def _names(folder: Path) -> frozenset[str]:
    try:
        return frozenset(each.name for each in folder.iterdir())
    except FileNotFoundError:
        return frozenset()


def _discard(path: Path) -> None:
    """Removes a folder or file, whatever it is."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
