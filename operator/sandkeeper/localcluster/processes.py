"""Processes that outlive whoever started them and can still be ended by another: pid and start time are on disk.

A pid alone could by then belong to somebody else; with the start time it cannot (Linux' /proc/<pid>/stat, field 22).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class ProcessDied(Exception):
    """A process ended that should run. The message ends with the last lines of its log."""


@dataclass(frozen=True, slots=True)
class Spawned:
    pid: int
    start_time: int


class Processes:
    """Named processes of one folder: <name>.log, and state in processes/<name>.json."""

    def __init__(
        self, folder: Path, popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen
    ) -> None:
        """popen: what starts them, where it is not to be here."""
        self._popen = popen
        self._logs = folder / "logs"
        self._state = folder / "processes"
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def spawn(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str] | None = None, tied: bool = False
    ) -> int:
        """Starts `argv` as `name`, in a session of its own; returns its pid.

        env: all of its environment; default: ours. tied: it is killed when this process ends, however it ends.
        Raises RuntimeError when `name` runs already.
        """
        if self.alive(name):
            raise RuntimeError(f"{name} runs already")
        self._forget(name)  # one that died by itself
        if tied and (setpriv := shutil.which("setpriv")):  # util-linux; execs, so the pid stays
            argv = [setpriv, "--pdeathsig", "KILL", "--", *argv]
        for folder in (self._logs, self._state):
            folder.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("ab") as output:
            child = self._popen(
                list(argv),
                cwd="/",
                env=None if env is None else dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._children[name] = child
        record = {"pid": child.pid, "startTime": start_time(child.pid) or 0}
        temporary = self._state / f".{name}.tmp"
        temporary.write_text(json.dumps(record))
        temporary.replace(self._state / f"{name}.json")
        return child.pid

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def names(self) -> list[str]:
        return sorted(p.stem for p in self._state.glob("*.json")) if self._state.is_dir() else []

    def pid(self, name: str) -> int | None:
        """The pid of `name` while it runs."""
        try:
            record = json.loads((self._state / f"{name}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        if child := self._children.get(name):
            child.poll()  # a zombie is no running process
        found = start_time(record["pid"])
        return record["pid"] if found is not None and found == record["startTime"] else None

    def alive(self, name: str) -> bool:
        return self.pid(name) is not None

    def signal(self, name: str, number: int) -> None:
        """Sends a signal; nothing happens when `name` does not run."""
        if (pid := self.pid(name)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self, name: str, *, grace: float = 10.0) -> None:
        """SIGTERM, after `grace` seconds SIGKILL; returns when it has ended. Repeatable."""
        self.signal(name, signal.SIGTERM)
        if not self._gone(name, grace):
            self.kill(name)
        self._forget(name)

    def kill(self, name: str) -> None:
        """SIGKILL; returns when it has ended."""
        self.signal(name, signal.SIGKILL)
        if not self._gone(name, 10.0):
            raise TimeoutError(f"{name} did not end after SIGKILL")
        self._forget(name)

    def check(self, name: str) -> None:
        """Raises ProcessDied when `name` does not run."""
        if not self.alive(name):
            raise ProcessDied(f"{name} ended; the last of {self.log(name)}:\n{self.tail(name)}")

    def tail(self, name: str, lines: int = 15) -> str:
        try:
            return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return "(no log)"

    def _gone(self, name: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.alive(name):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _forget(self, name: str) -> None:
        if child := self._children.pop(name, None):
            child.wait()
        (self._state / f"{name}.json").unlink(missing_ok=True)


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks after boot; None when there is none, or only a zombie.

    proc(5): fields 3 (state), 20 (num_threads), 22 (starttime). A zombie with more threads is a process that ends,
    and still holds its locks and sockets.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    over = fields[0] in "ZX" and int(fields[17]) <= 1
    return None if over else int(fields[19])
