"""What the operator touches: one function per effect, named after the API write or the RPC that it is.

Every one is idempotent, and may be cut off anywhere: the next pass does it again. Writes to the API carry UID
and resourceVersion, so one that was decided on an older object is refused. Calls to a shim carry UID and
instance.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from sandkeeper.api import ASSIGNMENT_ANNOTATION, FINALIZER
from sandkeeper.control.desired import owner_key, sandbox_config
from sandkeeper.control.observation import Absent, Assignment, Observation, Present, RecordView
from sandkeeper.control.ports import KubePort, MetricsPort, NodesPort, Raw, ShimPort
from sandkeeper.control.rules import FENCED
from sandkeeper.wire import node_pb2
from sandkeeper.wire.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ShimError,
    Unimplemented,
)
from sandkeeper.wire.ids import OwnerKey

log = logging.getLogger(__name__)

# A call to a shim that takes longer is waited for beside the other passes.
SLOW = 0.5

# Of a client's errors these say that the call had no effect, and that the same call never will.
DEFINITE = (AlreadyExists, FailedPrecondition, InvalidArgument, Unimplemented)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a call to a shim: what the node now says, or why it refused, or what may pass."""

    record: RecordView | None = None
    # (reason, message): the shim will not do it, and would not the next time.
    refusal: tuple[str, str] | None = None
    # It failed, and may work later; whether it had its effect may be unknown.
    trouble: str = ""


# Writes to the API


async def assign(kube: KubePort, metrics: MetricsPort, raw: Raw, assignment: Assignment) -> Raw:
    """Metadata: finalizer and assignment in one write, before the node hears of the instance."""
    patch: dict[str, Any] = {"annotations": {ASSIGNMENT_ANNOTATION: assignment.dump()}}
    finalizers = raw["metadata"].get("finalizers") or []
    # The API server takes no new finalizers on an object that is being deleted.
    if FINALIZER not in finalizers and not raw["metadata"].get("deletionTimestamp"):
        patch["finalizers"] = [*finalizers, FINALIZER]
    return await _patch_metadata(kube, metrics, raw, patch)


async def release(kube: KubePort, metrics: MetricsPort, raw: Raw) -> Raw:
    """Metadata: our finalizer off."""
    finalizers = [name for name in raw["metadata"].get("finalizers") or [] if name != FINALIZER]
    return await _patch_metadata(kube, metrics, raw, {"finalizers": finalizers})


async def delete(kube: KubePort, metrics: MetricsPort, raw: Raw) -> None:
    """The object, if it is still the one with this UID."""
    metadata = raw["metadata"]
    metrics.api_write("delete")
    await kube.delete(metadata["namespace"], metadata["name"], uid=metadata["uid"])


async def write_status(kube: KubePort, metrics: MetricsPort, raw: Raw, patch: Raw) -> Raw:
    """Status: a merge patch of what differs."""
    metadata = raw["metadata"]
    metrics.api_write("status")
    return await kube.patch_status(
        metadata["namespace"], metadata["name"], {"metadata": _identity(raw), "status": patch}
    )


async def _patch_metadata(kube: KubePort, metrics: MetricsPort, raw: Raw, patch: dict[str, Any]) -> Raw:
    metadata = raw["metadata"]
    metrics.api_write("metadata")
    return await kube.patch_metadata(
        metadata["namespace"], metadata["name"], {"metadata": {**_identity(raw), **patch}}
    )


def _identity(raw: Raw) -> dict[str, str]:
    return {key: raw["metadata"][key] for key in ("uid", "resourceVersion")}


# Calls to a shim


@dataclass(frozen=True, slots=True)
class Node:
    """One assigned instance and the shim to ask about it. `aside` is called when a call to it is slow."""

    name: str
    shim: ShimPort
    owner: OwnerKey
    nodes: NodesPort
    metrics: MetricsPort
    aside: Callable[[], None] = lambda: None

    async def call(self, method: str, made: Awaitable[Any]) -> Any:
        """`made`, measured. Raises ShimError."""
        began, result = time.perf_counter(), "OK"
        slow = asyncio.get_running_loop().call_later(SLOW, self.aside)
        try:
            return await made
        except ShimError as error:
            result = type(error).__name__
            raise
        finally:
            slow.cancel()
            self.metrics.shim_call(self.name, method, result, time.perf_counter() - began)


def node_of(o: Observation, nodes: NodesPort, metrics: MetricsPort, aside: Callable[[], None]) -> Node | None:
    """The assigned node's shim; None where there is none to ask. `aside`: see Node."""
    if o.assignment is None:
        return None
    shim = nodes.client(o.assignment.node)
    if shim is None:
        return None
    return Node(o.assignment.node, shim, owner_key(o, o.assignment), nodes, metrics, aside)


async def status(node: Node) -> Outcome:
    """Status: what the node has now. NOT_FOUND proves that it has nothing."""
    try:
        record = await node.call("Status", node.shim.status(node.owner))
    except NotFound:
        return Outcome(record=Absent(proven=True))
    except ShimError as error:
        return _failed(error)
    return Outcome(record=Present(record))


async def start(node: Node, o: Observation) -> Outcome:
    """Create, then Start. Where either fails, the node's own record says what that means, if it has one."""
    if o.assignment is None:
        raise ValueError("only an assigned instance can be started")
    config = sandbox_config(o, o.assignment)
    began = time.perf_counter()
    try:
        await node.call("Create", node.shim.create(node.owner, config))
        node.metrics.stage("create", time.perf_counter() - began)
        began = time.perf_counter()
        pid = await node.call("Start", node.shim.start(node.owner))
        node.metrics.stage("start", time.perf_counter() - began)
    except ShimError as error:
        return await _explain_failed_start(node, error)
    seen = node.nodes.record(node.name, node.owner.sandbox_id)
    # The Watch stream is often as quick as the answer; then its record saves a call.
    if isinstance(seen, Present) and _running(seen.record) and seen.record.pid == pid:
        return Outcome(record=seen)
    return await status(node)


async def _explain_failed_start(node: Node, error: ShimError) -> Outcome:
    if isinstance(error, InvalidArgument):
        return Outcome(refusal=("InvalidSpec", error.message))
    known = await status(node)
    if isinstance(known.record, Present):
        # Something that is ready for Start and was not started: the error has the word, not the record.
        told = isinstance(error, AlreadyExists) or not _ready_for_start(known.record.record)
        return known if told else _failed(error)
    if isinstance(known.record, Absent) and isinstance(error, FailedPrecondition):
        # It has no record of this instance and refuses to make one: it has seen a newer one.
        return Outcome(refusal=(FENCED, error.message))
    return known if known.refusal else _failed(error)


def _running(record: node_pb2.SandboxRecord) -> bool:
    return record.state == node_pb2.STATE_RUNNING


def _ready_for_start(record: node_pb2.SandboxRecord) -> bool:
    return record.state in (node_pb2.STATE_CREATED, node_pb2.STATE_UNSPECIFIED)


async def pause(node: Node) -> Outcome:
    """Pause, then what the node says."""
    return await _change(node, "Pause", node.shim.pause(node.owner))


async def resume(node: Node) -> Outcome:
    """Resume, then what the node says."""
    return await _change(node, "Resume", node.shim.resume(node.owner))


async def stop(node: Node, grace_seconds: int) -> Outcome:
    """Stop: SIGTERM, SIGKILL after the grace period; then how it ended."""
    return await _change(node, "Stop", node.shim.stop(node.owner, grace_seconds))


async def shutdown(node: Node, grace_seconds: int | None) -> Outcome:
    """Shutdown: nothing of the instance is left. NOT_FOUND says that nothing was there.

    What runs is stopped first: the grace period of today's spec may differ from that which the shim was told.
    """
    try:
        if grace_seconds is not None:
            await node.call("Stop", node.shim.stop(node.owner, grace_seconds))
        await node.call("Shutdown", node.shim.shutdown(node.owner))
    except NotFound:
        pass
    except ShimError as error:
        return _failed(error)
    return Outcome(record=Absent(proven=True))


async def _change(node: Node, method: str, made: Awaitable[Any]) -> Outcome:
    try:
        await node.call(method, made)
    except NotFound:
        return Outcome(record=Absent(proven=True))
    except FailedPrecondition as error:
        # It is not in a state for this: the record tells which. If it still is, nothing changes by itself.
        known = await status(node)
        return known if known.record is not None else _failed(error)
    except ShimError as error:
        return _failed(error)
    return await status(node)


def _failed(error: ShimError) -> Outcome:
    if isinstance(error, Unimplemented):
        return Outcome(refusal=("Unsupported", f"the node's shim cannot do this: {error.message}"))
    if isinstance(error, DEFINITE):
        return Outcome(refusal=("Refused", error.message))
    return Outcome(trouble=f"{type(error).__name__}: {error.message}")
