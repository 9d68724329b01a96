"""What the core asks of its edges. The edges implement these; tests implement them in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

from sandkeeper.control.observation import Key, NodeView, RecordView
from sandkeeper.wire import node_pb2
from sandkeeper.wire.ids import OwnerKey

Raw = dict[str, Any]


class KubeError(Exception):
    """The API server could not be reached or failed; the pass is tried again with back-off."""


class Conflict(KubeError):
    """HTTP 409: what was written was built on an older version of the object, or another object's UID."""


class Gone(KubeError):
    """HTTP 404: the object does not exist any more."""


class Rejected(KubeError):
    """HTTP 400, 403 or 422: the API server will not take it; trying again changes nothing by itself."""


class KubePort(Protocol):
    """The API server, for Sandbox objects. Each method is one request and returns the object that came back.

    Raises Conflict, Gone, Rejected, or KubeError for everything that may pass.
    """

    async def get(self, namespace: str, name: str) -> Raw:
        """A live read."""

    async def patch_metadata(self, namespace: str, name: str, body: Raw) -> Raw:
        """A merge patch of the object; `body.metadata` carries `uid` and `resourceVersion`."""

    async def patch_status(self, namespace: str, name: str, body: Raw) -> Raw:
        """A merge patch of the status subresource; `body.metadata` carries `uid` and `resourceVersion`."""

    async def delete(self, namespace: str, name: str, *, uid: str) -> None:
        """Deletes the object, with its UID as precondition."""


class ShimPort(Protocol):
    """One node's shim: wire.client.ShimClient. Raises wire.errors.ShimError."""

    async def create(self, owner: OwnerKey, config: node_pb2.SandboxConfig, /) -> Any: ...

    async def start(self, owner: OwnerKey, /) -> Any: ...

    async def stop(self, owner: OwnerKey, grace_seconds: int, /) -> Any: ...

    async def shutdown(self, owner: OwnerKey, /) -> Any: ...

    async def status(self, owner: OwnerKey, /) -> node_pb2.SandboxRecord: ...

    async def pause(self, owner: OwnerKey, /) -> Any: ...

    async def resume(self, owner: OwnerKey, /) -> Any: ...


class NodesPort(Protocol):
    """All nodes, as of their last word. Only `gone` does I/O."""

    @property
    def mass_outage(self) -> bool:
        """So many nodes are unreachable at once that no remedy should be applied."""

    def view(self, name: str) -> NodeView | None:
        """The node, or None where the cache has no such SandboxNode (`gone` says whether that is the
        truth)."""

    def views(self) -> tuple[NodeView, ...]:
        """Every node."""

    def record(self, node: str, sandbox_id: str) -> RecordView:
        """What the node last said of a sandbox. Absent only where a relist since the last stream error has no
        such sandbox; it may be older than our last call. Unknown while the node is unreachable or not listed
        yet."""

    def holdings(self, uid: str) -> tuple[tuple[str, node_pb2.SandboxRecord], ...]:
        """Every record of this owner UID, with the node that has it."""

    def client(self, name: str) -> ShimPort | None:
        """The node's client; None for a node that is not known."""

    async def gone(self, name: str) -> bool:
        """A live read: the SandboxNode does not exist. Raises KubeError."""


class StorePort(Protocol):
    """The informer's cache of Sandbox objects."""

    def get(self, key: Key) -> Raw | None:
        """The object with this namespace, name and UID, as the watch last gave it."""

    def items(self) -> Iterable[Raw]:
        """All of them."""

    def remove(self, key: Key) -> bool:
        """Drops an object that is known to be gone before the watch says so; returns whether it was there."""


class RecorderPort(Protocol):
    """Events (events.k8s.io/v1), aggregated and posted in the background: `event` returns at once, raises
    nothing."""

    def event(
        self,
        obj: Mapping[str, Any],
        type: Literal["Normal", "Warning"],  # noqa: A002 - the API's word
        reason: str,
        action: str,
        note: str,
    ) -> None: ...


class MetricsPort(Protocol):
    """Counters; none of these raises."""

    def reconciled(self, result: str, seconds: float) -> None:
        """A pass ended: `result` is success, requeue, conflict, gone or error."""

    def shim_call(self, node: str, method: str, result: str, seconds: float) -> None:
        """A call to a shim ended: `result` is OK or the gRPC code's name."""

    def api_write(self, what: str) -> None:
        """A write to the API server was sent: metadata, status, delete."""

    def stage(self, stage: str, seconds: float) -> None:
        """A stage on the way from apply to Ready took so long: assign, create, start, status; and, from the
        first pass to the write that said Ready, ready."""


class NoMetrics:
    """Counts nothing."""

    def reconciled(self, result: str, seconds: float) -> None: ...

    def shim_call(self, node: str, method: str, result: str, seconds: float) -> None: ...

    def api_write(self, what: str) -> None: ...

    def stage(self, stage: str, seconds: float) -> None: ...
