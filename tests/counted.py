"""Sandboxes whose starts can be counted, and which end when a test says so: through their volume, so that it works
while the operator and the shim are away. For the oci engine of a local cluster."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster import eventually
from tests.sandboxes import Object

from sandkeeper.localcluster.cluster import LocalCluster
from sandkeeper.localcluster.processes import start_time
from sandkeeper.localcluster.watching import manifest
from sandkeeper.wire import node_pb2

# Tells of SIGTERM and runs on; ends with the status that it finds in a file.
_SCRIPT = """
trap 'echo >>/data/asked' TERM
echo >>/data/starts
until test -s /data/exit; do sleep 0.1; done
status=$(cat /data/exit)
rm /data/exit
exit $status
"""
ONE_SANDBOX = ["catatonit", "conmon", "sh"]
"""What `processes` finds of a Sandbox that runs, once."""


def counted(name: str, **spec: Any) -> Object:
    """Its manifest; see localcluster.watching.manifest."""
    body = manifest(name, "sh", "-c", _SCRIPT, volumes=[{"name": "data", "emptyDir": {}}], **spec)
    body["spec"]["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
    return body


@dataclass(frozen=True, slots=True)
class Run:
    """All that stays as it is while an instance runs on: as its status, its node's record and the kernel tell it."""

    instance: int
    started_at: str
    pid: int
    container_pid: int
    restarts: int
    # When the kernel says that the processes were started.
    since: tuple[int | None, int | None]
    # How often the container's program was started.
    starts: int
    record: bytes


def run_of(local: LocalCluster, body: Object) -> Run:
    """Waits for the container's program to have begun: Ready may come a moment before."""
    status = body["status"]
    container = status["containers"][0]
    eventually(lambda: starts(local, body))
    return Run(
        instance=status["instance"],
        started_at=status["startedAt"],
        pid=status["pid"],
        container_pid=container["pid"],
        restarts=container["restartCount"],
        since=(start_time(status["pid"]), start_time(container["pid"])),
        starts=starts(local, body),
        record=_record(local, body),
    )


def _record(local: LocalCluster, body: Object) -> bytes:
    with local.shim(_index(local, body)) as shim:
        found = next(each for each in shim.list().sandboxes if each.sandbox_id == body["status"]["sandboxID"])
    bare = node_pb2.SandboxRecord()
    bare.CopyFrom(found)
    bare.ClearField("usage")
    return bare.SerializeToString(deterministic=True)


def runs(body: Object) -> bool:
    """Its sandbox process and its container's program are there, whoever knows of them."""
    status = body["status"]
    return None not in (start_time(status["pid"]), start_time(status["containers"][0]["pid"]))


def starts(local: LocalCluster, body: Object) -> int:
    """How often this instance's program was started."""
    return _lines(local, body, "starts")


def asked_to_end(local: LocalCluster, body: Object) -> bool:
    """SIGTERM has come."""
    return _lines(local, body, "asked") > 0


def end(local: LocalCluster, body: Object, status: int) -> None:
    """The program ends with this status; returns when it has."""
    (_data(local, body) / "exit").write_text(f"{status}\n")
    pid = body["status"]["containers"][0]["pid"]
    eventually(lambda: start_time(pid) is None)


def processes(sandbox_id: str) -> list[str]:
    """The names of its sandbox processes, monitors and containers' first processes, by what the kernel lists."""
    found, mark = [], sandbox_id.encode()
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = dict(
                line.split(":\t", 1) for line in (each / "status").read_text().splitlines() if ":\t" in line
            )
            named = mark in (each / "cmdline").read_bytes() or mark in (each / "environ").read_bytes()
            first = status["NSpid"].split()[1:] == ["1"] and mark in (each / "cgroup").read_bytes()
            if named or first:
                found.append(status["Name"])
    return sorted(found)


def _lines(local: LocalCluster, body: Object, name: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        return len((_data(local, body) / name).read_text().splitlines())
    return 0


def _data(local: LocalCluster, body: Object) -> Path:
    sandbox_id = body["status"]["sandboxID"]
    engine = local.node_folder(_index(local, body)) / "state" / "oci" / "sandboxes"
    return engine / sandbox_id / "volumes" / "data"


def _index(local: LocalCluster, body: Object) -> int:
    return local.nodes.index(body["status"]["nodeName"])
