"""The gRPC server: where it listens, whom it lets in, and how what is refused becomes a code."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sandkeeper.shim.engines.base import Engine, EngineError
from sandkeeper.shim.errors import Refused
from sandkeeper.shim.keeper import Keeper
from sandkeeper.shim.records import Records
from sandkeeper.shim.services import Controller, Finisher, Node
from sandkeeper.shim.settings import ShimSettings
from sandkeeper.wire import controller_pb2, controller_pb2_grpc, node_pb2, node_pb2_grpc
from sandkeeper.wire.tls import require_identity

log = logging.getLogger(__name__)

_MIB = 1024 * 1024
_OPTIONS = (
    ("grpc.max_receive_message_length", 16 * _MIB),
    ("grpc.max_send_message_length", 256 * _MIB),
    # Clients ping to notice a peer that vanished; without traffic too.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    # Two shims on one port would each get half of the calls.
    ("grpc.so_reuseport", 0),
)
_SERVICES = (
    controller_pb2.DESCRIPTOR.services_by_name["Controller"].full_name,
    node_pb2.DESCRIPTOR.services_by_name["Node"].full_name,
)


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in the stubs
    """Around every call of every service: checks the peer, and turns what is raised into a code."""

    def __init__(self, permitted: frozenset[str]) -> None:
        self._permitted = permitted

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return handler  # gRPC answers UNIMPLEMENTED
        if handler.response_streaming:
            name = "stream_stream" if handler.request_streaming else "unary_stream"
            behavior = self._streaming(getattr(handler, name))
        else:
            name = "stream_unary" if handler.request_streaming else "unary_unary"
            behavior = self._single(getattr(handler, name))
        make = getattr(grpc, f"{name}_rpc_method_handler")
        wrapped: grpc.RpcMethodHandler[Any, Any] = make(
            behavior,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return wrapped

    def _single(self, behavior: Any) -> Any:
        @functools.wraps(behavior)
        async def guarded(request: Any, context: Any) -> Any:
            await require_identity(context, self._permitted)
            async with _coded(context):
                answer = behavior(request, context)
                return await answer if asyncio.iscoroutine(answer) else answer

        return guarded

    def _streaming(self, behavior: Any) -> Any:
        @functools.wraps(behavior)
        async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
            await require_identity(context, self._permitted)
            async with _coded(context):
                pieces = behavior(request, context)
                try:
                    async for piece in pieces:
                        yield piece
                finally:
                    await pieces.aclose()

        return guarded


@contextlib.asynccontextmanager
async def _coded(context: Any) -> AsyncIterator[None]:
    try:
        yield
    except Refused as refused:
        await context.abort(refused.code, refused.message)
    except EngineError as error:
        code = grpc.StatusCode.UNAVAILABLE if error.retryable else grpc.StatusCode.FAILED_PRECONDITION
        await context.abort(code, f"{error.reason}: {error.message}")
    except OSError as error:
        log.exception("a call failed")
        await context.abort(grpc.StatusCode.UNAVAILABLE, f"the node cannot: {error.strerror or error}")


class ShimServer:
    """A shim: `start` finds its sandboxes and listens, `stop` lets go of both; the sandboxes run on."""

    def __init__(self, settings: ShimSettings, engine: Engine, records: Records | None = None) -> None:
        self.settings = settings
        self.keeper = Keeper(settings, engine, records)
        self._finish = Finisher()
        self._servers: list[grpc.aio.Server] = []
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
        self.port = 0

    async def start(self) -> None:
        """Raises EngineError, OSError, RuntimeError (an address in use)."""
        await self.keeper.open()
        server = self._make()
        self._listen_locally(server)
        if self.settings.certificate == "files":
            self._listen(server)
        await self._serve(server)
        await self._tell(health_pb2.HealthCheckResponse.SERVING)

    async def listen(self) -> int:
        """Opens the TCP port, where that had to wait for a certificate; returns its number.

        gRPC takes no port for a server that has started: this is a second one. Raises OSError, RuntimeError.
        """
        if self.settings.certificate == "request":
            server = self._make()
            self._listen(server)
            await self._serve(server)
        return self.port

    def _make(self) -> grpc.aio.Server:
        guard = Guard(frozenset(self.settings.allowed_clients))
        server = grpc.aio.server(interceptors=[guard], options=_OPTIONS)
        controller_pb2_grpc.add_ControllerServicer_to_server(Controller(self.keeper, self._finish), server)
        node_pb2_grpc.add_NodeServicer_to_server(Node(self.keeper, self._finish), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        return server

    async def _serve(self, server: grpc.aio.Server) -> None:
        await server.start()
        self._servers.append(server)

    def _listen_locally(self, server: grpc.aio.Server) -> None:
        path = self.settings.socket_path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The socket must never be there with a wider mode, not even for a moment.
        before = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix:{path}")
        finally:
            os.umask(before)
        path.chmod(0o600)

    def _listen(self, server: grpc.aio.Server) -> None:
        tls = self.settings.server_tls
        if self.settings.listen and tls is not None:
            self.port = server.add_secure_port(self.settings.listen, tls.credentials())

    async def stop(self) -> None:
        """Answers what is under way within `stop_grace` seconds, then lets go."""
        await self._tell(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.keeper.journal.close()
        await asyncio.gather(*(server.stop(self.settings.stop_grace) for server in self._servers))
        self._servers.clear()
        await self._finish.drain(self.settings.stop_grace)
        await self.keeper.close()

    async def _tell(self, status: Any) -> None:
        for service in ("", *_SERVICES):
            await self._health.set(service, status)
