"""The two gRPC services, as thin as they can be: a request in, the keeper's answer out.

What is refused is raised as `Refused` and becomes a gRPC code in one place: `sandkeeper.shim.server.Guard`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterable
from datetime import UTC, datetime
from typing import Any, TypeVar

import grpc
from google.protobuf import any_pb2, json_format
from google.protobuf.message import DecodeError

from sandkeeper.shim import containerd, node
from sandkeeper.shim.changes import LIVE
from sandkeeper.shim.engines.base import EngineError, ExecSession
from sandkeeper.shim.errors import BadRequest, UnknownSandbox, Unsupported, WrongState
from sandkeeper.shim.instance import Instance
from sandkeeper.shim.keeper import Keeper
from sandkeeper.wire import controller_pb2, controller_pb2_grpc, node_pb2, node_pb2_grpc, types_pb2
from sandkeeper.wire.ids import OwnerKey

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

_VERSION = 3  # of containerd's sandbox task API, which Status and Start name


def owner_of(context: Context) -> OwnerKey | None:
    """The owner that a call names in its metadata. Raises BadRequest where it is named by halves."""
    metadata: Iterable[tuple[str, Any]] = context.invocation_metadata() or ()
    try:
        return OwnerKey.from_metadata({key: str(value) for key, value in metadata})
    except ValueError as error:
        raise BadRequest(str(error)) from None


def _containerd_namespace(context: Context) -> str:
    """Of a call that names no owner: an owner's sandbox is one, whoever hands on the call. Raises BadRequest."""
    return "" if owner_of(context) else containerd.namespace_of(context.invocation_metadata() or ())


class Finisher:
    """Carries calls through whose caller has left: a deadline must not leave half a step."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __call__(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # told to the caller, if it is still there

    async def drain(self, seconds: float) -> None:
        """Waits for what is under way, then gives up on it: the next start of the shim goes on from the disk."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Controller(controller_pb2_grpc.ControllerServicer):
    """containerd.services.sandbox.v1.Controller."""

    def __init__(self, keeper: Keeper, finish: Finisher) -> None:
        self._keeper = keeper
        self._finish = finish

    def _of(self, request: Any, context: Context) -> Instance:
        owner, namespace = owner_of(context), _containerd_namespace(context)
        if not namespace:
            return self._keeper.get(request.sandbox_id, owner)
        try:
            return self._keeper.get(containerd.local_id(namespace, request.sandbox_id), owner)
        except (UnknownSandbox, BadRequest):  # what is no id is nobody's
            raise UnknownSandbox(request.sandbox_id) from None  # the id that its caller knows

    async def Create(
        self, request: controller_pb2.ControllerCreateRequest, context: Context
    ) -> controller_pb2.ControllerCreateResponse:
        owner, namespace = owner_of(context), _containerd_namespace(context)
        config = _config(request.options)
        if config is None:
            config = containerd.config_of(request, namespace, local=str(context.peer()).startswith("unix:"))
        elif namespace:
            config.containerd.namespace, config.containerd.sandbox_id = namespace, request.sandbox_id
        local_id = containerd.local_id(namespace, request.sandbox_id) if namespace else request.sandbox_id
        await self._finish(self._keeper.create(local_id, config, owner))
        return controller_pb2.ControllerCreateResponse(sandbox_id=request.sandbox_id)

    async def Start(
        self, request: controller_pb2.ControllerStartRequest, context: Context
    ) -> controller_pb2.ControllerStartResponse:
        instance = self._of(request, context)
        pid = await self._finish(instance.start())
        return controller_pb2.ControllerStartResponse(
            sandbox_id=request.sandbox_id,
            pid=pid,
            created_at=instance.record.created_at,
            address=self._keeper.task_services.address(instance.sandbox_id),
            version=_VERSION,
        )

    async def Platform(
        self, request: controller_pb2.ControllerPlatformRequest, context: Context
    ) -> controller_pb2.ControllerPlatformResponse:
        platform = types_pb2.Platform(os="linux", architecture=node.architecture())
        return controller_pb2.ControllerPlatformResponse(platform=platform)

    async def Stop(
        self, request: controller_pb2.ControllerStopRequest, context: Context
    ) -> controller_pb2.ControllerStopResponse:
        await self._finish(self._of(request, context).stop(float(request.timeout_secs)))
        return controller_pb2.ControllerStopResponse()

    async def Wait(
        self, request: controller_pb2.ControllerWaitRequest, context: Context
    ) -> controller_pb2.ControllerWaitResponse:
        ended = await self._of(request, context).wait()
        return controller_pb2.ControllerWaitResponse(exit_status=ended.status, exited_at=ended.exited_at)

    async def Status(
        self, request: controller_pb2.ControllerStatusRequest, context: Context
    ) -> controller_pb2.ControllerStatusResponse:
        instance = self._of(request, context)
        await instance.recorded()
        record = instance.record
        status = controller_pb2.ControllerStatusResponse(
            sandbox_id=request.sandbox_id,
            pid=record.pid,
            state="SANDBOX_READY" if record.state in LIVE else "SANDBOX_NOTREADY",
            created_at=record.created_at,
            address=self._keeper.task_services.address(instance.sandbox_id),
            version=_VERSION,
        )
        if record.HasField("exit"):
            status.exited_at.CopyFrom(record.exit.exited_at)
        told = containerd.told(record, request.sandbox_id)
        status.extra.Pack(told)
        if request.verbose:
            status.info["sandkeeper"] = json_format.MessageToJson(told, indent=None)
        return status

    async def Shutdown(
        self, request: controller_pb2.ControllerShutdownRequest, context: Context
    ) -> controller_pb2.ControllerShutdownResponse:
        await self._finish(self._of(request, context).shutdown())
        return controller_pb2.ControllerShutdownResponse()

    async def Metrics(
        self, request: controller_pb2.ControllerMetricsRequest, context: Context
    ) -> controller_pb2.ControllerMetricsResponse:
        metric = await self._of(request, context).metrics()
        metric.id = request.sandbox_id
        return controller_pb2.ControllerMetricsResponse(metrics=metric)

    async def Update(
        self, request: controller_pb2.ControllerUpdateRequest, context: Context
    ) -> controller_pb2.ControllerUpdateResponse:
        self._of(request, context)
        return controller_pb2.ControllerUpdateResponse()


class Node(node_pb2_grpc.NodeServicer):
    """sandkeeper.shim.v1.Node."""

    def __init__(self, keeper: Keeper, finish: Finisher) -> None:
        self._keeper = keeper
        self._finish = finish
        self._started_at = datetime.now(UTC)

    def _of(self, request: Any, context: Context) -> Instance:
        return self._keeper.get(request.sandbox_id, owner_of(context))

    async def Info(self, request: node_pb2.InfoRequest, context: Context) -> node_pb2.InfoResponse:
        return node.info(self._keeper.settings, self._keeper.engine, self._started_at)

    async def List(self, request: node_pb2.ListRequest, context: Context) -> node_pb2.ListResponse:
        journal = self._keeper.journal
        return node_pb2.ListResponse(
            epoch=journal.epoch,
            sequence=journal.sequence,
            sandboxes=[instance.record for instance in self._keeper.all()],
        )

    async def Watch(
        self, request: node_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[node_pb2.WatchResponse]:
        async for change in self._keeper.journal.follow(request.epoch, request.after_sequence):
            yield change

    async def Pause(self, request: node_pb2.PauseRequest, context: Context) -> node_pb2.PauseResponse:
        await self._finish(self._of(request, context).pause())
        return node_pb2.PauseResponse()

    async def Resume(self, request: node_pb2.ResumeRequest, context: Context) -> node_pb2.ResumeResponse:
        await self._finish(self._of(request, context).resume())
        return node_pb2.ResumeResponse()

    async def Logs(
        self, request: node_pb2.LogsRequest, context: Context
    ) -> AsyncIterator[node_pb2.LogsResponse]:
        instance = self._of(request, context)
        name = instance.container(request.container).name
        self._can("Logs")
        pieces = self._keeper.engine.logs(
            instance.sandbox_id,
            name,
            follow=request.follow,
            tail_lines=request.tail_lines,
            timestamps=request.timestamps,
        )
        async for piece in pieces:
            yield node_pb2.LogsResponse(data=piece)

    async def Exec(
        self, request_iterator: AsyncIterator[node_pb2.ExecRequest], context: Context
    ) -> AsyncIterator[node_pb2.ExecResponse]:
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("input") != "start":
            raise BadRequest("start: must be the first message")
        start = first.start
        instance = self._of(start, context)
        container = instance.running_container(start.container)
        self._can("Exec")
        if not start.command or not start.command[0]:
            raise BadRequest("start.command must not be empty")
        if instance.record.state == node_pb2.STATE_PAUSED:
            raise WrongState(f"sandbox {instance.sandbox_id!r} is paused")
        session = await self._keeper.engine.exec(
            instance.sandbox_id,
            container.name,
            container.restart_count,
            list(start.command),
            tty=start.tty,
            stdin=start.stdin,
            size=(start.size.width, start.size.height) if start.HasField("size") else None,
        )
        feeding = asyncio.create_task(_feed(session, request_iterator, wanted=start.stdin))
        try:
            async for stream, data in session.output():
                if stream == "stdout":
                    yield node_pb2.ExecResponse(stdout=data)
                else:
                    yield node_pb2.ExecResponse(stderr=data)
            yield node_pb2.ExecResponse(exit_status=await session.wait())
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
            await self._finish(session.kill())

    def _can(self, feature: str) -> None:
        engine = self._keeper.engine
        if feature not in engine.features():
            raise Unsupported(f"the {engine.name} engine has no {feature}")


async def _feed(session: ExecSession, requests: AsyncIterator[node_pb2.ExecRequest], *, wanted: bool) -> None:
    """Hands the caller's input to the process, until either side has had enough."""
    if not wanted:
        await session.close_stdin()
    with contextlib.suppress(EngineError, OSError):
        async for request in requests:
            match request.WhichOneof("input"):
                case "stdin" if wanted:
                    await session.write_stdin(request.stdin)
                case "stdin_closed" if wanted:
                    await session.close_stdin()
                case "resize":
                    await session.resize(request.resize.width, request.resize.height)
    if wanted:
        await session.close_stdin()


def _config(options: any_pb2.Any) -> node_pb2.SandboxConfig | None:
    """Create's `options` where they are ours. Raises BadRequest where they are so by name only."""
    config = node_pb2.SandboxConfig()
    if not options.Is(config.DESCRIPTOR):
        return None
    try:
        options.Unpack(config)
    except DecodeError:
        raise BadRequest(f"options are no {config.DESCRIPTOR.full_name}") from None
    if config.HasField("containerd"):
        raise BadRequest("options: `containerd` is for the shim to set")
    return config
