"""How a process ended, from what conmon, the kernel and we ourselves left on disk."""

from __future__ import annotations

import signal
from datetime import UTC, datetime
from pathlib import Path

from sandkeeper.shim.engines.base import ProcessExit
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.shim.engines.oci.folders import AttemptFolder, SandboxFolder
from sandkeeper.shim.engines.oci.processes import ProcessRef, boot_id, read_json

_LOST_STATUS = 255
KILLED = int(signal.SIGKILL)
RESTARTED = "the machine was restarted"


def decide(code: int, at: datetime, *, out_of_memory: bool) -> ProcessExit:
    """conmon's exit code, told apart: 0, a status of the program's own, 128 + signal, out of memory."""
    status = code & 0xFF
    number = status - 128 if 128 < status <= 128 + 64 else 0
    if out_of_memory and status != 0:
        return ProcessExit(status, number, at, "OOMKilled", "the kernel killed it at its memory limit")
    if number:
        return ProcessExit(status, number, at, "Signaled", f"ended by signal {number} ({_name(number)})")
    return ProcessExit(status, 0, at, "Completed" if status == 0 else "Error")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def read(folder: AttemptFolder, cgroups: Cgroups) -> ProcessExit | None:
    """The exit that conmon recorded; None where it has not, or not whole.

    It is written twice, since the disk may be full: see AttemptFolder.exit_copy.
    """
    found = _recorded(folder.exit_file) or _recorded(folder.exit_copy)
    if found is None:
        return None
    code, at = found
    out_of_memory = folder.oom_file.exists() or (
        code != 0 and cgroups.oom_kills(folder.sandbox_id, folder.container) > 0
    )
    return decide(code, at, out_of_memory=out_of_memory)


def _recorded(file: Path) -> tuple[int, datetime] | None:
    try:
        return int(file.read_text()), datetime.fromtimestamp(file.stat().st_mtime, UTC)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def lost(message: str, at: datetime | None = None, status: int = _LOST_STATUS) -> ProcessExit:
    """A process of which nothing is left to tell how it ended."""
    return ProcessExit(status & 0xFF, 0, at or datetime.now(UTC), "SandboxLost", message)


def of_sandbox(folder: SandboxFolder, process: ProcessRef) -> ProcessExit:
    """How the sandbox process ended: by a signal that we sent, or not by us."""
    if not folder.path.exists():  # removed meanwhile: that killed it
        return decide(128 + signal.SIGKILL, datetime.now(UTC), out_of_memory=False)
    recorded = read_json(folder.exit) or {}
    at = datetime.fromtimestamp(float(recorded.get("at") or _seen(folder.exit)), UTC)
    killed = read_json(folder.killed) or {}
    if process.boot != boot_id():
        return lost(RESTARTED, at)
    if number := int(killed.get("signal") or 0):
        return decide(128 + number, at, out_of_memory=False)
    return lost("the sandbox process was ended by someone else", at)


def _seen(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return datetime.now(UTC).timestamp()
