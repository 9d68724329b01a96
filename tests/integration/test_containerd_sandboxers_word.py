"""What a sandboxer of containerd's says of a sandbox: that it has ended, and what it uses."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import any_pb2
from google.protobuf.message import Message
from tests.conformance.relay import Refused, Relay
from tests.conformance.sandboxer import Sandboxer, sandboxer
from tests.conformance.shims import ShimHost
from tests.integration.test_containerd import gone
from tests.integration.test_engines import (
    IMAGE,
    MIB,
    Box,
    Make,
    container,
    execute,
    monitor_of,
    settings_in,
    until,
)

from sandkeeper.localcluster.ocilayout import busybox_image, write_layout
from sandkeeper.shim.engines.base import SANDBOX_PROCESS, EngineError, UsageSample
from sandkeeper.shim.engines.containerd import ContainerdEngine
from sandkeeper.shim.engines.oci import notes
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.wire import controller_pb2, controller_pb2_grpc, node_pb2_grpc
from sandkeeper.wire import node_pb2 as pb
from sandkeeper.wire.client import open_channel
from sandkeeper.wire.containerd import cgroup1_pb2, cgroup2_pb2

pytestmark = [pytest.mark.oci, pytest.mark.asyncio(loop_scope="module")]

RUNTIME, ELSEWHERE, NAME, NAMESPACE = "relayed", "elsewhere", "relay", "sandkeeper"
SECONDS = 60.0


def elsewhere(folder: Path) -> Path:
    """A runtime that runs its containers where it likes, and not in the cgroup that it was given: runc's default."""
    program, runc = folder / "elsewhere", shutil.which("runc", path=f"{os.environ['PATH']}:/usr/sbin")
    program.write_text(
        f"""#!/bin/sh
case " $* " in *" create "*)
    for each; do
        test -f "$each/config.json" && sed -i 's/"cgroupsPath": *"[^"]*"/"cgroupsPath": ""/' "$each/config.json"
    done
esac
exec {runc} "$@"
"""
    )
    program.chmod(0o755)
    return program


class Node:
    def __init__(self, folder: Path, below: Sandboxer, relay: Relay) -> None:
        self.folder = folder
        self.below = below
        self.relay = relay


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder, relay = tmp_path_factory.mktemp(f"relayed-{os.getpid()}-"), Relay()
    write_layout(folder / "layout", {IMAGE: busybox_image()})
    with sandboxer(tasks=True, relays={NAME: relay}) as below:
        served = {
            RUNTIME: {"sandboxer": NAME},
            ELSEWHERE: {"sandboxer": NAME, "runtime": str(elsewhere(folder))},
        }
        chosen = {"socket": str(below.containerd.socket), "runtimes": {"runc": "runc"}, "sandboxers": served}
        (folder / "engine").write_text(json.dumps({"engine": "containerd", "containerd": chosen}))
        yield Node(folder, below, relay)
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
    made: list[Box] = []

    def box(*containers: pb.ContainerConfig, runtime: str = RUNTIME) -> Box:
        owner = pb.Owner(namespace="default", name="box", uid="u", instance=1)
        made.append(Box(engine, pb.SandboxConfig(runtime=runtime, owner=owner, containers=containers)))
        return made[-1]

    yield box
    node.relay.answers.clear()
    for each in made:
        await until(functools.partial(gone, each), bool, SECONDS)
    assert await engine.list() == frozenset()


# -- its end


class Ended:
    """What a sandboxer says of a sandbox whose process is still there. at: known from then on."""

    def __init__(self, status: int) -> None:
        self.over = threading.Event()
        self.status = status
        self.at = datetime(2026, 1, 2, tzinfo=UTC)

    def wait(self, request: Any) -> controller_pb2.ControllerWaitResponse:
        self.over.wait(SECONDS)
        found = controller_pb2.ControllerWaitResponse(exit_status=self.status)
        found.exited_at.FromDatetime(self.at)
        return found

    def says(self, request: Any) -> controller_pb2.ControllerStatusResponse:
        state = "SANDBOX_NOTREADY" if self.over.is_set() else "SANDBOX_READY"
        return controller_pb2.ControllerStatusResponse(sandbox_id=request.sandbox_id, state=state)


async def test_a_sandbox_ends_when_its_sandboxer_says_so(node: Node, make: Make) -> None:
    box, said = make(), Ended(7)
    pid = (await box.start())[SANDBOX_PROCESS]
    node.relay.answers |= {"Wait": said.wait, "Status": said.says}
    # The engine's own Wait is the sandboxer's that was asked before: it is only the event, and what is
    # asked because of it, that tells.
    waiting = asyncio.create_task(box.engine.wait(box.id, SANDBOX_PROCESS, 0))
    said.over.set()
    async with node.below.client(NAMESPACE) as client:
        request = controller_pb2.ControllerWaitRequest(sandbox_id=box.id, sandboxer=NAME)
        await client._controller.Wait(request, metadata=client.metadata, timeout=SECONDS)
    ended = await asyncio.wait_for(waiting, SECONDS)
    assert (ended.status, ended.reason, ended.exited_at) == (7, "SandboxLost", said.at)
    assert Path(f"/proc/{pid}").exists()


async def test_its_word_is_taken_without_an_event(node: Node, make: Make) -> None:
    """As the answer to the Wait that the engine holds."""
    box, said = make(container("sleep 1000")), Ended(9)
    node.relay.answers["Wait"] = said.wait
    await box.start()
    node.relay.answers["Status"] = said.says
    waiting = asyncio.create_task(box.engine.wait(box.id, SANDBOX_PROCESS, 0))
    said.over.set()
    assert (await asyncio.wait_for(waiting, SECONDS)).status == 9


async def test_its_word_while_containerd_was_away_is_found_by_the_relist(node: Node, make: Make) -> None:
    box, said = make(), Ended(11)
    await box.start()
    waiting = asyncio.create_task(box.engine.wait(box.id, SANDBOX_PROCESS, 0))
    node.below.containerd.kill()
    said.over.set()
    node.relay.answers |= {"Wait": said.wait, "Status": said.says}
    node.below.containerd.start()
    assert (await asyncio.wait_for(waiting, SECONDS)).status == 11


async def test_a_sandboxer_that_forgot_it_ends_nothing(node: Node, make: Make) -> None:
    box = make(container("sleep 1000"))
    await box.start()
    waiting = asyncio.create_task(box.engine.wait(box.id, SANDBOX_PROCESS, 0))
    node.relay.answers["Status"] = lambda _: controller_pb2.ControllerStatusResponse()
    node.below.containerd.restart()
    again = make()
    node.relay.answers.clear()
    await again.start()  # by then containerd serves, and the relist was soon after
    assert not waiting.done()
    assert (await box.engine.inspect(box.id, "main", 0)).pid
    await box.engine.remove(box.id)
    assert (await asyncio.wait_for(waiting, SECONDS)).reason == "Signaled"


# -- processes that are not this node's: a pid of theirs may be another's here


async def test_a_pid_outside_of_our_cgroup_is_taken_for_nobodys_here(make: Make) -> None:
    box = make(container("mkfifo /tmp/go; echo ready; cat /tmp/go; exit 6"), runtime=ELSEWHERE)
    pid = (await box.start())["main"]
    await box.said("ready\n")
    assert pid not in box.engine._cgroups.pids(box.id)
    started = notes.read_started(box.engine._attempt(box.id, "main", 0))
    assert started is not None
    assert not started.process.alive()
    assert (await box.engine.inspect(box.id, "main", 0)).pid == pid
    with pytest.raises(EngineError, match="cgroup"):
        await box.engine.pause(box.id)
    status, found = await execute(box, ["echo", "in it"])
    assert (status, found["stdout"]) == (0, b"in it\n")
    waiting = asyncio.create_task(box.engine.wait(box.id, "main", 0))
    os.kill(monitor_of(box), signal.SIGKILL)
    Path(f"/proc/{pid}/root/tmp/go").write_text("")
    assert (await asyncio.wait_for(waiting, SECONDS)).status == 6
    assert (await box.engine.inspect(box.id, "main", 0)).exit is not None


async def test_such_a_one_takes_signals_by_containerd(make: Make) -> None:
    box = make(container("sleep 1000"), runtime=ELSEWHERE)
    await box.start()
    waiting = asyncio.create_task(box.engine.wait(box.id, "main", 0))
    await box.engine.kill(box.id, "main", 0, signal.SIGKILL)
    assert (await asyncio.wait_for(waiting, SECONDS)).signal == 9


# -- what it uses


@pytest.fixture(scope="module")
def vmm(node: Node) -> Iterator[Cgroups]:
    """The sandboxer's own cgroup `vm`, and a process in it as a hypervisor is one: what it uses, no cgroup of the
    engine's holds."""
    cgroups = Cgroups(f"test-vmm-{node.folder.name}")
    cgroups.make_parent()
    cgroups.make("vm")
    busy = "held = bytearray(32 << 20); print(1, flush=True)\nfor n in range(10**7): pass\ninput()"
    with subprocess.Popen([sys.executable, "-c", f"input(); {busy}"], **PIPES) as process:
        assert process.stdin
        assert process.stdout
        try:
            for mount in cgroups.hierarchies:
                (mount.point / cgroups.path("vm").lstrip("/") / "cgroup.procs").write_text(str(process.pid))
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"1\n"
            yield cgroups
        finally:
            process.kill()
            process.wait()
            cgroups.remove("vm")
            cgroups.close()


PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


class Metering:
    """A sandboxer's Metrics, of its own cgroup. said: each answer, as it was read."""

    def __init__(self, cgroups: Cgroups, pack: Callable[[UsageSample], any_pb2.Any]) -> None:
        self._cgroups = cgroups
        self._pack = pack
        self.said: list[UsageSample] = []

    def __call__(self, request: Any) -> controller_pb2.ControllerMetricsResponse:
        found = self._cgroups.usage("vm")
        assert found is not None
        self.said.append(found)
        answer = controller_pb2.ControllerMetricsResponse()
        answer.metrics.id = request.sandbox_id
        answer.metrics.data.CopyFrom(self._pack(found))
        return answer


def named(message: Message) -> any_pb2.Any:
    """As containerd writes it: without a prefix."""
    return any_pb2.Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def as_cgroup1(found: UsageSample) -> any_pb2.Any:
    metrics = cgroup1_pb2.Metrics()
    metrics.cpu.usage.total = found.cpu_usage_usec * 1000
    metrics.memory.usage.usage, metrics.pids.current = found.memory_bytes, found.pids
    return named(metrics)


def as_cgroup2(found: UsageSample) -> any_pb2.Any:
    metrics = cgroup2_pb2.Metrics()
    metrics.cpu.usage_usec, metrics.memory.usage = found.cpu_usage_usec, found.memory_bytes
    metrics.pids.current = found.pids
    return named(metrics)


def as_its_own(found: UsageSample) -> any_pb2.Any:
    return any_pb2.Any(type_url="vmm.example/vmm.v1.Metrics", value=f"{found.pids} vcpus".encode())


def refuse(request: Any) -> controller_pb2.ControllerMetricsResponse:
    raise Refused(grpc.StatusCode.UNIMPLEMENTED)


@pytest.mark.parametrize("pack", [as_cgroup1, as_cgroup2])
async def test_usage_is_the_sandboxers_where_our_cgroup_holds_nothing(
    node: Node, make: Make, vmm: Cgroups, pack: Callable[[UsageSample], any_pb2.Any]
) -> None:
    box = make()
    await box.start()
    node.relay.answers["Metrics"] = metering = Metering(vmm, pack)
    used = await box.engine.usage(box.id)
    assert used == metering.said[-1]
    assert used.pids == 1
    assert used.memory_bytes > 32 * MIB
    assert used.cpu_usage_usec > 0


async def test_usage_is_our_cgroups_where_that_holds_the_containers(
    node: Node, make: Make, vmm: Cgroups
) -> None:
    box = make(container("sleep 1000"))
    await box.start()
    node.relay.answers["Metrics"] = metering = Metering(vmm, as_cgroup1)
    used = await box.engine.usage(box.id)
    assert used is not None
    assert (used.pids, used.foreign) == (1, None)
    assert used.memory_bytes < 32 * MIB
    assert metering.said == []


async def test_usage_is_our_cgroups_where_the_sandboxer_has_no_metrics(node: Node, make: Make) -> None:
    box = make()
    await box.start()
    node.relay.answers["Metrics"] = refuse
    assert await box.engine.usage(box.id) == UsageSample(0, 0, 0)


async def test_a_shim_passes_on_what_it_cannot_read(node: Node, vmm: Cgroups) -> None:
    chosen = json.loads((node.folder / "engine").read_text())["containerd"]
    settings = {
        "CONTAINERD__SOCKET": chosen["socket"],
        "CONTAINERD__NAMESPACE": "above",
        "CONTAINERD__SANDBOXERS": json.dumps(chosen["sandboxers"]),
        "OCI__RUNTIMES": '["runc"]',
        "USAGE_INTERVAL": "0.1",
    }
    shim = ShimHost(node.below.folder / "above", "containerd", settings)
    shim.launch()
    try:
        await shim.ready()
        async with open_channel(f"unix:{shim.socket}") as channel:
            await metrics_of_a_life(node.relay, vmm, channel)
        await until(shim.leftovers, lambda left: not left, SECONDS)
    finally:
        node.relay.answers.clear()
        shim.stop()


async def metrics_of_a_life(relay: Relay, vmm: Cgroups, channel: grpc.aio.Channel) -> None:
    """A sandbox without containers, through a shim's own Controller: as a Usage, and as it came."""
    stub: Any = controller_pb2_grpc.ControllerStub(channel)
    sandbox_id = f"{uuid.uuid4()}-1"
    owner = pb.Owner(namespace="default", name="box", uid=sandbox_id[:-2], instance=1)
    options = any_pb2.Any()
    options.Pack(pb.SandboxConfig(runtime=RUNTIME, owner=owner))

    async def call(method: str, **fields: Any) -> Any:
        request = getattr(controller_pb2, f"Controller{method}Request")(sandbox_id=sandbox_id, **fields)
        return await getattr(stub, method)(request, timeout=SECONDS)

    async def recorded() -> pb.Usage:
        (record,) = (await node_pb2_grpc.NodeStub(channel).List(pb.ListRequest())).sandboxes
        return record.usage

    await call("Create", options=options)
    await call("Start")
    relay.answers["Metrics"] = metering = Metering(vmm, as_cgroup2)
    metrics = (await call("Metrics")).metrics
    used = pb.Usage()
    assert metrics.id == sandbox_id
    assert metrics.data.Unpack(used)
    assert used.memory_bytes in {each.memory_bytes for each in metering.said}
    assert (await until(recorded, lambda found: found.pids == 1, SECONDS)).memory_bytes > 32 * MIB
    relay.answers["Metrics"] = Metering(vmm, as_its_own)
    metrics = (await call("Metrics")).metrics
    assert (metrics.id, metrics.data.type_url) == (sandbox_id, "vmm.example/vmm.v1.Metrics")
    assert metrics.data.value == b"1 vcpus"
    relay.answers["Metrics"] = refuse
    assert (await call("Metrics")).metrics.data.Unpack(used)
    assert used.memory_bytes == 0
    await call("Shutdown")
