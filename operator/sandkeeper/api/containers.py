"""What runs in a sandbox: containers, their limits and rights, and the volumes they share.

Field names are a Pod's wherever a Pod has the field.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from sandkeeper.api.schema import (
    Cpu,
    DnsLabel,
    Int64,
    MapList,
    Memory,
    Model,
    cel,
    rule,
    rules,
)

# The capabilities that Docker grants by default. None of the others can be had: with most of them
# (SYS_ADMIN, SYS_MODULE, ...) a sandbox is none.
Capability = Literal[
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
]
DroppedCapability = Literal[
    "ALL",
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
]

# Source: github.com/distribution/reference (regexp.go); of digests sha256 alone.
_REFERENCE = (
    r"^(([a-zA-Z0-9-]+(\\.[a-zA-Z0-9-]+)*|\\[[0-9a-fA-F:]+\\])(:[0-9]+)?/)?"
    r"[a-z0-9]+((\\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\\.|_|__|-+)[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[a-f0-9]{64})?$"
)
ImageReference = Annotated[
    str,
    Field(min_length=1, max_length=512),
    cel(
        f"self.matches('{_REFERENCE}')",
        "must be an image reference, such as busybox:1.37 or registry.example.com/team/app@sha256:<digest>",
    ),
]

_NO_NUL = r"^[^\x00]*$"
Argument = Annotated[str, Field(max_length=32768, pattern=_NO_NUL)]

_PLAIN = r"!self.matches('(^|/)\\.\\.?(/|$)')"
_ABSOLUTE = "self.startsWith('/') && !self.contains('//') && (self == '/' || !self.endsWith('/'))"
_KERNEL = "!(self + '/').matches('^/(proc|sys|dev)/')"

PlainPath = Field(max_length=1024, pattern=r"^[^\x00:]*$")


class EnvVar(Model):
    """One environment variable."""

    name: Annotated[
        str,
        Field(min_length=1, max_length=256),
        cel(
            "self.matches('^[-._a-zA-Z][-._a-zA-Z0-9]*$')",
            "must be the name of an environment variable: letters, digits, `-`, `.` and `_`, no digit first",
        ),
    ]
    """Name of the variable."""
    value: Argument = ""
    """Value of the variable, as it is: references such as $(NAME) are not expanded."""


class ResourceLimits(Model):
    """Upper bounds. Where one is not set the node's default applies: there is always a bound."""

    cpu: Cpu | None = None
    """CPU time per time, in cores: 2, 0.5 or 500m."""
    memory: Memory | None = None
    """Memory in bytes: 64Mi, 1Gi. A container that needs more is killed (exitReason OOMKilled)."""
    pids: Annotated[int, Field(ge=1, le=4194304, json_schema_extra={"format": "int64"})] | None = None
    """Number of processes and threads."""


class Resources(Model):
    """What a container may use."""

    limits: ResourceLimits = ResourceLimits()
    """Upper bounds; placement counts with them as well."""


class Capabilities(Model):
    """Linux capabilities, relative to the node's default set."""

    add: Annotated[
        tuple[Capability, ...], Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "set"})
    ] = ()
    """Capabilities to have, of those that are harmless in a sandbox; after `drop`."""
    drop: Annotated[
        tuple[DroppedCapability, ...],
        Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = ()
    """Capabilities not to have; ALL for none at all."""


class SecurityContext(Model):
    """Rights of a container's processes. What is not said here is the safe choice."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!(has(self.runAsNonRoot) && self.runAsNonRoot"
                " && has(self.runAsUser) && self.runAsUser == 0)",
                "`runAsUser` must not be 0 where `runAsNonRoot` is true",
                ".runAsUser",
            )
        )
    )

    run_as_user: Annotated[int, Field(ge=0, le=2**31 - 1, json_schema_extra={"format": "int64"})] | None = (
        None
    )
    """Numeric user; default: the image's."""
    run_as_group: Annotated[int, Field(ge=0, le=2**31 - 1, json_schema_extra={"format": "int64"})] | None = (
        None
    )
    """Numeric primary group; default: the image's."""
    run_as_non_root: bool = False
    """Refuse to start as user 0, whether it was asked for here or by the image."""
    read_only_root_filesystem: bool = False
    """Mount the root file system read-only."""
    allow_privilege_escalation: bool = False
    """Let processes gain rights that their parents do not have (set-user-ID programs)."""
    capabilities: Capabilities = Capabilities()
    """Linux capabilities, relative to the node's default set."""


class VolumeMount(Model):
    """Where a volume appears in a container."""

    name: DnsLabel
    """Name of an entry of `spec.volumes`."""
    mount_path: Annotated[
        str,
        PlainPath,
        cel(
            f"{_ABSOLUTE} && self != '/' && {_PLAIN}",
            "must be an absolute path below / without `.`, `..`, `//` or a `/` at its end",
        ),
        cel(f"self == '/dev/shm' || {_KERNEL}", "must not be under /proc, /sys or /dev (/dev/shm excepted)"),
    ]
    """Absolute path in the container."""
    read_only: bool = False
    """Mount it read-only."""
    sub_path: Annotated[
        str,
        PlainPath,
        cel(
            f"!self.startsWith('/') && !self.endsWith('/') && !self.contains('//') && {_PLAIN}",
            "must be a relative path without `.` or `..`",
        ),
    ] = ""
    """Mount this folder of the volume instead of its root."""


class ContainerSpec(Model):
    """One container of the sandbox."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.env)"
                " || self.env.map(e, size(e.name) + (has(e.value) ? size(e.value) : 0)).sum() <= 131072",
                "`env` must not hold more than 131072 characters in all",
                ".env",
            ),
            rule(
                "(has(self.command) ? self.command.map(a, size(a)).sum() : 0)"
                " + (has(self.args) ? self.args.map(a, size(a)).sum() : 0) <= 131072",
                "`command` and `args` together must not hold more than 131072 characters",
            ),
        )
    )

    name: DnsLabel
    """Name, unique in the sandbox."""
    image: ImageReference
    """Image to run. busybox:1.37 means docker.io/library/busybox:1.37."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When to fetch the image. Default, as a Pod's: Always for tag latest or none, else IfNotPresent."""
    command: Annotated[
        tuple[Argument, ...], Field(max_length=64, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = ()
    """Program and first arguments, in place of the image's entrypoint; run without a shell."""
    args: Annotated[
        tuple[Argument, ...], Field(max_length=256, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = ()
    """Arguments, in place of the image's command."""
    env: Annotated[tuple[EnvVar, ...], Field(max_length=256), MapList("name")] = ()
    """Environment variables, beside the image's."""
    working_dir: Annotated[
        str,
        PlainPath,
        cel(
            f"self == '' || {_ABSOLUTE} && {_PLAIN}",
            "must be an absolute path without `.`, `..`, `//` or a `/` at its end",
        ),
        cel(_KERNEL, "must not be under /proc, /sys or /dev"),
    ] = ""
    """Folder that the program starts in; default: the image's."""
    resources: Resources = Resources()
    """What the container may use."""
    security_context: SecurityContext = SecurityContext()
    """Rights of the container's processes."""
    volume_mounts: Annotated[tuple[VolumeMount, ...], Field(max_length=32), MapList("mountPath")] = ()
    """Where the sandbox's volumes appear in this container."""

    @property
    def pull_policy(self) -> Literal["Always", "IfNotPresent", "Never"]:
        """The policy in force. Source: Kubernetes, "Default image pull policy"."""
        if self.image_pull_policy is not None:
            return self.image_pull_policy
        name, _, digest = self.image.partition("@")
        if digest:
            return "IfNotPresent"
        tag = name.rpartition("/")[2].partition(":")[2]
        return "Always" if tag in ("", "latest") else "IfNotPresent"


class EmptyDir(Model):
    """A folder that is empty at first and goes with the instance."""

    medium: Literal["", "Memory"] = ""
    """Where its contents are: on the node's disk, or in memory (counts as the sandbox's memory)."""
    size_limit: Memory | None = None
    """Upper bound of its contents, from 1Mi."""


class Volume(Model):
    """Storage that the sandbox's containers share."""

    name: DnsLabel
    """Name, unique in the sandbox."""
    empty_dir: EmptyDir
    """A folder that is empty at first and goes with the instance."""


Containers = Annotated[tuple[ContainerSpec, ...], Field(min_length=1, max_length=16), MapList("name")]
Volumes = Annotated[tuple[Volume, ...], Field(max_length=32), MapList("name")]
ExitStatus = Annotated[int, Field(ge=0, le=255, json_schema_extra={"format": "int32"})]
ExitSignal = Annotated[int, Field(ge=0, le=128, json_schema_extra={"format": "int32"})]
Count = Int64
