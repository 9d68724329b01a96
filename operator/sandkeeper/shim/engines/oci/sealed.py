"""Runtimes run from sealed copies of themselves in memory.

A container must not get at the program that made it (CVE-2019-5736), so that crun and runc, each time that they are
run, first make a copy or a read-only mount of themselves and then run that: two programs started and linked for one.
From a copy that is sealed against every change already they go on at once (their cloned_binary.c, `F_GET_SEALS`).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path

from sandkeeper.shim.engines.oci import tools

log = logging.getLogger(__name__)

KNOWN = frozenset(("crun", "runc"))
"""Those that look for the seals. Others may make something else of where they are run from."""

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MFD_EXEC = 0x10  # since Linux 6.3, where the default may be another
_TRY_SECONDS = 20.0

Version = tuple[int, int, int, int]


class Sealed:
    """Copies, each for as long as this object is open; of a program that was replaced a new one is made.

    folder: for names of the copies, since a runtime goes by its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._paths: dict[str, tuple[Version, str]] = {}
        self._copies: list[tuple[int, Path]] = []
        for path in folder.glob("*/*"):
            if not path.exists():  # it led to a killed shim's
                shutil.rmtree(path.parent, ignore_errors=True)

    def of(self, program: str) -> str:
        """The path by which to run a program: its sealed copy's, where there can be one, else its own."""
        name = program.rpartition("/")[2]
        if name not in KNOWN or not program.startswith("/"):
            return program
        try:
            found = os.stat(program)  # noqa: PTH116 - on the hot path
        except OSError:
            return program
        version = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        with self._lock:
            known = self._paths.get(program)
            if known is None or known[0] != version:
                known = self._paths[program] = (version, self._make(program, name))
        return known[1]

    def _make(self, program: str, name: str) -> str:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = Path(tempfile.mkdtemp(dir=self._folder)) / name
            copy = _sealed(program, name)
            self._copies.append((copy, path))
            # By our pid: what starts it is not us.
            path.symlink_to(f"/proc/{os.getpid()}/fd/{copy}")
            result = tools.run([str(path), "--version"], _TRY_SECONDS)
            if result.status == 0:
                return str(path)
            why = result.words or f"exit status {result.status}"
        except OSError as error:
            why = str(error)
        log.warning("runtime not run from a sealed copy", extra={"program": program, "error": why})
        return program

    def close(self) -> None:
        with self._lock:
            self._paths.clear()
            for copy, path in self._copies:
                os.close(copy)
                shutil.rmtree(path.parent, ignore_errors=True)
            self._copies.clear()
        with contextlib.suppress(OSError):
            self._folder.rmdir()


def _sealed(program: str, name: str) -> int:
    """A descriptor of a copy that nobody can change. Raises OSError."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        copy = os.memfd_create(name, flags | _MFD_EXEC)
    except OSError:  # a kernel that does not know it
        copy = os.memfd_create(name, flags)
    try:
        with open(program, "rb") as source, open(copy, "wb", closefd=False) as target:  # noqa: PTH123
            shutil.copyfileobj(source, target)
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(copy)
        raise
    return copy
