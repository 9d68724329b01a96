"""Manifests, indexes and the choice of a platform. Pure: bytes in, checked values out.

Source: OCI image spec 1.1 (image-index.md, manifest.md), Docker's manifest v2 schema 2.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sandkeeper.shim.engines.oci.images.reference import is_digest

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
MAX_MANIFEST_BYTES = 4 << 20  # what registries and containerd accept at most

_ARCHITECTURES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    # machine: (GOARCH, variants that run here, best first; the empty one is "none given")
    "x86_64": ("amd64", ("", "v1")),
    "aarch64": ("arm64", ("v8", "")),
    "armv7l": ("arm", ("v7", "v6", "v5", "")),
    "armv6l": ("arm", ("v6", "v5", "")),
    "i686": ("386", ("",)),
    "ppc64le": ("ppc64le", ("",)),
    "s390x": ("s390x", ("",)),
    "riscv64": ("riscv64", ("",)),
}


class ManifestError(ValueError):
    """A document of an image is not what the specification says; the message says where."""


@dataclass(frozen=True, slots=True)
class Platform:
    os: str
    architecture: str
    variants: tuple[str, ...] = ("",)

    @classmethod
    def local(cls) -> Platform:
        machine = platform.machine()
        architecture, variants = _ARCHITECTURES.get(machine, (machine, ("",)))
        return cls("linux", architecture, variants)

    def __str__(self) -> str:
        return f"{self.os}/{self.architecture}"


@dataclass(frozen=True, slots=True)
class Descriptor:
    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]

    @property
    def blobs(self) -> tuple[str, ...]:
        return (self.config.digest, *(layer.digest for layer in self.layers))

    @property
    def size(self) -> int:
        return self.config.size + sum(layer.size for layer in self.layers)


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def parse(content: bytes) -> Manifest | tuple[Descriptor, ...]:
    """A manifest, or the entries of an index. Raises ManifestError."""
    document = _object(content)
    media_type = document.get("mediaType", "")
    if document.get("schemaVersion") != 2:
        raise ManifestError("schemaVersion: must be 2 (Docker's schema 1 images are not supported)")
    if "manifests" in document and "layers" in document:
        raise ManifestError("it must not have both manifests and layers")  # ambiguous: CVE-2021-41190
    if media_type in (OCI_INDEX, DOCKER_LIST) or (not media_type and "manifests" in document):
        return descriptors(document, "manifests")
    if media_type in (OCI_MANIFEST, DOCKER_MANIFEST) or (not media_type and "layers" in document):
        return Manifest(
            media_type or OCI_MANIFEST,
            _descriptor(document.get("config"), "config"),
            descriptors(document, "layers"),
        )
    raise ManifestError(f"mediaType: {str(media_type)[:100]!r} is neither a manifest nor an index")


def parse_index(content: bytes) -> tuple[Descriptor, ...]:
    """The entries of a layout's index.json. Raises ManifestError."""
    return descriptors(_object(content), "manifests")


def descriptors(document: Mapping[str, Any], key: str) -> tuple[Descriptor, ...]:
    items = document.get(key)
    if not isinstance(items, list):
        raise ManifestError(f"{key}: must be a list")
    return tuple(_descriptor(item, f"{key}[{i}]") for i, item in enumerate(items))


def choose(entries: Sequence[Descriptor], wanted: Platform) -> Descriptor:
    """The entry for the platform: the best variant, then the first. Raises ManifestError."""
    best: Descriptor | None = None
    best_rank = len(wanted.variants)
    for entry in entries:
        where = entry.platform
        if where.get("os") != wanted.os or where.get("architecture") != wanted.architecture:
            continue
        variant = where.get("variant") or ""
        if variant in wanted.variants and wanted.variants.index(variant) < best_rank:
            best, best_rank = entry, wanted.variants.index(variant)
    if best is None and len(entries) == 1 and not entries[0].platform:
        best = entries[0]
    if best is None:
        offered = sorted(
            {f"{e.platform.get('os')}/{e.platform.get('architecture')}" for e in entries if e.platform}
        )
        raise ManifestError(
            f"there is no image for {wanted} (it is there for: {', '.join(offered) or 'none'})"
        )
    return best


def _object(content: bytes) -> dict[str, Any]:
    if len(content) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"it must have at most {MAX_MANIFEST_BYTES} bytes")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise ManifestError("it must be JSON") from None
    if not isinstance(document, dict):
        raise ManifestError("it must be a JSON object")
    return document


def _descriptor(item: object, where: str) -> Descriptor:
    if not isinstance(item, dict):
        raise ManifestError(f"{where}: must be an object")
    digest, size = item.get("digest"), item.get("size")
    if not isinstance(digest, str) or not is_digest(digest):
        raise ManifestError(f"{where}.digest: must be a sha256 digest")
    if not isinstance(size, int) or size < 0:
        raise ManifestError(f"{where}.size: must be a number, not negative")
    annotations, wanted = item.get("annotations") or {}, item.get("platform") or {}
    if not isinstance(annotations, dict) or not isinstance(wanted, dict):
        raise ManifestError(f"{where}: annotations and platform must be objects")
    return Descriptor(str(item.get("mediaType", "")), digest, size, annotations, wanted)


def read_object(content: bytes) -> dict[str, Any]:
    """Any JSON object of an image, such as its configuration. Raises ManifestError."""
    return _object(content)
