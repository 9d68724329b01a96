"""Placement: which node, and the words where there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sandkeeper.api import SandboxSpec
from sandkeeper.control.ledger import Ledger
from sandkeeper.control.observation import NodeView, Resources
from sandkeeper.control.placement import Placement, Unschedulable, declared, place

N1 = NodeView(
    "n1",
    reachable=True,
    labels={"zone": "a"},
    runtimes=frozenset({"crun", "runc"}),
    default_runtime="crun",
    allocatable=Resources(2000, 2**30, 100, 2),
)
N2 = replace(N1, name="n2", labels={"zone": "b"}, runtimes=frozenset({"runc"}), default_runtime="runc")
N3 = replace(N1, name="n3")


def spec(limits: dict[str, Any] | None = None, **fields: Any) -> SandboxSpec:
    container = {"name": "main", "image": "a:1", "resources": {"limits": limits or {}}}
    return SandboxSpec.model_validate({"containers": [container], **fields})


FULL = Resources(2000, 2**30, 100, 2)


@pytest.mark.parametrize(
    ("wanted", "nodes", "load", "placed"),
    [
        (spec(), (N1, N2), {}, Placement("n1", "crun")),
        (spec(nodeName="n2"), (N1, N2), {}, Placement("n2", "runc")),
        (spec(nodeSelector={"zone": "b"}), (N1, N2), {}, Placement("n2", "runc")),
        (spec(runtime="runc"), (N1, N2), {"n1": Resources(sandboxes=1)}, Placement("n2", "runc")),
        (spec(runtime="crun"), (N1, N2), {"n1": Resources(sandboxes=1)}, Placement("n1", "crun")),
        (spec({"cpu": 1}), (N1, N3), {"n1": Resources(500, 0, 0, 1)}, Placement("n3", "crun")),
        # The fullest resource counts, not the sum.
        (
            spec({"cpu": 1, "memory": "64Mi"}),
            (N1, N3),
            {"n1": Resources(900, 0, 0, 1), "n3": Resources(0, 2**30 - 2**26, 0, 1)},
            Placement("n1", "crun"),
        ),
        # What declares nothing fits where the resource is used up.
        (spec(), (N1,), {"n1": Resources(2000, 2**30, 100, 1)}, Placement("n1", "crun")),
        # A node without bounds takes everything.
        (spec({"cpu": 64}), (replace(N1, allocatable=Resources()),), {}, Placement("n1", "crun")),
    ],
)
def test_placed(
    wanted: SandboxSpec, nodes: tuple[NodeView, ...], load: dict[str, Resources], placed: Placement
) -> None:
    assert place(wanted, nodes, load) == placed


@pytest.mark.parametrize(
    ("wanted", "nodes", "load", "why"),
    [
        (spec(), (), {}, "no SandboxNode exists"),
        (
            spec(nodeName="n9"), (N1, N2), {},
            "0/2 nodes are available: spec.nodeName n9 does not exist",
        ),
        (
            spec(nodeName="n1"), (replace(N1, unschedulable=True), N2), {},
            "0/2 nodes are available: 1 does not match nodeName, 1 is unschedulable",
        ),
        (
            spec(runtime="runsc"), (replace(N1, unschedulable=True), N2, N3, replace(N3, name="n4")), {},
            (
                "0/4 nodes are available: 2 lack runtime runsc (offer crun, runc), 1 is unschedulable,"
                " 1 lacks runtime runsc (offers runc)"
            ),
        ),
        (spec(nodeSelector={"zone": "c"}), (N1, N2), {}, "0/2 nodes are available: 2 do not match nodeSelector"),
        (spec(), (replace(N1, reachable=False),), {}, "0/1 nodes are available: 1 is unreachable"),
        (spec(), (replace(N1, out_of_service=True),), {}, "0/1 nodes are available: 1 is out of service"),
        (
            spec(), (replace(N1, default_runtime="", runtimes=frozenset()),), {},
            "0/1 nodes are available: 1 has no runtime that works",
        ),
        (
            spec({"memory": "2Gi"}), (N1, N2), {},
            "0/2 nodes are available: 2 are too small (memory); the most that one has: memory 1Gi",
        ),
        (
            spec({"cpu": 3, "pids": 101}), (N1, replace(N2, allocatable=Resources(4000, 0, 100))), {},
            (
                "0/2 nodes are available: 1 is too small (cpu), 1 is too small (pids);"
                " the most that one has: cpu 4, pids 100"
            ),
        ),
        (spec({"cpu": "1"}), (N1,), {"n1": Resources(1500)}, "0/1 nodes are available: 1 has insufficient cpu"),
        (spec({"pids": 50}), (N1,), {"n1": Resources(0, 0, 51)}, "0/1 nodes are available: 1 has insufficient pids"),
        (spec(), (N1,), {"n1": FULL}, "0/1 nodes are available: 1 has insufficient sandboxes"),
        (
            spec(network="Host"), (replace(N1, features=frozenset({"Pause"})),), {},
            "0/1 nodes are available: 1 does not allow network Host",
        ),
    ],
)  # fmt: skip
def test_unschedulable(
    wanted: SandboxSpec, nodes: tuple[NodeView, ...], load: dict[str, Resources], why: str
) -> None:
    assert place(wanted, nodes, load) == Unschedulable(why)


def test_the_node_before_is_preferred() -> None:
    assert place(spec(), (N1, N3), {"n3": Resources(sandboxes=1)}, prefer="n3") == Placement("n3", "crun")


def test_declared_sums_containers() -> None:
    two = SandboxSpec.model_validate(
        {
            "containers": [
                {"name": "a", "image": "a:1", "resources": {"limits": {"cpu": "500m", "memory": "64Mi"}}},
                {"name": "b", "image": "a:1", "resources": {"limits": {"cpu": 1, "pids": 10}}},
            ]
        }
    )
    assert declared(two) == Resources(1500, 2**26, 10, 1)


def test_ledger_counts_each_once() -> None:
    ledger = Ledger()
    ledger.enter("u", "n1", Resources(100, sandboxes=1))
    ledger.enter("u", "n1", Resources(100, sandboxes=1))
    ledger.enter("v", "n1", Resources(50, sandboxes=1))
    assert ledger.load(apart_from="") == {"n1": Resources(150, sandboxes=2)}
    assert ledger.load(apart_from="u")["n1"] == Resources(50, sandboxes=1)
    ledger.enter("u", "n2", Resources(100, sandboxes=1))
    assert ledger.load(apart_from="") == {"n1": Resources(50, sandboxes=1), "n2": Resources(100, sandboxes=1)}
    assert ledger.drop("u")
    assert not ledger.drop("u")
    assert ledger.load(apart_from="v").get("n1") == Resources()
