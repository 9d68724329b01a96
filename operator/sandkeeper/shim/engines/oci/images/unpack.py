"""From an OCI layout to a root file system that containers share, by way of umoci."""

from __future__ import annotations

import ctypes
import json
import os
import stat
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci.images import layouts, manifest, tools
from sandkeeper.shim.engines.oci.images.manifest import Manifest, ManifestError, Platform
from sandkeeper.shim.engines.oci.images.types import Image, ImageConfig

TAG = "image"
# A symlink here would lead a runtime's own mounts out of the root file system (runc CVE-2026-41579).
_MOUNT_POINTS = ("dev", "proc", "sys")
_LAYERS = "application/vnd.oci.image.layer.v1.tar"


async def unpack(
    layout: Path, digest: str, target: Path, wanted: Platform, run: tools.Runner
) -> tuple[Manifest, ImageConfig]:
    """Makes target/rootfs from the image with this manifest digest in the layout.

    The layout's tag `image` must be that manifest. Raises EngineError: `InvalidImage` for what no
    repetition will mend, `ErrImagePull` (retryable) where a blob is damaged or the disk is full.
    """
    try:
        parsed = layouts.read_manifest(layout, digest)
        document = manifest.read_object(layouts.read_blob(layout, parsed.config.digest))
    except (OSError, ManifestError) as error:
        raise _damaged(digest, str(error)) from None
    for layer in parsed.layers:
        if layer.media_type not in (_LAYERS, f"{_LAYERS}+gzip"):
            raise invalid(digest, f"layers of type {layer.media_type[:100]!r} are not supported")
    try:
        config = ImageConfig.from_oci(document)
    except ValueError as error:
        raise invalid(digest, str(error)) from None
    found = document.get("architecture")
    if found and found != wanted.architecture:
        raise invalid(digest, f"it is for {str(found)[:40]}, this node is {wanted}")
    os.mkdir(target, 0o700)  # noqa: PTH102 - at once
    try:
        await run(["umoci", "raw", "unpack", f"--image={layout}:{TAG}", str(target / "rootfs")], {})
    except tools.ToolError as error:
        raise _damaged(digest, f"it cannot be unpacked: {error}") from None
    check_tree(target / "rootfs", digest)
    return parsed, config


def check_tree(rootfs: Path, digest: str) -> None:
    """Raises EngineError `InvalidImage` where a runtime's mount point is anything but a directory."""
    for name in _MOUNT_POINTS:
        try:
            mode = (rootfs / name).lstat().st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a directory"
            raise invalid(digest, f"its /{name} is {kind}")


def seal(folder: Path, references: list[str], digest: str, blobs: frozenset[str], config: ImageConfig) -> int:
    """Writes image.json, which makes the folder complete by itself, and brings all of it to the
    disk, so that a power cut after the rename leaves no half image. Returns the bytes used."""
    size = _disk_usage(folder / "rootfs")
    document = {
        "digest": digest,
        "references": references,
        "size": size,
        "blobs": sorted(blobs),
        "config": asdict(config),
    }
    (folder / "image.json").write_text(json.dumps(document))
    _sync_file_system(folder)
    return size


def load(folder: Path) -> tuple[Image, dict[str, Any]]:
    """What `seal` wrote. Raises ValueError or OSError where the folder is not a complete image."""
    document = json.loads((folder / "image.json").read_bytes())
    if not isinstance(document, dict) or not (folder / "rootfs").is_dir():
        raise ValueError(f"{folder.name}: not an image")
    try:
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in document["config"].items()
        }
        document = {
            "size": int(document["size"]),
            "references": [str(r) for r in document["references"]],
            "blobs": [str(b) for b in document["blobs"]],
            "digest": str(document["digest"]),
        }
        return Image(document["digest"], folder / "rootfs", ImageConfig(**fields)), document
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder.name}: {error!r}") from None


def invalid(digest: str, why: str) -> EngineError:
    return EngineError("InvalidImage", f"image {digest} cannot be used: {why}")


def _damaged(digest: str, why: str) -> EngineError:
    return EngineError("ErrImagePull", f"image {digest}: {why}", retryable=True)


def _disk_usage(root: Path) -> int:
    seen: set[int] = set()
    total = 0
    pending = [str(root)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                if status.st_ino not in seen:
                    seen.add(status.st_ino)
                    total += status.st_blocks * 512
    return total


def _sync_file_system(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), "syncfs failed", str(folder))
    finally:
        os.close(descriptor)
