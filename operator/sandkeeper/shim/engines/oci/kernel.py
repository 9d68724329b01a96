"""System calls that Python 3.11 has no function for: mounts, namespaces, capabilities.

All act on the calling thread; the functions that change its credentials or
namespaces are for threads made for that one purpose.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import struct
from pathlib import Path

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

# Raw numbers, since glibc's setresuid and its like change every thread of the process.
_SYSCALLS = {
    "x86_64": {"capset": 126, "setresuid": 117, "setresgid": 119, "setgroups": 116, "pivot_root": 155},
    "aarch64": {"capset": 91, "setresuid": 147, "setresgid": 149, "setgroups": 159, "pivot_root": 41},
}

_libc = ctypes.CDLL(None, use_errno=True)


def _numbers() -> dict[str, int]:
    numbers = _SYSCALLS.get(platform.machine())
    if numbers is None:
        raise OSError(0, f"no system call numbers for {platform.machine()}")
    return numbers


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2). Raises OSError."""
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), os.fsencode(data)
    )
    _check(result, f"mount {kind or 'flags'} on {target}")


def umount(target: str, flags: int = 0) -> None:
    """umount2(2) without following a symbolic link. Raises OSError (EINVAL: not a mount point)."""
    _check(_libc.umount2(os.fsencode(target), flags | UMOUNT_NOFOLLOW), f"umount {target}")


def pivot_root(root: str) -> None:
    """Makes a mount point the root of the calling thread's mount namespace, and lets go of the old one.

    pivot_root(2), with both of its arguments `.`. Raises OSError.
    """
    os.chdir(root)
    _check(_libc.syscall(_numbers()["pivot_root"], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")


def unshare(flags: int) -> None:
    """unshare(2): gives the calling thread namespaces of its own. Raises OSError."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """setns(2): moves the calling thread into a namespace. Raises OSError."""
    _check(_libc.setns(fd, kind), "setns")


def sethostname(name: str) -> None:
    """sethostname(2), in the calling thread's UTS namespace. Raises OSError."""
    raw = name.encode()
    _check(_libc.sethostname(raw, len(raw)), "sethostname")


@functools.cache
def last_capability() -> int:
    """The highest that this kernel knows."""
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text())


def drop_privileges(uid: int) -> None:
    """Leaves the calling thread, and what it runs, nothing but `uid`: no capability, no way to gain one.

    Raises OSError. The process's dumpable flag, which the kernel clears at the change of user, is put back.
    """
    numbers = _numbers()
    dumpable = _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0)
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for capability in range(last_capability() + 1):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    try:
        _check(_libc.syscall(numbers["setgroups"], 0, None), "setgroups")
        _check(_libc.syscall(numbers["setresgid"], uid, uid, uid), "setresgid")
        _check(_libc.syscall(numbers["setresuid"], uid, uid, uid), "setresuid")
    finally:
        if dumpable == 1:
            _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    version_3 = 0x20080522
    header = ctypes.create_string_buffer(struct.pack("=Ii", version_3, 0))
    _check(_libc.syscall(numbers["capset"], header, ctypes.create_string_buffer(24)), "capset")
