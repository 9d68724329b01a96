"""What containerd's events, and the relist after them, tell the engine that nobody else does.

A process that is not seen from the shim, as one in a virtual machine is not, is made of one that is: what the engine
has noted of it is taken away, and its monitor killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.integration.test_containerd import Make, Node, boxes, node_with
from tests.integration.test_engines import MIB, Box, container, monitor_of, until

from sandkeeper.localcluster.containerd_sources import SOURCES
from sandkeeper.shim.engines.base import ProcessExit
from sandkeeper.shim.engines.containerd import ContainerdEngine
from sandkeeper.shim.engines.containerd import engine as engine_module
from sandkeeper.wire import node_pb2 as pb

pytestmark = [pytest.mark.oci, pytest.mark.asyncio(loop_scope="module")]

SECONDS = 60.0
WAITS = "mkfifo /tmp/go; echo ready; cat /tmp/go; exit 8"


@pytest.fixture(scope="module", params=SOURCES)
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with node_with(request.param, tmp_path_factory) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(node: Node) -> AsyncIterator[ContainerdEngine]:
    made = await node.engine()
    yield made
    for each in reversed(node.engines):  # each goes back to where it came from
        await each.close()


@pytest_asyncio.fixture(loop_scope="module")
async def make(node: Node, engine: ContainerdEngine) -> AsyncIterator[Make]:
    async with boxes(node, engine) as made:
        yield made


async def unseen(box: Box) -> int:
    """Starts it, and takes away what shows its end without containerd; the pid that only the test knows."""
    pid = (await box.start())["main"]
    await box.said("ready\n")
    started = box.engine._attempt(box.id, "main", 0).started
    kept = json.loads(started.read_text())
    kept["process"] |= {"start": 0, "boot": ""}
    started.write_text(json.dumps(kept))
    os.kill(monitor_of(box), signal.SIGKILL)
    return pid


@contextlib.asynccontextmanager
async def waiting(box: Box) -> AsyncIterator[asyncio.Task[ProcessExit]]:
    """Somebody who waits for its end, since before it was looked at the last time."""
    task = asyncio.create_task(box.engine.wait(box.id, "main", 0))
    try:
        assert (await box.engine.inspect(box.id, "main", 0)).pid
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def go(pid: int) -> None:
    Path(f"/proc/{pid}/root/tmp/go").write_text("")


async def test_an_event_shows_the_end_of_a_process_that_is_not_seen(make: Make) -> None:
    box = make(container(WAITS))
    pid = await unseen(box)
    async with waiting(box) as task:
        go(pid)
        ended = await asyncio.wait_for(task, SECONDS)
    assert (ended.status, ended.reason) == (8, "Error")
    assert (await box.engine.inspect(box.id, "main", 0)).exit == ended


async def test_a_process_that_is_not_seen_takes_signals(make: Make) -> None:
    box = make(container(WAITS))
    await unseen(box)
    async with waiting(box) as task:
        await box.engine.kill(box.id, "main", 0, signal.SIGKILL)
        assert (await asyncio.wait_for(task, SECONDS)).signal == 9
    await box.engine.kill(box.id, "main", 0, signal.SIGKILL)


async def test_what_is_executed_in_it_ends_for_itself(make: Make, node: Node) -> None:
    box = make(container(WAITS))
    pid = await unseen(box)
    async with waiting(box) as task:
        node.ctr("tasks", "exec", "--exec-id", "one", f"{box.id}.main.0", "true")
        assert not task.done()
        go(pid)
        assert (await asyncio.wait_for(task, SECONDS)).status == 8


async def test_an_end_while_containerd_was_away_is_found_by_the_relist(make: Make, node: Node) -> None:
    box = make(container(WAITS))
    pid = await unseen(box)
    async with waiting(box) as task:
        node.daemon.kill()
        go(pid)
        await until(lambda: Path(f"/proc/{pid}").exists(), lambda there: not there, SECONDS)
        assert not task.done()
        node.daemon.start()
        ended = await asyncio.wait_for(task, SECONDS)
    # containerd 2 throws a task away that it finds stopped, and its exit with it.
    assert ended.reason == "SandboxLost" or ended.status == 8


async def test_a_task_that_was_removed_unnoticed_is_found_by_the_relist(make: Make, node: Node) -> None:
    box = make(container(WAITS))
    await unseen(box)
    async with waiting(box) as task:
        await box.engine._events.close()
        node.ctr("tasks", "delete", "--force", f"{box.id}.main.0")
        assert not task.done()
        box.engine._events.open()
        ended = await asyncio.wait_for(task, SECONDS)
    assert ended.reason == "SandboxLost"


async def test_the_stream_is_opened_again(make: Make, node: Node) -> None:
    made = [make(container(WAITS)) for _ in range(2)]
    pids = [await unseen(box) for box in made]
    node.daemon.restart()
    # The first may be found by the relist: then the stream is there for the second.
    for box, pid in zip(made, pids, strict=True):
        async with waiting(box) as task:
            go(pid)
            ended = await asyncio.wait_for(task, SECONDS)
        assert (ended.status, ended.reason) == (8, "Error")


@pytest.mark.parametrize("seen", [True, False])
async def test_a_task_that_somebody_kills(make: Make, node: Node, seen: bool) -> None:
    box = make(container(WAITS))
    await (box.start() if seen else unseen(box))
    async with waiting(box) as task:
        node.ctr("tasks", "kill", "--signal", "SIGKILL", f"{box.id}.main.0")
        ended = await asyncio.wait_for(task, SECONDS)
    assert (ended.signal, ended.reason) == (9, "Signaled")


@pytest.mark.parametrize("seen", [True, False])
async def test_a_task_that_somebody_deletes(make: Make, node: Node, seen: bool) -> None:
    box = make(container(WAITS))
    await (box.start() if seen else unseen(box))
    async with waiting(box) as task:
        node.ctr("tasks", "delete", "--force", f"{box.id}.main.0")
        ended = await asyncio.wait_for(task, SECONDS)
    # Whoever asks before it is gone learns how it ended.
    assert ended.reason == "SandboxLost" or ended.signal == 9


async def test_a_monitor_that_stands_still_keeps_no_end(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_MONITOR_SECONDS", 0.1)
    box = make(container(WAITS))
    pid = (await box.start())["main"]
    await box.said("ready\n")
    monitor = monitor_of(box)
    os.kill(monitor, signal.SIGSTOP)
    try:
        async with waiting(box) as task:
            go(pid)
            assert (await asyncio.wait_for(task, SECONDS)).status == 8
    finally:
        os.kill(monitor, signal.SIGCONT)


async def test_a_kill_for_memory_is_known_while_the_container_runs(make: Make) -> None:
    """Its count goes with the task's cgroup."""
    script = "sh -c 'x=a; while :; do x=$x$x; done'; echo ready; mkfifo /tmp/go; cat /tmp/go; exit 8"
    box = make(container(script, resources=pb.Resources(memory_bytes=16 * MIB)))
    pid = (await box.start())["main"]
    async with waiting(box) as task:
        await box.said("ready\n")
        await until(box.engine._attempt(box.id, "main", 0).oom_file.exists, bool, SECONDS)
        await until(Path(f"/proc/{pid}/root/tmp/go").exists, bool, SECONDS)
        go(pid)
        ended = await asyncio.wait_for(task, SECONDS)
    assert (ended.status, ended.reason) == (8, "OOMKilled")


def connections(node: Node) -> int:
    """To containerd's socket, from its side (unix(7): state 03 is connected)."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return sum(1 for words in lines if words[-1] == str(node.daemon.socket) and words[5] == "03")


async def test_a_closed_engine_leaves_no_connection(engine: ContainerdEngine, node: Node) -> None:
    def count() -> int:
        gc.collect()  # gRPC closes a connection with the last object that has to do with it
        return connections(node)

    await until(count, lambda found: found == 2, SECONDS)
    second = ContainerdEngine(node.settings)
    await second.open()
    await until(count, lambda found: found == 4, SECONDS)
    node.daemon.restart()
    for each in (engine, second):
        assert await each.list() == frozenset()
    await until(count, lambda found: found == 4, SECONDS)
    await second.close()
    await until(count, lambda found: found == 2, SECONDS)
