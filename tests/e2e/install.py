"""Sandkeeper on a node as a user installs it: the image, `kubectl apply -k manifests/`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.cluster import eventually
from tests.images import busybox_image, write_layout

from sandkeeper.localcluster.apiserver import Kubectl
from sandkeeper.localcluster.cluster import OFFLINE_IMAGE
from sandkeeper.localcluster.onenode import NODE, OneNode

ROOT = Path(__file__).parents[2]
SYSTEM, NODES = "sandkeeper-system", "sandkeeper-node"
IMAGE = "SANDKEEPER_TEST_IMAGE"
# The first test waits for all of Kubernetes, and builds the image where it is not named.
PATIENCE = pytest.mark.timeout(500 if os.environ.get(IMAGE) else 1800)
LAYOUTS = "/var/lib/sandkeeper/layouts"


@dataclass(frozen=True, slots=True)
class Installation:
    node: OneNode

    @property
    def kubectl(self) -> Kubectl:
        """As administrator."""
        return self.node.kubectl

    def roll(self, kind: str) -> None:
        """Waits until what is asked for of the operator (deployment) or the shims (daemonset) runs."""
        namespace, name = (SYSTEM, "operator") if kind == "deployment" else (NODES, "shim")
        self.kubectl("-n", namespace, "rollout", "status", f"{kind}/sandkeeper-{name}", "--timeout=180s")

    def until_boot(self, boot_id: str) -> None:
        """Waits until the node's shim has told the operator that it runs since that boot."""
        wanted = {boot_id}
        path = "jsonpath={.items[*].status.bootID}"
        eventually(
            lambda: set(self.kubectl("get", "sandboxnodes", "-o", path, check=False).split()) == wanted,
            timeout=300,
            seen=self.why,
        )
        self.kubectl("wait", "sandboxnodes", "--all", "--for=condition=Ready", "--timeout=120s")

    def pods(self) -> dict[str, str]:
        """Name -> UID of the operator's and the shims' Pods."""
        found: list[dict[str, Any]] = []
        for namespace in (SYSTEM, NODES):
            found += json.loads(self.kubectl("-n", namespace, "get", "pods", "-o", "json"))["items"]
        return {each["metadata"]["name"]: each["metadata"]["uid"] for each in found}

    def why(self) -> str:
        """What to read when something does not become ready."""
        said = [self.kubectl("get", "pods", "-A", "-o", "wide", check=False)]
        for namespace in (SYSTEM, NODES):
            said.append(self.kubectl("-n", namespace, "describe", "pods", check=False)[-3000:])
            said.append(
                self.kubectl(
                    "-n", namespace, "logs", "--tail=20", "--all-containers", "-l", _OURS, check=False
                )
            )
        return "\n".join(said)


_OURS = "app.kubernetes.io/part-of=sandkeeper"


def image_archive(folder: Path) -> Path:
    """The image of this tree, built now, or the one that $SANDKEEPER_TEST_IMAGE names."""
    if named := os.environ.get(IMAGE):
        return Path(named).resolve()
    return build_image(folder / "sandkeeper.tar", ROOT)


def build_image(archive: Path, source: Path) -> Path:
    """The image of a tree, as it builds its own. Returns `archive`."""
    subprocess.run(
        [sys.executable, str(source / "hack" / "image.py"), "--output", str(archive)],
        check=True,
        env=os.environ | {"PYTHONPATH": str(source / "operator")},
    )
    return archive


def install(node: OneNode, archive: Path, manifests: Path = ROOT / "manifests") -> Installation:
    """All of it, Ready, by one apply: certificates and SandboxNodes make themselves."""
    made = Installation(node)
    kubectl = node.kubectl
    node.import_archive(archive)
    write_layout(node.outside(LAYOUTS), {OFFLINE_IMAGE: busybox_image()})  # there is no registry
    kubectl("apply", "--server-side", "-k", str(manifests))
    settings = [
        f"SANDKEEPER_SHIM_OCI__IMAGE_LAYOUTS={json.dumps([LAYOUTS])}",
        f"SANDKEEPER_SHIM_OCI__CGROUP_PARENT={node.sandboxes_cgroup}",
    ]
    kubectl("-n", NODES, "set", "env", "daemonset/sandkeeper-shim", *settings)
    try:
        made.roll("deployment")
        made.roll("daemonset")
        kubectl("wait", f"sandboxnode/{NODE}", "--for=create", "--timeout=60s")
        kubectl("wait", "sandboxnodes", "--all", "--for=condition=Ready", "--timeout=120s")
    except Exception as error:
        raise AssertionError(f"{error}\n{made.why()}") from error
    return made
