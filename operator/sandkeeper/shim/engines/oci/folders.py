"""Where the engine keeps what it knows: one folder per sandbox, one per container in it, one per attempt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.wire.ids import valid_id


@dataclass(frozen=True, slots=True)
class AttemptFolder:
    """One run of a container; also its OCI bundle."""

    path: Path
    sandbox_id: str
    container: str
    attempt: int

    @property
    def runtime_id(self) -> str:
        return f"{self.sandbox_id}.{self.container}.{self.attempt}"

    @property
    def rootfs(self) -> Path:
        return self.path / "rootfs"

    @property
    def upper(self) -> Path:
        return self.path / "upper"

    @property
    def work(self) -> Path:
        return self.path / "work"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def subpaths(self) -> Path:
        return self.path / "subpaths"

    @property
    def pid_file(self) -> Path:
        return self.path / "pid"

    @property
    def monitor_pid_file(self) -> Path:
        return self.path / "conmon.pid"

    @property
    def started(self) -> Path:
        """Written once the runtime's `start` has succeeded: the process and its monitor."""
        return self.path / "started.json"

    @property
    def exit_file(self) -> Path:
        """Written by conmon at the end: the exit code."""
        return self.path / "exit" / self.runtime_id

    @property
    def persist(self) -> Path:
        """The second folder that conmon writes to at the end; a link to another file system where there is one."""
        return self.path / "persist"

    @property
    def exit_copy(self) -> Path:
        """Written by conmon at the end, before `exit_file`: the exit code."""
        return self.persist / "exit"

    @property
    def oom_file(self) -> Path:
        """Written by conmon when the kernel killed for memory."""
        return self.persist / "oom"

    @property
    def log(self) -> Path:
        return self.path / "log"


@dataclass(frozen=True, slots=True)
class ContainerFolder:
    path: Path
    sandbox_id: str
    name: str

    @property
    def image(self) -> Path:
        """What prepare found: digest, root file system, image configuration."""
        return self.path / "image.json"

    def attempt(self, number: int) -> AttemptFolder:
        return AttemptFolder(self.path / str(number), self.sandbox_id, self.name, number)

    def attempts(self) -> list[AttemptFolder]:
        """Those on disk, in order."""
        try:
            numbers = sorted(int(each.name) for each in self.path.iterdir() if each.name.isdecimal())
        except FileNotFoundError:
            return []
        return [self.attempt(number) for number in numbers]


@dataclass(frozen=True, slots=True)
class SandboxFolder:
    path: Path
    sandbox_id: str

    @classmethod
    def under(cls, root: Path, sandbox_id: str) -> SandboxFolder:
        """Raises EngineError `InvalidConfig` for an id that is no safe file name."""
        return cls(root / "sandboxes" / _safe("sandbox_id", sandbox_id), sandbox_id)

    @property
    def prepared(self) -> Path:
        """What remove needs to know: the runtime."""
        return self.path / "prepared.json"

    @property
    def process(self) -> Path:
        return self.path / "process.json"

    @property
    def starting(self) -> Path:
        """There from just before the sandbox process is started."""
        return self.path / "starting"

    @property
    def exit(self) -> Path:
        return self.path / "exit.json"

    @property
    def killed(self) -> Path:
        """The signal that was sent to the sandbox process."""
        return self.path / "killed.json"

    @property
    def runtime_root(self) -> Path:
        """The runtime's `--root`: what it knows of this sandbox's containers goes with the folder."""
        return self.path / "runtime"

    @property
    def etc(self) -> Path:
        return self.path / "etc"

    def volume(self, name: str) -> Path:
        """Raises EngineError `InvalidConfig`, as `under`."""
        return self.path / "volumes" / _safe("volumes[].name", name)

    def container(self, name: str) -> ContainerFolder:
        """Raises EngineError `InvalidConfig`, as `under`."""
        return ContainerFolder(
            self.path / "containers" / _safe("containers[].name", name), self.sandbox_id, name
        )

    def containers(self) -> list[ContainerFolder]:
        try:
            found = sorted(each.name for each in (self.path / "containers").iterdir())
        except FileNotFoundError:
            return []
        return [self.container(name) for name in found if valid_id(name)]


def _safe(field: str, name: str) -> str:
    if not valid_id(name):
        raise EngineError("InvalidConfig", f"{field}: {name[:100]!r} must be an identifier")
    return name
