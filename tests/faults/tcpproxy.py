"""A line between an operator and a shim that can be cut: a TCP proxy on loopback.

    cut             open connections are reset, new ones are refused
    blackhole       open connections stall, new ones are taken and nothing answers
    lose_replies    as blackhole, but what the client sends on an open connection arrives
    heal            all is well; what stalled goes on where it stopped, as TCP does

What goes through is not looked at, so it may be TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

from tests.faults.loops import LoopThread, Port


class TcpProxy:
    """Before 127.0.0.1:`upstream`. Every method returns when it has taken effect; use as a context.

    accepted: how many connections it has taken so far.
    """

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._port = Port()
        self._loop = LoopThread("tcpproxy")
        self._server: asyncio.Server | None = None
        self.accepted = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._up, self._down = self._loop.call(_gates())
        self.heal()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port.number}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.cut()
        self._loop.close()
        self._port.close()

    def cut(self) -> None:
        self._loop.call(self._set(listening=False, up=True, down=True))

    def blackhole(self) -> None:
        self._loop.call(self._set(listening=True, up=False, down=False))

    def lose_replies(self) -> None:
        self._loop.call(self._set(listening=True, up=True, down=False))

    def heal(self) -> None:
        self._loop.call(self._set(listening=True, up=True, down=True))

    @property
    def connections(self) -> int:
        """Clients that are connected."""
        return len(self._open) // 2

    # In the loop

    async def _set(self, *, listening: bool, up: bool, down: bool) -> None:
        for gate, is_open in ((self._up, up), (self._down, down)):
            (gate.set if is_open else gate.clear)()
        if listening and self._server is None:
            self._server = await asyncio.start_server(self._connected, sock=self._port.socket())
        elif not listening and self._server is not None:
            self._server.close()
            self._server = None
            for writer in self._open:
                writer.transport.abort()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        outer = None
        try:
            await self._up.wait()
            answers, outer = await asyncio.open_connection("127.0.0.1", self._upstream)
            self._open.add(outer)
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, outer, self._up))
                both.create_task(_pump(answers, writer, self._down))
        except* OSError:
            pass  # one side is gone: so is the other, below
        finally:
            for each in (writer, outer):
                if each is not None:
                    self._open.discard(each)
                    each.transport.abort()


async def _gates() -> tuple[asyncio.Event, asyncio.Event]:
    return asyncio.Event(), asyncio.Event()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
    while data := await reader.read(65536):
        await gate.wait()
        writer.write(data)
        await writer.drain()
    await gate.wait()
    with contextlib.suppress(OSError):
        writer.write_eof()
