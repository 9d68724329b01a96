"""Images in OCI layouts on the node's disk: no registry, no network.

An image is found by the annotation `org.opencontainers.image.ref.name` or
`io.containerd.image.name` of its entry in index.json (OCI image spec 1.1, image-layout.md).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci.images import manifest, reference
from sandkeeper.shim.engines.oci.images.manifest import Descriptor, Manifest, ManifestError, Platform

log = logging.getLogger(__name__)
_NAMES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_MAX_NESTING = 3


@dataclass(frozen=True, slots=True)
class Found:
    layout: Path
    manifest: Descriptor


def find(layouts: Sequence[Path], ref: reference.Reference, wanted: Platform) -> Found | None:
    """The image in the first layout that has it; reads index.json anew each time.

    Raises EngineError `ErrImagePull` where a layout names the image but does not hold it.
    """
    for layout in layouts:
        try:
            entries = manifest.parse_index(_read(layout / "index.json"))
        except (OSError, ManifestError) as error:
            log.warning("image layout skipped", extra={"layout": str(layout), "error": str(error)})
            continue
        # The last entry wins, as with the tools that append.
        for entry in reversed(entries):
            if _is(entry, ref):
                try:
                    return Found(layout, _resolve(layout, entry, wanted))
                except (OSError, ManifestError) as error:
                    raise EngineError(
                        "ErrImagePull",
                        f"image {str(ref)!r} cannot be taken from its layout on the node: {error}",
                        retryable=True,
                    ) from None
    return None


def read_blob(layout: Path, digest: str) -> bytes:
    """A manifest or a configuration, checked against its digest. Raises OSError, ManifestError."""
    content = _read(blob_path(layout, digest))
    if manifest.digest_of(content) != digest:
        raise ManifestError(f"{digest}: the content has another digest")
    return content


def read_manifest(layout: Path, digest: str) -> Manifest:
    document = manifest.parse(read_blob(layout, digest))
    if not isinstance(document, Manifest):
        raise ManifestError(f"{digest}: must be a manifest, is an index")
    return document


def tagged(layout: Path) -> Descriptor:
    """The only entry of a layout made for one image."""
    entries = manifest.parse_index(_read(layout / "index.json"))
    if len(entries) != 1:
        raise ManifestError(f"manifests: must have one entry, has {len(entries)}")
    return entries[0]


def blob_path(layout: Path, digest: str) -> Path:
    if not reference.is_digest(digest):
        raise ManifestError(f"{digest!r}: must be a sha256 digest")
    return layout / "blobs" / "sha256" / digest.removeprefix("sha256:")


def _is(entry: Descriptor, ref: reference.Reference) -> bool:
    for key in _NAMES:
        name = entry.annotations.get(key)
        if not isinstance(name, str):
            continue
        try:
            named = reference.parse(name)
        except EngineError:
            continue  # a bare tag such as "v1.0": it does not say which image
        if named == ref or (ref.digest and ref.digest == entry.digest and named.name == ref.name):
            return True
    return False


def _resolve(layout: Path, entry: Descriptor, wanted: Platform) -> Descriptor:
    for _ in range(_MAX_NESTING):
        document = manifest.parse(read_blob(layout, entry.digest))
        if isinstance(document, Manifest):
            return entry
        entry = manifest.choose(document, wanted)
    raise ManifestError("its indexes are nested too deeply")


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(manifest.MAX_MANIFEST_BYTES + 1)
