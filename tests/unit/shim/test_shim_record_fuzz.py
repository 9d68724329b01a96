"""Files of a state directory full of garbage: a sandbox or none, and nothing that keeps a shim from starting."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandkeeper.shim.records import Asked, Records, Saved
from sandkeeper.wire import node_pb2

FAST = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
ID = "uid-1"


def saved() -> Saved:
    config = node_pb2.SandboxConfig(
        owner=node_pb2.Owner(namespace="ns", name="a", uid="uid", instance=1),
        digest="abc",
        containers=[node_pb2.ContainerConfig(name="main", image="busybox", command=["sleep"])],
    )
    record = node_pb2.SandboxRecord(
        sandbox_id=ID, owner=config.owner, digest="abc", state=node_pb2.STATE_EXITED, pid=42
    )
    record.containers.add(name="main", state=node_pb2.CONTAINER_STATE_EXITED)
    record.created_at.FromSeconds(1_700_000_000)
    record.exit.status = 137
    return Saved(config, record, Asked(stop_at=12.5))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    records = Records(folder)
    records.open()
    records.create(saved())
    return folder


def loaded(state: Path, **files: bytes) -> Saved | None:
    """What the next start of a shim finds where these files are in place of the whole ones."""
    records = Records(state)
    for name, content in {"config": WHOLE_CONFIG, "record": WHOLE_RECORD, **files}.items():
        (state / "sandboxes" / ID / f"{name}.json").write_bytes(content)
    records.open()
    found = dict(records.load())
    assert found.keys() == {ID}
    return found[ID]


def sound(state: Path, **files: bytes) -> None:
    found = loaded(state, **files)
    if found is not None:
        assert found.record.sandbox_id == ID
        assert math.isfinite(found.asked.stop_at)
        # What was read can be written, and is then the same.
        Records(state).save(found)
        again = dict(Records(state).load())[ID]
        assert again is not None
        assert again.record == found.record
        assert again.asked.stop_at == found.asked.stop_at


WHOLE_CONFIG = json_format.MessageToJson(saved().config, indent=None).encode()
WHOLE_RECORD = json.dumps(
    {"record": json_format.MessageToDict(saved().record), "asked": {"stop_at": 12.5, "removing": False}}
).encode()

numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 2**63, 2**64, -1, 1e308, 2**53])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
times = (
    values
    | st.datetimes().map(lambda at: f"{at.isoformat()}Z")
    | st.sampled_from(
        ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999999Z", "10000-01-01T00:00:00Z", "Z"]
    )
)
exits = values | st.fixed_dictionaries(
    {}, optional={"status": values, "signal": values, "reason": values, "exitedAt": times}
)
containers = values | st.fixed_dictionaries(
    {}, optional={"name": values, "state": values, "restartCount": values, "exit": exits, "startedAt": times}
)
# What makes a record whole, with any of it spoiled.
KNOWN = json_format.MessageToDict(saved().record)
SPOILED = {
    "owner": values | st.fixed_dictionaries({}, optional={"uid": values, "instance": values}),
    "state": values | st.sampled_from(["STATE_RUNNING", "STATE_ODD", 99, -1]),
    "pid": values | st.integers(0, 2**32 - 1),
    "runtime": values | st.text(),
    "createdAt": times,
    "startedAt": times,
    "exit": exits,
    "containers": values | st.lists(containers, max_size=2),
    "addresses": values | st.lists(st.text(max_size=8)),
    "usage": values | st.fixed_dictionaries({}, optional={"pids": values, "sampledAt": times}),
    "fromTheFuture": values,
}
fields = st.lists(st.sampled_from(sorted(SPOILED)), max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: SPOILED[name] for name in names}).map(
        lambda odd: {**KNOWN, **odd}
    )
)
plain = st.just({"stop_at": 0, "removing": False})
spoiled = st.fixed_dictionaries({}, optional={"stop_at": values | numbers, "removing": values})
asked = plain | st.builds(lambda at: {"stop_at": at, "removing": True}, st.floats()) | spoiled
records = values | st.fixed_dictionaries({"record": fields, "asked": asked})
configs = values | st.fixed_dictionaries(
    {},
    optional={
        "owner": values,
        "containers": values
        | st.lists(st.fixed_dictionaries({}, optional={"env": values, "name": values}), max_size=2),
        "network": values,
    },
)


def as_json(value: Any) -> bytes:
    # NaN, Infinity and halves of characters: Python's JSON takes them.
    return json.dumps(value).encode()


@FAST
@given(content=st.binary(max_size=200))
def test_any_bytes_in_place_of_a_file_are_survived(state: Path, content: bytes) -> None:
    sound(state, record=content)
    sound(state, config=content)


@FAST
@given(record=records)
def test_any_json_in_place_of_a_record_is_survived(state: Path, record: Any) -> None:
    sound(state, record=as_json(record))


@FAST
@given(config=configs)
def test_any_json_in_place_of_a_configuration_is_survived(state: Path, config: Any) -> None:
    sound(state, config=as_json(config))


@FAST
@given(data=st.data())
def test_a_file_with_some_bytes_changed_is_survived(state: Path, data: st.DataObject) -> None:
    name, whole = data.draw(st.sampled_from([("record", WHOLE_RECORD), ("config", WHOLE_CONFIG)]))
    spoiled = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        spoiled[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    sound(state, **{name: bytes(spoiled)})


@pytest.mark.parametrize(
    "stop_at",
    ["1e999", "-1e999", "NaN", "Infinity", "1" * 400, "-" + "1" * 400, '"nan"', '"inf"', "[]", "{}"],
)
def test_a_stop_at_no_time_makes_no_sandbox(state: Path, stop_at: str) -> None:
    text = WHOLE_RECORD.replace(b"12.5", stop_at.encode())
    assert text != WHOLE_RECORD
    assert loaded(state, record=text) is None


@pytest.mark.parametrize("depth", [100, 1000, 100_000])
@pytest.mark.parametrize("name", ["record", "config"])
def test_json_of_any_depth_is_survived(state: Path, name: str, depth: int) -> None:
    for whole in (b"[" * depth, b'{"fromTheFuture":' * depth + b"1" + b"}" * depth):
        sound(state, **{name: whole})


@pytest.mark.parametrize("content", [b"", b"x", b"1_0", b"1" * 5000, b"\xff", b"1.5"])
def test_a_fence_of_garbage_is_survived(state: Path, content: bytes) -> None:
    records = Records(state)
    records.open()
    (state / "fences" / "other").write_bytes(content)
    assert records.fence("other") >= 0
