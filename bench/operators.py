"""New operator processes, and how soon they serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bench.crowd import Crowd
from sandkeeper.localcluster.cluster import OPERATOR, LocalCluster


def fresh(cluster: LocalCluster) -> None:
    """A new process, so that a part does not see the memory of the one before."""
    cluster.processes.stop(OPERATOR)
    cluster.start_operator()


@contextmanager
def stopped(cluster: LocalCluster) -> Iterator[None]:
    """No operator meanwhile."""
    cluster.processes.stop(OPERATOR)
    try:
        yield
    finally:
        cluster.start_operator()


async def serving(cluster: LocalCluster, sandboxes: Crowd, name: str, **settings: str) -> tuple[float, float]:
    """SIGKILL, then the next one: seconds from its start until it says that it is ready, and until a Sandbox that was
    created in between is. The Sandbox is deleted again."""
    cluster.kill_operator()
    making = asyncio.create_task(sandboxes.make([name], timeout=60))
    await sandboxes.created(name)
    began = time.perf_counter()
    await asyncio.to_thread(cluster.start_operator, env=settings)
    says = time.perf_counter() - began
    made = await making
    if made.lost:
        raise AssertionError(f"{name} is not Ready a minute after the operator's start")
    ready = sandboxes.ready_at(name) - began
    await sandboxes.delete([name], timeout=60)
    return says, ready
