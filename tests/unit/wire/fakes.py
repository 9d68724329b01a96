"""A shim in this process: answers as the test scripts it, and keeps what arrived."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from sandkeeper.wire import controller_pb2_grpc, node_pb2_grpc
from sandkeeper.wire.tls import ServerTLS, require_identity

Context = Any


class FakeShim:
    """`unary["Start"]` and `streams["Watch"]` are the handlers; one that is not set answers UNIMPLEMENTED.

    calls: (method, request, metadata, seconds that the caller gives it or None), in order of arrival.
    """

    def __init__(self) -> None:
        self.unary: dict[str, Callable[[Any, Context], Awaitable[Any]]] = {}
        self.streams: dict[str, Callable[[Any, Context], AsyncIterator[Any]]] = {}
        self.calls: list[tuple[str, Any, dict[str, str], float | None]] = []
        self.permitted: frozenset[str] | None = None

    def answers(self, method: str, *answers: Any) -> None:
        """One answer for each call, the last one for all that follow; a StatusCode fails the call."""
        rest = list(answers)

        async def handler(_request: Any, context: Context) -> Any:
            answer = rest.pop(0) if len(rest) > 1 else rest[0]
            if isinstance(answer, grpc.StatusCode):
                await context.abort(answer, f"{method} said no")
            return answer

        self.unary[method] = handler

    def count(self, method: str) -> int:
        return sum(called == method for called, *_ in self.calls)

    def servicer(self, base: type) -> Any:
        """A servicer of `base` whose methods look into `unary` and `streams` when they are called."""
        names = [name for name in vars(base) if not name.startswith("_")]
        return type("Servicer", (base,), {name: self._method(name) for name in names})()

    def _method(self, name: str) -> Any:
        async def note(request: Any, context: Context) -> None:
            if self.permitted is not None:
                await require_identity(context, self.permitted)
            metadata = {key: str(value) for key, value in context.invocation_metadata()}
            self.calls.append((name, request, metadata, context.time_remaining()))

        async def unary(_self: Any, request: Any, context: Context) -> Any:
            await note(request, context)
            if name not in self.unary:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not scripted")
            return await self.unary[name](request, context)

        async def stream(_self: Any, request: Any, context: Context) -> AsyncIterator[Any]:
            await note(request, context)
            if name not in self.streams:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not scripted")
            async for piece in self.streams[name](request, context):
                yield piece

        return stream if name in {"Watch", "Logs", "Exec"} else unary


def make_server(shim: FakeShim) -> Any:
    server = grpc.aio.server()
    controller_pb2_grpc.add_ControllerServicer_to_server(
        shim.servicer(controller_pb2_grpc.ControllerServicer), server
    )
    node_pb2_grpc.add_NodeServicer_to_server(shim.servicer(node_pb2_grpc.NodeServicer), server)
    return server


@contextlib.asynccontextmanager
async def on_socket(shim: FakeShim, path: Path) -> AsyncIterator[str]:
    """Serves `shim` on a unix socket; yields the address."""
    server = make_server(shim)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        yield f"unix:{path}"
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def on_tls(shim: FakeShim, tls: ServerTLS, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """Serves `shim` on a loopback port; yields host:port."""
    server = make_server(shim)
    port = server.add_secure_port(address, tls.credentials())
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
