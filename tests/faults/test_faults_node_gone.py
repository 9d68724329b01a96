"""F15: a node is gone for good: an administrator says so, and perhaps it comes back all the same."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator

import pytest
from tests.cluster import condition_of, eventually
from tests.faults import reboot
from tests.faults.network import Network, Trial, broken_network, sandbox
from tests.faults.oracle import wanted
from tests.faults.report import FINDINGS
from tests.faults.workload import RUNNING
from tests.histories import Object, kstatus

from sandkeeper.localcluster.cluster import OPERATOR
from sandkeeper.wire import node_pb2
from sandkeeper.wire.client import ShimClient
from sandkeeper.wire.errors import FailedPrecondition
from sandkeeper.wire.ids import OwnerKey
from sandkeeper.wire.tls import ClientTLS

pytestmark = [pytest.mark.cluster, pytest.mark.fault("F15")]

GONE, OTHER = "node-1", "node-2"
AGAIN = {"recreate": "OnFailure", "limit": 3, "backoffSeconds": 0}
MOVED = wanted("Running", "True Running", instance=2, on_node="RUNNING")
ENDED = wanted("Failed", "False Error", exited="3 Error", Stalled="True")
NEVER = wanted("Failed", "False ShimLost", exited="None ShimLost", Stalled="True")
STOPPED = wanted("Stopped", "True Stopped", exited="None ShimLost", Finished="True")
END: dict[str, Object | None] = {
    "again": MOVED,
    "never": NEVER,
    "deleted": None,
    "deleted-later": None,
    "ended": ENDED,
    "stopped": STOPPED,
    "beside": RUNNING,
    "paused": wanted("Paused", "True Paused", instance=2, on_node="PAUSED"),
}
DECLARED = pytest.mark.parametrize(
    "how", ["outOfService", pytest.param("node deleted", marks=pytest.mark.thorough)]
)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with broken_network() as made:
        yield made


@pytest.fixture
def trial(network: Network) -> Iterator[Trial]:
    """Afterwards both nodes are there, and whole."""
    node = json.loads(network.kubectl("get", "sandboxnode", GONE, "-o", "json"))
    metadata = {"name": GONE, "labels": node["metadata"]["labels"]}
    manifest = {**{key: node[key] for key in ("apiVersion", "kind", "spec")}, "metadata": metadata}
    local = network.local
    with network.trial() as made:
        try:
            yield made
        finally:
            join(made, manifest)
            patch(made, OTHER, unschedulable=False)
            if not local.processes.alive(GONE):
                local.start_shim(0)
            local.start_operator()
            local.kubectl("wait", "sandboxnodes", "--all", "--for=condition=Ready", "--timeout=60s")


def patch(trial: Trial, node: str, **spec: bool) -> None:
    change = json.dumps({"spec": spec})
    trial.network.kubectl("patch", "sandboxnode", node, "--type=merge", "-p", change)


def join(trial: Trial, manifest: Object) -> None:
    """The node's object as it was before anybody declared anything."""
    spec = {**manifest["spec"], "outOfService": False, "unschedulable": False}
    trial.network.kubectl("apply", "-f", "-", input=json.dumps({**manifest, "spec": spec}))


def declare(trial: Trial, how: str) -> Object:
    """Says that the node is gone; its object as it was."""
    found: Object = json.loads(trial.network.kubectl("get", "sandboxnode", GONE, "-o", "json"))
    if how == "outOfService":
        patch(trial, GONE, outOfService=True)
    else:
        trial.network.kubectl("delete", "sandboxnode", GONE)
    metadata = {"name": GONE, "labels": found["metadata"]["labels"]}
    return {**{key: found[key] for key in ("apiVersion", "kind", "spec")}, "metadata": metadata}


def settled(body: Object) -> bool:
    return bool(body) and kstatus(body) == "Current" and bool(body["status"].get("pid"))


def silent(body: Object) -> bool:
    return bool(condition_of(body, "Ready")["reason"] == "NodeUnreachable")


def begin(trial: Trial, *names: str) -> None:
    """Sandboxes of END on the node that will be gone."""
    patch(trial, OTHER, unschedulable=True)
    specs: dict[str, Object] = {
        "again": {"failurePolicy": AGAIN},
        "paused": {"failurePolicy": AGAIN, "desiredState": "Paused"},
    }
    running = [name for name in names if name not in ("ended", "beside")]
    trial.make(*(sandbox(name, **specs.get(name, {})) for name in running))
    if "ended" in names:
        trial.make(sandbox("ended", "sh", "-c", "exit 3"))
        trial.until("ended", lambda body: body and kstatus(body) == "Failed")
    for name in running:
        assert trial.until(name, settled)["status"]["nodeName"] == GONE
    patch(trial, OTHER, unschedulable=False)
    if "beside" in names:
        trial.make(sandbox("beside", nodeName=OTHER))
        trial.until("beside", settled)


def silence(trial: Trial, *names: str) -> None:
    """The node is off, and everybody knows that it does not answer."""
    trial.network.local.kill_shim(0)
    for name in names:
        body = trial.until(name, silent)
        assert body["status"]["pid"], "it may well be running"
        assert body["status"]["instance"] == 1


def on(trial: Trial, node: str, name: str) -> list[int]:
    """The instances of an object that a node has a record of."""
    return [life.owner.instance for life in trial.network.shims.present(trial.uid(name)) if life.node == node]


def assert_right(trial: Trial, end: dict[str, Object | None], *, twice: tuple[str, ...] = ()) -> None:
    """twice: what ran on when the administrator said that it did not, as docs/operations.md warns."""
    oracle = trial.oracle()
    FINDINGS.note(end=False, starts=False, leaks=False)
    oracle.until(end)
    oracle.assert_quiet()
    FINDINGS.note(end=True)
    wrong = [
        line
        for line in oracle.wrong()
        if not (line.endswith("at the same time") and line.startswith(tuple(f"{each} " for each in twice)))
    ]
    assert wrong == []
    FINDINGS.note(starts=True, leaks=True)


@DECLARED
@pytest.mark.parametrize("back", ["as it was", pytest.param("restarted", marks=pytest.mark.thorough)])
def test_what_was_on_it_moves_or_ends_and_its_return_changes_nothing(
    trial: Trial, how: str, back: str
) -> None:
    local, user = trial.network.local, trial.user
    begin(trial, *END)
    silence(trial, "again", "never", "deleted", "stopped", "paused", "deleted-later")
    user.delete("deleted")
    trial.until("deleted", lambda body: "deletionTimestamp" in body["metadata"] and silent(body))
    assert trial.get("again")["status"]["instance"] == 1, "nobody has declared anything yet"
    node = declare(trial, how)
    trial.until("deleted", lambda body: not body)
    for name in ("again", "paused"):
        moved = trial.until(name, lambda body: body["status"].get("instance") == 2 and settled(body))
        assert moved["status"]["nodeName"] == OTHER
    trial.until("never", lambda body: kstatus(body) == "Failed")
    user.delete("deleted-later")
    trial.until("deleted-later", lambda body: not body)
    user.patch("stopped", {"spec": {"desiredState": "Stopped"}})
    trial.until("stopped", lambda body: body["status"].get("phase") == "Stopped")

    join(trial, node)
    boot = [] if back == "as it was" else reboot.run_booted(reboot.new_boot(local.folder))
    local.start_shim(0, under=boot)
    for name in END:
        if name not in ("beside", "ended"):
            eventually(lambda name=name: on(trial, GONE, name) == [], timeout=60)
    assert_right(trial, END, twice=("again", "paused"))
    for name in ("again", "paused"):
        assert on(trial, OTHER, name) == [2]


@DECLARED
def test_the_nodes_word_for_an_older_instance_is_not_taken(trial: Trial, how: str) -> None:
    """Fencing: who still believes in instance 1, such as an operator that was cut off, makes nothing of it."""
    local = trial.network.local
    begin(trial, "again")
    owner = OwnerKey(trial.namespace, "again", trial.uid("again"), 1)
    config = node_pb2.SandboxConfig(
        owner=node_pb2.Owner(namespace=owner.namespace, name=owner.name, uid=owner.uid, instance=1),
        digest="another",
        containers=[node_pb2.ContainerConfig(name="main", image="busybox", command=["sleep", "86400"])],
    )
    silence(trial, "again")
    node = declare(trial, how)
    trial.until("again", lambda body: body["status"].get("instance") == 2 and settled(body))
    with pytest.raises(FailedPrecondition):
        asyncio.run(_create(trial, OTHER, owner, config))
    join(trial, node)
    local.start_shim(0)
    eventually(lambda: on(trial, GONE, "again") == [], timeout=60)
    assert_right(trial, {"again": MOVED}, twice=("again",))


async def _create(trial: Trial, node: str, owner: OwnerKey, config: node_pb2.SandboxConfig) -> None:
    local = trial.network.local
    port = local.plan.shim_ports[local.nodes.index(node)]
    async with ShimClient(f"127.0.0.1:{port}", tls=ClientTLS(local.tls), server_name=node) as shim:
        await shim.create(owner, config)


@pytest.mark.thorough
def test_what_may_run_nowhere_else_waits_for_its_node(trial: Trial) -> None:
    begin(trial, "never")
    trial.make(sandbox("bound", nodeName=GONE, failurePolicy=AGAIN))
    trial.until("bound", settled)
    silence(trial, "bound", "never")
    node = declare(trial, "outOfService")
    trial.until("bound", lambda body: condition_of(body, "Ready")["reason"] == "Unschedulable")
    trial.until("never", lambda body: kstatus(body) == "Failed")
    join(trial, node)
    trial.network.local.start_shim(0)
    assert_right(trial, {"bound": MOVED, "never": NEVER}, twice=("bound",))


@DECLARED
@pytest.mark.thorough
def test_it_is_declared_while_no_operator_runs(trial: Trial, how: str) -> None:
    local = trial.network.local
    begin(trial, "again", "never", "deleted", "beside")
    local.kill_shim(0)
    local.kill_operator()
    trial.user.delete("deleted")
    node = declare(trial, how)
    local.start_operator()
    end = {name: END[name] for name in ("again", "never", "deleted", "beside")}
    trial.until("again", lambda body: body["status"].get("instance") == 2 and settled(body))
    trial.until("deleted", lambda body: not body)
    trial.until("never", lambda body: kstatus(body) == "Failed")
    join(trial, node)
    local.start_shim(0)
    assert_right(trial, end, twice=("again",))
    assert local.processes.alive(OPERATOR)


@pytest.mark.thorough
def test_another_machine_takes_its_name(trial: Trial) -> None:
    """It has an empty disk; what was on the old one is proved absent."""
    local = trial.network.local
    begin(trial, "again", "never", "deleted")
    silence(trial, "again", "never", "deleted")
    trial.user.delete("deleted")
    node = declare(trial, "node deleted")
    trial.until("again", lambda body: body["status"].get("instance") == 2 and settled(body))
    shutil.rmtree(local.node_folder(0) / "state")
    join(trial, node)
    local.start_shim(0)
    trial.make(sandbox("fresh", nodeName=GONE))
    assert_right(
        trial,
        {**{name: END[name] for name in ("again", "never", "deleted")}, "fresh": RUNNING},
        twice=("again",),
    )


@pytest.mark.thorough
def test_a_machine_with_an_empty_disk_is_proof_enough(trial: Trial) -> None:
    """Nobody declares anything: the node itself says that it has nothing."""
    local = trial.network.local
    begin(trial, "again", "never", "deleted")
    silence(trial, "again", "never", "deleted")
    trial.user.delete("deleted")
    shutil.rmtree(local.node_folder(0) / "state")
    local.start_shim(0)
    lost = wanted("Failed", "False SandboxLost", exited="None SandboxLost", Stalled="True")
    assert_right(trial, {"again": MOVED, "never": lost, "deleted": None}, twice=("again",))
