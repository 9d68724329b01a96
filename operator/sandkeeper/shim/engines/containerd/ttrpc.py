"""Asks one of containerd's shims itself, on its socket, when containerd is away.

Source: ttrpc's PROTOCOL.md (frames of length, stream, type, flags; then a message), containerd's
core/runtime/v2/README.md (`address` and `bootstrap.json` in the bundle).
"""

from __future__ import annotations

import json
import socket
import struct
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from sandkeeper.wire.containerd import shimtask_pb2

_HEADER = struct.Struct(">IIBB")
_REQUEST, _RESPONSE = 1, 2
_LONGEST = 4 * 1024 * 1024


class ShimError(Exception):
    """The shim cannot be reached, or does not know what was asked for."""


@dataclass(frozen=True, slots=True)
class Address:
    """path: of the unix socket. version: of its Task service."""

    path: str
    version: int

    @classmethod
    def in_bundle(cls, bundle: Path) -> Self | None:
        """As a shim leaves it: since containerd 2.0 with its version, before as the mere address of version 2."""
        try:
            document = json.loads((bundle / "bootstrap.json").read_text())
            address, version = str(document["address"]), int(document["version"])
        except (OSError, ValueError, KeyError, TypeError):
            try:
                address, version = (bundle / "address").read_text().strip(), 2
            except OSError:
                return None
        return cls(address.removeprefix("unix://"), version) if address.startswith("unix://") else None


def wait(address: Address, task: str, seconds: float, exec_id: str = "") -> tuple[int, datetime]:
    """Exit status of a task's first process, or of one executed in it, and when it ended; waits for that.

    Raises ShimError."""
    request = shimtask_pb2.TtrpcRequest(
        service=f"containerd.task.v{address.version}.Task",
        method="Wait",
        payload=shimtask_pb2.WaitRequest(id=task, exec_id=exec_id).SerializeToString(),
        timeout_nano=int(seconds * 1e9),
    )
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            deadline = time.monotonic() + seconds
            connection.settimeout(seconds)
            connection.connect(address.path)
            payload = request.SerializeToString()
            connection.sendall(_HEADER.pack(len(payload), 1, _REQUEST, 0) + payload)
            length, _, kind, _ = _HEADER.unpack(_exactly(connection, _HEADER.size, deadline))
            if kind != _RESPONSE or length > _LONGEST:
                raise ShimError(f"not an answer: type {kind}, {length} bytes")
            answer = shimtask_pb2.TtrpcResponse.FromString(_exactly(connection, length, deadline))
            if answer.status.code:
                raise ShimError(answer.status.message)
            found = shimtask_pb2.WaitResponse.FromString(answer.payload)
    except (OSError, ValueError) as error:
        raise ShimError(str(error)) from None
    return found.exit_status, found.exited_at.ToDatetime(UTC)


def _exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        more = connection.recv(count - len(data))
        if not more:
            raise ShimError("it hung up")
        data += more
    return data
