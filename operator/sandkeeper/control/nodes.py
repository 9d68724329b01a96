"""All nodes: one line per SandboxNode object, and what passes ask of them."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sandkeeper.control.nodelink import IDENTITY_MISMATCH, NodeLink, Timing
from sandkeeper.control.observation import NodeView, RecordView, Resources, Unknown
from sandkeeper.control.ports import Gone, Raw, ShimPort
from sandkeeper.control.store import newer
from sandkeeper.wire import node_pb2

log = logging.getLogger(__name__)

_TOMBSTONES = 1024


@dataclass(slots=True)
class _Node:
    body: Raw
    link: NodeLink
    view: NodeView | None = None  # made anew when asked for after a change


class Nodes:
    """Implements ports.NodesPort.

    `connect(address, server_name)` makes a client; `read(name)` is a live read of a SandboxNode.
    `on_records(uids)`: look at these owners. `on_node(name)`: look at all that this node may matter to.
    `on_status(name)`: what the node's status should say may have changed.
    """

    def __init__(
        self,
        *,
        connect: Callable[[str, str], Any],
        read: Callable[[str], Any],
        timing: Timing | None = None,
        outage_fraction: float = 0.5,
        outage_min_nodes: int = 3,
        on_records: Callable[[Iterable[str]], None],
        on_node: Callable[[str], None],
        on_status: Callable[[str], None] = lambda name: None,
        observe: Callable[[str, str, str, float], None] | None = None,
    ) -> None:
        self._connect = connect
        self._read = read
        self._timing = timing or Timing()
        self._outage_fraction = outage_fraction
        self._outage_min_nodes = outage_min_nodes
        self._on_records = on_records
        self._on_node = on_node
        self._on_status = on_status
        self._observe = observe
        self._nodes: dict[str, _Node] = {}
        # UIDs of objects that are gone: an event or a LIST from before must not bring one back.
        self._gone: deque[str] = deque(maxlen=_TOMBSTONES)
        self._views: tuple[NodeView, ...] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._outage = False

    # What the watch says

    def put(self, body: Raw) -> None:
        """A SandboxNode as the API server has it, or had it: older than what is known is no news.

        Connects, and again where its address changed.
        """
        metadata = body["metadata"]
        name = metadata["name"]
        known = self._nodes.get(name)
        if metadata["uid"] in self._gone:
            return
        if known is not None and not newer(metadata["resourceVersion"], _version(known.body)):
            return
        endpoint = _endpoint(body)
        if known is not None and _endpoint(known.body) == endpoint:
            spec_changed = known.body.get("spec") != body.get("spec")
            labels_changed = known.body["metadata"].get("labels") != body["metadata"].get("labels")
            known.body = body
            if spec_changed or labels_changed:
                self._changed(name)
            return
        if known is not None:
            self._drop(known)
        log.info("Following a node", extra={"node": name, "address": endpoint[0]})
        link = NodeLink(
            name,
            lambda: self._connect(*endpoint),
            timing=self._timing,
            on_records=self._on_records,
            on_state=lambda link: self._told(name, link),
            on_resumed=lambda: self._on_node(name),
            observe=self._observe,
        )
        self._nodes[name] = _Node(body, link)
        link.start()
        self._changed(name)

    def remove(self, name: str, uid: str) -> None:
        """A SandboxNode is gone: an administrator's word that the node is. Not another that had its name."""
        self._gone.append(uid)
        node = self._nodes.get(name)
        if node is None or node.body["metadata"]["uid"] != uid:
            return
        del self._nodes[name]
        log.info("A node's object is gone", extra={"node": name})
        self._drop(node)
        self._changed(name)

    # What passes ask

    @property
    def mass_outage(self) -> bool:
        """At least `outage_min_nodes` nodes, and at least `outage_fraction` of all, are unreachable."""
        return self._outage

    def view(self, name: str) -> NodeView | None:
        """The node as seen now; None where no such SandboxNode is known."""
        node = self._nodes.get(name)
        if node is None:
            return None
        if node.view is None:
            node.view = _view(node.body, node.link)
        return node.view

    def views(self) -> tuple[NodeView, ...]:
        """Every node."""
        if self._views is None:
            self._views = tuple(view for name in self._nodes if (view := self.view(name)) is not None)
        return self._views

    def record(self, node: str, sandbox_id: str) -> RecordView:
        """What a node last said of a sandbox."""
        known = self._nodes.get(node)
        return Unknown() if known is None else known.link.record(sandbox_id)

    def holdings(self, uid: str) -> tuple[tuple[str, node_pb2.SandboxRecord], ...]:
        """Every record of this owner UID, with the node that has it."""
        return tuple(
            (name, record) for name, node in self._nodes.items() for record in node.link.holdings(uid)
        )

    def client(self, name: str) -> ShimPort | None:
        """The node's client; None for a node that is not known, or whose shim is another node's."""
        node = self._nodes.get(name)
        if node is None or node.link.reason == IDENTITY_MISMATCH:
            return None
        shim: ShimPort = node.link.client
        return shim

    async def gone(self, name: str) -> bool:
        """A live read: the SandboxNode does not exist. Raises KubeError."""
        try:
            await self._read(name)
        except Gone:
            return True
        return False

    # For the rest of the operator

    def links(self) -> Mapping[str, NodeLink]:
        """Every node's line, by name."""
        return {name: node.link for name, node in self._nodes.items()}

    def uids(self) -> dict[str, str]:
        """Every SandboxNode's UID, by name."""
        return {name: node.body["metadata"]["uid"] for name, node in self._nodes.items()}

    def body(self, name: str) -> Raw | None:
        """The SandboxNode object as the watch last gave it."""
        node = self._nodes.get(name)
        return None if node is None else node.body

    async def settled(self, seconds: float) -> bool:
        """Wait until every known node has been tried once; False where `seconds` were not enough.

        Before that nothing is known, and a pass would report nodes as lost that nobody has asked yet.
        """
        try:
            async with asyncio.timeout(seconds):
                for node in list(self._nodes.values()):
                    await node.link.tried.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop following every node."""
        nodes, self._nodes = list(self._nodes.values()), {}
        await asyncio.gather(*(node.link.stop() for node in nodes), *self._closing, return_exceptions=True)

    def _drop(self, node: _Node) -> None:
        task = asyncio.create_task(node.link.stop())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _told(self, name: str, link: NodeLink) -> None:
        node = self._nodes.get(name)
        if node is None or node.link is not link:
            return
        # Only what a pass can see makes everybody look; the words of an outage may change at will.
        before, after = node.view, _view(node.body, link)
        if before != after:
            self._changed(name)
        else:
            self._on_status(name)

    def _changed(self, name: str) -> None:
        node = self._nodes.get(name)
        if node is not None:
            node.view = None
        self._views = None
        before, self._outage = self._outage, self._many_lost()
        if self._outage and not before:
            log.error("Most nodes are unreachable: remedies are held")
        self._on_status(name)
        self._on_node(name)
        if before and not self._outage:
            log.info("The mass outage is over")
            for other in self._nodes:
                if other != name:
                    self._on_node(other)

    def _many_lost(self) -> bool:
        counted = [view for view in self.views() if not view.out_of_service]
        lost = [view for view in counted if view.settled and not view.reachable]
        return len(lost) >= self._outage_min_nodes and len(lost) >= self._outage_fraction * len(counted)


def _version(body: Raw) -> str:
    return str(body["metadata"]["resourceVersion"])


def _endpoint(body: Raw) -> tuple[str, str]:
    spec = body.get("spec") or {}
    return spec.get("address") or "", spec.get("serverName") or ""


def _view(body: Raw, link: NodeLink) -> NodeView:
    spec, info = body.get("spec") or {}, link.info
    return NodeView(
        name=link.name,
        reachable=link.reachable,
        settled=link.settled,
        unschedulable=bool(spec.get("unschedulable")),
        out_of_service=bool(spec.get("outOfService")),
        labels=body["metadata"].get("labels") or {},
        runtimes=frozenset(runtime.name for runtime in info.runtimes if runtime.ready),
        default_runtime=info.default_runtime,
        allocatable=resources(info.allocatable),
        features=frozenset(info.features),
    )


def resources(amount: node_pb2.NodeResources) -> Resources:
    """A wire amount as the core's."""
    return Resources(amount.cpu_millis, amount.memory_bytes, amount.pids, amount.sandboxes)
