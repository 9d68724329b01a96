"""Runs a program to its end, from one of the engine's threads: no shell, no inherited descriptor, clean environment."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


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
    """Standard output and error together. Raises OSError where the program cannot be run.

    quiet: no output; for a program that leaves a process behind, which would keep it open.
    """
    output = subprocess.DEVNULL if quiet else subprocess.PIPE
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.DEVNULL if quiet else subprocess.STDOUT,
            timeout=seconds,
            cwd="/",
            env=ENVIRONMENT,
            close_fds=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Result(124, f"{Path(argv[0]).name} did not end within {seconds:g} s")
    return Result(done.returncode, (done.stdout or b"").decode(errors="replace"))


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
