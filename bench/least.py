"""The least that Sandboxes cost here: the same writes to the API server, and where they are real a bare conmon +
runtime, by the client that measures and with nothing of Sandkeeper's at work.

What a rate is compared with: a machine on which these alone take as long as a bar allows cannot hold the bar,
whatever the operator and the shims do.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bench import operators
from bench.costs import Cpu, cpu
from bench.crowd import Crowd, crowd, few_at_a_time
from sandkeeper.localcluster.cluster import LocalCluster
from sandkeeper.localcluster.watching import Body, manifest


@dataclass(frozen=True, slots=True)
class Written:
    """What the operator writes to a Sandbox until it is Ready: read from one that is."""

    metadata: Body
    status: Body

    @classmethod
    async def read(cls, sandboxes: Crowd, name: str) -> Written:
        await sandboxes.make([name], timeout=60)
        body = await sandboxes.send("GET", name)
        await sandboxes.delete([name], timeout=60)
        metadata = {key: body["metadata"][key] for key in ("annotations", "finalizers")}
        return cls(metadata, body["status"])


@dataclass(frozen=True, slots=True)
class Least:
    count: int
    took: float
    spent: Cpu

    @property
    def per_s(self) -> float:
        return self.count / self.took


async def nothing(name: str) -> None:
    """What a simulated one is started with."""


@asynccontextmanager
async def alone(cluster: LocalCluster) -> AsyncIterator[tuple[Crowd, Written]]:
    """The client's connections, and a second watch in the place of the operator's, which is stopped meanwhile."""
    async with crowd(cluster.kubeconfig) as sandboxes, crowd(cluster.kubeconfig):
        written = await Written.read(sandboxes, "written")
        with operators.stopped(cluster):
            yield sandboxes, written


async def least(
    cluster: LocalCluster,
    sandboxes: Crowd,
    written: Written,
    names: list[str],
    start: Callable[[str], Awaitable[object]] = nothing,
) -> Least:
    """Creates them, writes to them what the operator would, `start`s each before its status; then they are removed,
    which is not counted."""

    async def one(name: str) -> None:
        made = await sandboxes.send("POST", json=manifest(name))
        assigned = await sandboxes.patch(name, {"metadata": _identity(made) | written.metadata})
        await start(name)
        await sandboxes.patch(name, {"metadata": _identity(assigned), "status": written.status}, "/status")

    async def release(name: str) -> None:
        await sandboxes.patch(name, {"metadata": {"finalizers": None}})

    before, began = cpu(cluster), time.perf_counter()
    await few_at_a_time(one, names)
    found = Least(len(names), time.perf_counter() - began, cpu(cluster) - before)
    await few_at_a_time(release, names)
    await sandboxes.delete(names, timeout=60)
    return found


def _identity(body: Body) -> Body:
    return {key: body["metadata"][key] for key in ("uid", "resourceVersion")}
