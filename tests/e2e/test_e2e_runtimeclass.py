"""A Pod with `runtimeClassName: sandkeeper`: kubelet and containerd as they are, its sandbox in our shim."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

import pytest
from tests.cluster import eventually
from tests.e2e.conftest import BUSYBOX, fresh_node

from sandkeeper.localcluster.onenode import OneNode

pytestmark = [pytest.mark.e2e]

CLASS = "sandkeeper"


@pytest.fixture(scope="module")
def node() -> Iterator[OneNode]:
    """A node whose runtime handler `sandkeeper` is our shim, which runs beside containerd."""
    with fresh_node(sandboxer=CLASS) as made:
        socket = made.sandboxer_socket
        settings = {
            "NODE_NAME": "node-1",
            "STATE_DIR": str(socket.parent / "state"),
            "RUN_DIR": str(socket.parent),
            "OCI__CGROUP_PARENT": made.sandboxes_cgroup,
            "SANDBOXER__TASK_SHIM": str(made.containerd.programs / "containerd-shim-runc-v2"),
            "SANDBOXER__CONTAINERD_ROOT": str(made.containerd.folder / "root"),
            "SANDBOXER__CONTAINERD_SOCKET": str(made.containerd.socket),
        }
        inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        ours = {f"SANDKEEPER_SHIM_{name}": value for name, value in settings.items()}
        made.processes.spawn(
            "shim", [sys.executable, "-m", "sandkeeper.cli.main", "shim"], env={**inherited, **ours}
        )
        eventually(socket.exists, timeout=60, seen=lambda: made.processes.tail("shim"))
        body = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": CLASS}}
        made.kubectl("apply", "-f", "-", input=json.dumps({**body, "handler": CLASS}))
        yield made


def test_a_pod_of_our_runtime_class_is_ready_and_answers(node: OneNode) -> None:
    container = {
        "name": "main",
        "image": BUSYBOX,
        "imagePullPolicy": "Never",
        "command": ["sh", "-c", "echo said; exec sleep 3600"],
    }
    spec = {
        "runtimeClassName": CLASS,
        "dnsPolicy": "None",
        "dnsConfig": {"nameservers": ["10.0.0.10"]},
        "containers": [container],
        "terminationGracePeriodSeconds": 0,
    }
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ours"}, "spec": spec}
    node.kubectl("apply", "-f", "-", input=json.dumps(body))
    try:
        node.kubectl("wait", "pod/ours", "--for=condition=Ready", "--timeout=120s")
        assert eventually(lambda: node.kubectl("logs", "ours"), timeout=60) == "said\n"
        assert node.kubectl("exec", "ours", "--", "hostname") == "ours\n"
        assert node.kubectl("exec", "ours", "--", "cat", "/etc/resolv.conf") == "nameserver 10.0.0.10\n"
        address = node.kubectl("get", "pod", "ours", "-o", "jsonpath={.status.podIP}")
        assert f"inet {address}/" in node.kubectl("exec", "ours", "--", "ip", "-4", "-o", "address")
        tasks = node.sandboxer_socket.parent / "tasks"
        assert len(list(tasks.iterdir())) == 1  # it is in our shim
    finally:
        node.kubectl("delete", "pod", "ours", "--timeout=60s")
    eventually(lambda: not list(tasks.iterdir()), timeout=60)
