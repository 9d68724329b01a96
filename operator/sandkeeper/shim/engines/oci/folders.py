"""Where the engine keeps what it knows: a folder per sandbox, and in it one per attempt of a container, twice.

On disk (`path`) is what must outlive a restart of the machine, or has no bound that memory could hold: what prepare
found, volumes, what a container writes, logs, exits. In run_dir (`run`), which is best in memory, is what tells of
processes, and what can be made anew: bundles, pid files, the runtime's state. An ext4 folder entry costs more than
all else that is done with such a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.wire.ids import valid_id


@dataclass(frozen=True, slots=True)
class AttemptFolder:
    """One run of a container; `run` is also its OCI bundle."""

    path: Path
    run: Path
    sandbox_id: str
    container: str
    attempt: int

    @property
    def runtime_id(self) -> str:
        return f"{self.sandbox_id}.{self.container}.{self.attempt}"

    @property
    def rootfs(self) -> Path:
        return self.run / "rootfs"

    @property
    def upper(self) -> Path:
        return self.path / "upper"

    @property
    def work(self) -> Path:
        return self.path / "work"

    @property
    def config(self) -> Path:
        return self.run / "config.json"

    @property
    def subpaths(self) -> Path:
        return self.run / "subpaths"

    @property
    def pid_file(self) -> Path:
        return self.run / "pid"

    @property
    def monitor_pid_file(self) -> Path:
        return self.run / "conmon.pid"

    @property
    def started(self) -> Path:
        """Written once the runtime's `start` has succeeded: the process and its monitor."""
        return self.run / "started.json"

    @property
    def exit_file(self) -> Path:
        """Written by conmon at the end: the exit code."""
        return self.path / self.runtime_id

    @property
    def exit_copy(self) -> Path:
        """Written by conmon at the end, before `exit_file`: the exit code. There is room for it when a sandbox has
        filled the disk."""
        return self.run / "exit"

    @property
    def oom_file(self) -> Path:
        """Written by conmon when the kernel killed for memory."""
        return self.run / "oom"

    @property
    def log(self) -> Path:
        return self.path / "log"


@dataclass(frozen=True, slots=True)
class ContainerFolder:
    sandbox: SandboxFolder
    name: str

    def attempt(self, number: int) -> AttemptFolder:
        name, sandbox = f"{self.name}.{number}", self.sandbox
        return AttemptFolder(sandbox.path / name, sandbox.run / name, sandbox.sandbox_id, self.name, number)

    def attempts(self) -> list[AttemptFolder]:
        """Those of which anything is left, in order."""
        return [each for each in self.sandbox.attempts() if each.container == self.name]


@dataclass(frozen=True, slots=True)
class SandboxFolder:
    path: Path
    run: Path
    sandbox_id: str

    @classmethod
    def under(cls, root: Path, run_root: Path, sandbox_id: str) -> SandboxFolder:
        """Raises EngineError `InvalidConfig` for an id that is no safe file name."""
        name = _safe("sandbox_id", sandbox_id)
        return cls(root / "sandboxes" / name, run_root / "sandboxes" / name, sandbox_id)

    @property
    def prepared(self) -> Path:
        """What prepare found: the runtime, the images by container; and the boot that it was prepared in, or
        started."""
        return self.path / "prepared.json"

    @property
    def starting(self) -> Path:
        """There from just before the sandbox process is started."""
        return self.path / "starting"

    @property
    def process(self) -> Path:
        return self.run / "process.json"

    @property
    def exit(self) -> Path:
        return self.run / "exit.json"

    @property
    def killed(self) -> Path:
        """The signal that was sent to the sandbox process."""
        return self.run / "killed.json"

    @property
    def runtime_root(self) -> Path:
        """The runtime's `--root`: what it knows of this sandbox's containers goes with the folder."""
        return self.run / "runtime"

    @property
    def etc(self) -> Path:
        return self.run / "etc"

    @property
    def volumes(self) -> Path:
        return self.path / "volumes"

    def volume(self, name: str) -> Path:
        """Raises EngineError `InvalidConfig`, as `under`."""
        return self.volumes / _safe("volumes[].name", name)

    def container(self, name: str) -> ContainerFolder:
        """Raises EngineError `InvalidConfig`, as `under`."""
        return ContainerFolder(self, _safe("containers[].name", name))

    def attempts(self) -> list[AttemptFolder]:
        """Those of which anything is left, in order."""
        found = set()
        for folder in (self.path, self.run):
            try:
                names = [each.name for each in folder.iterdir()]
            except FileNotFoundError:
                continue
            for each in names:
                name, _, number = each.rpartition(".")
                if number.isdecimal() and valid_id(name):
                    found.add((name, int(number)))
        return [self.container(name).attempt(number) for name, number in sorted(found)]


def _safe(field: str, name: str) -> str:
    if not valid_id(name):
        raise EngineError("InvalidConfig", f"{field}: {name[:100]!r} must be an identifier")
    return name
