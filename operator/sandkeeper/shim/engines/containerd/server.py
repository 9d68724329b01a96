"""Which containerd it is, and what it can do. Read once, at the start."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import empty_pb2

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.containerd.client import CallError, Client
from sandkeeper.wire.containerd import introspection_pb2, namespaces_pb2

OLDEST = (1, 6)
_VERSION = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?")
# The first of each series whose sandbox Controller answers as it should (containerd PR #13260): before, Create,
# Start and Wait did their work and then failed.
_CONTROLLER_MENDED = {(2, 0): 9, (2, 1): 8, (2, 2): 4}
_SNAPSHOTTER, _RUNTIME, SANDBOXER = (
    "io.containerd.snapshotter.v1",
    "io.containerd.runtime.v2",
    "io.containerd.sandbox.controller.v1",
)


@dataclass(frozen=True, slots=True)
class Server:
    """snapshotter_root: where the snapshots are, as containerd names it; empty where it does not.

    sandboxers: those that it serves and that answer rightly, with their addresses where they have one of their own.
    """

    version: str
    snapshotter_root: str = ""
    sandboxers: Mapping[str, str] = field(default_factory=dict)


def parse_version(text: str) -> tuple[int, int, int] | None:
    """The numbers of `v2.3.7`, `1.6.20~ds1` or `2.0.0-rc.1`; None where it has none."""
    found = _VERSION.match(text)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def controller_answers(version: tuple[int, int, int]) -> bool:
    """Whether the sandbox API of this version is there and can be relied on."""
    mended = _CONTROLLER_MENDED.get(version[:2])
    return version >= (2, 3, 0) if mended is None else version[2] >= mended


def understand(version: str, plugins: Iterable[introspection_pb2.Plugin], snapshotter: str) -> Server:
    """Raises EngineError `NodeUnsupported` where the engine cannot work with it."""
    numbers = parse_version(version)
    if numbers is not None and numbers[:2] < OLDEST:
        raise EngineError(
            "NodeUnsupported", f"containerd {version} is too old: {OLDEST[0]}.{OLDEST[1]} at least"
        )
    known = {(each.type, each.id): each for each in plugins}
    if not any(kind == _RUNTIME for kind, _ in known):
        raise EngineError("NodeUnsupported", f"containerd {version} has no tasks of version 2")
    chosen = known.get((_SNAPSHOTTER, snapshotter))
    if chosen is None or chosen.HasField("init_err"):
        why = chosen.init_err.message if chosen else "it has no such plugin"
        raise EngineError(
            "NodeUnsupported", f"containerd {version}: snapshotter {snapshotter!r} cannot be used: {why}"
        )
    sandboxers = {
        name: each.exports.get("address", "")
        for (kind, name), each in known.items()
        if kind == SANDBOXER and not each.HasField("init_err")
    }
    usable = numbers is not None and controller_answers(numbers)
    return Server(version, chosen.exports.get("root", ""), sandboxers if usable else {})


def why_no_sandboxer(found: Server, name: str) -> str:
    """For people; empty where there is one of that name."""
    if name in found.sandboxers:
        return ""
    numbers = parse_version(found.version)
    if numbers is None or not controller_answers(numbers):
        return f"containerd {found.version}: its sandbox API is wanted of 2.0.9, 2.1.8, 2.2.4 or 2.3 at least"
    return f"containerd has no sandboxer {name!r} (proxy_plugins)"


def look(client: Client, snapshotter: str) -> Server:
    """Asks it, and makes the namespace. Raises EngineError `NodeUnsupported` with what to do."""
    try:
        version = client.call(client.version.Version, empty_pb2.Empty(), seconds=10.0).version
        plugins = client.call(client.introspection.Plugins, introspection_pb2.PluginsRequest()).plugins
        found = understand(version, plugins, snapshotter)
        client.made(
            client.namespaces.Create,
            namespaces_pb2.CreateNamespaceRequest(namespace=namespaces_pb2.Namespace(name=client.namespace)),
        )
    except CallError as error:
        where = "is not there" if not _is_socket(client.socket) else f"does not serve: {error.words}"
        raise EngineError(
            "NodeUnsupported",
            f"containerd's socket {client.socket} {where}; start containerd, or set containerd.socket",
            retryable=True,
        ) from None
    return found


def _is_socket(path: Path) -> bool:
    try:
        return path.is_socket()
    except OSError:
        return False
