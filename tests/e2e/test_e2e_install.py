"""`kubectl apply -k manifests/` on a real node: with no right that is not shipped, by nothing but the image."""

from __future__ import annotations

import pytest
from tests.cluster import eventually
from tests.e2e.install import NODES, SYSTEM, Installation
from tests.sandboxes import Sandboxes

# The first of them builds the image, unless $SANDKEEPER_TEST_IMAGE names it, and waits for all of Kubernetes.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


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


def test_a_namespace_goes_with_what_runs_in_it(installation: Installation) -> None:
    installation.kubectl("create", "namespace", "leaving")
    sandboxes = Sandboxes(installation.kubectl, "leaving")
    status = sandboxes.until_ready(sandboxes.make("inside"))["status"]
    life = started(installation, status["pid"])
    assert life
    installation.kubectl("delete", "namespace", sandboxes.namespace, "--timeout=120s")
    assert started(installation, status["pid"]) != life


def started(installation: Installation, pid: int) -> str:
    """When the node's process began (proc(5), /proc/pid/stat): with the pid, who it is. Empty where there is none."""
    words = installation.node.run_within("sh", "-c", f"cat /proc/{pid}/stat || :")
    return words.rpartition(")")[2].split()[19] if words else ""
