"""`make bench`: the figures that the README states, into build/bench.json.

Every figure is a ratio or a split within one run on one machine: a floor sample (bare conmon + runtime) and a
Sandbox sample alternate, so that both meet the same noise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.floor import Floor
from bench.watching import manifest, watching
from sandkeeper.localcluster.cluster import LocalCluster

ROOT = Path(__file__).resolve().parents[1]


def percentile(samples: list[float], share: float) -> float:
    """Nearest rank, in the unit of the samples."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def milliseconds(samples: list[float]) -> list[float]:
    return [round(1000 * sample, 3) for sample in samples]


async def measure(cluster: LocalCluster, floor: Floor, count: int, burst: int) -> dict[str, Any]:
    floors: list[float] = []
    ready: list[float] = []
    gone: list[float] = []
    writes: list[int] = []
    async with watching(cluster.kubeconfig, "default") as watcher:
        for number in range(-5, count):  # the first five warm caches and connections, and are not counted
            base = await asyncio.to_thread(floor.sample, number + 5)
            name = f"one-{number + 5}"
            took = await watcher.apply_until_ready(manifest(name))
            written = watcher.writes[name] - 1
            left = await watcher.delete_until_gone(name)
            if number >= 0:
                floors.append(base)
                ready.append(took)
                gone.append(left)
                writes.append(written)
        began = time.perf_counter()
        at_once = await asyncio.gather(*(watcher.apply_until_ready(manifest(f"burst-{i}")) for i in range(burst)))
        burst_took = time.perf_counter() - began
        began = time.perf_counter()
        await asyncio.gather(*(watcher.delete_until_gone(f"burst-{i}") for i in range(burst)))
        burst_gone = time.perf_counter() - began
    p50, base = percentile(ready, 0.5), percentile(floors, 0.5)
    return {
        "figures": {
            "floor_p50_ms": round(1000 * base, 2),
            "ready_p50_ms": round(1000 * p50, 2),
            "ready_p99_ms": round(1000 * percentile(ready, 0.99), 2),
            "ready_p50_over_floor": round(p50 / base, 3),
            "ready_p99_over_p50": round(percentile(ready, 0.99) / p50, 3),
            "gone_p50_ms": round(1000 * percentile(gone, 0.5), 2),
            "writes_to_ready": statistics.median(writes),
            f"burst{burst}_per_s": round(burst / burst_took, 2),
            f"burst{burst}_p50_ms": round(1000 * percentile(at_once, 0.5), 2),
            f"burst{burst}_gone_s": round(burst_gone, 3),
        },
        "samples_ms": {"floor": milliseconds(floors), "ready": milliseconds(ready), "gone": milliseconds(gone)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--count", type=int, default=60, help="Sandboxes one at a time")
    parser.add_argument("--burst", type=int, default=50, help="Sandboxes at once")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sandkeeper-bench-") as name:
        folder = Path(name)
        cluster = LocalCluster(folder / "cluster")
        try:
            print("==> local cluster", flush=True)
            cluster.up(shims=1, engine="oci")
            result = run(cluster, folder, options)
        finally:
            cluster.down()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for key, value in result["figures"].items():
        print(f"  {key:<28} {value}")
    print(f"==> {options.output.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
