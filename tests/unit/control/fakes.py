"""A world in memory: an API server, nodes with shims, and the caches over them. They keep the promises that the
real ones make (resourceVersion and 409, finalizers, fencing, NOT_FOUND after Shutdown) and can be told to break."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sandkeeper.control.observation import Absent, Key, NodeView, Present, RecordView, Resources, Unknown
from sandkeeper.control.ports import Conflict, Gone, KubeError, Raw
from sandkeeper.control.reconciler import Reconciler
from sandkeeper.wire import node_pb2
from sandkeeper.wire.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable
from sandkeeper.wire.ids import OwnerKey

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
SPEC: Raw = {"containers": [{"name": "main", "image": "busybox:1.37"}]}
# What the CRD's schema puts there (DESIGN.md, section 3).
DEFAULT_STATUS: Raw = {
    "observedGeneration": 0,
    "conditions": [
        {
            "type": "Ready",
            "status": "Unknown",
            "reason": "Pending",
            "message": "Waiting for the operator",
            "lastTransitionTime": "1970-01-01T00:00:00Z",
        }
    ],
}


@dataclass
class Clock:
    """The operator's. `ahead`: how far it was set to another time; a node's has its own."""

    ticks: float = 0.0
    ahead: float = 0.0

    @property
    def now(self) -> datetime:
        return EPOCH + timedelta(seconds=self.ticks + self.ahead)

    def __call__(self) -> datetime:
        return self.now

    def monotonic(self) -> float:
        return self.ticks

    def advance(self, seconds: float) -> None:
        self.ticks += seconds


@dataclass
class NodeClock:
    of: Clock
    ahead: float = 0.0

    def __call__(self) -> datetime:
        return EPOCH + timedelta(seconds=self.of.ticks + self.ahead)


class FakeKube:
    """ports.KubePort. `faults`: what the next writes meet: "before" fails without effect, "after" with it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.objects: dict[tuple[str, str], Raw] = {}
        self.versions = itertools.count(1)
        self.uids = itertools.count(1)
        self.writes: list[str] = []
        self.reads = 0
        self.faults: list[str] = []
        self.history: list[Raw] = []

    def create(self, name: str = "a", spec: Raw | None = None, **metadata: Any) -> Key:
        uid = f"uid{next(self.uids)}"
        raw = {
            "metadata": {
                "namespace": "default",
                "name": name,
                "uid": uid,
                "generation": 1,
                "resourceVersion": str(next(self.versions)),
                "creationTimestamp": self.clock().isoformat(),
                **metadata,
            },
            "spec": copy.deepcopy(spec or SPEC),
            "status": copy.deepcopy(DEFAULT_STATUS),
        }
        self._store(raw)
        return Key("default", name, uid)

    def edit(self, key: Key, **changes: Any) -> None:
        """A user's change of spec fields."""
        raw = copy.deepcopy(self.of(key))
        raw["spec"] = {k: v for k, v in {**raw["spec"], **changes}.items() if v is not None}
        raw["metadata"]["generation"] += 1
        self._bump(raw)

    def annotate(
        self, key: Key, annotations: Mapping[str, str] | None, finalizers: list[str] | None = None
    ) -> None:
        raw = copy.deepcopy(self.of(key))
        raw["metadata"].pop("annotations", None)
        if annotations is not None:
            raw["metadata"]["annotations"] = dict(annotations)
        if finalizers is not None:
            raw["metadata"]["finalizers"] = finalizers
        self._bump(raw)

    def mark_deleted(self, key: Key) -> None:
        raw = copy.deepcopy(self.of(key))
        if not raw["metadata"].get("finalizers"):
            del self.objects[(key.namespace, key.name)]
            return
        raw["metadata"].setdefault("deletionTimestamp", self.clock().isoformat())
        self._bump(raw)

    def of(self, key: Key) -> Raw:
        raw = self.objects.get((key.namespace, key.name))
        if raw is None or raw["metadata"]["uid"] != key.uid:
            raise Gone("gone")
        return raw

    def exists(self, key: Key) -> bool:
        raw = self.objects.get((key.namespace, key.name))
        return raw is not None and raw["metadata"]["uid"] == key.uid

    async def get(self, namespace: str, name: str) -> Raw:
        self.reads += 1
        raw = self.objects.get((namespace, name))
        if raw is None:
            raise Gone("gone")
        return copy.deepcopy(raw)

    async def patch_metadata(self, namespace: str, name: str, body: Raw) -> Raw:
        return self._write("metadata", namespace, name, body)

    async def patch_status(self, namespace: str, name: str, body: Raw) -> Raw:
        return self._write("status", namespace, name, body)

    async def delete(self, namespace: str, name: str, *, uid: str) -> None:
        self._fault("before")
        self.writes.append("delete")
        raw = self.objects.get((namespace, name))
        if raw is None:
            raise Gone("gone")
        if raw["metadata"]["uid"] != uid:
            raise Conflict("another UID")
        self.mark_deleted(Key(namespace, name, uid))
        self._fault("after")

    def _write(self, what: str, namespace: str, name: str, body: Raw) -> Raw:
        self._fault("before")
        raw = self.objects.get((namespace, name))
        if raw is None:
            raise Gone("gone")
        for field_ in ("uid", "resourceVersion"):
            if body["metadata"][field_] != raw["metadata"][field_]:
                raise Conflict(f"{field_} differs")
        self.writes.append(what)
        raw = copy.deepcopy(raw)
        merged = merge(raw, body)
        # Each subresource takes only its own part.
        if what == "status":
            raw["status"] = merged.get("status")
        else:
            for field_ in ("annotations", "finalizers"):
                raw["metadata"][field_] = merged["metadata"].get(field_)
        self._bump(raw)
        result = copy.deepcopy(raw)
        if raw["metadata"].get("deletionTimestamp") and not raw["metadata"].get("finalizers"):
            del self.objects[(namespace, name)]
        self._fault("after")
        return result

    def _fault(self, when: str) -> None:
        if self.faults and self.faults[0] == when:
            self.faults.pop(0)
            raise KubeError(f"injected {when}")
        if when == "before" and self.faults and self.faults[0] == "none":
            self.faults.pop(0)

    def _bump(self, raw: Raw) -> None:
        raw["metadata"]["resourceVersion"] = str(next(self.versions))
        self._store(raw)

    def _store(self, raw: Raw) -> None:
        self.objects[(raw["metadata"]["namespace"], raw["metadata"]["name"])] = raw
        self.history.append(copy.deepcopy(raw))


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


class FakeStore:
    """ports.StorePort over a FakeKube: up to date, or frozen at what it held when `freeze` was called."""

    def __init__(self, kube: FakeKube) -> None:
        self.kube = kube
        self.frozen: dict[tuple[str, str], Raw] | None = None
        self.removed: set[Key] = set()

    def freeze(self) -> None:
        self.frozen = copy.deepcopy(self.kube.objects)

    def thaw(self) -> None:
        self.frozen = None

    def remove(self, key: Key) -> bool:
        self.removed.add(key)
        return True

    def get(self, key: Key) -> Raw | None:
        if key in self.removed:
            return None
        objects = self.kube.objects if self.frozen is None else self.frozen
        raw = objects.get((key.namespace, key.name))
        return copy.deepcopy(raw) if raw is not None and raw["metadata"]["uid"] == key.uid else None

    def items(self) -> Iterable[Raw]:
        return list((self.kube.objects if self.frozen is None else self.frozen).values())


@dataclass
class FakeShim:
    """ports.ShimPort, as docs/contract.md has it. `faults[method]`: "before", "after" (reply lost), "none"."""

    clock: NodeClock
    calls: list[str] = field(default_factory=list)
    records: dict[str, node_pb2.SandboxRecord] = field(default_factory=dict)
    fences: dict[str, int] = field(default_factory=dict)
    starts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[str | Exception]] = field(default_factory=dict)
    # Records of new sandboxes stay PREPARING with this reason.
    preparing: str = ""
    failing: str = ""
    # How a stopped process exits.
    pids: Any = field(default_factory=lambda: itertools.count(100))

    def _fault(self, method: str, when: str) -> None:
        queue = self.faults.get(method)
        if not queue:
            return
        if isinstance(queue[0], Exception) and when == "before":
            raise queue.pop(0)  # type: ignore[misc]
        if queue[0] == when:
            queue.pop(0)
            raise Unavailable(f"injected {when}")
        if queue[0] == "none" and when == "before":
            queue.pop(0)

    def _find(self, owner: OwnerKey) -> node_pb2.SandboxRecord:
        record = self.records.get(owner.sandbox_id)
        if record is None:
            raise NotFound(owner.sandbox_id)
        if (record.owner.uid, record.owner.instance) != (owner.uid, owner.instance):
            raise FailedPrecondition("another owner")
        return record

    async def create(self, owner: OwnerKey, config: node_pb2.SandboxConfig) -> None:
        self.calls.append("Create")
        self._fault("create", "before")
        if owner.instance < self.fences.get(owner.uid, 0):
            raise FailedPrecondition("an older instance")
        self.fences[owner.uid] = owner.instance
        known = self.records.get(owner.sandbox_id)
        if known is not None:
            if known.digest != config.digest:
                raise AlreadyExists("another digest")
        else:
            record = node_pb2.SandboxRecord(
                sandbox_id=owner.sandbox_id,
                owner=config.owner,
                digest=config.digest,
                runtime=config.runtime,
                state=node_pb2.STATE_CREATED,
            )
            record.created_at.FromDatetime(self.clock())
            for container in config.containers:
                record.containers.add(name=container.name, state=node_pb2.CONTAINER_STATE_WAITING)
            if self.preparing:
                record.state, record.reason = node_pb2.STATE_PREPARING, self.preparing
            if self.failing:
                record.state, record.reason = node_pb2.STATE_FAILED, self.failing
            self.records[owner.sandbox_id] = record
        self._fault("create", "after")

    async def start(self, owner: OwnerKey) -> int:
        self.calls.append("Start")
        self._fault("start", "before")
        record = self._find(owner)
        if record.state == node_pb2.STATE_PREPARING:
            raise Unavailable("being prepared")
        if record.state in (node_pb2.STATE_FAILED, node_pb2.STATE_EXITED):
            raise FailedPrecondition(f"is {record.state}")
        if record.state == node_pb2.STATE_CREATED:
            self.starts[owner.sandbox_id] += 1
            record.state, record.pid = node_pb2.STATE_RUNNING, next(self.pids)
            record.started_at.FromDatetime(self.clock())
            for container in record.containers:
                container.state, container.pid = node_pb2.CONTAINER_STATE_RUNNING, next(self.pids)
        self._fault("start", "after")
        return record.pid

    async def stop(self, owner: OwnerKey, grace_seconds: int) -> None:
        self.calls.append("Stop")
        self._fault("stop", "before")
        record = self._find(owner)
        if record.state in (node_pb2.STATE_RUNNING, node_pb2.STATE_PAUSED):
            self.exit(record.sandbox_id, 143, reason="Stopped", signal=15)
        self._fault("stop", "after")

    async def shutdown(self, owner: OwnerKey) -> None:
        self.calls.append("Shutdown")
        self._fault("shutdown", "before")
        del self.records[self._find(owner).sandbox_id]
        self._fault("shutdown", "after")

    async def status(self, owner: OwnerKey) -> node_pb2.SandboxRecord:
        self.calls.append("Status")
        self._fault("status", "before")
        return copied(self._find(owner))

    async def pause(self, owner: OwnerKey) -> None:
        self.calls.append("Pause")
        self._fault("pause", "before")
        self._find(owner).state = node_pb2.STATE_PAUSED

    async def resume(self, owner: OwnerKey) -> None:
        self.calls.append("Resume")
        self._fault("resume", "before")
        self._find(owner).state = node_pb2.STATE_RUNNING

    def exit(self, sandbox_id: str, status: int, reason: str = "", signal: int = 0) -> None:
        """The sandbox's processes end."""
        record = self.records[sandbox_id]
        record.state, record.pid = node_pb2.STATE_EXITED, 0
        record.exit.status, record.exit.signal = status, signal
        record.exit.reason = reason or ("Completed" if status == 0 else "Error")
        record.exit.exited_at.FromDatetime(self.clock())

    def running(self, uid: str) -> list[str]:
        return [
            id_
            for id_, record in self.records.items()
            if record.owner.uid == uid and record.state in (node_pb2.STATE_RUNNING, node_pb2.STATE_PAUSED)
        ]


def copied(record: node_pb2.SandboxRecord) -> node_pb2.SandboxRecord:
    result = node_pb2.SandboxRecord()
    result.CopyFrom(record)
    return result


class FakeNodes:
    """ports.NodesPort over FakeShims: its cache is up to date, or what `freeze` kept."""

    def __init__(self, clock: Clock, *names: str) -> None:
        self.clock = clock
        self.shims = {name: FakeShim(NodeClock(clock)) for name in names}
        self._views = {
            name: NodeView(
                name=name,
                reachable=True,
                runtimes=frozenset({"crun", "runc"}),
                default_runtime="crun",
                allocatable=Resources(4000, 2**30, 1000, 10),
            )
            for name in names
        }
        self.mass_outage = False
        self.frozen: dict[str, dict[str, node_pb2.SandboxRecord]] | None = None

    def set(self, name: str, **changes: Any) -> None:
        from dataclasses import replace

        self._views[name] = replace(self._views[name], **changes)

    def remove(self, name: str) -> None:
        del self._views[name]

    def freeze(self) -> None:
        self.frozen = {
            name: {id_: copied(record) for id_, record in shim.records.items()}
            for name, shim in self.shims.items()
        }

    def thaw(self) -> None:
        self.frozen = None

    def view(self, name: str) -> NodeView | None:
        return self._views.get(name)

    def views(self) -> tuple[NodeView, ...]:
        return tuple(self._views.values())

    def _known(self, node: str) -> dict[str, node_pb2.SandboxRecord]:
        return self.shims[node].records if self.frozen is None else self.frozen[node]

    def record(self, node: str, sandbox_id: str) -> RecordView:
        view = self._views.get(node)
        if view is None or not view.reachable:
            return Unknown()
        record = self._known(node).get(sandbox_id)
        return Present(copied(record)) if record is not None else Absent()

    def holdings(self, uid: str) -> tuple[tuple[str, node_pb2.SandboxRecord], ...]:
        return tuple(
            (node, copied(record))
            for node, view in self._views.items()
            if view.reachable
            for record in self._known(node).values()
            if record.owner.uid == uid
        )

    def client(self, name: str) -> FakeShim | None:
        view = self._views.get(name)
        if view is None:
            return None
        shim = self.shims[name]
        return shim if view.reachable else Unreachable(shim)

    async def gone(self, name: str) -> bool:
        return name not in self._views


class Unreachable(FakeShim):
    def __init__(self, shim: FakeShim) -> None:
        super().__init__(shim.clock)

    def _fault(self, method: str, when: str) -> None:
        raise Unavailable("unreachable")


class FakeRecorder:
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def event(self, obj: Mapping[str, Any], type: str, reason: str, action: str, note: str) -> None:  # noqa: A002
        self.events.append((type, reason))


class World:
    """Everything together, with one reconciler (or more: `another`)."""

    def __init__(self, *nodes: str) -> None:
        self.clock = Clock()
        self.kube = FakeKube(self.clock)
        self.store = FakeStore(self.kube)
        self.nodes = FakeNodes(self.clock, *(nodes or ("n1",)))
        self.recorder = FakeRecorder()
        self.reconciler = self.another()

    def another(self, **options: Any) -> Reconciler:
        return Reconciler(
            options.pop("store", self.store),
            self.kube,
            self.nodes,
            self.recorder,
            None,
            self.clock,
            monotonic=self.clock.monotonic,
            **options,
        )

    @property
    def shim(self) -> FakeShim:
        return self.nodes.shims["n1"]

    async def settle(self, key: Key, passes: int = 20) -> float | None:
        """Passes until one asks for nothing at once and does nothing; the delay that it asks for."""
        for _ in range(passes):
            before = self.effects()
            wait = await self.reconciler.reconcile(key)
            if self.effects() == before:
                return wait
        raise AssertionError("does not settle")

    def effects(self) -> tuple[int, ...]:
        return (len(self.kube.writes), *(len(shim.calls) for shim in self.nodes.shims.values()))

    def status(self, key: Key) -> Raw:
        status: Raw = self.kube.of(key)["status"]
        return status

    def condition(self, key: Key, type_: str) -> tuple[str, str] | None:
        found = [c for c in self.status(key)["conditions"] if c["type"] == type_]
        return (found[0]["status"], found[0]["reason"]) if found else None
