"""manifests/components/containerd on a real node: the shim's DaemonSet on the node's own containerd."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster import eventually, fresh_namespace
from tests.e2e.conftest import fresh_node
from tests.e2e.install import NODES, ROOT, Installation, image_archive, install
from tests.sandboxes import Sandboxes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

SOCKET = "/run/containerd/containerd.sock"
ROOT_USUALLY = "/var/lib/containerd"
NAMESPACE = "sandkeeper"


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """A node of its own, whose containerd has its socket where a node has it, and its root elsewhere."""
    folder = tmp_path_factory.mktemp("containerd")
    with fresh_node() as node:
        node.run_within("sh", "-c", f"mkdir -p {Path(SOCKET).parent} && : >{SOCKET}")
        node.run_within("mount", "--bind", str(node.containerd.socket), SOCKET)
        root = str(node.containerd.folder / "root")
        patch = {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {"name": "sandkeeper-shim"},
            "spec": {
                "template": {
                    "spec": {
                        "containers": [
                            {"name": "shim", "volumeMounts": [{"$patch": "delete", "mountPath": ROOT_USUALLY},
                                                              {"name": "snapshots", "mountPath": root,
                                                               "mountPropagation": "HostToContainer",
                                                               "readOnly": True}]}
                        ],
                        "volumes": [{"name": "snapshots", "hostPath": {"path": root}}],
                    }
                }
            },
        }  # fmt: skip
        base = os.path.relpath(ROOT / "manifests", folder.resolve())
        own = {
            "resources": [base],
            "components": [f"{base}/components/containerd"],
            "patches": [{"target": {"kind": "DaemonSet"}, "patch": json.dumps(patch)}],
        }
        (folder / "kustomization.yaml").write_text(json.dumps(own))
        yield install(node, image_archive(folder), folder)


@pytest.fixture
def sandboxes(installation: Installation) -> Iterator[Sandboxes]:
    with fresh_namespace(installation.kubectl) as name:
        yield Sandboxes(installation.kubectl, name)


def containers(installation: Installation) -> list[str]:
    """What containerd has in our namespace."""
    return installation.node.containerd.ctr("containers", "list", "--quiet", namespace=NAMESPACE).split()


def test_it_runs_in_the_nodes_containerd_and_nothing_is_left(
    installation: Installation, sandboxes: Sandboxes
) -> None:
    node = json.loads(installation.kubectl("get", "sandboxnodes", "-o", "json"))["items"][0]
    assert node["status"]["engine"] == "containerd"
    running = sandboxes.make("runs")
    status = sandboxes.until_ready(running)["status"]
    assert status["pid"] > 0
    assert len(containers(installation)) == 1
    ended = sandboxes.make("ends", "sh", "-c", "exit 3")
    assert sandboxes.until_finished(ended)["status"]["exitStatus"] == 3
    for name in (running, ended):
        sandboxes.delete(name)
        sandboxes.until_gone(name)
    eventually(lambda: not containers(installation), timeout=60, seen=lambda: containers(installation))


def test_a_new_pod_of_the_shim_does_not_touch_what_runs(
    installation: Installation, sandboxes: Sandboxes
) -> None:
    name = sandboxes.make("stays")
    before = sandboxes.until_ready(name)["status"]
    pods = installation.pods()
    installation.kubectl("-n", NODES, "rollout", "restart", "daemonset/sandkeeper-shim")
    installation.roll("daemonset")
    eventually(lambda: set(installation.pods().values()) - set(pods.values()), timeout=60)
    after = sandboxes.until_ready(sandboxes.make("after"))["status"]
    assert after["pid"] != before["pid"]
    after = sandboxes.until_ready(name)["status"]
    for field in ("sandboxID", "instance", "pid", "startedAt"):
        assert after[field] == before[field]
