"""Exec: one more process in a task, its streams through fifos that containerd's shim opens at their other ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from sandkeeper.shim.engines.base import EngineError, ExecSession
from sandkeeper.shim.engines.containerd import tasks, ttrpc
from sandkeeper.shim.engines.containerd.client import SECONDS, CallError, Client, start_error
from sandkeeper.shim.engines.oci.processes import ProcessRef
from sandkeeper.shim.engines.oci.sessions import CHUNK, MAX_SIZE, Stream, ready
from sandkeeper.wire.containerd import tasks_pb2

_NOT_STARTED = 127


def begin(
    client: Client,
    task: str,
    address: ttrpc.Address | None,
    files: Path,
    process: Mapping[str, Any],
    *,
    stdin: bool,
    size: tuple[int, int] | None,
) -> ExecSession:
    """Starts it, from one of the engine's threads. Raises EngineError `ExecFailed`, and CallError where containerd is
    away. What the runtime has against the command is the session's only output.

    files: a folder for this session alone, removed with it.
    """
    tty, exec_id = bool(process["terminal"]), f"exec-{uuid.uuid4().hex}"
    names = ["stdout", *([] if tty else ["stderr"]), *(["stdin"] if stdin else [])]
    fds: dict[str, int] = {}
    try:
        for name in names:
            os.mkfifo(files / name, 0o600)
            # stdin: writing and reading, or it could not be opened before its reader is there.
            mode = os.O_RDWR if name == "stdin" else os.O_RDONLY
            fds[name] = os.open(files / name, mode | os.O_NONBLOCK | os.O_CLOEXEC)
        request = tasks_pb2.ExecProcessRequest(
            container_id=task,
            exec_id=exec_id,
            terminal=tty,
            spec=tasks.process_any(process),
            **{name: str(files / name) for name in names},
        )
        client.call(client.tasks.Exec, request)
        start = tasks_pb2.StartRequest(container_id=task, exec_id=exec_id)
        pid = client.call(client.tasks.Start, start).pid
    except (OSError, CallError) as error:
        for fd in fds.values():
            os.close(fd)
        _forget(client, task, exec_id)
        shutil.rmtree(files, ignore_errors=True)
        if isinstance(error, OSError):
            raise EngineError("ExecFailed", str(error)) from None
        if error.away:
            raise
        return Failed(start_error(error).message)
    session = Session(client, task, exec_id, ProcessRef.of(pid), address, fds, files, tty=tty)
    if tty and size:
        session.set_size(*size)
    return session


def _forget(client: Client, task: str, exec_id: str) -> None:
    with contextlib.suppress(CallError):
        request = tasks_pb2.DeleteProcessRequest(container_id=task, exec_id=exec_id)
        client.call(client.tasks.DeleteProcess, request)


class Failed(ExecSession):
    """A process that could not be started: as a shell tells of it."""

    def __init__(self, words: str) -> None:
        self._words = words

    async def write_stdin(self, data: bytes) -> None:
        pass

    async def close_stdin(self) -> None:
        pass

    async def resize(self, width: int, height: int) -> None:
        pass

    async def output(self) -> AsyncIterator[tuple[Stream, bytes]]:
        yield "stderr", f"{self._words}\n".encode()

    async def wait(self) -> int:
        return _NOT_STARTED

    async def kill(self) -> None:
        pass


class Session(ExecSession):
    """process: None where it has ended already. fds: our ends of its fifos, by stream."""

    def __init__(
        self,
        client: Client,
        task: str,
        exec_id: str,
        process: ProcessRef | None,
        address: ttrpc.Address | None,
        fds: dict[str, int],
        files: Path,
        *,
        tty: bool,
    ) -> None:
        self._client = client
        self._task = task
        self._exec_id = exec_id
        self._process = process
        self._address = address
        self._fds = fds
        self._files = files
        self._tty = tty
        self._exit: asyncio.Task[int] | None = None
        self._closed = False

    async def write_stdin(self, data: bytes) -> None:
        view = memoryview(data)
        while view and "stdin" in self._fds:
            if self._process is None or not self._process.alive():
                return  # its fifo is open on our side alone, and would take what nobody reads
            try:
                view = view[os.write(self._fds["stdin"], view) :]
            except BlockingIOError:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ready(self._fds["stdin"], write=True), 1.0)
            except OSError:
                return

    async def close_stdin(self) -> None:
        if "stdin" not in self._fds:
            return
        if self._tty:
            await self.write_stdin(b"\x04")  # a terminal's end of input
        os.close(self._fds.pop("stdin"))
        if not self._tty:
            # containerd's shim holds it open as well, for whoever may come to write.
            request = tasks_pb2.CloseIORequest(container_id=self._task, exec_id=self._exec_id, stdin=True)
            with contextlib.suppress(CallError):  # it has ended
                await asyncio.to_thread(self._client.call, self._client.tasks.CloseIO, request)

    async def resize(self, width: int, height: int) -> None:
        if self._tty and not self._closed:
            await asyncio.to_thread(self.set_size, width, height)

    def set_size(self, width: int, height: int) -> None:
        """Blocking."""
        request = tasks_pb2.ResizePtyRequest(
            container_id=self._task,
            exec_id=self._exec_id,
            width=min(width, MAX_SIZE),
            height=min(height, MAX_SIZE),
        )
        with contextlib.suppress(CallError):  # it has ended
            self._client.call(self._client.tasks.ResizePty, request)

    async def output(self) -> AsyncIterator[tuple[Stream, bytes]]:
        queue: asyncio.Queue[tuple[Stream, bytes] | None] = asyncio.Queue(16)

        async def pump(fd: int, stream: Stream) -> None:
            try:
                while data := await _read(fd):
                    await queue.put((stream, data))
            finally:
                await queue.put(None)

        names: tuple[Stream, ...] = ("stdout", "stderr")
        pumps = [asyncio.create_task(pump(self._fds[name], name)) for name in names if name in self._fds]
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
            self._exit = asyncio.create_task(self._status())
        return await asyncio.shield(self._exit)

    async def _status(self) -> int:
        if self._process is not None:
            await self._process.ended()
        return await asyncio.to_thread(self._ask)

    def _ask(self) -> int:
        """containerd, or while it is away its shim."""
        try:
            request = tasks_pb2.WaitRequest(container_id=self._task, exec_id=self._exec_id)
            return self._client.call(self._client.tasks.Wait, request, seconds=SECONDS).exit_status
        except CallError:
            with contextlib.suppress(ttrpc.ShimError):
                if self._address is not None:
                    return ttrpc.wait(self._address, self._task, SECONDS, self._exec_id)[0]
        return 128 + signal.SIGKILL  # the container has been taken away, and it with it

    async def kill(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._process is not None:
            self._process.send(signal.SIGKILL)
        await self.wait()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        await asyncio.to_thread(self._free)

    def _free(self) -> None:
        _forget(self._client, self._task, self._exec_id)
        shutil.rmtree(self._files, ignore_errors=True)


async def _read(fd: int) -> bytes:
    """Some bytes; none at the end. A fifo that nobody has opened for writing yet reads as if at its end: only when
    there is something, or when who wrote has gone, is it ready."""
    while True:
        await ready(fd, write=False)
        try:
            return os.read(fd, CHUNK)
        except BlockingIOError:
            continue
        except OSError:
            return b""
