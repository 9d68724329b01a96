"""`make bench`: the figures that the README states, into build/bench.json.

Every figure is a ratio, a count or a cost within one run on one machine. Parts can be run alone (--only); their
figures take the place of those that they gave before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Coroutine
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from bench import bars, burst, clusters, containerd, exits, machine, plot, readopt, restart, scale, single
from bench.clusters import say
from bench.result import Result
from sandkeeper.localcluster.cluster import LocalCluster


class Work(Protocol):
    def __call__(self, cluster: LocalCluster) -> Coroutine[Any, Any, Result]: ...


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    what: str
    cluster: Any  # which of `clusters`
    full: Work
    quick: Work


PARTS = (
    Part(
        "single",
        "one at a time, beside the floor",
        clusters.real,
        lambda c: single.run(c, 200),
        lambda c: single.run(c, 20),
    ),
    Part(
        "burst",
        "50 at once, 200 through 50",
        clusters.real,
        lambda c: burst.run(c, 50, 200),
        lambda c: burst.run(c, 10, 20),
    ),
    Part(
        "exits",
        "exit -> status",
        clusters.real,
        lambda c: exits.run(c, 200, 50),
        lambda c: exits.run(c, 20, 10),
    ),
    Part(
        "readopt",
        "a shim killed with 100 sandboxes running",
        clusters.real,
        lambda c: readopt.run(c, 100),
        lambda c: readopt.run(c, 10),
    ),
    Part(
        "containerd",
        "one at a time on the containerd engine, beside ctr run",
        clusters.containerd,
        lambda c: containerd.run(c, 50),
        lambda c: containerd.run(c, 10),
    ),
    Part(
        "crowd",
        "1,000 and 5,000 at once on 20 simulated nodes",
        clusters.simulated,
        lambda c: scale.at_once(c, [1000, 5000]),
        lambda c: scale.at_once(c, [100, 200]),
    ),
    Part(
        "restart",
        "a new operator with 1,000 running",
        clusters.simulated,
        lambda c: restart.run(c, 1000),
        lambda c: restart.run(c, 100),
    ),
    Part(
        "rounds",
        "ten rounds of 1,000 created and deleted",
        clusters.simulated,
        lambda c: scale.rounds(c, 1000, 10),
        lambda c: scale.rounds(c, 100, 3),
    ),
    # Last on its cluster: it leaves its Sandboxes.
    Part(
        "growth",
        "up to 10,000, and those at rest",
        clusters.simulated,
        lambda c: scale.growth(c, 1000, 10_000),
        lambda c: scale.growth(c, 100, 300),
    ),
)


def run(parts: list[Part], document: dict[str, Any], *, quick: bool) -> None:
    """Runs them, those that follow each other on the same kind of cluster on one; merges what comes of each."""
    left = list(parts)
    while left:
        kind = left[0].cluster
        context: AbstractContextManager[LocalCluster] = kind()
        with context as cluster:
            document.setdefault("versions", {}).update(machine.versions(cluster))
            while left and left[0].cluster is kind:
                part = left.pop(0)
                say(f"{part.name}: {part.what}")
                load, began = machine.load(), time.monotonic()
                result = asyncio.run((part.quick if quick else part.full)(cluster))
                merge(
                    document,
                    part.name,
                    result,
                    {
                        "commit": machine.commit(),
                        "at": datetime.now(UTC).isoformat(timespec="seconds"),
                        "took_s": round(time.monotonic() - began, 1),
                        "load_1min_before": load,
                    },
                )


def merge(document: dict[str, Any], part: str, result: Result, about: dict[str, Any]) -> None:
    """Puts a part's result in the place of the one before."""
    parts, figures = document.setdefault("parts", {}), document.setdefault("figures", {})
    for name in parts.get(part, {}).get("figures", ()):
        figures.pop(name, None)
    figures |= result.figures
    document.setdefault("samples", {})[part] = result.samples
    if result.curve:
        document["curve"] = result.curve
    parts[part] = {**about, "figures": sorted(result.figures)}
    document["machine"] = machine.machine()


def main() -> None:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", default=",".join(names), help=f"parts, of: {', '.join(names)}")
    parser.add_argument(
        "--quick", action="store_true", help="small numbers, to see that it runs; nothing is kept"
    )
    parser.add_argument("--strict", action="store_true", help="exit status 1 where a bar does not hold")
    parser.add_argument("--output", type=Path, default=machine.ROOT / "build" / "bench.json")
    parser.add_argument("--plot", type=Path, help="draw the growth curve to this PNG")
    options = parser.parse_args()
    chosen = set(filter(None, options.only.split(",")))
    if unknown := chosen - set(names):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is taken down
    document: dict[str, Any] = {}
    if options.output.exists() and not options.quick:
        document = json.loads(options.output.read_text())
        if "parts" not in document:
            document = {}  # of a bench before there were parts
    try:
        run([part for part in PARTS if part.name in chosen], document, quick=options.quick)
    finally:
        if document and not options.quick:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(document, indent=1) + "\n")
    figures = document.get("figures", {})
    if options.plot and document.get("curve"):
        plot.draw(document["curve"], options.plot)
    for name, value in figures.items():
        print(f"  {name:<32} {value:>12}")
    for line in bars.table(figures):
        print(line)
    missed = bars.missed(figures)
    if missed:
        say(f"Bars that do not hold: {', '.join(missed)}")
    if options.strict and missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
