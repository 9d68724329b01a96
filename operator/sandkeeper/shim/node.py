"""What this node is and has room for."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from importlib import metadata
from pathlib import Path

from sandkeeper.shim.engines.base import Engine
from sandkeeper.shim.settings import ShimSettings
from sandkeeper.wire import node_pb2
from sandkeeper.wire.times import to_timestamp

_GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "s390x": "s390x"}


def architecture() -> str:
    """In Go's words, as all of Kubernetes has it."""
    machine = platform.machine()
    return _GO_ARCHITECTURES.get(machine, machine)


def capacity(settings: ShimSettings) -> node_pb2.NodeResources:
    """What sandboxes may have together: as configured, else all that the machine has."""
    return node_pb2.NodeResources(
        cpu_millis=settings.cpu_millis or len(os.sched_getaffinity(0)) * 1000,
        memory_bytes=settings.memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        pids=settings.pids or int(Path("/proc/sys/kernel/pid_max").read_text()),
        sandboxes=settings.sandboxes,
    )


def info(settings: ShimSettings, engine: Engine, started_at: datetime) -> node_pb2.InfoResponse:
    """Info's answer."""
    runtimes = engine.runtimes()
    found = node_pb2.InfoResponse(
        node_name=settings.node_name,
        version=metadata.version("sandkeeper"),
        engine=engine.name,
        runtimes=[
            node_pb2.Runtime(name=r.name, version=r.version, ready=r.ready, message=r.message)
            for r in runtimes
        ],
        default_runtime=next((r.name for r in runtimes if r.ready), ""),
        capacity=capacity(settings),
        allocatable=capacity(settings),
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        features=sorted(engine.features()),
        kernel_version=platform.release(),
        architecture=architecture(),
    )
    found.started_at.CopyFrom(to_timestamp(started_at))
    return found
