"""`make bench`: the figures that the README states, into build/bench.json.

Every figure is a ratio or a split within one run on one machine: a floor sample (bare conmon + runtime) and a
Sandbox sample alternate, so that both meet the same noise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.floor import Floor
from sandkeeper import __version__
from sandkeeper.localcluster import gobuild
from sandkeeper.localcluster.cluster import LocalCluster
from sandkeeper.localcluster.watching import Marks, Watcher, manifest, watching

ROOT = Path(__file__).resolve().parents[1]
LOAD = round(os.getloadavg()[0], 2)
WARM_UP = 5  # the first ones unpack the image and open connections, and are not counted


@dataclass
class Samples:
    """Seconds."""

    floor: list[float] = field(default_factory=list)
    ways: list[Marks] = field(default_factory=list)
    gone: list[float] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)
    burst: list[Marks] = field(default_factory=list)
    burst_took: float = 0.0
    burst_gone: float = 0.0


def percentile(samples: Sequence[float], share: float) -> float:
    """Nearest rank, in the unit of the samples."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def steps(way: Marks) -> dict[str, float]:
    """Seconds from each mark to the next. `create` can be a little below 0: `assign` ends when the watch shows it,
    and the shim may have the call by then."""
    marks = (0.0, way.accepted, way.assigned, way.created, way.started, way.ready)
    names = ("accept", "assign", "create", "start", "status")
    return {name: after - before for name, (before, after) in zip(names, pairwise(marks), strict=True)}


def figures(samples: Samples) -> dict[str, float]:
    """Plain numbers, all of them; the unit is the end of the name."""
    ready, floor = [way.ready for way in samples.ways], percentile(samples.floor, 0.5)
    p50, p99 = percentile(ready, 0.5), percentile(ready, 0.99)
    count = len(samples.burst)
    found = {
        "floor_p50_ms": 1000 * floor,
        "ready_p50_ms": 1000 * p50,
        "ready_p99_ms": 1000 * p99,
        "ready_p50_over_floor": p50 / floor,
        "ready_p99_over_p50": p99 / p50,
        "gone_p50_ms": 1000 * percentile(samples.gone, 0.5),
        "writes_to_ready": statistics.median(samples.writes),
    }
    parts = [steps(way) for way in samples.ways]
    for name in parts[0]:
        found[f"stage_{name}_p50_ms"] = 1000 * percentile([part[name] for part in parts], 0.5)
    if count:
        at_once = [way.ready for way in samples.burst]
        found |= {
            f"burst{count}_per_s": count / samples.burst_took,
            f"burst{count}_p50_ms": 1000 * percentile(at_once, 0.5),
            f"burst{count}_gone_s": samples.burst_gone,
        }
    return {name: round(value, 3) for name, value in found.items()}


async def measure(cluster: LocalCluster, floor: Floor, count: int, burst: int) -> Samples:
    samples = Samples()
    async with watching(cluster.kubeconfig, "default") as watcher:
        for number in range(WARM_UP + count):
            await one(watcher, floor, number, samples if number >= WARM_UP else Samples())
        names = [f"burst-{number}" for number in range(burst)]
        began = time.perf_counter()
        samples.burst = await asyncio.gather(*(watcher.create_until_ready(manifest(name)) for name in names))
        samples.burst_took = time.perf_counter() - began
        began = time.perf_counter()
        await asyncio.gather(*(watcher.delete_until_gone(name) for name in names))
        samples.burst_gone = time.perf_counter() - began
    return samples


async def one(watcher: Watcher, floor: Floor, number: int, samples: Samples) -> None:
    name = f"one-{number}"
    samples.floor.append(await floor.sample(number))
    samples.ways.append(await watcher.create_until_ready(manifest(name)))
    samples.writes.append(watcher.writes[name] - 1)  # its creation is the client's own
    samples.gone.append(await watcher.delete_until_gone(name))


def run(cluster: LocalCluster, folder: Path, count: int, burst: int) -> dict[str, Any]:
    """The whole document. The floor has the shim's own runtime and monitor."""
    with cluster.shim(0) as shim:
        info = shim.info()
    floor = Floor(folder / "floor", runtime=program(info.default_runtime), conmon=program("conmon"))
    samples = asyncio.run(measure(cluster, floor, count, burst))
    milliseconds = {
        "floor": samples.floor,
        "ready": [way.ready for way in samples.ways],
        "gone": samples.gone,
        "burst": [way.ready for way in samples.burst],
    }
    return {
        "figures": figures(samples),
        "samples": {
            name: [round(1000 * each, 3) for each in values] for name, values in milliseconds.items()
        },
        "versions": {
            "sandkeeper": __version__,
            "python": platform.python_version(),
            **{each.name: each.version for each in info.runtimes if each.ready},
            "conmon": first_line(program("conmon"), "--version"),
            "etcd": first_line(str(cluster.api.tools["etcd"].path), "--version"),
            "kube-apiserver": api_version(cluster),
        },
        "machine": {
            "cpus": os.cpu_count(),
            "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
            "kernel": info.kernel_version,
            "architecture": info.architecture,
            "load_1min_before": LOAD,
        },
    }


def api_version(cluster: LocalCluster) -> str:
    said = first_line(str(cluster.api.tools["kube-apiserver"].path), "--version")
    if "$Format" not in said:
        return said
    # Built here from its Go module, which knows its version only by go.mod.
    pins = (gobuild.MODULE / "go.mod").read_text().split()
    return f"Kubernetes {pins[pins.index('k8s.io/kubernetes') + 1]} (built from its module)"


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"bench: {name} is not in PATH")
    return found


def first_line(*command: str) -> str:
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/", timeout=30)
    return answer.stdout.splitlines()[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--count", type=int, default=60, help="Sandboxes one at a time")
    parser.add_argument("--burst", type=int, default=50, help="Sandboxes at once; 0: none")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sbx-bench-") as name:
        folder = Path(name)
        cluster = LocalCluster(folder / "c")
        try:
            cluster.up(shims=1, engine="oci", say=lambda line: print(f"==> {line}", flush=True))
            result = run(cluster, folder, options.count, options.burst)
        finally:
            cluster.down()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for key, value in result["figures"].items():
        print(f"  {key:<24} {value:>10}")
    print(f"==> {options.output}")


if __name__ == "__main__":
    main()
