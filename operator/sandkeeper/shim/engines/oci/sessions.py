"""Exec: one more process in a container, run by the runtime as our own child."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import termios
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

from sandkeeper.shim.engines.base import EngineError, ExecSession
from sandkeeper.shim.engines.oci import monitor
from sandkeeper.shim.engines.oci.processes import ProcessRef, readable
from sandkeeper.shim.engines.oci.tools import ENVIRONMENT

CHUNK = 64 * 1024
MAX_SIZE = 2**16 - 1  # struct winsize has 16 bits for each
Stream = Literal["stdout", "stderr"]


def spawn(argv: list[str], files: Path, *, tty: bool, stdin: bool, size: tuple[int, int] | None) -> Session:
    """Runs the runtime's `exec`, from one of the engine's threads. Raises EngineError `ExecFailed`.

    files: a folder for this session alone, removed with it.
    """
    ours: list[int] = []
    theirs: list[int] = []
    master = -1
    try:
        if tty:
            master, slave = os.openpty()
            ours.append(master)
            theirs.append(slave)
            if size:
                _set_size(master, *size)
            child_in = child_out = child_err = slave
        else:
            out_read, child_out = os.pipe()
            err_read, child_err = os.pipe()
            ours += [out_read, err_read]
            theirs += [child_out, child_err]
            if stdin:
                child_in, in_write = os.pipe()
                ours.append(in_write)
                theirs.append(child_in)
            else:
                child_in = os.open(os.devnull, os.O_RDONLY)
                theirs.append(child_in)
        child = subprocess.Popen(
            argv,
            stdin=child_in,
            stdout=child_out,
            stderr=child_err,
            cwd="/",
            env=ENVIRONMENT,
            close_fds=True,
            start_new_session=True,
        )
    except OSError as error:
        for fd in ours:
            os.close(fd)
        raise EngineError("ExecFailed", str(error)) from None
    finally:
        for fd in theirs:
            os.close(fd)
    for fd in ours:
        os.set_blocking(fd, False)
    outputs: dict[int, Stream] = {ours[0]: "stdout"}
    if not tty:
        outputs[ours[1]] = "stderr"
    write_fd = master if tty else (ours[2] if stdin else -1)
    return Session(child, outputs, write_fd if stdin else -1, master, files)


def _set_size(fd: int, width: int, height: int) -> None:
    width, height = min(width, MAX_SIZE), min(height, MAX_SIZE)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))


class Session(ExecSession):
    """tty: stdin and stdout are one descriptor, `master`."""

    def __init__(
        self, child: subprocess.Popen[bytes], outputs: dict[int, Stream], stdin: int, master: int, files: Path
    ) -> None:
        self._child = child
        self._outputs = outputs
        self._stdin = stdin
        self._master = master
        self._files = files
        self._pidfd = os.pidfd_open(child.pid)
        self._exit: asyncio.Task[int] | None = None
        self._closed = False

    async def write_stdin(self, data: bytes) -> None:
        view = memoryview(data)
        while view and self._stdin >= 0:
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                await ready(self._stdin, write=True)
            except OSError:  # it reads no more
                return

    async def close_stdin(self) -> None:
        if self._stdin < 0:
            return
        if self._stdin == self._master:
            await self.write_stdin(b"\x04")  # a terminal's end of input
        else:
            os.close(self._stdin)
        self._stdin = -1

    async def resize(self, width: int, height: int) -> None:
        if self._master >= 0 and not self._closed:
            _set_size(self._master, width, height)
            # The runtime is not of the terminal's session: the kernel does not tell it.
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGWINCH)

    async def output(self) -> AsyncIterator[tuple[Stream, bytes]]:
        queue: asyncio.Queue[tuple[Stream, bytes] | None] = asyncio.Queue(16)

        async def pump(fd: int, stream: Stream) -> None:
            try:
                while data := await _read(fd):
                    await queue.put((stream, data))
            finally:
                await queue.put(None)

        pumps = [asyncio.create_task(pump(fd, stream)) for fd, stream in self._outputs.items()]
        try:
            for _ in pumps:
                while (item := await queue.get()) is not None:
                    yield item
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def wait(self) -> int:
        if self._exit is None:
            self._exit = asyncio.create_task(self._reap())
        return await asyncio.shield(self._exit)

    async def _reap(self) -> int:
        fd, self._pidfd = self._pidfd, -1
        await readable(fd)
        status = self._child.wait()
        return status if status >= 0 else 128 - status

    async def kill(self) -> None:
        if self._closed:
            return
        self._closed = True
        inner = ProcessRef.of(monitor.read_pid(self._files / "pid"))
        if self._child.poll() is None:
            if inner is not None:
                inner.send(signal.SIGKILL)
            else:
                self._child.kill()
            try:
                await asyncio.wait_for(self.wait(), 2.0)
            except TimeoutError:
                self._child.kill()
        await self.wait()
        for fd in {*self._outputs, *([self._stdin] if self._stdin >= 0 else [])}:
            os.close(fd)
        for each in (self._files / "process.json", self._files / "pid"):
            each.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._files.rmdir()


async def _read(fd: int) -> bytes:
    """Some bytes; none at the end."""
    while True:
        try:
            return os.read(fd, CHUNK)
        except BlockingIOError:
            await ready(fd, write=False)
        except OSError:  # EIO: the other end of the terminal is closed
            return b""


async def ready(fd: int, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(fd, ready.set)
    try:
        await ready.wait()
    finally:
        remove(fd)
