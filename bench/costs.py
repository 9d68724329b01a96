"""What a cluster costs, seen from outside: CPU and memory from /proc, writes from the API server's own metrics."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sandkeeper.localcluster.cluster import OPERATOR, LocalCluster

_TICK = os.sysconf("SC_CLK_TCK")
_WRITES = frozenset({"POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION"})
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_REQUESTS = "apiserver_request_total{"


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU seconds, user and system, that the parts of a cluster have used; the shims' with what they ran and waited
    for (runtimes, but not what stays: monitors and containers).

    machine: of everything on it, the kernel's own threads as well. at: by which clock they were spent.
    """

    operator: float
    apiserver: float
    etcd: float
    shims: float
    client: float
    machine: float
    at: float

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(
            self.operator - other.operator,
            self.apiserver - other.apiserver,
            self.etcd - other.etcd,
            self.shims - other.shims,
            self.client - other.client,
            self.machine - other.machine,
            self.at - other.at,
        )

    def each(self, count: int) -> dict[str, float]:
        """Milliseconds per Sandbox, by part. `other`: monitors, containers, the kernel, and whatever
        else the machine does. cores_busy: the share of all cores' time."""
        parts = {name: getattr(self, name) for name in ("operator", "apiserver", "etcd", "shims", "client")}
        parts["other"] = max(0.0, self.machine - sum(parts.values()))
        figures = {f"{name}_cpu_ms": 1000 * spent / count for name, spent in parts.items()}
        return figures | {"cores_busy": self.machine / (self.at * (os.cpu_count() or 1))}


def cpu(cluster: LocalCluster) -> Cpu:
    pids = cluster.status()
    return Cpu(
        operator=_cpu_of(pids[OPERATOR]),
        apiserver=_cpu_of(pids["kube-apiserver"]),
        etcd=_cpu_of(pids["etcd"]),
        shims=sum(_cpu_of(pids[name], children=True) for name in cluster.nodes),
        client=_cpu_of(os.getpid()),
        machine=_busy(),
        at=time.perf_counter(),
    )


def _busy() -> float:
    """Seconds that all cores together were not idle, or taken away; proc_stat(5)."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / _TICK


def _cpu_of(pid: int | None, *, children: bool = False) -> float:
    if pid is None:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11 : 15 if children else 13])) / _TICK


class Memory:
    """The operator's resident memory, in MiB."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._folder = Path(f"/proc/{cluster.status()[OPERATOR]}")

    def forget_peak(self) -> None:
        (self._folder / "clear_refs").write_text("5")  # proc(5)

    def now(self) -> float:
        return self._field("VmRSS")

    def peak(self) -> float:
        """Since the last `forget_peak`."""
        return self._field("VmHWM")

    def _field(self, name: str) -> float:
        for line in (self._folder / "status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1024
        raise ValueError(f"{self._folder}/status has no {name}")


class Writes:
    """Writes that the API server has taken since `start`, but for those of its own (Leases)."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._before: Counter[str] = Counter()
        self.start()

    def start(self) -> None:
        self._before = self._read()

    def since(self) -> Counter[str]:
        """By "VERB resource/subresource"; refused ones count too."""
        return self._read() - self._before

    def _read(self) -> Counter[str]:
        return parse_writes(self._cluster.kubectl("get", "--raw", "/metrics"))


async def settled(writes: Writes) -> None:
    """Returns when nothing has been written of Sandboxes for a second; at most half a minute later."""
    counts = [of_sandboxes(writes.since())]
    for _ in range(30):
        await asyncio.sleep(1)
        counts.append(of_sandboxes(writes.since()))
        if counts[-1] == counts[-2]:
            return


def parse_writes(exposition: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for line in exposition.splitlines():
        if not line.startswith(_REQUESTS):
            continue
        labels, _, value = line.rpartition(" ")
        named = dict(_LABEL.findall(labels))
        if named["verb"] in _WRITES and named["resource"] != "leases":
            sub = f"/{named['subresource']}" if named["subresource"] else ""
            found[f"{named['verb']} {named['resource']}{sub}"] += round(float(value))
    return found


def of_sandboxes(writes: Counter[str]) -> int:
    """The operator's: all but the creations and deletions of Sandboxes, which are the client's, and what is
    written of nodes, which does not grow with the Sandboxes."""
    others = ("POST sandboxes", "DELETE sandboxes")
    return sum(count for what, count in writes.items() if what not in others and "sandboxnodes" not in what)
