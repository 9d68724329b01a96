"""Which process is meant: a pid alone is not enough, since the kernel uses it again."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from sandkeeper.shim.engines.oci import files


@functools.cache
def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time in clock ticks since boot (proc(5)); None where there is no such process."""
    try:
        text = files.read(f"/proc/{pid}/stat").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """One process of this machine's life: pid, its start time, and the boot it belongs to."""

    pid: int
    start: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """The process that has this pid now; None where none has, or only a zombie."""
        found = _stat(pid)
        if found is None or found[0] in "ZX":
            return None
        return cls(pid, found[1], boot_id())

    @classmethod
    def from_json(cls, value: Any) -> Self | None:
        try:
            return cls(int(value["pid"]), int(value["start"]), str(value["boot"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            return None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def alive(self) -> bool:
        return ProcessRef.of(self.pid) == self

    def pidfd(self) -> int | None:
        """A pidfd of exactly this process; None where it has ended."""
        try:
            fd = os.pidfd_open(self.pid)
        except (ProcessLookupError, OSError):
            return None
        found = _stat(self.pid)
        if self.boot != boot_id() or found is None or found[1] != self.start:
            os.close(fd)
            return None
        return fd

    def send(self, number: int) -> bool:
        """Sends a signal; False where the process has ended."""
        fd = self.pidfd()
        if fd is None:
            return False
        try:
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True

    def join(self, seconds: float) -> bool:
        """Blocks until it has ended; False if it has not after `seconds`."""
        fd = self.pidfd()
        if fd is None:
            return True
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            return bool(poll.poll(seconds * 1000))
        finally:
            os.close(fd)

    async def ended(self) -> None:
        """Returns once it has ended; a child of ours is reaped."""
        fd = self.pidfd()
        if fd is None:
            reap(self.pid)
            return
        await readable(fd)
        reap(self.pid)


async def readable(fd: int) -> None:
    """Returns once the pidfd says that its process has ended, and closes it."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def reap(pid: int) -> int | None:
    """Collects an ended child; its wait status, None where it is not a child of ours or has not ended."""
    if pid <= 0:
        return None  # waitpid(2) takes it for any child, or any of a group
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return status if found else None


def pids() -> list[int]:
    """Of all processes that this one sees."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - names, no paths


def descendants(pid: int) -> Iterator[int]:
    """The pids of a process's children, and theirs, as far as they are still there."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                yield child
                yield from descendants(child)


def read_json(path: Path) -> Any:
    """The object in a file; None where there is none, {} where it cannot be read or is something else."""
    try:
        found = json.loads(files.read(path))
    except FileNotFoundError:
        return None
    except (ValueError, IsADirectoryError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Writes an object whole or not at all, as a crash of this process sees it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        files.write(temporary, json.dumps(value).encode())
        if path.is_dir():
            shutil.rmtree(path)  # none of ours
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
