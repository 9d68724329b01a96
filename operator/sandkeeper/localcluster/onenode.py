"""Kubernetes of one node, without Docker: every program real, in namespaces of its own.

etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, containerd, runc, CNI. No kube-proxy and no
DNS: the one service that pods need, `kubernetes`, has its address on the node itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from sandkeeper.localcluster import node_sources, pki
from sandkeeper.localcluster.apiserver import SERVICE_IP, ApiServer, Kubectl, NotReady, Say
from sandkeeper.localcluster.containerd import Containerd, remove_cgroup
from sandkeeper.localcluster.namespaces import Namespaces
from sandkeeper.localcluster.nodeconfig import (
    BOOT_ID,
    PAUSE,
    base_spec,
    cni_config,
    containerd_config,
    pause_image,
)
from sandkeeper.localcluster.ocilayout import ImageDef, write_layout
from sandkeeper.localcluster.processes import Processes

NODE = "node-1"
ADDRESS = "10.99.0.1"
CONTROLLERS = ("kube-controller-manager", "kube-scheduler")
READY_TIMEOUT = 180.0
_POLL = 0.1
_KUBELET_PORT = 10250
# kubelet sets these for all of the machine. Within, files of ours lie over them.
_SYSCTLS = {
    "kernel/keys/root_maxbytes": "25000000",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
}
# What is written there, and in /etc, stays in the node's folder.
_HIDDEN = ("/run", "/var/lib", "/var/log")

_NETWORK = (
    "link add node0 type bridge",
    f"addr add {ADDRESS}/24 dev node0",
    f"addr add {SERVICE_IP}/32 dev lo",
    "link set node0 up",
    "route add default dev node0",
)


class OneNode:
    """`with OneNode() as node:` starts all, returns when the node is Ready, and leaves nothing behind."""

    def __init__(self, *, folder: Path | None = None, sandboxer: str = "", say: Say | None = None) -> None:
        """folder: short, for sockets lie below it; default: a temporary one. Raises BinariesError.

        sandboxer: name of a runtime handler, the sandboxes of whose pods are made by whoever serves `sandboxer_socket`.
        """
        self._say = say or (lambda _line: None)
        self._programs = node_sources.ensure(say=self._say)
        self.folder = folder or Path(tempfile.mkdtemp(prefix="node-"))
        self.cgroup = f"sandkeeper-{self.folder.name}"
        self.sandboxes_cgroup = f"{self.cgroup}-sandboxes"
        root = self.folder / "root"
        binds = {root / _flat(path): path for path in _HIDDEN}
        binds |= {root / _flat(path): f"/proc/sys/{path}" for path in _SYSCTLS}
        self._boot_id, self._base_spec = self.folder / "boot-id", self.folder / "base-spec.json"
        binds[self._boot_id] = BOOT_ID
        self.namespaces = Namespaces(self.folder / "namespaces", NODE, binds)
        self.processes = Processes(self.folder, self.namespaces.popen)
        self.containerd = Containerd(
            folder=self.folder / "c",
            cri=True,
            config=containerd_config(self.folder / "cni", self._programs["runc"], self._base_spec, sandboxer),
            sandboxers={sandboxer: self.sandboxer_socket} if sandboxer else {},
            cgroups=(self.cgroup, self.sandboxes_cgroup),
            processes=Processes(self.folder / "c", self.namespaces.popen),
            say=self._say,
        )
        self._api: ApiServer | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Its life

    def start(self) -> None:
        """Returns when the node is Ready. Raises ProcessDied, NotReady, ContainerdFailed, NamespacesFailed."""
        self._make_folders()
        self.namespaces.start()
        for words in _NETWORK:
            self.run_within("ip", *words.split())
        layers = f"lowerdir=/etc,upperdir={self.folder}/root/etc,workdir={self.folder}/root/work"
        self.run_within("mount", "-t", "overlay", "-o", layers, "overlay", "/etc")
        self._say("etcd, kube-apiserver and containerd are starting")
        self.api.start(say=self._say)
        self.containerd.start()
        self.import_images({PAUSE: pause_image()})
        self.namespaces.in_network(lambda: _until(self._api_answers, "kube-apiserver"))
        self.start_controllers()
        self.start_kubelet()
        self._say("kubelet is starting")
        _until(self._node_ready, "the node", self._why)

    def close(self) -> None:
        """Ends all; nothing of it is left. Repeatable."""
        self._thaw()
        self.namespaces.close()
        self.containerd.close()
        for name in self.processes.names():
            self.processes.stop(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_controllers(self) -> None:
        """Starts kube-controller-manager and kube-scheduler."""
        keys = self._ca.folder
        more = {
            "kube-controller-manager": [
                f"--service-account-private-key-file={keys / 'service-accounts.key'}",
                f"--root-ca-file={self._ca.cert}",
                f"--cluster-signing-cert-file={self._ca.cert}",
                f"--cluster-signing-key-file={self._ca.key}",
                "--use-service-account-credentials=true",
            ],
            "kube-scheduler": [],
        }
        for name in CONTROLLERS:
            kubeconfig = self._kubeconfig(name, f"system:{name}")
            flags = [f"--kubeconfig={kubeconfig}", "--leader-elect=false", "--bind-address=127.0.0.1"]
            flags += [f"--authentication-kubeconfig={kubeconfig}", f"--authorization-kubeconfig={kubeconfig}"]
            self._spawn(name, [*flags, *more[name]])

    def start_kubelet(self) -> None:
        """Starts kubelet, under its own name in the group of nodes."""
        serving = self._ca.server("kubelet-serving", (NODE, ADDRESS, "127.0.0.1"))
        config = self.folder / "kubelet.json"
        config.write_text(json.dumps(self._kubelet_config(serving.cert, serving.key)))
        kubeconfig = self._kubeconfig("kubelet", f"system:node:{NODE}", "system:nodes")
        flags = [f"--config={config}", f"--kubeconfig={kubeconfig}", f"--hostname-override={NODE}"]
        self._spawn("kubelet", [*flags, f"--node-ip={ADDRESS}"])

    def restart_services(self) -> None:
        """Ends kubelet and containerd, as an upgrade of a node does, and starts them anew. What they ran runs on."""
        self.processes.stop("kubelet")
        self.containerd.restart()
        self.start_kubelet()
        _until(self._node_ready, "the node", self._why)

    def restart_machine(self) -> str:
        """Cuts the power, and starts all again: what is on disk is there, and nothing else. Returns the new boot id."""
        self._thaw()
        self.namespaces.close()
        self.containerd.power_off()
        for name in self.processes.names():
            self.processes.stop(name)
        shutil.rmtree(self.folder / "root" / _flat("/run"))
        for hierarchy in _hierarchies():
            for name in (self.cgroup, self.sandboxes_cgroup):
                remove_cgroup(hierarchy / name)
        self.start()
        return self._boot_id.read_text().strip()

    # Using it

    @property
    def sandboxer_socket(self) -> Path:
        return self.folder / "s" / "shim.sock"

    @property
    def api(self) -> ApiServer:
        """Made late: its flags name files that must be there."""
        if self._api is None:
            client = self._ca.client("kubelet-client", organizations=("system:masters",))
            self._api = ApiServer(
                self.folder,
                self.processes,
                address=ADDRESS,
                port=443,  # at which pods look for the service `kubernetes`
                flags=(
                    f"--advertise-address={ADDRESS}",
                    "--enable-admission-plugins=NodeRestriction",
                    f"--kubelet-certificate-authority={self._ca.cert}",
                    f"--kubelet-client-certificate={client.cert}",
                    f"--kubelet-client-key={client.key}",
                    "--kubelet-preferred-address-types=InternalIP",
                ),
                under=self.namespaces.enter_network,
            )
        return self._api

    @property
    def kubectl(self) -> Kubectl:
        """kubectl as administrator. It runs in the node's network, for nothing outside reaches that."""
        return self.api.kubectl

    @property
    def kubeconfig(self) -> Path:
        """The administrator's, good in the node's network."""
        return self.api.kubeconfig

    def run_within(self, *argv: str) -> str:
        """What a command prints that runs on the node. Raises NotReady."""
        result = subprocess.run([*self.namespaces.enter, *argv], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise NotReady(f"{' '.join(argv)}: {result.stderr.strip()}")
        return result.stdout

    def outside(self, path: str) -> Path:
        """Where the machine has what the node has at `path`, below /run, /var/lib or /var/log."""
        hidden = next(each for each in _HIDDEN if path.startswith(f"{each}/"))
        return self.folder / "root" / _flat(hidden) / path.removeprefix(f"{hidden}/")

    def import_images(self, images: Mapping[str, ImageDef]) -> None:
        """Gives containerd images under their full names, for pods: there is no registry."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="images-") as work:
            layout, archive = Path(work) / "layout", Path(work) / "images.tar"
            write_layout(layout, images)
            index = layout / "index.json"  # containerd takes the whole name from an annotation of its own
            named = index.read_text().replace("org.opencontainers.image.ref.name", "io.containerd.image.name")
            index.write_text(named)
            with tarfile.open(archive, "w") as tar:
                for each in sorted(layout.iterdir()):
                    tar.add(each, arcname=each.name)
            self.import_archive(archive)

    def import_archive(self, archive: Path) -> None:
        """Gives containerd the images of an OCI or Docker archive, for pods."""
        self.containerd.ctr("images", "import", str(archive), namespace="k8s.io", seconds=300)

    # Parts of the above

    @property
    def _ca(self) -> pki.CA:
        return pki.CA.create(self.folder / "pki" / "kubernetes", "sandkeeper local Kubernetes")

    def _thaw(self) -> None:
        """What is frozen does not end, on cgroup v1."""
        words = {"freezer.state": "THAWED", "cgroup.freeze": "0"}
        for hierarchy in _hierarchies():
            for folder, _, names in os.walk(hierarchy / self.sandboxes_cgroup):
                for name in words.keys() & set(names):
                    with contextlib.suppress(OSError):  # it goes meanwhile, or is the root of all
                        (Path(folder) / name).write_text(words[name])

    def _make_folders(self) -> None:
        root = self.folder / "root"
        for name in (*map(_flat, _HIDDEN), "etc", "work"):
            (root / name).mkdir(parents=True, exist_ok=True)
        for path, value in _SYSCTLS.items():
            (root / _flat(path)).write_text(f"{value}\n")
        self._boot_id.write_text(f"{uuid.uuid4()}\n")
        self._base_spec.write_text(base_spec(self.containerd.programs / "ctr", self._boot_id))
        (self.folder / "resolv.conf").write_text("")
        (self.folder / "cni").mkdir(exist_ok=True)
        (self.folder / "cni" / "10-pods.conflist").write_text(json.dumps(cni_config()))
        for hierarchy in _hierarchies():  # kubelet wants it to be there
            (hierarchy / self.cgroup).mkdir(exist_ok=True)

    def _spawn(self, name: str, flags: list[str]) -> None:
        environment = {"PATH": f"{os.defpath}:/usr/sbin:/sbin", "HOME": "/root"}
        self.processes.spawn(name, [str(self._programs[name]), *flags], env=environment)

    def _api_answers(self) -> bool:
        self.api.wait()
        return True

    def _node_ready(self) -> bool:
        for name in (*CONTROLLERS, "kubelet"):
            self.processes.check(name)
        path = "jsonpath={.status.conditions[?(@.type=='Ready')].status} {.status.nodeInfo.bootID}"
        # What it said before a restart stays for a while.
        wanted = f"True {self._boot_id.read_text().strip()}"
        ready = self.kubectl("get", "node", NODE, "-o", path, check=False) == wanted
        account = self.kubectl("get", "serviceaccount", "default", "-o", "name", check=False)
        return ready and bool(account)  # without the account no pod can be made

    def _why(self) -> str:
        return self.kubectl("describe", "nodes", check=False) + self.processes.tail("kubelet", 30)

    def _kubeconfig(self, file: str, user: str, *groups: str) -> Path:
        files = self._ca.client(user, organizations=groups, file=file)
        path, document = self.folder / f"{file}.kubeconfig", yaml.safe_load(self.kubeconfig.read_text())
        document["users"][0]["user"] = {
            "client-certificate": str(files.cert),
            "client-key": str(files.key),
        }
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(document))
        return path

    def _kubelet_config(self, cert: Path, key: Path) -> dict[str, Any]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self._ca.cert)},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(cert),
            "tlsPrivateKeyFile": str(key),
            "port": _KUBELET_PORT,
            "containerRuntimeEndpoint": f"unix://{self.containerd.socket}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "enforceNodeAllocatable": ["pods"],
            "failCgroupV1": False,
            "failSwapOn": False,
            "resolvConf": str(self.folder / "resolv.conf"),
            "volumePluginDir": str(self.folder / "plugins"),
            "makeIPTablesUtilChains": False,
            # A machine short of memory or space shall fail a test by its own words, not by an eviction.
            "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
            "imageGCHighThresholdPercent": 100,
            "oomScoreAdj": _oom_score_adj(),  # lowering it takes CAP_SYS_RESOURCE, which root may lack
        }


def _flat(path: str) -> str:
    return path.strip("/").replace("/", "-")


def _until(condition: Any, what: str, why: Any = lambda: "") -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise NotReady(f"{what} did not get ready within {READY_TIMEOUT:g} s: {why()}")
        time.sleep(_POLL)


def _hierarchies() -> list[Path]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [Path(line.split()[4]) for line in lines if line.partition(" - ")[2].startswith("cgroup")]


def _oom_score_adj() -> int:
    return int(Path("/proc/self/oom_score_adj").read_text())
