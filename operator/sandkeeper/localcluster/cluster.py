"""All of Sandkeeper on one machine: API server, shims and operator as plain processes below one folder.

Everything that `up` decided is in the folder's cluster.json, so `down`, `status` and a restart work from any process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from sandkeeper.localcluster import pki
from sandkeeper.localcluster.apiserver import ApiServer, Kubectl, NotReady, Say, free_ports
from sandkeeper.localcluster.ocilayout import busybox_image, write_layout
from sandkeeper.localcluster.processes import Processes
from sandkeeper.localcluster.shims import ShimCalls
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.wire.errors import ShimError
from sandkeeper.wire.tls import OPERATOR_IDENTITY, TLSFiles

Engine = Literal["oci", "containerd", "simulated"]
OPERATOR = "operator"
OFFLINE_IMAGE = "docker.io/library/busybox:1.37"
READY_TIMEOUT = 60.0
_POLL = 0.05
_MEMORY = (Path("/run"), Path("/dev/shm"))  # noqa: S108
"""Where a node's run_dir may be, as on a real node: in memory."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What `up` was asked for."""

    engine: Engine = "oci"
    operator: bool = True
    shim_ports: tuple[int, ...] = ()
    operator_port: int = 0
    shim_env: dict[str, str] = field(default_factory=dict)
    operator_env: dict[str, str] = field(default_factory=dict)
    tied: bool = False
    # Above the nodes' run_dirs; empty: these are beside their state_dirs.
    run_root: str = ""


class LocalCluster:
    """A cluster in `folder`. The folder's path should be short: unix sockets below it have at most 107 bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.processes = Processes(self.folder)
        self.api = ApiServer(self.folder, self.processes)

    # The whole

    def up(
        self,
        *,
        shims: int = 1,
        engine: Engine = "oci",
        operator: bool = True,
        shim_env: Mapping[str, str] | None = None,
        operator_env: Mapping[str, str] | None = None,
        tied: bool = False,
        say: Say | None = None,
    ) -> None:
        """Starts all and returns when every node is Ready. Again on one that is up: starts what is missing.

        shim_env, operator_env: settings beyond ours, as SANDKEEPER_SHIM_* and SANDKEEPER_OPERATOR_*.
        tied: API server and etcd end with this process. Raises ProcessDied, NotReady, BinariesError, KubectlError,
        PermissionError.
        """
        say = say or (lambda _line: None)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _must_be_ours(self.folder)
        if not self._plan_file.exists():
            ports = free_ports(shims + 1)
            plan = Plan(
                engine=engine,
                operator=operator,
                shim_ports=tuple(ports[1:]),
                operator_port=ports[0],
                shim_env=dict(shim_env or {}),
                operator_env=dict(operator_env or {}),
                tied=tied,
                run_root="" if engine == "simulated" else self._in_memory(),
            )
            self._plan_file.write_text(json.dumps(asdict(plan)))
        say("etcd and kube-apiserver are starting")
        self.api.start(tied=self.plan.tied, say=say)
        self._make_certificates()
        for index in range(len(self.nodes)):  # while the API server comes up
            if not self.processes.alive(self.nodes[index]):
                self._spawn_shim(index)
        self.api.wait()
        self.api.apply_crds()
        say("The API server is ready and has our CRDs")
        if self.nodes:
            self.kubectl("apply", "-f", "-", input=self._node_manifests())
        for index, name in enumerate(self.nodes):
            self._wait_shim(index)
            say(f"Shim {name} serves")
        if self.plan.operator:
            self.start_operator()
            if self.nodes:
                self.kubectl("wait", "sandboxnodes", "--all", "--for=condition=Ready", "--timeout=60s")
            say("The operator is ready, and so is every node")

    def down(self, *, delete: bool = True) -> None:
        """Ends every sandbox and process of this cluster, whatever state it is in; deletes the folder.

        delete=False keeps the folder with its logs. Raises ShimError where a node's sandboxes did not end.
        """
        if not self._plan_file.exists():
            return
        self.processes.stop(OPERATOR)
        try:
            for index, name in enumerate(self.nodes):
                self._empty_node(index)
                self.processes.stop(name)
        finally:
            for index, name in enumerate(self.nodes):
                self.processes.stop(name)
                self._remove_cgroups(index)
            self.api.stop()
        if self.plan.run_root:
            shutil.rmtree(self.plan.run_root, ignore_errors=True)
        if delete:
            shutil.rmtree(self.folder)

    def status(self) -> dict[str, int | None]:
        """Process -> its pid, None for one that does not run."""
        if not self._plan_file.exists():
            return {}
        operator = [OPERATOR] if self.plan.operator else []
        names = ["etcd", "kube-apiserver", *self.nodes, *operator]
        return {name: self.processes.pid(name) for name in names}

    @property
    def plan(self) -> Plan:
        document = json.loads(self._plan_file.read_text())
        return Plan(**{**document, "shim_ports": tuple(document["shim_ports"])})

    @property
    def kubeconfig(self) -> Path:
        return self.api.kubeconfig

    @property
    def kubectl(self) -> Kubectl:
        return self.api.kubectl

    @property
    def nodes(self) -> list[str]:
        """The nodes' names: node-1, node-2, ..."""
        return [f"node-{number}" for number in range(1, len(self.plan.shim_ports) + 1)]

    @property
    def tls(self) -> TLSFiles:
        """What a client of the shims shows: the operator's certificate."""
        folder = self.folder / "pki" / "sandkeeper"
        return TLSFiles(folder / "ca.crt", folder / "tls.crt", folder / "tls.key")

    def apply_crds(self) -> None:
        self.api.apply_crds()

    def logs(self, name: str) -> str:
        """The log of a process: etcd, kube-apiserver, operator or a node's name."""
        path = self.processes.log(name)
        return path.read_text(errors="replace") if path.exists() else ""

    # Shims

    def node_folder(self, index: int) -> Path:
        """Below it is all that a node has on disk, as if each were a machine. Short: sockets lie there."""
        return self.folder / f"n{index + 1}"

    def run_folder(self, index: int) -> Path:
        """What a node has in memory. Its machine's restart takes it."""
        root = self.plan.run_root
        return Path(root) / f"n{index + 1}" if root else self.node_folder(index) / "run"

    def cgroup_parent(self, index: int) -> str:
        """One per node and cluster: a shim removes, at its start, every sandbox below its parent that it has no
        record of, and other nodes' sandboxes are on this machine as well."""
        return f"{self._own_name}-{index + 1}"

    @property
    def _own_name(self) -> str:
        return f"sandkeeper-{hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:10]}"

    def shim(self, index: int) -> ShimCalls:
        """Calls to one shim, without the operator."""
        return ShimCalls(f"127.0.0.1:{self.plan.shim_ports[index]}", self.nodes[index], self.tls)

    def start_shim(
        self, index: int, *, env: Mapping[str, str] | None = None, under: Sequence[str] = ()
    ) -> None:
        """Starts it and waits until it serves.

        env: settings beyond those of `up`, for this start alone. under: a program that starts it, with arguments.
        """
        self._spawn_shim(index, env, under)
        self._wait_shim(index)

    def kill_shim(self, index: int) -> None:
        """SIGKILL; its sandboxes run on."""
        self.processes.kill(self.nodes[index])

    def restart_shim(self, index: int, number: int = signal.SIGTERM) -> None:
        """Ends it with a signal, waits for its end, and starts it anew."""
        name = self.nodes[index]
        if number == signal.SIGTERM:
            self.processes.stop(name)
        else:
            self.processes.kill(name)
        self.start_shim(index)

    def _spawn_shim(
        self, index: int, more: Mapping[str, str] | None = None, under: Sequence[str] = ()
    ) -> None:
        name, plan = self.nodes[index], self.plan
        node = self.node_folder(index)
        ca = self._ca()
        files = ca.server(name, (name, "127.0.0.1", "localhost"))
        env = {
            "NODE_NAME": name,
            "STATE_DIR": str(node / "state"),
            "RUN_DIR": str(self.run_folder(index)),
            "LISTEN": f"127.0.0.1:{plan.shim_ports[index]}",
            "TLS_CA": str(files.ca),
            "TLS_CERT": str(files.cert),
            "TLS_KEY": str(files.key),
            "ENGINE": plan.engine,
        }
        if plan.engine != "simulated":
            env["OCI__IMAGE_LAYOUTS"] = json.dumps([str(self._image_layout())])
            env["OCI__CGROUP_PARENT"] = self.cgroup_parent(index)
            env["CONTAINERD__NAMESPACE"] = self.cgroup_parent(index)  # a containerd is all nodes' as well
        if plan.run_root:
            Path(plan.run_root).mkdir(mode=0o700, exist_ok=True)
            _must_be_ours(Path(plan.run_root))
        for folder in (node / "state", self.run_folder(index)):
            folder.mkdir(parents=True, exist_ok=True)
        settings = {**env, **plan.shim_env, **(more or {})}
        if settings.get("CERTIFICATE") == "request":
            settings = _without_files(settings)
        self._spawn(name, "shim", "SANDKEEPER_SHIM_", settings, under)

    def _wait_shim(self, index: int) -> None:
        name, deadline = self.nodes[index], time.monotonic() + READY_TIMEOUT
        while True:
            self.processes.check(name)
            try:
                with self.shim(index) as shim:
                    shim.info()
                return
            except ShimError as error:
                if time.monotonic() > deadline:
                    raise NotReady(f"{name}: {error}\n{self.processes.tail(name)}") from error
            time.sleep(_POLL)

    def _empty_node(self, index: int) -> None:
        """Shuts down every sandbox of a node. A shim that was killed is started for it: monitors outlive it."""
        name = self.nodes[index]
        if self.plan.engine == "simulated" and not self.processes.alive(name):
            return
        if not (self.node_folder(index) / "state").exists():
            return
        if not self.processes.alive(name):
            self.start_shim(index)
        with self.shim(index) as shim:
            shim.shutdown_all()

    # The operator

    def start_operator(
        self, *, env: Mapping[str, str] | None = None, under: Sequence[str] = (), ready: bool = True
    ) -> None:
        """Starts it unless it runs, and waits until it says that it is ready.

        env, under: as of start_shim. ready=False: does not wait, for one that may die on the way.
        """
        plan = self.plan
        if not self.processes.alive(OPERATOR):
            settings = {
                "KUBECONFIG": str(self.kubeconfig),
                "TLS_CA": str(self.tls.ca),
                "TLS_CERT": str(self.tls.cert),
                "TLS_KEY": str(self.tls.key),
                "HTTP_PORT": str(plan.operator_port),
                **plan.operator_env,
                **(env or {}),
            }
            if settings.get("CA_SECRET"):
                settings = _without_files(settings)
            self._spawn(OPERATOR, "operator", "SANDKEEPER_OPERATOR_", settings, under)
        deadline = time.monotonic() + READY_TIMEOUT
        while ready and not self._operator_ready():
            self.processes.check(OPERATOR)
            if time.monotonic() > deadline:
                raise NotReady(f"operator: {self.processes.tail(OPERATOR)}")
            time.sleep(_POLL)

    def kill_operator(self) -> None:
        self.processes.kill(OPERATOR)

    def operator_get(self, path: str) -> str:
        """GET of /metrics, /healthz or /readyz. Raises urllib.error.HTTPError, OSError."""
        url = f"http://127.0.0.1:{self.plan.operator_port}{path}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())

    def _operator_ready(self) -> bool:
        try:
            self.operator_get("/readyz")
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:
            return False
        return True

    # Parts of the above

    def _in_memory(self) -> str:
        found = memory(Path("/proc/self/mounts").read_text())
        return str(found / self._own_name) if found else ""

    @property
    def _plan_file(self) -> Path:
        return self.folder / "cluster.json"

    def _spawn(
        self, name: str, command: str, prefix: str, settings: Mapping[str, str], under: Sequence[str]
    ) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SANDKEEPER_")}
        named = {k if k.startswith("SANDKEEPER_") else prefix + k: v for k, v in settings.items()}
        argv = [*under, sys.executable, "-m", "sandkeeper.cli.main", command]
        self.processes.spawn(name, argv, env={**inherited, **named})

    def _ca(self) -> pki.CA:
        return pki.CA.create(self.folder / "pki" / "sandkeeper", "sandkeeper local nodes")

    def _make_certificates(self) -> None:
        ca = self._ca()
        ca.client(OPERATOR_IDENTITY, hosts=(OPERATOR_IDENTITY,), file="tls")
        for name in self.nodes:
            ca.server(name, (name, "127.0.0.1", "localhost"))

    def _remove_cgroups(self, index: int) -> None:
        """The node's cgroups, empty ones only. A shim cannot do so while its last monitors still end."""
        if self.plan.engine == "simulated":
            return
        parent, deadline = self.cgroup_parent(index), time.monotonic() + 2
        cgroups = Cgroups(parent)
        while any(each.exists() for each in cgroups.parents):
            cgroups.close()
            if time.monotonic() > deadline:
                return  # something is in them: what down was called for has failed, and says so itself
            time.sleep(_POLL)

    def _image_layout(self) -> Path:
        layout = self.folder / "images"
        if not (layout / "index.json").exists():
            write_layout(layout, {OFFLINE_IMAGE: busybox_image()})
        return layout

    def _node_manifests(self) -> str:
        items = [
            {
                "apiVersion": "sandkeeper.dev/v1alpha1",
                "kind": "SandboxNode",
                "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
                "spec": {"address": f"127.0.0.1:{port}", "serverName": name},
            }
            for name, port in zip(self.nodes, self.plan.shim_ports, strict=True)
        ]
        return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


def memory(mounts: str, places: Sequence[Path] = _MEMORY) -> Path | None:
    """The first place that is a tmpfs and can be written to. mounts: as /proc/self/mounts has them."""
    # Of several at one place the last is seen.
    kinds = {words[1]: words[2] for line in mounts.splitlines() if len(words := line.split()) > 2}
    return next(
        (each for each in places if kinds.get(str(each)) == "tmpfs" and os.access(each, os.W_OK)), None
    )


def _without_files(settings: Mapping[str, str]) -> dict[str, str]:
    """For whoever gets certificates by the cluster's means."""
    return {name: value for name, value in settings.items() if name not in ("TLS_CA", "TLS_CERT", "TLS_KEY")}


def _must_be_ours(folder: Path) -> None:
    """It lies where anybody may have made it. Raises PermissionError."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} must be this user's folder and writable by nobody else")
