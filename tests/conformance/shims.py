"""Sandkeeper's own shims as servers under check: a process each, with real containers or simulated ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import grpc
from tests.cluster import eventually
from tests.containerds import containerd
from tests.images import ImageDef, Registry, free_port, registry
from tests.leaks import Leaks

from sandkeeper.conformance.registry import Ability
from sandkeeper.conformance.server import Clients, Images, Server, code_of
from sandkeeper.localcluster import pki
from sandkeeper.localcluster.containerd import Containerd
from sandkeeper.localcluster.containerd_sources import Source
from sandkeeper.localcluster.ocilayout import busybox_image, write_layout
from sandkeeper.localcluster.processes import Processes
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.wire import node_pb2, node_pb2_grpc
from sandkeeper.wire.client import open_channel
from sandkeeper.wire.tls import OPERATOR_IDENTITY

IMAGE = "docker.io/library/busybox:1.37"
START_SECONDS = 60.0
RESTART_BACKOFF = 0.1

ENGINES: Mapping[str, frozenset[Ability]] = {
    "simulated": frozenset({"failpoints", "leaks", "local", "restart", "tcp"}),
    "oci": frozenset({"failpoints", "leaks", "local", "processes", "registry", "restart", "tcp"}),
    "containerd": frozenset({"failpoints", "leaks", "local", "processes", "registry", "restart", "tcp"}),
}
"""What a shim with each engine can do here."""

REAL = frozenset({"oci", "containerd"})
"""Those that make processes."""

OF_ITS_OWN: frozenset[Ability] = frozenset({"failpoints", "restart", "tcp"})
"""A check that needs one of these gets a shim that others do not use meanwhile."""


def failpoint_settings(failpoints: Mapping[str, str]) -> dict[str, str]:
    """The environment by which a shim is told its faults."""
    return {"SANDKEEPER_SHIM_FAILPOINTS": json.dumps(dict(failpoints))} if failpoints else {}


class ShimHost:
    """One shim below a folder of its own, as if that were a machine."""

    def __init__(self, folder: Path, engine: str, settings: Mapping[str, str]) -> None:
        self.folder = folder
        self.engine = engine
        self.failpoints: Mapping[str, str] = {}
        self._processes = Processes(folder)
        self._settings = {
            "NODE_NAME": "node-1",
            "ENGINE": engine,
            "STATE_DIR": str(folder / "state"),
            "RUN_DIR": str(folder / "run"),
            "RESTART_BACKOFF": str(RESTART_BACKOFF),
            "PULL_BACKOFF": "0.1",
            "PULL_BACKOFF_MAX": "0.4",
            "SANDBOXES": "16",
            **settings,
        }
        self._cgroup_parent = f"conformance-{folder.parent.name}-{folder.name}"
        if engine in REAL:
            self._settings["OCI__CGROUP_PARENT"] = self._cgroup_parent
        for each in ("state", "run"):
            (folder / each).mkdir(parents=True)

    @property
    def socket(self) -> Path:
        return self.folder / "run" / "shim.sock"

    @property
    def alive(self) -> bool:
        return self._processes.alive("shim")

    def launch(self, failpoints: Mapping[str, str] | None = None) -> None:
        self.failpoints = failpoints or {}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SANDKEEPER_")}
        settings = {f"SANDKEEPER_SHIM_{name}": value for name, value in self._settings.items()}
        self._processes.spawn(
            "shim",
            [sys.executable, "-m", "sandkeeper.cli.main", "shim"],
            env={**inherited, **settings, **failpoint_settings(self.failpoints)},
            tied=True,
        )

    async def ready(self) -> None:
        deadline = asyncio.get_running_loop().time() + START_SECONDS
        while (outcome := await self._outcome())[0] != grpc.StatusCode.OK:
            said = f"{outcome}; the last that the shim wrote:\n{self._processes.tail('shim')}"
            assert self.alive, said
            assert asyncio.get_running_loop().time() < deadline, said
            await asyncio.sleep(0.02)

    async def _outcome(self) -> tuple[grpc.StatusCode, str]:
        """On a channel of its own: one that was refused waits before it tries again."""
        async with open_channel(f"unix:{self.socket}") as channel:
            return await code_of(node_pb2_grpc.NodeStub(channel).Info(node_pb2.InfoRequest(), timeout=5))

    def kill(self) -> None:
        self._processes.kill("shim")

    def stop(self) -> None:
        """Ends it, and its cgroups, in which its last monitors may still end."""
        self._processes.stop("shim")
        if self.engine in REAL:
            cgroups = Cgroups(self._cgroup_parent)
            folders = cgroups.parents

            def gone() -> bool:
                cgroups.close()
                return not any(folder.exists() for folder in folders)

            eventually(gone, seen=self.leftovers)

    def files(self) -> list[str]:
        """What sandboxes have below the folder: quick to find."""
        kept = ("state/sandboxes/*", "state/*/sandboxes/*", "state/simulated/*")
        return [f"file {each}" for pattern in kept for each in self.folder.glob(pattern)]

    def leftovers(self) -> list[str]:
        """What sandboxes have there, and in the kernel. The shim itself is none of it."""
        if self.engine == "simulated":  # it has nothing but files
            return self.files()
        own = self._processes.pid("shim")
        leaks = Leaks(self.folder, self._cgroup_parent, ignore=() if own is None else (own,))
        return [*self.files(), *leaks.found()]


class Shims:
    """All shims of one engine, each started when it is first asked for."""

    def __init__(self, folder: Path, engine: str, source: Source = "module") -> None:
        """source: of the containerd that the engine of this name uses."""
        self._folder = folder
        self._engine = engine
        self._source = source
        self._closing = contextlib.ExitStack()
        self._hosts: dict[str, ShimHost] = {}
        self._registry: Registry | None = None
        self._containerd: Containerd | None = None
        self._ca: pki.CA | None = None
        self._ports: dict[str, int] = {}

    async def server(self, *, own: bool) -> Server:
        """One that answers. own: one that may be killed, and that listens on TCP."""
        name = "own" if own else "shared"
        if name not in self._hosts:
            self._hosts[name] = ShimHost(self._folder / name, self._engine, self._settings(name, tcp=own))
        host = self._hosts[name]
        if host.alive and host.failpoints:
            host.kill()
        if not host.alive:
            host.launch()
            await host.ready()
        return Server(
            address=f"unix:{host.socket}",
            images=self._images(),
            socket=host.socket,
            host=host if own else None,
            clients=self._clients(name) if own else None,
            leftovers=host.leftovers,
            restart_backoff=RESTART_BACKOFF,
        )

    def files(self) -> list[str]:
        """What sandboxes of any of them have on disk."""
        return [line for host in self._hosts.values() for line in host.files()]

    def close(self) -> None:
        """Ends them all. Raises AssertionError where they leave anything."""
        with self._closing:
            for host in self._hosts.values():
                self._closing.callback(host.stop)
        left = [line for host in self._hosts.values() for line in host.leftovers()]
        assert not left, "left behind:\n  " + "\n  ".join(left)

    @staticmethod
    def _nothing_in(daemon: Containerd) -> None:
        """Its own shims and mounts are the engine's, to be taken away with their sandboxes."""

        def left() -> list[str]:
            return [*(f"containerd-shim {pid}" for pid in daemon.shims()), *daemon.mounts()]

        eventually(lambda: not left(), seen=left)

    def _settings(self, name: str, *, tcp: bool) -> dict[str, str]:
        settings: dict[str, str] = {}
        if tcp:
            self._ca = pki.CA.create(self._folder / "pki", "conformance nodes")
            files = self._ca.server("node-1", ("node-1",))
            self._ports[name] = free_port()
            settings |= {
                "LISTEN": f"127.0.0.1:{self._ports[name]}",
                "TLS_CA": str(files.ca),
                "TLS_CERT": str(files.cert),
                "TLS_KEY": str(files.key),
            }
        if self._engine == "simulated":
            return settings | {"SIMULATED__IMAGE_SECONDS": "0.05"}
        if self._registry is None:
            write_layout(self._folder / "layout", {IMAGE: busybox_image()})
            self._registry = self._closing.enter_context(registry(self._folder / "registry"))
        if self._engine == "containerd":
            if self._containerd is None:
                self._containerd = self._closing.enter_context(containerd(self._source))
                self._closing.callback(self._nothing_in, self._containerd)
            settings |= {
                "CONTAINERD__SOCKET": str(self._containerd.socket),
                "CONTAINERD__NAMESPACE": name,
            }
        return settings | {
            "OCI__IMAGE_LAYOUTS": json.dumps([str(self._folder / "layout")]),
            "OCI__INSECURE_REGISTRIES": json.dumps([self._registry.host]),
        }

    def _images(self) -> Images:
        if self._registry is None:
            return Images(IMAGE, absent=("missing:1",), fetched=lambda: f"box-{uuid.uuid4().hex}:1")
        host, push = self._registry.host, self._registry.push

        def image() -> ImageDef:
            return busybox_image(base=ImageDef(labels={"one": uuid.uuid4().hex}))

        def awaited() -> tuple[str, Callable[[], None]]:
            name = f"box-{uuid.uuid4().hex}:1"

            def publish() -> None:
                push(name, image())

            return f"{host}/{name}", publish

        return Images(
            IMAGE,
            # One that its registry lacks, one whose registry does not answer.
            absent=(f"{host}/absent:1", "127.0.0.1:1/absent:1"),
            fetched=lambda: push(f"box-{uuid.uuid4().hex}:1", image()),
            awaited=awaited,
        )

    def _clients(self, name: str) -> Clients:
        assert self._ca is not None
        other = pki.CA.create(self._folder / "other-pki", "another CA")
        name_alone = self._ca.client(OPERATOR_IDENTITY, file="common-name")
        return Clients(
            address=f"127.0.0.1:{self._ports[name]}",
            server_name="node-1",
            permitted=(self._ca.client("any", hosts=(OPERATOR_IDENTITY,)), name_alone),
            strangers=(
                self._ca.client("stranger"),
                self._ca.client("another", hosts=("sandkeeper-another",)),
                # The common name counts only where there are no DNS names.
                self._ca.client(OPERATOR_IDENTITY, hosts=("sandkeeper-another",), file="two-names"),
            ),
            foreign=other.client("any", hosts=(OPERATOR_IDENTITY,)),
        )


@contextlib.contextmanager
def shims(engine: str, source: Source = "module") -> Iterator[Shims]:
    """Shims with one engine; nothing is left of them."""
    folder = Path(tempfile.mkdtemp(prefix="sbx-"))  # short: sockets lie below
    made = Shims(folder, engine, source)
    try:
        yield made
        made.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
