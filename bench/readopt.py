"""A shim that is killed and started again: when it has its sandboxes back, and how those ended that ended
meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from bench.exits import finished
from bench.result import Result
from sandkeeper.localcluster.cluster import LocalCluster
from sandkeeper.localcluster.watching import manifest, watching
from sandkeeper.wire import node_pb2

ENDED = 5
STATUS = 7
_TRAP = ("sh", "-c", f"trap 'exit {STATUS}' TERM; sleep 86400 & wait")


async def run(cluster: LocalCluster, count: int) -> Result:
    """Seconds from the SIGKILL, the start of the next shim included. Raises AssertionError where a sandbox was
    lost, started anew, or its exit is not what it was."""
    result = Result()
    async with watching(cluster.kubeconfig, "default") as watcher:
        names = [f"kept-{number}" for number in range(count)]
        await asyncio.gather(*(watcher.create_until_ready(manifest(name, *_TRAP)) for name in names))
        pids = {watcher.seen[name]["status"]["sandboxID"]: pid_of(watcher.seen[name]) for name in names}
        ended = [watcher.seen[name] for name in names[:ENDED]]
        gone = {body["status"]["sandboxID"] for body in ended}
        told = [watcher.when(body["metadata"]["name"], finished) for body in ended]
        killed = time.perf_counter()
        await asyncio.to_thread(cluster.kill_shim, 0)
        for body in ended:
            os.kill(pid_of(body), signal.SIGTERM)
        await asyncio.to_thread(cluster.start_shim, 0)
        with cluster.shim(0) as shim:
            listed = await asyncio.to_thread(shim.list)
        readopted = time.perf_counter() - killed
        async with asyncio.timeout(60):
            moments = await asyncio.gather(*told)
        check(listed, pids, gone)
        statuses = [watcher.seen[body["metadata"]["name"]]["status"]["exitStatus"] for body in ended]
        if statuses != [STATUS] * len(ended):
            raise AssertionError(f"exit statuses {statuses}")
        await asyncio.gather(*(watcher.delete_until_gone(name) for name in names))
    result.figure(
        shim_readopt_s=readopted,
        shim_readopt_sandboxes=count,
        shim_readopt_exits_told_s=max(moments) - killed,
    )
    return result


def pid_of(body: dict) -> int:
    return int(body["status"]["containers"][0]["pid"])


def check(listed: node_pb2.ListResponse, pids: dict[str, int], gone: set[str]) -> None:
    """What is listed is what ran, with the same processes."""
    found = {record.sandbox_id: record for record in listed.sandboxes}
    if found.keys() != pids.keys():
        raise AssertionError(f"lost: {pids.keys() - found.keys()}, new: {found.keys() - pids.keys()}")
    for sandbox_id, record in found.items():
        if sandbox_id in gone:
            ok = record.state == node_pb2.STATE_EXITED and record.exit.status == STATUS
        else:
            ok = record.state == node_pb2.STATE_RUNNING and record.containers[0].pid == pids[sandbox_id]
        if not ok:
            raise AssertionError(f"after the restart: {record}")
