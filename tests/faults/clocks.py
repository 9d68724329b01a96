"""A clock of its own for a process, which a test sets while the process runs: Debian's libfaketime."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_LIBRARIES = [Path(f"/usr/lib/{arch}-linux-gnu/faketime/libfaketime.so.1") for arch in ("x86_64", "aarch64")]
# libfaketime takes a sleep until a moment since boot, as Python asks for it, for an error where that clock is not
# to be changed.
_SITE = """
import select
import time

time.sleep = lambda seconds: select.select([], [], [], seconds) and None
"""


class SetClock:
    """folder: made here, for a file that holds by how much the clock is ahead. What the kernel measures since boot
    stays as it is."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._file = folder, folder / "ahead"
        (folder / "sitecustomize.py").write_text(_SITE)
        self.set(0)

    def set(self, seconds: int) -> None:
        """From now on the clock is ahead by so much; negative: behind."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{seconds:+d}\n")
        fresh.replace(self._file)

    @property
    def under(self) -> list[str]:
        """What to put before a program. Raises FileNotFoundError without libfaketime."""
        library = next((each for each in _LIBRARIES if each.exists()), None)
        if library is None:
            raise FileNotFoundError("apt-get install libfaketime")
        paths = [str(self._folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {
            "PYTHONPATH": os.pathsep.join(paths),
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        return ["env", *(f"{key}={value}" for key, value in settings.items())]


def forget(pid: int) -> None:
    """Removes what libfaketime leaves of a process that was killed."""
    for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
        with contextlib.suppress(FileNotFoundError):
            (Path("/dev/shm") / name).unlink()
