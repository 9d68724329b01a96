"""What the API server makes of the CRDs: defaults, explanations, columns, selectors."""

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sandkeeper.api import ContainerStatus, Sandbox, SandboxStatus, Usage, set_condition

pytestmark = pytest.mark.cluster

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))
MANIFEST = """
apiVersion: sandkeeper.dev/v1alpha1
kind: Sandbox
metadata: {name: first}
spec:
  nodeName: no-such-node
  containers: [{name: main, image: "busybox:1.37"}]
"""


@pytest.fixture
def created(cluster: Any, namespace: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(
        cluster.kubectl("-n", namespace, "create", "-o", "json", "-f", "-", input=MANIFEST)
    )
    return answer


def test_unready_from_the_first_instant(created: dict[str, Any]) -> None:
    """The answer to the create itself: no operator can have written it."""
    assert created["status"] == {
        "observedGeneration": 0,
        "conditions": [
            {
                "type": "Ready",
                "status": "Unknown",
                "reason": "Pending",
                "message": "Waiting for controller",
                "lastTransitionTime": "1970-01-01T00:00:00Z",
            }
        ],
    }
    assert created["metadata"]["generation"] == 1


def test_only_defaults_that_say_something_are_written_into_the_spec(created: dict[str, Any]) -> None:
    assert created["spec"] == {
        "desiredState": "Running",
        "network": "None",
        "nodeName": "no-such-node",
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 30,
        "containers": [{"name": "main", "image": "busybox:1.37"}],
    }


def test_defaults_of_schema_and_models_agree(created: dict[str, Any]) -> None:
    bare = {"nodeName": "no-such-node", "containers": created["spec"]["containers"]}
    assert Sandbox.model_validate(created).spec == Sandbox.model_validate({"spec": bare}).spec


def test_what_the_models_write_is_accepted(cluster: Any, namespace: str) -> None:
    for path in EXAMPLES:
        text = cluster.kubectl("create", "--dry-run=client", "-o", "json", "-f", str(path))
        sandbox = Sandbox.model_validate_json(text)
        body = {
            "apiVersion": sandbox.api_version,
            "kind": sandbox.kind,
            "metadata": {"name": sandbox.metadata.name},
            "spec": sandbox.spec.to_dict(),
        }
        cluster.kubectl("-n", namespace, "create", "--dry-run=server", "-f", "-", input=json.dumps(body))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_accepted(cluster: Any, namespace: str, path: Path) -> None:
    cluster.kubectl("-n", namespace, "create", "--dry-run=server", "-f", str(path))


def test_a_full_status_is_accepted(cluster: Any, namespace: str, created: dict[str, Any]) -> None:
    """All that the operator may ever write, messages cut to their bound included."""
    now = datetime.now(UTC)
    ended: dict[str, Any] = {
        "exit_status": 137,
        "exit_signal": 9,
        "exit_reason": "OOMKilled",
        "exited_at": now,
    }
    status = SandboxStatus(
        **ended,
        observed_generation=1,
        conditions=set_condition(
            (), "Ready", "False", "OOMKilled", "x" * 10000, now=now, observed_generation=1
        ),
        phase="Failed",
        node_name="node-1",
        instance=2,
        sandbox_id=f"{created['metadata']['uid']}-2",
        runtime="crun",
        pid=4242,
        created_at=now,
        started_at=now,
        exit_message="x" * 10000,
        containers=(
            ContainerStatus(
                **ended,
                name="main",
                state="Exited",
                pid=4243,
                restart_count=3,
                started_at=now,
                image_id="sha256:" + "0" * 64,
                reason="CrashLoopBackOff",
                message="x" * 10000,
            ),
        ),
        addresses=("127.0.0.1", "::1"),
        usage=Usage(cpu_usage_milliseconds=1, memory_bytes=2**40, pids=3, sampled_at=now),
        recreations=1,
    )
    patch = json.dumps({"status": status.to_dict()})
    text = cluster.kubectl(
        "-n",
        namespace,
        "patch",
        "sbx",
        "first",
        "--subresource=status",
        "--type=merge",
        "-p",
        patch,
        "-o",
        "json",
    )
    assert json.loads(text)["status"] == status.to_dict()
    assert Sandbox.model_validate_json(text).status == status
    line = cluster.kubectl("-n", namespace, "get", "sbx", "first", "--no-headers")
    assert line.split()[:6] == ["first", "Failed", "False", "OOMKilled", "node-1", "137"]


def test_field_selectors(cluster: Any, namespace: str, created: dict[str, Any]) -> None:
    def names(selector: str) -> str:
        text: str = cluster.kubectl("-n", namespace, "get", "sbx", "-o", "name", "--field-selector", selector)
        return text.strip()

    assert names("spec.nodeName=no-such-node") == "sandbox.sandkeeper.dev/first"
    assert names("spec.nodeName=other") == ""
    assert names("status.nodeName=other") == ""


def test_columns(cluster: Any, namespace: str, created: dict[str, Any]) -> None:
    def header(*options: str) -> list[str]:
        text: str = cluster.kubectl("-n", namespace, "get", "sandkeeper", *options)
        return re.split(r"  +", text.splitlines()[0].strip())

    short = ["NAME", "PHASE", "READY", "REASON", "NODE", "EXIT", "AGE"]
    assert header() == short
    assert header("-o", "wide") == [
        *short,
        "EXIT-REASON",
        "INSTANCE",
        "RUNTIME",
        "STARTED",
        "PID",
        "SANDBOX-ID",
    ]


@pytest.mark.parametrize(
    ("kind", "plural"),
    [("Sandbox", "sandboxes"), ("SandboxNode", "sandboxnodes")],
    ids=["sandbox", "sandboxnode"],
)
def test_kubectl_explains_every_field(cluster: Any, kind: str, plural: str) -> None:
    """`kubectl explain` shows the server's OpenAPI v3 document; so every field of that has a description."""
    document = json.loads(cluster.kubectl("get", "--raw", "/openapi/v3/apis/sandkeeper.dev/v1alpha1"))
    schema = document["components"]["schemas"][f"dev.sandkeeper.v1alpha1.{kind}"]
    fields = dict(_fields(schema, kind))
    assert len(fields) > 20
    assert not [path for path, text in fields.items() if not text]
    explained = cluster.kubectl("explain", plural, "--recursive")
    missing = {
        path for path in fields if f"\n{'  ' * path.count('.')}{path.rpartition('.')[2]}\t" not in explained
    }
    assert not missing


def _fields(schema: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    for name, child in schema.get("properties", {}).items():
        yield f"{path}.{name}", child.get("description", "")
        if name != "metadata":  # Kubernetes' own
            yield from _fields(child.get("items", child), f"{path}.{name}")
