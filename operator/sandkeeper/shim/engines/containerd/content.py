"""Blobs and leases of a containerd."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.containerd.client import CallError, Client
from sandkeeper.shim.engines.oci.images.manifest import MAX_MANIFEST_BYTES, digest_of
from sandkeeper.wire.containerd import content_pb2, leases_pb2

_CHUNK = 1024 * 1024
_WRITE_SECONDS = 600.0
_LONGEST_IMPORT = timedelta(hours=1)
EXPIRES = "containerd.io/gc.expire"
"""Label of a lease: when it is garbage itself."""


@contextlib.contextmanager
def passing_lease(client: Client) -> Iterator[str]:
    """A lease for one piece of work. One that a killed shim has left expires."""
    name = f"sandkeeper-import-{uuid.uuid4()}"
    until = (datetime.now(UTC) + _LONGEST_IMPORT).strftime("%Y-%m-%dT%H:%M:%SZ")
    client.call(client.leases.Create, leases_pb2.CreateRequest(id=name, labels={EXPIRES: until}))
    try:
        yield name
    finally:
        with contextlib.suppress(CallError):
            client.call(client.leases.Delete, leases_pb2.DeleteRequest(id=name))


def make_lease(client: Client, name: str, labels: Mapping[str, str]) -> None:
    """It may be there already."""
    client.made(client.leases.Create, leases_pb2.CreateRequest(id=name, labels=labels))


def hold(client: Client, lease: str, kind: str, name: str) -> None:
    """Adds what is there already to a lease. kind: `content`, `snapshots/NAME`. Raises CallError."""
    resource = leases_pb2.Resource(id=name, type=kind)
    client.made(client.leases.AddResource, leases_pb2.AddResourceRequest(id=lease, resource=resource))


def write(client: Client, digest: str, path: Path, labels: Mapping[str, str], lease: str) -> None:
    """A file as a blob, checked against its digest by containerd. Raises CallError, OSError."""
    hold_present = False
    try:
        client.call(client.content.Info, content_pb2.InfoRequest(digest=digest))
        hold_present = True
    except CallError as error:
        if error.code != grpc.StatusCode.NOT_FOUND:
            raise
    if not hold_present:
        size, reference = path.stat().st_size, f"sandkeeper-{uuid.uuid4()}"

        def pieces() -> Iterator[content_pb2.WriteContentRequest]:
            offset = 0
            with path.open("rb") as file:
                while offset < size:
                    data = file.read(_CHUNK)
                    if not data:
                        raise OSError(5, "the file got shorter", str(path))
                    yield content_pb2.WriteContentRequest(
                        action=content_pb2.WRITE, ref=reference, total=size, expected=digest,
                        offset=offset, data=data,
                    )  # fmt: skip
                    offset += len(data)
            yield content_pb2.WriteContentRequest(
                action=content_pb2.COMMIT, ref=reference, total=size, expected=digest, offset=size,
                labels=labels,
            )  # fmt: skip

        try:
            for _ in client.each(client.content.Write, pieces(), lease=lease, seconds=_WRITE_SECONDS):
                pass
            return
        except CallError as error:
            if error.code != grpc.StatusCode.ALREADY_EXISTS:
                with contextlib.suppress(CallError):
                    client.call(client.content.Abort, content_pb2.AbortRequest(ref=reference))
                raise
    hold(client, lease, "content", digest)
    label(client, digest, labels)


def label(client: Client, digest: str, labels: Mapping[str, str]) -> None:
    """Adds labels to a blob. Raises CallError."""
    if not labels:
        return
    request = content_pb2.UpdateRequest(info=content_pb2.Info(digest=digest, labels=labels))
    request.update_mask.paths.extend(f"labels.{name}" for name in labels)
    client.call(client.content.Update, request)


def read(client: Client, digest: str) -> bytes:
    """A manifest or a configuration. Raises CallError, and EngineError `InvalidImage` where it is too big or
    damaged."""
    request = content_pb2.ReadContentRequest(digest=digest, size=0)
    data = b""
    for piece in client.each(client.content.Read, request):
        data += piece.data
        if len(data) > MAX_MANIFEST_BYTES:
            raise EngineError("InvalidImage", f"blob {digest} is too big for a manifest")
    if digest_of(data) != digest:
        raise EngineError("InvalidImage", f"blob {digest}: the content has another digest")
    return data
