"""Containers and tasks of a containerd: one container and one task for each attempt of one of ours."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import any_pb2

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.containerd.client import CallError, Client
from sandkeeper.shim.engines.containerd.ttrpc import Address
from sandkeeper.wire import types_pb2
from sandkeeper.wire.containerd import containers_pb2, process_pb2, runc_pb2, tasks_pb2
from sandkeeper.wire.ids import valid_id

SANDBOX, GROUP = "sandkeeper.dev/sandbox", "io.containerd.runc.v2.group"
SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
_PROCESS = "types.containerd.io/opencontainers/runtime-spec/1/Process"
_RUNC = "io.containerd.runc.v2"
_RUNTIME_TYPE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.v\d+")
_END_SECONDS = 10.0
_STATES = {
    process_pb2.CREATED: "created",
    process_pb2.RUNNING: "running",
    process_pb2.PAUSED: "running",
    process_pb2.PAUSING: "running",
    process_pb2.STOPPED: "stopped",
    process_pb2.UNKNOWN: "unknown",
}


@dataclass(frozen=True, slots=True)
class Task:
    """state: OCI's word, or `unknown` where its shim does not say; empty where there is no such task."""

    state: str = ""
    pid: int = 0
    exit_status: int = 0
    exited_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Files:
    """Paths of fifos; empty: /dev/null."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""


@dataclass(frozen=True, slots=True)
class Inside:
    """A sandbox of a sandboxer's that a container is in: its id there, and its Task service."""

    sandbox: str
    address: str
    version: int

    @property
    def shim(self) -> Address | None:
        """That service, where it can be asked without containerd."""
        kind, _, path = self.address.partition("://")
        return Address(path, self.version) if kind == "ttrpc+unix" else None


def name_of(runtime_id: str) -> str:
    """The name that containerd has for one of ours, which may be longer than it takes."""
    if valid_id(runtime_id):
        return runtime_id
    return f"sandkeeper-{hashlib.sha256(runtime_id.encode()).hexdigest()[:48]}"


def is_type(runtime: str) -> bool:
    """Whether a runtime is named as containerd does (`io.containerd.kata.v2`), and not by its program."""
    return _RUNTIME_TYPE.fullmatch(runtime) is not None


def type_of(runtime: str) -> str:
    """containerd's name of a runtime."""
    return runtime if is_type(runtime) else _RUNC


def create_container(
    client: Client,
    name: str,
    spec: Mapping[str, Any],
    runtime: str,
    runtime_root: Path,
    labels: Mapping[str, str],
    *,
    snapshotter: str = "",
    snapshot: str = "",
    inside: Inside | None = None,
) -> None:
    """Anew where there is one already. Raises CallError."""
    container = containers_pb2.Container(
        id=name,
        labels=labels,
        runtime=containers_pb2.Container.Runtime(
            name=type_of(runtime), options=_options(runtime, runtime_root)
        ),
        spec=any_pb2.Any(type_url=SPEC, value=json.dumps(spec).encode()),
        snapshotter=snapshotter,
        snapshot_key=snapshot,
        sandbox=inside.sandbox if inside else "",
    )
    request = containers_pb2.CreateContainerRequest(container=container)
    if client.made(client.containers.Create, request) is None:
        delete_container(client, name)
        client.call(client.containers.Create, request)


def _options(runtime: str, runtime_root: Path, inside: Inside | None = None) -> any_pb2.Any | None:
    if is_type(runtime):
        return None
    options = runc_pb2.Options(binary_name=runtime, root=str(runtime_root))
    if inside:
        options.task_api_address, options.task_api_version = inside.address, inside.version
    return any_pb2.Any(type_url="containerd.runc.v1.Options", value=options.SerializeToString())


def delete_container(client: Client, name: str) -> None:
    """One that is not there is success. Raises CallError."""
    client.found(client.containers.Delete, containers_pb2.DeleteContainerRequest(id=name))


def create(
    client: Client,
    name: str,
    runtime: str,
    runtime_root: Path,
    mounts: Sequence[types_pb2.Mount],
    files: Files,
    seconds: float,
    *,
    inside: Inside | None = None,
) -> int:
    """The pid of its first process, which waits for `start`. Raises CallError."""
    request = tasks_pb2.CreateTaskRequest(
        container_id=name,
        rootfs=mounts,
        stdin=files.stdin,
        stdout=files.stdout,
        stderr=files.stderr,
        options=_options(runtime, runtime_root, inside),
        task_api_address=inside.address if inside else "",
        task_api_version=inside.version if inside else 0,
    )
    return client.call(client.tasks.Create, request, seconds=seconds).pid


def start(client: Client, name: str, seconds: float) -> None:
    """Raises CallError."""
    client.call(client.tasks.Start, tasks_pb2.StartRequest(container_id=name), seconds=seconds)


def get(client: Client, name: str, exec_id: str = "") -> Task:
    """Raises CallError."""
    found = client.found(client.tasks.Get, tasks_pb2.GetRequest(container_id=name, exec_id=exec_id))
    if found is None:
        return Task()
    process = found.process
    at = process.exited_at.ToDatetime(UTC) if process.HasField("exited_at") else None
    return Task(_STATES.get(process.status, "unknown"), process.pid, process.exit_status, at)


def kill(client: Client, name: str, number: int) -> None:
    """A task that has ended, or is not there, is success. Raises CallError where containerd is away."""
    try:
        client.call(client.tasks.Kill, tasks_pb2.KillRequest(container_id=name, signal=number))
    except CallError as error:
        if error.away:
            raise


def delete(client: Client, name: str) -> None:
    """Ends a task and takes it, and its container, away; what is not there is success. Raises CallError, and
    EngineError `RemoveFailed`."""
    deadline = time.monotonic() + _END_SECONDS
    while True:
        try:
            client.found(client.tasks.Delete, tasks_pb2.DeleteTaskRequest(container_id=name))
            break
        except CallError as error:
            if error.away:
                raise
            if time.monotonic() > deadline:
                raise EngineError(
                    "RemoveFailed", f"task {name} cannot be deleted: {error.words}", retryable=True
                ) from None
        # It runs, was just created, or has just been killed: whoever kills it twice does no harm.
        kill = tasks_pb2.KillRequest(container_id=name, signal=9, all=True)
        try:
            client.call(client.tasks.Kill, kill, seconds=_END_SECONDS)
            wait = tasks_pb2.WaitRequest(container_id=name)
            client.call(client.tasks.Wait, wait, seconds=max(0.1, deadline - time.monotonic()))
        except CallError as error:
            if error.code == grpc.StatusCode.UNAVAILABLE:
                raise
            time.sleep(0.005)
    delete_container(client, name)


def labelled(client: Client, sandbox: str = "") -> dict[str, str]:
    """Name of each container of ours -> sandbox. Raises CallError."""
    wanted = f'labels."{SANDBOX}"' + (f"=={sandbox}" if sandbox else "")
    request = containers_pb2.ListContainersRequest(filters=[wanted])
    found = client.call(client.containers.List, request).containers
    return {each.id: each.labels[SANDBOX] for each in found}


def shim_of(pid: int) -> tuple[int, Address] | None:
    """The pid and the address of the containerd shim that a task's first process is a child of.

    Its working directory is the bundle of the first task that it was started for.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        parent = int(fields[1])
        bundle = Path(os.readlink(f"/proc/{parent}/cwd"))  # noqa: PTH115 - as the kernel has it
    except (OSError, ValueError, IndexError):
        return None
    address = Address.in_bundle(bundle)
    return (parent, address) if address else None


def process_any(process: Mapping[str, Any]) -> any_pb2.Any:
    return any_pb2.Any(type_url=_PROCESS, value=json.dumps(process).encode())
