"""One sandbox of a check, and what a client does with it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from google.protobuf import any_pb2

from sandkeeper.conformance.observed import Inapplicable
from sandkeeper.conformance.server import MOMENT, PATIENCE, Server, until
from sandkeeper.wire import controller_pb2, node_pb2
from sandkeeper.wire.ids import OwnerKey

FOREVER = "sleep 1000"
"""Ends by SIGKILL only: as process 1 of its PID namespace a shell has no default for SIGTERM."""
OBEDIENT = "trap 'exit 7' TERM; echo ready; sleep 1000 & wait"
DEAF = "trap '' TERM; echo ready; sleep 1000 & wait"

PREPARING, CREATED, RUNNING, PAUSED, EXITED, FAILED = (
    node_pb2.STATE_PREPARING,
    node_pb2.STATE_CREATED,
    node_pb2.STATE_RUNNING,
    node_pb2.STATE_PAUSED,
    node_pb2.STATE_EXITED,
    node_pb2.STATE_FAILED,
)


def container(server: Server, script: str = FOREVER, **fields: Any) -> node_pb2.ContainerConfig:
    """A container of the server's image that runs a script of `sh`; fields: others of ContainerConfig."""
    given = {"name": "main", "image": server.images.present, "command": ["sh", "-c", script], **fields}
    return node_pb2.ContainerConfig(**given)


def packed(config: node_pb2.SandboxConfig) -> any_pb2.Any:
    """As Create's `options`."""
    options = any_pb2.Any()
    options.Pack(config)
    return options


def fresh_owner(instance: int = 1) -> OwnerKey:
    return OwnerKey("conformance", "box", str(uuid.uuid4()), instance)


class Box:
    """A sandbox that may not be there yet. containers: scripts, or whole ContainerConfigs; fields: others of
    SandboxConfig. The digest is that of what it says."""

    def __init__(
        self,
        server: Server,
        *containers: str | node_pb2.ContainerConfig,
        owner: OwnerKey | None = None,
        **fields: Any,
    ) -> None:
        if server.no_containers:
            raise Inapplicable(server.no_containers)
        self.server = server
        self.owner = owner or fresh_owner()
        whole = [
            container(server, each, name=f"c{number}") if isinstance(each, str) else each
            for number, each in enumerate(containers)
        ]
        config = node_pb2.SandboxConfig(containers=whole, **fields)
        config.digest = f"sha256:{hashlib.sha256(config.SerializeToString(deterministic=True)).hexdigest()}"
        config.owner.CopyFrom(
            node_pb2.Owner(
                namespace=self.owner.namespace,
                name=self.owner.name,
                uid=self.owner.uid,
                instance=self.owner.instance,
            )
        )
        self.config = config

    @property
    def id(self) -> str:
        return self.owner.sandbox_id

    async def ask(self, **options: Any) -> controller_pb2.ControllerCreateResponse:
        """Create, as it is answered. Raises grpc.aio.AioRpcError."""
        return await self.server.create(self.id, self.owner, options=packed(self.config), **options)

    async def create(self) -> Box:
        """Returns when it is CREATED."""
        await self.ask()
        await self.until(CREATED)
        return self

    async def start(self) -> int:
        return await self.server.client.start(self.owner)

    async def run(self) -> int:
        """The sandbox process's pid, when all runs."""
        await self.create()
        return await self.start()

    async def finish(self) -> node_pb2.SandboxRecord:
        """Runs it to its own end."""
        await self.run()
        await self.wait()
        return await self.record()

    async def wait(self) -> tuple[int, datetime | None]:
        async with asyncio.timeout(PATIENCE):
            return await self.server.client.wait(self.owner)

    async def stop(self, grace: int = 0) -> node_pb2.SandboxRecord:
        """The record when Stop was answered."""
        await self.server.client.stop(self.owner, grace)
        return await self.record()

    async def shutdown(self) -> None:
        await self.server.client.shutdown(self.owner)

    async def call(self, method: str, **fields: Any) -> Any:
        """Any call about it, as its owner. Raises grpc.aio.AioRpcError."""
        return await self.server.call(method, self.id, self.owner, **fields)

    async def record(self) -> node_pb2.SandboxRecord:
        """What Status says, without what is only a sample."""
        found = await self.server.client.status(self.owner)
        found.ClearField("usage")
        return found

    async def until(self, *states: int) -> node_pb2.SandboxRecord:
        """The record once it is in one of the states."""
        return await until(self.record, lambda record: record.state in states)  # type: ignore[no-any-return]

    async def stays(self, record: node_pb2.SandboxRecord) -> None:
        """Raises AssertionError where its record changes within the time in which a container would be restarted."""
        moment = max(MOMENT, 3 * self.server.restart_backoff)
        if self.server.has_node:
            changed = [change.sandbox.sandbox_id for change in await self.server.changes_within(moment)]
            assert self.id not in changed
        else:
            over = asyncio.get_running_loop().time() + moment
            while asyncio.get_running_loop().time() < over:
                assert await self.record() == record
                await asyncio.sleep(0.02)
        assert await self.record() == record

    async def log(self, name: str = "", **options: Any) -> str:
        pieces = [piece async for piece in self.server.client.logs(self.owner, name, **options)]
        return b"".join(pieces).decode()

    async def said(self, text: str, name: str = "") -> None:
        """Returns when a container has written the text."""
        await until(lambda: self.log(name), lambda output: text in output)

    async def trapping(self, *names: str) -> None:
        """Returns when these containers (default: the only one) mind SIGTERM as their scripts say."""
        if await self.server.offers("Logs"):
            for name in names or ("",):
                await self.said("ready", name)
        elif self.server.processes:
            record = await self.record()
            pids = [each.pid for each in record.containers if not names or each.name in names]
            await until(lambda: all(_minds_sigterm(pid) for pid in pids))
        else:
            raise Inapplicable("without Logs nobody knows how far its script is")


def _minds_sigterm(pid: int) -> bool:
    """Whether the process catches or ignores it (proc(5): SigCgt, SigIgn)."""
    bit = 1 << (signal.SIGTERM - 1)
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, mask = line.partition(":")
            if name in ("SigCgt", "SigIgn") and int(mask, 16) & bit:
                return True
    return False


# Sandboxes in each state


def absent_box(server: Server, number: int = 0) -> Box:
    """Stays PREPARING: its image cannot be had for now."""
    if number >= len(server.images.absent):
        raise Inapplicable("no image is known that cannot be had")
    return Box(server, container(server, image=server.images.absent[number]))


def failing_box(server: Server) -> Box:
    """Becomes FAILED: its image is not there and may not be fetched."""
    nowhere = f"registry.example/nowhere:{uuid.uuid4().hex}"
    policy = node_pb2.IMAGE_PULL_POLICY_NEVER
    return Box(server, container(server, image=nowhere, image_pull_policy=policy))


async def box_in(server: Server, state: int) -> Box:
    """A sandbox that is in this state. Raises Inapplicable where the server has no such."""
    box = absent_box(server) if state == PREPARING else Box(server, FOREVER)
    if state == FAILED:
        box = failing_box(server)
    if state == PAUSED and not await server.offers("Pause"):
        raise Inapplicable("it cannot pause")
    await box.ask()
    if state not in (PREPARING, FAILED):
        await box.until(CREATED)
    if state in (RUNNING, PAUSED, EXITED):
        await box.start()
    if state == PAUSED:
        await server.client.pause(box.owner)
    if state == EXITED:
        await box.stop()
    await box.until(state)
    return box


async def states(server: Server) -> list[int]:
    """The states that a sandbox of this server can be brought into."""
    paused = [PAUSED] if await server.offers("Pause") else []
    preparing = [PREPARING] if server.images.absent else []
    return [*preparing, CREATED, RUNNING, *paused, EXITED, FAILED]


def state_name(state: int) -> str:
    return node_pb2.State.Name(state).removeprefix("STATE_")  # type: ignore[arg-type]
