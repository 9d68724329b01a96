"""The whole life of Sandboxes, with real containers on each runtime that the nodes have.

On a local cluster, or on one that is installed already (tests/cluster.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster import condition_of, eventually, leaks_of, named
from tests.images import stalled
from tests.nodes import Nodes
from tests.sandboxes import Object, Sandboxes, ready

from sandkeeper.api import ASSIGNMENT_ANNOTATION, FINALIZER
from sandkeeper.localcluster.apiserver import Kubectl
from sandkeeper.localcluster.cluster import OFFLINE_IMAGE, LocalCluster
from sandkeeper.localcluster.watching import manifest

pytestmark = [pytest.mark.cluster, pytest.mark.oci]

EXAMPLES = Path(__file__).parents[2] / "examples"
FOREVER = ("sleep", "86400")
# Ends at once when it is asked to: sleep is no process 1 that ignores TERM.
OBEDIENT = ("sh", "-c", "trap 'exit 0' TERM; while true; do sleep 0.05; done")


NothingLeft = Callable[[], None]


@pytest.fixture(scope="module")
def assert_nothing_left(request: pytest.FixtureRequest, installed: Kubectl, nodes: Nodes) -> NothingLeft:
    """Raises AssertionError where the nodes have anything of a sandbox."""
    if named():  # process and mounts end before its folder does; whoever made the cluster looks closer
        return lambda: eventually(lambda: not known(installed, nodes), timeout=60)
    local: LocalCluster = request.getfixturevalue("local")

    def check() -> None:
        assert known(installed, nodes) == set()
        for index in range(len(local.nodes)):
            leaks_of(local, index).assert_none()

    return check


@pytest.fixture(scope="module", autouse=True)
def nothing_left(assert_nothing_left: NothingLeft) -> Iterator[None]:
    yield
    assert_nothing_left()


@pytest.fixture(params=["crun", "runc"])
def runtime(request: pytest.FixtureRequest, installed: Kubectl) -> str:
    name = str(request.param)
    for node in sandboxnodes(installed):
        found = next(each for each in node["status"]["runtimes"] if each["name"] == name)
        if not found["ready"]:
            pytest.skip(f"{name} on {node['metadata']['name']}: {found.get('message')}")
    return name


def sandboxnodes(kubectl: Kubectl) -> list[Object]:
    found: list[Object] = json.loads(kubectl("get", "sandboxnodes", "-o", "json"))["items"]
    return found


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


# To Ready and to the end


def test_it_becomes_ready(sandboxes: Sandboxes, nodes: Nodes, runtime: str) -> None:
    sandboxes.make("box", *FOREVER, runtime=runtime)
    sandboxes.run("wait", "sandbox/box", "--for=condition=Ready", "--timeout=60s")
    body = sandboxes.get("box")
    status = body["status"]
    assert status["phase"] == "Running"
    assert status["runtime"] == runtime
    assert status["nodeName"] in {each["metadata"]["name"] for each in sandboxnodes(sandboxes.kubectl)}
    assert (status["instance"], status["sandboxID"]) == (1, f"{body['metadata']['uid']}-1")
    assert status["containers"][0]["imageID"].startswith("sha256:")
    assert nodes.alive(status)
    assert nodes.alive(status, status["containers"][0]["pid"])
    assert condition_of(body, "Running")["status"] == "True"
    assert condition_of(body, "Finished")["status"] == "False"
    assert not condition_of(body, "Reconciling")
    assert body["metadata"]["finalizers"] == [FINALIZER]
    assert ASSIGNMENT_ANNOTATION in body["metadata"]["annotations"]


@pytest.mark.parametrize(
    ("command", "status", "number", "reason"),
    [
        (("true",), 0, None, "Completed"),
        (("sh", "-c", "exit 3"), 3, None, "Error"),
        (("tail", "/dev/zero"), 137, 9, "OOMKilled"),
    ],
)
def test_its_end_is_in_its_status(
    sandboxes: Sandboxes, runtime: str, command: tuple[str, ...], status: int, number: int | None, reason: str
) -> None:
    sandboxes.make("box", *command, memory="24Mi", runtime=runtime)
    check_end(sandboxes, sandboxes.until_finished("box"), status, number, reason)


def test_a_signal_is_told_apart(sandboxes: Sandboxes, nodes: Nodes, runtime: str) -> None:
    sandboxes.make("box", *FOREVER, runtime=runtime)
    status = sandboxes.until_ready("box")["status"]
    nodes.run(status["nodeName"], "sh", "-c", f"kill -KILL {status['containers'][0]['pid']}")
    check_end(sandboxes, sandboxes.until_finished("box"), 137, 9, "Signaled")


def check_end(sandboxes: Sandboxes, body: Object, status: int, number: int | None, reason: str) -> None:
    found = body["status"]
    assert (found["exitStatus"], found.get("exitSignal"), found["exitReason"]) == (status, number, reason)
    assert found["phase"] == ("Succeeded" if status == 0 else "Failed")
    assert condition_of(body, "Ready")["reason"] == reason
    assert ready(body) == ("True" if status == 0 else "False")
    assert condition_of(body, "Stalled").get("status") == (None if status == 0 else "True")
    assert "pid" not in found
    assert moment(found["startedAt"]) <= moment(found["exitedAt"])
    if status:
        event = sandboxes.until_event("box", reason)
        assert (event["type"], f"exit status {status}" in event["note"]) == ("Warning", True)


def test_the_end_outlives_the_instance(sandboxes: Sandboxes, nodes: Nodes) -> None:
    """It stays in the object when the node has forgotten the sandbox."""
    sandboxes.make("box", "sh", "-c", "exit 7")
    body = sandboxes.until_finished("box")
    eventually(lambda: body["status"]["sandboxID"] not in known(sandboxes.kubectl, nodes))
    assert sandboxes.status("box")["exitStatus"] == 7


def known(kubectl: Kubectl, nodes: Nodes) -> set[str]:
    """Ids of the sandboxes that the nodes have."""
    found = (nodes.sandboxes(each["metadata"]["name"]) for each in sandboxnodes(kubectl))
    return set().union(*found)


def test_the_first_to_fail_decides(sandboxes: Sandboxes) -> None:
    body = manifest("box", "true")
    first = body["spec"]["containers"][0]
    body["spec"]["containers"] = [
        {**first, "name": "fine"},
        {**first, "name": "late", "command": ["sh", "-c", "sleep 0.5; exit 5"]},
        {**first, "name": "early", "command": ["sh", "-c", "exit 4"]},
    ]
    sandboxes.apply(body)
    status = sandboxes.until_finished("box")["status"]
    assert status["exitStatus"] == 4
    assert {each["name"]: each["exitStatus"] for each in status["containers"]} == {
        "fine": 0,
        "late": 5,
        "early": 4,
    }


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_examples_do_what_they_say(sandboxes: Sandboxes, file: Path) -> None:
    ends = {
        "hello": ("Completed", 0),
        "exit3": ("Error", 3),
        "oom": ("OOMKilled", 137),
        "restart": ("Completed", 0),
    }
    for document in yaml.safe_load_all(file.read_text()):
        name = sandboxes.apply(document)
        if name in ends:
            body = sandboxes.until_finished(name)
            assert (body["status"]["exitReason"], body["status"]["exitStatus"]) == ends[name]
        else:
            body = sandboxes.until_ready(name)
            assert body["status"]["phase"] == ("Paused" if name == "paused" else "Running")


# Life span


def test_a_deadline_then_ttl_then_gone(sandboxes: Sandboxes) -> None:
    sandboxes.make(
        "box",
        *OBEDIENT,
        activeDeadlineSeconds=1,
        ttlSecondsAfterFinished=2,
        terminationGracePeriodSeconds=5,
    )
    body = sandboxes.until_finished("box")
    assert body["status"]["exitReason"] == "DeadlineExceeded"
    assert (ready(body), condition_of(body, "Ready")["reason"]) == ("False", "DeadlineExceeded")
    sandboxes.until_gone("box")


def test_shutdown_time_stops_it(sandboxes: Sandboxes, nodes: Nodes) -> None:
    sandboxes.make("box", *FOREVER, terminationGracePeriodSeconds=0)
    before = sandboxes.until_ready("box")["status"]
    now = datetime.now().astimezone() + timedelta(seconds=1)
    sandboxes.patch("box", {"spec": {"shutdownTime": now.isoformat()}})
    body = sandboxes.until_reason("box", "Stopped")
    assert (ready(body), body["status"]["phase"]) == ("True", "Stopped")
    assert not nodes.alive(before)


# Paused, Stopped, and back


def test_paused_and_back(sandboxes: Sandboxes, nodes: Nodes) -> None:
    sandboxes.make("box", "sh", "-c", "i=0; while true; do i=$((i+1)); echo $i >/count; sleep 0.01; done")
    status = sandboxes.until_ready("box")["status"]
    pid = status["containers"][0]["pid"]

    def count() -> int:
        return int(nodes.run(status["nodeName"], "cat", f"/proc/{pid}/root/count") or 0)

    sandboxes.patch("box", {"spec": {"desiredState": "Paused"}})
    body = sandboxes.until_reason("box", "Paused")
    assert (ready(body), body["status"]["phase"]) == ("True", "Paused")
    frozen = count()
    sandboxes.patch("box", {"spec": {"desiredState": "Running"}})
    body = sandboxes.until_reason("box", "Running")
    assert body["status"]["containers"][0]["pid"] == pid
    eventually(lambda: count() > frozen)


def test_stopped_and_back(sandboxes: Sandboxes, nodes: Nodes) -> None:
    sandboxes.make("box", *OBEDIENT)
    before = sandboxes.until_ready("box")["status"]
    sandboxes.patch("box", {"spec": {"desiredState": "Stopped"}})
    body = sandboxes.until_reason("box", "Stopped")
    assert (ready(body), body["status"]["phase"]) == ("True", "Stopped")
    assert body["status"]["exitReason"] == "Stopped"
    assert before["sandboxID"] not in known(sandboxes.kubectl, nodes)
    sandboxes.patch("box", {"spec": {"desiredState": "Running"}})
    body = sandboxes.until_instance("box", 2)
    assert (ready(body), body["status"]["phase"]) == ("True", "Running")
    assert "exitStatus" not in body["status"]


def test_one_that_is_stopped_from_the_start(sandboxes: Sandboxes) -> None:
    sandboxes.make("box", *FOREVER, desiredState="Stopped")
    body = sandboxes.until_ready("box")
    assert (condition_of(body, "Ready")["reason"], body["status"]["phase"]) == ("Stopped", "Stopped")
    assert body["status"].get("instance") is None


# A change of the spec


@pytest.mark.parametrize("state", ["running", "paused", "finished"])
def test_a_change_of_what_runs_replaces_the_instance(sandboxes: Sandboxes, nodes: Nodes, state: str) -> None:
    sandboxes.make("box", *(("sh", "-c", "exit 3") if state == "finished" else OBEDIENT))
    body = sandboxes.until_finished("box") if state == "finished" else sandboxes.until_ready("box")
    first = body["status"]
    if state == "paused":
        sandboxes.patch("box", {"spec": {"desiredState": "Paused"}})
        sandboxes.until_reason("box", "Paused")
        sandboxes.patch("box", {"spec": {"desiredState": "Running"}})
    changed = manifest("box", *FOREVER)
    sandboxes.apply(changed)
    second = sandboxes.until_instance("box", 2)["status"]
    assert second["sandboxID"].endswith("-2")
    assert first["sandboxID"] not in known(sandboxes.kubectl, nodes)
    if state != "finished":
        assert not nodes.alive(first)
    assert "exitStatus" not in second


def test_what_does_not_alter_the_process_replaces_nothing(sandboxes: Sandboxes) -> None:
    sandboxes.make("box", *FOREVER)
    before = sandboxes.until_ready("box")["status"]
    sandboxes.patch(
        "box",
        {
            "metadata": {"labels": {"team": "blue"}},
            "spec": {
                "terminationGracePeriodSeconds": 1,
                "activeDeadlineSeconds": 86400,
                "failurePolicy": {"recreate": "OnFailure"},
                "containers": [
                    {
                        "name": "main",
                        "image": OFFLINE_IMAGE,
                        "command": list(FOREVER),
                        "resources": {"limits": {"memory": "65536Ki"}},
                    }
                ],
            },
        },
    )
    after = sandboxes.until_ready("box")["status"]
    assert after["observedGeneration"] > before["observedGeneration"]
    assert (after["instance"], after["pid"]) == (1, before["pid"])


# Restarts and recreation


def test_on_failure_is_restarted_by_the_shim(sandboxes: Sandboxes) -> None:
    volume: dict[str, Any] = {"name": "state", "emptyDir": {}}
    body = manifest(
        "box",
        "sh",
        "-c",
        'echo >>/state/tries; test "$(wc -l </state/tries)" -ge 3',
        restartPolicy="OnFailure",
        volumes=[volume],
    )
    body["spec"]["containers"][0]["volumeMounts"] = [{"name": "state", "mountPath": "/state"}]
    sandboxes.apply(body)
    status = sandboxes.until_finished("box")["status"]
    assert (status["exitStatus"], status["instance"]) == (0, 1)
    assert status["containers"][0]["restartCount"] == 2


def test_failure_policy_recreates_up_to_its_limit(sandboxes: Sandboxes) -> None:
    policy = {"recreate": "OnFailure", "limit": 2, "backoffSeconds": 0}
    sandboxes.make("box", "sh", "-c", "exit 3", failurePolicy=policy)
    body = sandboxes.until("box", lambda body: condition_of(body, "Stalled").get("status") == "True")
    assert (body["status"]["instance"], body["status"]["recreations"]) == (3, 2)
    assert body["status"]["exitStatus"] == 3


# Deletion, in every phase


def test_delete_while_pulling(sandboxes: Sandboxes, nodes: Nodes) -> None:
    with stalled() as server:
        body = manifest("box")
        body["spec"]["containers"][0]["image"] = f"{server.host}/never/answers:1"
        sandboxes.apply(body)
        name = sandboxes.until_reason("box", "PullingImage", "ErrImagePull")["status"]["sandboxID"]
        sandboxes.delete("box")
        sandboxes.until_gone("box")
        assert name not in known(sandboxes.kubectl, nodes)


def test_delete_at_any_moment_of_the_start(sandboxes: Sandboxes, nodes: Nodes) -> None:
    """Ten that are deleted one after the other while they start: some before, some within, some after."""
    names = [f"box-{index}" for index in range(10)]
    items = [manifest(name, *OBEDIENT, terminationGracePeriodSeconds=1) for name in names]
    listed = {"apiVersion": "v1", "kind": "List", "items": items}
    sandboxes.run("apply", "-f", "-", input=json.dumps(listed))
    for name in names:
        sandboxes.delete(name)
    for name in names:
        sandboxes.until_gone(name)
    assert known(sandboxes.kubectl, nodes) == set()


@pytest.mark.parametrize("state", ["running", "paused", "finished", "stopped"])
def test_delete_leaves_nothing(
    sandboxes: Sandboxes, assert_nothing_left: NothingLeft, runtime: str, state: str
) -> None:
    command = ("true",) if state == "finished" else OBEDIENT
    sandboxes.make("box", *command, runtime=runtime)
    if state == "finished":
        sandboxes.until_finished("box")
    else:
        sandboxes.until_ready("box")
    if state in ("paused", "stopped"):
        sandboxes.patch("box", {"spec": {"desiredState": state.capitalize()}})
        sandboxes.until_reason("box", state.capitalize())
    sandboxes.delete("box")
    sandboxes.until_gone("box")
    assert_nothing_left()


def test_term_then_kill(sandboxes: Sandboxes, nodes: Nodes) -> None:
    """One that does not heed TERM is killed after its grace period, and that is not held against it."""
    sandboxes.make("box", "sh", "-c", "trap '' TERM; while true; do sleep 0.05; done",
                   terminationGracePeriodSeconds=1)  # fmt: skip
    status = sandboxes.until_ready("box")["status"]
    sandboxes.patch("box", {"spec": {"desiredState": "Stopped"}})
    body = sandboxes.until_reason("box", "Stopped")
    assert (body["status"]["exitReason"], body["status"]["exitSignal"]) == ("Stopped", 9)
    assert not nodes.alive(status, status["containers"][0]["pid"])


# Quiet


def test_a_running_one_costs_nothing(sandboxes: Sandboxes) -> None:
    """No write to the object while nothing changes, through several of the operator's relists."""
    sandboxes.make("box", *FOREVER)
    version = sandboxes.until_ready("box")["metadata"]["resourceVersion"]
    sandboxes.make("other", "sh", "-c", "sleep 3; exit 0")
    sandboxes.until_finished("other")
    assert sandboxes.get("box")["metadata"]["resourceVersion"] == version
