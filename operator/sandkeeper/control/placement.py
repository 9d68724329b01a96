"""Which node, and with which runtime: a pure function of the spec and the nodes.

A node must be named by nodeName (where given), bear the labels of nodeSelector, take new sandboxes, answer,
offer the runtime, and have room for the declared limits. Of those that do, the least loaded is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sandkeeper.api import SandboxSpec
from sandkeeper.api.quantity import format_bytes, format_cpu_millis, parse_bytes, parse_cpu_millis
from sandkeeper.control.observation import NodeView, Resources

HOST_NETWORK = "HostNetwork"


@dataclass(frozen=True, slots=True)
class Placement:
    node: str
    runtime: str


@dataclass(frozen=True, slots=True)
class Unschedulable:
    """`message` as kube-scheduler words it: "0/3 nodes are available: 1 is unschedulable, 2 lack runtime
    runsc (offer crun, runc)"."""

    message: str


@dataclass(frozen=True, slots=True)
class Misfit:
    """Why a node does not do, worded for one node and for many."""

    one: str
    many: str

    def worded(self, count: int) -> str:
        return f"{count} {self.one if count == 1 else self.many}"


def declared(spec: SandboxSpec) -> Resources:
    """What the sandbox may use at most, summed over its containers; a limit that is not declared counts as
    0."""
    total = Resources(sandboxes=1)
    for container in spec.containers:
        limits = container.resources.limits
        total += Resources(
            cpu_millis=parse_cpu_millis(limits.cpu) if limits.cpu is not None else 0,
            memory_bytes=parse_bytes(limits.memory) if limits.memory is not None else 0,
            pids=limits.pids or 0,
        )
    return total


def place(
    spec: SandboxSpec,
    nodes: Iterable[NodeView],
    load: Mapping[str, Resources],
    *,
    prefer: str = "",
) -> Placement | Unschedulable:
    """The node and runtime for `spec`, given the `load` of everything else.

    The node to `prefer` is that of the instance before: it has the images.
    """
    need = declared(spec)
    misfits: Counter[Misfit] = Counter()
    best: tuple[tuple[bool, float, int, str], Placement] | None = None
    nodes = tuple(nodes)
    for node in nodes:
        used = load.get(node.name, Resources())
        misfit = unfit(spec, node, need, used)
        if misfit is not None:
            misfits[misfit] += 1
            continue
        rank = (node.name != prefer, _fullness(need, used, node.allocatable), used.sandboxes, node.name)
        if best is None or rank < best[0]:
            best = (rank, Placement(node.name, spec.runtime or node.default_runtime))
    return best[1] if best is not None else Unschedulable(_explain(spec, nodes, misfits))


def unfit(spec: SandboxSpec, node: NodeView, need: Resources, used: Resources) -> Misfit | None:
    """The first reason why `node` does not do, None where it does."""
    if not matches(spec, node):
        if spec.node_name and node.name != spec.node_name:
            return Misfit("does not match nodeName", "do not match nodeName")
        return Misfit("does not match nodeSelector", "do not match nodeSelector")
    if node.out_of_service:
        return Misfit("is out of service", "are out of service")
    if node.unschedulable:
        return Misfit("is unschedulable", "are unschedulable")
    if not node.reachable:
        return Misfit("is unreachable", "are unreachable")
    runtime = spec.runtime or node.default_runtime
    if not runtime:
        return Misfit("has no runtime that works", "have no runtime that works")
    if runtime not in node.runtimes:
        offers = ", ".join(sorted(node.runtimes)) or "none"
        return Misfit(
            f"lacks runtime {runtime} (offers {offers})", f"lack runtime {runtime} (offer {offers})"
        )
    if spec.network == "Host" and node.features and HOST_NETWORK not in node.features:
        return Misfit("does not allow network Host", "do not allow network Host")
    return _short_of(need, used, node.allocatable)


def matches(spec: SandboxSpec, node: NodeView) -> bool:
    """nodeName and nodeSelector allow the node."""
    if spec.node_name and node.name != spec.node_name:
        return False
    return all(node.labels.get(key) == value for key, value in spec.node_selector.items())


def _bounded(need: Resources, used: Resources, bound: Resources) -> Iterable[tuple[str, int, int, int]]:
    """(name, needed, used, bound) of every resource that the node bounds."""
    rows = (
        ("cpu", need.cpu_millis, used.cpu_millis, bound.cpu_millis),
        ("memory", need.memory_bytes, used.memory_bytes, bound.memory_bytes),
        ("pids", need.pids, used.pids, bound.pids),
        ("sandboxes", need.sandboxes, used.sandboxes, bound.sandboxes),
    )
    return (row for row in rows if row[3] > 0)


def _short_of(need: Resources, used: Resources, bound: Resources) -> Misfit | None:
    for name, needed, taken, limit in _bounded(need, used, bound):
        if needed > limit:
            return _too_small(name)
        # What declares no limit of a resource does not need room for it.
        if needed and taken + needed > limit:
            return Misfit(f"has insufficient {name}", f"have insufficient {name}")
    return None


def _fullness(need: Resources, used: Resources, bound: Resources) -> float:
    """How full the fullest resource would be; the count only breaks ties, it says little of the load."""
    shares = [
        (taken + needed) / limit
        for name, needed, taken, limit in _bounded(need, used, bound)
        if name != "sandboxes"
    ]
    return max(shares, default=0.0)


def _explain(spec: SandboxSpec, nodes: tuple[NodeView, ...], misfits: Counter[Misfit]) -> str:
    if not nodes:
        return "no SandboxNode exists"
    if spec.node_name and all(node.name != spec.node_name for node in nodes):
        return f"0/{len(nodes)} nodes are available: spec.nodeName {spec.node_name} does not exist"
    counts = ", ".join(
        misfit.worded(count)
        for misfit, count in sorted(misfits.items(), key=lambda item: (-item[1], item[0].one))
    )
    return f"0/{len(nodes)} nodes are available: {counts}{_most(spec, nodes, misfits)}"


def _most(spec: SandboxSpec, nodes: tuple[NodeView, ...], misfits: Counter[Misfit]) -> str:
    """What the limits of all containers may come to, where nodes are too small."""
    rooms = [node.allocatable for node in nodes if matches(spec, node)]
    rows = (
        ("cpu", format_cpu_millis, [room.cpu_millis for room in rooms]),
        ("memory", format_bytes, [room.memory_bytes for room in rooms]),
        ("pids", str, [room.pids for room in rooms]),
    )
    most = [f"{name} {write(max(bounds))}" for name, write, bounds in rows if _too_small(name) in misfits]
    return f"; the most that one has: {', '.join(most)}" if most else ""


def _too_small(resource: str) -> Misfit:
    return Misfit(f"is too small ({resource})", f"are too small ({resource})")
