"""The node by itself: a Pod, as Kubernetes runs it anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tests.cluster import eventually
from tests.e2e.conftest import BUSYBOX

from sandkeeper.localcluster.onenode import OneNode

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture
def pod(node: OneNode) -> Iterator[str]:
    """A Pod that is Ready and has said a word."""
    container = {
        "name": "main",
        "image": BUSYBOX,
        "imagePullPolicy": "Never",
        "command": ["sh", "-c", "echo said; exec sleep 3600"],
    }
    spec = {"containers": [container], "terminationGracePeriodSeconds": 0}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec}
    node.kubectl("apply", "-f", "-", input=json.dumps(body))
    try:
        node.kubectl("wait", "pod/one", "--for=condition=Ready", "--timeout=120s")
        yield "one"
    finally:
        node.kubectl("delete", "pod", "one", "--timeout=60s")


def test_a_pod_is_ready_and_answers_logs_and_exec(node: OneNode, pod: str) -> None:
    assert eventually(lambda: node.kubectl("logs", pod), timeout=60) == "said\n"
    assert node.kubectl("exec", pod, "--", "cat", "/etc/hostname") == "one\n"


def test_a_pod_reaches_the_api_server_at_its_service(node: OneNode, pod: str) -> None:
    """At `kubernetes`' own address, without a kube-proxy: what the operator needs in a Pod."""
    node.kubectl("exec", pod, "--", "sh", "-c", "nc -w 10 10.0.0.1 443 < /dev/null")
