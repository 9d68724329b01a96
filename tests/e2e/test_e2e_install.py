"""`kubectl apply -k manifests/` on a real node: with no right that is not shipped, by nothing but the image."""

from __future__ import annotations

import pytest
from tests.cluster import eventually
from tests.documented import run_documented
from tests.e2e import remains
from tests.e2e.install import NODES, PATIENCE, SYSTEM, Installation
from tests.sandboxes import Object, Sandboxes

from sandkeeper.localcluster.watching import manifest

pytestmark = [pytest.mark.e2e, PATIENCE]


def test_the_commands_of_the_page_as_they_stand_there(installation: Installation) -> None:
    node = installation.node
    run_documented(node, "kubectl apply --server-side -k manifests/")
    run_documented(node, "kubectl -n sandkeeper-system rollout status")
    run_documented(node, "kubectl -n sandkeeper-node rollout status")
    run_documented(node, "kubectl wait sandboxnodes --all")
    assert "hello" in run_documented(node, "kubectl apply -f examples/hello.yaml")
    hello = Sandboxes(installation.kubectl, "default")
    assert hello.until_finished("hello")["status"]["exitStatus"] == 0
    hello.delete("hello")
    hello.until_gone("hello")


def test_a_sandbox_runs_and_its_exit_comes_back(sandboxes: Sandboxes) -> None:
    running = sandboxes.make("runs")
    status = sandboxes.until_ready(running)["status"]
    assert status["nodeName"] == "node-1"
    assert status["pid"] > 0
    ended = sandboxes.make("ends", "sh", "-c", "exit 3")
    assert sandboxes.until_finished(ended)["status"]["exitStatus"] == 3
    for name in (running, ended):
        sandboxes.delete(name)
        sandboxes.until_gone(name)


@pytest.mark.parametrize("kind", ["daemonset", "deployment"])
def test_a_new_pod_of_ours_does_not_touch_what_runs(
    installation: Installation, sandboxes: Sandboxes, kind: str
) -> None:
    name = sandboxes.make("stays")
    before = sandboxes.until_ready(name)["status"]
    life = started(installation, before["pid"])
    pods = installation.pods()
    namespace, workload = (NODES, "shim") if kind == "daemonset" else (SYSTEM, "operator")
    installation.kubectl("-n", namespace, "rollout", "restart", f"{kind}/sandkeeper-{workload}")
    installation.roll(kind)
    eventually(lambda: set(installation.pods().values()) - set(pods.values()), timeout=60)
    # What comes after goes through the new Pod: it has taken over.
    other = sandboxes.make("after")
    sandboxes.until_ready(other)
    after = sandboxes.until_ready(name)["status"]
    for field in ("sandboxID", "instance", "pid", "startedAt"):
        assert after[field] == before[field]
    assert started(installation, after["pid"]) == life
    sandboxes.delete(name)
    sandboxes.until_gone(name)
    assert started(installation, before["pid"]) != life


def test_a_new_kubelet_and_containerd_do_not_touch_what_runs(
    installation: Installation, sandboxes: Sandboxes
) -> None:
    name = sandboxes.make("stays")
    before = sandboxes.until_ready(name)["status"]
    life, pods = started(installation, before["pid"]), installation.pods()
    installation.node.restart_services()
    assert started(installation, before["pid"]) == life
    sandboxes.until_ready(sandboxes.make("after"))
    assert installation.pods() == pods
    after = sandboxes.until_ready(name)["status"]
    assert (after["sandboxID"], after["pid"]) == (before["sandboxID"], before["pid"])


def test_a_namespace_goes_with_all_that_is_in_it(installation: Installation) -> None:
    """Whatever state its Sandboxes are in: no finalizer holds it up, and the node has nothing of them."""
    kubectl = installation.kubectl
    kubectl("create", "namespace", "leaving")
    sandboxes = Sandboxes(kubectl, "leaving")
    runs = [sandboxes.make(name) for name in ("runs", "runs-too")]
    frozen = sandboxes.make("frozen", desiredState="Paused")
    ended = sandboxes.make("ended", "sh", "-c", "exit 3")
    sandboxes.apply(without_an_image("waits"))
    sandboxes.make("nowhere", nodeSelector={"no": "such"})
    for name in (*runs, frozen):
        sandboxes.until_ready(name)
    sandboxes.until_finished(ended)
    sandboxes.until_reason("waits", "ErrImagePull", "ImagePullBackOff")
    sandboxes.until_reason("nowhere", "Unschedulable")
    ids = [sandboxes.status(name)["sandboxID"] for name in (*runs, frozen, ended)]
    kinds = {line.split()[0] for line in remains.remains(installation.node, ids)}
    assert kinds == {"process", "mount", "cgroup", "folder"}  # they would be found
    kubectl("delete", "namespace", sandboxes.namespace, "--timeout=120s")
    remains.assert_none(installation.node, ids)
    remains.assert_no_sandbox(installation.node)


def without_an_image(name: str) -> Object:
    """One whose image is nowhere: nobody listens on that port."""
    body = manifest(name)
    body["spec"]["containers"][0]["image"] = "127.0.0.1:9/none:1"
    return body


def started(installation: Installation, pid: int) -> str:
    """When the node's process began (proc(5), /proc/pid/stat): with the pid, who it is. Empty where there is none."""
    words = installation.node.run_within("sh", "-c", f"cat /proc/{pid}/stat || :")
    return words.rpartition(")")[2].split()[19] if words else ""
