"""A server of which nothing is known but its address: what it can be asked, found out by asking."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from sandkeeper.conformance.between import WITHHELD
from sandkeeper.conformance.box import CREATED, FAILED, Box, container
from sandkeeper.conformance.observed import shorten
from sandkeeper.conformance.registry import Ability, Check
from sandkeeper.conformance.server import Containerd, Images, Server, code_of, namespaces, unknown_id, until
from sandkeeper.wire import controller_pb2, node_pb2
from sandkeeper.wire.containerd import namespaces_pb2, namespaces_pb2_grpc
from sandkeeper.wire.tls import ClientTLS

REACH_SECONDS = 10.0
IMAGE_SECONDS = 120.0
ABSENT_IMAGE = "127.0.0.1:1/missing:1"
"""Nobody serves a registry there, and the simulated engine lacks what is called missing."""


class Uncheckable(Exception):
    """There is no server, or none that makes a sandbox for us."""


@dataclass(frozen=True, slots=True)
class Address:
    """How a server is called. address: `unix:/path` or `host:port`."""

    address: str
    tls: ClientTLS | None = None
    server_name: str = ""
    between: Containerd | None = None

    def server(
        self,
        images: Images,
        *,
        has_node: bool = False,
        no_containers: str = "",
        processes: bool = False,
    ) -> Server:
        path = self.address.removeprefix("unix:")
        return Server(
            address=self.address,
            images=images,
            no_containers=no_containers,
            has_node=has_node,
            processes=processes,
            between=self.between,
            tls=self.tls,
            server_name=self.server_name,
            socket=Path(path) if path != self.address else None,
        )


@dataclass(frozen=True, slots=True)
class Found:
    """A target: what was found there. says: who it says that it is, for people."""

    at: Address
    says: str
    images: Images
    has_node: bool
    no_containers: str
    processes: bool

    @property
    def abilities(self) -> frozenset[Ability]:
        local: set[Ability] = {"local"} if self.at.address.startswith("unix:") else set()
        processes: set[Ability] = {"processes"} if self.processes else set()
        return frozenset(local | processes)

    @property
    def withheld(self) -> Mapping[str, str]:
        return WITHHELD if self.at.between else {}

    async def server(self, check: Check) -> Server:
        return self.at.server(
            self.images,
            has_node=self.has_node,
            no_containers=self.no_containers,
            processes=self.processes,
        )


@contextlib.asynccontextmanager
async def target(at: Address, image: str) -> AsyncIterator[Found]:
    """What is there, to be checked within the context. At its end nothing of it is left there: containerd's namespace
    neither, where it was not there before.

    image: one with `sh`. Raises Uncheckable, OSError for TLS files that cannot be read, ValueError for TCP without TLS.
    """
    had = await _namespaces(at)
    try:
        yield await _find(at, image)
    finally:
        async with at.server(Images("")) as server:
            for name in namespaces(at.between.namespace) if at.between else ():
                if name not in had:
                    request = namespaces_pb2.DeleteNamespaceRequest(name=name)
                    await code_of(_namespaces_of(server).Delete(request, timeout=REACH_SECONDS))


async def _namespaces(at: Address) -> set[str]:
    """Those that containerd has."""
    if not at.between:
        return set()
    async with at.server(Images("")) as server:
        if not await server.answers(REACH_SECONDS):
            raise Uncheckable(f"no server answers within {REACH_SECONDS:g} s")
        request = namespaces_pb2.ListNamespacesRequest()
        try:
            answer = await _namespaces_of(server).List(request, timeout=REACH_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise Uncheckable(f"it has no namespaces, so it is no containerd: {error.code().name}") from None
        return {each.name for each in answer.namespaces}


def _namespaces_of(server: Server) -> Any:
    return namespaces_pb2_grpc.NamespacesStub(server.channel)


async def _find(at: Address, image: str) -> Found:
    """Asks it who it is, and makes sandboxes there to see of what kind they may be."""
    has_node, says = await _asked(at)
    processes = await _makes_processes(at, has_node)
    images = Images(image)
    no_containers = "" if has_node else await _why_no_config(at)
    if not no_containers:
        no_containers = await _why_no_image(at.server(images, has_node=has_node))
    if not no_containers and await _is_absent(at.server(images, has_node=has_node)):
        images = Images(image, absent=(ABSENT_IMAGE,))
    return Found(at, says, images, has_node, no_containers, processes)


async def _asked(at: Address) -> tuple[bool, str]:
    """Whether it has the Node service, and who it says that it is."""
    async with at.server(Images("")) as server:
        if not await server.answers(REACH_SECONDS):
            raise Uncheckable(f"no server answers within {REACH_SECONDS:g} s")
        request = controller_pb2.ControllerStatusRequest(sandbox_id=unknown_id())
        if at.between:
            request.sandboxer = at.between.sandboxer
            await _must_know(server, request)
            return False, f"containerd's sandboxer {at.between.sandboxer}"
        await _must_know(server, request)
    async with at.server(Images(""), has_node=True) as server:
        code, message = await code_of(server.node.Info(node_pb2.InfoRequest(), timeout=REACH_SECONDS))
        if code == grpc.StatusCode.UNIMPLEMENTED:
            return False, "a server of Controller alone"
        if code != grpc.StatusCode.OK:
            raise Uncheckable(f"its Info fails: {code.name}: {shorten(message)}")
        info = await server.client.info()
        return True, f"{info.node_name}, engine {info.engine}, version {info.version}"


async def _must_know(server: Server, request: controller_pb2.ControllerStatusRequest) -> None:
    """Raises Uncheckable where it is not this protocol's, or lets us not in."""
    call = server.controller.Status(request, metadata=server.metadata, timeout=REACH_SECONDS)
    code, message = await code_of(call)
    if code in (
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAVAILABLE,
    ):
        raise Uncheckable(f"its Status fails: {code.name}: {shorten(message)}")


async def _makes_processes(at: Address, has_node: bool) -> bool:
    """Whether the pid that Start answers is that of a process that began here since. Raises Uncheckable where no
    sandbox can be made at all."""
    async with at.server(Images(""), has_node=has_node) as server:
        sandbox_id = unknown_id()
        before = _uptime()
        try:
            await server.create(sandbox_id)
            pid = (await server.call("Start", sandbox_id)).pid
        except grpc.aio.AioRpcError as error:
            said = f"{error.code().name}: {shorten(error.details() or '')}"
            raise Uncheckable(f"it makes no sandbox without options: {said}") from None
        return at.address.startswith("unix:") and _began(pid) >= before - 0.1


def _uptime() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])


def _began(pid: int) -> float:
    """Seconds of uptime at which a process of this machine began; -1 where there is none (proc(5): starttime)."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return -1.0


async def _why_no_config(at: Address) -> str:
    """Why it takes no SandboxConfig; empty where it does."""
    async with at.server(Images("")) as server:
        box = Box(server)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await box.ask()
            record = node_pb2.SandboxRecord()
            if (await server.call("Status", box.id)).extra.Unpack(record):
                return ""
    return "it takes no sandkeeper.shim.v1.SandboxConfig as options"


async def _why_no_image(server: Server) -> str:
    """Why it cannot run the image of the checks; empty where it can. Fetches it."""
    image = server.images.present
    async with server:
        box = Box(server, "exit 0")
        await box.ask()
        try:
            record = await until(box.record, _is_settled, IMAGE_SECONDS)
        except AssertionError:
            record = await box.record()
        if record.state != CREATED:
            return f"image {image} does not come: {record.reason}: {shorten(record.message)}"
    return ""


async def _is_absent(server: Server) -> bool:
    """Whether ABSENT_IMAGE cannot be had there."""
    async with server:
        box = Box(server, container(server, image=ABSENT_IMAGE), hostname=f"probe-{uuid.uuid4().hex[:8]}")
        await box.ask()
        record = await until(box.record, lambda record: _is_settled(record) or _is_amiss(record))
        return _is_amiss(record)


def _is_settled(record: node_pb2.SandboxRecord) -> bool:
    return record.state in (CREATED, FAILED)


def _is_amiss(record: node_pb2.SandboxRecord) -> bool:
    return record.reason in ("ErrImagePull", "ImagePullBackOff")
