"""The containerd engine with a sandboxer of containerd's, which is another shim of ours: it makes the sandboxes, and
containerd runs the engine's containers in them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import any_pb2
from tests.conformance.sandboxer import NAME, Sandboxer, sandboxer
from tests.conformance.shims import ShimHost
from tests.integration.test_containerd import gone, patient_exec
from tests.integration.test_engines import (
    IMAGE,
    Box,
    Make,
    container,
    execute,
    namespace,
    settings_in,
    started_by_a_killed_shim,
    until,
)
from tests.leaks import Leaks

from sandkeeper.localcluster.ocilayout import busybox_image, write_layout
from sandkeeper.shim.engines.base import SANDBOX_PROCESS, EngineError, ProcessExit
from sandkeeper.shim.engines.containerd import ContainerdEngine
from sandkeeper.shim.engines.containerd.client import CallError
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.wire import controller_pb2, controller_pb2_grpc
from sandkeeper.wire import node_pb2 as pb
from sandkeeper.wire.client import open_channel

pytestmark = [pytest.mark.oci, pytest.mark.asyncio(loop_scope="module")]

RUNTIME = "boxed"
NAMESPACE = "sandkeeper"
SECONDS = 60.0


@dataclass
class Node:
    """folder: the engine's. below: containerd, and the shim that is its sandboxer."""

    folder: Path
    below: Sandboxer
    cgroup: str

    def left(self) -> list[str]:
        """Of sandboxes, on both sides and in containerd between them."""
        ctr = self.below.containerd.ctr
        containers = ctr("containers", "list", "--quiet", namespace=NAMESPACE).split()
        sandboxes = ctr("sandboxes", "list", namespace=NAMESPACE).splitlines()[1:]
        shims = [f"containerd-shim {pid}" for pid in self.below.containerd.shims()]
        # One that a test has started again is where the test is: an engine has moved that.
        daemon = self.below.containerd.pid
        leaks = Leaks(self.folder, self.cgroup, ignore=() if daemon is None else (daemon,))
        return [*leaks.found(), *self.below.shim.leftovers(), *containers, *sandboxes, *shims]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp(f"boxed-{os.getpid()}-")
    write_layout(folder / "layout", {IMAGE: busybox_image()})
    with sandboxer(tasks=True) as below:
        served = {RUNTIME: {"sandboxer": NAME}, "nobodys": {"sandboxer": "nobody"}}
        chosen = {"socket": str(below.containerd.socket), "runtimes": {"runc": "runc"}, "sandboxers": served}
        (folder / "engine").write_text(json.dumps({"engine": "containerd", "containerd": chosen}))
        yield Node(folder, below, f"test-engine-{folder.name}")
    # A containerd that a test has started again was in the engine's cgroup, as the test was.
    Cgroups(f"test-engine-{folder.name}", hide_v2=False).close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(node: Node) -> AsyncIterator[ContainerdEngine]:
    made = ContainerdEngine(settings_in(node.folder))
    await made.open()
    yield made
    await made.close()


@pytest_asyncio.fixture(loop_scope="module")
async def make(node: Node, engine: ContainerdEngine) -> AsyncIterator[Make]:
    """Makes sandboxes; removes them, and looks that nothing is left anywhere."""
    made: list[Box] = []

    def box(*containers: pb.ContainerConfig, runtime: str = RUNTIME, **fields: str) -> Box:
        owner = pb.Owner(namespace="default", name="box", uid="u", instance=1)
        made.append(
            Box(engine, pb.SandboxConfig(runtime=runtime, owner=owner, containers=containers, **fields))
        )
        return made[-1]

    yield box
    for each in made:
        await until(functools.partial(gone, each), bool, SECONDS)
    assert await engine.list() == frozenset()
    await until(node.left, lambda left: not left, SECONDS)


async def ended(box: Box, name: str = "main") -> ProcessExit:
    return await asyncio.wait_for(box.engine.wait(box.id, name, 0), SECONDS)


async def test_a_runtime_is_offered_where_its_sandboxer_works(engine: ContainerdEngine) -> None:
    found = {each.name: each for each in engine.runtimes()}
    assert found[RUNTIME].ready, found[RUNTIME].message
    assert not found["nobodys"].ready
    assert "nobody" in found["nobodys"].message
    assert engine.runtimes()[0].name == "runc"


async def test_containers_run_in_the_sandboxers_sandbox(node: Node, make: Make) -> None:
    box = make(container("hostname; sleep 1000"), container("exit 3", name="short"), hostname="green")
    pids = await box.start()
    for kind in ("net", "ipc", "uts"):
        assert namespace(pids["main"], kind) == namespace(pids[SANDBOX_PROCESS], kind)
    assert (await ended(box, "short")).status == 3
    await until(box.output, lambda output: "green" in output, SECONDS)
    assert box.id in node.below.containerd.ctr("sandboxes", "list", namespace=NAMESPACE)
    assert len(node.below.containerd.shims()) == 1
    used = await box.engine.usage(box.id)
    assert used is not None
    assert used.pids > 0


async def test_both_kinds_live_side_by_side(make: Make) -> None:
    ends = [await make(container("exit 4"), runtime=name).run() for name in (RUNTIME, "runc")]
    assert [each.status for each, _ in ends] == [4, 4]


async def test_signals_and_many_waits(make: Make) -> None:
    box = make(container("trap 'exit 7' TERM; echo ready; while :; do sleep 0.02; done"))
    await box.start()
    await until(box.output, lambda output: "ready" in output, SECONDS)
    waiting = [asyncio.create_task(ended(box)) for _ in range(8)]
    await box.engine.kill(box.id, "main", 0, signal.SIGTERM)
    assert {each.status for each in await asyncio.gather(*waiting)} == {7}


async def test_exec_and_pause(make: Make) -> None:
    box = make(container("sleep 1000"))
    await box.start()
    status, found = await execute(box, ["sh", "-c", "echo out; exit 9"])
    assert (status, found["stdout"]) == (9, b"out\n")
    await box.engine.pause(box.id)
    with pytest.raises(EngineError, match="paused"):
        await execute(box, ["true"])
    await box.engine.resume(box.id)
    assert (await execute(box, ["true"]))[0] == 0


async def test_a_second_attempt(make: Make) -> None:
    box = make(container("exit 5"))
    await box.run()
    await box.engine.start_container(box.id, box.config, "main", 1)
    assert (await asyncio.wait_for(box.engine.wait(box.id, "main", 1), SECONDS)).status == 5


async def test_an_unknown_command_is_a_start_error(make: Make) -> None:
    box = make(container(command=["/no/such/program"]))
    await box.prepare()
    await box.engine.start(box.id, box.config)
    with pytest.raises(EngineError, match="no/such/program") as caught:
        await box.engine.start_container(box.id, box.config, "main", 0)
    assert caught.value.reason == "StartError"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_sandbox_is_stopped(make: Make, number: int) -> None:
    box = make()
    await box.start()
    waiting = asyncio.create_task(ended(box, SANDBOX_PROCESS))
    await box.engine.kill(box.id, SANDBOX_PROCESS, 0, number)
    assert ((await waiting).status, (await waiting).reason) == (128 + number, "Signaled")


async def test_an_end_that_nobody_asked_for_is_kept(node: Node, make: Make) -> None:
    """containerd has an exit only as long as the sandbox, and not for us while it is away."""
    box = make(container("sleep 1000"))
    pids = await box.start()
    node.below.containerd.stop()
    try:
        os.kill(pids[SANDBOX_PROCESS], signal.SIGKILL)
        waiting = asyncio.create_task(ended(box, SANDBOX_PROCESS))
    finally:
        node.below.containerd.start()
    seen = await waiting
    assert seen.reason == "SandboxLost"
    again = ContainerdEngine(settings_in(node.folder))
    await again.open()
    node.below.containerd.stop()
    try:
        state = await asyncio.wait_for(again.inspect(box.id, SANDBOX_PROCESS, 0), SECONDS)
        assert state.exit == seen
    finally:
        node.below.containerd.start()
        await again.close()


async def test_removal_answers_who_waits(make: Make) -> None:
    box = make(container("sleep 1000"))
    await box.start()
    waiting = [asyncio.create_task(ended(box, name)) for name in ("main", SANDBOX_PROCESS)]
    await asyncio.sleep(0)
    await box.engine.remove(box.id)
    ends = await asyncio.gather(*waiting)
    assert ends[1].reason == "Signaled"


async def test_a_restart_of_containerd(node: Node, make: Make) -> None:
    waits = container("while ! test -e /stop; do sleep 0.02; done; exit 6", name="waits")
    box = make(container("sleep 1000"), waits)
    pids = await box.start()
    node.below.containerd.kill()
    try:
        Path(f"/proc/{pids['waits']}/root/stop").touch()
        # Known without containerd.
        assert (await ended(box, "waits")).status == 6
    finally:
        node.below.containerd.start()
    for name in ("main", SANDBOX_PROCESS):
        assert (await box.engine.inspect(box.id, name, 0)).pid == pids[name]
    assert (await patient_exec(box, ["true"]))[0] == 0


async def test_a_restart_of_the_sandboxer(node: Node, make: Make) -> None:
    box = make(container("sleep 1000"))
    pids = await box.start()
    await node.below.restart_shim()
    assert (await box.engine.inspect(box.id, SANDBOX_PROCESS, 0)).pid == pids[SANDBOX_PROCESS]
    assert (await patient_exec(box, ["true"]))[0] == 0


async def test_a_killed_shims_sandboxes_are_found(node: Node, make: Make) -> None:
    box = make(container("sleep 1000"), container("exit 5", name="short"))
    await started_by_a_killed_shim(box, node.folder)
    assert (await ended(box, "short")).status == 5
    pid = (await box.engine.inspect(box.id, "main", 0)).pid
    assert pid > 0
    assert (await box.start())["main"] == pid


async def test_sandboxes_of_a_runtime_that_is_no_longer_configured_are_ended(node: Node, make: Make) -> None:
    box = make(container("sleep 1000"))
    await box.start()
    settings = settings_in(node.folder)
    without = settings.containerd.model_copy(update={"sandboxers": {}})
    again = ContainerdEngine(settings.model_copy(update={"containerd": without}))
    await again.open()
    try:
        assert box.id in await again.list()
        await again.remove(box.id)
    finally:
        await again.close()
    assert not node.below.containerd.shims()


async def test_a_sandbox_whose_sandboxer_is_not_loaded_is_not_given_up(node: Node, make: Make) -> None:
    """containerd answers then as if there were no such sandbox."""
    box = make(container("sleep 1000"))
    pids = await box.start()
    daemon = node.below.containerd
    kept = dict(daemon._sandboxers)
    daemon.stop()
    daemon._sandboxers.clear()
    daemon.start()
    try:
        with pytest.raises(EngineError, match="no sandboxer"):
            await until(functools.partial(gone_or_refused, box), bool, SECONDS)
        assert box.id in await box.engine.list()
        assert Path(f"/proc/{pids[SANDBOX_PROCESS]}").exists()
    finally:
        daemon.stop()
        daemon._sandboxers.update(kept)
        daemon.start()


async def gone_or_refused(box: Box) -> bool:
    """Not as long as containerd does not answer."""
    try:
        await box.engine.remove(box.id)
    except CallError:
        return False
    return True


async def test_a_sandboxer_that_is_away_takes_no_other_runtime_with_it(node: Node) -> None:
    node.below.shim.kill()
    away = ContainerdEngine(settings_in(node.folder))
    try:
        await away.open()
        found = {each.name: each for each in away.runtimes()}
        await away.close()
    finally:
        node.below.shim.launch()
        await node.below.shim.ready()
    assert found["runc"].ready
    assert not found[RUNTIME].ready
    assert found[RUNTIME].message


async def test_what_a_probe_could_not_remove_is_removed_by_the_next(node: Node, make: Make) -> None:
    """The test before has left it: nobody was there to ask."""
    again = ContainerdEngine(settings_in(node.folder))
    await again.open()
    try:
        found = {each.name: each for each in again.runtimes()}
        assert found[RUNTIME].ready, found[RUNTIME].message
    finally:
        await again.close()


async def test_a_shims_client_does_not_see_the_difference(node: Node) -> None:
    """Controller's calls, from Create to Shutdown, to a shim whose sandboxes are another's."""
    chosen = json.loads((node.folder / "engine").read_text())["containerd"]
    settings = {
        "CONTAINERD__SOCKET": chosen["socket"],
        "CONTAINERD__NAMESPACE": "another",
        "CONTAINERD__SANDBOXERS": json.dumps(chosen["sandboxers"]),
        "OCI__RUNTIMES": '["runc"]',
        "OCI__IMAGE_LAYOUTS": json.dumps([str(node.folder / "layout")]),
    }
    shim = ShimHost(node.below.folder / "above", "containerd", settings)
    shim.launch()
    try:
        await shim.ready()
        async with open_channel(f"unix:{shim.socket}") as channel:
            await whole_life(controller_pb2_grpc.ControllerStub(channel))
        await until(shim.leftovers, lambda left: not left, SECONDS)
    finally:
        shim.stop()


async def whole_life(stub: Any) -> None:
    sandbox = {"sandbox_id": f"{uuid.uuid4()}-1"}
    owner = pb.Owner(namespace="default", name="box", uid=sandbox["sandbox_id"][:-2], instance=1)
    script = container("trap 'exit 0' TERM; while :; do sleep 0.02; done")
    options = any_pb2.Any()
    options.Pack(pb.SandboxConfig(runtime=RUNTIME, owner=owner, containers=[script]))

    async def call(method: str, **fields: Any) -> Any:
        request = getattr(controller_pb2, f"Controller{method}Request")(**sandbox, **fields)
        return await getattr(stub, method)(request, timeout=SECONDS)

    await call("Create", options=options)

    async def start() -> Any:
        with contextlib.suppress(grpc.aio.AioRpcError):  # UNAVAILABLE as long as the image is made ready
            return await call("Start")

    started = await until(start, bool, SECONDS)
    status = await call("Status")
    assert (status.pid, status.state) == (started.pid, "SANDBOX_READY")
    used = pb.Usage()
    assert (await call("Metrics")).metrics.data.Unpack(used)
    assert used.pids > 0
    waiting = asyncio.create_task(call("Wait"))
    await call("Stop", timeout_secs=30)
    assert (await waiting).exit_status == 0
    assert (await call("Status")).state == "SANDBOX_NOTREADY"
    assert (await call("Wait")).exit_status == 0
    await call("Shutdown")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call("Status")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
