"""A cluster as manifests/ make it: its accounts, roles and policies on a real API server that writes an audit log."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tests.cluster import eventually

from sandkeeper.localcluster import pki
from sandkeeper.localcluster.apiserver import Kubectl
from sandkeeper.localcluster.cluster import OPERATOR, Engine, LocalCluster
from sandkeeper.wire.tls import OPERATOR_IDENTITY

Object = dict[str, Any]
Right = tuple[str, str, str]
"""API group, resource (with its subresource), verb."""

MANIFESTS = Path(__file__).parents[1] / "manifests"
SYSTEM, NODE = "sandkeeper-system", "sandkeeper-node"
OPERATOR_ACCOUNT, SHIM_ACCOUNT = "sandkeeper-operator", "sandkeeper-shim"
CA = "sandkeeper-ca"
_AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {
            "level": "Metadata",
            "userGroups": [f"system:serviceaccounts:{SYSTEM}", f"system:serviceaccounts:{NODE}"],
        },
        {"level": "None"},
    ],
}


@dataclass(frozen=True, slots=True)
class Installed:
    """`local` has one node and no operator; `manifests/` is applied, and certificates come as there."""

    local: LocalCluster
    audit: Path

    @property
    def kubectl(self) -> Kubectl:
        """As administrator."""
        return self.local.kubectl

    def apply(self, folder: Path = MANIFESTS, *flags: str) -> str:
        """Applies a kustomization as a user would, for real or (--dry-run=server) not; returns what kubectl says."""
        return self.kubectl("apply", "--server-side", "--force-conflicts", "-k", str(folder), *flags)

    def token(self, namespace: str, account: str, *flags: str) -> str:
        return self.kubectl("-n", namespace, "create", "token", account, "--duration=1h", *flags).strip()

    def as_bearer(self, token: str, name: str) -> Kubectl:
        """kubectl as whoever the token is of; its kubeconfig is kept as `name`."""
        document = yaml.safe_load(self.local.kubeconfig.read_text())
        document["users"][0]["user"] = {"token": token}
        path = self.local.folder / f"{name}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(document))
        return Kubectl(self.local.api.tools["kubectl"].path, path)

    def start_operator(self, **env: str) -> None:
        """With the rights of its ServiceAccount alone; looks for garbage all the time."""
        self.local.start_operator(env={**self.operator_settings(), **env})
        self.kubectl("wait", "sandboxnodes", "--all", "--for=condition=Ready", "--timeout=60s")

    def operator_settings(self) -> dict[str, str]:
        account = self.as_bearer(self.token(SYSTEM, OPERATOR_ACCOUNT), "operator")
        return {
            "KUBECONFIG": str(account.kubeconfig),
            "GARBAGE_INTERVAL": "0.5",
            "GARBAGE_MIN_AGE": "0",
            "CA_SECRET": f"{SYSTEM}/{CA}",
        }

    def shim_token(self, node: str) -> str:
        """The token that the shim's Pod on a node has."""
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"shim-{node}", "namespace": NODE},
            "spec": {
                "nodeName": node,
                "serviceAccountName": SHIM_ACCOUNT,
                "containers": [{"name": "shim", "image": "sandkeeper"}],
            },
        }
        self.kubectl("apply", "--server-side", "-f", "-", input=json.dumps(pod))
        return self.token(NODE, SHIM_ACCOUNT, "--bound-object-kind=Pod", f"--bound-object-name=shim-{node}")

    def shim_settings(self, node: str = "node-1", *, register: bool = False) -> dict[str, str]:
        """As the DaemonSet has them, for a shim that is a process here with the rights of that account alone."""
        server = yaml.safe_load(self.local.kubeconfig.read_text())["clusters"][0]["cluster"]["server"]
        token = self.local.folder / f"shim-{node}.token"
        token.touch(mode=0o600)
        token.write_text(self.shim_token(node))
        return {
            "CERTIFICATE": "request",
            "REGISTER_NODE": json.dumps(register),
            "ADVERTISE_HOST": "127.0.0.1",
            "KUBERNETES__SERVER": server,
            "KUBERNETES__TOKEN_FILE": str(token),
            "KUBERNETES__CA_FILE": str(self.local.folder / "pki" / "kubernetes" / "ca.crt"),
        }

    def restart_shim(self, *, register: bool = False, **env: str) -> None:
        """Waits until it serves: somebody must sign, unless it has its certificate already."""
        self.local.processes.stop("node-1")
        self.local.start_shim(0, env={**self.shim_settings(register=register), **env})

    def take_ca(self) -> None:
        """The step of docs/install.md by which an administrator gets the CA, and makes certificates with it."""
        eventually(lambda: self.kubectl("-n", SYSTEM, "get", "secret", CA, check=False), timeout=60)
        data = json.loads(self.kubectl("-n", SYSTEM, "get", "secret", CA, "-o", "json"))["data"]
        folder = self.local.folder / "pki" / "sandkeeper"
        for each in folder.iterdir():
            each.unlink()
        for file, key in (("ca.crt", "tls.crt"), ("ca.key", "tls.key")):
            (folder / file).write_bytes(base64.b64decode(data[key]))
        pki.CA(folder).client(OPERATOR_IDENTITY, hosts=(OPERATOR_IDENTITY,), file="tls")

    def until_operator_may_list(self, namespace: str, *, may: bool) -> None:
        """Rights act a moment after they were given or taken."""
        user = f"system:serviceaccount:{SYSTEM}:{OPERATOR_ACCOUNT}"
        ask = ("auth", "can-i", "list", "sandboxes.sandkeeper.dev", "-n", namespace, "--as", user)
        eventually(lambda: (self.kubectl.run(*ask).returncode == 0) is may, timeout=60)

    def stop_operator(self) -> None:
        self.local.processes.stop(OPERATOR)

    def requests(self, account: str = OPERATOR_ACCOUNT) -> list[Object]:
        """What the operator (or the shims' account) asked of the API server, as that has it in its audit log."""
        user = f"system:serviceaccount:{SYSTEM if account == OPERATOR_ACCOUNT else NODE}:{account}"
        whole, _, _ = self.audit.read_text().rpartition("\n")  # a line may be in the making
        events = [json.loads(line) for line in whole.splitlines()]
        return [each for each in events if each["user"]["username"] == user]

    def used(self, account: str = OPERATOR_ACCOUNT) -> set[Right]:
        """The rights that those requests needed."""
        return {
            right(each["objectRef"], each["verb"]) for each in self.requests(account) if "objectRef" in each
        }

    def refused(self, account: str = OPERATOR_ACCOUNT) -> list[str]:
        """Of those requests the ones that the API server forbade."""
        return [
            f"{each['verb']} {each['requestURI']}"
            for each in self.requests(account)
            if each.get("responseStatus", {}).get("code") in (401, 403)
        ]


def right(reference: Mapping[str, str], verb: str) -> Right:
    resource, sub = reference["resource"], reference.get("subresource")
    return reference.get("apiGroup", ""), f"{resource}/{sub}" if sub else resource, verb


def granted(objects: list[Object], account: str) -> set[Right]:
    """The rights that the bindings among `objects` give a ServiceAccount, wherever they hold."""
    bound = {
        each["roleRef"]["name"]
        for each in objects
        if each["kind"] in ("ClusterRoleBinding", "RoleBinding")
        and any(subject["name"] == account for subject in each["subjects"])
    }
    roles = [
        each
        for each in objects
        if each["kind"] in ("ClusterRole", "Role") and each["metadata"]["name"] in bound
    ]
    return {
        (group, resource, verb)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def built(kubectl: Kubectl, folder: Path) -> list[Object]:
    """The objects of a kustomization."""
    return [each for each in yaml.safe_load_all(kubectl("kustomize", str(folder))) if each]


@contextlib.contextmanager
def installed(engine: Engine = "oci") -> Iterator[Installed]:
    """Manifests applied, one shim that has its certificate, no operator; nothing left of it."""
    folder = Path(tempfile.mkdtemp(prefix="sbx-"))  # short: sockets lie below
    local, audit = LocalCluster(folder), folder / "audit.log"
    (folder / "audit.yaml").write_text(yaml.safe_dump(_AUDIT))
    local.api.flags = (f"--audit-policy-file={folder / 'audit.yaml'}", f"--audit-log-path={audit}")
    try:
        local.up(tied=True, shims=1, engine=engine, operator=False)
        found = Installed(local, audit)
        found.apply()
        local.start_operator(env=found.operator_settings())
        found.take_ca()
        found.kubectl("delete", "sandboxnode", "node-1")
        found.restart_shim(register=True)
        eventually(lambda: found.kubectl("get", "sandboxnode", "node-1", check=False), timeout=60)
        # From now on its SandboxNode is what the tests make of it.
        found.restart_shim()
        found.stop_operator()
        yield found
    finally:
        local.down()
        shutil.rmtree(folder, ignore_errors=True)
