"""Real Sandboxes at once, and many of them through a window."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

from bench.costs import Writes, cpu, of_sandboxes
from bench.floor import Floor
from bench.least import Least, alone, least
from bench.machine import program
from bench.result import Result, milliseconds
from sandkeeper.localcluster.cluster import LocalCluster
from sandkeeper.localcluster.watching import Marks, Watcher, manifest, watching

ROUNDS = 5
_CORES = os.cpu_count() or 1


async def run(cluster: LocalCluster, at_once: int, through: int) -> Result:
    """`at_once` created at the same moment, several rounds; then `through` of them, never more than `at_once` on
    the way to Ready."""
    result = Result()
    floors = [await _floor(cluster, at_once) for _ in range(2)]
    rates: list[float] = []
    ready: list[float] = []
    gone: list[float] = []
    async with watching(cluster.kubeconfig, "default") as watcher:
        await _round(watcher, "warm", min(at_once, 10))
        for number in range(ROUNDS):
            took, ways, went = await _round(watcher, f"burst-{number}", at_once)
            rates.append(at_once / took)
            ready += [way.ready for way in ways]
            gone.append(went)
        window = asyncio.Semaphore(at_once)

        async def one(name: str) -> Marks:
            async with window:
                return await watcher.create_until_ready(manifest(name))

        names = [f"through-{number}" for number in range(through)]
        writes = Writes(cluster)
        before, began = cpu(cluster), time.perf_counter()
        ways = await asyncio.gather(*(one(name) for name in names))
        took, spent = time.perf_counter() - began, cpu(cluster) - before
        to_ready = of_sandboxes(writes.since()) / through
        began = time.perf_counter()
        went_each = await asyncio.gather(*(watcher.delete_until_gone(name) for name in names))
        went = time.perf_counter() - began
    floors += [await _floor(cluster, at_once) for _ in range(2)]
    floor = statistics.median(each.per_s for each in floors)
    result.figure(
        **{
            f"burst{at_once}_per_s": statistics.median(rates),
            f"burst{at_once}_least_per_s": floor,
            f"burst{at_once}_share_of_least": statistics.median(rates) / floor,
            **milliseconds(f"burst{at_once}", ready, 0.5, 0.99),
            f"burst{at_once}_gone_s": statistics.median(gone),
            f"through{through}_per_s": through / took,
            **{f"through{through}_{name}": value for name, value in spent.each(through).items()},
            f"through{through}_writes_to_ready": to_ready,
            **milliseconds(f"through{through}", [way.ready for way in ways], 0.5, 0.99),
            f"through{through}_gone_s": went,
            **milliseconds(f"through{through}_gone", went_each, 0.5, 0.99),
        }
    )
    result.sample("burst", ready)
    result.sample("through", [way.ready for way in ways])
    result.samples["burst_rates_per_s"] = [round(rate, 2) for rate in rates]
    return result


async def _floor(cluster: LocalCluster, count: int) -> Least:
    """The same writes and bare containers."""
    with cluster.shim(0) as shim:
        runtime = shim.info().default_runtime
    names = [f"least-{number}" for number in range(count)]
    with tempfile.TemporaryDirectory(prefix="sbx-floor-") as folder:
        floor = Floor(
            Path(folder) / "floor", runtime=program(runtime), conmon=program("conmon"), at_once=_CORES
        )
        async with alone(cluster) as (sandboxes, written):
            try:
                return await least(cluster, sandboxes, written, names, floor.start)
            finally:
                await asyncio.gather(*(floor.remove(name) for name in names))


async def _round(watcher: Watcher, prefix: str, count: int) -> tuple[float, list[Marks], float]:
    """Seconds until all were Ready, each one's marks, seconds until all were gone."""
    names = [f"{prefix}-{number}" for number in range(count)]
    began = time.perf_counter()
    ways = await asyncio.gather(*(watcher.create_until_ready(manifest(name)) for name in names))
    took = time.perf_counter() - began
    began = time.perf_counter()
    await asyncio.gather(*(watcher.delete_until_gone(name) for name in names))
    return took, ways, time.perf_counter() - began
