"""What the image store hands out and what it is configured with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class ImageSettings(Protocol):
    """What the store needs of the node's settings (`ShimSettings.oci` has these attributes)."""

    @property
    def image_dir(self) -> Path:
        """The store's own folder; nothing else may write there."""

    @property
    def image_auth_file(self) -> Path | None:
        """Credentials in the format of `docker login` (containers-auth.json(5))."""

    @property
    def registries_conf(self) -> Path | None:
        """Mirrors and insecure registries (containers-registries.conf(5)); None: the system's."""

    @property
    def image_policy(self) -> Path | None:
        """Which images are trusted (containers-policy.json(5)); None: the system's, else all."""

    @property
    def image_layouts(self) -> Sequence[Path]:
        """Folders with OCI image layouts, looked at before any registry."""

    @property
    def insecure_registries(self) -> Sequence[str]:
        """Registries (host or host:port) reached without TLS or without checking it."""

    @property
    def image_pull_timeout(self) -> float:
        """Seconds for one pull."""

    @property
    def image_disk_high(self) -> int:
        """Percent of the file system in use at which unused images are collected."""

    @property
    def image_disk_low(self) -> int:
        """Percent in use at which collecting ends."""


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """`ImageSettings` with defaults: for tests, tools, and an engine that maps its own names."""

    image_dir: Path
    image_auth_file: Path | None = None
    registries_conf: Path | None = None
    image_policy: Path | None = None
    image_layouts: tuple[Path, ...] = ()
    insecure_registries: tuple[str, ...] = ()
    image_pull_timeout: float = 600.0
    image_disk_high: int = 85
    image_disk_low: int = 80


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The execution part of an image's configuration (OCI image spec, config.md)."""

    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    stop_signal: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_oci(cls, document: Mapping[str, Any]) -> ImageConfig:
        """Takes the image configuration document; raises ValueError naming the field that is wrong."""
        config = document.get("config") or {}
        if not isinstance(config, dict):
            raise ValueError("config: must be an object")
        return cls(
            env=_strings(config, "Env"),
            entrypoint=_strings(config, "Entrypoint"),
            cmd=_strings(config, "Cmd"),
            working_dir=_string(config, "WorkingDir"),
            user=_string(config, "User"),
            stop_signal=_string(config, "StopSignal"),
            labels=_labels(config),
        )


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is unpacked on this node.

    digest: `sha256:...` of the manifest for this platform.
    rootfs: the unpacked tree, shared by all containers: a read-only lower layer, never written to.
    """

    digest: str
    rootfs: Path
    config: ImageConfig


Progress = Callable[[str, str], None]
"""Called as (reason, message) when something slow begins: (`PullingImage`, ...), (`UnpackingImage`, ...)."""


def _is_text(value: object) -> bool:
    """What the kernel can be given: JSON also has NULs and halves of characters."""
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


def _string(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key) or ""
    if not _is_text(value):
        raise ValueError(f"config.{key}: must be a string without NUL")
    return str(value)


def _strings(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = config.get(key) or []
    if not isinstance(value, list) or not all(_is_text(item) for item in value):
        raise ValueError(f"config.{key}: must be a list of strings without NUL")
    return tuple(value)


def _labels(config: Mapping[str, Any]) -> Mapping[str, str]:
    value = config.get("Labels") or {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError("config.Labels: must be a map of strings")
    return value
