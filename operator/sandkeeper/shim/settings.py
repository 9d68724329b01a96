"""The shim's settings: flags over environment (SANDKEEPER_SHIM_*) over a YAML file over defaults."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from sandkeeper import configfile
from sandkeeper.wire.ids import valid_node_name
from sandkeeper.wire.tls import OPERATOR_IDENTITY, ServerTLS, TLSFiles

ENV_PREFIX = "SANDKEEPER_SHIM_"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MIB = 1024 * 1024


class OCISettings(BaseModel):
    """The oci engine: programs, images, and limits of containers that name none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runtimes: tuple[str, ...] = Field(
        ("crun", "runc", "runsc"),
        description="Programs of the runtimes to try; a bare name is looked up in PATH.",
    )
    default_runtime: str = Field(
        "", description="Runtime for sandboxes that name none; default: the fastest."
    )
    conmon: str = Field("conmon", description="The container monitor.")
    catatonit: str = Field("catatonit", description="The sandbox process: a static pause program.")
    seccomp_profile: Path = Field(
        Path("/usr/share/containers/seccomp.json"),
        description="Seccomp profile in containers-common's format.",
    )
    log_max_bytes: int = Field(16 * MIB, ge=4096, description="Bound on one container's log, in bytes.")
    default_cpu_millis: int = Field(1000, ge=0, description="CPU limit in thousandths of a core; 0: none.")
    default_memory_bytes: int = Field(512 * MIB, ge=4 * MIB, description="Memory limit in bytes.")
    default_pids: int = Field(1024, ge=1, description="Limit of processes and threads.")
    runtime_timeout: float = Field(60.0, gt=0, description="Longest that one call of a runtime may take.")
    cgroup_parent: str = Field(
        "sandkeeper",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Cgroup that holds every sandbox's own.",
    )
    allow_host_network: bool = Field(False, description="Sandboxes may ask for `network: Host`.")

    image_dir: Path | None = Field(None, description="Image store; default: `images` in the state directory.")
    image_auth_file: Path | None = Field(None, description="Registry credentials (containers-auth.json(5)).")
    registries_conf: Path | None = Field(None, description="Mirrors (containers-registries.conf(5)).")
    image_policy: Path | None = Field(None, description="Trusted images (containers-policy.json(5)).")
    image_layouts: tuple[Path, ...] = Field(
        (), description="Folders of OCI image layouts, before any registry."
    )
    insecure_registries: tuple[str, ...] = Field((), description="Registries reached without checked TLS.")
    image_pull_timeout: float = Field(600.0, gt=0, description="Seconds for one pull.")
    image_disk_high: int = Field(
        85, ge=1, le=100, description="Percent of disk in use that starts a collection."
    )
    image_disk_low: int = Field(80, ge=1, le=100, description="Percent of disk in use that ends it.")


class SandboxedRuntime(BaseModel):
    """A runtime that a sandboxer of containerd's serves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sandboxer: str = Field(
        pattern=r"^[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*$",
        max_length=76,
        description="Its name: of containerd's `proxy_plugins`.",
    )
    runtime: str = Field(
        "runc",
        min_length=1,
        description="What its containers run with: a program that io.containerd.runc.v2 calls, or containerd's name.",
    )


class ContainerdSettings(BaseModel):
    """The containerd engine. What it does not name is as in `oci`: limits, images' sources, cgroup_parent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    socket: Path = Field(Path("/run/containerd/containerd.sock"), description="containerd's socket.")
    namespace: str = Field(
        "sandkeeper",
        pattern=r"^[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*$",
        max_length=76,
        description="containerd's namespace, for this shim alone.",
    )
    snapshotter: str = Field("overlayfs", min_length=1, description="Which of containerd's snapshotters.")
    runtimes: dict[str, str] = Field(
        default_factory=dict,
        description="Name -> program that io.containerd.runc.v2 calls, or containerd's name of another runtime; "
        "default: the programs in oci.runtimes.",
    )
    sandboxers: dict[str, SandboxedRuntime] = Field(
        default_factory=dict,
        description="Name -> sandboxer of containerd's that makes the sandboxes of a runtime of that name.",
    )


class SimulatedSettings(BaseModel):
    """The simulated engine: no processes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start_seconds: float = Field(0.0, ge=0, description="How long a start takes.")
    image_seconds: float = Field(0.0, ge=0, description="How long an image takes that is not there yet.")


class SandboxerSettings(BaseModel):
    """What containerd, whose sandboxer the shim is, runs in its sandboxes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task_shim: str = Field(
        "",
        description="containerd's shim for the containers of its pods (containerd-shim-runc-v2); empty: no containers.",
    )
    containerd_socket: Path = Field(
        Path("/run/containerd/containerd.sock"), description="The containerd whose sandboxer this is."
    )
    forgotten_after: float = Field(
        3600.0, gt=0, description="Age at which a pod that never ran is removed: CRI has forgotten it."
    )
    containerd_root: Path | None = Field(
        None,
        description="Its `root` (/var/lib/containerd): where its pods' resolv.conf goes; empty: they get none.",
    )


class KubernetesSettings(BaseModel):
    """The API server, for a shim that asks it for its certificate or registers its node. A Pod needs none of these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    server: str = Field(
        "", pattern=r"^(https://.+)?$", description="https://host:port; empty: what a Pod's environment says."
    )
    token_file: Path = Field(_ACCOUNT / "token", description="Token of its ServiceAccount.")
    ca_file: Path = Field(_ACCOUNT / "ca.crt", description="CA of the API server (PEM).")
    ca_config_map: str = Field(
        "sandkeeper-node/sandkeeper-ca",
        pattern=r"^[^/]+/[^/]+$",
        description="NAMESPACE/NAME of the ConfigMap in which the operator publishes its CA.",
    )


class ShimSettings(BaseSettings):
    """What a shim is told at its start. Durations are seconds.

    Raises pydantic.ValidationError naming the field for a value out of bounds, an unknown key, or a TCP
    address without TLS.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    config_file: Path | None = Field(None, description="YAML file with any of these settings.")
    node_name: str = Field(
        default_factory=lambda: socket.gethostname().lower(), description="Name of this node's SandboxNode."
    )
    state_dir: Path = Field(Path("/var/lib/sandkeeper"), description="Records and sandboxes; must persist.")
    run_dir: Path = Field(
        Path("/run/sandkeeper"),
        description="Sockets, bundles, what tells of processes: in memory (tmpfs), must outlive the shim.",
    )
    socket: Path | None = Field(None, description="Unix socket (mode 0600); default: shim.sock in run_dir.")
    listen: str = Field("", description="host:port to listen on with mutual TLS; empty: unix socket only.")
    tls_ca: Path | None = Field(None, description="CA of the clients' certificates (PEM).")
    tls_cert: Path | None = Field(None, description="This shim's certificate; its name is the node's (PEM).")
    tls_key: Path | None = Field(None, description="The key of tls_cert (PEM).")
    certificate: Literal["files", "request"] = Field(
        "files",
        description="Where its certificate comes from: tls_ca, tls_cert and tls_key, or a CertificateSigningRequest"
        " that the operator signs; then it is kept in state_dir and renewed.",
    )
    register_node: bool = Field(False, description="Whether to write this node's own SandboxNode.")
    advertise_host: str = Field(
        "", max_length=253, description="Name or address of this node for the operator, with register_node."
    )
    kubernetes: KubernetesSettings = KubernetesSettings()
    allowed_clients: Annotated[tuple[str, ...], NoDecode] = Field(
        (OPERATOR_IDENTITY,), description="Names in client certificates that may call, comma-separated."
    )
    engine: Literal["oci", "containerd", "simulated"] = Field("oci", description="How processes are made.")
    oci: OCISettings = OCISettings()
    containerd: ContainerdSettings = ContainerdSettings()
    simulated: SimulatedSettings = SimulatedSettings()
    sandboxer: SandboxerSettings = SandboxerSettings()
    failpoints: dict[str, str] = Field(
        default_factory=dict,
        description="For tests: effect -> `[COUNT*]ACTION[(ARG)]->...`; actions: off, error, delay, hang, lose, panic.",
    )
    effects_file: Path | None = Field(
        None, description="For tests: file that gets a line of JSON after each effect."
    )

    cpu_millis: int = Field(0, ge=0, description="CPU for sandboxes, in thousandths of a core; 0: all.")
    memory_bytes: int = Field(0, ge=0, description="Memory for sandboxes in bytes; 0: all.")
    pids: int = Field(0, ge=0, description="Processes for sandboxes; 0: the kernel's limit.")
    sandboxes: int = Field(10_000, ge=1, description="How many sandboxes at most.")

    restart_backoff: float = Field(1.0, gt=0, description="First wait of restartPolicy; doubles each time.")
    restart_backoff_max: float = Field(300.0, gt=0, description="Longest wait of restartPolicy.")
    restart_reset: float = Field(
        600.0, gt=0, description="A container that ran this long starts at the first again."
    )
    pull_backoff: float = Field(5.0, gt=0, description="First wait after a failed pull; doubles each time.")
    pull_backoff_max: float = Field(300.0, gt=0, description="Longest wait after a failed pull.")
    concurrent_starts: int = Field(
        default_factory=lambda: 4 * (os.cpu_count() or 1), ge=1, description="Starts at a time; others wait."
    )
    usage_interval: float = Field(30.0, gt=0, description="How often a running sandbox's use is sampled.")
    collect_interval: float = Field(300.0, gt=0, description="How often unused images are looked at.")
    stop_grace: float = Field(5.0, ge=0, description="For calls under way when the shim is stopped.")
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("allowed_clients", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator("node_name")
    @classmethod
    def _named(cls, value: str) -> str:
        if not valid_node_name(value):
            raise ValueError("must be a DNS subdomain: lower-case letters, digits, `-` and `.`, at most 253")
        return value

    @model_validator(mode="after")
    def _tcp_needs_tls(self) -> Self:
        given = [self.tls_ca, self.tls_cert, self.tls_key]
        if self.certificate == "request" and (any(given) or not self.listen):
            raise ValueError("certificate: a requested one needs listen, and no tls_ca, tls_cert and tls_key")
        if self.register_node and not (self.listen and self.advertise_host):
            raise ValueError("register_node needs listen and advertise_host")
        if self.listen and self.certificate == "files" and not all(given):
            raise ValueError(
                "listen: TCP needs mutual TLS: set tls_ca, tls_cert and tls_key, or leave listen empty"
            )
        if any(given) and not all(given):
            raise ValueError("tls_ca, tls_cert and tls_key must be set together")
        if self.listen and not self.listen.rpartition(":")[2].isdigit():
            raise ValueError("listen must be host:port")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return configfile.sources(settings_cls, init_settings, env_settings)

    @property
    def socket_path(self) -> Path:
        return self.socket or self.run_dir / "shim.sock"

    @property
    def requested_files(self) -> TLSFiles:
        """Where a requested certificate is kept: it and its key are one file."""
        folder = self.state_dir / "certificate"
        return TLSFiles(ca=folder / "ca.crt", cert=folder / "shim.pem", key=folder / "shim.pem")

    @property
    def server_tls(self) -> ServerTLS | None:
        if self.certificate == "request":
            return ServerTLS(self.requested_files)
        if not (self.tls_ca and self.tls_cert and self.tls_key):
            return None
        return ServerTLS(TLSFiles(ca=self.tls_ca, cert=self.tls_cert, key=self.tls_key))
