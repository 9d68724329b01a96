"""Container logs as conmon writes them: one line per write, `TIME STREAM TAG TEXT` (Kubernetes' CRI format).

TAG `F` ends a line of the program, `P` is a part of one. conmon starts a new
file when the bound is reached; there is one file per attempt.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from sandkeeper.shim.engines.oci.folders import ContainerFolder

_POLL_SECONDS = 0.1
_CHUNK = 64 * 1024


class Parser:
    """Turns a log file's bytes into the program's output, piece by piece."""

    def __init__(self, *, timestamps: bool) -> None:
        self._timestamps = timestamps
        self._rest = b""
        self._inside = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yields one piece per log line; a piece ends with a line break where the program's line does."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            fields = line.split(b" ", 3)
            if len(fields) < 3 or fields[2] not in (b"F", b"P"):
                continue  # not a whole record: the file was cut here
            text = fields[3] if len(fields) == 4 else b""
            if self._timestamps and not self._inside:
                text = fields[0] + b" " + text
            self._inside = fields[2] == b"P"
            yield text if self._inside else text + b"\n"


def last_lines(pieces: Iterator[bytes], count: int) -> list[bytes]:
    """The last `count` whole lines."""
    lines: deque[bytes] = deque(maxlen=count)
    part = b""
    for piece in pieces:
        part += piece
        if part.endswith(b"\n"):
            lines.append(part)
            part = b""
    if part:
        lines.append(part)
    return list(lines)


class _File:
    """A log file that is read on, also after conmon put a new one in its place."""

    def __init__(self, path: Path, *, timestamps: bool) -> None:
        self._path = path
        self._timestamps = timestamps
        self._fd = -1
        self._inode = 0
        self._parser = Parser(timestamps=timestamps)

    def read(self) -> list[bytes]:
        """What is new."""
        pieces = self._drain()
        try:
            inode = self._path.stat().st_ino
        except OSError:
            return pieces
        if inode != self._inode:
            pieces += self._drain()
            self.close()
            try:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                return pieces
            self._inode = os.fstat(self._fd).st_ino
            self._parser = Parser(timestamps=self._timestamps)
            pieces += self._drain()
        return pieces

    def _drain(self) -> list[bytes]:
        pieces: list[bytes] = []
        while self._fd >= 0:
            while data := os.read(self._fd, _CHUNK):
                pieces += self._parser.feed(data)
            if os.fstat(self._fd).st_size >= os.lseek(self._fd, 0, os.SEEK_CUR):
                break
            os.lseek(self._fd, 0, os.SEEK_SET)  # truncated in place
            self._parser = Parser(timestamps=self._timestamps)
        return pieces

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


async def stream(
    folder: ContainerFolder, *, follow: bool, tail_lines: int, timestamps: bool, ended: Callable[[], bool]
) -> AsyncIterator[bytes]:
    """The output over all attempts on disk; with `follow` until `ended` says so and all is read."""
    files: dict[int, _File] = {}
    first = True
    try:
        while True:
            over = ended()
            pieces: list[bytes] = []
            for attempt in folder.attempts():
                file = files.setdefault(attempt.attempt, _File(attempt.log, timestamps=timestamps))
                pieces += file.read()
            if first and tail_lines:
                pieces = last_lines(iter(pieces), tail_lines)
            first = False
            if pieces:
                yield b"".join(pieces)
            if not follow or over:
                return
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        for file in files.values():
            file.close()
