"""A cluster as manifests/ make it: its accounts, roles and policies on a real API server that writes an audit log."""

from __future__ import annotations

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

from sandkeeper.localcluster.apiserver import Kubectl
from sandkeeper.localcluster.cluster import OPERATOR, LocalCluster

Object = dict[str, Any]
Right = tuple[str, str, str]
"""API group, resource (with its subresource), verb."""

MANIFESTS = Path(__file__).parents[1] / "manifests"
SYSTEM, NODE = "sandkeeper-system", "sandkeeper-node"
OPERATOR_ACCOUNT, SHIM_ACCOUNT = "sandkeeper-operator", "sandkeeper-shim"
_AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "Metadata", "userGroups": [f"system:serviceaccounts:{SYSTEM}"]},
        {"level": "None"},
    ],
}


@dataclass(frozen=True, slots=True)
class Installed:
    """`local` has one node with real containers and no operator; `manifests/` is applied."""

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
        account = self.as_bearer(self.token(SYSTEM, OPERATOR_ACCOUNT), "operator")
        settings = {"KUBECONFIG": str(account.kubeconfig), "GARBAGE_INTERVAL": "0.5", "GARBAGE_MIN_AGE": "0"}
        self.local.start_operator(env={**settings, **env})
        self.kubectl("wait", "sandboxnodes", "--all", "--for=condition=Ready", "--timeout=60s")

    def until_operator_may_list(self, namespace: str, *, may: bool) -> None:
        """Rights act a moment after they were given or taken."""
        user = f"system:serviceaccount:{SYSTEM}:{OPERATOR_ACCOUNT}"
        ask = ("auth", "can-i", "list", "sandboxes.sandkeeper.dev", "-n", namespace, "--as", user)
        eventually(lambda: (self.kubectl.run(*ask).returncode == 0) is may, timeout=60)

    def stop_operator(self) -> None:
        self.local.processes.stop(OPERATOR)

    def requests(self) -> list[Object]:
        """What the operator asked of the API server, as that has it in its audit log."""
        user = f"system:serviceaccount:{SYSTEM}:{OPERATOR_ACCOUNT}"
        whole, _, _ = self.audit.read_text().rpartition("\n")  # a line may be in the making
        events = [json.loads(line) for line in whole.splitlines()]
        return [each for each in events if each["user"]["username"] == user]

    def used(self) -> set[Right]:
        """The rights that those requests needed."""
        return {right(each["objectRef"], each["verb"]) for each in self.requests() if "objectRef" in each}

    def refused(self) -> list[str]:
        """Of those requests the ones that the API server forbade."""
        return [
            f"{each['verb']} {each['requestURI']}"
            for each in self.requests()
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
def installed() -> Iterator[Installed]:
    """Manifests applied, one shim, no operator; nothing left of it."""
    folder = Path(tempfile.mkdtemp(prefix="sbx-"))  # short: sockets lie below
    local, audit = LocalCluster(folder), folder / "audit.log"
    (folder / "audit.yaml").write_text(yaml.safe_dump(_AUDIT))
    local.api.flags = (f"--audit-policy-file={folder / 'audit.yaml'}", f"--audit-log-path={audit}")
    try:
        local.up(tied=True, shims=1, engine="oci", operator=False)
        found = Installed(local, audit)
        found.apply()
        yield found
    finally:
        local.down()
        shutil.rmtree(folder, ignore_errors=True)
