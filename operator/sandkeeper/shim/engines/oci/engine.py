"""The engine's face: what the shim's core asks for, handed to threads that do one step after the other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from signal import SIGKILL
from typing import Any, ClassVar, Protocol, TypeVar

from sandkeeper.shim.engines.base import (
    SANDBOX_PROCESS,
    Engine,
    EngineError,
    ExecSession,
    ProcessExit,
    ProcessState,
    Progress,
    RuntimeInfo,
    UsageSample,
)
from sandkeeper.shim.engines.oci import (
    containers,
    earlier,
    exits,
    logs,
    notes,
    runtimes,
    seccomp,
    sessions,
    spec,
)
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.shim.engines.oci.folders import AttemptFolder, SandboxFolder
from sandkeeper.shim.engines.oci.images import Image, ImageStore
from sandkeeper.shim.engines.oci.images.types import Progress as ImageProgress
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.processes import ProcessRef, read_json, write_json
from sandkeeper.shim.engines.oci.threads import Locks, Threads
from sandkeeper.wire import node_pb2

log = logging.getLogger(__name__)

T = TypeVar("T")


class Images(Protocol):
    """What the engine needs of an image store."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def ensure(
        self, reference: str, policy: node_pb2.ImagePullPolicy.ValueType, progress: ImageProgress
    ) -> Image: ...
    async def collect(self, in_use: frozenset[str]) -> None: ...


class OCIEngine(Engine):
    """crun, runc or runsc through conmon, joined to a catatonit sandbox process."""

    name: ClassVar[str] = "oci"

    def __init__(self, settings: Any, *, images: Images | None = None) -> None:
        """settings: ShimSettings, or Options together with an image store."""
        self._options = settings if isinstance(settings, Options) else Options.from_settings(settings)
        self._images = images if images is not None else ImageStore(_image_settings(settings))
        self._runtimes: Mapping[str, runtimes.Runtime] = {}
        self._order: tuple[RuntimeInfo, ...] = ()
        self._locks = Locks()
        self._watching: dict[str, asyncio.Task[ProcessExit]] = {}
        self._opened = contextlib.ExitStack()

    # -- the node

    async def open(self) -> None:
        if os.geteuid() != 0:
            raise EngineError("NodeUnsupported", f"the {self.name} engine must be run as root")
        for program in self._programs():
            if shutil.which(program, path=_path()) is None:
                raise EngineError("NodeUnsupported", f"{program} is not installed")
        for root in (self._options.root_dir, self._options.run_root):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        await self._images.open()
        self._cgroups = self._make_cgroups()
        self._opened.callback(self._cgroups.close)
        self._cgroups.make_parent()
        await asyncio.to_thread(earlier.end_calls, self._cgroups)
        profile = seccomp.Seccomp(seccomp.load(self._options.seccomp_profile))
        try:
            self._threads = self._make_threads()
        except OSError as error:
            raise EngineError("NodeUnsupported", f"mount namespace: {error}") from None
        self._opened.callback(self._threads.close)
        self._runtimes = await self._threads.run(lambda: self._probe(profile))
        self._order = runtimes.ordered(self._runtimes, self._options.default_runtime)
        if not any(info.ready for info in self._order):
            reasons = "; ".join(f"{info.name}: {info.message}" for info in self._order)
            raise EngineError("NodeUnsupported", f"no runtime works: {reasons}")
        self._containers = self._make_containers(profile)
        self._opened.callback(self._containers.sealed.close)

    # What another engine does in another way.

    def _programs(self) -> tuple[str, ...]:
        """Without which the engine cannot work."""
        return (self._options.conmon, self._options.catatonit)

    def _make_cgroups(self) -> Cgroups:
        """Raises EngineError `NodeUnsupported`."""
        return Cgroups(self._options.cgroup_parent)

    def _make_threads(self) -> Threads:
        return Threads(
            self._options.concurrency,
            adopt=earlier.survivor(self._options),
            hide=self._cgroups.hidden,
            prepare=self._cgroups.enter_thread,
        )

    def _probe(self, profile: seccomp.Seccomp) -> Mapping[str, runtimes.Runtime]:
        return runtimes.probe_all(self._options, self._cgroups, profile)

    def _make_containers(self, profile: seccomp.Seccomp) -> containers.Containers:
        return containers.Containers(self._options, self._cgroups, profile, self._threads)

    async def close(self) -> None:
        for task in self._watching.values():
            task.cancel()
        await asyncio.gather(*self._watching.values(), return_exceptions=True)
        await self._images.close()
        await asyncio.to_thread(self._opened.close)

    def runtimes(self) -> tuple[RuntimeInfo, ...]:
        return self._order

    def features(self) -> frozenset[str]:
        found = {"Pause", "Exec", "Logs"}
        return frozenset(found | ({"HostNetwork"} if self._options.allow_host_network else set()))

    def _runtime_of(self, name: str) -> str:
        """The program of a runtime. Raises EngineError `RuntimeNotFound`."""
        chosen = self._runtimes.get(name or self._order[0].name)
        if chosen is None or not chosen.info.ready:
            why = chosen.info.message if chosen else "it is not one of this node's"
            raise EngineError("RuntimeNotFound", f"runtime: {name!r} cannot be used: {why}")
        return chosen.program

    async def _locked(self, sandbox_id: str, work: Callable[[], T]) -> T:
        """One step of a sandbox at a time, to its end even if the caller gives up."""

        def step() -> T:
            with self._locks.of(sandbox_id):
                try:
                    return work()
                except OSError as error:
                    raise EngineError("NodeError", str(error), retryable=True) from error

        return await self._threads.run(step)

    # -- life

    async def prepare(
        self, sandbox_id: str, config: node_pb2.SandboxConfig, progress: Progress
    ) -> Mapping[str, str]:
        folder = self._containers.folder(sandbox_id)
        runtime = self._runtime_of(config.runtime)
        for container in config.containers:
            spec.check_mounts(config, container)

        def ensure(container: node_pb2.ContainerConfig) -> Awaitable[Image]:
            return self._images.ensure(
                container.image,
                container.image_pull_policy,
                lambda reason, message: progress(container.name, reason, message),
            )

        found = await asyncio.gather(*(ensure(each) for each in config.containers), return_exceptions=True)
        images: dict[str, Image] = {}
        for container, image in zip(config.containers, found, strict=True):
            if isinstance(image, BaseException):
                raise image
            images[container.name] = image
        await self._locked(
            sandbox_id, lambda: self._containers.prepare(folder.sandbox_id, config, runtime, images)
        )
        return {name: image.digest for name, image in images.items()}

    async def start(self, sandbox_id: str, config: node_pb2.SandboxConfig) -> int:
        pid = await self._locked(sandbox_id, lambda: self._containers.start(sandbox_id, config))
        self._watch(sandbox_id)
        return pid

    async def start_container(
        self, sandbox_id: str, config: node_pb2.SandboxConfig, container: str, attempt: int
    ) -> int:
        runtime = self._runtime_of(config.runtime)
        return await self._locked(
            sandbox_id,
            lambda: self._containers.start_container(sandbox_id, config, container, attempt, runtime),
        )

    def _attempt(self, sandbox_id: str, container: str, attempt: int) -> AttemptFolder:
        return self._containers.folder(sandbox_id).container(container).attempt(attempt)

    async def inspect(self, sandbox_id: str, container: str, attempt: int) -> ProcessState:
        folder = self._containers.folder(sandbox_id)
        if container == SANDBOX_PROCESS:
            process = self._containers.process(folder)
            if process is None:
                return ProcessState()
            if process.alive():
                self._watch(sandbox_id)
                return ProcessState(pid=process.pid)
            return ProcessState(exit=exits.of_sandbox(folder, process))
        attempt_folder = self._attempt(sandbox_id, container, attempt)
        started = notes.read_started(attempt_folder)
        if started is None:
            ended = exits.read(attempt_folder, self._cgroups)
            return ProcessState(exit=ended)
        if started.process.alive():
            return ProcessState(pid=started.process.pid)
        return ProcessState(exit=await self._container_exit(attempt_folder, started))

    async def wait(self, sandbox_id: str, container: str, attempt: int) -> ProcessExit:
        if container == SANDBOX_PROCESS:
            return await asyncio.shield(self._watch(sandbox_id))
        folder = self._attempt(sandbox_id, container, attempt)
        started = notes.read_started(folder)
        if started is None:
            started = await self._locked(
                sandbox_id, lambda: self._containers.started(sandbox_id, container, attempt)
            )
        if started is None:
            ended = exits.read(folder, self._cgroups)
            if ended is None and notes.of_earlier_boot(self._containers.folder(sandbox_id)):
                return exits.lost(exits.RESTARTED)
            if ended is None:
                raise EngineError("NotStarted", f"container {container!r} was not started")
            return ended
        return await self._container_exit(folder, started)

    async def _container_exit(self, folder: AttemptFolder, started: notes.Started) -> ProcessExit:
        # conmon ends last, after it has written the exit file.
        if started.monitor is not None:
            await started.monitor.ended()
        ended = exits.read(folder, self._cgroups)
        if ended is None:
            await started.process.ended()
            ended = exits.read(folder, self._cgroups) or exits.lost(
                "its monitor was killed, and its exit with it"
            )
        return ended

    def _watch(self, sandbox_id: str) -> asyncio.Task[ProcessExit]:
        """One task per sandbox process that waits for its end and keeps the record of it."""
        task = self._watching.get(sandbox_id)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = asyncio.create_task(self._sandbox_exit(sandbox_id))
            self._watching[sandbox_id] = task
        return task

    async def _sandbox_exit(self, sandbox_id: str) -> ProcessExit:
        folder = self._containers.folder(sandbox_id)
        process = self._containers.process(folder)
        if process is None:
            raise EngineError("NotStarted", "the sandbox process was not started")
        await self._process_ended(folder, process)
        return await self._kept_exit(folder, process)

    async def _process_ended(self, folder: SandboxFolder, process: ProcessRef) -> None:
        """Returns once a sandbox process has ended."""
        await process.ended()

    async def _kept_exit(self, folder: SandboxFolder, process: ProcessRef) -> ProcessExit:
        return await self._locked(folder.sandbox_id, lambda: self._containers.sandbox_exit(folder, process))

    async def kill(self, sandbox_id: str, container: str, attempt: int, signal: int) -> None:
        folder = self._containers.folder(sandbox_id)
        if container == SANDBOX_PROCESS:
            process = self._containers.process(folder)
            if process is not None and process.alive():
                notes.note_kill(folder, signal)
                await self._signal(folder, process, signal)
            if signal == SIGKILL:
                # It ends the sandbox. What is in pid namespaces of its own does not end with it by itself.
                await self._locked(sandbox_id, lambda: self._cgroups.kill(sandbox_id))
            return
        attempt_folder = self._attempt(sandbox_id, container, attempt)
        started = notes.read_started(attempt_folder)
        if started is not None:
            number = self._stop_signal(folder, container, signal)
            await self._send(attempt_folder, started.process, number)
            if self._cgroups.is_frozen(sandbox_id):
                # A frozen process takes no signal, not even SIGKILL on cgroup v1.
                await self.resume(sandbox_id)

    async def _send(self, folder: AttemptFolder, process: ProcessRef, number: int) -> None:
        """To a container's first process."""
        process.send(number)

    async def _signal(self, folder: SandboxFolder, process: ProcessRef, number: int) -> None:
        """To a sandbox process."""
        process.send(number)

    @staticmethod
    def _stop_signal(folder: SandboxFolder, container: str, number: int) -> int:
        """SIGTERM becomes the image's StopSignal, where it names one."""
        if number != signal.SIGTERM:
            return number
        image = notes.read_image(folder, container)
        name = image.config.stop_signal if image else ""
        if name.isdecimal() and 0 < int(name) <= 64:
            return int(name)
        with contextlib.suppress(ValueError, KeyError):
            return signal.Signals[name if name.startswith("SIG") else f"SIG{name}"]
        return number

    async def pause(self, sandbox_id: str) -> None:
        await self._locked(sandbox_id, lambda: self._cgroups.freeze(sandbox_id, True))

    async def resume(self, sandbox_id: str) -> None:
        await self._locked(sandbox_id, lambda: self._cgroups.freeze(sandbox_id, False))

    async def usage(self, sandbox_id: str) -> UsageSample | None:
        process = self._containers.process(self._containers.folder(sandbox_id))
        if process is None or not process.alive():
            return None
        return self._cgroups.usage(sandbox_id)

    async def remove(self, sandbox_id: str) -> None:
        await self._locked(sandbox_id, lambda: self._containers.remove(sandbox_id))
        # Its process has ended, so that the task ends by itself, with an answer for whoever waits.
        self._watching.pop(sandbox_id, None)

    async def adopt(self, pid: int) -> None:
        await self._threads.run(lambda: self._cgroups.adopt(pid))

    async def collect(self, in_use: frozenset[str]) -> None:
        await self._images.collect(in_use)

    # -- what people look into

    async def exec(
        self,
        sandbox_id: str,
        container: str,
        attempt: int,
        command: list[str],
        *,
        tty: bool,
        stdin: bool,
        size: tuple[int, int] | None,
    ) -> ExecSession:
        folder = self._attempt(sandbox_id, container, attempt)
        started = notes.read_started(folder)
        if started is None or not self._may_run(started.process):
            raise EngineError("NotRunning", f"container {container!r} does not run")
        if self._cgroups.is_frozen(sandbox_id):
            raise EngineError("Paused", "the sandbox is paused")
        if not command or not command[0] or any("\0" in each for each in command):
            raise EngineError("InvalidConfig", "command: must not be empty or hold NUL")

        def begin() -> ExecSession:
            process = {**read_json(folder.config)["process"], "args": command, "terminal": tty}
            if tty and size:
                process["consoleSize"] = {"width": size[0], "height": size[1]}
            files = Path(tempfile.mkdtemp(prefix="exec-", dir=folder.run))
            return self._execute(folder, files, process, stdin=stdin, size=size)

        return await self._threads.run(begin)

    def _may_run(self, process: ProcessRef) -> bool:
        return process.alive()

    def _execute(
        self,
        folder: AttemptFolder,
        files: Path,
        process: dict[str, Any],
        *,
        stdin: bool,
        size: tuple[int, int] | None,
    ) -> ExecSession:
        """process: as in the OCI configuration. files: a folder for the session alone, which removes it."""
        write_json(files / "process.json", process)
        sandbox, tty = self._containers.folder(folder.sandbox_id), bool(process["terminal"])
        argv = [
            *(self._containers.sealed.of(notes.read_runtime(sandbox)), f"--root={sandbox.runtime_root}"),
            *("exec", "--pid-file", str(files / "pid")),
            *(["--tty"] if tty else []),
            *("--process", str(files / "process.json"), folder.runtime_id),
        ]
        return sessions.spawn(argv, files, tty=tty, stdin=stdin, size=size)

    async def logs(
        self, sandbox_id: str, container: str, *, follow: bool, tail_lines: int, timestamps: bool
    ) -> AsyncIterator[bytes]:
        folder = self._containers.folder(sandbox_id)

        def ended() -> bool:
            process = self._containers.process(folder)
            return not folder.path.exists() or (process is not None and not process.alive())

        async for piece in logs.stream(
            folder.container(container),
            follow=follow,
            tail_lines=tail_lines,
            timestamps=timestamps,
            ended=ended,
        ):
            yield piece

    # Last in the class: its name hides the built-in from what follows.
    async def list(self) -> frozenset[str]:
        return await asyncio.to_thread(self._containers.list)


def _image_settings(settings: Any) -> Any:
    """The image store's own; its folder is beside the engine's where none is named."""
    if settings.oci.image_dir is not None:
        return settings.oci
    return settings.oci.model_copy(update={"image_dir": settings.state_dir / "images"})


def _path() -> str:
    return os.environ.get("PATH", os.defpath)


__all__ = ["OCIEngine"]
