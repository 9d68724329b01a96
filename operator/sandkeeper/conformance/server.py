"""A server under check: how it is reached, what it can do, and what a check does with it."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import grpc

from sandkeeper.conformance.observed import Absent, Calls, Observed, explain, shorten
from sandkeeper.wire import (
    controller_pb2,
    controller_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    store_pb2,
    store_pb2_grpc,
    types_pb2,
)
from sandkeeper.wire.client import SANDBOXER, ShimClient, open_channel
from sandkeeper.wire.errors import ShimError
from sandkeeper.wire.ids import OwnerKey
from sandkeeper.wire.tls import ClientTLS, TLSFiles

PATIENCE = 30.0
"""Seconds that anything may take that must happen."""
MOMENT = 0.3
"""Seconds for which something is watched that must not happen."""

CONTROLLER_CALLS = ("Start", "Stop", "Wait", "Status", "Metrics", "Update", "Shutdown")
FEATURES = {"Pause": "Pause", "Resume": "Pause", "Logs": "Logs", "Exec": "Exec"}
"""Node's calls that are about one sandbox, and the feature of Info that offers each."""

NAMESPACE = "containerd-namespace"
"""The metadata that names containerd's namespace."""

CUT_OFF = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
"""How a call ends that had no time to be answered; a server in between may be the one that ends it."""

RUNTIME = "io.containerd.runc.v2"
"""containerd wants one of every sandbox; a sandboxer may pass it over."""

Metadata = tuple[tuple[str, str], ...]


class Host(Protocol):
    """The process of a server that may be killed and started again."""

    def kill(self) -> None:
        """As kill -9 does; returns when it has ended, or has ended already."""

    def launch(self, failpoints: Mapping[str, str] = ...) -> None:
        """Starts it again and returns at once. failpoints: engine method -> what goes wrong."""

    async def ready(self) -> None:
        """Returns when it answers. Raises AssertionError where it does not."""


@dataclass(frozen=True, slots=True)
class Clients:
    """Certificates to call a server on TCP with. permitted, strangers: of the server's CA, with and without a name
    that may call. foreign: of another CA, with that name."""

    address: str
    server_name: str
    permitted: tuple[TLSFiles, ...]
    strangers: tuple[TLSFiles, ...]
    foreign: TLSFiles


@dataclass(frozen=True, slots=True)
class Images:
    """present: has `sh` and is on the node, or comes soon. absent: cannot be had for now. fetched: returns an image
    that is not on the node but comes. awaited: returns one that does not come, and what makes it come."""

    present: str
    absent: tuple[str, ...] = ()
    fetched: Callable[[], str] | None = None
    awaited: Callable[[], tuple[str, Callable[[], None]]] | None = None


@dataclass(frozen=True, slots=True)
class Containerd:
    """A containerd between us and the server: namespace is that of the calls, sandboxer the server's name there."""

    namespace: str
    sandboxer: str


def namespaces(first: str) -> tuple[str, str]:
    """It, and another that the checks use beside it."""
    return first, f"{first}-other"


class _Client(ShimClient):
    """The operator's client, its calls noted."""

    def __init__(self, server: Server) -> None:
        self._server = server
        between = server.between
        super().__init__(
            server.address,
            tls=server.tls,
            server_name=server.server_name,
            sandboxer=between.sandboxer if between else SANDBOXER,
            metadata=server.metadata,
        )

    def _connect(self) -> None:
        super()._connect()
        self._controller = Observed(self._controller, self._server.calls)
        self._node = Observed(self._node, self._server.calls) if self._server.has_node else _NO_NODE


_NO_NODE = Absent("sandkeeper.shim.v1.Node")


@dataclass
class Server:
    """Entered as a context it is connected; on leaving, what the check made is shut down.

    no_containers: why it runs no containers of ours, where it does not. has_node: whether it has the Node service.
    processes: whether its pids are those of real processes on this machine. leftovers: finds what its sandboxes have
    on the machine, a line each; those of processes begin with `process `. restart_backoff: its first wait of
    restartPolicy, if known.
    """

    address: str
    images: Images
    no_containers: str = ""
    has_node: bool = True
    processes: bool = False
    between: Containerd | None = None
    tls: ClientTLS | None = None
    server_name: str = ""
    socket: Path | None = None
    host: Host | None = None
    clients: Clients | None = None
    leftovers: Callable[[], list[str]] | None = None
    restart_backoff: float = 0.0
    calls: Calls = field(default_factory=Calls)
    _made: list[tuple[str, Metadata]] = field(default_factory=list)
    _closing: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    async def __aenter__(self) -> Self:
        self._connect()
        return self

    @property
    def metadata(self) -> Metadata:
        """What every call carries."""
        return ((NAMESPACE, self.between.namespace),) if self.between else ()

    @property
    def namespaces(self) -> tuple[str, str]:
        """Two of containerd's that are the checks' own."""
        return namespaces(self.between.namespace if self.between else "conformance")

    def _connect(self) -> None:
        self.channel = open_channel(self.address, tls=self.tls, server_name=self.server_name)
        self.controller: Any = Observed(controller_pb2_grpc.ControllerStub(self.channel), self.calls)
        self.node: Any = Observed(node_pb2_grpc.NodeStub(self.channel), self.calls)
        if not self.has_node:
            self.node = _NO_NODE
        self.store: Any = store_pb2_grpc.StoreStub(self.channel)
        self.client = _Client(self)
        self._closing.push_async_callback(self.channel.close, None)
        self._closing.push_async_callback(self.client.close)

    async def __aexit__(self, *_: object) -> None:
        async with self._closing, asyncio.timeout(2 * PATIENCE):
            for sandbox_id, metadata in self._made:
                await self._remove(sandbox_id, metadata)

    async def _remove(self, sandbox_id: str, metadata: Metadata) -> None:
        succeeded = 0
        while succeeded < 2:  # there are servers that never say NOT_FOUND
            try:
                await self.call("Shutdown", sandbox_id, metadata)
                succeeded += 1
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
                    break
            await asyncio.sleep(0.01)
        if self.between:
            request = store_pb2.StoreDeleteRequest(sandbox_id=sandbox_id)
            await code_of(self.store.Delete(request, metadata=self._with(metadata), timeout=PATIENCE))

    # Calls

    async def call(
        self,
        method: str,
        sandbox_id: str,
        caller: OwnerKey | Metadata = (),
        *,
        timeout: float = PATIENCE,
        **fields: Any,
    ) -> Any:
        """Any call about one sandbox, with any metadata; streams as the list of their messages.

        Raises grpc.aio.AioRpcError.
        """
        metadata = self._with(caller)
        if method == "Logs":
            request = node_pb2.LogsRequest(sandbox_id=sandbox_id, **fields)
            return [each async for each in self.node.Logs(request, metadata=metadata, timeout=timeout)]
        if method == "Exec":
            start = node_pb2.ExecStart(**{"sandbox_id": sandbox_id, "command": ["true"], **fields})
            return await self._exec(start, metadata, timeout)
        service = controller_pb2 if method in CONTROLLER_CALLS else node_pb2
        prefix = "Controller" if method in CONTROLLER_CALLS else ""
        if prefix and self.between:
            fields = {"sandboxer": self.between.sandboxer, **fields}
            if method == "Update":
                # containerd refuses one without a sandbox, and 2.3.7 ends by one without a runtime.
                fields = {"sandbox": _sandbox(sandbox_id, self.between), **fields}
        request = getattr(service, f"{prefix}{method}Request")(sandbox_id=sandbox_id, **fields)
        stub = getattr(self.controller if prefix else self.node, method)
        return await stub(request, metadata=metadata, timeout=timeout)

    async def _exec(self, start: node_pb2.ExecStart, metadata: Metadata, timeout: float) -> list[Any]:
        over = asyncio.Event()

        async def requests() -> AsyncIterator[node_pb2.ExecRequest]:
            yield node_pb2.ExecRequest(start=start)
            await over.wait()  # a write while the server ends the call would hide its status

        try:
            return [each async for each in self.node.Exec(requests(), metadata=metadata, timeout=timeout)]
        finally:
            over.set()

    async def create(
        self, sandbox_id: str, caller: OwnerKey | Metadata = (), *, timeout: float = PATIENCE, **fields: Any
    ) -> controller_pb2.ControllerCreateResponse:
        """Create with any fields and metadata. Raises grpc.aio.AioRpcError."""
        metadata = self._with(caller)
        # It is shut down as nobody's: no owner is fenced out of that.
        self._made.append((sandbox_id, tuple(each for each in metadata if each[0] == NAMESPACE)))
        if self.between:
            fields = {**await self._stored(sandbox_id, self.between, metadata), **fields}
        request = controller_pb2.ControllerCreateRequest(sandbox_id=sandbox_id, **fields)
        answer: controller_pb2.ControllerCreateResponse = await self.controller.Create(
            request, metadata=metadata, timeout=timeout
        )
        return answer

    async def _stored(self, sandbox_id: str, between: Containerd, metadata: Metadata) -> dict[str, Any]:
        """Puts a sandbox into containerd's Store, for its Controller knows no other; returns the fields of Create
        that say so. Raises grpc.aio.AioRpcError."""
        sandbox = _sandbox(sandbox_id, between)
        request = store_pb2.StoreCreateRequest(sandbox=sandbox)
        try:
            await self.store.Create(request, metadata=metadata, timeout=PATIENCE)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.ALREADY_EXISTS:
                raise
        return {"sandbox": sandbox, "sandboxer": between.sandboxer}

    def _with(self, caller: OwnerKey | Metadata) -> Metadata:
        more = caller.metadata() if isinstance(caller, OwnerKey) else caller
        names = {name for name, _ in more}
        return (*(each for each in self.metadata if each[0] not in names), *more)

    async def answers(self, seconds: float = 10.0) -> bool:
        """Whether anybody serves there."""
        try:
            async with asyncio.timeout(seconds):
                await self.channel.channel_ready()
        except TimeoutError:
            return False
        return True

    async def offers(self, feature: str) -> bool:
        return self.has_node and feature in (await self.client.info()).features

    async def sandbox_calls(self) -> list[str]:
        """The calls about one sandbox that it offers."""
        if not self.has_node:
            return list(CONTROLLER_CALLS)
        features = (await self.client.info()).features
        return [*CONTROLLER_CALLS, *(call for call, feature in FEATURES.items() if feature in features)]

    async def ids(self) -> set[str]:
        """Of every record."""
        return {record.sandbox_id for record in (await self.client.list()).sandboxes}

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[list[node_pb2.WatchResponse]]:
        """All changes from now on, in a list that grows."""
        listed = await self.client.list()
        seen: list[node_pb2.WatchResponse] = []

        async def follow() -> None:
            async for change in self.client.watch(listed.epoch, listed.sequence):
                seen.append(change)  # noqa: PERF401 - it is read while it grows

        following = asyncio.create_task(follow())
        try:
            yield seen
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def changes_within(self, seconds: float) -> list[node_pb2.WatchResponse]:
        """What changes from now on for so long."""
        listed = await self.client.list()
        request = node_pb2.WatchRequest(epoch=listed.epoch, after_sequence=listed.sequence)
        seen: list[node_pb2.WatchResponse] = []

        async def follow() -> None:
            async for change in self.node.Watch(request, timeout=seconds):
                seen.append(change)  # noqa: PERF401 - the stream ends by its deadline

        await fails(follow(), grpc.StatusCode.DEADLINE_EXCEEDED)
        return seen

    async def restart(self, failpoints: Mapping[str, str] | None = None) -> None:
        """Kills it as kill -9 does and starts it again."""
        assert self.host is not None
        self.host.kill()
        await self.started(failpoints)

    async def started(self, failpoints: Mapping[str, str] | None = None) -> None:
        """Starts it again, however it ended."""
        assert self.host is not None
        self.host.launch(failpoints or {})
        await self.host.ready()
        self._connect()  # the channels there are wait before they try again; calls on them go on

    def left(self) -> set[str]:
        """What its sandboxes have on the machine."""
        assert self.leftovers is not None
        return set(self.leftovers())


def _sandbox(sandbox_id: str, between: Containerd) -> types_pb2.Sandbox:
    """As containerd's Store has it."""
    runtime = types_pb2.Sandbox.Runtime(name=RUNTIME)
    return types_pb2.Sandbox(sandbox_id=sandbox_id, runtime=runtime, sandboxer=between.sandboxer)


async def code_of(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    """How a call ends, and the message, or the answer where it is OK."""
    try:
        async with asyncio.timeout(PATIENCE):
            answer = await call
    except ShimError as error:
        return error.code, error.message
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, str(answer)


async def fails(call: Awaitable[object], *codes: grpc.StatusCode) -> str:
    """The message of a call that fails with one of the codes. Raises AssertionError for all else."""
    code, message = await code_of(call)
    assert code in codes, f"{code.name} ({message}), not {' or '.join(each.name for each in codes)}"
    return message


async def drained(stream: AsyncIterable[Any]) -> list[Any]:
    """All of a stream that ends."""
    async with asyncio.timeout(PATIENCE):
        return [each async for each in stream]


async def until(
    look: Callable[[], Any], good: Callable[[Any], object] = bool, seconds: float = PATIENCE
) -> Any:
    """The first answer of `look` that is good. Raises AssertionError with the last one where none is."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while True:
        seen = look()
        if asyncio.iscoroutine(seen):
            seen = await seen
        if good(seen):
            return seen
        assert loop.time() < deadline, f"still: {shorten(repr(seen))}"
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def about(what: object) -> Iterator[None]:
    """Says of which of many cases an AssertionError is."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{shorten(str(what))}: {explain(error)}") from error


def unknown_id() -> str:
    """An id that no server knows."""
    return f"{uuid.uuid4()}-1"


def alive(pids: Sequence[int]) -> list[int]:
    """Those of the pids that are processes of this machine."""
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]
