"""A containerd whose sandboxer is our shim, and the calls of containerd's clients."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import any_pb2
from tests.conformance.relay import Relay
from tests.conformance.shims import ShimHost
from tests.containerds import containerd

from sandkeeper.localcluster import containerd_sources
from sandkeeper.localcluster.containerd import Containerd
from sandkeeper.wire import controller_pb2, controller_pb2_grpc, node_pb2, store_pb2, store_pb2_grpc
from sandkeeper.wire.client import open_channel

NAME = "sandkeeper"
"""Of the plugin: what its clients give as `sandboxer`."""
SECONDS = 60.0
"""For one call, and for what comes of it: far more than either takes."""


@dataclass(frozen=True, slots=True)
class Sandboxer:
    """Both processes. folder: for a test's own files, on the same disk."""

    shim: ShimHost
    containerd: Containerd
    folder: Path

    @contextlib.asynccontextmanager
    async def client(self, namespace: str = "default") -> AsyncIterator[Client]:
        """A client of containerd in one of its namespaces."""
        async with open_channel(f"unix:{self.containerd.socket}") as channel:
            yield Client(channel, namespace)

    async def restart_shim(self) -> None:
        """Kills it, and starts it again."""
        self.shim.kill()
        self.shim.launch()
        await self.shim.ready()


class Client:
    """What containerd's clients call. Every call raises grpc.aio.AioRpcError."""

    def __init__(self, channel: grpc.aio.Channel, namespace: str) -> None:
        self._controller: Any = controller_pb2_grpc.ControllerStub(channel)
        self.store: Any = store_pb2_grpc.StoreStub(channel)
        self.metadata = (("containerd-namespace", namespace),)

    async def call(self, method: str, sandbox_id: str, **fields: Any) -> Any:
        """One of Controller's, answered by our shim."""
        request = getattr(controller_pb2, f"Controller{method}Request")
        return await getattr(self._controller, method)(
            request(sandbox_id=sandbox_id, sandboxer=NAME, **fields),
            metadata=self.metadata,
            timeout=SECONDS,
            # containerd is back only after a while when a test has restarted it.
            wait_for_ready=True,
        )

    async def code(self, method: str, sandbox_id: str, **fields: Any) -> grpc.StatusCode:
        """How a call is answered."""
        try:
            await self.call(method, sandbox_id, **fields)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    async def run(self, sandbox_id: str, **fields: Any) -> int:
        """Create and Start; the pid."""
        await self.call("Create", sandbox_id, **fields)
        return int((await self.call("Start", sandbox_id)).pid)

    async def record(self, sandbox_id: str) -> node_pb2.SandboxRecord:
        """What the shim tells beside what containerd understands."""
        status = await self.call("Status", sandbox_id)
        found = node_pb2.SandboxRecord()
        assert status.extra.Unpack(found)
        return found

    async def remove(self, sandbox_id: str) -> None:
        """Whatever has become of it."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self.call("Shutdown", sandbox_id)

    async def remember(self, sandbox_id: str) -> None:
        """As containerd's own client does first: in its store."""
        sandbox = {"sandbox_id": sandbox_id, "sandboxer": NAME, "runtime": {"name": "sandkeeper.v1"}}
        await self.store.Create(
            store_pb2.StoreCreateRequest(sandbox=sandbox), metadata=self.metadata, timeout=SECONDS
        )


def any_of(type_url: str, value: bytes) -> any_pb2.Any:
    return any_pb2.Any(type_url=type_url, value=value)


@contextlib.contextmanager
def sandboxer(
    *, tasks: bool = False, relays: Mapping[str, Relay] | None = None, **options: Any
) -> Iterator[Sandboxer]:
    """A shim and a containerd until the end of the block; nothing is left of either, nor of any sandbox.

    tasks: containerd may run containers in its sandboxes.
    relays: further sandboxers by their names, each in front of the shim.
    """
    folder = Path(tempfile.mkdtemp(prefix="sbx-"))
    settings = {"SANDBOXER__FORGOTTEN_AFTER": "15", "COLLECT_INTERVAL": "0.5"}
    if tasks:
        settings["SANDBOXER__TASK_SHIM"] = str(
            containerd_sources.folder("module") / "containerd-shim-runc-v2"
        )
        settings["SANDBOXER__CONTAINERD_ROOT"] = str(folder / "ctrd" / "root")
        settings["SANDBOXER__CONTAINERD_SOCKET"] = str(folder / "ctrd" / "containerd.sock")
    shim = ShimHost(folder / "node", "oci", settings)
    served = {NAME: shim.socket}
    try:
        with contextlib.ExitStack() as stack:
            for name, relay in (relays or {}).items():
                served[name] = folder / f"{name}.sock"
                stack.enter_context(relay.serving(served[name], shim.socket))
            ctrd = stack.enter_context(containerd(folder=folder / "ctrd", sandboxers=served, **options))
            shim.launch()
            try:
                asyncio.run(shim.ready())
                (folder / "files").mkdir()
                yield Sandboxer(shim, ctrd, folder / "files")
            finally:
                shim.stop()
            left = shim.leftovers()
            assert not left, "left behind:\n  " + "\n  ".join(left)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
