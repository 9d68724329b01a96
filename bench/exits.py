"""From the end of a container's process to the object's status. The end is a SIGKILL of our own, so its time is
known from outside."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from bench.result import Result, milliseconds
from sandkeeper.localcluster.cluster import LocalCluster
from sandkeeper.localcluster.watching import Body, Watcher, condition, manifest, watching


def finished(body: Body) -> bool:
    return condition(body, "Finished") == "True"


async def run(cluster: LocalCluster, count: int, at_once: int) -> Result:
    """`count` one after the other, in groups of `at_once`; then `at_once` at the same moment."""
    result = Result()
    single: list[float] = []
    async with watching(cluster.kubeconfig, "default") as watcher:
        while len(single) < count:
            names = [f"exit-{len(single) + number}" for number in range(min(at_once, count - len(single)))]
            await asyncio.gather(*(watcher.create_until_ready(manifest(name)) for name in names))
            single += [await _kill(watcher, name) for name in names]
            await asyncio.gather(*(watcher.delete_until_gone(name) for name in names))
        names = [f"exits-{number}" for number in range(at_once)]
        await asyncio.gather(*(watcher.create_until_ready(manifest(name)) for name in names))
        together = await asyncio.gather(*(_kill(watcher, name) for name in names))
        await asyncio.gather(*(watcher.delete_until_gone(name) for name in names))
    result.figure(
        **milliseconds("exit_to_status", single, 0.5, 0.99),
        **milliseconds(f"exit{at_once}_to_status", together, 0.5, 0.99),
    )
    result.sample("exit_to_status", single)
    return result


async def _kill(watcher: Watcher, name: str) -> float:
    """Seconds from the signal until the watch shows the exit."""
    seen = watcher.when(name, finished)
    pid = watcher.seen[name]["status"]["containers"][0]["pid"]
    began = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        took = await seen - began
    status = watcher.seen[name]["status"]
    if status["exitStatus"] != 137:
        raise AssertionError(f"{name}: exit status {status['exitStatus']} after SIGKILL")
    return took
