"""Garbage: what a node has and no object owns. It is shut down, after being sure.

Sure means: the owner's UID is unknown to the cache, has been for a minimum age by our own clock, and a live
read by name finds no object with that UID. An instance that its own object has moved on from (a node that
came back after it was declared gone) is garbage too.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sandkeeper.api import ASSIGNMENT_ANNOTATION
from sandkeeper.control.nodelink import NodeLink
from sandkeeper.control.observation import Assignment, Key
from sandkeeper.control.ports import Gone, KubeError, Raw
from sandkeeper.logs import bound
from sandkeeper.wire import node_pb2
from sandkeeper.wire.errors import NotFound, ShimError
from sandkeeper.wire.ids import OwnerKey

log = logging.getLogger(__name__)


class _Store(Protocol):
    def by_uid(self, uid: str) -> Key | None: ...
    def get(self, key: Key) -> Raw | None: ...


class _Nodes(Protocol):
    def links(self) -> Mapping[str, NodeLink]: ...


class _Kube(Protocol):
    async def get(self, namespace: str, name: str) -> Raw: ...


class _Metrics(Protocol):
    def garbage(self, outcome: str) -> None: ...


class GarbageCollector:
    """`sweep` is called at intervals, never two at once. `namespaces`: those that are ours; empty: all."""

    def __init__(
        self,
        store: _Store,
        nodes: _Nodes,
        kube: _Kube,
        metrics: _Metrics,
        *,
        min_age: float,
        namespaces: tuple[str, ...] = (),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._nodes = nodes
        self._kube = kube
        self._metrics = metrics
        self._min_age = min_age
        self._namespaces = frozenset(namespaces)
        self._monotonic = monotonic
        self._suspects: dict[tuple[str, str], float] = {}  # (node, sandbox id), since when

    async def sweep(self) -> int:
        """Look at every reachable node once; returns how many sandboxes were shut down. Raises nothing."""
        seen: set[tuple[str, str]] = set()
        removed = 0
        for node, link in list(self._nodes.links().items()):
            if not link.reachable:
                # Not looked at is not innocent: the clock of its suspects runs on.
                seen |= {suspect for suspect in self._suspects if suspect[0] == node}
                continue
            for record in link.records():
                if not self._suspicious(node, record):
                    continue
                suspect = (node, record.sandbox_id)
                seen.add(suspect)
                since = self._suspects.setdefault(suspect, self._monotonic())
                if self._monotonic() - since >= self._min_age:
                    removed += await self._collect(node, link, record)
        self._suspects = {suspect: since for suspect, since in self._suspects.items() if suspect in seen}
        return removed

    def _suspicious(self, node: str, record: node_pb2.SandboxRecord) -> bool:
        owner = record.owner
        if not owner.uid or not owner.namespace or not owner.name or owner.instance < 1:
            return False  # containerd's, or somebody else's: not ours to judge
        if self._namespaces and owner.namespace not in self._namespaces:
            return False
        key = self._store.by_uid(owner.uid)
        body = self._store.get(key) if key is not None else None
        return body is None or _superseded(body, record)

    async def _collect(self, node: str, link: NodeLink, record: node_pb2.SandboxRecord) -> int:
        owner = OwnerKey(record.owner.namespace, record.owner.name, record.owner.uid, record.owner.instance)
        try:
            if await self._owned(record):
                self._suspects.pop((node, record.sandbox_id), None)
                return 0
            with bound(namespace=owner.namespace, name=owner.name, uid=owner.uid, node=node):
                log.warning("Shutting down a sandbox that nothing owns", extra={"instance": owner.instance})
            with contextlib.suppress(NotFound):
                await link.client.shutdown(owner)
        except (KubeError, ShimError) as error:
            self._metrics.garbage("failed")
            log.info("Garbage was left for the next sweep", extra={"node": node, "error": str(error)})
            return 0
        self._metrics.garbage("removed")
        return 1

    async def _owned(self, record: node_pb2.SandboxRecord) -> bool:
        try:
            body = await self._kube.get(record.owner.namespace, record.owner.name)
        except Gone:
            return False
        return body["metadata"]["uid"] == record.owner.uid and not _superseded(body, record)


def _superseded(body: Raw, record: node_pb2.SandboxRecord) -> bool:
    metadata: dict[str, Any] = body["metadata"]
    text = (metadata.get("annotations") or {}).get(ASSIGNMENT_ANNOTATION)
    assignment = Assignment.parse(text, metadata["uid"])
    return assignment is not None and assignment.instance > record.owner.instance
