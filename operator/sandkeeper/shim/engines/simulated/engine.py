"""The simulated engine's face: it does as it is told.

What a container does is read from its command line (`scripts`). An image with `missing` in its name cannot be
pulled for now, one with `invalid` never. As real processes do, simulated ones run on while no shim is there and are
lost with a reboot. No sandbox has a task or a thread: an end is a timer of the event loop, and a wait is a future.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import replace
from signal import SIGCHLD, SIGCONT, SIGKILL, SIGTERM, SIGURG, SIGWINCH
from typing import ClassVar

from sandkeeper import __version__
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
from sandkeeper.shim.engines.simulated import scripts, state
from sandkeeper.shim.engines.simulated.scripts import Line, Script
from sandkeeper.shim.engines.simulated.sessions import Session
from sandkeeper.shim.engines.simulated.state import Process, Sandbox
from sandkeeper.shim.settings import ShimSettings
from sandkeeper.wire import node_pb2
from sandkeeper.wire.ids import valid_id

FIRST_PID = 4 * 1024 * 1024 + 1
"""Above the kernel's PID_MAX_LIMIT: whoever signals such a pid hits no real process."""

_IGNORED = frozenset({0, SIGCHLD, SIGCONT, SIGURG, SIGWINCH})
_ATTEMPTS_KEPT = 5
_MEMORY_BYTES = 1024 * 1024


class SimulatedEngine(Engine):
    name: ClassVar[str] = "simulated"

    def __init__(self, settings: ShimSettings) -> None:
        self._settings = settings.simulated
        self._store = state.Store(settings.state_dir)
        self._sandboxes: dict[str, Sandbox] = {}
        self._images: set[str] = set()
        self._pids = itertools.count(FIRST_PID)

    # The node

    async def open(self) -> None:
        try:
            found = await asyncio.to_thread(self._store.load)
        except OSError as error:
            raise EngineError("NodeUnsupported", f"state_dir: {error}") from error
        highest = FIRST_PID - 1
        for sandbox_id, (sandbox, same_boot) in found.items():
            self._sandboxes[sandbox_id] = sandbox
            self._images.update(sandbox.images)
            highest = max(highest, *(each.pid for each in sandbox.processes.values()), 0)
            # The sandbox process, which was started first, last: its end would be the others'.
            for process in reversed(sandbox.running()):
                if same_boot:
                    self._arm(sandbox_id, process)
                else:
                    self._end(sandbox_id, process, state.lost())
        self._pids = itertools.count(highest + 1)

    async def close(self) -> None:
        for sandbox in self._sandboxes.values():
            for process in sandbox.running():
                process.disarm()

    def runtimes(self) -> tuple[RuntimeInfo, ...]:
        return (RuntimeInfo(name="simulated", version=__version__, ready=True),)

    def features(self) -> frozenset[str]:
        return frozenset({"Pause", "Exec", "Logs"})

    # Life

    async def prepare(
        self, sandbox_id: str, config: node_pb2.SandboxConfig, progress: Progress
    ) -> Mapping[str, str]:
        if not valid_id(sandbox_id):
            raise EngineError("InvalidConfig", f"sandbox_id {sandbox_id!r} must be an identifier")
        if config.runtime not in ("", "simulated"):
            raise EngineError("RuntimeNotFound", f"runtime: {config.runtime!r} is not one of this node's")
        if config.network == node_pb2.NETWORK_HOST:
            raise EngineError("InvalidConfig", "network: Host is not offered by the simulated engine")
        await asyncio.gather(*(self._pull(each, progress) for each in config.containers))
        if sandbox_id not in self._sandboxes:
            sandbox = Sandbox(sorted({each.image for each in config.containers}))
            self._store.save(sandbox_id, sandbox)
            self._sandboxes[sandbox_id] = sandbox
        return {each.name: _digest(each.image) for each in config.containers}

    async def _pull(self, container: node_pb2.ContainerConfig, progress: Progress) -> None:
        image = container.image
        if not image or "invalid" in image:
            raise EngineError("InvalidImageName", f"image {image!r} is not a valid reference")
        if image in self._images:
            return
        if container.image_pull_policy == node_pb2.IMAGE_PULL_POLICY_NEVER:
            raise EngineError("ErrImageNeverPull", f"image {image!r} is not on the node and is never pulled")
        progress(container.name, "PullingImage", f"pulling {image}")
        await asyncio.sleep(self._settings.image_seconds)
        if "missing" in image:
            raise EngineError("ErrImagePull", f"image {image!r}: manifest unknown", retryable=True)
        self._images.add(image)

    async def start(self, sandbox_id: str, config: node_pb2.SandboxConfig) -> int:
        if self._known(sandbox_id).process is None and self._settings.start_seconds:
            await asyncio.sleep(self._settings.start_seconds)
        process = self._known(sandbox_id).process
        if process is None:
            return self._begin(sandbox_id, SANDBOX_PROCESS, 0, scripts.FOREVER)
        if process.exit is not None:
            raise EngineError("StartError", "the sandbox process has ended")
        return process.pid

    async def start_container(
        self, sandbox_id: str, config: node_pb2.SandboxConfig, container: str, attempt: int
    ) -> int:
        sandbox = self._known(sandbox_id)
        begun = sandbox.processes.get((container, attempt))
        if begun is not None:
            return begun.pid
        found = next((each for each in config.containers if each.name == container), None)
        if found is None:
            raise EngineError("InvalidConfig", f"container {container!r} is not in the configuration")
        if not sandbox.runs:
            raise EngineError("StartError", "the sandbox process does not run")
        words = [*found.command, *found.args]
        if not scripts.startable(words):
            raise EngineError("StartError", f"exec: {words[0]!r}: executable file not found in $PATH")
        script = scripts.read(words)
        if not script.lines:
            said = tuple(Line(0.0, "stdout", text) for text in found.args or ["started"])
            script = replace(script, lines=said)
        sandbox.processes.pop((container, attempt - _ATTEMPTS_KEPT), None)
        return self._begin(sandbox_id, container, attempt, script)

    async def inspect(self, sandbox_id: str, container: str, attempt: int) -> ProcessState:
        process = self._find(sandbox_id, container, attempt)
        if process is None:
            return ProcessState()
        return ProcessState(exit=process.exit) if process.exit else ProcessState(pid=process.pid)

    async def wait(self, sandbox_id: str, container: str, attempt: int) -> ProcessExit:
        process = self._find(sandbox_id, container, attempt)
        if process is None:
            raise EngineError("NotStarted", f"container {container!r} was not started")
        return await asyncio.shield(process.ended)

    async def kill(self, sandbox_id: str, container: str, attempt: int, signal: int) -> None:
        process = self._find(sandbox_id, container, attempt)
        if process is None or process.exit is not None or signal in _IGNORED:
            return
        self._thaw(sandbox_id)  # what is frozen takes no signal
        term = process.script.term
        if signal != SIGTERM or term == scripts.TERMINATED:
            self._end(sandbox_id, process, state.signaled(signal))
        elif term is not None:
            self._end(sandbox_id, process, state.exited(term, time.time()))

    async def pause(self, sandbox_id: str) -> None:
        sandbox = self._known(sandbox_id)
        if not sandbox.runs:
            raise EngineError("NotRunning", "the sandbox does not run")
        if not sandbox.paused:
            sandbox.paused = True
            for process in sandbox.running():
                process.disarm()
            self._store.save(sandbox_id, sandbox)

    async def resume(self, sandbox_id: str) -> None:
        self._known(sandbox_id)
        self._thaw(sandbox_id)

    async def usage(self, sandbox_id: str) -> UsageSample | None:
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None or sandbox.process is None or not sandbox.runs:
            return None
        alive = len(sandbox.running())
        elapsed = max(0.0, time.time() - sandbox.process.started_at)
        return UsageSample(cpu_usage_usec=int(elapsed * 1000), memory_bytes=alive * _MEMORY_BYTES, pids=alive)

    async def remove(self, sandbox_id: str) -> None:
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            return
        self._store.remove(sandbox_id)
        del self._sandboxes[sandbox_id]
        for process in sandbox.running():
            process.end(state.signaled(SIGKILL))
        sandbox.tell()

    # What people look into

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
        process = self._find(sandbox_id, container, attempt)
        if process is None or process.exit is not None:
            raise EngineError("NotRunning", f"container {container!r} does not run")
        if self._sandboxes[sandbox_id].paused:
            raise EngineError("Paused", "the sandbox is paused")
        if not command or not command[0]:
            raise EngineError("InvalidConfig", "command: must not be empty")
        return Session(command, process.ended, stdin=stdin)

    async def logs(
        self, sandbox_id: str, container: str, *, follow: bool, tail_lines: int, timestamps: bool
    ) -> AsyncIterator[bytes]:
        sandbox = self._known(sandbox_id)
        told = (-1, 0)  # attempt and number of the last line
        tail = tail_lines
        while True:
            # Taken before the look: the consumer of what is yielded may be slow.
            change = sandbox.change()
            removed = self._sandboxes.get(sandbox_id) is not sandbox
            over = removed or (sandbox.process is not None and not sandbox.runs)
            now = time.time()
            fresh = [
                (process.attempt, *found)
                for process in sandbox.attempts(container)
                for found in process.lines(now)
                if (process.attempt, found[0]) > told
            ]
            for attempt, number, written, line in fresh[-tail:]:
                told = (attempt, number)
                stamp = f"{state.moment(written).isoformat()} " if timestamps else ""
                yield f"{stamp}{line.text}\n".encode()
            tail = 0
            if not follow or over:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(_until_next_line(sandbox, container, now)):
                    await change.wait()

    async def list(self) -> frozenset[str]:
        return frozenset(self._sandboxes)

    # Inside

    def _known(self, sandbox_id: str) -> Sandbox:
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            raise EngineError("NotPrepared", f"sandbox {sandbox_id!r} was not prepared")
        return sandbox

    def _find(self, sandbox_id: str, container: str, attempt: int) -> Process | None:
        sandbox = self._sandboxes.get(sandbox_id)
        return None if sandbox is None else sandbox.processes.get((container, attempt))

    def _begin(self, sandbox_id: str, container: str, attempt: int, script: Script) -> int:
        process = Process(container, attempt, next(self._pids), time.time(), script)
        sandbox = self._sandboxes[sandbox_id]
        sandbox.processes[container, attempt] = process
        try:
            self._store.save(sandbox_id, sandbox)
        except EngineError:
            del sandbox.processes[container, attempt]
            raise
        self._arm(sandbox_id, process)
        sandbox.tell()
        return process.pid

    def _arm(self, sandbox_id: str, process: Process, *, not_before: float = 0.0) -> None:
        """Has the process end when its script says so; a frozen one when it is thawed."""
        if process.ends_at is None or self._sandboxes[sandbox_id].paused:
            return
        at = max(process.ends_at, not_before)
        ended = state.scripted(process.script, at)
        delay = max(0.0, at - time.time())
        process.timer = asyncio.get_running_loop().call_later(delay, self._end, sandbox_id, process, ended)

    def _end(self, sandbox_id: str, process: Process, ended: ProcessExit) -> None:
        if process.exit is not None:
            return
        sandbox = self._sandboxes[sandbox_id]
        process.end(ended)
        if process.container == SANDBOX_PROCESS:
            # The first process of their PID namespace: the kernel kills the others with it.
            for each in sandbox.running():
                each.end(state.signaled(SIGKILL))
        with suppress(EngineError):  # a disk that is full brings no process back
            self._store.save(sandbox_id, sandbox)
        sandbox.tell()

    def _thaw(self, sandbox_id: str) -> None:
        sandbox = self._sandboxes[sandbox_id]
        if sandbox.paused:
            sandbox.paused = False
            self._store.save(sandbox_id, sandbox)
            for process in sandbox.running():
                self._arm(sandbox_id, process, not_before=time.time())


def _until_next_line(sandbox: Sandbox, container: str, seen: float) -> float | None:
    """Seconds until there is a line written after `seen`; None: not before something changes."""
    due = [
        process.started_at + line.after
        for process in sandbox.attempts(container)
        for line in process.script.lines
        if process.exit is None
    ]
    following = min((each for each in due if each > seen), default=None)
    return None if following is None else max(0.0, following - time.time())


def _digest(image: str) -> str:
    _, at, digest = image.partition("@")
    return digest if at else f"sha256:{hashlib.sha256(image.encode()).hexdigest()}"
