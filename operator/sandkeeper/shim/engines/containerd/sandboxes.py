"""containerd's sandbox API as its client: sandboxes that a sandboxer of containerd's makes, by its own Store and
Controller.

Its Controller drops the address of a sandbox's Task service, without which no container can be run in it: that is
asked for at the sandboxer's own socket, which containerd tells of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from google.protobuf import any_pb2

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.containerd import server, tasks
from sandkeeper.shim.engines.containerd.client import CallError, Client, start_error
from sandkeeper.wire import controller_pb2, cri_pb2, node_pb2, store_pb2, types_pb2
from sandkeeper.wire.containerd import introspection_pb2

_MARK = "sandboxer:"
PROBE = "sandkeeper.dev/probe"
_ENDED = ("SANDBOX_NOTREADY", "STOPPED")
_STOP_SECONDS = 10
_WAIT_SECONDS = 30.0
_METRICS_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """In place of a runtime's program. runtime: the program, or containerd's name, that its containers run with."""

    sandboxer: str
    runtime: str

    def __str__(self) -> str:
        return f"{_MARK}{self.sandboxer}:{self.runtime}"

    @classmethod
    def parse(cls, program: str) -> Self | None:
        """None for a program."""
        if not program.startswith(_MARK):
            return None
        sandboxer, _, runtime = program.removeprefix(_MARK).partition(":")
        return cls(sandboxer, runtime)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a sandbox is to be like."""

    hostname: str
    host_network: bool = False

    @classmethod
    def of(cls, config: node_pb2.SandboxConfig, hostname: str) -> Self:
        return cls(hostname, config.network == node_pb2.NETWORK_HOST)

    def options(self, sandbox_id: str) -> any_pb2.Any:
        """As CRI asks a sandboxer."""
        pod = cri_pb2.PodSandboxConfig(hostname="" if self.host_network else self.hostname)
        pod.metadata.name = pod.metadata.uid = sandbox_id
        pod.metadata.namespace = "sandkeeper"
        wishes = pod.linux.security_context.namespace_options
        wishes.network = cri_pb2.NODE if self.host_network else cri_pb2.POD
        wishes.pid = cri_pb2.CONTAINER
        return any_pb2.Any(type_url=pod.DESCRIPTOR.full_name, value=pod.SerializeToString())


def wait_request(target: Target, sandbox_id: str) -> controller_pb2.ControllerWaitRequest:
    return controller_pb2.ControllerWaitRequest(
        sandbox_id=tasks.name_of(sandbox_id), sandboxer=target.sandboxer
    )


class Sandboxes:
    """Blocking, for the engine's threads. Every method is safe to repeat. sandboxers: name -> address."""

    def __init__(self, client: Client, sandboxers: Mapping[str, str]) -> None:
        self._client = client
        self._direct = {
            name: Client(Path(address.removeprefix("unix://")), client.namespace)
            for name, address in sandboxers.items()
            if address
        }

    def close(self) -> None:
        for each in self._direct.values():
            each.close()

    def start(self, target: Target, sandbox_id: str, asked: Asked, label: str = tasks.SANDBOX) -> int:
        """Makes and starts one, or finds it started; the pid of its sandbox process. Raises EngineError."""
        name, call = tasks.name_of(sandbox_id), self._client.call
        sandbox = types_pb2.Sandbox(
            sandbox_id=name,
            sandboxer=target.sandboxer,
            runtime=types_pb2.Sandbox.Runtime(name=tasks.type_of(target.runtime)),
            spec=any_pb2.Any(
                type_url=tasks.SPEC,
                value=json.dumps({"hostname": "" if asked.host_network else asked.hostname}).encode(),
            ),
            labels={label: sandbox_id},
        )
        create = controller_pb2.ControllerCreateRequest(
            sandbox_id=name, sandboxer=target.sandboxer, sandbox=sandbox, options=asked.options(name)
        )
        start = controller_pb2.ControllerStartRequest(sandbox_id=name, sandboxer=target.sandboxer)
        try:
            self._client.made(self._client.store.Create, store_pb2.StoreCreateRequest(sandbox=sandbox))
            self._client.made(self._client.controller.Create, create)
            try:
                return int(call(self._client.controller.Start, start).pid)
            except CallError as error:
                # One that was started by a shim that was killed: not every sandboxer starts it twice.
                found = None if error.away else self._status(self._client, target, name)
                if found is None or not found.pid or found.state != "SANDBOX_READY":
                    raise
                return int(found.pid)
        except CallError as error:
            raise start_error(error) from None

    def inside(self, target: Target, sandbox_id: str) -> tasks.Inside:
        """What a container must say to be run in it. Raises EngineError `StartError`, CallError."""
        name = tasks.name_of(sandbox_id)
        for client in (self._client, self._direct.get(target.sandboxer)):
            found = self._status(client, target, name) if client else None
            if found is not None and found.address:
                return tasks.Inside(name, found.address, found.version)
        raise EngineError(
            "StartError", f"sandboxer {target.sandboxer!r} names no Task service for containers"
        )

    def _status(
        self, client: Client, target: Target, name: str
    ) -> controller_pb2.ControllerStatusResponse | None:
        request = controller_pb2.ControllerStatusRequest(sandbox_id=name, sandboxer=target.sandboxer)
        return client.found(client.controller.Status, request)

    def is_over(self, target: Target, sandbox_id: str) -> bool:
        """Whether the sandboxer says that it has ended. One that does not know it may have been started anew, or not
        be loaded: that says nothing. Raises CallError."""
        found = self._status(self._client, target, tasks.name_of(sandbox_id))
        return found is not None and found.state in _ENDED

    def metrics(self, target: Target, sandbox_id: str) -> any_pb2.Any | None:
        """What the sandboxer says of its use; None where it says nothing, or cannot be asked."""
        request = controller_pb2.ControllerMetricsRequest(
            sandbox_id=tasks.name_of(sandbox_id), sandboxer=target.sandboxer
        )
        try:
            found = self._client.call(self._client.controller.Metrics, request, seconds=_METRICS_SECONDS)
        except CallError:
            return None
        return found.metrics.data if found.metrics.data.type_url else None

    def stop(self, target: Target, sandbox_id: str, *, at_once: bool) -> bool:
        """Ends one; False where it is not known. Raises CallError."""
        request = controller_pb2.ControllerStopRequest(
            sandbox_id=tasks.name_of(sandbox_id),
            sandboxer=target.sandboxer,
            timeout_secs=0 if at_once else _STOP_SECONDS,
        )
        return self._client.found(self._client.controller.Stop, request) is not None

    def wait(self, target: Target, sandbox_id: str) -> tuple[int, datetime] | None:
        """Exit status and time of one that has ended; None where nobody can tell. Raises CallError where containerd
        is away."""
        wait, request = self._client.controller.Wait, wait_request(target, sandbox_id)
        try:
            found = self._client.call(wait, request, seconds=_WAIT_SECONDS)
        except CallError as error:
            if error.away:
                raise
            return None
        return found.exit_status, found.exited_at.ToDatetime(UTC)

    def remove(self, sandbox_id: str, sandboxer: str = "") -> None:
        """Leaves nothing of one. sandboxer: whose, where that is known; else it is containerd that knows. Raises
        EngineError `RemoveFailed`, and CallError where containerd is away."""
        name = tasks.name_of(sandbox_id)
        if not sandboxer:
            known = self._client.found(self._client.store.Get, store_pb2.StoreGetRequest(sandbox_id=name))
            if known is None:
                return
            sandboxer = known.sandbox.sandboxer
        try:
            request = controller_pb2.ControllerShutdownRequest(sandbox_id=name, sandboxer=sandboxer)
            gone = self._client.found(self._client.controller.Shutdown, request)
            # NOT_FOUND is the answer too where the sandboxer itself is not there: its sandbox may well be.
            if gone is None and not self._is_loaded(sandboxer):
                raise EngineError(
                    "RemoveFailed", f"containerd has no sandboxer {sandboxer!r} any more", retryable=True
                )
            self._client.found(self._client.store.Delete, store_pb2.StoreDeleteRequest(sandbox_id=name))
        except CallError as error:
            if error.away:
                raise
            raise EngineError(
                "RemoveFailed", f"sandboxer {sandboxer!r}: {error.words}", retryable=True
            ) from None

    def _is_loaded(self, sandboxer: str) -> bool:
        request = introspection_pb2.PluginsRequest(filters=[f"type=={server.SANDBOXER}"])
        plugins = self._client.call(self._client.introspection.Plugins, request).plugins
        return any(each.id == sandboxer for each in plugins)

    def list(self, label: str = tasks.SANDBOX) -> frozenset[str]:
        """Ids of ours. Raises CallError."""
        request = store_pb2.StoreListRequest(filters=[f'labels."{label}"'])
        return frozenset(
            each.labels[label] for each in self._client.call(self._client.store.List, request).list
        )
