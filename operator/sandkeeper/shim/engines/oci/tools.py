"""Runs a program to its end, from one of the engine's threads: no shell, no inherited descriptor, clean environment."""

from __future__ import annotations

import os
import select
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

MAX_OUTPUT = 1024 * 1024
"""Bytes. A runtime that prints without end must not cost the shim's memory."""


@dataclass(frozen=True, slots=True)
class Result:
    """status: negative for a signal, as in subprocess; 124 where the time was up."""

    status: int
    output: str

    @property
    def words(self) -> str:
        """The last words of the program, without its log prefix."""
        return clean(self.output)


def run(argv: list[str], seconds: float, *, quiet: bool = False) -> Result:
    """Standard output and error together, the last of it. Raises OSError where the program cannot be run.

    quiet: no output; for a program that leaves a process behind, which would keep it open.
    """
    deadline = time.monotonic() + seconds
    child = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if quiet else subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else subprocess.STDOUT,
        cwd="/",
        env=ENVIRONMENT,
        close_fds=True,
    )
    try:
        output = b"" if child.stdout is None else _last_of(child.stdout.fileno(), deadline)
        child.wait(max(0.0, deadline - time.monotonic()))
    except (TimeoutError, subprocess.TimeoutExpired):
        return Result(124, f"{Path(argv[0]).name} did not end within {seconds:g} s")
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
    return Result(child.returncode, output.decode(errors="replace"))


def _last_of(fd: int, deadline: float) -> bytes:
    """What comes until the end of the stream, at most the last MAX_OUTPUT bytes. Raises TimeoutError."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    kept = bytearray()
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        more = os.read(fd, 65536)
        if not more:
            return bytes(kept[-MAX_OUTPUT:])
        kept += more
        if len(kept) > 2 * MAX_OUTPUT:
            del kept[:-MAX_OUTPUT]
        if time.monotonic() > deadline:
            break
    raise TimeoutError


def clean(text: str, limit: int = 500) -> str:
    """What a runtime said, for people: the last lines, without times and levels."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = "; ".join(_message(line) for line in lines[-3:])
    return said if len(said) <= limit else f"{said[:limit]}…"


def _message(line: str) -> str:
    # runc's and conmon's logs: time="…" level=error msg="…"
    _, marker, rest = line.partition('msg="')
    if marker:
        line = rest.rpartition('"')[0].replace('\\"', '"')
    first, _, after = line.partition(" ")
    # crun's: an ISO time first.
    if len(first) >= 20 and first[4:5] == "-" and "T" in first:
        line = after
    return line.removeprefix("error: ").removeprefix("runc create failed: ")
