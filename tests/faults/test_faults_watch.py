"""F8: watch events are lost, repeated, late, in another order, or old."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tests.cluster import eventually
from tests.faults.network import Network, Trial, broken_network, running, sandbox
from tests.faults.oracle import wanted
from tests.faults.workload import RUNNING, Workload
from tests.histories import Object

pytestmark = [pytest.mark.cluster, pytest.mark.fault("F8")]
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


@pytest.mark.parametrize(
    "kind", ["", *(pytest.param(kind, marks=THOROUGH) for kind in ("ADDED", "MODIFIED", "DELETED"))]
)
def test_events_that_never_come_are_made_up_for(trial: Trial, kind: str) -> None:
    work = Workload(trial)
    work.begin()
    dropped = trial.network.api.drop(type=kind)
    work.go_on()
    work.assert_right()
    assert dropped.met > 0


@THOROUGH
def test_events_that_come_three_times_do_no_more_than_once(trial: Trial) -> None:
    repeated = trial.network.api.repeat()
    work = Workload(trial)
    work.begin()
    work.go_on()
    work.assert_right()
    assert repeated.met > 0


def test_events_that_come_in_the_opposite_order_lead_to_the_same_end(trial: Trial) -> None:
    work, api = Workload(trial), trial.network.api
    work.begin()
    held = api.hold()
    work.go_on()
    assert api.release(held, backwards=True) > 0
    work.assert_right()


@THOROUGH
def test_events_that_others_overtake_lead_to_the_same_end(trial: Trial) -> None:
    work, api = Workload(trial), trial.network.api
    held = [api.hold(name=name) for name in ("changes", "leaves", "comes")]
    work.begin()
    work.go_on()
    assert all(api.release(each) > 0 for each in held)
    work.assert_right()


def test_old_events_bring_nothing_back(trial: Trial) -> None:
    work, api = Workload(trial), trial.network.api
    work.begin()
    api.replay(namespace=trial.namespace)
    work.go_on()
    api.replay(namespace=trial.namespace)
    work.assert_right()
    versions = len(trial.network.objects.history(trial.namespace, "stays"))
    assert api.replay(namespace=trial.namespace) > 0
    work.assert_right()
    assert len(trial.network.objects.history(trial.namespace, "stays")) == versions


@pytest.mark.parametrize("how", ["gone", pytest.param("cut", marks=THOROUGH)])
def test_a_watch_that_ends_begins_anew_without_a_gap(trial: Trial, how: str) -> None:
    work, api = Workload(trial), trial.network.api
    work.begin()
    for _ in range(3):
        eventually(lambda: api.watches() == 1, timeout=60)
        assert getattr(api, how)() == 1
    work.go_on()
    work.assert_right()


@THOROUGH
def test_events_of_a_former_object_do_not_touch_the_one_that_has_its_name_now(trial: Trial) -> None:
    trial.make(sandbox("again"))
    trial.until("again", running)
    trial.user.delete("again")
    trial.until("again", lambda body: not body)
    trial.make(sandbox("again"))
    trial.until("again", running)
    former = trial.uid("again", 0)
    sent = trial.network.api.replay(wanted=lambda event: event["object"]["metadata"]["uid"] == former)
    assert sent > 2
    trial.oracle().assert_right({"again": RUNNING})
    assert len(trial.network.shims.lives(trial.uid("again"))) == 1


# SandboxNodes


def _patch_node(trial: Trial, **spec: object) -> None:
    change = json.dumps({"spec": spec})
    trial.network.kubectl("patch", "sandboxnode", NODE, "--type=merge", "-p", change)


def _moving(name: str) -> Object:
    """One that would start on another node, should its node be declared gone."""
    policy = {"recreate": "OnFailure", "limit": 3, "backoffSeconds": 0}
    return sandbox(name, nodeSelector={"kubernetes.io/hostname": NODE}, failurePolicy=policy)


def test_an_old_event_does_not_declare_a_node_gone_once_more(trial: Trial) -> None:
    _patch_node(trial, outOfService=True)
    _patch_node(trial, outOfService=False)
    trial.make(_moving("one"))
    trial.until("one", running)
    gone = trial.network.api.replay(
        kind="SandboxNode", wanted=lambda event: event["object"]["spec"].get("outOfService")
    )
    assert gone > 0
    trial.oracle().assert_right({"one": RUNNING})


@THOROUGH
def test_the_old_end_of_a_node_does_not_end_the_one_that_has_its_name_now(trial: Trial) -> None:
    kubectl = trial.network.kubectl
    body = json.loads(kubectl("get", "sandboxnode", NODE, "-o", "json"))
    fresh = {part: body[part] for part in ("apiVersion", "kind", "spec")}
    fresh["metadata"] = {"name": NODE, "labels": body["metadata"]["labels"]}
    kubectl("delete", "sandboxnode", NODE)
    kubectl("create", "-f", "-", input=json.dumps(fresh))
    kubectl("wait", "sandboxnode", NODE, "--for=condition=Ready", "--timeout=60s")
    trial.make(_moving("one"))
    trial.until("one", running)
    versions = len(trial.network.objects.history(trial.namespace, "one"))
    assert trial.network.api.replay(kind="SandboxNode", name=NODE, type="DELETED") > 0
    trial.oracle().assert_right({"one": RUNNING})
    assert len(trial.network.objects.history(trial.namespace, "one")) == versions


@THOROUGH
def test_a_node_whose_events_are_lost_is_found_and_let_go(trial: Trial) -> None:
    dropped = trial.network.api.drop(kind="SandboxNode")
    trial.make(sandbox("one", nodeSelector={"kubernetes.io/hostname": NODE}))
    trial.until("one", running)
    _patch_node(trial, outOfService=True)
    trial.until("one", lambda body: body["status"].get("exitReason") == "ShimLost")
    _patch_node(trial, outOfService=False)
    trial.make(sandbox("two", nodeSelector={"kubernetes.io/hostname": NODE}))
    trial.until("two", running)
    assert dropped.met > 0
    lost = wanted("Failed", "False ShimLost", exited="None ShimLost", Stalled="True")
    trial.oracle().assert_right({"one": lost, "two": RUNNING})
