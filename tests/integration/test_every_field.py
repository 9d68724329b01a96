"""Every field counts: each field of the CRD's schema, at its bounds and beyond them, on objects that are new and on
objects that run. It takes effect, or the API server or a condition names it; and going back to the last good spec
needs no hand.

The simulated engine serves: whether a field has its effect on a process is the oci engine's tests'.
"""

from __future__ import annotations

import copy
import json
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from pydantic import ValidationError
from tests.cluster import condition_of, eventually, fresh_namespace, whole_cluster
from tests.sandboxes import current, ready

from sandkeeper.api import API_VERSION, GROUP, LIFE_SPAN_FIELDS, VERSION, SandboxSpec, instance_digest
from sandkeeper.localcluster.cluster import LocalCluster

pytestmark = pytest.mark.cluster

CRD = yaml.safe_load((Path(__file__).parents[2] / "crds/sandboxes.yaml").read_text())
SCHEMA = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
WAITS = {"Unschedulable", "PullingImage", "ErrImagePull", "ImagePullBackOff", "CrashLoopBackOff"}
HUGE = 2**63 - 1

BASE: dict[str, Any] = {
    "nodeSelector": {},
    "containers": [
        {
            "name": "main",
            "image": "busybox:1.37",
            "imagePullPolicy": "IfNotPresent",
            "command": ["sleep", "86400"],
            "args": ["x"],
            "env": [{"name": "A", "value": "1"}],
            "workingDir": "/",
            "resources": {"limits": {"cpu": "100m", "memory": "64Mi", "pids": 8}},
            "securityContext": {
                "runAsUser": 1000,
                "runAsGroup": 1000,
                "runAsNonRoot": True,
                "readOnlyRootFilesystem": False,
                "capabilities": {"add": ["CHOWN"], "drop": ["ALL"]},
            },
            "volumeMounts": [{"name": "data", "mountPath": "/data", "subPath": "a", "readOnly": False}],
        }
    ],
    "volumes": [{"name": "data", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}],
    "hostname": "box",
    "failurePolicy": {"recreate": "Never", "limit": 1, "backoffSeconds": 1},
    "terminationGracePeriodSeconds": 0,
    "activeDeadlineSeconds": 86400,
    "shutdownTime": "2090-01-01T00:00:00Z",
    "ttlSecondsAfterFinished": 86400,
}


@dataclass(frozen=True, slots=True)
class Case:
    """One value at one path. value: None for null."""

    path: tuple[str | int, ...]
    value: Any

    @property
    def field(self) -> str:
        """The nearest name on the path."""
        return str(next(step for step in reversed(self.path) if isinstance(step, str)))

    def spec(self) -> dict[str, Any]:
        spec = copy.deepcopy(BASE)
        parent: Any = spec
        for step in self.path[:-1]:
            parent = parent.setdefault(step, {}) if isinstance(parent, dict) else parent[step]
        parent[self.path[-1]] = self.value
        return spec

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.path))}={str(self.value)[:40]!r}"


def cases(schema: dict[str, Any] = SCHEMA, path: tuple[str | int, ...] = ()) -> Iterator[Case]:
    """Every field below `path`, each with the values of its kind."""
    for name, field in schema.get("properties", {}).items():
        here = (*path, name)
        for value in values(field):
            yield Case(here, value)
        if field.get("type") == "array":
            items = field["items"]
            if items.get("type") == "object":
                yield from cases(items, (*here, 0))
            else:
                for value in values(items):
                    yield Case((*here, 0), value)
        elif field.get("type") == "object":
            yield from cases(field, here)


def values(field: dict[str, Any]) -> list[Any]:
    """At the bounds, beyond them, of another kind, null."""
    found: list[Any] = [None, {"not": "this"}, [[]]]
    kind = "int-or-string" if field.get("x-kubernetes-int-or-string") else field.get("type")
    match kind:
        case "string":
            longest = int(field.get("maxLength", 64))
            found += ["", "a", "ü", "a\x00b", "../a", "A b", "x" * longest, "x" * (longest + 1)]
            found += field.get("enum", [])
        case "integer":
            low, high = int(field.get("minimum", 0)), int(field.get("maximum", HUGE))
            found += [low, low - 1, high, high + 1, -1, HUGE, "1"]
        case "int-or-string":
            found += [
                0,
                1,
                -1,
                HUGE,
                "",
                "1",
                "500m",
                "1.5",
                "1e3",
                "64Mi",
                "1Ki",
                "ü",
                "9" * 40,
                "-1",
                "0.0001",
            ]
        case "boolean":
            found += [True, False, "true", 1]
        case "array":
            most = int(field.get("maxItems", 4))
            found += [[], ["x"] * (most + 1), "x", ["ü"]]
        case "object":
            found += [{}, {"a": "b"}, {f"k{n}": "v" for n in range(100)}]
    return found


@pytest.fixture(scope="module")
def simulated() -> Iterator[LocalCluster]:
    room = {"CPU_MILLIS": str(10**9), "MEMORY_BYTES": str(2**50), "PIDS": str(4 * 2**20)}
    with whole_cluster(engine="simulated", shim_env=room) as local:
        yield local


@pytest.fixture(scope="module")
def api(simulated: LocalCluster) -> Iterator[Any]:
    with config.new_client_from_config(config_file=str(simulated.kubeconfig)) as connection:
        yield client.CustomObjectsApi(connection)


@dataclass(frozen=True, slots=True)
class There:
    """One namespace of the API server."""

    api: Any
    namespace: str

    def create(self, name: str, spec: Any, **options: Any) -> str:
        """What the API server says against it; empty where it takes it."""
        body = {"apiVersion": API_VERSION, "kind": "Sandbox", "metadata": {"name": name}, "spec": spec}
        return self._tried("create_namespaced_custom_object", body, **options)

    def change(self, name: str, spec: Any) -> None:
        """The whole spec is this one now."""
        patch = [{"op": "replace", "path": "/spec", "value": spec}]
        where = (GROUP, VERSION, self.namespace, "sandboxes", name)
        self.api.patch_namespaced_custom_object(
            *where, patch, field_validation="Strict", _content_type="application/json-patch+json"
        )

    def get(self) -> dict[str, Any]:
        listed = self.api.list_namespaced_custom_object(GROUP, VERSION, self.namespace, "sandboxes")
        return {item["metadata"]["name"]: item for item in listed["items"]}

    def _tried(self, method: str, *arguments: Any, **options: Any) -> str:
        try:
            where = (GROUP, VERSION, self.namespace, "sandboxes")
            getattr(self.api, method)(*where, *arguments, field_validation="Strict", **options)
        except ApiException as error:
            if error.status not in (400, 422):
                raise
            return str(json.loads(error.body)["message"])
        return ""

    def until_settled(self, names: set[str]) -> dict[str, Any]:
        """All of them, as soon as each is as wanted, failed for good, or waits for something that it names."""
        seen: dict[str, Any] = {}

        def unsettled() -> list[str]:
            seen.update(self.get())
            return [name for name in names if not settled(seen[name])]

        eventually(lambda: not unsettled(), timeout=90, every=0.3, seen=lambda: [
            (name, seen[name]["status"]) for name in unsettled()[:3]
        ])  # fmt: skip
        return seen


def settled(body: dict[str, Any]) -> bool:
    if not current(body):
        return False
    reason = condition_of(body, "Ready").get("reason")
    stalled = condition_of(body, "Stalled").get("status") == "True"
    return ready(body) == "True" or stalled or reason in WAITS


@pytest.fixture
def there(simulated: LocalCluster, api: Any) -> Iterator[There]:
    with fresh_namespace(simulated.kubectl) as namespace:
        yield There(api, namespace)


@pytest.fixture(autouse=True)
def no_pass_failed(simulated: LocalCluster) -> Iterator[None]:
    """Whatever is in an object, no pass of the operator ends with a traceback."""
    yield
    failed = re.findall(
        r'^sandkeeper_queue_passes_total\{outcome="(?:error|failed)"\} (\S+)',
        metrics(simulated),
        re.MULTILINE,
    )
    assert sum(map(float, failed)) == 0


def metrics(local: LocalCluster) -> str:
    return local.operator_get("/metrics")


def test_there_is_a_case_for_every_field() -> None:
    fields = {case.path for case in cases()}
    assert len(fields) > 40
    assert ("containers", 0, "securityContext", "capabilities", "add") in fields


def test_a_new_one_with_any_value_ends_somewhere(there: There) -> None:
    """Refused with a message that names the field, or settled."""
    accepted: dict[str, Case] = {}
    for number, case in enumerate(cases()):
        name = f"case-{number}"
        refusal = there.create(name, case.spec())
        if refusal:
            assert case.field in refusal, f"{case}: {refusal}"
        else:
            accepted[name] = case
    assert len(accepted) > 100
    bodies = there.until_settled(set(accepted))
    for name, case in accepted.items():
        body = bodies[name]
        if ready(body) != "True":
            condition = condition_of(body, "Ready")
            assert condition["message"], f"{case}: {condition}"


def test_any_change_of_a_running_one_counts_and_can_be_taken_back(
    there: There, simulated: LocalCluster
) -> None:
    tried = {
        f"case-{number}": case
        for number, case in enumerate(cases())
        if differs(case.spec()) and not there.create("probe", case.spec(), dry_run="All")
    }
    for name in tried:
        assert there.create(name, BASE) == ""
    before = there.until_settled(set(tried))
    for name, case in tried.items():
        assert ready(before[name]) == "True"
        there.change(name, case.spec())
    after = there.until_settled(set(tried))
    records = digests(simulated)
    for name, case in tried.items():
        status = after[name]["status"]
        try:
            spec = SandboxSpec.model_validate(after[name]["spec"])
        except ValidationError:  # the API server lets a list pass where `format: date-time` is
            assert condition_of(after[name], "Ready")["reason"] == "InvalidSpec"
            assert case.field in condition_of(after[name], "Ready")["message"]
            continue
        if case.path[0] in LIFE_SPAN_FIELDS and spec.desired_state == "Running":
            assert status["instance"] == 1, case
        if ready(after[name]) == "True" and status["phase"] == "Running":
            assert records[status["sandboxID"]] == instance_digest(spec), case
        elif ready(after[name]) != "True":
            assert condition_of(after[name], "Ready")["message"], case
    for name in tried:
        there.change(name, BASE)
    again = there.until_settled(set(tried))
    records = digests(simulated)
    wanted = instance_digest(SandboxSpec.model_validate(BASE))
    for name, case in tried.items():
        status = again[name]["status"]
        if after[name]["status"].get("exitReason") == "DeadlineExceeded":
            continue  # as a Job's: final, whatever is changed of it later
        assert (ready(again[name]), status["phase"]) == ("True", "Running"), f"{case}: {status}"
        assert records[status["sandboxID"]] == wanted, case


def differs(spec: dict[str, Any]) -> bool:
    return json.dumps(spec, sort_keys=True) != json.dumps(BASE, sort_keys=True)


def digests(local: LocalCluster) -> dict[str, str]:
    """Of what the node has: sandbox id -> the digest that Create was given."""
    with local.shim(0) as shim:
        return {each.sandbox_id: each.digest for each in shim.list().sandboxes}


def test_health_stays_green(simulated: LocalCluster) -> None:
    with urllib.request.urlopen(
        f"http://127.0.0.1:{simulated.plan.operator_port}/healthz", timeout=5
    ) as answer:
        assert answer.status == 200
