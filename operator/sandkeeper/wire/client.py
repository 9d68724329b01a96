"""The one client of a shim: typed, asynchronous, one channel per node.

Every call has a deadline. A call that only reads is repeated when the server could not be reached; a call that
changes something never is: whether to repeat it, where and with which id is the caller's decision, and it needs
to know that the effect may have happened (`ShimError.ambiguous`).
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from datetime import datetime
from typing import Any, Literal, Self, TypeVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message

from sandkeeper.wire import controller_pb2, controller_pb2_grpc, node_pb2, node_pb2_grpc
from sandkeeper.wire.errors import Internal, ShimError, Unavailable, from_rpc_error
from sandkeeper.wire.ids import OwnerKey
from sandkeeper.wire.times import to_datetime
from sandkeeper.wire.tls import ClientTLS

SANDBOXER = "sandkeeper"

# Seconds. A read answers from memory; Create and Start wait for disk and runtime; Stop and Shutdown for the
# grace period on top.
READ_DEADLINE = 5.0
LIST_DEADLINE = 20.0
CHANGE_DEADLINE = 30.0
STOP_MARGIN = 30.0

READ_ATTEMPTS = 3
FIRST_BACKOFF = 0.128
MAX_BACKOFF = 4.096
"""The waits between attempts, as containerd's own proxy has them for Wait (containerd PR 10201)."""

_MIB = 1024 * 1024
OPTIONS: tuple[tuple[str, int | str], ...] = (
    # A List of 10,000 records with 16 containers each.
    ("grpc.max_receive_message_length", 256 * _MIB),
    ("grpc.max_send_message_length", 16 * _MIB),
    # A peer that vanished is noticed without traffic.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A node that comes back is met soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)

T = TypeVar("T")


def open_channel(address: str, *, tls: ClientTLS | None = None, server_name: str = "") -> grpc.aio.Channel:
    """A channel to `unix:/path` (no TLS: the socket's mode guards it) or `host:port` (TLS only).

    server_name: the name that the server's certificate must carry; default: the host.
    Raises ValueError for TCP without TLS, OSError for TLS files that cannot be read.
    """
    if address.startswith("unix:"):
        return grpc.aio.insecure_channel(address, options=OPTIONS)
    if tls is None:
        raise ValueError(f"address {address!r}: a shim on TCP is called with TLS only (or use unix:/path)")
    options = OPTIONS
    if server_name:
        options = (*OPTIONS, ("grpc.ssl_target_name_override", server_name))
    return grpc.aio.secure_channel(address, tls.credentials(), options=options)


def _now(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as result:
        value: T = result.value
        return value
    coroutine.close()
    raise RuntimeError("the coroutine would wait")


def _unpacked(packed: any_pb2.Any, message: Message) -> bool:
    """Whether it is such a message, whole."""
    try:
        return bool(packed.Unpack(message))
    except DecodeError:
        return False


class ShimClient:
    """Calls one shim, or any server of containerd's sandbox Controller. Use as a context, or `close` it.

    Every method raises a ShimError (sandkeeper.wire.errors). Times are seconds. Where the TLS files are replaced,
    the next connection is made with the new ones.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: ClientTLS | None = None,
        server_name: str = "",
        sandboxer: str = SANDBOXER,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """metadata: sent with every call (containerd's own socket wants `containerd-namespace`)."""
        self.address = address
        self._sandboxer = sandboxer
        self._metadata = metadata
        self._tls, self._server_name = tls, server_name
        self._closed = False
        self._channels: builtins.list[grpc.aio.Channel] = []
        self._connect()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the channel and every call on it."""
        self._closed = True
        for channel in self._channels:
            await channel.close(None)

    # containerd.services.sandbox.v1.Controller

    async def create(
        self, owner: OwnerKey, config: node_pb2.SandboxConfig, /, *, timeout: float = CHANGE_DEADLINE
    ) -> str:
        """Create: the sandbox is recorded and being prepared. Repeatable. Returns its id."""
        options = any_pb2.Any()
        options.Pack(config)
        request = controller_pb2.ControllerCreateRequest(
            sandbox_id=owner.sandbox_id, options=options, sandboxer=self._sandboxer
        )
        return str((await self._change(self._controller.Create, request, owner, timeout)).sandbox_id)

    async def start(self, owner: OwnerKey, /, *, timeout: float = CHANGE_DEADLINE) -> int:
        """Start: returns the sandbox process's pid. Unavailable while it is still being prepared."""
        request = controller_pb2.ControllerStartRequest(
            sandbox_id=owner.sandbox_id, sandboxer=self._sandboxer
        )
        return int((await self._change(self._controller.Start, request, owner, timeout)).pid)

    async def stop(self, owner: OwnerKey, grace_seconds: int, /, *, timeout: float | None = None) -> None:
        """Stop: SIGTERM, after `grace_seconds` SIGKILL. Returns when all have ended. Repeatable."""
        request = controller_pb2.ControllerStopRequest(
            sandbox_id=owner.sandbox_id, timeout_secs=grace_seconds, sandboxer=self._sandboxer
        )
        deadline = grace_seconds + STOP_MARGIN if timeout is None else timeout
        await self._change(self._controller.Stop, request, owner, deadline)

    async def shutdown(self, owner: OwnerKey, /, *, timeout: float = CHANGE_DEADLINE) -> None:
        """Shutdown: nothing of the sandbox is left, its exit neither. NotFound proves that it is gone already."""
        request = controller_pb2.ControllerShutdownRequest(
            sandbox_id=owner.sandbox_id, sandboxer=self._sandboxer
        )
        await self._change(self._controller.Shutdown, request, owner, timeout)

    async def wait(self, owner: OwnerKey, /) -> tuple[int, datetime | None]:
        """Wait: (exit status, time of the end), once the sandbox has ended; no deadline.

        Repeated for as long as the server cannot be reached, as containerd's proxy does.
        """
        request = controller_pb2.ControllerWaitRequest(sandbox_id=owner.sandbox_id, sandboxer=self._sandboxer)
        response = await self._read(
            lambda: self._controller.Wait(request, metadata=self._with(owner)), attempts=None
        )
        return int(response.exit_status), to_datetime(response.exited_at)

    async def status(self, owner: OwnerKey, /, *, timeout: float = READ_DEADLINE) -> node_pb2.SandboxRecord:
        """Status, as the shim's whole record. Unimplemented where the server is no Sandkeeper shim."""
        response = await self.status_response(owner, timeout=timeout)
        record = node_pb2.SandboxRecord()
        if not _unpacked(response.extra, record):
            raise Internal("Status came without a sandkeeper.shim.v1.SandboxRecord in `extra`")
        return record

    async def status_response(
        self, owner: OwnerKey, /, *, verbose: bool = False, timeout: float = READ_DEADLINE
    ) -> controller_pb2.ControllerStatusResponse:
        """Status as containerd has it."""
        request = controller_pb2.ControllerStatusRequest(
            sandbox_id=owner.sandbox_id, verbose=verbose, sandboxer=self._sandboxer
        )
        answer: controller_pb2.ControllerStatusResponse = await self._read(
            lambda: self._controller.Status(request, timeout=timeout, metadata=self._with(owner))
        )
        return answer

    async def metrics(self, owner: OwnerKey, /, *, timeout: float = READ_DEADLINE) -> node_pb2.Usage:
        """Metrics: a fresh sample of what the sandbox uses."""
        request = controller_pb2.ControllerMetricsRequest(
            sandbox_id=owner.sandbox_id, sandboxer=self._sandboxer
        )
        response = await self._read(
            lambda: self._controller.Metrics(request, timeout=timeout, metadata=self._with(owner))
        )
        usage = node_pb2.Usage()
        if not _unpacked(response.metrics.data, usage):
            came = response.metrics.data.type_url
            raise Internal(f"Metrics came with {came!r} in `data`, not a sandkeeper.shim.v1.Usage")
        return usage

    # sandkeeper.shim.v1.Node

    async def info(self, *, timeout: float = READ_DEADLINE) -> node_pb2.InfoResponse:
        """What the node is, offers and has room for."""
        request = node_pb2.InfoRequest()
        answer: node_pb2.InfoResponse = await self._read(
            lambda: self._node.Info(request, timeout=timeout, metadata=self._metadata)
        )
        return answer

    async def list(self, *, timeout: float = LIST_DEADLINE) -> node_pb2.ListResponse:
        """Every sandbox that the shim has a record of, and where `watch` goes on from."""
        request = node_pb2.ListRequest()
        answer: node_pb2.ListResponse = await self._read(
            lambda: self._node.List(request, timeout=timeout, metadata=self._metadata)
        )
        return answer

    async def watch(self, epoch: str, after: int) -> AsyncIterator[node_pb2.WatchResponse]:
        """Changes after (epoch, sequence), without end. OutOfRange: List again."""
        request = node_pb2.WatchRequest(epoch=epoch, after_sequence=after)
        with self._stream(self._node.Watch, request, self._metadata) as changes:
            async for change in changes:
                yield change

    async def pause(self, owner: OwnerKey, /, *, timeout: float = CHANGE_DEADLINE) -> None:
        """Freezes all processes. Repeatable."""
        request = node_pb2.PauseRequest(sandbox_id=owner.sandbox_id)
        await self._change(self._node.Pause, request, owner, timeout)

    async def resume(self, owner: OwnerKey, /, *, timeout: float = CHANGE_DEADLINE) -> None:
        """Thaws them. Repeatable."""
        request = node_pb2.ResumeRequest(sandbox_id=owner.sandbox_id)
        await self._change(self._node.Resume, request, owner, timeout)

    async def logs(
        self,
        owner: OwnerKey,
        container: str = "",
        *,
        follow: bool = False,
        tail_lines: int = 0,
        timestamps: bool = False,
    ) -> AsyncIterator[bytes]:
        """A container's log in pieces; with `follow` until the sandbox has ended for good."""
        request = node_pb2.LogsRequest(
            sandbox_id=owner.sandbox_id,
            container=container,
            follow=follow,
            tail_lines=tail_lines,
            timestamps=timestamps,
        )
        with self._stream(self._node.Logs, request, self._with(owner)) as pieces:
            async for piece in pieces:
                yield piece.data

    async def exec(
        self,
        owner: OwnerKey,
        command: builtins.list[str],  # `list` is a method here
        *,
        container: str = "",
        tty: bool = False,
        stdin: AsyncIterator[bytes] | None = None,
        size: tuple[int, int] | None = None,
        resizes: AsyncIterator[tuple[int, int]] | None = None,
    ) -> AsyncIterator[tuple[Literal["stdout", "stderr"], bytes] | int]:
        """Runs one more process in a container: yields its output, and last its exit status.

        stdin: what the process reads, its end included; None closes it at once. size, resizes: columns and lines
        of the terminal (`tty`).
        """
        start = node_pb2.ExecStart(
            sandbox_id=owner.sandbox_id,
            container=container,
            command=command,
            tty=tty,
            stdin=stdin is not None,
        )
        if size is not None:
            start.size.width, start.size.height = size
        requests: asyncio.Queue[node_pb2.ExecRequest | None] = asyncio.Queue(maxsize=16)
        await requests.put(node_pb2.ExecRequest(start=start))

        async def feed_stdin() -> None:
            try:
                if stdin is not None:
                    async for data in stdin:
                        await requests.put(node_pb2.ExecRequest(stdin=data))
            except Exception:
                # The process must not wait for more; the caller gets the error after its output.
                await requests.put(node_pb2.ExecRequest(stdin_closed=True))
                raise
            await requests.put(node_pb2.ExecRequest(stdin_closed=True))

        async def feed_sizes() -> None:
            if resizes is not None:
                async for width, height in resizes:
                    resize = node_pb2.TerminalSize(width=width, height=height)
                    await requests.put(node_pb2.ExecRequest(resize=resize))

        async def sent() -> AsyncIterator[node_pb2.ExecRequest]:
            while (request := await requests.get()) is not None:
                yield request

        feeders = [asyncio.create_task(feed_stdin()), asyncio.create_task(feed_sizes())]
        try:
            with self._stream(self._node.Exec, sent(), self._with(owner)) as responses:
                async for response in responses:
                    match response.WhichOneof("output"):
                        case "stdout":
                            yield "stdout", response.stdout
                        case "stderr":
                            yield "stderr", response.stderr
                        case "exit_status":
                            yield response.exit_status
            for feeder in feeders:
                if feeder.done():
                    feeder.result()
        finally:
            for feeder in feeders:
                feeder.cancel()
            await asyncio.gather(*feeders, return_exceptions=True)
            with contextlib.suppress(asyncio.QueueFull):
                requests.put_nowait(None)

    # How calls are made

    def _connect(self) -> None:
        stamp = self._tls.files.stamp() if self._tls else ()
        channel = open_channel(self.address, tls=self._tls, server_name=self._server_name)
        self._stamp = stamp
        self._channels.append(channel)
        # The generated async stubs' types differ from the classes that serve at run time.
        self._controller: Any = controller_pb2_grpc.ControllerStub(channel)
        self._node: Any = node_pb2_grpc.NodeStub(channel)

    def _renew(self) -> None:
        """A new channel where the TLS files are others than the channel's, which keeps what it was made with.

        The old one stays for the calls that still run on it: closing it would cancel them.
        """
        with contextlib.suppress(OSError):  # in mid-replacement: the next failure looks again
            if self._tls is not None and not self._closed and self._tls.files.stamp() != self._stamp:
                self._connect()

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            mapped = from_rpc_error(error)
            if mapped.ambiguous:
                self._renew()
            raise mapped from error
        except grpc.aio.UsageError as error:
            raise Unavailable(f"the channel is closed: {error}") from error
        except asyncio.CancelledError as error:
            # A closed channel cancels its calls, which is no wish to cancel the task that waits for one.
            task = asyncio.current_task()
            if not self._closed or task is None or task.cancelling():
                raise
            raise Unavailable("the channel was closed during the call") from error

    @contextlib.contextmanager
    def _stream(
        self, method: Any, request: Any, metadata: tuple[tuple[str, str], ...]
    ) -> Iterator[AsyncIterator[Any]]:
        with self._mapped():
            call = method(request, metadata=metadata)
            statuses: builtins.list[tuple[grpc.StatusCode, str]] = []
            call.add_done_callback(lambda call: statuses.append((_now(call.code()), _now(call.details()))))
            try:
                yield call
            except grpc.aio.AioRpcError as error:
                # A request that is written as the server ends the call fails, and grpc puts INTERNAL over the
                # status that it already has (grpc issue 36066). The first one is the server's.
                code, details = statuses[0] if statuses else (error.code(), error.details())
                if code is not grpc.StatusCode.OK:
                    none = grpc.aio.Metadata()
                    raise grpc.aio.AioRpcError(code, none, none, details, None) from error
            finally:
                call.cancel()  # or the server goes on for a reader that has left

    def _with(self, owner: OwnerKey) -> tuple[tuple[str, str], ...]:
        return (*self._metadata, *owner.metadata())

    async def _change(self, method: Any, request: Any, owner: OwnerKey, timeout: float) -> Any:
        with self._mapped():
            return await method(request, timeout=timeout, metadata=self._with(owner))

    async def _read(self, call: Callable[[], Awaitable[T]], *, attempts: int | None = READ_ATTEMPTS) -> T:
        """attempts: None for as many as it takes."""
        backoff, made = FIRST_BACKOFF, 0
        while True:
            try:
                with self._mapped():
                    return await call()
            except Unavailable:
                made += 1
                if self._closed or (attempts is not None and made >= attempts):
                    raise
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, MAX_BACKOFF)


__all__ = ["ShimClient", "ShimError", "open_channel"]
