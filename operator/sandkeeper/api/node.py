"""The SandboxNode: one shim, what it offers and has room for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sandkeeper.api.meta import Condition, ObjectMeta
from sandkeeper.api.names import API_VERSION, SANDBOX_NODE
from sandkeeper.api.quantity import parse_bytes, parse_cpu_millis
from sandkeeper.api.schema import (
    DnsSubdomain,
    Int32,
    Int64,
    MapList,
    Message,
    Model,
    Text,
    cel,
    quantity,
)


class SandboxNodeSpec(Model):
    """Where the shim is and whether it may be used."""

    address: Annotated[
        str,
        Field(min_length=1, max_length=300),
        cel(
            r"self.matches('^([A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?|\\[[0-9a-fA-F:.]+\\]):[1-9][0-9]{0,4}$')"
            r" || self.matches('^unix:(//)?/[^:]+$')",
            "must be host:port, [IPv6]:port or unix:/path",
        ),
        cel(
            r"!self.matches(':[0-9]+$') || int(self.split(':')[size(self.split(':')) - 1]) <= 65535",
            "must have a port from 1 to 65535",
        ),
    ]
    """Where the shim listens: host:port, or unix:/path for one on the operator's own machine."""
    server_name: DnsSubdomain | None = None
    """Name that the shim's certificate must have; default: the host in `address`."""
    unschedulable: bool = False
    """Place no more sandboxes here; those that are here stay."""
    out_of_service: bool = False
    """An administrator's word that the node is gone for good, and its sandboxes with it. They are given up:
    set it only where nothing can be running any more."""


class RuntimeStatus(Model):
    """A runtime that the shim knows."""

    name: Annotated[str, Field(min_length=1, max_length=63)]
    """Name, as in a Sandbox's `spec.runtime`."""
    version: Text = ""
    """The version that it reports."""
    ready: bool = False
    """Whether a container was really started with it."""
    message: Message = ""
    """Why it is not ready."""


class NodeResources(Model):
    """Amounts of what sandboxes use."""

    cpu: Annotated[str, Field(max_length=32), quantity("0", "1000000")] = "0"
    """CPU cores."""
    memory: Annotated[str, Field(max_length=32), quantity("0", "1Ei")] = "0"
    """Memory in bytes."""
    pids: Int64 = 0
    """Processes and threads."""
    sandboxes: Int32 = 0
    """Sandboxes."""

    @property
    def cpu_millis(self) -> int:
        return parse_cpu_millis(self.cpu)

    @property
    def memory_bytes(self) -> int:
        return parse_bytes(self.memory)


class SandboxNodeStatus(Model):
    """What the shim said of itself. Written by the operator alone."""

    observed_generation: Int64 = 0
    """The `metadata.generation` that this status was computed from."""
    conditions: Annotated[tuple[Condition, ...], Field(max_length=16), MapList("type")] = ()
    """Ready: the operator reaches the shim, and the shim has a runtime that works."""
    engine: Text | None = None
    """How the shim makes processes: oci, containerd or simulated."""
    runtimes: Annotated[tuple[RuntimeStatus, ...], Field(max_length=32), MapList("name")] = ()
    """Runtimes that the shim knows."""
    default_runtime: Text | None = None
    """The runtime of a Sandbox that names none."""
    capacity: NodeResources | None = None
    """What the node has."""
    allocatable: NodeResources | None = None
    """What of it sandboxes may use."""
    sandboxes: Int32 = 0
    """Sandboxes on the node; brought up to date at a low rate."""
    version: Text | None = None
    """The shim's version."""
    boot_id: Annotated[Text | None, Field(alias="bootID")] = None
    """The kernel's boot id: another one means that the node was restarted."""


class SandboxNode(Model):
    """A node's shim: where it listens, what it offers and has room for."""

    api_version: Literal["sandkeeper.dev/v1alpha1"] = API_VERSION
    kind: Literal["SandboxNode"] = SANDBOX_NODE
    metadata: ObjectMeta = ObjectMeta()
    spec: SandboxNodeSpec
    """Where the shim is and whether it may be used."""
    status: SandboxNodeStatus = SandboxNodeStatus()
    """What the shim said of itself. Written by the operator alone."""
