"""The operator with many Sandboxes of the simulated engine: at once, more and more, at rest, in rounds."""

from __future__ import annotations

import asyncio
import time

from bench import operators
from bench.clusters import say
from bench.costs import Cpu, Memory, Writes, cpu, of_sandboxes, settled
from bench.crowd import SLOWEST, Crowd, Made, crowd
from bench.least import alone, least
from bench.result import Result, milliseconds
from sandkeeper.localcluster.cluster import LocalCluster

REST = 60.0


async def at_once(cluster: LocalCluster, sizes: list[int]) -> Result:
    """So many created at once, and deleted again; before them the least that so many cost here."""
    result = Result()
    for size in sizes:
        async with alone(cluster) as (sandboxes, written):
            floor = await least(
                cluster, sandboxes, written, [f"least{size}-{number}" for number in range(size)]
            )
        operators.fresh(cluster)
        async with crowd(cluster.kubeconfig) as sandboxes:
            names = [f"s{size}-{number}" for number in range(size)]
            made, spent, writes, memory = await make(cluster, sandboxes, names)
            figures = {
                "per_s": made.per_s,
                **milliseconds("ready", made.each or [0.0], 0.5, 0.99),
                "lost": made.lost,
                **spent.each(size),
                "rss_peak_mib": memory.peak(),
                "writes_to_ready": of_sandboxes(writes.since()) / size,
            }
            if size == min(sizes):
                result.figure(**{f"rss_mib_at_{size}": memory.now()})
            deleted = await sandboxes.delete(names, timeout=30 + size / SLOWEST)
            await settled(writes)
            figures |= {
                "gone_per_s": deleted.per_s,
                "not_gone": deleted.lost,
                "writes_per_life": of_sandboxes(writes.since()) / size,
            }
            figures |= {
                "least_per_s": floor.per_s,
                "share_of_least": made.per_s / floor.per_s,
                **{f"least_{name}": value for name, value in floor.spent.each(size).items() if value},
            }
            result.figure(**{f"sim_{size}_{name}": value for name, value in figures.items()})
            result.sample(f"sim_{size}_ready", made.each)
    return result


async def growth(cluster: LocalCluster, step: int, most: int) -> Result:
    """More and more, `step` at a time: what each costs when so many are there already. Then a minute at rest."""
    result = Result()
    operators.fresh(cluster)
    async with crowd(cluster.kubeconfig) as sandboxes:
        for first in range(0, most, step):
            names = [f"g-{number}" for number in range(first, first + step)]
            made, spent, writes, memory = await make(cluster, sandboxes, names)
            point = {
                "sandboxes": first + step,
                "per_s": made.per_s,
                "lost": made.lost,
                **spent.each(step),
                "writes": of_sandboxes(writes.since()) / step,
                "rss_mib": memory.now(),
                "rss_peak_mib": memory.peak(),
            }
            result.curve.append({name: round(value, 3) for name, value in point.items()})
            say(f"{first + step} Sandboxes: {made.per_s:.0f}/s, {memory.now():.0f} MiB")
        at_rest, resident = await rest(cluster), Memory(cluster).now()
        # By default every Sandbox is looked at once in five minutes; here in this one.
        says, ready = await operators.serving(cluster, sandboxes, "late", RESYNC_INTERVAL=f"{REST:g}")
        looked_at = await rest(cluster)
        result.figure(
            **{f"sim_{most}_lost": sum(point["lost"] for point in result.curve)},
            **{f"rss_mib_at_{most}": resident},
            **{f"rest_{most}_{name}": value for name, value in at_rest.items()},
            **{f"rest_{most}_resync_{name}": value for name, value in looked_at.items()},
            **{f"restart_{most}_serving_s": max(says, ready)},
            writes_at_rest_60s=max(at_rest["writes_60s"], looked_at["writes_60s"]),
        )
    return result


async def rounds(cluster: LocalCluster, size: int, count: int) -> Result:
    """Created and deleted, again and again: the operator must not grow."""
    result, resident = Result(), []
    operators.fresh(cluster)
    async with crowd(cluster.kubeconfig) as sandboxes:
        for number in range(count):
            names = [f"r{number}-{each}" for each in range(size)]
            made, _, _, memory = await make(cluster, sandboxes, names)
            deleted = await sandboxes.delete(names, timeout=30 + size / SLOWEST)
            if made.lost or deleted.lost:
                raise AssertionError(f"round {number}: {made.lost} not Ready, {deleted.lost} not gone")
            await asyncio.sleep(2)  # kopf keeps an object's worker for a second
            resident.append(memory.now())
            say(f"Round {number + 1}: {resident[-1]:.1f} MiB")
    # The first ones fill what stays: the interpreter's arenas, the memory of what is gone.
    later = resident[min(3, count - 1) :]
    result.figure(
        rounds_rss_first_mib=resident[0],
        rounds_rss_last_mib=resident[-1],
        rounds_growth_mib=(later[-1] - later[0]) / max(1, len(later) - 1),
    )
    result.samples["rounds_rss_mib"] = [round(each, 2) for each in resident]
    return result


async def make(cluster: LocalCluster, sandboxes: Crowd, names: list[str]) -> tuple[Made, Cpu, Writes, Memory]:
    """Creates them; returns when the last write that follows from it is over."""
    writes, memory = Writes(cluster), Memory(cluster)
    memory.forget_peak()
    before = cpu(cluster)
    made = await sandboxes.make(names, timeout=30 + len(names) / SLOWEST)
    spent = cpu(cluster) - before
    await settled(writes)
    return made, spent, writes, memory


async def rest(cluster: LocalCluster) -> dict[str, float]:
    """What the operator does while nothing happens. First it has time to end what it has begun: the nodes' counts
    follow within half a minute."""
    await asyncio.sleep(35)
    writes, before, began = Writes(cluster), cpu(cluster), time.perf_counter()
    await asyncio.sleep(REST)
    spent, took = cpu(cluster) - before, time.perf_counter() - began
    written = writes.since()
    if written:
        say(f"Written at rest: {dict(written)}")
    return {
        "writes_60s": written.total() * 60 / took,
        "operator_cpu_percent": 100 * spent.operator / took,
        "shims_cpu_percent": 100 * spent.shims / took,
        "apiserver_cpu_percent": 100 * spent.apiserver / took,
    }
