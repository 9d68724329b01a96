"""etcd and kube-apiserver as plain processes on loopback, their kubeconfig, and kubectl."""

from __future__ import annotations

import json
import os
import random
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from sandkeeper.api.generate import generated_files
from sandkeeper.localcluster import binaries, pki
from sandkeeper.localcluster.processes import Processes

CONTEXT = "sandkeeper-local"
SERVICE_IP = "10.0.0.1"  # of the service `kubernetes`: the first of the range
LOOPBACK = "127.0.0.1"
READY_TIMEOUT = 120.0
_POLL = 0.05
_FIRST_PORT = 10_240

Say = Callable[[str], None]


class KubectlError(Exception):
    """kubectl failed; the message is what it said."""


class NotReady(Exception):
    """Something did not become ready in time."""


class Kubectl:
    """kubectl for one kubeconfig."""

    def __init__(
        self,
        program: Path,
        kubeconfig: Path,
        *,
        context: str = "",
        cache: Path | None = None,
        under: Sequence[str] = (),
    ) -> None:
        """under: a program that starts it, with arguments."""
        self.kubeconfig = kubeconfig
        self._argv = [
            *under,
            str(program),
            "--kubeconfig",
            str(kubeconfig),
            *(["--context", context] if context else []),
        ]
        # Its own cache of what the server offers: a port used before may now be another cluster's.
        self._environment = os.environ | {"KUBECACHEDIR": str(cache or kubeconfig.parent / "kubectl-cache")}

    def run(self, *args: str, input: str | None = None) -> subprocess.CompletedProcess[str]:  # noqa: A002
        """Runs kubectl, whatever comes of it."""
        return subprocess.run(
            [*self._argv, *args],
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            check=False,
            env=self._environment,
        )

    def __call__(self, *args: str, input: str | None = None, check: bool = True) -> str:  # noqa: A002
        """kubectl's output. Raises KubectlError when it fails and `check` is set."""
        result = self.run(*args, input=input)
        if check and result.returncode != 0:
            raise KubectlError(f"kubectl {' '.join(args)}: {result.stderr.strip() or result.stdout.strip()}")
        return result.stdout


class ApiServer:
    """One etcd and one kube-apiserver in `folder`, with our CRDs."""

    def __init__(
        self,
        folder: Path,
        processes: Processes,
        *,
        address: str = LOOPBACK,
        port: int | None = None,
        flags: Sequence[str] = (),
        under: Sequence[str] = (),
    ) -> None:
        """address: where clients find it; it listens everywhere where that is not loopback.

        port: default: a free one. flags: more of kube-apiserver's, after ours.
        under: a program that starts kubectl, with arguments.
        """
        self.address = address
        self._port = port
        self.flags = tuple(flags)
        self._under = tuple(under)
        self.folder = folder
        self.processes = processes
        self.kubeconfig = folder / "kubeconfig"
        # Of kube-apiserver, beside ours; set before `start`.
        self._tools: dict[str, binaries.Found] | None = None

    @property
    def tools(self) -> dict[str, binaries.Found]:
        self._tools = self._tools or binaries.ensure()
        return self._tools

    @property
    def kubectl(self) -> Kubectl:
        return Kubectl(self.tools["kubectl"].path, self.kubeconfig, under=self._under)

    def start(self, *, tied: bool = False, say: Say | None = None) -> None:
        """Starts what does not run; `wait` tells when it serves. tied: both end with this process."""
        self._tools = binaries.ensure(say=say)
        ports = self._ports()
        folder, etcd = self.folder, f"http://127.0.0.1:{ports['etcd']}"
        if not self.processes.alive("etcd"):
            self.processes.spawn(
                "etcd",
                [
                    str(self.tools["etcd"].path),
                    f"--data-dir={folder / 'etcd'}",
                    f"--listen-client-urls={etcd}",
                    f"--advertise-client-urls={etcd}",
                    f"--listen-peer-urls=http://127.0.0.1:{ports['etcd-peer']}",
                    "--unsafe-no-fsync",
                    "--log-level=warn",
                ],
                env={"PATH": os.defpath},
                tied=tied,
            )
        if not self.processes.alive("kube-apiserver"):
            self._start_apiserver(etcd, self._port or ports["kube-apiserver"], tied)

    def _start_apiserver(self, etcd: str, port: int, tied: bool) -> None:
        ca = pki.CA.create(self.folder / "pki" / "kubernetes", "sandkeeper local Kubernetes")
        serving = ca.server(
            "kube-apiserver",
            tuple(
                dict.fromkeys(("localhost", "127.0.0.1", "kubernetes.default.svc", SERVICE_IP, self.address))
            ),
        )
        admin = ca.client("admin", organizations=("system:masters",))
        service_accounts = pki.signing_key(ca.folder / "service-accounts.key")
        self._write_kubeconfig(port, admin.ca, admin.cert, admin.key)
        everywhere = "0.0.0.0"  # noqa: S104 - of namespaces of its own
        self.processes.spawn(
            "kube-apiserver",
            [
                str(self.tools["kube-apiserver"].path),
                f"--etcd-servers={etcd}",
                f"--bind-address={everywhere if self.address != LOOPBACK else LOOPBACK}",
                f"--secure-port={port}",
                f"--client-ca-file={ca.cert}",
                f"--tls-cert-file={serving.cert}",
                f"--tls-private-key-file={serving.key}",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-signing-key-file={service_accounts}",
                f"--service-account-key-file={service_accounts}",
                "--authorization-mode=Node,RBAC",
                "--service-cluster-ip-range=10.0.0.0/24",
                "--endpoint-reconciler-type=none",
                "--allow-privileged=true",
                "--profiling=false",
                *self.flags,
            ],
            env={"PATH": os.defpath},
            tied=tied,
        )

    def wait(self) -> None:
        """Returns when the API server is ready. Raises ProcessDied, NotReady."""
        kubeconfig = yaml.safe_load(self.kubeconfig.read_text())
        user, server = kubeconfig["users"][0]["user"], kubeconfig["clusters"][0]["cluster"]
        context = ssl.create_default_context(cafile=server["certificate-authority"])
        context.load_cert_chain(user["client-certificate"], user["client-key"])
        deadline = time.monotonic() + READY_TIMEOUT
        while True:
            for name in ("etcd", "kube-apiserver"):
                self.processes.check(name)
            try:
                with urllib.request.urlopen(f"{server['server']}/readyz", timeout=2, context=context):  # noqa: S310
                    return
            except urllib.error.HTTPError as error:
                error.close()
            except OSError:
                pass
            if time.monotonic() > deadline:
                raise NotReady(f"kube-apiserver: {self.processes.tail('kube-apiserver')}")
            time.sleep(_POLL)

    def apply_crds(self) -> None:
        """Applies our CRDs; returns when the API server serves them."""
        apply_crds(self.kubectl)

    def stop(self) -> None:
        self.processes.stop("kube-apiserver", grace=5)
        self.processes.stop("etcd", grace=5)

    def _ports(self) -> dict[str, int]:
        path = self.folder / "ports.json"
        if path.exists():
            stored: dict[str, int] = json.loads(path.read_text())
            return stored
        self.folder.mkdir(parents=True, exist_ok=True)
        names = ("etcd", "etcd-peer", "kube-apiserver")
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        path.write_text(json.dumps(ports))
        return ports

    def _write_kubeconfig(self, port: int, ca: Path, cert: Path, key: Path) -> None:
        document: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": CONTEXT,
            "clusters": [
                {
                    "name": CONTEXT,
                    "cluster": {"server": f"https://{self.address}:{port}", "certificate-authority": str(ca)},
                }
            ],
            "users": [{"name": CONTEXT, "user": {"client-certificate": str(cert), "client-key": str(key)}}],
            "contexts": [{"name": CONTEXT, "context": {"cluster": CONTEXT, "user": CONTEXT}}],
        }
        with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False) as file:  # mode 0600
            yaml.safe_dump(document, file)
        Path(file.name).replace(self.kubeconfig)


def crds() -> str:
    """Our CustomResourceDefinitions as YAML documents."""
    files = generated_files()
    names = sorted(name for name in files if name.startswith("crds/") and "kustomization" not in name)
    return "---\n".join(files[name] for name in names)


def apply_crds(kubectl: Kubectl, documents: str | None = None) -> None:
    """Applies CRDs, ours where none are given; returns when the API server serves them. Raises KubectlError,
    NotReady."""
    applied = kubectl(
        *("apply", "--server-side", "--force-conflicts", "-o", "name", "-f", "-"), input=documents or crds()
    ).split()
    deadline = time.monotonic() + READY_TIMEOUT
    # Not `kubectl wait`: it fails where it finds conditions that are null still.
    while not _established(kubectl, applied):
        if time.monotonic() > deadline:
            raise NotReady(f"{', '.join(applied)}: not established within {READY_TIMEOUT:g} s")
        time.sleep(_POLL)


def _established(kubectl: Kubectl, names: list[str]) -> bool:
    document = json.loads(kubectl("get", "-o", "json", *names))
    conditions = [each["status"].get("conditions") or [] for each in document.get("items", [document])]
    return all(
        {("Established", "True")} <= {(one["type"], one["status"]) for one in each} for each in conditions
    )


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now.

    None that the kernel gives to outgoing connections: one of these may have it before the listener does.
    """
    sockets: list[socket.socket] = []
    try:
        while len(sockets) < count:
            one = socket.socket()
            sockets.append(one)
            try:
                one.bind(("127.0.0.1", _candidate()))
            except OSError:
                sockets.pop().close()
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _candidate() -> int:
    """Source: Documentation/networking/ip-sysctl, `ip_local_port_range`. 0, the kernel's choice, where that leaves
    no room."""
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 32768
    return random.randrange(_FIRST_PORT, first) if first - _FIRST_PORT > 1000 else 0  # noqa: S311 - no secret
