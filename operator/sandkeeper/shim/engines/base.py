"""The engine: the only place that knows how a sandbox's processes are made.

The shim's core (`sandkeeper.shim.keeper`) owns records, Wait, restarts and the
wire; an engine owns images, root file systems, processes, cgroups and logs.
Every method is safe to repeat, and safe to call after the shim was killed at
any point: what an engine needs to know again, it finds on disk or in the kernel.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar, Literal

from google.protobuf import any_pb2

from sandkeeper.wire import node_pb2

SANDBOX_PROCESS = ""
"""In place of a container's name: the sandbox process, which holds the namespaces."""


class EngineError(Exception):
    """An engine could not do what was asked.

    reason: CamelCase, for a condition (`ErrImagePull`, `InvalidConfig`, `StartError`, ...).
    message: for people; names the field at fault where one is.
    retryable: the same call may succeed later without any change.
    """

    def __init__(self, reason: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.retryable = retryable

    @property
    def passes(self) -> bool:
        """The node cannot just now, whatever is asked of it: that is no end of a container."""
        return self.retryable and self.reason != "StartError"


@dataclass(frozen=True, slots=True)
class RuntimeInfo:
    """A runtime that the engine knows; `ready` only if a container was really started with it."""

    name: str
    version: str = ""
    ready: bool = False
    message: str = ""


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How a process ended. status: 0-255, 128+signal where a signal ended it."""

    status: int
    signal: int
    exited_at: datetime
    reason: Literal["Completed", "Error", "OOMKilled", "Signaled", "SandboxLost"] = "Completed"
    message: str = ""


@dataclass(frozen=True, slots=True)
class ProcessState:
    """What the engine finds of one process: never started, alive (pid), or ended (exit)."""

    pid: int = 0
    exit: ProcessExit | None = None

    @property
    def started(self) -> bool:
        return self.pid != 0 or self.exit is not None


@dataclass(frozen=True, slots=True)
class UsageSample:
    """foreign: what is said of it in a type that cannot be read here; all else means nothing then."""

    cpu_usage_usec: int
    memory_bytes: int
    pids: int
    foreign: any_pb2.Any | None = None


Progress = Callable[[str, str, str], None]
"""Called as (container, reason, message) while something slow goes on, such as (`main`, `PullingImage`, ...)."""


class ExecSession(abc.ABC):
    """One more process in a running container, its streams connected to the caller."""

    @abc.abstractmethod
    async def write_stdin(self, data: bytes) -> None: ...

    @abc.abstractmethod
    async def close_stdin(self) -> None: ...

    @abc.abstractmethod
    async def resize(self, width: int, height: int) -> None: ...

    @abc.abstractmethod
    def output(self) -> AsyncIterator[tuple[Literal["stdout", "stderr"], bytes]]:
        """Yields output until the process has ended and its streams are drained."""

    @abc.abstractmethod
    async def wait(self) -> int:
        """Returns the exit status (128 + signal where a signal ended it)."""

    @abc.abstractmethod
    async def kill(self) -> None:
        """Ends the process if it still runs and frees what the session holds; safe to repeat."""


class Engine(abc.ABC):
    name: ClassVar[str]

    @abc.abstractmethod
    async def open(self) -> None:
        """Checks what the node offers (each runtime by running a container). Raises EngineError
        where the engine as a whole cannot work."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Frees the engine's own resources. Sandboxes keep running."""

    @abc.abstractmethod
    def runtimes(self) -> tuple[RuntimeInfo, ...]:
        """All runtimes known, ready or not; the default (fastest ready) first."""

    def features(self) -> frozenset[str]:
        """Optional abilities: Pause, Exec, Logs, HostNetwork, UserNamespaces."""
        return frozenset()

    @abc.abstractmethod
    async def prepare(
        self, sandbox_id: str, config: node_pb2.SandboxConfig, progress: Progress
    ) -> Mapping[str, str]:
        """Fetches images and makes everything that needs no process: root file systems, bundles,
        volumes, cgroups. Starts nothing. Returns container name -> image digest (`sha256:...`).
        Raises EngineError (`ErrImagePull` retryable, `ErrImageNeverPull`, `InvalidImageName`,
        `InvalidConfig`, ...)."""

    @abc.abstractmethod
    async def start(self, sandbox_id: str, config: node_pb2.SandboxConfig) -> int:
        """Starts the sandbox process; returns its pid on the host."""

    @abc.abstractmethod
    async def start_container(
        self, sandbox_id: str, config: node_pb2.SandboxConfig, container: str, attempt: int
    ) -> int:
        """Starts a container in the running sandbox; returns its pid on the host. `attempt` counts
        from 0: a restart of the container is a new attempt with a fresh root file system.
        Raises EngineError(`StartError`) with the runtime's own words, e.g. an unknown command."""

    @abc.abstractmethod
    async def inspect(self, sandbox_id: str, container: str, attempt: int) -> ProcessState:
        """What is found of a process, also after a restart of the shim or of the machine."""

    @abc.abstractmethod
    async def wait(self, sandbox_id: str, container: str, attempt: int) -> ProcessExit:
        """Returns once the process has ended; at once if it has already, also when it ended while
        the shim was down. A started process of which nothing is left: reason `SandboxLost`."""

    @abc.abstractmethod
    async def kill(self, sandbox_id: str, container: str, attempt: int, signal: int) -> None:
        """Sends a signal; a process that has ended already is success."""

    @abc.abstractmethod
    async def pause(self, sandbox_id: str) -> None: ...

    @abc.abstractmethod
    async def resume(self, sandbox_id: str) -> None: ...

    @abc.abstractmethod
    async def usage(self, sandbox_id: str) -> UsageSample | None:
        """The whole sandbox's use, from its cgroup or from whoever else runs it; None where nothing runs."""

    @abc.abstractmethod
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
    ) -> ExecSession: ...

    @abc.abstractmethod
    def logs(
        self, sandbox_id: str, container: str, *, follow: bool, tail_lines: int, timestamps: bool
    ) -> AsyncIterator[bytes]:
        """The container's output over all its attempts, bounded by the node's log limit; with
        `follow` until the sandbox is removed or has ended for good."""

    @abc.abstractmethod
    async def remove(self, sandbox_id: str) -> None:
        """Leaves nothing: process (killed), mount, cgroup, namespace, folder. Repeatable; an id
        that is not known is success. Returns only when it is all gone."""

    @abc.abstractmethod
    async def list(self) -> frozenset[str]:
        """Ids of which the engine holds anything, for finding what no record owns."""

    async def adopt(self, pid: int) -> None:  # noqa: B027 - optional
        """Takes a process that is to outlive the shim out of the shim's own cgroup."""

    async def collect(self, in_use: frozenset[str]) -> None:  # noqa: B027 - optional
        """Frees what can be had again, such as images not in `in_use` (digests), under disk pressure."""
