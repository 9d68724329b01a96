"""containerd's event stream: it wakes whoever waits for the end of a task or of a sandbox.

An event says only whom to look at; whoever is woken reads the state where it is. What the stream has missed, since
containerd or this shim was away, is repaired by a relist, each time that the stream has been opened: whatever is
waited for and is no task that runs is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message

from sandkeeper.shim.engines.containerd.client import OPTIONS
from sandkeeper.wire import controller_pb2, controller_pb2_grpc
from sandkeeper.wire.containerd import (
    events_pb2,
    events_pb2_grpc,
    process_pb2,
    taskevents_pb2,
    tasks_pb2,
    tasks_pb2_grpc,
)

log = logging.getLogger(__name__)

_TOPICS: dict[str, type[Message]] = {
    "/tasks/exit": taskevents_pb2.TaskExit,
    "/tasks/oom": taskevents_pb2.TaskOOM,
    "/tasks/delete": taskevents_pb2.TaskDelete,
    "/sandboxes/exit": taskevents_pb2.SandboxExit,
}
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 2.0
_SEEN_SECONDS = 0.5
_CALL_SECONDS = 60.0


async def first(*works: Coroutine[Any, Any, object]) -> None:
    """Returns when one of them has, or raises what it raised; the others are cancelled."""
    running = [asyncio.ensure_future(each) for each in works]
    try:
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    for each in done:
        each.result()


def subject(envelope: events_pb2.Envelope) -> str:
    """The container or the sandbox that an event is about; empty where it is none of those that wake anybody."""
    kind = _TOPICS.get(envelope.topic)
    if kind is None:
        return ""
    try:
        found: Any = kind.FromString(envelope.event.value)
    except DecodeError:
        return ""
    if isinstance(found, taskevents_pb2.SandboxExit):
        return found.sandbox_id
    name = str(found.container_id)
    # The end of what was executed in a container is not the container's.
    return "" if isinstance(found, taskevents_pb2.TaskExit) and found.id not in ("", name) else name


def missed(names: set[str], listed: tasks_pb2.ListTasksResponse) -> set[str]:
    """Of what is waited for, what is no task that runs: one that has stopped, that is gone, or that is no task."""
    runs = {each.container_id or each.id for each in listed.tasks if each.status != process_pb2.STOPPED}
    return names - runs


class Events:
    """One stream of one namespace, on a connection of its own, in the event loop that opened it."""

    def __init__(self, socket: Path, namespace: str) -> None:
        self._socket = socket
        self._namespace = namespace
        self._metadata = (("containerd-namespace", namespace),)
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._wait = _FIRST_WAIT
        self._reading: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Returns at once: containerd may be away."""
        self._channel = grpc.aio.insecure_channel(f"unix:{self._socket}", options=OPTIONS)
        self._events = events_pb2_grpc.EventsStub(self._channel)
        self._tasks = tasks_pb2_grpc.TasksStub(self._channel)
        self._controller = controller_pb2_grpc.ControllerStub(self._channel)
        self._reading = asyncio.create_task(self._read())

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
            self._reading = None
            await self._channel.close(None)
            # gRPC closes the connection with the last object that has to do with it.
            del self._channel, self._events, self._tasks, self._controller

    @contextlib.contextmanager
    def watching(self, name: str) -> Iterator[asyncio.Event]:
        """Set whenever a task or a sandbox is to be looked at. What was before is to be looked for without it."""
        woken = asyncio.Event()
        self._waiting.setdefault(name, set()).add(woken)
        try:
            yield woken
        finally:
            self._waiting[name].discard(woken)
            if not self._waiting[name]:
                del self._waiting[name]

    async def sandbox_ended(self, request: controller_pb2.ControllerWaitRequest) -> None:
        """Returns when the sandboxer says so; not at all where it cannot be asked. It is this Wait, or another
        client's, that makes containerd tell of a sandbox's end at all."""
        try:
            await self._controller.Wait(request, metadata=self._metadata)
        except grpc.aio.AioRpcError:
            await asyncio.Event().wait()

    def _wake(self, names: set[str]) -> None:
        for name in names & self._waiting.keys():
            for each in self._waiting[name]:
                each.set()

    async def _read(self) -> None:
        while True:
            try:
                await self._session()
            except* grpc.aio.AioRpcError as errors:
                # Once, however long containerd is away.
                level = logging.WARNING if self._wait == _FIRST_WAIT else logging.DEBUG
                log.log(level, "containerd's events ended", extra={"error": _words(errors)})
            await asyncio.sleep(self._wait)
            self._wait = min(self._wait * 2, _LONGEST_WAIT)

    async def _session(self) -> None:
        """One subscription, until it ends. Raises a group of AioRpcError."""
        mark, seen = f"/sandkeeper/{uuid.uuid4().hex}", asyncio.Event()
        wanted = [f'namespace=="{self._namespace}",topic=="{topic}"' for topic in (*_TOPICS, mark)]
        stream = self._events.Subscribe(events_pb2.SubscribeRequest(filters=wanted), metadata=self._metadata)
        try:
            async with asyncio.TaskGroup() as group:
                relisting = group.create_task(self._relist(mark, seen))
                async for envelope in _each(stream):
                    if envelope.topic == mark:
                        seen.set()
                    else:
                        self._wake({subject(envelope)})
                relisting.cancel()
        finally:
            stream.cancel()
            del stream

    async def _relist(self, mark: str, seen: asyncio.Event) -> None:
        """Once the subscription is known to work: containerd does not say so, but hands us what we publish."""
        while not seen.is_set():
            event = any_pb2.Any(type_url="google.protobuf.Empty")
            request = events_pb2.PublishRequest(topic=mark, event=event)
            await self._events.Publish(request, timeout=_CALL_SECONDS, metadata=self._metadata)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(seen.wait(), _SEEN_SECONDS)
        listed = await self._tasks.List(
            tasks_pb2.ListTasksRequest(), timeout=_CALL_SECONDS, metadata=self._metadata
        )
        self._wake(missed(set(self._waiting), listed))
        self._wait = _FIRST_WAIT


async def _each(stream: Any) -> AsyncIterator[events_pb2.Envelope]:
    async for envelope in stream:
        yield envelope


def _words(errors: BaseExceptionGroup[grpc.aio.AioRpcError]) -> str:
    return "; ".join(
        str(each.details()) for each in errors.exceptions if isinstance(each, grpc.aio.AioRpcError)
    )
