"""Exec without a process: `cat` and what `scripts` knows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Literal

from sandkeeper.shim.engines.base import ExecSession, ProcessExit
from sandkeeper.shim.engines.simulated import scripts

Stream = Literal["stdout", "stderr"]
_NOT_FOUND = 127
_KILLED = 137


class Session(ExecSession):
    """container: done when the container has ended, and the session's process with it."""

    def __init__(
        self, command: Sequence[str], container: asyncio.Future[ProcessExit], *, stdin: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        self._output: asyncio.Queue[tuple[Stream, bytes] | None] = asyncio.Queue()
        self._status: asyncio.Future[int] = loop.create_future()
        self._timers: list[asyncio.TimerHandle] = []
        self._container = container
        self._echoes = list(command) == ["cat"]
        container.add_done_callback(self._container_ended)
        if not scripts.startable(command):
            self._write("stderr", f"exec: {command[0]!r}: executable file not found in $PATH\n".encode())
            self._end(_NOT_FOUND)
        elif self._echoes:
            if not stdin:
                self._end(0)
        else:
            script = scripts.read(command)
            for line in script.lines:
                data = f"{line.text}\n".encode()
                self._timers.append(loop.call_later(line.after, self._write, line.stream, data))
            if script.seconds is not None:
                self._timers.append(loop.call_later(script.seconds, self._end, script.status))

    async def write_stdin(self, data: bytes) -> None:
        if self._echoes and data:
            self._write("stdout", data)

    async def close_stdin(self) -> None:
        if self._echoes:
            self._end(0)

    async def resize(self, width: int, height: int) -> None:
        """There is no terminal."""

    async def output(self) -> AsyncIterator[tuple[Stream, bytes]]:
        while (item := await self._output.get()) is not None:
            yield item
        self._output.put_nowait(None)

    async def wait(self) -> int:
        return await asyncio.shield(self._status)

    async def kill(self) -> None:
        self._end(_KILLED)

    def _write(self, stream: Stream, data: bytes) -> None:
        if not self._status.done():
            self._output.put_nowait((stream, data))

    def _container_ended(self, _: asyncio.Future[ProcessExit]) -> None:
        self._end(_KILLED)

    def _end(self, status: int) -> None:
        if self._status.done():
            return
        self._status.set_result(status)
        self._output.put_nowait(None)
        self._container.remove_done_callback(self._container_ended)
        for timer in self._timers:
            timer.cancel()
