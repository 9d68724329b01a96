"""Every command of docs/gitops.md, run as it stands there, from the root of the repository."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.argocd import CONFIG_MAP
from tests.flux import Delivery
from tests.gitserver import GitServer
from tests.sandboxes import Sandboxes

from sandkeeper.localcluster.cluster import LocalCluster
from sandkeeper.localcluster.watching import manifest

pytestmark = [pytest.mark.cluster, pytest.mark.oci, pytest.mark.gitops]

ROOT = Path(__file__).parents[2]


def commands(section: str) -> list[str]:
    """The commands of a section: lines that are set off and begin with `kubectl`."""
    text = (ROOT / "docs" / "gitops.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return [line.strip() for line in text.splitlines() if line.startswith("    kubectl ")]


def shell(local: LocalCluster, command: str) -> str:
    """Its output."""
    kubectl = local.api.tools["kubectl"].path
    environment = {
        "PATH": os.pathsep.join((str(kubectl.parent), os.environ["PATH"])),
        "HOME": str(local.folder),
        "KUBECONFIG": str(local.kubeconfig),
    }
    result = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{command}: {result.stderr}"
    return result.stdout


def test_every_command_belongs_to_one_of_these_tests() -> None:
    page = (ROOT / "docs" / "gitops.md").read_text()
    assert page.count("\n    kubectl ") == len(commands("Flux")) + len(commands("Argo CD"))


@pytest.fixture
def flux_system(server: GitServer, local: LocalCluster) -> Iterator[Delivery]:
    """Of the page's own namespace, and for the namespace `default`."""
    local.kubectl("create", "namespace", "flux-system")
    made = Delivery(local.kubectl, "flux-system", server.repository("flux-system"))
    try:
        yield made
    finally:
        made.delete()


def test_flux(flux_system: Delivery, local: LocalCluster) -> None:
    sandboxes = Sandboxes(local.kubectl, "default")
    flux_system.repository.commit({"box.yaml": yaml.safe_dump(manifest("from-git", "sleep", "86400"))})
    apply, *others = commands("Flux")
    shell(local, apply)
    local.kubectl(  # "put in your repository's address"
        *("-n", "flux-system", "patch", "gitrepository", "sandboxes", "--type=merge", "-p"),
        json.dumps({"spec": {"url": flux_system.repository.url}}),
    )
    printed = "\n".join(shell(local, command) for command in others)
    assert "Applied revision: main@sha1:" in printed
    assert "from-git" in printed
    flux_system.delete()
    sandboxes.until_gone("from-git")


def test_argo_cd(server: GitServer, local: LocalCluster) -> None:
    """Argo CD itself is not here; its API's schema is, and takes what we say."""
    local.kubectl("create", "namespace", "argocd")
    theirs = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "argocd-cm", "namespace": "argocd"},
    }
    local.kubectl("apply", "-f", "-", input=json.dumps({**theirs, "data": {"url": "https://argocd.example"}}))
    for command in commands("Argo CD"):
        shell(local, command)
    found = json.loads(local.kubectl("-n", "argocd", "get", "configmap", "argocd-cm", "-o", "json"))["data"]
    assert found == {"url": "https://argocd.example", **yaml.safe_load(CONFIG_MAP.read_text())["data"]}
    assert "sandboxes" in local.kubectl("-n", "argocd", "get", "applications.argoproj.io", "-o", "name")
