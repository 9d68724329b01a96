"""The Sandbox: what should run, and what became of it."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from sandkeeper.api.containers import Containers, ExitSignal, ExitStatus, Volumes
from sandkeeper.api.meta import Condition, ObjectMeta
from sandkeeper.api.names import API_VERSION, SANDBOX
from sandkeeper.api.quantity import parse_bytes, parse_cpu_millis
from sandkeeper.api.schema import (
    CamelCase,
    DnsLabel,
    DnsSubdomain,
    Int32,
    Int64,
    MapList,
    Message,
    MicroTime,
    Model,
    RuntimeName,
    Text,
    cel,
    rule,
    rules,
)

DesiredState = Literal["Running", "Paused", "Stopped"]
RestartPolicy = Literal["Never", "OnFailure", "Always"]
Phase = Literal[
    "Pending",
    "Starting",
    "Running",
    "Paused",
    "Stopping",
    "Stopped",
    "Succeeded",
    "Failed",
    "Unknown",
    "Terminating",
]

LIFE_SPAN_FIELDS = frozenset(
    {
        "desired_state",
        "node_name",
        "node_selector",
        "failure_policy",
        "termination_grace_period_seconds",
        "active_deadline_seconds",
        "shutdown_time",
        "ttl_seconds_after_finished",
    }
)
"""Fields of a SandboxSpec that act at once or on the next instance; all others alter the process."""

NodeSelector = Annotated[
    dict[
        Annotated[str, Field(max_length=317)],
        Annotated[str, Field(max_length=63, pattern="^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$")],
    ],
    Field(max_length=32),
    cel(
        "self.all(key, key.size() <= 317 && key.matches("
        r"'^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$'))",
        "must have label keys: an optional DNS subdomain and `/`, then at most 63 letters, digits, -, _, .",
    ),
]


class FailurePolicy(Model):
    """What the operator does when the sandbox as a whole fails or is lost with its node's proven absence."""

    recreate: Literal["Never", "OnFailure"] = "Never"
    """Whether to start another instance in place of one that failed or was lost."""
    limit: Annotated[int, Field(ge=1, le=1000, json_schema_extra={"format": "int32"})] = 3
    """How many times at most."""
    backoff_seconds: Annotated[int, Field(ge=0, le=3600, json_schema_extra={"format": "int32"})] = 10
    """How long to wait before the first; the wait doubles each time."""


class SandboxSpec(Model):
    """What should run, where, and for how long."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.containers.all(c, !has(c.volumeMounts) || c.volumeMounts.all(m,"
                " has(self.volumes) && self.volumes.exists(v, v.name == m.name)))",
                "each `volumeMounts[].name` must be the name of an entry of `volumes`",
                ".containers",
            )
        )
    )

    desired_state: DesiredState = "Running"
    """Running; Paused: frozen, memory kept; Stopped: shut down on the node, the object stays."""
    runtime: RuntimeName | None = None
    """A runtime that the node offers (crun, runc, runsc, ...); default: the node's."""
    node_name: DnsSubdomain | None = None
    """The SandboxNode to run on; default: the operator chooses. Acts on the next instance."""
    node_selector: NodeSelector = Field(default_factory=dict)
    """Labels that the SandboxNode must have. Acts on the next instance."""
    containers: Containers
    """What runs: 1 to 16 containers that share namespaces. A change replaces the instance."""
    volumes: Volumes = ()
    """Storage that the containers share."""
    hostname: DnsLabel | None = None
    """Host name inside; default: the object's name."""
    network: Literal["None", "Host"] = "None"
    """None: loopback only. Host: the node's network, only where the node's configuration allows it."""
    restart_policy: RestartPolicy = "Never"
    """Whether the shim restarts a container that ended; the wait doubles each time, up to 5 minutes."""
    failure_policy: FailurePolicy = FailurePolicy()
    """What the operator does when the sandbox as a whole fails or is lost."""
    termination_grace_period_seconds: Annotated[
        int, Field(ge=0, le=86400, json_schema_extra={"format": "int32"})
    ] = 30
    """Seconds from SIGTERM to SIGKILL when the sandbox is stopped."""
    active_deadline_seconds: Annotated[
        int | None, Field(ge=1, le=2**31 - 1, json_schema_extra={"format": "int32"})
    ] = None
    """Seconds from an instance's start after which it is stopped (exitReason DeadlineExceeded)."""
    shutdown_time: MicroTime | None = None
    """When to shut the sandbox down, as `desiredState: Stopped` would: RFC 3339, 2030-01-31T12:00:00Z."""
    ttl_seconds_after_finished: Annotated[
        int | None, Field(ge=0, le=2**31 - 1, json_schema_extra={"format": "int32"})
    ] = None
    """Seconds after its end when the object is deleted; default: never."""


class Exited(Model):
    """How something ended."""

    exit_status: ExitStatus | None = None
    """Exit status, 0 to 255; 128 + signal where a signal ended it."""
    exit_signal: ExitSignal | None = None
    """Number of the signal that ended it, if one did."""
    exit_reason: CamelCase | None = None
    """Why it ended: Completed, Error, OOMKilled, Signaled, Stopped, StartError, SandboxLost,
    DeadlineExceeded, ShimLost."""


class ContainerStatus(Exited):
    """What was observed of one container."""

    name: DnsLabel
    """The container's name."""
    state: Literal["Waiting", "Running", "Paused", "Exited"] = "Waiting"
    """Waiting, Running, Paused or Exited."""
    pid: Int64 | None = None
    """Process id on the node, while it runs."""
    restart_count: Int32 = 0
    """How often it was restarted under `restartPolicy`."""
    started_at: MicroTime | None = None
    """When it was started last."""
    exited_at: MicroTime | None = None
    """When it ended last."""
    image_id: Annotated[Text | None, Field(alias="imageID")] = None
    """Digest of the image that runs."""
    reason: CamelCase | None = None
    """Why it waits: PullingImage, ErrImagePull, ImagePullBackOff, CrashLoopBackOff, ..."""
    message: Message | None = None
    """The same in words for people."""


class Usage(Model):
    """What the sandbox uses. A sample at a low rate; for graphs, scrape the shim."""

    cpu_usage_milliseconds: Int64 = 0
    """CPU time used since the start."""
    memory_bytes: Int64 = 0
    """Memory in use."""
    pids: Int64 = 0
    """Processes and threads."""
    sampled_at: MicroTime | None = None
    """When this was measured."""


class SandboxStatus(Exited):
    """What was observed. Written by the operator alone."""

    observed_generation: Int64 = 0
    """The `metadata.generation` that this status was computed from."""
    conditions: Annotated[tuple[Condition, ...], Field(max_length=16), MapList("type")] = ()
    """Scheduled, Running, Finished and Ready; Reconciling and Stalled only while True.
    Ready means: what is observed is what the spec asks for."""
    phase: Phase | None = None
    """The conditions in one word, for people only; programs read the conditions."""
    node_name: DnsSubdomain | None = None
    """The SandboxNode that the instance is on."""
    instance: Int32 | None = None
    """Number of the instance, from 1; a replacement is the next one."""
    sandbox_id: Annotated[Text | None, Field(alias="sandboxID")] = None
    """The instance's id on the node."""
    runtime: Text | None = None
    """The runtime that runs it."""
    pid: Int64 | None = None
    """Process id of the sandbox process on the node, while it runs."""
    created_at: MicroTime | None = None
    """When the instance was created on the node."""
    started_at: MicroTime | None = None
    """When the instance was started."""
    exited_at: MicroTime | None = None
    """When the instance ended."""
    exit_message: Message | None = None
    """More about the end, for people."""
    containers: Annotated[tuple[ContainerStatus, ...], Field(max_length=16), MapList("name")] = ()
    """What was observed of each container."""
    addresses: Annotated[
        tuple[Text, ...], Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = ()
    """IP addresses of the sandbox."""
    usage: Usage | None = None
    """What the sandbox uses, measured at a low rate."""
    recreations: Int32 = 0
    """How often `failurePolicy` started another instance, since the spec changed last."""


class Sandbox(Model):
    """Containers that run together, isolated, on one node, without a Pod."""

    api_version: Literal["sandkeeper.dev/v1alpha1"] = API_VERSION
    kind: Literal["Sandbox"] = SANDBOX
    metadata: ObjectMeta = ObjectMeta()
    spec: SandboxSpec
    """What should run, where, and for how long."""
    status: SandboxStatus = SandboxStatus()
    """What was observed. Written by the operator alone."""


def process_spec(spec: SandboxSpec) -> dict[str, Any]:
    """The part of a spec that alters the process: everything but LIFE_SPAN_FIELDS.

    Defaults are left out and quantities are plain numbers, so that neither an operator that knows more
    fields nor another spelling of the same limit makes a difference.
    """
    process = spec.model_dump(
        by_alias=True, mode="json", exclude=set(LIFE_SPAN_FIELDS), exclude_defaults=True
    )
    for container in process.get("containers", ()):
        limits = container.get("resources", {}).get("limits", {})
        _normalize(limits, "cpu", parse_cpu_millis)
        _normalize(limits, "memory", parse_bytes)
    for volume in process.get("volumes", ()):
        _normalize(volume.get("emptyDir", {}), "sizeLimit", parse_bytes)
    return process


def instance_digest(spec: SandboxSpec) -> str:
    """`sha256:...` of the process-altering part: two specs with the same digest run the same instance."""
    text = json.dumps(process_spec(spec), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _normalize(fields: dict[str, Any], key: str, parse: Any) -> None:
    if fields.get(key) is not None:
        fields[key] = parse(fields[key])
