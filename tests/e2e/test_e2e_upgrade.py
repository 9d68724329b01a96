"""docs/install.md, "Upgrade" and "Uninstall": from the commit before, with Sandboxes that go on, to nothing at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.cluster import eventually
from tests.documented import run_documented
from tests.e2e import earlier, remains
from tests.e2e.conftest import fresh_node
from tests.e2e.install import NODES, ROOT, SYSTEM, Installation, build_image, image_archive, install
from tests.e2e.test_e2e_install import started
from tests.sandboxes import Object, Sandboxes

from sandkeeper.localcluster.onenode import OneNode

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

_IMAGE = "docker.io/library/sandkeeper"
_SAME = ("sandboxID", "instance", "pid", "startedAt")


@dataclass(frozen=True, slots=True)
class Trial:
    """A node on which the earlier commit was installed, with Sandboxes of that time."""

    node: OneNode
    sandboxes: Sandboxes
    before: dict[str, Object]
    lives: dict[str, str]
    next: Path
    """A kustomization: this tree's manifests and image."""
    archive: Path
    """That image."""

    def assert_untouched(self) -> None:
        for name, before in self.before.items():
            after = self.sandboxes.status(name)
            assert {field: after.get(field) for field in _SAME} == {
                field: before.get(field) for field in _SAME
            }
            assert [each.get("restartCount", 0) for each in after["containers"]] == [0]
        for name, life in self.lives.items():
            assert started(Installation(self.node), self.before[name]["pid"]) == life


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    folder = tmp_path_factory.mktemp("upgrade")
    tree = earlier.tree(folder)
    with fresh_node() as node:
        earlier.installer(tree).install(node, build_image(folder / "earlier-image.tar", tree))
        archive = image_archive(folder)
        node.import_archive(archive)
        node.containerd.ctr("images", "tag", f"{_IMAGE}:0.1.0", f"{_IMAGE}:next", namespace="k8s.io")
        own = {
            "resources": [os.path.relpath(ROOT / "manifests", folder)],
            "images": [{"name": "sandkeeper", "newTag": "next"}],
        }
        (folder / "kustomization.yaml").write_text(json.dumps(own))
        node.kubectl("create", "namespace", "users")
        yield begin(Sandboxes(node.kubectl, "users"), node, folder, archive)


def begin(sandboxes: Sandboxes, node: OneNode, folder: Path, archive: Path) -> Trial:
    sandboxes.make("runs")
    sandboxes.make("frozen", desiredState="Paused")
    sandboxes.make("ended", "sh", "-c", "exit 3")
    for name in ("runs", "frozen"):
        sandboxes.until_ready(name)
    sandboxes.until_finished("ended")
    before = {name: sandboxes.status(name) for name in ("runs", "frozen", "ended")}
    lives = {name: started(Installation(node), before[name]["pid"]) for name in ("runs", "frozen")}
    assert all(lives.values())
    return Trial(node, sandboxes, before, lives, folder, archive)


def apply_next(trial: Trial) -> None:
    trial.node.kubectl("apply", "--server-side", "-k", str(trial.next))
    installation = Installation(trial.node)
    for kind in ("daemonset", "deployment"):
        installation.roll(kind)
    trial.node.kubectl("wait", "sandboxnodes", "--all", "--for=condition=Ready", "--timeout=120s")


def test_an_upgrade_touches_nothing_that_runs(trial: Trial) -> None:
    apply_next(trial)
    pods = [
        each
        for namespace in (SYSTEM, NODES)
        for each in json.loads(trial.node.kubectl("-n", namespace, "get", "pods", "-o", "json"))["items"]
    ]
    for pod in (each for each in pods if "deletionTimestamp" not in each["metadata"]):
        assert [each["image"] for each in pod["spec"]["containers"]] == [f"{_IMAGE.rpartition('/')[2]}:next"]
    # All of it was taken, the custom resources' schemas among it. (Exit status 1: there is a difference.)
    difference = trial.node.kubectl.run("diff", "--server-side", "-k", str(trial.next))
    assert difference.returncode == 0, difference.stdout
    # What comes after goes through the new Pods.
    trial.sandboxes.make("after")
    trial.sandboxes.until_ready("after")
    trial.assert_untouched()
    trial.sandboxes.patch("frozen", {"spec": {"desiredState": "Running"}})
    trial.sandboxes.until_reason("frozen", "Running")
    trial.assert_untouched()


def test_without_operator_and_shims_sandboxes_run_on_until_these_are_back(trial: Trial) -> None:
    run_documented(trial.node, "kubectl delete namespace sandkeeper-system")
    trial.assert_untouched()
    install(trial.node, trial.archive)
    trial.sandboxes.make("back")
    trial.sandboxes.until_ready("back")
    trial.assert_untouched()


def test_uninstalling_leaves_nothing(trial: Trial) -> None:
    """The commands of docs/install.md, in its order."""
    kubectl = trial.node.kubectl
    assert our_processes(trial.node)
    names = kubectl("-n", "users", "get", "sandboxes", "-o", "jsonpath={.items[*].status.sandboxID}").split()
    assert len(names) >= len(trial.before)
    run_documented(trial.node, "kubectl delete sandboxes --all")
    remains.assert_none(trial.node, names)
    remains.assert_no_sandbox(trial.node)
    run_documented(trial.node, "kubectl delete -k manifests/")
    run_documented(trial.node, "kubectl delete csr")
    assert kubectl("api-resources", "--api-group=sandkeeper.dev", "-o", "name").split() == []
    namespaces = kubectl("get", "namespaces", "-o", "name").split()
    assert not {f"namespace/{SYSTEM}", f"namespace/{NODES}"} & set(namespaces)
    kinds = kubectl("api-resources", "--verbs=list", "-o", "name").replace("\n", ",").strip(",")
    left = kubectl("get", kinds, "-A", "-l", "app.kubernetes.io/part-of=sandkeeper", "-o", "name")
    assert left.split() == []
    eventually(lambda: not our_processes(trial.node), timeout=60, seen=lambda: our_processes(trial.node))
    # On its disk a node has images still. No mount is in the way.
    run_documented(trial.node, "rm -r /var/lib/sandkeeper", here=False)


def our_processes(node: OneNode) -> list[str]:
    """Programs of ours, or such as we start, on the node: operator and shim, monitors, sandboxes."""
    ours = {"sandkeeper", "conmon", "catatonit"}
    lines = node.run_within("ps", "-ww", "-e", "-o", "pid=,args=").splitlines()
    found = [line for line in lines if ours & {Path(word).name for word in line.split()[1:4]}]
    return [line for line in found if line.split()[0] != "1"]  # the node's own, of its namespaces
