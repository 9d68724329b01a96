"""A new operator with many Sandboxes running: what it writes and calls, and when it serves."""

from __future__ import annotations

import asyncio
import re

from bench import operators
from bench.clusters import say
from bench.costs import Writes, cpu, settled
from bench.crowd import SLOWEST, crowd
from bench.result import Result
from sandkeeper.localcluster.cluster import LocalCluster

WATCHED = 30.0
_CALLS = re.compile(r'^sandkeeper_shim_call_seconds_count\{code="\w+",method="(\w+)"\} (\S+)$', re.MULTILINE)


async def run(cluster: LocalCluster, count: int) -> Result:
    """SIGKILL; the next one is watched for half a minute from its start. Then once more, with a Sandbox that is
    created in between: it serves when that is Ready."""
    result = Result()
    operators.fresh(cluster)
    async with crowd(cluster.kubeconfig) as sandboxes:
        names = [f"kept-{number}" for number in range(count)]
        made = await sandboxes.make(names, timeout=30 + count / SLOWEST)
        if made.lost:
            raise AssertionError(f"{made.lost} of {count} are not Ready")
        await asyncio.sleep(35)  # usage has been sampled, the nodes' counts are written
        writes = Writes(cluster)
        await settled(writes)
        before = await asyncio.to_thread(on_nodes, cluster)
        writes.start()
        cluster.kill_operator()
        await asyncio.to_thread(cluster.start_operator)
        await asyncio.sleep(WATCHED)
        written, calls, used = writes.since(), operators_calls(cluster), cpu(cluster).operator
        after = await asyncio.to_thread(on_nodes, cluster)
        if written:
            say(f"Written after the restart: {dict(written)}")
        says, ready = await operators.serving(cluster, sandboxes, "meanwhile")
        deleted = await sandboxes.delete(names, timeout=30 + count / SLOWEST)
    result.figure(
        restart_starts=max(len(set(after.items()) - set(before.items())), calls.get("Start", 0)),
        restart_shutdowns=max(len(before.keys() - after.keys()), calls.get("Shutdown", 0)),
        restart_writes=written.total(),
        restart_calls=sum(calls.values()),
        restart_serving_s=max(says, ready),
        restart_says_ready_s=says,
        restart_cpu_s=used,
        restart_not_gone=deleted.lost,
    )
    for method, number in calls.items():
        result.figure(**{f"restart_calls_{method.lower()}": number})
    return result


def on_nodes(cluster: LocalCluster) -> dict[str, tuple[int, int, int]]:
    """Every sandbox that the shims have: state, pid and start of it."""
    found: dict[str, tuple[int, int, int]] = {}
    for index in range(len(cluster.nodes)):
        with cluster.shim(index) as shim:
            for record in shim.list().sandboxes:
                found[record.sandbox_id] = (record.state, record.pid, record.started_at.ToNanoseconds())
    return found


def operators_calls(cluster: LocalCluster) -> dict[str, int]:
    """By method, as the operator counts them since its start: a cross-check of what the shims show."""
    found: dict[str, int] = {}
    for method, number in _CALLS.findall(cluster.operator_get("/metrics")):
        found[method] = found.get(method, 0) + round(float(number))
    return found
