"""Removing images under disk pressure, least recently used first."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from sandkeeper.shim.engines.oci.images import layouts
from sandkeeper.shim.engines.oci.images.folders import Folders
from sandkeeper.shim.engines.oci.images.index import Entry, Index
from sandkeeper.shim.engines.oci.images.manifest import ManifestError

log = logging.getLogger(__name__)

MINIMUM_AGE = 120.0
"""Seconds since its last use during which an image stays (kubelet's imageMinimumGCAge): it may have
been handed to a sandbox that is not yet counted."""


def disk_usage(folder: Path) -> float:
    """Percent of the file system in use, as df counts it."""
    usage = shutil.disk_usage(folder)
    return 100.0 * usage.used / max(1, usage.used + usage.free)


def candidates(entries: Iterable[Entry], in_use: frozenset[str], now: float) -> list[Entry]:
    """What may go, in the order of going."""
    free = [e for e in entries if e.image.digest not in in_use and now - e.last_used >= MINIMUM_AGE]
    return sorted(free, key=lambda e: (e.last_used, e.image.digest))


async def collect(
    index: Index,
    folders: Folders,
    in_use: frozenset[str],
    *,
    high: float,
    low: float,
    usage: Callable[[Path], float],
    busy: Callable[[], bool],
) -> None:
    """Does nothing below `high`. From there, until the use is below `low`: blobs of no image, then
    unused images with their blobs, one by one, then all blobs. Blobs are left alone while a pull
    is under way (`busy`): it counts on those it has found."""
    if usage(folders.root) < high:
        return
    if not busy():
        _remove_blobs(folders, keep=_blobs_of(index))
    for entry in candidates(index.images.values(), in_use, index.clock()):
        if usage(folders.root) < low:
            break
        digest = entry.image.digest
        log.info("image removed", extra={"digest": digest, "bytes": entry.size})
        index.forget(digest)
        grave = folders.bury(folders.image(digest))  # gone for everyone, before anything is awaited
        await asyncio.to_thread(shutil.rmtree, grave, ignore_errors=True)
        if not busy():
            _remove_blobs(folders, keep=_blobs_of(index))
    if usage(folders.root) >= low and not busy():
        _remove_blobs(folders, keep=frozenset())
    index.save()


def drop_blobs(folders: Folders, digest: str) -> None:
    """Removes from the cache what an image that could not be unpacked is made of."""
    with contextlib.suppress(OSError, ManifestError):
        for blob in layouts.read_manifest(folders.root, digest).blobs:
            layouts.blob_path(folders.root, blob).unlink(missing_ok=True)
    with contextlib.suppress(OSError, ManifestError):
        layouts.blob_path(folders.root, digest).unlink(missing_ok=True)


def _blobs_of(index: Index) -> frozenset[str]:
    return frozenset().union(*(entry.blobs for entry in index.images.values()))


def _remove_blobs(folders: Folders, keep: frozenset[str]) -> None:
    # No thread: unlinking is quick, and no pull can begin in the middle.
    names = {digest.removeprefix("sha256:") for digest in keep}
    for path in (folders.blobs / "sha256").iterdir():
        if path.name not in names:
            path.unlink(missing_ok=True)
