"""What a sandboxer of containerd's says of a sandbox: that it has ended, and what it uses."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.conformance.relay import Relay
from tests.conformance.sandboxer import Sandboxer, sandboxer
from tests.integration.test_containerd import gone
from tests.integration.test_engines import IMAGE, Box, Make, container, settings_in, until

from sandkeeper.localcluster.ocilayout import busybox_image, write_layout
from sandkeeper.shim.engines.base import SANDBOX_PROCESS
from sandkeeper.shim.engines.containerd import ContainerdEngine
from sandkeeper.wire import controller_pb2
from sandkeeper.wire import node_pb2 as pb

pytestmark = [pytest.mark.oci, pytest.mark.asyncio(loop_scope="module")]

RUNTIME, NAME, NAMESPACE = "relayed", "relay", "sandkeeper"
SECONDS = 60.0


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
        served = {RUNTIME: {"sandboxer": NAME}}
        chosen = {"socket": str(below.containerd.socket), "runtimes": {"runc": "runc"}, "sandboxers": served}
        (folder / "engine").write_text(json.dumps({"engine": "containerd", "containerd": chosen}))
        yield Node(folder, below, relay)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(node: Node) -> AsyncIterator[ContainerdEngine]:
    made = ContainerdEngine(settings_in(node.folder))
    await made.open()
    yield made
    await made.close()


@pytest_asyncio.fixture(loop_scope="module")
async def make(node: Node, engine: ContainerdEngine) -> AsyncIterator[Make]:
    made: list[Box] = []

    def box(*containers: pb.ContainerConfig) -> Box:
        owner = pb.Owner(namespace="default", name="box", uid="u", instance=1)
        made.append(Box(engine, pb.SandboxConfig(runtime=RUNTIME, owner=owner, containers=containers)))
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
