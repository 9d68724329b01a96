"""Calls to a containerd, from the engine's threads: one channel, one namespace, errors as EngineError."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci.tools import clean
from sandkeeper.wire import controller_pb2_grpc, store_pb2_grpc
from sandkeeper.wire.containerd import (
    containers_pb2_grpc,
    content_pb2_grpc,
    diff_pb2_grpc,
    images_pb2_grpc,
    introspection_pb2_grpc,
    leases_pb2_grpc,
    namespaces_pb2_grpc,
    snapshots_pb2_grpc,
    tasks_pb2_grpc,
    version_pb2_grpc,
)

T = TypeVar("T")

SECONDS = 60.0
"""Longest that a call takes that waits for nothing of a user's."""
_MAX_MESSAGE = 16 * 1024 * 1024
OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    # A connection of its own, so that what another engine of this process does to its is no matter.
    ("grpc.use_local_subchannel_pool", 1),
    # A socket on this machine: soon after containerd is back, so are we.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
)
# What containerd and its shim put before the runtime's words.
_PREFIX = re.compile(
    r"^(failed to (create|start) (shim )?(task|exec)?: |OCI runtime (create|exec|start) failed: "
    r"|failed to (create|start) \w+ process: )+"
)
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class CallError(EngineError):
    """containerd said no, or did not say anything."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        away = code in _AWAY
        words = f"containerd does not answer: {message}" if away else f"containerd: {message}"
        super().__init__("NodeError" if away else "ContainerdError", words, retryable=away)
        self.code = code
        self.away = away
        self.words = message


class Client:
    """socket: containerd's. namespace: the one in which everything is made and looked for."""

    def __init__(self, socket: Path, namespace: str) -> None:
        self.socket = socket
        self.namespace = namespace
        self._channel = grpc.insecure_channel(f"unix://{socket}", options=OPTIONS)
        self.version = version_pb2_grpc.VersionStub(self._channel)
        self.introspection = introspection_pb2_grpc.IntrospectionStub(self._channel)
        self.namespaces = namespaces_pb2_grpc.NamespacesStub(self._channel)
        self.leases = leases_pb2_grpc.LeasesStub(self._channel)
        self.content = content_pb2_grpc.ContentStub(self._channel)
        self.images = images_pb2_grpc.ImagesStub(self._channel)
        self.diff = diff_pb2_grpc.DiffStub(self._channel)
        self.snapshots = snapshots_pb2_grpc.SnapshotsStub(self._channel)
        self.containers = containers_pb2_grpc.ContainersStub(self._channel)
        self.tasks = tasks_pb2_grpc.TasksStub(self._channel)
        self.store = store_pb2_grpc.StoreStub(self._channel)
        self.controller = controller_pb2_grpc.ControllerStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def _metadata(self, lease: str) -> tuple[tuple[str, str], ...]:
        held = (("containerd-lease", lease),) if lease else ()
        return (("containerd-namespace", self.namespace), *held)

    def call(self, method: Callable[..., T], request: Any, *, lease: str = "", seconds: float = SECONDS) -> T:
        """One RPC. lease: holds what it makes. Raises CallError."""
        try:
            return method(request, timeout=seconds, metadata=self._metadata(lease))
        except grpc.RpcError as error:
            raise _call_error(error) from None

    def each(
        self, method: Callable[..., Any], request: Any, *, lease: str = "", seconds: float = SECONDS
    ) -> Iterator[Any]:
        """The answers of an RPC that streams them. Raises CallError."""
        try:
            yield from method(request, timeout=seconds, metadata=self._metadata(lease))
        except grpc.RpcError as error:
            raise _call_error(error) from None

    def found(self, method: Callable[..., T], request: Any, *, lease: str = "") -> T | None:
        """The same; None where there is no such thing. Raises CallError."""
        return self.unless(grpc.StatusCode.NOT_FOUND, method, request, lease=lease)

    def made(self, method: Callable[..., T], request: Any, *, lease: str = "") -> T | None:
        """The same; None where it is there already. Raises CallError."""
        return self.unless(grpc.StatusCode.ALREADY_EXISTS, method, request, lease=lease)

    def unless(
        self, code: grpc.StatusCode, method: Callable[..., T], request: Any, *, lease: str = ""
    ) -> T | None:
        try:
            return self.call(method, request, lease=lease)
        except CallError as error:
            if error.code == code:
                return None
            raise


def _call_error(error: grpc.RpcError) -> CallError:
    # Every RpcError that a call raises is a grpc.Call as well.
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    return CallError(code, (details or str(code))[:1000])


def start_error(error: CallError) -> EngineError:
    """What the runtime said is the container's fault; that nobody answered is not."""
    if error.away:
        return error
    return EngineError("StartError", clean(_PREFIX.sub("", error.words).removesuffix(": unknown")))
