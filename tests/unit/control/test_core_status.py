"""The status: conditions, phase, what is carried over, and when it is worth a write."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.control import fakes
from tests.unit.control.test_core_rules import (
    PAUSED,
    RECREATE,
    RUNNING,
    SILENT,
    STOPPED,
    crash_loop,
    ended,
    record,
    see,
)
from tests.unit.control.test_core_rules import status as observed

from sandkeeper.api import ASSIGNMENT_ANNOTATION, SandboxStatus
from sandkeeper.control import status
from sandkeeper.control.decide import decide
from sandkeeper.control.desired import owner_key, sandbox_config
from sandkeeper.control.observation import Absent, Assignment, Observation, Unknown
from sandkeeper.control.settings import OperatorSettings
from sandkeeper.wire import node_pb2

S = node_pb2


def told(o: Observation) -> dict[str, Any]:
    return status.compute(o, decide(o)).to_dict()


def words(o: Observation) -> dict[str, str]:
    return {c["type"]: f"{c['status']}/{c['reason']}" for c in told(o)["conditions"]}


ROWS = [
    (see(assigned=False, nodes=()), "Pending", "False/Unschedulable", "Reconciling"),
    (see(), "Starting", "False/Starting", "Reconciling"),
    (
        see(record=record(S.STATE_PREPARING, reason="ErrImagePull")),
        "Starting",
        "False/ErrImagePull",
        "Reconciling",
    ),
    (see(record=RUNNING), "Running", "True/Running", None),
    (crash_loop(), "Running", "False/CrashLoopBackOff", "Reconciling"),
    (see(record=record(S.STATE_PAUSED), spec=PAUSED), "Paused", "True/Paused", None),
    (see(record=RUNNING, spec=STOPPED), "Stopping", "False/Stopping", "Reconciling"),
    (see(assigned=False, spec=STOPPED), "Stopped", "True/Stopped", None),
    (see(status=ended("Stopped", 143), spec=STOPPED), "Stopped", "True/Stopped", None),
    (see(status=ended()), "Succeeded", "True/Completed", None),
    (see(status=ended("OOMKilled", 137)), "Failed", "False/OOMKilled", "Stalled"),
    (see(status=ended("Error", 1), spec=RECREATE), "Pending", "False/Error", "Reconciling"),
    (see(record=record(S.STATE_FAILED, reason="StartError")), "Failed", "False/StartError", "Stalled"),
    (see(refusal=("InvalidSpec", "no")), "Failed", "False/InvalidSpec", "Stalled"),
    (see(node=SILENT, record=Unknown()), "Unknown", "Unknown/NodeUnreachable", "Reconciling"),
    (see(deleting=True), "Terminating", "False/Deleting", "Reconciling"),
]


@pytest.mark.parametrize(
    ("o", "phase", "ready", "extra"), ROWS, ids=[f"{n}-{row[2]}" for n, row in enumerate(ROWS)]
)
def test_row(o: Observation, phase: str, ready: str, extra: str | None) -> None:
    assert told(o)["phase"] == phase
    found = words(o)
    assert found["Ready"] == ready
    assert {"Scheduled", "Running", "Finished", "Ready"} <= found.keys()
    assert found.keys() - {"Scheduled", "Running", "Finished", "Ready"} == ({extra} if extra else set())
    assert all(c["observedGeneration"] == 1 for c in told(o)["conditions"])


def kstatus(raw: dict[str, Any], generation: int) -> str:
    """cli-utils pkg/kstatus/status/generic.go."""
    if raw["observedGeneration"] != generation:
        return "InProgress"
    found = {c["type"]: c["status"] for c in raw["conditions"]}
    if found.get("Reconciling") == "True":
        return "InProgress"
    if found.get("Stalled") == "True":
        return "Failed"
    return "Current" if found["Ready"] == "True" else "InProgress"


def test_kstatus_ends_for_good_or_ill() -> None:
    assert kstatus(fakes.DEFAULT_STATUS, 1) == "InProgress"
    for o, phase, ready, extra in ROWS:
        expected = {"Stalled": "Failed", "Reconciling": "InProgress", None: "Current"}[extra]
        assert kstatus(told(o), 1) == expected, (phase, ready)


def test_transition_time_moves_only_with_the_status() -> None:
    first = told(see(record=RUNNING))
    later = replace(see(record=RUNNING, status=first), now=fakes.EPOCH + timedelta(hours=1))
    assert told(later)["conditions"] == first["conditions"]
    paused = replace(see(record=record(S.STATE_PAUSED), status=first), now=fakes.EPOCH + timedelta(hours=1))
    times = {c["type"]: c["lastTransitionTime"] for c in told(paused)["conditions"]}
    assert times["Scheduled"] == "2026-01-01T00:00:00Z"
    assert times["Ready"] == "2026-01-01T01:00:00Z"


def test_the_schema_defaults_time_is_not_carried_on() -> None:
    o = see(node=SILENT, record=Unknown(), status=fakes.DEFAULT_STATUS)
    assert {c["lastTransitionTime"] for c in told(o)["conditions"]} == {"2026-01-01T00:00:00Z"}


def test_an_exit_is_kept_without_the_node_and_cleared_by_the_next_instance() -> None:
    known = ended("Error", 3)
    for view in (Absent(), Unknown()):
        assert told(see(status=known, record=view))["exitStatus"] == 3
    after = replace(see(status=known), assignment=Assignment("u", "n1", 2, "d", "crun"))
    assert "exitStatus" not in told(after)
    assert "startedAt" not in told(after)


def test_a_lost_instance_has_no_exit_status() -> None:
    o = see(status=observed(startedAt="2026-01-01T00:00:00Z"), record=Absent(proven=True))
    assert told(o)["exitReason"] == "SandboxLost"
    assert "exitStatus" not in told(o)


def test_usage_alone_is_written_only_where_the_settings_ask_for_it() -> None:
    before = status.compute(o := see(record=RUNNING), decide(o))
    used = record(S.STATE_RUNNING)
    used.record.usage.memory_bytes = 5
    used.record.usage.sampled_at.FromDatetime(fakes.EPOCH)
    after = status.compute(o := see(record=used), decide(o))
    assert not status.changed(before, after, usage_interval=OperatorSettings().usage_interval)
    assert status.changed(before, after, usage_interval=60)
    assert not status.changed(after, after, usage_interval=60)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(st.text(max_size=2), json_values.filter(lambda v: v is not None), max_size=4)


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return value


@given(json_objects, json_objects)
def test_merge_patch_makes_one_into_the_other(before: dict[str, Any], after: dict[str, Any]) -> None:
    before, after = without_nulls(before), without_nulls(after)
    assert fakes.merge(before, status.merge_patch(before, after)) == after
    assert status.merge_patch(after, after) == {}


@given(st.text(max_size=40) | st.sampled_from(["Completed", "A" * 128, "A" * 129, "1a", "a-b"]))
def test_any_reason_on_the_wire_makes_a_valid_status(reason: str) -> None:
    o = see(record=record(S.STATE_EXITED, exit=(300, reason)))
    SandboxStatus.model_validate(told(o))


@given(st.binary(max_size=200))
def test_any_record_on_the_wire_makes_a_valid_status(data: bytes) -> None:
    found = node_pb2.SandboxRecord()
    try:
        found.ParseFromString(data)
    except Exception:
        return
    from sandkeeper.control.observation import Present

    SandboxStatus.model_validate(told(see(record=Present(found))))


# The annotation


def test_assignment_travels() -> None:
    assignment = Assignment("u", "n1", 3, "sha256:x", "crun", 2)
    assert Assignment.parse(assignment.dump(), "u") == assignment
    assert Assignment.parse(assignment.dump(), "other") is None
    assert Assignment.foreign(assignment.dump(), "other")
    assert not Assignment.foreign(assignment.dump(), "u")


@given(st.text() | json_objects.map(lambda value: __import__("json").dumps({"uid": "u", **value})))
def test_any_annotation_is_survived(text: str) -> None:
    Assignment.parse(text, "u")
    Assignment.foreign(text, "u")


@pytest.mark.parametrize(
    "text",
    [
        None, "", "null", "[]", "{", "1", '{"uid":"u"}', "[" * 100_000,
        '{"uid":"u","node":"n","instance":0,"digest":"d","runtime":"r"}',
        '{"uid":"u","node":"n","instance":true,"digest":"d","runtime":"r"}',
        '{"uid":"u","node":"n","instance":1.5,"digest":"d","runtime":"r"}',
        '{"uid":"u","node":"n","instance":99999999999,"digest":"d","runtime":"r"}',
        '{"uid":"u","node":"","instance":1,"digest":"d","runtime":"r"}',
        '{"uid":"u","node":7,"instance":1,"digest":"d","runtime":"r"}',
        '{"uid":"u","node":"n","instance":1,"digest":"d","runtime":"r","recreations":-1}',
    ],
)  # fmt: skip
def test_a_spoiled_annotation_is_none(text: str | None) -> None:
    assert Assignment.parse(text, "u") is None
    assert ASSIGNMENT_ANNOTATION.startswith("sandkeeper.dev/")


# What the shim is asked for


def test_config() -> None:
    spec = {
        "containers": [
            {
                "name": "main",
                "image": "registry.example.com:5000/a",
                "command": ["sleep"],
                "args": ["1"],
                "env": [{"name": "A", "value": "b"}],
                "workingDir": "/srv",
                "resources": {"limits": {"cpu": "500m", "memory": "64Mi", "pids": 9}},
                "securityContext": {"runAsUser": 5, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [{"name": "v", "mountPath": "/v", "readOnly": True}],
            }
        ],
        "volumes": [{"name": "v", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}],
        "restartPolicy": "OnFailure",
        "network": "Host",
        "terminationGracePeriodSeconds": 7,
    }
    o = see(spec)
    assert o.assignment is not None
    config = sandbox_config(o, o.assignment)
    assert owner_key(o, o.assignment).sandbox_id == "u-1"
    assert (config.owner.uid, config.owner.instance, config.hostname) == ("u", 1, "a")
    assert config.digest == o.desired_digest
    assert config.restart_policy == S.RESTART_POLICY_ON_FAILURE
    assert config.network == S.NETWORK_HOST
    assert config.termination_grace_period_seconds == 7
    (container,) = config.containers
    assert container.image_pull_policy == S.IMAGE_PULL_POLICY_ALWAYS
    assert (container.resources.cpu_millis, container.resources.memory_bytes, container.resources.pids) == (
        500, 2**26, 9,
    )  # fmt: skip
    assert container.security_context.run_as_user == 5
    assert not container.security_context.HasField("run_as_group")
    assert list(container.security_context.capabilities_drop) == ["ALL"]
    assert container.volume_mounts[0].read_only
    assert config.volumes[0].memory
    assert config.volumes[0].size_limit_bytes == 2**20


def test_a_record_from_before_the_end_tells_nothing_any_more() -> None:
    """Our own call had the end for an answer, and the Watch stream is behind."""
    seen = record(S.STATE_RUNNING)
    seen.record.containers.add(name="main", state=S.CONTAINER_STATE_RUNNING, pid=8)
    seen.record.addresses.append("10.0.0.1")
    found = told(see(status=ended("Error", 5), record=seen))
    assert found["exitReason"] == "Error"
    assert (found.get("pid"), found["addresses"], found["containers"]) == (None, [], [])
