"""A machine of its own beside the cluster's node (docs/install.md), which is lost, declared gone, and comes back."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from tests.cluster import condition_of, eventually
from tests.e2e import remains
from tests.e2e.install import LAYOUTS, SYSTEM, Installation
from tests.e2e.test_e2e_install import started
from tests.e2e.test_e2e_machine import AGAIN, instance
from tests.sandboxes import Sandboxes, ready

from sandkeeper.localcluster.containerd import remove_cgroup
from sandkeeper.localcluster.onenode import ADDRESS, NODE, OneNode

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

EDGE = "edge-1"
SLOW = 180.0


@pytest.fixture
def start_edge(installation: Installation) -> Iterator[Callable[[], None]]:
    """Starts its shim, with a certificate that an administrator made with the CA's key."""
    node, kubectl = installation.node, installation.kubectl
    pki, cgroup = node.folder / "edge-pki", f"{node.cgroup}-edge"
    pki.mkdir()
    secret = json.loads(kubectl("-n", SYSTEM, "get", "secret", "sandkeeper-ca", "-o", "json"))["data"]
    for key, file in (("tls.crt", "ca.crt"), ("tls.key", "ca.key")):
        (pki / file).write_bytes(base64.b64decode(secret[key]))
    ours = [sys.executable, "-m", "sandkeeper.cli.main"]
    subprocess.run([*ours, "certificates", str(pki), EDGE], check=True, capture_output=True)
    settings = {
        "NODE_NAME": EDGE,
        "LISTEN": f"{ADDRESS}:7444",
        "TLS_CA": str(pki / EDGE / "ca.crt"),
        "TLS_CERT": str(pki / EDGE / "node.crt"),
        "TLS_KEY": str(pki / EDGE / "node.key"),
        "STATE_DIR": "/var/lib/sandkeeper-edge",
        "RUN_DIR": "/run/sandkeeper-edge",
        "OCI__IMAGE_LAYOUTS": json.dumps([LAYOUTS]),
        "OCI__CGROUP_PARENT": cgroup,
    }
    inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environment = {**inherited, **{f"SANDKEEPER_SHIM_{name}": value for name, value in settings.items()}}
    body = {
        "apiVersion": "sandkeeper.dev/v1alpha1",
        "kind": "SandboxNode",
        "metadata": {"name": EDGE},
        "spec": {"address": f"{ADDRESS}:7444", "serverName": EDGE},
    }

    def start() -> None:
        node.processes.spawn("edge", [*ours, "shim"], env=environment)
        kubectl("apply", "-f", "-", input=json.dumps(body))
        try:
            kubectl("wait", f"sandboxnode/{EDGE}", "--for=condition=Ready", "--timeout=120s")
        except Exception as error:
            raise AssertionError(f"{error}\n{node.processes.tail('edge', 30)}") from error

    try:
        yield start
    finally:
        node.processes.stop("edge")
        kubectl("delete", "sandboxnode", EDGE, "--ignore-not-found", "--timeout=60s")
        eventually(lambda: _removed(cgroup), timeout=60)


def _removed(cgroup: str) -> bool:
    for each in remains.cgroups(cgroup):
        remove_cgroup(each)
    return not remains.cgroups(cgroup)


def cordon(node: OneNode, name: str, *, closed: bool) -> None:
    patch = json.dumps({"spec": {"unschedulable": closed}})
    node.kubectl("patch", "sandboxnode", name, "--type=merge", "-p", patch)


def test_a_node_that_is_lost_and_declared_gone(
    installation: Installation, sandboxes: Sandboxes, start_edge: Callable[[], None]
) -> None:
    """docs/operations.md, "A node that is lost"."""
    node = installation.node
    start_edge()
    cordon(node, NODE, closed=True)
    try:
        for name, more in (("again", {"failurePolicy": AGAIN}), ("never", {}), ("deleted", {})):
            sandboxes.make(name, **more)
        before = {name: sandboxes.until_ready(name)["status"] for name in ("again", "never", "deleted")}
    finally:
        cordon(node, NODE, closed=False)
    assert {each["nodeName"] for each in before.values()} == {EDGE}
    life = started(installation, before["again"]["pid"])

    node.processes.kill("edge")  # what it started runs on, and nobody can say so
    for name in before:
        sandboxes.until_reason(name, "NodeUnreachable")
    sandboxes.delete("deleted")
    assert sandboxes.status("again")["instance"] == 1, "nobody has declared anything yet"

    node.kubectl("patch", "sbn", EDGE, "--type", "merge", "-p", '{"spec":{"outOfService":true}}')
    sandboxes.until_gone("deleted")
    moved = sandboxes.until("again", lambda body: instance(body) == 2 and ready(body) == "True", timeout=SLOW)
    assert moved["status"]["nodeName"] == NODE
    lost = sandboxes.until("never", lambda body: condition_of(body, "Stalled").get("status") == "True")
    assert (lost["status"]["instance"], lost["status"]["exitReason"]) == (1, "ShimLost")
    assert started(installation, before["again"]["pid"]) == life  # the price of a wrong word: two copies

    node.kubectl("patch", "sbn", EDGE, "--type", "merge", "-p", '{"spec":{"outOfService":false}}')
    start_edge()
    remains.assert_none(node, [each["sandboxID"] for each in before.values()], SLOW)
    assert sandboxes.status("again")["sandboxID"] == moved["status"]["sandboxID"]
    for name in ("again", "never"):
        sandboxes.delete(name)
        sandboxes.until_gone(name)
