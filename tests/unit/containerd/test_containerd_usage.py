"""Which of a sandboxer's metrics are read, and what of them."""

from __future__ import annotations

import pytest
from google.protobuf import any_pb2
from google.protobuf.message import Message

from sandkeeper.shim.engines.base import UsageSample
from sandkeeper.shim.engines.containerd import usage
from sandkeeper.wire import node_pb2
from sandkeeper.wire.containerd import cgroup1_pb2, cgroup2_pb2

V1 = cgroup1_pb2.Metrics(
    pids={"current": 3}, cpu={"usage": {"total": 5_000_999}}, memory={"usage": {"usage": 4096}}
)
V2 = cgroup2_pb2.Metrics(pids={"current": 3}, cpu={"usage_usec": 5000}, memory={"usage": 4096})
OURS = node_pb2.Usage(cpu_usage_usec=5000, memory_bytes=4096, pids=3)


@pytest.mark.parametrize("message", [V1, V2, OURS])
@pytest.mark.parametrize("prefix", ["", "type.googleapis.com/"])
def test_types_that_are_read(message: Message, prefix: str) -> None:
    data = any_pb2.Any(type_url=prefix + message.DESCRIPTOR.full_name, value=message.SerializeToString())
    assert usage.read(data) == UsageSample(5000, 4096, 3)


@pytest.mark.parametrize(
    "data",
    [
        any_pb2.Any(type_url="vmm.v1.Metrics", value=V1.SerializeToString()),
        any_pb2.Any(type_url="io.containerd.cgroups.v1.Metrics", value=b"\xff"),
        any_pb2.Any(),
    ],
)
def test_what_cannot_be_read(data: any_pb2.Any) -> None:
    assert usage.read(data) is None


def test_fields_of_a_newer_one_are_passed_over() -> None:
    newer = any_pb2.Any(
        type_url="io.containerd.cgroups.v2.Metrics", value=V2.SerializeToString() + b"\xf8\x07\x01"
    )
    assert usage.read(newer) == UsageSample(5000, 4096, 3)
