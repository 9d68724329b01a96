"""A cluster whose connections can be broken: a proxy before the API server and one before each shim.

    operator ──► ApiProxy ──► kube-apiserver        operator ──► TcpProxy ──► shim

The operator's intervals are short, so that what a relist or a comparison repairs is repaired within seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster import condition_of, eventually, fresh_namespace
from tests.faults.apiproxy import ApiProxy
from tests.faults.oracle import Oracle
from tests.faults.recorders import Objects, Shims
from tests.faults.tcpproxy import TcpProxy
from tests.histories import Object, kstatus
from tests.sandboxes import Sandboxes

from sandkeeper.api import ASSIGNMENT_ANNOTATION
from sandkeeper.localcluster.apiserver import Kubectl, free_ports
from sandkeeper.localcluster.cluster import OPERATOR, Engine, LocalCluster
from sandkeeper.localcluster.watching import manifest
from sandkeeper.wire import node_pb2

INTERVALS = {
    "RELIST_INTERVAL": "0.5",
    "NODE_UNREACHABLE_AFTER": "2",
    "RESYNC_INTERVAL": "1",
    "LIST_INTERVAL": "2",
    "GARBAGE_INTERVAL": "0.5",
    "GARBAGE_MIN_AGE": "0.5",
    "USAGE_INTERVAL": "0",
}


@dataclass(frozen=True, slots=True)
class Network:
    """lines: one TcpProxy per node, in the order of `local.nodes`."""

    local: LocalCluster
    api: ApiProxy
    lines: tuple[TcpProxy, ...]
    objects: Objects
    shims: Shims

    @property
    def kubectl(self) -> Kubectl:
        """Past the proxy."""
        return self.local.kubectl

    def heal(self) -> None:
        self.api.heal()
        for line in self.lines:
            line.heal()

    def line(self, node: str) -> TcpProxy:
        return self.lines[self.local.nodes.index(node)]

    @contextlib.contextmanager
    def trial(self) -> Iterator[Trial]:
        """One test's namespace, in a network that is whole before and after it."""
        with fresh_namespace(self.kubectl) as namespace:
            try:
                yield Trial(self, namespace)
            finally:
                self.heal()

    @contextlib.contextmanager
    def another_operator(
        self, *, kubeconfig: Path | None = None, env: Mapping[str, str] | None = None
    ) -> Iterator[int]:
        """One more operator until the end of the block, once it is ready; its HTTP port.

        kubeconfig: default: the proxy's. env: settings beyond those of the first operator.
        """
        name, processes, port = "operator-2", self.local.processes, free_ports(1)[0]
        settings = {
            "KUBECONFIG": str(kubeconfig or self.api.kubeconfig),
            "TLS_CA": str(self.local.tls.ca),
            "TLS_CERT": str(self.local.tls.cert),
            "TLS_KEY": str(self.local.tls.key),
            "HTTP_PORT": str(port),
            **INTERVALS,
            **(env or {}),
        }
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SANDKEEPER_")}
        named = {f"SANDKEEPER_OPERATOR_{key}": value for key, value in settings.items()}
        processes.spawn(
            name, [sys.executable, "-m", "sandkeeper.cli.main", "operator"], env={**inherited, **named}
        )
        try:
            eventually(lambda: _answers(port), timeout=60, seen=lambda: processes.tail(name))
            yield port
        finally:
            processes.stop(name)


@dataclass(frozen=True, slots=True)
class Trial:
    """A namespace in a Network: what a user does there, what happened, and whether that was right."""

    network: Network
    namespace: str

    @property
    def user(self) -> Sandboxes:
        return Sandboxes(self.network.kubectl, self.namespace)

    def make(self, *bodies: Object) -> None:
        """Applies all of them at once."""
        listed = {"apiVersion": "v1", "kind": "List", "items": list(bodies)}
        self.user.run("apply", "-f", "-", input=json.dumps(listed))

    def until(self, name: str, wanted: Any, *, timeout: float = 60.0) -> Object:
        """See recorders.Objects.until."""
        return self.network.objects.until(self.namespace, name, wanted, timeout=timeout)

    def get(self, name: str) -> Object:
        return self.network.objects.get(self.namespace, name)

    def uid(self, name: str, life: int = -1) -> str:
        return self.network.objects.uids(self.namespace, name)[life]

    def states(self, name: str) -> list[str]:
        """RUNNING, PREPARING, ...: of what the nodes have of the newest object with this name."""
        return sorted(
            node_pb2.State.Name(life.record.state).removeprefix("STATE_")
            for life in self.network.shims.present(self.uid(name))
        )

    def oracle(self, *ports: int, apis: tuple[ApiProxy, ...] = ()) -> Oracle:
        """ports: of operators beside the first one, to be looked at as well; apis: the proxies that they use."""
        network = self.network
        return Oracle(
            network.objects,
            network.shims,
            (network.api, *apis),
            (network.local.plan.operator_port, *ports),
            self.namespace,
            network.local.folder / "effects-shim.jsonl",
        )


def sandbox(name: str, *command: str, namespace: str = "", **spec: Any) -> Object:
    """A manifest; it sleeps for a day where no command is given."""
    body = manifest(name, *command, **spec)
    if namespace:
        body["metadata"]["namespace"] = namespace
    return body


def running(body: Object) -> bool:
    """It is, and is wanted to be."""
    return bool(body) and kstatus(body) == "Current" and condition_of(body, "Running")["status"] == "True"


def assigned(body: Object) -> bool:
    return bool(body) and ASSIGNMENT_ANNOTATION in body["metadata"].get("annotations", {})


def gone(body: Object) -> bool:
    return not body


@contextlib.contextmanager
def broken_network(
    *,
    shims: int = 2,
    engine: Engine = "simulated",
    operator: bool = True,
    operator_env: Mapping[str, str] | None = None,
    shim_env: Mapping[str, str] | None = None,
) -> Iterator[Network]:
    """A Network. operator=False: for a test that starts it itself (`local.start_operator`)."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="sbx-"))  # short: sockets lie below
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        local = LocalCluster(folder)
        stack.callback(local.down, delete=False)
        proxied = folder / "proxy"
        local.up(
            shims=shims,
            engine=engine,
            operator=False,
            tied=True,
            operator_env={"KUBECONFIG": str(proxied / "kubeconfig"), **INTERVALS, **(operator_env or {})},
            shim_env={"EFFECTS_FILE": str(folder / "effects-shim.jsonl"), **(shim_env or {})},
        )
        api = stack.enter_context(ApiProxy(local.kubeconfig, proxied))
        ports = local.plan.shim_ports
        lines = tuple(stack.enter_context(TcpProxy(port)) for port in ports)
        for node, line in zip(local.nodes, lines, strict=True):
            change = json.dumps({"spec": {"address": line.address}})
            local.kubectl("patch", "sandboxnode", node, "--type=merge", "-p", change)
        addresses = {node: f"127.0.0.1:{port}" for node, port in zip(local.nodes, ports, strict=True)}
        network = Network(
            local,
            api,
            lines,
            stack.enter_context(Objects(local.kubeconfig)),
            stack.enter_context(Shims(addresses, local.tls)),
        )
        # Before the proxies go: it would knock at them to the last.
        stack.callback(local.processes.stop, OPERATOR)
        if operator:
            local.start_operator()
            local.kubectl("wait", "sandboxnodes", "--all", "--for=condition=Ready", "--timeout=60s")
        yield network


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return False
