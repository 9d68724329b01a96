"""What a pass sees: one frozen picture of an object, its instance, the nodes and the clock.

Everything that decides (`decide`, `placement`, `lifespan`, `status`) is a pure function of this picture, so
each rule can be read, and tested, without a cluster.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sandkeeper.api import Sandbox
from sandkeeper.wire import node_pb2
from sandkeeper.wire.ids import valid_node_name


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """What the queue carries. With the UID: a name that is used again is another object."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Resources:
    """Amounts of what a node has, or of what sandboxes may use of it."""

    cpu_millis: int = 0
    memory_bytes: int = 0
    pids: int = 0
    sandboxes: int = 0

    def __add__(self, other: Resources) -> Resources:
        return Resources(
            self.cpu_millis + other.cpu_millis,
            self.memory_bytes + other.memory_bytes,
            self.pids + other.pids,
            self.sandboxes + other.sandboxes,
        )

    def __sub__(self, other: Resources) -> Resources:
        return Resources(
            self.cpu_millis - other.cpu_millis,
            self.memory_bytes - other.memory_bytes,
            self.pids - other.pids,
            self.sandboxes - other.sandboxes,
        )


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where which instance of an object runs: written to the object *before* the node hears of it.

    `digest` is of the part of the spec that alters the process, `runtime` the runtime that was chosen,
    `recreations` how often failurePolicy has made a new instance since the spec last changed.
    """

    uid: str
    node: str
    instance: int
    digest: str
    runtime: str
    recreations: int = 0

    def dump(self) -> str:
        """The annotation's value: compact JSON."""
        return json.dumps(
            {
                "uid": self.uid,
                "node": self.node,
                "instance": self.instance,
                "digest": self.digest,
                "runtime": self.runtime,
                "recreations": self.recreations,
            },
            separators=(",", ":"),
        )

    @classmethod
    def parse(cls, text: str | None, uid: str) -> Assignment | None:
        """The assignment that `text` holds; None where there is none that can be trusted for the object
        `uid`.

        An annotation travels with copies and restored backups of an object, so one with another UID is not
        ours; a person may edit it, so anything else than what `dump` writes is not either.
        """
        if text is None:
            return None
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(raw, dict) or raw.get("uid") != uid:
            return None
        words = [raw.get("node"), raw.get("digest"), raw.get("runtime")]
        counts = [raw.get("instance"), raw.get("recreations", 0)]
        if not all(isinstance(word, str) for word in words):
            return None
        # The status has to hold them as well: int32, and the name of a SandboxNode.
        if not all(type(count) is int and 0 <= count < 2**31 for count in counts):
            return None
        if not valid_node_name(raw["node"]) or raw["instance"] < 1:
            return None
        return cls(
            uid=uid,
            node=raw["node"],
            instance=raw["instance"],
            digest=raw["digest"],
            runtime=raw["runtime"],
            recreations=raw.get("recreations", 0),
        )

    @staticmethod
    def foreign(text: str | None, uid: str) -> bool:
        """`text` is the intact assignment of another object: it came with a copy, and says nothing of
        ours."""
        try:
            raw = json.loads(text or "")
        except (ValueError, RecursionError):
            return False
        other = raw.get("uid") if isinstance(raw, dict) else None
        return isinstance(other, str) and other != uid and Assignment.parse(text, other) is not None


@dataclass(frozen=True, slots=True)
class NodeView:
    """A SandboxNode as the operator sees it now. A node without an object has no view (None): it is gone."""

    name: str
    # The shim answers: its Watch stream is up and its last relist is not too old.
    reachable: bool
    # False from the operator's start until the node has answered or its time to answer is over: nothing is
    # known, so nothing is said of it (a restart of the operator must not turn every sandbox to Unknown).
    settled: bool = True
    unschedulable: bool = False
    # An administrator's word that the node is down for good.
    out_of_service: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    # The runtimes that were proved to work.
    runtimes: frozenset[str] = frozenset()
    default_runtime: str = ""
    # What sandboxes may use in all; a 0 means that the node sets no bound.
    allocatable: Resources = Resources()
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Present:
    """The node has this record of the instance."""

    record: node_pb2.SandboxRecord


@dataclass(frozen=True, slots=True)
class Absent:
    """The node answered, and has no record of the instance.

    `proven`: the answer was to a call made after the assignment. A list may be older than our own last
    Create.
    """

    proven: bool = False


@dataclass(frozen=True, slots=True)
class Unknown:
    """The node has not answered, or the answer is too old to build on."""


RecordView = Present | Absent | Unknown


@dataclass(frozen=True, slots=True)
class Observation:
    """All that a decision is made from. `sandbox` is the object as the API server last gave it."""

    sandbox: Sandbox
    namespace: str
    name: str
    uid: str
    generation: int
    deleting: bool
    finalizing: bool  # our finalizer is on the object
    now: datetime
    desired_digest: str
    assignment: Assignment | None = None
    # The finalizer or the status says that there was an assignment, but no trusted annotation does.
    assignment_lost: bool = False
    # Records of this UID on any node: how a lost assignment is found again.
    holdings: tuple[tuple[str, node_pb2.SandboxRecord], ...] = ()
    # The assigned node; None where there is no assignment or the node's object is gone.
    node: NodeView | None = None
    record: RecordView = Unknown()
    nodes: tuple[NodeView, ...] = ()
    # Declared limits of what else is assigned already, by node.
    load: Mapping[str, Resources] = field(default_factory=dict)
    # So many nodes are lost at once that the fault is likelier ours: no remedy is applied.
    mass_outage: bool = False
    # The name of a call to the shim that is still under way ("Start"), empty for none.
    in_flight: str = ""
    # What the last call to the shim said that no record says (reason, message).
    refusal: tuple[str, str] | None = None
    # Why the spec cannot be read at all, empty where it can.
    invalid: str = ""
    # How long this instance has run, in seconds, whatever was done to the clocks; None where that is not measured.
    ran: float | None = None
    # How long a finished instance is left on its node (its logs stay readable), in seconds.
    retention: float = 0.0
