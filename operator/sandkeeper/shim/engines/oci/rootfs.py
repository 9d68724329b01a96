"""Reads of an image's files that a hostile image cannot lead elsewhere."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from sandkeeper.shim.engines.base import EngineError

_MAX_FILE = 1024 * 1024
# Mount points of every container: as symbolic links they lead a runtime out of the root (CVE-2026-41579).
_MUST_BE_PLAIN = ("dev", "proc", "sys")


@dataclass(frozen=True, slots=True)
class User:
    """Numeric identity of a process."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()


def check(rootfs: Path) -> None:
    """Raises EngineError `InvalidImage` for a root in which /dev, /proc or /sys is anything but a folder."""
    for name in _MUST_BE_PLAIN:
        try:
            mode = (rootfs / name).lstat().st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(mode):
            raise EngineError("InvalidImage", f"image: /{name} must be a folder, not a link or file")


def open_beneath(folder: Path, relative: str, *, make: bool = False) -> int:
    """Opens a folder below `folder` without following any symbolic link; returns a descriptor (O_PATH).

    make: missing folders are made. Raises OSError (ELOOP or ENOTDIR for a link).
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(folder, flags)
    try:
        for part in filter(None, relative.split("/")):
            if part in (".", ".."):
                raise NotADirectoryError(20, "must not hold `.` or `..`")
            made = make and _mkdir(part, fd)
            below = os.open(part, flags, dir_fd=fd)
            os.close(fd)
            fd = below
            if made:
                # By its descriptor: what runs beside may have put a link in its place.
                Path(f"/proc/self/fd/{fd}").chmod(0o777)  # a volume's, for any user
    except BaseException:
        os.close(fd)
        raise
    return fd


def _mkdir(name: str, parent: int) -> bool:
    """Whether it was made, and not there already."""
    try:
        os.mkdir(name, 0o777, dir_fd=parent)
    except FileExistsError:
        return False
    return True


def read_text(rootfs: Path, relative: str) -> str:
    """A small file of the image, no symbolic link followed; empty where it cannot be read so."""
    parent, _, name = relative.rpartition("/")
    try:
        folder = open_beneath(rootfs, parent)
        try:
            # Looked at before it is opened: to open a device is to use it, and fdopen leaks a folder's descriptor.
            if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                return ""
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        finally:
            os.close(folder)
        with os.fdopen(fd, "rb") as file:
            return file.read(_MAX_FILE).decode(errors="replace")
    except OSError:
        return ""


def resolve_user(rootfs: Path, text: str) -> User:
    """Numeric identity for an image's `User`: `uid`, `user`, `uid:gid`, `user:group`, in any mix.

    Source: OCI image-spec config.md. Raises EngineError `InvalidConfig` for a name that the image lacks.
    """
    name, _, group = text.partition(":")
    passwd = _table(read_text(rootfs, "etc/passwd"), 4)
    uid, gid, login = 0, 0, ""
    if name:
        row = next((row for row in passwd if row[0] == name), None)
        if row is None and name.isdecimal():
            row = next((row for row in passwd if row[2] == name), None)
            uid = _number(name, "uid")
        elif row is None:
            raise EngineError("InvalidConfig", f"image: user {name!r} is not in its /etc/passwd")
        if row is not None:
            login, uid, gid = row[0], _number(row[2], "uid"), _number(row[3], "gid")
    elif passwd:
        login = next((row[0] for row in passwd if row[2] == "0"), "")
    groups = _table(read_text(rootfs, "etc/group"), 3)
    if group:
        entry = next((row for row in groups if row[0] == group), None)
        if entry is not None:
            gid = _number(entry[2], "gid")
        elif group.isdecimal():
            gid = _number(group, "gid")
        else:
            raise EngineError("InvalidConfig", f"image: group {group!r} is not in its /etc/group")
        return User(uid, gid)
    member_of = {
        _number(row[2], "gid")
        for row in groups
        if login and len(row) > 3 and login in row[3].split(",") and row[2].isdecimal()
    }
    return User(uid, gid, tuple(sorted(member_of - {gid})))


def _table(text: str, columns: int) -> list[list[str]]:
    rows = (line.strip().split(":") for line in text.splitlines() if not line.startswith("#"))
    return [row for row in rows if len(row) >= columns]


def _number(text: str, what: str) -> int:
    # int() takes no more than 4300 digits.
    number = int(text) if text.isdecimal() and len(text) <= 10 else -1
    if not 0 <= number < 2**31:
        raise EngineError("InvalidConfig", f"image: {what} {text[:20]!r} must be a number below 2^31")
    return number
