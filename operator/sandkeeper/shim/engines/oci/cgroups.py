"""The cgroups of sandboxes, on v1 (also hybrid) and v2.

/<parent>/_monitors         conmon and the sandbox processes: out of the shim's own cgroup,
                            so that nothing that ends the shim's cgroup ends them; of a v2
                            beside v1 all of them, and the shim too
/<parent>/<sandbox>         one per sandbox: what is measured and frozen
/<parent>/<sandbox>/<name>  one per container, made and limited by the runtime
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sandkeeper.shim.engines.base import EngineError, UsageSample
from sandkeeper.shim.engines.oci import files

# No identifier, so that no sandbox is called so.
MONITORS = "_monitors"
_THAW_AFTER, _THAWED_SECONDS = 25, 0.01
_V2_CONTROLLERS = ("cpu", "memory", "pids", "io", "cpuset")


@dataclass(frozen=True, slots=True)
class Mount:
    point: Path
    controllers: frozenset[str]


def find_mounts(mountinfo: str) -> tuple[tuple[Mount, ...], Path | None]:
    """From /proc/self/mountinfo (proc(5)): the v1 hierarchies, and where v2 is mounted, if anywhere."""
    v1: dict[frozenset[str], Mount] = {}
    v2: Path | None = None
    # Only what the kernel itself escapes divides: a mount point may hold any other character.
    for line in mountinfo.split("\n"):
        left, _, right = line.partition(" - ")
        mount, source = left.split(" "), right.split(" ", 2)
        if len(mount) < 5 or len(source) < 3:
            continue
        point = Path(_ESCAPED.sub(lambda found: chr(int(found[1], 8)), mount[4]))
        kind, _, options = source
        if kind == "cgroup":
            words = options.split(",")
            names = frozenset(word for word in words if word not in _MOUNT_OPTIONS)
            v1.setdefault(names, Mount(point, names))
        elif kind == "cgroup2":
            v2 = v2 or point
    return tuple(v1.values()), v2


_ESCAPED = re.compile(r"\\([0-3][0-7]{2})")
_MOUNT_OPTIONS = frozenset(("rw", "ro", "xattr", "clone_children", "noprefix", "favordynmods"))


class Cgroups:
    """parent: name of the cgroup above all sandboxes.

    hide_v2: where v2 is mounted beside v1, runtimes do not see it. Else they make cgroups there as well.
    """

    def __init__(self, parent: str, *, hide_v2: bool = True, mountinfo: str | None = None) -> None:
        if mountinfo is None:
            mountinfo = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
        self.hierarchies, unified = find_mounts(mountinfo)
        self.parent = parent
        self.v2 = not self.hierarchies
        if self.v2:
            if unified is None:
                raise EngineError("NodeUnsupported", "no cgroup file system is mounted")
            self.hierarchies = (Mount(unified, frozenset(("unified",))),)
        # Mount points that a runtime must not see: v2 beside v1.
        self.hidden: tuple[str, ...] = ()
        self._beside: tuple[Mount, ...] = ()
        if not self.v2 and unified is not None:
            if hide_v2:
                self.hidden = (str(unified),)
            else:
                self._beside = (Mount(unified, frozenset()),)
        self._unified = () if self.v2 or unified is None else (unified,)
        self._home: Path | None = None

    def path(self, sandbox_id: str, container: str = "") -> str:
        """As the OCI spec's `linux.cgroupsPath` has it."""
        return "/" + "/".join(filter(None, (self.parent, sandbox_id, container)))

    @property
    def has_swap_accounting(self) -> bool:
        memory = self._of("memory")
        name = "memory.swap.max" if self.v2 else "memory.memsw.limit_in_bytes"
        # v2's root has no limit files: any child of it will do.
        return any((folder / name).exists() for folder in (memory, memory / self.parent))

    def _of(self, controller: str) -> Path:
        for each in self.hierarchies:
            if controller in each.controllers:
                return each.point
        return self.hierarchies[0].point

    def _each(self, relative: str) -> list[str]:
        """Wherever there may be a cgroup of ours."""
        return [f"{each.point}/{relative.lstrip('/')}" for each in (*self.hierarchies, *self._beside)]

    @property
    def _monitors(self) -> list[Path]:
        return [each.point / self.parent / MONITORS for each in self.hierarchies]

    def make_parent(self) -> None:
        """The cgroups that all sandboxes share. Raises EngineError where they cannot be made."""
        try:
            self._make(f"/{self.parent}")
            if not self.v2:
                # All that is made below, by us or by a runtime, begins with what its parent has.
                inherits = self._of("cpuset") / self.parent / "cgroup.clone_children"
                with contextlib.suppress(OSError):
                    if files.read(inherits).strip() == b"0":
                        files.write(inherits, b"1")
            self._make(f"/{self.parent}/{MONITORS}")
        except OSError as error:
            raise EngineError("NodeUnsupported", f"cgroup cannot be made: {error}") from None
        self._leave()

    def _leave(self) -> None:
        """v2 beside v1: takes this process to the monitors' cgroup there, and so all that it will start.

        What ends a Pod, runc or kubelet, kills all that is in the Pod's cgroup of any hierarchy, and of this one a
        runtime sees nothing. No controller that we use is in it, so nothing is reckoned elsewhere by this.
        """
        for point in self._unified:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path("/proc/self/cgroup").read_text().splitlines()
                path = next(line for line in lines if line.startswith("0::")).removeprefix("0::")
                monitors = point / self.parent / MONITORS
                monitors.mkdir(parents=True, exist_ok=True)
                (monitors / "cgroup.procs").write_text(str(os.getpid()))
                self._home = point / path.lstrip("/")

    @property
    def parents(self) -> list[Path]:
        """Where the cgroup above all sandboxes is, in every hierarchy."""
        points = [*(each.point for each in self.hierarchies), *self._unified]
        return [point / self.parent for point in points]

    def make(self, sandbox_id: str) -> None:
        self._make(self.path(sandbox_id))

    def _make(self, relative: str) -> None:
        for folder in self._each(relative):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o755)  # noqa: PTH102 - on the hot path
            if self.v2:
                self._delegate(Path(folder).parent)
        if self.v2:
            return
        cpuset = f"{self._of('cpuset')}/{relative.lstrip('/')}"
        for name in ("cpuset.cpus", "cpuset.mems"):
            # A new cpuset is empty unless its parent has clone_children, and an empty one takes no process.
            with contextlib.suppress(FileNotFoundError):
                if not files.read(f"{cpuset}/{name}").strip():
                    files.write(f"{cpuset}/{name}", files.read(f"{cpuset}/../{name}"))

    @staticmethod
    def _delegate(folder: Path) -> None:
        for controller in _V2_CONTROLLERS:
            with contextlib.suppress(OSError):
                (folder / "cgroup.subtree_control").write_text(f"+{controller}")

    def enter_thread(self) -> None:
        """v1: moves the calling thread, and so what it will run, to the monitors' cgroup. v2 knows no such
        thing: see `adopt`."""
        if not self.v2:
            for folder in self._monitors:
                with contextlib.suppress(OSError):
                    (folder / "tasks").write_text(str(threading.get_native_id()))

    def adopt(self, pid: int) -> None:
        """Moves a process to the monitors' cgroup."""
        for folder in self._monitors:
            with contextlib.suppress(OSError):
                files.write(folder / "cgroup.procs", str(pid).encode())

    def settle(self, pid: int) -> None:
        """As `adopt`, for a process that on v1 was born there, by one of the engine's threads.

        The first move after a while waits some milliseconds in the kernel (an RCU grace period for
        cgroup_threadgroup_rwsem), those soon after do not: done while the caller goes on, it spares
        the next runtime that wait. In one hierarchy it does so for all.
        """
        for folder in self._monitors[:1]:
            with contextlib.suppress(OSError):
                files.write(folder / "cgroup.procs", str(pid).encode())

    def in_monitors(self) -> frozenset[int]:
        """Every process that is in the monitors' cgroup as a whole: a runtime that is under way among them, a shim
        with its threads there not. None on v2."""
        found: list[set[int]] = []
        for folder in self._monitors:
            for name in ("cgroup.procs", "tasks"):
                try:
                    found.append({int(line) for line in (folder / name).read_text().split()})
                except OSError:
                    return frozenset()
        return frozenset(set.intersection(*found) - {0})

    def pids(self, sandbox_id: str) -> frozenset[int]:
        """Every process in a sandbox's containers."""
        found: set[int] = set()
        for folder in self._each(self.path(sandbox_id)):
            for cgroup in _below(folder):
                with contextlib.suppress(OSError):
                    found.update(map(int, files.read(f"{cgroup}/cgroup.procs").split()))
        return frozenset(found - {0})

    def freeze(self, sandbox_id: str, frozen: bool, seconds: float = 10.0) -> None:
        """Freezes or thaws all containers of a sandbox. Raises EngineError `PauseFailed` after `seconds`."""
        relative = self.path(sandbox_id).lstrip("/")
        folder = (self.hierarchies[0].point if self.v2 else self._of("freezer")) / relative
        deadline, tries = time.monotonic() + seconds, 0
        try:
            while True:
                if self.v2:
                    (folder / "cgroup.freeze").write_text("1" if frozen else "0")
                    done = f"frozen {int(frozen)}" in (folder / "cgroup.events").read_text()
                else:
                    done = self._set_freezer(folder / "freezer.state", frozen, tries := tries + 1)
                if done:
                    return
                if time.monotonic() > deadline:
                    raise EngineError("PauseFailed", "the cgroup does not freeze", retryable=True)
                time.sleep(0.002)
        except OSError as error:
            raise EngineError("PauseFailed", f"cgroup freezer: {error}", retryable=True) from None

    @staticmethod
    def _set_freezer(state: Path, frozen: bool, tries: int) -> bool:
        """v1, asked again until it holds: FROZEN may miss a task that was just made. One frozen while another
        thread's execve waits for it holds up the freezing for ever; let go for a moment, both get on."""
        if frozen and tries % _THAW_AFTER == 0:
            state.write_text("THAWED")
            time.sleep(_THAWED_SECONDS)
        state.write_text("FROZEN" if frozen else "THAWED")
        return state.read_text().strip() == ("FROZEN" if frozen else "THAWED")

    def is_frozen(self, sandbox_id: str) -> bool:
        relative = self.path(sandbox_id).lstrip("/")
        name = self.hierarchies[0].point / relative / "cgroup.freeze"
        if not self.v2:
            name = self._of("freezer") / relative / "freezer.state"
        try:
            return name.read_text().strip() not in ("0", "THAWED")
        except OSError:
            return False

    def usage(self, sandbox_id: str) -> UsageSample | None:
        """What the sandbox's containers use now, and their CPU time so far; None where they are gone."""
        relative = self.path(sandbox_id).lstrip("/")
        try:
            if self.v2:
                folder = self.hierarchies[0].point / relative
                stat = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
                cpu, memory = int(stat["usage_usec"]), int((folder / "memory.current").read_text())
            else:
                cpu = int((self._of("cpuacct") / relative / "cpuacct.usage").read_text()) // 1000
                memory = int((self._of("memory") / relative / "memory.usage_in_bytes").read_text())
            pids = int((self._of("pids") / relative / "pids.current").read_text())
        except (OSError, KeyError, ValueError):
            return None
        return UsageSample(cpu_usage_usec=cpu, memory_bytes=memory, pids=pids)

    def oom_events(self, sandbox_id: str, container: str) -> Path:
        """The file in which the kernel counts `oom_kill`."""
        name = "memory.events" if self.v2 else "memory.oom_control"
        return self._of("memory") / self.path(sandbox_id, container).lstrip("/") / name

    def oom_kills(self, sandbox_id: str, container: str) -> int:
        """Processes of a container that the kernel killed for memory."""
        try:
            text = self.oom_events(sandbox_id, container).read_text()
            return int(dict(line.split()[:2] for line in text.splitlines()).get("oom_kill", "0"))
        except (OSError, ValueError):
            return 0

    def exists(self, sandbox_id: str) -> bool:
        return any(map(os.path.exists, self._each(self.path(sandbox_id))))

    def list(self) -> frozenset[str]:
        """Sandboxes that have a cgroup."""
        found: set[str] = set()
        for folder in self._each(f"/{self.parent}"):
            with contextlib.suppress(OSError):
                with os.scandir(folder) as entries:
                    found.update(each.name for each in entries if each.is_dir(follow_symlinks=False))
        return frozenset(found - {MONITORS})

    def kill(self, sandbox_id: str, seconds: float = 10.0) -> None:
        """Kills whatever is in the sandbox's containers, frozen or not; returns once nothing is.

        Raises EngineError `RemoveFailed` after `seconds`.
        """
        deadline = time.monotonic() + seconds
        while pids := self.pids(sandbox_id):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.is_frozen(sandbox_id):
                self.freeze(sandbox_id, False)
            if time.monotonic() > deadline:
                raise EngineError("RemoveFailed", f"processes do not end: {sorted(pids)}", retryable=True)
            time.sleep(0.001)

    def remove(self, sandbox_id: str, seconds: float = 10.0) -> None:
        """Removes the sandbox's cgroups, which must be empty. Raises EngineError `RemoveFailed`."""
        for folder in self._each(self.path(sandbox_id)):
            _remove_tree(folder, time.monotonic() + seconds)

    def remove_container(self, sandbox_id: str, container: str) -> None:
        for folder in self._each(self.path(sandbox_id, container)):
            _remove_tree(folder, time.monotonic() + 10.0)

    def close(self) -> None:
        """Removes the shared cgroups where nothing is in them."""
        if self._home is not None:
            with contextlib.suppress(OSError):
                (self._home / "cgroup.procs").write_text(str(os.getpid()))
        for parent in self.parents:
            for folder in (parent / MONITORS, parent):
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _below(folder: str) -> Iterator[str]:
    """A cgroup and those below it, each before its parent; none where it is not there."""
    try:
        with os.scandir(folder) as entries:
            children = [each.path for each in entries if each.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for child in children:
        yield from _below(child)
    yield folder


def _remove_tree(root: str, deadline: float) -> None:
    """Removes a cgroup and those below it: rmdir only. Busy for a moment after the last process."""
    for folder in _below(root):
        while True:
            try:
                os.rmdir(folder)  # noqa: PTH106 - on the hot path
                break
            except FileNotFoundError:
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise EngineError("RemoveFailed", f"cgroup {folder}: {error}", retryable=True) from None
                time.sleep(0.001)
