"""One Sandbox at a time: create -> Ready and delete -> gone, beside the floor.

A floor sample (bare conmon + runtime) and a Sandbox sample alternate, so that both meet the same noise.
"""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

from bench.costs import Writes, of_sandboxes
from bench.floor import Floor
from bench.machine import program
from bench.result import Result, milliseconds, percentile
from sandkeeper.localcluster.cluster import LocalCluster
from sandkeeper.localcluster.watching import Marks, manifest, watching

WARM_UP = 5  # the first ones unpack the image and open connections, and are not counted
COUNTED = 20  # whose writes are counted


def steps(way: Marks) -> dict[str, float]:
    """Seconds from each mark to the next. `create` can be a little below 0: `assign` ends when the watch shows it,
    and the shim may have the call by then."""
    marks = (0.0, way.accepted, way.assigned, way.created, way.started, way.ready)
    names = ("accept", "assign", "create", "start", "status")
    return {name: after - before for name, (before, after) in zip(names, pairwise(marks), strict=True)}


async def run(cluster: LocalCluster, count: int) -> Result:
    result = Result()
    ways: list[Marks] = []
    gone: list[float] = []
    floors: list[float] = []
    with tempfile.TemporaryDirectory(prefix="sbx-floor-") as folder:
        with cluster.shim(0) as shim:
            runtime = shim.info().default_runtime
        floor = Floor(Path(folder) / "floor", runtime=program(runtime), conmon=program("conmon"))
        async with watching(cluster.kubeconfig, "default") as watcher:
            for number in range(WARM_UP + count):
                bare = await floor.sample(number)
                way = await watcher.create_until_ready(manifest(f"one-{number}"))
                went = await watcher.delete_until_gone(f"one-{number}")
                if number >= WARM_UP:
                    floors.append(bare)
                    ways.append(way)
                    gone.append(went)
            writes = Writes(cluster)
            for number in range(COUNTED):
                await watcher.create_until_ready(manifest(f"counted-{number}"))
            to_ready = of_sandboxes(writes.since())
            for number in range(COUNTED):
                await watcher.delete_until_gone(f"counted-{number}")
            per_life = of_sandboxes(writes.since())
    ready = [way.ready for way in ways]
    floor_p50, p50, p99 = percentile(floors, 0.5), percentile(ready, 0.5), percentile(ready, 0.99)
    result.figure(
        floor_p50_ms=1000 * floor_p50,
        **milliseconds("ready", ready, 0.5, 0.99),
        ready_p50_over_floor=p50 / floor_p50,
        ready_p99_over_p50=p99 / p50,
        **milliseconds("gone", gone, 0.5, 0.99),
        **{f"row{count}_per_s": count / sum(ready)},
        writes_to_ready=to_ready / COUNTED,
        writes_per_life=per_life / COUNTED,
    )
    parts = [steps(way) for way in ways]
    for name in parts[0]:
        result.figure(**milliseconds(f"stage_{name}", [part[name] for part in parts], 0.5))
    result.sample("floor", floors)
    result.sample("ready", ready)
    result.sample("gone", gone)
    return result
