"""One Sandbox at a time on the containerd engine, beside `ctr run -d` of the same image, containerd and runtime.

Samples of both alternate, so that both meet the same noise. A sandbox is more: a sandbox process, limits, a seccomp
filter, volumes, a monitor that outlives the shim.
"""

from __future__ import annotations

import asyncio
import subprocess
import time

from bench.machine import program
from bench.result import Result, milliseconds, percentile
from bench.single import WARM_UP, steps
from sandkeeper.localcluster import containerd_sources
from sandkeeper.localcluster.cluster import OFFLINE_IMAGE, LocalCluster
from sandkeeper.localcluster.watching import Marks, manifest, watching


async def run(cluster: LocalCluster, count: int) -> Result:
    result = Result()
    ways: list[Marks] = []
    gone: list[float] = []
    beside: list[float] = []
    ctr = [
        str(containerd_sources.ensure("module").path / "ctr"),
        *("--address", cluster.plan.shim_env["CONTAINERD__SOCKET"]),
        *("--namespace", cluster.cgroup_parent(0)),
    ]
    async with watching(cluster.kubeconfig, "default") as watcher:
        for number in range(WARM_UP + count):
            way = await watcher.create_until_ready(manifest(f"one-{number}"))
            went = await watcher.delete_until_gone(f"one-{number}")
            bare = await asyncio.to_thread(_sample, ctr, f"bare-{number}")
            if number >= WARM_UP:
                ways.append(way)
                gone.append(went)
                beside.append(bare)
    ready = [way.ready for way in ways]
    ctr_p50, p50 = percentile(beside, 0.5), percentile(ready, 0.5)
    result.figure(
        ctr_run_p50_ms=1000 * ctr_p50,
        **milliseconds("containerd_ready", ready, 0.5, 0.99),
        **milliseconds("containerd_gone", gone, 0.5),
        containerd_ready_over_ctr=p50 / ctr_p50,
    )
    result.sample("ctr_run", beside)
    result.sample("containerd_ready", ready)
    for name in steps(ways[0]):
        result.figure(**milliseconds(f"containerd_step_{name}", [steps(way)[name] for way in ways], 0.5))
    return result


def _sample(ctr: list[str], name: str) -> float:
    """Seconds of `ctr run -d`; what it made is removed afterwards."""
    began = time.perf_counter()
    try:
        _call(
            [*ctr, "run", "--detach", "--runc-binary", program("runc"), OFFLINE_IMAGE, name, "sleep", "1000"]
        )
        return time.perf_counter() - began
    finally:
        _call([*ctr, "tasks", "delete", "--force", name])
        _call([*ctr, "containers", "delete", name])


def _call(argv: list[str]) -> None:
    subprocess.run(argv, check=True, capture_output=True, cwd="/", timeout=60)
