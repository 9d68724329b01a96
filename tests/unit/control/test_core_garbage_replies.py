"""Records full of garbage: whatever a node says, a decision is made and a status written that the API server takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.unit.control import fakes
from tests.unit.control.test_core_rules import (
    N1,
    NOT_HEARD,
    PAUSED,
    RECREATE,
    SILENT,
    STOPPED,
    ended,
    record,
    see,
)
from tests.unit.control.test_core_rules import status as observed

from sandkeeper.api import Sandbox, SandboxNodeStatus, SandboxStatus
from sandkeeper.api.quantity import parse_quantity
from sandkeeper.control import status
from sandkeeper.control.actions import Assign, Rest, Verdict
from sandkeeper.control.decide import decide
from sandkeeper.control.nodestatus import node_status
from sandkeeper.control.observation import Absent, Assignment, Observation, Present, RecordView, Unknown
from sandkeeper.wire import node_pb2

ROOT = Path(__file__).resolve().parents[3]


def status_schema(name: str) -> dict[str, Any]:
    crd = yaml.safe_load((ROOT / "crds" / name).read_text())
    found: dict[str, Any] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    return found


SCHEMA, NODE_SCHEMA = status_schema("sandboxes.yaml"), status_schema("sandboxnodes.yaml")
# etcd takes 1.5 MiB in one request, and an object is more than its status.
MAX_STATUS_BYTES = 512 * 1024
MAX_ANNOTATIONS_BYTES = 256 * 1024

FAST = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)


# The schema, as the API server applies it


def complaints(schema: dict[str, Any], value: Any, path: str = "status") -> Iterator[str]:
    """What the API server would refuse in `value`; of CEL, rules that are one `self.matches(...)`."""
    if schema.get("x-kubernetes-int-or-string"):
        # Of a quantity only what cannot go wrong elsewhere: that it is one, and not too long.
        if parse_quantity(value) < 0 or len(value) > schema["maxLength"]:
            yield f"{path}: {value!r} is no quantity"
        return
    kind = schema["type"]
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    if not isinstance(value, types[kind]) or (kind == "integer" and isinstance(value, bool)):
        yield f"{path}: {value!r} is no {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is none of {schema['enum']}"
    if kind == "integer" and not schema["minimum"] <= value <= schema["maximum"]:
        yield f"{path}: {value} is out of bounds"
    if kind == "string":
        yield from _text(schema, value, path)
    if kind == "array":
        if len(value) > schema["maxItems"]:
            yield f"{path}: {len(value)} items"
        keys = [
            tuple(each.get(key) for key in schema.get("x-kubernetes-list-map-keys", ())) for each in value
        ]
        if schema["x-kubernetes-list-type"] == "map" and len(set(keys)) != len(keys):
            yield f"{path}: {keys} are not unique"
        for index, each in enumerate(value):
            yield from complaints(schema["items"], each, f"{path}[{index}]")
    if kind == "object":
        yield from (f"{path}.{key}: is required" for key in schema.get("required", ()) if key not in value)
        for key, each in value.items():
            if key not in schema["properties"]:
                yield f"{path}.{key}: is unknown"
            else:
                yield from complaints(schema["properties"][key], each, f"{path}.{key}")


def _text(schema: dict[str, Any], value: str, path: str) -> Iterator[str]:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 2**31):
        yield f"{path}: has {len(value)} characters"
    patterns = [schema["pattern"]] if "pattern" in schema else []
    for rule in schema.get("x-kubernetes-validations", ()):
        found = re.fullmatch(r"self\.matches\('(.*)'\)", rule["rule"])
        assert found is not None, f"{path}: the test cannot read {rule['rule']}"
        patterns.append(found[1].replace("\\\\", "\\"))
    for pattern in patterns:
        # Go's `$` is the end of the text, Python's may be before a last line break.
        if not re.search(pattern.replace("$", r"\Z"), value):
            yield f"{path}: {value!r} does not match {pattern}"
    if schema.get("format") == "date-time" and not re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", value
    ):
        yield f"{path}: {value!r} is no time"


# Whatever a server may say

texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(
        [
            "", "main", "Completed", "Stopped", "SandboxLost", "CrashLoopBackOff", "Stopping", "Unschedulable",
            "unnamed", "u", "u-1", "n1", "crun", "a\nb", "\0", "a" * 64, "a" * 63, "-", "é" * 4097, "😀" * 20_000,
        ]
    ),
)  # fmt: skip


def numbers(bits: int, signed: bool = False) -> st.SearchStrategy[int]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    edges = [low, 0, 1, 2, 127, 128, 255, 256, 2**31 - 1, 2**31, 2**53 - 1, 2**53, high]
    known = st.sampled_from([edge for edge in edges if low <= edge <= high])
    return known | known | st.integers(low, high)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


enums = st.integers(0, 7) | numbers(32, signed=True)
EPOCH_SECONDS = int(fakes.EPOCH.timestamp())
times = st.builds(
    Timestamp,
    seconds=st.sampled_from([0, EPOCH_SECONDS, -62_135_596_800, 253_402_300_799]) | numbers(64, signed=True),
    nanos=st.sampled_from([0, 999_999_999]) | numbers(32, signed=True),
)
exits = st.builds(
    node_pb2.Exit,
    status=numbers(32), signal=numbers(32), reason=texts, message=texts, exited_at=maybe(times),
)  # fmt: skip
containers = st.builds(
    node_pb2.ContainerRecord,
    name=texts, state=enums, pid=numbers(32), restart_count=numbers(32), started_at=maybe(times),
    exit=maybe(exits), image_id=texts, reason=texts, message=texts,
)  # fmt: skip
owners = st.builds(
    node_pb2.Owner, namespace=texts, name=texts, uid=st.just("u") | texts, instance=numbers(32)
)
usages = st.builds(
    node_pb2.Usage,
    cpu_usage_usec=numbers(64), memory_bytes=numbers(64), pids=numbers(64), sampled_at=maybe(times),
)  # fmt: skip
records = st.builds(
    node_pb2.SandboxRecord,
    sandbox_id=texts, owner=maybe(owners), digest=texts, runtime=texts, state=enums, pid=numbers(32),
    created_at=maybe(times), started_at=maybe(times), exit=maybe(exits),
    containers=st.lists(containers, max_size=4) | containers.map(lambda each: [each] * 40),
    addresses=st.lists(texts, max_size=20), usage=maybe(usages), reason=texts, message=texts,
)  # fmt: skip
views: st.SearchStrategy[RecordView] = st.builds(Present, records) | st.sampled_from(
    [Absent(), Absent(proven=True), Unknown()]
)

SPECS: list[dict[str, Any]] = [
    {},
    STOPPED,
    PAUSED,
    RECREATE,
    {"failurePolicy": {"recreate": "OnFailure", "limit": 1000, "backoffSeconds": 3600}},
    {"activeDeadlineSeconds": 2**31 - 1},
    {"activeDeadlineSeconds": 1, "ttlSecondsAfterFinished": 2**31 - 1},
    {"shutdownTime": "9999-12-31T23:59:59Z", "ttlSecondsAfterFinished": 0},
    {"shutdownTime": "0001-01-01T00:00:00Z"},
]
STATUSES: list[dict[str, Any]] = [
    {},
    fakes.DEFAULT_STATUS,
    observed(startedAt="2026-01-01T00:00:00Z"),
    ended(),
    ended("Error", 1),
    {**ended("Error", 1), "exitedAt": "9999-12-31T23:59:59.999999Z"},
    {**ended("Stopped", 143), "exitedAt": "0001-01-01T00:00:00Z"},
]


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    assigned = draw(st.sampled_from([True, True, True, False]))
    digest = draw(st.sampled_from(["", "same", "other"]))
    view = draw(views)
    o = see(
        draw(st.sampled_from(SPECS)),
        draw(st.sampled_from(STATUSES)),
        assigned=assigned,
        outdated=draw(st.booleans()),
        recreations=draw(st.sampled_from([0, 1, 2**31 - 1])),
        record=view,
        deleting=draw(st.sampled_from([False, False, True])),
        finalizing=draw(st.booleans()),
        assignment_lost=not assigned and draw(st.booleans()),
        holdings=tuple(("n1", each) for each in draw(st.lists(records, max_size=2))),
        mass_outage=draw(st.booleans()),
        refusal=draw(maybe(st.tuples(texts, texts))),
        invalid=draw(st.sampled_from(["", "", "spec: bad"])),
        retention=draw(st.sampled_from([0.0, 300.0, 1e9])),
    )
    if isinstance(view, Present) and o.assignment is not None and digest == "same":
        view.record.digest = o.assignment.digest
    if not assigned:
        return o
    instance = draw(st.sampled_from([1, 2, 2**31 - 2]))
    o = replace(o, assignment=replace(o.assignment, instance=instance) if o.assignment else None)
    nodes = [N1, N1, SILENT, NOT_HEARD, replace(N1, out_of_service=True), None]
    return replace(o, node=draw(st.sampled_from(nodes)))


def told(o: Observation) -> dict[str, Any]:
    """The status that is written for `o`, checked for all that is asked of one."""
    decision = decide(o)
    found = status.compute(o, decision)
    raw = found.to_dict()
    assert list(complaints(SCHEMA, raw)) == []
    # Read again it is the same: the next pass compares the two.
    assert SandboxStatus.model_validate(raw).to_dict() == raw
    assert len(json.dumps(raw, allow_nan=False).encode()) < MAX_STATUS_BYTES
    for happening in status.happenings(o, decision, found):
        assert (
            list(complaints({"type": "string", "pattern": "^[A-Za-z]+[A-Za-z0-9]*$"}, happening.reason)) == []
        )
    return raw


@FAST
@given(observations())
def test_any_record_makes_a_status_that_the_api_server_takes(o: Observation) -> None:
    told(o)


@FAST
@given(observations())
def test_any_assignment_that_is_written_can_be_read_again(o: Observation) -> None:
    action = decide(o).action
    if isinstance(action, Assign):
        text = action.assignment.dump()
        assert Assignment.parse(text, o.uid) == action.assignment
        assert len(text.encode()) < MAX_ANNOTATIONS_BYTES


@FAST
@given(observations())
def test_the_same_record_seen_again_is_written_once(o: Observation) -> None:
    seen: list[dict[str, Any]] = []
    for _ in range(4):
        seen.append(told(o))
        sandbox = Sandbox.model_validate({"spec": o.sandbox.spec.to_dict(), "status": seen[-1]})
        o = replace(o, sandbox=sandbox, now=o.now + timedelta(milliseconds=1))
    assert seen[-1] == seen[-2]


annotations = st.fixed_dictionaries(
    {
        "uid": st.just("u"),
        "node": texts | st.sampled_from(["n1", "a.b", "a" * 253, "a" * 254, "N1", "n1\n", "../n1"]),
        "instance": numbers(64, signed=True),
        "digest": texts,
        "runtime": texts,
        "recreations": numbers(64, signed=True),
    }
)


@FAST
@given(annotations, records)
def test_any_annotation_that_is_trusted_makes_a_status_that_the_api_server_takes(
    annotation: dict[str, Any], found: node_pb2.SandboxRecord
) -> None:
    assignment = Assignment.parse(json.dumps(annotation), "u")
    if assignment is not None:
        told(replace(see(record=Present(found)), assignment=assignment))


amounts = st.builds(
    node_pb2.NodeResources,
    cpu_millis=numbers(64, signed=True), memory_bytes=numbers(64, signed=True), pids=numbers(64, signed=True),
    sandboxes=numbers(64, signed=True),
)  # fmt: skip
infos = st.builds(
    node_pb2.InfoResponse,
    node_name=st.just("n1"), version=texts, engine=texts, default_runtime=texts, boot_id=texts,
    runtimes=st.lists(
        st.builds(node_pb2.Runtime, name=texts, version=texts, ready=st.booleans(), message=texts), max_size=40
    ),
    capacity=amounts, allocatable=maybe(amounts), started_at=maybe(times), features=st.lists(texts, max_size=3),
)  # fmt: skip


@FAST
@given(infos, st.booleans(), texts)
def test_whatever_a_shim_says_of_itself_makes_a_status_that_the_api_server_takes(
    info: node_pb2.InfoResponse, reachable: bool, message: str
) -> None:
    link: Any = SimpleNamespace(info=info, reachable=reachable, reason="ShimUnreachable", message=message)
    raw = node_status({"metadata": {"generation": 1}}, link, 3, fakes.EPOCH).to_dict()
    assert list(complaints(NODE_SCHEMA, raw)) == []
    assert SandboxNodeStatus.model_validate(raw).to_dict() == raw


# One by one: what the above has found


def test_pids_of_a_node_are_cut_to_what_the_schema_holds() -> None:
    info = node_pb2.InfoResponse(node_name="n1", capacity=node_pb2.NodeResources(pids=2**63 - 1))
    link: Any = SimpleNamespace(info=info, reachable=True, reason="", message="")
    found = node_status({"metadata": {}}, link, 0, fakes.EPOCH)
    assert found.capacity is not None
    assert found.capacity.pids == 2**53 - 1


def at(seconds: int, nanos: int = 0) -> Timestamp:
    return Timestamp(seconds=seconds, nanos=nanos)


FAR = at(2**62)
LAST = "9999-12-31T23:59:59Z"


@pytest.mark.parametrize(
    ("stamp", "said"),
    [
        (FAR, LAST),
        (at(-(2**62)), "0001-01-01T00:00:00Z"),
        (at(EPOCH_SECONDS, -1), "2026-01-01T00:00:00Z"),
        (at(EPOCH_SECONDS, 2_000_000_000), "2026-01-01T00:00:00.999999Z"),
        (at(EPOCH_SECONDS, 1_999), "2026-01-01T00:00:00.000001Z"),
    ],
)
def test_a_time_out_of_range_becomes_the_nearest_in_it(stamp: Timestamp, said: str) -> None:
    seen = record(node_pb2.STATE_RUNNING)
    seen.record.started_at.CopyFrom(stamp)
    assert told(see(record=seen))["startedAt"] == said


def test_an_end_in_the_year_9999_is_waited_for() -> None:
    seen = record(node_pb2.STATE_EXITED, exit=(1, "Error"))
    seen.record.exit.exited_at.CopyFrom(FAR)
    spec = {**RECREATE, "ttlSecondsAfterFinished": 1, "activeDeadlineSeconds": 1}
    first = told(see(spec, record=seen))
    assert first["exitedAt"] == LAST
    then = see(spec, first, record=seen, retention=60.0)
    assert told(then)["exitedAt"] == LAST
    decision = decide(then)
    assert (decision.action, decision.verdict) == (Rest(), Verdict.PROGRESSING)
    assert decision.requeue_after is not None
    assert decision.requeue_after > 0


def test_a_start_in_the_year_9999_has_no_deadline_yet() -> None:
    seen = record(node_pb2.STATE_RUNNING)
    seen.record.started_at.CopyFrom(FAR)
    assert decide(see({"activeDeadlineSeconds": 2**31 - 1}, record=seen)).verdict is Verdict.READY


def test_usage_is_cut_to_what_the_schema_holds() -> None:
    seen = record(node_pb2.STATE_RUNNING)
    usage = seen.record.usage
    usage.cpu_usage_usec = usage.memory_bytes = usage.pids = 2**64 - 1
    assert told(see(record=seen))["usage"] == {
        "cpuUsageMilliseconds": 2**53 - 1,
        "memoryBytes": 2**53 - 1,
        "pids": 2**53 - 1,
    }


def test_a_container_that_the_schema_cannot_name_is_left_out() -> None:
    seen = record(node_pb2.STATE_RUNNING)
    for name in ("", "unnamed", "Main", "a" * 63, "a" * 64, "a" * 65, "main", "main", "a\n", "-", "ä"):
        seen.record.containers.add(name=name)
    assert [each["name"] for each in told(see(record=seen))["containers"]] == ["unnamed", "a" * 63, "main"]


@pytest.mark.parametrize("state", [7, 99, -1, 2**31 - 1])
def test_a_state_of_a_newer_shim_is_unknown_and_left_alone(state: int) -> None:
    o = see(record=record(state, pid=7))
    decision = decide(o)
    assert (decision.action, decision.verdict, decision.reason) == (Rest(), Verdict.UNKNOWN, "UnknownState")
    raw = told(o)
    said = {each["type"]: each["status"] for each in raw["conditions"]}
    assert raw["phase"] == "Unknown"
    assert (said["Ready"], said["Running"], said["Finished"]) == ("Unknown", "Unknown", "Unknown")


@pytest.mark.parametrize("instance", [0, 2**31, 2**32 - 1])
def test_a_record_of_no_instance_restores_no_assignment(instance: int) -> None:
    seen = record(node_pb2.STATE_RUNNING).record
    seen.owner.instance = instance
    o = see(status=observed(), assigned=False, assignment_lost=True, holdings=(("n2", seen),))
    action = decide(o).action
    assert isinstance(action, Assign)
    assert (action.assignment.node, action.assignment.instance) == ("n1", 1)


def test_an_assignment_restored_from_a_node_fits_an_annotation() -> None:
    seen = record(node_pb2.STATE_RUNNING, digest="d" * 10**6, runtime="r" * 10**6).record
    action = decide(see(assigned=False, assignment_lost=True, holdings=(("n1", seen),))).action
    assert isinstance(action, Assign)
    assert len(action.assignment.dump()) < 1024


@pytest.mark.parametrize(
    ("key", "value"),
    [("instance", 2**31), ("recreations", 2**31), ("node", "N1"), ("node", "a" * 254), ("node", "../n1")],
)
def test_an_annotation_that_no_status_can_hold_is_not_trusted(key: str, value: Any) -> None:
    known = Assignment("u", "n1", 1, "d", "crun")
    text = json.dumps({**json.loads(known.dump()), key: value})
    assert Assignment.parse(text, "u") is None
    assert Assignment.parse(known.dump(), "u") == known


def test_the_complaints_of_the_schema_are_found() -> None:
    """The test's own eyes: a status that is wrong in each way is complained of."""
    good = told(see(record=record(node_pb2.STATE_RUNNING)))
    bad: list[dict[str, Any]] = [
        {"exitStatus": 256}, {"exitReason": "a b"}, {"exitReason": "a\n"}, {"exitReason": ""}, {"phase": "Odd"},
        {"nodeName": "N1"}, {"nodeName": "a" * 254}, {"pid": "7"}, {"pid": True}, {"startedAt": "today"},
        {"more": 1}, {"usage": {"pids": 2**53}}, {"addresses": ["x"] * 17}, {"conditions": good["conditions"] * 2},
        {"containers": [{"state": "Running"}]}, {"containers": [{"name": "A"}]},
        {"containers": [{"name": "a", "message": "x" * 4097}]},
    ]  # fmt: skip
    for change in bad:
        assert list(complaints(SCHEMA, {**good, **change})), change
