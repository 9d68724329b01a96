"""What may become of a record: functions that change a copy of it, without I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

from sandkeeper.shim.engines.base import EngineError, ProcessExit
from sandkeeper.wire import node_pb2
from sandkeeper.wire.times import to_timestamp

Change = Callable[[node_pb2.SandboxRecord], None]

LIVE = frozenset((node_pb2.STATE_RUNNING, node_pb2.STATE_PAUSED))
START_ERROR = 128
"""Exit status of a container that could not be started, as containerd and Docker have it."""


def new_record(
    sandbox_id: str, config: node_pb2.SandboxConfig, created_at: datetime
) -> node_pb2.SandboxRecord:
    """The record of a sandbox that is to be prepared."""
    record = node_pb2.SandboxRecord(
        sandbox_id=sandbox_id,
        owner=config.owner,
        digest=config.digest,
        runtime=config.runtime,
        state=node_pb2.STATE_PREPARING,
    )
    record.created_at.CopyFrom(to_timestamp(created_at))
    for container in config.containers:
        record.containers.add(name=container.name, state=node_pb2.CONTAINER_STATE_WAITING)
    return record


def changed(record: node_pb2.SandboxRecord, change: Change) -> node_pb2.SandboxRecord:
    """A copy with the change made."""
    fresh = node_pb2.SandboxRecord()
    fresh.CopyFrom(record)
    change(fresh)
    return fresh


def unchanged(_record: node_pb2.SandboxRecord) -> None:
    """No change: what was asked for is written, the record stays."""


def container_of(record: node_pb2.SandboxRecord, name: str) -> node_pb2.ContainerRecord:
    """The container of that name. Raises StopIteration where there is none."""
    return next(container for container in record.containers if container.name == name)


def state(number: node_pb2.State.ValueType) -> Change:
    def change(record: node_pb2.SandboxRecord) -> None:
        record.state = number

    return change


def progress(container: str, reason: str, message: str) -> Change:
    """Something slow goes on for a container."""

    def change(record: node_pb2.SandboxRecord) -> None:
        explain([record, *(c for c in record.containers if c.name == container)], reason, message)

    return change


def waiting(error: EngineError, wait: float, *, first: bool) -> Change:
    """PREPARING goes on: why it waits, in kubelet's words. wait: seconds until the next attempt."""
    reason, message = error.reason, error.message
    if not first and reason == "ErrImagePull":
        reason, message = "ImagePullBackOff", f"tried again after {wait:g} s: {error.message}"

    def change(record: node_pb2.SandboxRecord) -> None:
        explain([record, *record.containers], reason, message)

    return change


def prepared(digests: Mapping[str, str]) -> Change:
    """digests: container name -> its image's."""

    def change(record: node_pb2.SandboxRecord) -> None:
        record.state = node_pb2.STATE_CREATED
        explain([record, *record.containers], "", "")
        for container in record.containers:
            container.image_id = digests.get(container.name, "")

    return change


def failed(error: EngineError) -> Change:
    def change(record: node_pb2.SandboxRecord) -> None:
        record.state, record.pid = node_pb2.STATE_FAILED, 0
        record.reason, record.message = error.reason, error.message

    return change


def running(pid: int, containers: Mapping[str, int]) -> Change:
    """pid: the sandbox process's. containers: name -> pid."""
    now = datetime.now(UTC)

    def change(record: node_pb2.SandboxRecord) -> None:
        record.state, record.pid = node_pb2.STATE_RUNNING, pid
        record.started_at.CopyFrom(to_timestamp(now))
        for container in record.containers:
            container_runs(container, containers.get(container.name, 0), 0, now)

    return change


def restarted(name: str, pid: int, attempt: int) -> Change:
    def change(record: node_pb2.SandboxRecord) -> None:
        container_runs(container_of(record, name), pid, attempt, datetime.now(UTC))

    return change


def container_ended(name: str, ended: node_pb2.Exit, *, again_after: float | None) -> Change:
    """again_after: seconds until restartPolicy starts it again; None for never."""

    def change(record: node_pb2.SandboxRecord) -> None:
        container = container_of(record, name)
        container_exits(container, ended)
        if again_after is not None:
            container.state = node_pb2.CONTAINER_STATE_WAITING
            why = ended.message or f"exit status {ended.status}"
            container.reason = "CrashLoopBackOff"
            container.message = f"{why}; started again after {again_after:g} s"

    return change


def ended(record: node_pb2.SandboxRecord) -> tuple[str, ...]:
    """The containers that do not run any more, those that wait for their restart among them."""
    return tuple(c.name for c in record.containers if c.state != node_pb2.CONTAINER_STATE_RUNNING)


def no_more_restarts(record: node_pb2.SandboxRecord) -> None:
    """What waits for its restart has ended."""
    for container in record.containers:
        if container.state == node_pb2.CONTAINER_STATE_WAITING:
            container_exits(container, container.exit)


def exited(record: node_pb2.SandboxRecord, ended: node_pb2.Exit) -> None:
    record.state, record.pid = node_pb2.STATE_EXITED, 0
    record.exit.CopyFrom(ended)
    record.ClearField("usage")


def container_runs(container: node_pb2.ContainerRecord, pid: int, attempt: int, since: datetime) -> None:
    container.state, container.pid = node_pb2.CONTAINER_STATE_RUNNING, pid
    container.restart_count = attempt
    container.reason = container.message = ""
    container.started_at.CopyFrom(to_timestamp(since))


def container_exits(container: node_pb2.ContainerRecord, ended: node_pb2.Exit) -> None:
    kept = node_pb2.Exit()
    kept.CopyFrom(ended)  # `ended` may be the container's own
    container.state, container.pid = node_pb2.CONTAINER_STATE_EXITED, 0
    container.reason = container.message = ""
    if kept.exited_at.ToNanoseconds() < container.started_at.ToNanoseconds():
        # A file's time, which the kernel rounds down to its tick.
        kept.exited_at.CopyFrom(container.started_at)
    container.exit.CopyFrom(kept)


def explain(
    parts: Iterable[node_pb2.SandboxRecord | node_pb2.ContainerRecord], reason: str, message: str
) -> None:
    for part in parts:
        part.reason, part.message = reason, message


def exit_of(ended: ProcessExit) -> node_pb2.Exit:
    """The wire's form of an engine's exit."""
    return node_pb2.Exit(
        status=ended.status,
        signal=ended.signal,
        reason=ended.reason,
        message=ended.message,
        exited_at=to_timestamp(ended.exited_at),
    )


def start_error(name: str, error: EngineError) -> node_pb2.Exit:
    """The exit of a container that never ran."""
    message = (
        error.message if error.message.startswith("containers[") else f"containers[{name}]: {error.message}"
    )
    return node_pb2.Exit(
        status=START_ERROR, reason="StartError", message=message, exited_at=to_timestamp(datetime.now(UTC))
    )
