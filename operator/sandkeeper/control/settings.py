"""The operator's settings: flags over environment (SANDKEEPER_OPERATOR_*) over a YAML file over defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from sandkeeper import configfile

ENV_PREFIX = "SANDKEEPER_OPERATOR_"
_NAMESPACED = r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?/[a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"


class OperatorSettings(BaseSettings):
    """What an operator is told at its start. Durations are seconds.

    Raises pydantic.ValidationError for a value out of bounds, half of a TLS set, or an unknown key.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    config_file: Path | None = Field(None, description="YAML file with any of these settings.")

    namespaces: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Namespaces whose Sandboxes are kept, comma-separated; empty: all of the cluster."
    )
    kubeconfig: Path | None = Field(
        None, description="kubeconfig; default: $KUBECONFIG, the Pod's service account, ~/.kube/config."
    )
    context: str | None = Field(None, description="Context of the kubeconfig; default: its current one.")

    tls_ca: Path | None = Field(None, description="CA that signed the shims' certificates (PEM).")
    tls_cert: Path | None = Field(None, description="The operator's client certificate (PEM).")
    tls_key: Path | None = Field(None, description="The key of tls_cert (PEM).")

    ca_secret: Annotated[str, Field(pattern=_NAMESPACED)] = Field(
        "",
        description="NAMESPACE/NAME of the Secret (tls.crt, tls.key) with the CA by which operator and shims know each"
        " other; made where there is none. Empty: certificates come from files.",
    )
    ca_config_map: Annotated[str, Field(pattern=_NAMESPACED)] = Field(
        "sandkeeper-node/sandkeeper-ca",
        description="NAMESPACE/NAME of the ConfigMap in which shims find the CA's certificate.",
    )
    shim_account: Annotated[str, Field(pattern=_NAMESPACED)] = Field(
        "sandkeeper-node/sandkeeper-shim",
        description="NAMESPACE/NAME of the shims' ServiceAccount: only it gets shims' certificates.",
    )
    certificate_life: float = Field(
        7 * 86400.0,
        ge=10,
        le=366 * 86400.0,
        description="How long a certificate that is signed is good at most.",
    )

    concurrency: int = Field(16, ge=1, le=1024, description="Passes at a time that count as quick ones.")
    resync_interval: float = Field(
        300.0, gt=0, description="How often every Sandbox is looked at again though nothing told of it."
    )
    list_interval: float = Field(
        600.0,
        gt=0,
        description="How often the watch cache is compared with a LIST, to repair a missed event.",
    )
    relist_interval: float = Field(30.0, gt=0, le=3600, description="How often a node is asked for its List.")
    node_unreachable_after: float = Field(
        40.0, gt=0, description="A node whose last answer to List is older than this is unreachable."
    )
    mass_outage_fraction: float = Field(
        0.5, gt=0, le=1, description="From this share of unreachable nodes on, every remedy is held."
    )
    mass_outage_min_nodes: int = Field(
        3, ge=1, description="With fewer unreachable nodes than this there is no mass outage."
    )
    garbage_interval: float = Field(60.0, gt=0, description="How often nodes are searched for garbage.")
    garbage_min_age: float = Field(
        60.0, ge=0, description="A sandbox without an object is garbage only when older than this."
    )
    usage_interval: float = Field(
        0.0,
        ge=0,
        description="Least time between two writes of status.usage alone; 0: never written alone, so that a"
        " Sandbox at rest costs no write.",
    )
    retention: float = Field(
        0.0, ge=0, description="How long an ended sandbox stays on its node, so that its logs can be read."
    )
    shutdown_grace: float = Field(10.0, ge=0, le=300, description="For running passes to end at a stop.")

    http_host: str = Field("127.0.0.1", description="Address of /metrics, /healthz and /readyz.")
    http_port: int = Field(8080, ge=0, le=65535, description="Port of the same; 0 picks a free one.")
    http_enabled: bool = Field(True, description="Whether to serve metrics and health at all.")

    events: Literal["None", "Warning", "Notable", "All"] = Field(
        "Notable",
        description="Which Events are posted. Each is an API write; `Notable` leaves out the steps that every"
        " Sandbox takes (Scheduled, Started, ...), which its conditions tell already.",
    )
    failpoints: dict[str, str] = Field(
        default_factory=dict,
        description="For tests: effect -> `[COUNT*]ACTION[(ARG)]->...`; actions: off, error, delay, hang, lose, panic.",
    )
    effects_file: Path | None = Field(
        None, description="For tests: file that gets a line of JSON after each effect."
    )
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("namespaces", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(name for part in value.split(",") if (name := part.strip()))
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        given = [self.tls_ca, self.tls_cert, self.tls_key]
        if any(given) and not all(given):
            raise ValueError("tls_ca, tls_cert and tls_key must be set together")
        if self.ca_secret and any(given):
            raise ValueError("ca_secret and tls_ca, tls_cert, tls_key must not be set both")
        if self.ca_secret and not (self.ca_config_map and self.shim_account):
            raise ValueError("ca_secret needs ca_config_map and shim_account")
        if self.node_unreachable_after <= self.relist_interval:
            raise ValueError("node_unreachable_after must be longer than relist_interval")
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
        """Flags over environment over file; the file itself is named by one of the first two."""
        return configfile.sources(settings_cls, init_settings, env_settings)
