"""What sandboxes may leave behind: processes, mounts, cgroups, network namespaces, folders.

Everything is found from outside, by the kernel's own lists, never by what the shim says. A network
namespace lives only by a process in it or a mount of it: both are looked for.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_MONITORS = "_monitors"
_OURS = frozenset(("conmon", "catatonit", "crun", "runc", "runsc"))


@dataclass(frozen=True, slots=True)
class Leaks:
    """Finds what belongs to the shims below `root`, whose cgroup is `cgroup_parent`.

    root: the folder that holds their state and run directories.
    ignore: pids that may live, such as a shim's; this process always may.
    run: the run directory, where it is not below `root`.
    """

    root: Path
    cgroup_parent: str
    ignore: Collection[int] = field(default=())
    run: Path | None = None

    def found(self) -> list[str]:
        """One line for each thing left, empty where nothing is."""
        return [*self._processes(), *self._mounts(), *self._cgroups(), *self._folders()]

    def assert_none(self, seconds: float = 10.0) -> None:
        """Passes as soon as nothing is left. Raises AssertionError with the list after `seconds`."""
        deadline = time.monotonic() + seconds
        while left := self.found():
            if time.monotonic() > deadline:
                raise AssertionError("left behind:\n  " + "\n  ".join(left))
            time.sleep(0.02)

    # -- what is looked at

    def _may_live(self, pid: int) -> bool:
        return pid == os.getpid() or pid in self.ignore

    def _processes(self) -> Iterator[str]:
        """Those that name a folder in their command or environment, or are in the cgroup; and our
        own children that nobody has waited for. A zombie of another parent is that parent's."""
        folders, cgroup = [os.fsencode(each) for each in self._roots()], f":/{self.cgroup_parent}/"
        for pid in _pids():
            if self._may_live(pid):
                continue
            with contextlib.suppress(OSError, IndexError):
                name, state, parent = _stat(pid)
                if state in "ZX":
                    if parent == os.getpid() and name in _OURS:
                        yield f"zombie {pid} ({name})"
                    continue
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                named = words + Path(f"/proc/{pid}/environ").read_bytes()
                lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
                if len(lines) > 1:
                    # In a v2 beside v1 a shim, and this process with an engine in it, is among the monitors, and
                    # whatever it starts is born there (cgroups.py). Ours are in v1's as well.
                    lines = [line for line in lines if line != f"0::/{self.cgroup_parent}/{_MONITORS}"]
                belongs = any(folder in named for folder in folders) or any(cgroup in line for line in lines)
                if belongs:
                    yield f"process {pid}: {words.replace(bytes(1), b' ').decode(errors='replace')[:120]}"

    def _mounts(self) -> Iterator[str]:
        """In every mount namespace that any thread of this machine is in."""
        prefixes = tuple(f"{each}/" for each in self._roots())
        for owner, text in _mount_tables():
            for line in text.splitlines():
                left, _, right = line.partition(" - ")
                target = left.split()[4]
                if target.startswith(prefixes):
                    yield f"mount {target} ({right.split()[0]}, as {owner} sees it)"

    def _cgroups(self) -> Iterator[str]:
        for point in _cgroup_points():
            with contextlib.suppress(OSError):
                for each in (point / self.cgroup_parent).iterdir():
                    if each.is_dir() and each.name != _MONITORS:
                        yield f"cgroup {each}"

    def _folders(self) -> Iterator[str]:
        """A sandbox's folder is in one named `sandboxes`, the engine's and the records' alike."""
        for pattern in ("sandboxes", "*/sandboxes", "*/*/sandboxes", "*/*/*/sandboxes"):
            for folder in {found for root in self._roots() for found in root.glob(pattern)}:
                with contextlib.suppress(OSError):
                    for each in folder.iterdir():
                        yield f"folder {each}"

    def _roots(self) -> list[Path]:
        return [self.root] if self.run is None else [self.root, self.run]


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208


def _stat(pid: int) -> tuple[str, str, int]:
    """Name, state letter and parent (proc(5), /proc/pid/stat)."""
    head, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    fields = rest.split()
    return head.partition("(")[2], fields[0], int(fields[1])


def _mount_tables() -> Iterator[tuple[str, str]]:
    """Once per mount namespace: who is in it, and what is mounted there."""
    seen: set[int] = set()
    for pid in _pids():
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
                inode = Path(f"/proc/{pid}/task/{thread}/ns/mnt").stat().st_ino
                if inode not in seen:
                    seen.add(inode)
                    yield f"thread {thread}", Path(f"/proc/{pid}/task/{thread}/mountinfo").read_text()


def _cgroup_points() -> list[Path]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [
        Path(line.split()[4])
        for line in lines
        if line.partition(" - ")[2].split()[0] in ("cgroup", "cgroup2")
    ]
