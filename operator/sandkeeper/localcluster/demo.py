"""`make demo`: a Sandbox's way to Ready with the time of each stage, an exit status, an OOM kill.

All on a real API server, operator and shim. Every statement is checked: DemoFailed where one does not hold.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sandkeeper.localcluster.apiserver import Say
from sandkeeper.localcluster.cluster import Engine, LocalCluster
from sandkeeper.localcluster.watching import Body, Marks, Watcher, WatchError, condition, manifest, watching

NAMESPACE = "default"
RUNS = 5
STAGES: tuple[tuple[str, Callable[[Marks], float]], ...] = (
    ("accepted by the API server", lambda marks: marks.accepted),
    ("assigned to a node", lambda marks: marks.assigned),
    ("recorded on the node", lambda marks: marks.created),
    ("started", lambda marks: marks.started),
    ("Ready in its status", lambda marks: marks.ready),
)


class DemoFailed(Exception):
    """Something did not come out as the demo says it does."""


def run(directory: Path, *, keep: bool, engine: Engine, say: Say) -> None:
    """Brings a cluster up in `directory`, shows it, and takes it down unless `keep`.

    engine: `simulated` has no processes, and so nothing that could be killed for its memory.
    Raises DemoFailed, and what LocalCluster.up and down raise.
    """
    cluster, began = LocalCluster(directory), time.monotonic()
    if any(cluster.status().values()):
        raise DemoFailed(f"one still runs: sandkeeper local down --dir {directory}")
    try:
        cluster.up(shims=1, engine=engine, say=lambda line: say(f"==> {line}"))
        say(f"==> A whole cluster without Docker, in {time.monotonic() - began:.1f} s")
        asyncio.run(_show(cluster, engine, say))
    except WatchError as error:
        raise DemoFailed(str(error)) from error
    finally:
        if not keep:
            cluster.down()
    if keep:
        say(_how_to_go_on(cluster))
    else:
        say("==> All of it is down again")


async def _show(cluster: LocalCluster, engine: Engine, say: Say) -> None:
    async with watching(cluster.kubeconfig, NAMESPACE) as watcher:
        say(f"\n==> From its creation to Ready: {RUNS} Sandboxes, after one that unpacks the image")
        ways = [await _way(watcher, f"hello-{number}") for number in range(RUNS + 1)][1:]
        say(table(ways))
        await watcher.create_until_ready(manifest("sleeper"))
        say("\n==> One that ends with 3")
        ends = {"exitStatus": 3, "exitReason": "Error"}
        await _end(watcher, say, manifest("exit3", "sh", "-c", "exit 3"), ends)
        if engine == "oci":
            say("\n==> One that wants more than its 32 MiB of memory")
            ends = {"exitStatus": 137, "exitSignal": 9, "exitReason": "OOMKilled"}
            await _end(watcher, say, manifest("oom", "tail", "/dev/zero", memory="32Mi"), ends)
    say("\n$ kubectl get sbx")
    say(cluster.kubectl("-n", NAMESPACE, "get", "sbx"))


async def _way(watcher: Watcher, name: str) -> Marks:
    marks = await watcher.create_until_ready(manifest(name))
    await watcher.delete_until_gone(name)
    return marks


async def _end(watcher: Watcher, say: Say, sandbox: Body, expected: dict[str, Any]) -> None:
    body = await watcher.create_until_finished(sandbox)
    found = {key: body["status"].get(key) for key in expected}
    say("\n".join(f"    status.{key:<12} {value}" for key, value in found.items()))
    if found != expected or condition(body, "Ready") != "False":
        raise DemoFailed(
            f"{body['metadata']['name']}: expected Ready=False and {expected}; found"
            f" Ready={condition(body, 'Ready')} and {found}"
        )


def _how_to_go_on(cluster: LocalCluster) -> str:
    kubectl = shutil.which("kubectl") or cluster.api.tools["kubectl"].path
    tls = {"CA": cluster.tls.ca, "CERT": cluster.tls.cert, "KEY": cluster.tls.key}
    lines = (
        f"export KUBECONFIG={cluster.kubeconfig}",
        f"{kubectl} get sbx",
        "export " + " ".join(f"SANDKEEPER_TLS_{name}={path}" for name, path in tls.items()),
        f"{_program('kubectl-sandbox')} exec -it sleeper -- sh",
        f"{_program('sandkeeper')} local down --dir {cluster.folder}",
    )
    return "==> It is kept. Look around, and then take it down:\n\n" + "\n".join(
        f"    {line}" for line in lines
    )


def _program(name: str) -> str:
    """As it can be called from here: in PATH, or beside this Python."""
    return shutil.which(name) or str(Path(sys.executable).with_name(name))


def table(ways: Sequence[Marks]) -> str:
    """A row per stage, a column per run and one for the median: milliseconds after the creation was sent."""
    head = [f"run {number}" for number in range(1, len(ways) + 1)]
    lines = [f"    {'ms after it was sent':<28}" + "".join(f"{name:>8}" for name in (*head, "median"))]
    for name, mark in STAGES:
        values = [1000 * mark(way) for way in ways]
        row = [*values, statistics.median(values)]
        lines.append(f"    {name:<28}" + "".join(f"{value:>8.1f}" for value in row))
    lines.append("    (recorded and started: the shim's clock; the others: when the client saw it)")
    return "\n".join(lines)
