"""Operator and shims are killed and come back: what runs runs on, nothing is started twice, nothing is forgotten."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.cluster import condition_of, eventually, fresh_namespace, leaks_of, whole_cluster
from tests.counted import ONE_SANDBOX, asked_to_end, counted, end, processes, run_of, runs, starts
from tests.sandboxes import Object, Sandboxes, ready

from sandkeeper.localcluster.cluster import OPERATOR, LocalCluster
from sandkeeper.localcluster.watching import manifest

pytestmark = [pytest.mark.cluster, pytest.mark.oci]

ONE, OTHER = "node-1", "node-2"
KILL_AND_TERM = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["KILL", "TERM"])


@pytest.fixture(scope="module")
def local() -> Iterator[LocalCluster]:
    """A cluster of its own, in which a node that does not answer is soon unreachable."""
    operator_env = {"RELIST_INTERVAL": "0.5", "NODE_UNREACHABLE_AFTER": "2"}
    # No sample of usage may come between two looks at a record.
    shim_env = {"USAGE_INTERVAL": "3600", "RESTART_BACKOFF": "0.2"}
    with whole_cluster(shims=2, engine="oci", operator_env=operator_env, shim_env=shim_env) as found:
        yield found
        for index in range(2):
            leaks_of(found, index).assert_none()


@pytest.fixture
def sandboxes(local: LocalCluster) -> Iterator[Sandboxes]:
    """A user's view; afterwards all is started again, and nothing is left."""
    with fresh_namespace(local.kubectl) as namespace:
        try:
            yield Sandboxes(local.kubectl, namespace)
        finally:
            for index, name in enumerate(local.nodes):
                if not local.processes.alive(name):
                    local.start_shim(index)
            local.start_operator()
    for index in range(2):
        leaks_of(local, index).assert_none()


def stop(local: LocalCluster, number: signal.Signals, *names: str) -> None:
    """Ends processes by a signal and nothing else."""
    for name in names:
        local.processes.signal(name, number)
    for name in names:
        eventually(lambda name=name: not local.processes.alive(name))


def metric(local: LocalCluster, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    families = text_string_to_metric_families(local.operator_get("/metrics"))
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def idle(local: LocalCluster) -> bool:
    """The operator has nothing to look at."""
    return not metric(local, "sandkeeper_queue_keys", state="waiting") and not metric(
        local, "sandkeeper_queue_keys", state="running"
    )


def until_all_looked_at(local: LocalCluster, count: int) -> None:
    """A new operator has looked at so many Sandboxes, and has nothing more to look at."""
    eventually(lambda: metric(local, "sandkeeper_queue_passes_total") >= count and idle(local), timeout=60)


def until_heard(local: LocalCluster, node: str) -> None:
    """The operator has asked the node anew, and has looked at what it said."""
    began = time.monotonic()

    def heard() -> bool:
        age = metric(local, "sandkeeper_node_relist_age_seconds", node=node)
        return age < time.monotonic() - began and idle(local)

    eventually(heard, timeout=60)


def made(sandboxes: Sandboxes, *bodies: Object) -> dict[str, Object]:
    """Applies them at once; the objects by name, each Ready."""
    sandboxes.run("apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": bodies}))
    return {name: sandboxes.until_ready(name) for name in (body["metadata"]["name"] for body in bodies)}


def paused(sandboxes: Sandboxes, name: str) -> Object:
    sandboxes.patch(name, {"spec": {"desiredState": "Paused"}})
    return sandboxes.until_reason(name, "Paused")


def check_exit(sandboxes: Sandboxes, name: str, status: int, number: int | None, reason: str) -> None:
    found = sandboxes.until_finished(name)["status"]
    assert (found["exitStatus"], found.get("exitSignal"), found["exitReason"]) == (status, number, reason)
    assert found["instance"] == 1


# The operator


@KILL_AND_TERM
def test_a_new_operator_changes_nothing(
    sandboxes: Sandboxes, local: LocalCluster, number: signal.Signals
) -> None:
    running = made(sandboxes, counted("one", nodeName=ONE), counted("other", nodeName=OTHER))
    resting = made(
        sandboxes,
        counted("frozen", desiredState="Paused"),
        counted("stopped", desiredState="Stopped"),
        manifest("done", "true", nodeName=ONE),
    )
    sandboxes.until_finished("done")
    eventually(lambda: idle(local))
    names = [*running, *resting]
    before = {name: sandboxes.get(name) for name in names}
    run = {name: run_of(local, body) for name, body in running.items()}
    stop(local, number, OPERATOR)
    assert all(map(runs, running.values()))
    local.start_operator()
    until_all_looked_at(local, len(names))
    assert metric(local, "sandkeeper_api_writes_total") == 0
    assert {name: sandboxes.get(name) for name in names} == before
    assert {name: run_of(local, before[name]) for name in running} == run


def test_what_happened_without_an_operator_is_caught_up_with(
    sandboxes: Sandboxes, local: LocalCluster
) -> None:
    names = ("kept", "ends", "killed", "changed", "frozen", "stopped", "deleted")
    bodies = made(sandboxes, *(counted(name) for name in names))
    kept, frozen = (run_of(local, bodies[name]) for name in ("kept", "frozen"))
    eventually(lambda: idle(local))
    stop(local, signal.SIGKILL, OPERATOR)
    end(local, bodies["ends"], 3)
    os.kill(bodies["killed"]["status"]["containers"][0]["pid"], signal.SIGKILL)
    sandboxes.apply(counted("applied"))
    sandboxes.apply(counted("changed", hostname="other"))
    sandboxes.patch("frozen", {"spec": {"desiredState": "Paused"}})
    sandboxes.patch("stopped", {"spec": {"desiredState": "Stopped"}})
    sandboxes.delete("deleted")
    assert runs(bodies["deleted"])
    local.start_operator()
    check_exit(sandboxes, "ends", 3, None, "Error")
    check_exit(sandboxes, "killed", 137, 9, "Signaled")
    assert run_of(local, sandboxes.until_ready("applied")).starts == 1
    changed = sandboxes.until_instance("changed", 2)
    assert not runs(bodies["changed"])
    assert run_of(local, changed).starts == 1
    assert sandboxes.until_ready("frozen")["status"]["phase"] == "Paused"
    assert runs(bodies["frozen"])
    sandboxes.until_ready("stopped")
    assert not runs(bodies["stopped"])
    sandboxes.until_gone("deleted")
    assert not runs(bodies["deleted"])
    assert sandboxes.get("kept") == bodies["kept"]
    assert run_of(local, bodies["kept"]) == kept
    sandboxes.patch("frozen", {"spec": {"desiredState": "Running"}})
    assert run_of(local, sandboxes.until_ready("frozen")) == frozen


# A shim


@KILL_AND_TERM
def test_what_happened_without_its_shim_is_known_afterwards(
    sandboxes: Sandboxes, local: LocalCluster, number: signal.Signals
) -> None:
    names = ("kept", "ends", "killed", "deleted")
    bodies = made(
        sandboxes,
        *(counted(name, nodeName=ONE) for name in names),
        counted("again", nodeName=ONE, restartPolicy="OnFailure"),
        counted("frozen", nodeName=ONE),
        counted("elsewhere", nodeName=OTHER),
    )
    unchanged = ("kept", "frozen", "elsewhere")
    run_of(local, bodies["frozen"])  # its program has begun
    bodies["frozen"] = paused(sandboxes, "frozen")
    run = {name: run_of(local, bodies[name]) for name in unchanged}
    stop(local, number, ONE)
    assert all(map(runs, bodies.values()))
    end(local, bodies["ends"], 3)
    end(local, bodies["again"], 4)
    os.kill(bodies["killed"]["status"]["containers"][0]["pid"], signal.SIGKILL)
    sandboxes.apply(counted("applied", nodeName=ONE))
    sandboxes.delete("deleted")
    assert sandboxes.get("deleted")
    assert runs(bodies["deleted"])
    local.start_shim(0)
    check_exit(sandboxes, "ends", 3, None, "Error")
    check_exit(sandboxes, "killed", 137, 9, "Signaled")
    sandboxes.until_ready("applied")
    sandboxes.until_gone("deleted")
    assert not runs(bodies["deleted"])
    again = sandboxes.until("again", lambda body: restarts(body) and ready(body) == "True")
    assert again["status"]["pid"] == bodies["again"]["status"]["pid"]
    eventually(lambda: starts(local, again) == 2)
    until_heard(local, ONE)
    assert {name: run_of(local, sandboxes.until_ready(name)) for name in unchanged} == run


def restarts(body: Object) -> int:
    return int(body["status"]["containers"][0]["restartCount"])


def test_a_node_that_stays_silent_is_unknown_and_nothing_is_guessed(
    sandboxes: Sandboxes, local: LocalCluster
) -> None:
    bodies = made(sandboxes, *(counted(name, nodeName=ONE) for name in ("kept", "deleted")))
    kept = run_of(local, bodies["kept"])
    stop(local, signal.SIGKILL, ONE)
    body = sandboxes.until_reason("kept", "NodeUnreachable")
    assert ready(body) == condition_of(body, "Running")["status"] == "Unknown"
    assert ONE in condition_of(body, "Ready")["message"]
    assert not condition_of(body, "Stalled")
    assert (body["status"]["pid"], body["status"]["instance"]) == (kept.pid, 1)
    assert sandboxes.until_event("kept", "NodeUnreachable")["type"] == "Warning"
    sandboxes.delete("deleted")
    sandboxes.apply(counted("applied", nodeName=ONE))
    sandboxes.until_reason("applied", "Unschedulable")
    sandboxes.until(
        "deleted",
        lambda body: (
            body["status"]["phase"] == "Terminating"
            and condition_of(body, "Ready")["reason"] == "NodeUnreachable"
        ),
    )
    made(sandboxes, counted("elsewhere"))
    assert sandboxes.get("deleted")
    assert runs(bodies["deleted"])
    local.start_shim(0)
    assert run_of(local, sandboxes.until_ready("kept")) == kept
    sandboxes.until_gone("deleted")
    assert not runs(bodies["deleted"])
    sandboxes.until_ready("applied")


# Both


def test_all_are_killed_at_once(sandboxes: Sandboxes, local: LocalCluster) -> None:
    names = ("kept", "ends", "killed", "changed", "deleted")
    bodies = made(
        sandboxes, *(counted(name, nodeName=ONE) for name in names), counted("elsewhere", nodeName=OTHER)
    )
    unchanged = ("kept", "elsewhere")
    run = {name: run_of(local, bodies[name]) for name in unchanged}
    stop(local, signal.SIGKILL, OPERATOR, ONE, OTHER)
    end(local, bodies["ends"], 3)
    os.kill(bodies["killed"]["status"]["containers"][0]["pid"], signal.SIGKILL)
    sandboxes.apply(counted("applied", nodeName=ONE))
    sandboxes.apply(counted("changed", nodeName=ONE, hostname="other"))
    sandboxes.delete("deleted")
    with ThreadPoolExecutor(1) as starting:
        operator = starting.submit(local.start_operator)  # it is ready when its nodes are
        eventually(lambda: local.processes.alive(OPERATOR))
        for index in range(2):
            local.start_shim(index)
        operator.result()
    check_exit(sandboxes, "ends", 3, None, "Error")
    check_exit(sandboxes, "killed", 137, 9, "Signaled")
    sandboxes.until_ready("applied")
    assert run_of(local, sandboxes.until_instance("changed", 2)).starts == 1
    sandboxes.until_gone("deleted")
    assert not runs(bodies["deleted"])
    assert not runs(bodies["changed"])
    assert {name: run_of(local, sandboxes.until_ready(name)) for name in unchanged} == run


@pytest.mark.parametrize("killed", [(ONE,), (OPERATOR,), (OPERATOR, ONE)], ids="+".join)
def test_a_deletion_that_was_begun_is_completed(
    sandboxes: Sandboxes, local: LocalCluster, killed: tuple[str, ...]
) -> None:
    """Killed between SIGTERM and SIGKILL."""
    body = made(sandboxes, counted("box", nodeName=ONE, terminationGracePeriodSeconds=3))["box"]
    sandboxes.delete("box")
    eventually(lambda: asked_to_end(local, body))
    stop(local, signal.SIGKILL, *killed)
    assert runs(body)
    start(local, killed)
    sandboxes.until_gone("box")
    assert not processes(body["status"]["sandboxID"])


# Which are killed, and how many of ten Sandboxes the shim has heard of by then.
MOMENTS = [((ONE,), 1), ((ONE,), 5), ((ONE,), 10), ((OPERATOR,), 5), ((OPERATOR, ONE), 3)]


@pytest.mark.parametrize(("killed", "heard"), MOMENTS, ids=[f"{'+'.join(k)}-{n}" for k, n in MOMENTS])
def test_killed_while_many_are_started(
    sandboxes: Sandboxes, local: LocalCluster, killed: tuple[str, ...], heard: int
) -> None:
    """Each runs in the end, as its first instance, and its program was started once."""
    bodies = [counted(f"box-{number}", nodeName=ONE) for number in range(10)]
    records = local.node_folder(0) / "state" / "sandboxes"
    with ThreadPoolExecutor(1) as user:
        applied = user.submit(made, sandboxes, *bodies)
        eventually(lambda: len(list(records.iterdir())) >= heard, every=0.001)
        stop(local, signal.SIGKILL, *killed)
        start(local, killed)
        found = applied.result()
    for body in found.values():
        assert body["status"]["instance"] == 1
        run = run_of(local, body)
        assert (run.starts, run.restarts) == (1, 0)
        until_one_sandbox(body)
    with local.shim(0) as shim:
        assert len(shim.list().sandboxes) == len(bodies)


def until_one_sandbox(body: Object) -> None:
    """A process may have another name yet when it has just been started."""
    sandbox_id = body["status"]["sandboxID"]
    eventually(lambda: processes(sandbox_id) == ONE_SANDBOX, seen=lambda: processes(sandbox_id))


def start(local: LocalCluster, names: tuple[str, ...]) -> None:
    """Starts again what was stopped."""
    if ONE in names:
        local.start_shim(0)
    if OPERATOR in names:
        local.start_operator()
