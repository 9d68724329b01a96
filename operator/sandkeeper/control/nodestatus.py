"""What a SandboxNode's status says: computed from the node's line, written only when it changed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from sandkeeper.api import (
    READY,
    Condition,
    NodeResources,
    RuntimeStatus,
    SandboxNodeStatus,
    format_bytes,
    format_cpu_millis,
    set_condition,
)
from sandkeeper.control import nodelink
from sandkeeper.control.nodelink import NodeLink
from sandkeeper.control.ports import Conflict, Gone, Raw, Rejected
from sandkeeper.wire import node_pb2

log = logging.getLogger(__name__)

COUNT_EVERY = 30.0
_MESSAGE_MAX = 1024
_TEXT_MAX = 256


def node_status(body: Raw, link: NodeLink, sandboxes: int, now: datetime) -> SandboxNodeStatus:
    """The status that a SandboxNode should have now. Pure.

    While the shim does not answer, what it last said of itself stays (from the object, after an operator's
    restart), and Ready says that it is old news.
    """
    old = SandboxNodeStatus.model_validate(body.get("status") or {})
    ready, reason, message = _ready(link)
    generation = body["metadata"].get("generation") or 0
    conditions = set_condition(
        old.conditions, READY, ready, reason, message[:_MESSAGE_MAX], now=now, observed_generation=generation
    )
    if not link.info.node_name:
        return old.model_copy(
            update={"observed_generation": generation, "conditions": conditions, "sandboxes": sandboxes}
        )
    info = link.info
    return SandboxNodeStatus(
        observed_generation=generation,
        conditions=conditions,
        engine=info.engine[:_TEXT_MAX],
        runtimes=_runtimes(info),
        default_runtime=info.default_runtime[:_TEXT_MAX],
        capacity=_amounts(info.capacity),
        allocatable=_amounts(info.allocatable),
        sandboxes=sandboxes,
        version=info.version[:_TEXT_MAX],
        boot_id=info.boot_id[:_TEXT_MAX],
    )


def _ready(link: NodeLink) -> tuple[Any, str, str]:
    if link.reachable:
        if not any(runtime.ready for runtime in link.info.runtimes):
            return "False", "NoRuntime", "no runtime of this node could start a container"
        return "True", nodelink.READY, "the shim answers"
    if link.reason == nodelink.IDENTITY_MISMATCH:
        return "False", link.reason, link.message
    return "Unknown", link.reason, link.message


# What a shim says comes from another machine: it is cut to the schema's bounds, or nothing could be written.
def _runtimes(info: node_pb2.InfoResponse) -> tuple[RuntimeStatus, ...]:
    named = {runtime.name: runtime for runtime in info.runtimes if 0 < len(runtime.name) <= 63}
    return tuple(
        RuntimeStatus(
            name=runtime.name,
            version=runtime.version[:_TEXT_MAX],
            ready=runtime.ready,
            message=runtime.message[:_MESSAGE_MAX],
        )
        for runtime in list(named.values())[:32]
    )


def _amounts(amount: node_pb2.NodeResources) -> NodeResources:
    return NodeResources(
        cpu=format_cpu_millis(_within(amount.cpu_millis, 10**9)),
        memory=format_bytes(_within(amount.memory_bytes, 2**60)),
        pids=_within(amount.pids, 2**53 - 1),
        sandboxes=_within(amount.sandboxes, 2**31 - 1),
    )


def _within(number: int, most: int) -> int:
    return min(max(number, 0), most)


def _dump(status: SandboxNodeStatus) -> Raw:
    return status.model_dump(by_alias=True, mode="json", exclude_none=True)


class _Nodes(Protocol):
    def links(self) -> Any: ...
    def body(self, name: str) -> Raw | None: ...


class _Kube(Protocol):
    async def patch_node_status(self, name: str, body: Raw) -> Raw: ...


class NodeStatusWriter:
    """The worker of a queue of node names: brings one node's status up to date."""

    def __init__(
        self,
        nodes: _Nodes,
        kube: _Kube,
        count_on: Callable[[str], int],
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nodes = nodes
        self._kube = kube
        self._count_on = count_on
        self._clock = clock
        self._monotonic = monotonic
        self._written: dict[str, tuple[str, Raw, float]] = {}  # uid, what was written, when

    async def write(self, name: str) -> float | None:
        """Write the status of `name` if it differs from what is there. Returns when to look again."""
        body, link = self._nodes.body(name), self._nodes.links().get(name)
        if body is None or link is None or not link.tried.is_set():
            return None
        uid = body["metadata"]["uid"]
        written = self._written.get(name)
        if written is not None and written[0] == uid:
            # Our own last write may be newer than what the watch has shown.
            body = {**body, "status": written[1]}
        before = body.get("status") or {}
        after = _dump(node_status(body, link, self._count_on(name), self._clock()))
        if after == before:
            return None
        if written is not None and {**after, "sandboxes": before.get("sandboxes")} == before:
            wait = written[2] + COUNT_EVERY - self._monotonic()
            if wait > 0:
                return wait
        # A merge patch takes nothing away by itself: what is gone must be there as null.
        gone = {key: None for key in before if key not in after}
        patch = {"metadata": {"uid": uid}, "status": {**after, **gone}}
        try:
            answer = await self._kube.patch_node_status(name, patch)
        except Rejected as error:
            log.error("The API server takes no status of a node", extra={"node": name, "error": str(error)})
            return COUNT_EVERY
        except (Gone, Conflict):
            # Another object by now, or none: the watch tells.
            self._written.pop(name, None)
            return None
        self._written[name] = (uid, answer.get("status") or {}, self._monotonic())
        return None


def ready_condition(body: Raw) -> Condition | None:
    """The Ready condition of a SandboxNode object, for tests and the command line."""
    status = SandboxNodeStatus.model_validate(body.get("status") or {})
    return next((condition for condition in status.conditions if condition.type == READY), None)
