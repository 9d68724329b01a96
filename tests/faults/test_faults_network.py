"""F6: operator and shims are cut off from each other for a while, wholly or one way."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tests.cluster import condition_of, eventually
from tests.faults.network import Network, Trial, broken_network, running, sandbox
from tests.faults.oracle import wanted
from tests.faults.workload import RUNNING, Workload
from tests.histories import Object

pytestmark = [pytest.mark.cluster, pytest.mark.fault("F6")]
THOROUGH = pytest.mark.thorough

NODE = "node-1"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with broken_network() as made:
        yield made


@pytest.fixture
def trial(network: Network) -> Iterator[Trial]:
    with network.trial() as made:
        yield made


def unreachable(body: Object) -> bool:
    ready = condition_of(body, "Ready")
    return ready["status"] == "Unknown" and ready["reason"] == "NodeUnreachable"


def test_without_a_fault_all_comes_to_the_end_that_the_other_tests_want(trial: Trial) -> None:
    work = Workload(trial)
    work.begin()
    work.go_on()
    work.assert_right()


@pytest.mark.parametrize(
    "fault",
    ["cut", pytest.param("blackhole", marks=THOROUGH), pytest.param("lose_replies", marks=THOROUGH)],
)
def test_what_changes_while_the_shims_are_out_of_reach_is_made_up_for(trial: Trial, fault: str) -> None:
    work = Workload(trial)
    work.begin()
    for line in trial.network.lines:
        getattr(line, fault)()
    work.go_on()
    for name in ("stays", "ends"):
        trial.until(name, unreachable)
    trial.network.heal()
    work.assert_right()


@THOROUGH
def test_a_line_that_breaks_again_and_again_costs_no_sandbox(trial: Trial) -> None:
    work = Workload(trial)
    work.begin()
    for _ in range(5):
        for line in trial.network.lines:
            line.cut()
            line.heal()
            eventually(lambda line=line: line.connections > 0)
    work.go_on()
    work.assert_right()


@THOROUGH
def test_only_the_sandboxes_of_the_node_that_is_cut_off_are_unknown(trial: Trial) -> None:
    trial.make(sandbox("near", nodeName="node-2"), sandbox("far", nodeName=NODE))
    started = {name: trial.until(name, running)["status"] for name in ("near", "far")}
    trial.network.line(NODE).cut()
    far = trial.until("far", unreachable)
    assert far["status"]["pid"] == started["far"]["pid"], "it may well be running"
    trial.make(sandbox("new"))
    assert trial.until("new", running)["status"]["nodeName"] == "node-2"
    trial.network.heal()
    trial.until("far", running)
    trial.oracle().assert_right({"near": RUNNING, "far": RUNNING, "new": RUNNING})
    for name, status in started.items():
        assert {field: trial.get(name)["status"][field] for field in ("pid", "startedAt", "instance")} == {
            field: status[field] for field in ("pid", "startedAt", "instance")
        }
    assert not any(unreachable(body) for body in trial.network.objects.history(trial.namespace, "near"))


@pytest.mark.parametrize("then", ["cut", pytest.param("heal", marks=THOROUGH)])
def test_a_create_whose_reply_is_lost_makes_no_second_sandbox(trial: Trial, then: str) -> None:
    line = trial.network.line(NODE)
    line.lose_replies()
    trial.make(sandbox("one", nodeName=NODE))
    trial.until("one", bool)
    eventually(lambda: trial.states("one") == ["CREATED"], timeout=60)
    getattr(line, then)()
    line.heal()
    trial.until("one", running)
    trial.oracle().assert_right({"one": RUNNING})


def test_a_deletion_waits_for_the_node_and_the_name_stays_taken(trial: Trial) -> None:
    trial.make(sandbox("one", nodeName=NODE))
    trial.until("one", running)
    trial.network.line(NODE).cut()
    trial.until("one", unreachable)
    trial.user.delete("one")
    trial.until("one", lambda body: "deletionTimestamp" in body["metadata"] and unreachable(body))
    trial.user.apply(sandbox("one", nodeName=NODE))
    assert len(trial.network.objects.uids(trial.namespace, "one")) == 1
    assert trial.states("one") == ["RUNNING"]
    trial.network.heal()
    trial.until("one", lambda body: not body)
    trial.oracle().assert_right({"one": None})


@THOROUGH
def test_a_node_that_was_declared_gone_and_comes_back_loses_the_old_instance(trial: Trial) -> None:
    policy = {"recreate": "OnFailure", "limit": 2, "backoffSeconds": 0}
    trial.make(sandbox("moves", failurePolicy=policy))
    first = trial.until("moves", running)["status"]["nodeName"]
    trial.network.line(first).cut()
    trial.until("moves", unreachable)
    try:
        _declare(trial, first, gone=True)
        moved = trial.until("moves", lambda body: body["status"].get("instance") == 2 and running(body))
        assert moved["status"]["nodeName"] != first
        assert trial.states("moves") == ["RUNNING", "RUNNING"]  # as docs/operations.md warns
        trial.network.heal()
        eventually(lambda: trial.states("moves") == ["RUNNING"], timeout=60)
    finally:
        _declare(trial, first, gone=False)
    end = wanted("Running", "True Running", instance=2, on_node="RUNNING")
    trial.oracle().assert_right({"moves": end}, copies=True)


def _declare(trial: Trial, node: str, *, gone: bool) -> None:
    change = json.dumps({"spec": {"outOfService": gone}})
    trial.network.kubectl("patch", "sandboxnode", node, "--type=merge", "-p", change)
