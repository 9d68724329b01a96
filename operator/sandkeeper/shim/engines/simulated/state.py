"""What the simulated engine holds: in memory, and in STATE/simulated/ID.json for a shim that is started again.

A file is one line of JSON and never fsynced: what it tells of does not outlive a reboot anyway.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sandkeeper.shim.engines.base import SANDBOX_PROCESS, EngineError, ProcessExit
from sandkeeper.shim.engines.simulated.scripts import Line, Script

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PAGE = 4096


@dataclass(slots=True)
class Process:
    """One attempt at a container, or the sandbox process. Times are Unix times."""

    container: str
    attempt: int
    pid: int
    started_at: float
    script: Script
    exit: ProcessExit | None = None
    timer: asyncio.TimerHandle | None = None
    _ended: asyncio.Future[ProcessExit] | None = None

    @property
    def ends_at(self) -> float | None:
        """When its script ends it; None: never."""
        return None if self.script.seconds is None else self.started_at + self.script.seconds

    @property
    def ended(self) -> asyncio.Future[ProcessExit]:
        """Done when the process has ended."""
        if self._ended is None:
            self._ended = asyncio.get_running_loop().create_future()
            if self.exit is not None:
                self._ended.set_result(self.exit)
        return self._ended

    def end(self, ended: ProcessExit) -> None:
        """Once only."""
        self.disarm()
        self.exit = ended
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(ended)

    def disarm(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def lines(self, now: float) -> Iterator[tuple[int, float, Line]]:
        """(number, time, line) of what it has written until `now`."""
        until = self.exit.exited_at if self.exit else moment(now)
        for number, line in enumerate(self.script.lines):
            if moment(self.started_at + line.after) <= until:
                yield number, self.started_at + line.after, line

    def dump(self) -> dict[str, Any]:
        ended = self.exit and {**asdict(self.exit), "exited_at": self.exit.exited_at.timestamp()}
        return {
            "container": self.container,
            "attempt": self.attempt,
            "pid": self.pid,
            "started_at": self.started_at,
            "script": asdict(self.script),
            "exit": ended,
        }

    @classmethod
    def load(cls, raw: dict[str, Any]) -> Process:
        """Raises KeyError, TypeError or ValueError for what `dump` did not write."""
        ended = raw["exit"]
        if ended is not None:
            ended = ProcessExit(**{**ended, "exited_at": moment(ended["exited_at"])})
        lines = tuple(Line(*each) for each in raw["script"]["lines"])
        return cls(**{**raw, "script": Script(**{**raw["script"], "lines": lines}), "exit": ended})


@dataclass(slots=True)
class Sandbox:
    images: list[str]
    paused: bool = False
    # By container and attempt.
    processes: dict[tuple[str, int], Process] = field(default_factory=dict)
    _change: asyncio.Event | None = None

    @property
    def process(self) -> Process | None:
        """The sandbox process, once it was started."""
        return self.processes.get((SANDBOX_PROCESS, 0))

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.exit is None

    def running(self) -> list[Process]:
        return [each for each in self.processes.values() if each.exit is None]

    def attempts(self, container: str) -> list[Process]:
        """Oldest first."""
        return [each for each in self.processes.values() if each.container == container]

    def change(self) -> asyncio.Event:
        """Set at the next start or end of a process of it, or its removal."""
        if self._change is None:
            self._change = asyncio.Event()
        return self._change

    def tell(self) -> None:
        if self._change is not None:
            self._change.set()
            self._change = None


class Store:
    """The files. Methods block on the disk, not for long."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "simulated"
        self._boot_id = _BOOT_ID.read_text().strip()

    def load(self) -> dict[str, tuple[Sandbox, bool]]:
        """Sandboxes by id, and whether their processes are of this boot. Drops what it cannot read.

        Raises OSError.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found: dict[str, tuple[Sandbox, bool]] = {}
        for file in self._folder.iterdir():
            try:
                if file.suffix != ".json":
                    raise ValueError("left over by a write that was cut off")
                raw = json.loads(file.read_bytes().partition(b"\n")[0])
                processes = [Process.load(each) for each in raw["processes"]]
                sandbox = Sandbox(list(raw["images"]), bool(raw["paused"]))
                sandbox.processes = {(each.container, each.attempt): each for each in processes}
                found[file.stem] = (sandbox, raw["boot_id"] == self._boot_id)
            except (ValueError, KeyError, TypeError, AttributeError):
                file.unlink(missing_ok=True)
        return found

    def save(self, sandbox_id: str, sandbox: Sandbox) -> None:
        """Raises EngineError `NodeError`, retryable."""
        raw = {
            "boot_id": self._boot_id,
            "images": sandbox.images,
            "paused": sandbox.paused,
            "processes": [each.dump() for each in sandbox.processes.values()],
        }
        data = json.dumps(raw, separators=(",", ":")).encode() + b"\n"
        try:
            self._write(self._file(sandbox_id), data)
        except OSError as error:
            raise EngineError("NodeError", str(error), retryable=True) from error

    @staticmethod
    def _write(file: Path, data: bytes) -> None:
        """In place while it fits a page, which a kill does not tear: a new file costs ten times as much."""
        whole = file if len(data) <= _PAGE else file.with_name(f"{file.name}.tmp")
        handle = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.pwrite(handle, data, 0) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(whole))
            os.ftruncate(handle, len(data))
        finally:
            os.close(handle)
        if whole is not file:
            whole.replace(file)

    def remove(self, sandbox_id: str) -> None:
        """Raises EngineError `NodeError`, retryable."""
        try:
            self._file(sandbox_id).unlink(missing_ok=True)
        except OSError as error:
            raise EngineError("NodeError", str(error), retryable=True) from error

    def _file(self, sandbox_id: str) -> Path:
        return self._folder / f"{sandbox_id}.json"


def moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def scripted(script: Script, at: float) -> ProcessExit:
    """The end that a script comes to."""
    if script.oom:
        return ProcessExit(script.status, script.signal, moment(at), "OOMKilled")
    if script.signal:
        return ProcessExit(script.status, script.signal, moment(at), "Signaled")
    return exited(script.status, at)


def exited(status: int, at: float) -> ProcessExit:
    return ProcessExit(status, 0, moment(at), "Error" if status else "Completed")


def signaled(number: int) -> ProcessExit:
    return ProcessExit(128 + number, number, moment(time.time()), "Signaled")


def lost() -> ProcessExit:
    return ProcessExit(255, 0, moment(time.time()), "SandboxLost", "the machine was started anew")
