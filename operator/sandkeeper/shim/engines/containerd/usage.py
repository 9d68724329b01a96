"""What a sandboxer's Metrics say of a sandbox's use: of the types that containerd's shims have, and of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from google.protobuf import any_pb2
from google.protobuf.message import DecodeError

from sandkeeper.shim.engines.base import UsageSample
from sandkeeper.wire import node_pb2
from sandkeeper.wire.containerd import cgroup1_pb2, cgroup2_pb2


def _of_cgroup1(value: bytes) -> UsageSample:
    found = cgroup1_pb2.Metrics.FromString(value)
    return UsageSample(found.cpu.usage.total // 1000, found.memory.usage.usage, found.pids.current)


def _of_cgroup2(value: bytes) -> UsageSample:
    found = cgroup2_pb2.Metrics.FromString(value)
    return UsageSample(found.cpu.usage_usec, found.memory.usage, found.pids.current)


def _of_ours(value: bytes) -> UsageSample:
    found = node_pb2.Usage.FromString(value)
    return UsageSample(found.cpu_usage_usec, found.memory_bytes, found.pids)


_KNOWN: Mapping[str, Callable[[bytes], UsageSample]] = {
    "io.containerd.cgroups.v1.Metrics": _of_cgroup1,
    "io.containerd.cgroups.v2.Metrics": _of_cgroup2,
    "sandkeeper.shim.v1.Usage": _of_ours,
}


def read(data: any_pb2.Any) -> UsageSample | None:
    """None for what cannot be read: a type that is not known, or that it is by name only."""
    # containerd writes the name alone, others write an URL that ends with it.
    known = _KNOWN.get(data.type_url.rpartition("/")[2])
    try:
        return known(data.value) if known else None
    except DecodeError:
        return None
