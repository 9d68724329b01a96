"""Layers of an image as committed snapshots, one on the other; and the few files of the whole that we read.

Source: OCI image spec (config.md: DiffID, ChainID); containerd's docs/content-flow.md for the labels.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.containerd.client import CallError, Client
from sandkeeper.shim.engines.containerd.content import hold
from sandkeeper.shim.engines.oci import kernel, rootfs
from sandkeeper.shim.engines.oci.images.manifest import Descriptor
from sandkeeper.shim.engines.oci.threads import apart
from sandkeeper.wire import types_pb2
from sandkeeper.wire.containerd import descriptor_pb2, diff_pb2, snapshots_pb2

_APPLY_SECONDS = 600.0
_READ_FILES = ("etc/passwd", "etc/group")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MS_BIND, _MS_REMOUNT = 0x1000, 0x20
_LONGEST_DATA = 3900  # of mount(2): a page


def diff_ids(config: Mapping[str, Any]) -> list[str]:
    """Raises EngineError `InvalidImage`."""
    found = config.get("rootfs")
    ids = found.get("diff_ids") if isinstance(found, dict) else None
    if not isinstance(ids, list) or not all(
        isinstance(each, str) and _DIGEST.fullmatch(each) for each in ids
    ):
        raise EngineError("InvalidImage", "rootfs.diff_ids: must be a list of sha256 digests")
    return ids


def chain(ids: Sequence[str]) -> list[str]:
    """The name of each stack of layers, from the lowest layer alone to all of them."""
    names: list[str] = []
    for each in ids:
        below = names[-1] if names else ""
        names.append(f"sha256:{hashlib.sha256(f'{below} {each}'.encode()).hexdigest()}" if below else each)
    return names


def has(client: Client, snapshotter: str, name: str) -> bool:
    request = snapshots_pb2.StatSnapshotRequest(snapshotter=snapshotter, key=name)
    return client.found(client.snapshots.Stat, request) is not None


def unpack(
    client: Client, snapshotter: str, layers: Sequence[Descriptor], ids: Sequence[str], lease: str
) -> str:
    """Makes what is missing; returns the name of the whole. Raises CallError, EngineError `InvalidImage`."""
    if not layers or len(layers) != len(ids):
        raise EngineError("InvalidImage", f"it has {len(layers)} layers and {len(ids)} diff_ids")
    names = chain(ids)
    for index, name in enumerate(names):
        if has(client, snapshotter, name):
            hold(client, lease, f"snapshots/{snapshotter}", name)
        else:
            parent = names[index - 1] if index else ""
            _apply(client, snapshotter, layers[index], ids[index], parent, name, lease)
    return names[-1]


def _apply(
    client: Client, snapshotter: str, layer: Descriptor, diff_id: str, parent: str, name: str, lease: str
) -> None:
    key = f"extract-{uuid.uuid4()} {name}"
    prepare = snapshots_pb2.PrepareSnapshotRequest(snapshotter=snapshotter, key=key, parent=parent)
    mounts = client.call(client.snapshots.Prepare, prepare, lease=lease).mounts
    try:
        blob = descriptor_pb2.Descriptor(media_type=layer.media_type, digest=layer.digest, size=layer.size)
        request = diff_pb2.ApplyRequest(diff=blob, mounts=mounts)
        try:
            applied = client.call(client.diff.Apply, request, lease=lease, seconds=_APPLY_SECONDS).applied
        except CallError as error:
            if error.away:
                raise
            raise EngineError(
                "ErrImagePull", f"layer {layer.digest} cannot be unpacked: {error.words}", retryable=True
            ) from None
        if applied.digest != diff_id:
            raise EngineError("InvalidImage", f"layer {layer.digest} is not what its configuration says")
        commit = snapshots_pb2.CommitSnapshotRequest(snapshotter=snapshotter, name=name, key=key)
        if client.made(client.snapshots.Commit, commit, lease=lease) is not None:
            return
        hold(client, lease, f"snapshots/{snapshotter}", name)  # someone else was first
        remove(client, snapshotter, key)
    except BaseException:
        with contextlib.suppress(CallError):
            remove(client, snapshotter, key)
        raise


def remove(client: Client, snapshotter: str, key: str) -> None:
    """One that is not there is success. Raises CallError."""
    client.found(
        client.snapshots.Remove, snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key)
    )


def extract(client: Client, snapshotter: str, name: str, target: Path) -> None:
    """Makes target a folder with those files of an unpacked image that say who its users are, so that no start of
    a container has to mount it for that. Raises CallError, OSError, EngineError `InvalidImage`."""
    if target.exists():
        return
    key = f"view-{uuid.uuid4()} {name}"
    request = snapshots_pb2.ViewSnapshotRequest(snapshotter=snapshotter, key=key, parent=name)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
        made, point = Path(folder) / "made", Path(folder) / "point"
        point.mkdir()
        mounts = client.call(client.snapshots.View, request).mounts
        try:
            apart(lambda: _read_mounted(mounts, point, made))
        finally:
            with contextlib.suppress(CallError):
                remove(client, snapshotter, key)
        with contextlib.suppress(FileExistsError, OSError):
            made.rename(target)
        if not target.is_dir():
            raise OSError(5, "cannot be made", str(target))


def _read_mounted(mounts: Sequence[types_pb2.Mount], point: Path, made: Path) -> None:
    """In a thread, and a mount namespace, of its own: what is mounted goes with them."""
    kernel.unshare(kernel.CLONE_FS | kernel.CLONE_NEWNS)
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_SLAVE)
    for each in mounts:
        mount_read_only(each, point)
    rootfs.check(point)
    for name in _READ_FILES:
        file = made / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(rootfs.read_text(point, name))


def mount_read_only(mount: types_pb2.Mount, point: Path) -> None:
    """One of a snapshotter's mounts, from a thread with a root and working directory of its own.

    Layers may be more than mount(2) takes: then they are named from the folder that holds them all.
    """
    data = ",".join(each for each in mount.options if each not in ("ro", "rw", "bind", "rbind"))
    if mount.type == "bind" or not mount.type:
        kernel.mount(mount.source, str(point), "", _MS_BIND | kernel.MS_REC)
        kernel.mount("", str(point), "", _MS_BIND | _MS_REMOUNT | kernel.MS_RDONLY)
        return
    if len(data) > _LONGEST_DATA and mount.type == "overlay":
        lower = next(each for each in mount.options if each.startswith("lowerdir="))
        layers = lower.removeprefix("lowerdir=").split(":")
        common = os.path.commonpath(layers)
        os.chdir(common)
        data = data.replace(lower, "lowerdir=" + ":".join(os.path.relpath(each, common) for each in layers))
    kernel.mount(mount.source, str(point), mount.type, kernel.MS_RDONLY, data)
