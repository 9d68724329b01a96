"""A restart of one node's machine, as far as its shim can tell; and processes that get a pid of one's choice.

`python reboot.py boot FILE PROGRAM...` runs the program where FILE is the kernel's boot id.
`python reboot.py pid NUMBER PROGRAM...` runs it with this pid, and ends with it. Exit status 75: it cannot be had.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_CLONE_NEWNS = 0x20000
_CLONE3 = 435  # the same number on every architecture
_CANNOT = 75

_libc = ctypes.CDLL(None, use_errno=True)


def run_booted(boot_id: Path) -> list[str]:
    """What to put before a program, so that it finds another boot id."""
    return [sys.executable, __file__, "boot", str(boot_id)]


def new_boot(folder: Path) -> Path:
    """A boot id that there was never before."""
    file = folder / f"boot-{uuid.uuid4()}"
    file.write_text(f"{uuid.uuid4()}\n")
    return file


def power_off(parent: str, run_dir: Path, spared: frozenset[int] = frozenset()) -> None:
    """Ends at once all that shims have started below a cgroup; cgroups and what lies in memory are gone.

    Their mounts are in a namespace that ends with them. spared: pids of processes that are taken for others
    afterwards.
    """
    for pid in spared:
        for point in _points():
            (point / "cgroup.procs").write_text(str(pid))
    # A monitor must not get to tell of its container's end.
    for names in ({"conmon"}, None):
        while pids := [pid for pid in _pids(parent) if names is None or _name(pid) in names]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _thaw(parent)
    for point in _points():
        folders = [each for each in (point / parent).rglob("*") if each.is_dir()]
        for folder in (*sorted(folders, reverse=True), point / parent):
            _remove(folder)
    shutil.rmtree(run_dir, ignore_errors=True)


@contextlib.contextmanager
def with_pid(pid: int, seconds: float = 20.0) -> Iterator[subprocess.Popen[bytes]]:
    """A process of no relation that has this pid until the end of the block.

    Waits for one that has ended to be reaped. Raises OSError where it cannot be had.
    """
    argv = [sys.executable, __file__, "pid", str(pid), "sleep", "86400"]
    deadline = time.monotonic() + seconds
    while True:
        keeper = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd="/")
        assert keeper.stdout is not None
        with keeper.stdout:
            given = bool(keeper.stdout.readline())
        if given:
            break
        keeper.wait(10)
        if time.monotonic() > deadline:
            raise OSError(f"no process can be given the pid {pid}")
    try:
        yield keeper
    finally:
        keeper.terminate()
        keeper.wait(10)


def kill(pid: int) -> None:
    """One that was spared."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _pids(parent: str) -> set[int]:
    found: set[int] = set()
    for point in _points():
        for procs in (point / parent).rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                found.update(map(int, procs.read_text().split()))
    return found


def _thaw(parent: str) -> None:
    """What is frozen takes no signal on cgroup v1."""
    for point in _points():
        for name, word in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            for file in (point / parent).rglob(name):
                with contextlib.suppress(OSError):
                    file.write_text(word)


def _points() -> list[Path]:
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [Path(words[4]) for words in lines if words[words.index("-") + 1] in ("cgroup", "cgroup2")]


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _remove(cgroup: Path) -> None:
    """Busy for a moment after its last process."""
    while True:
        try:
            return cgroup.rmdir()
        except FileNotFoundError:
            return None
        except OSError:
            if (cgroup / "cgroup.procs").read_text().split():
                raise


def _booted(boot_id: str, program: list[str]) -> None:
    _check(_libc.unshare(_CLONE_NEWNS))
    _check(_libc.mount(b"none", b"/", b"", _MS_REC | _MS_PRIVATE, b""))
    _check(_libc.mount(os.fsencode(boot_id), _BOOT_ID.encode(), b"", _MS_BIND, b""))
    os.execvp(program[0], program)  # noqa: S606


def _with_pid(pid: int, program: list[str]) -> None:
    # struct clone_args (linux/sched.h): flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls,
    # set_tid, set_tid_size.
    wanted = (ctypes.c_int32 * 1)(pid)
    words = [0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(wanted), 1]
    arguments = (ctypes.c_uint64 * len(words))(*words)
    child = _libc.syscall(_CLONE3, arguments, ctypes.sizeof(arguments))
    if child == 0:
        os.execvp(program[0], program)  # noqa: S606
    if child != pid:
        sys.exit(_CANNOT)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    print(child, flush=True)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # its pid may be anybody's from here on
    os.waitpid(child, 0)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    if sys.argv[1] == "boot":
        _booted(sys.argv[2], sys.argv[3:])
    else:
        _with_pid(int(sys.argv[2]), sys.argv[3:])
