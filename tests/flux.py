"""Flux's two controllers as plain processes against a local cluster, and a delivery: a repository, a namespace, and
what Flux does between them. Nothing of Flux is ours: programs and CRDs are upstream's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster import condition_of, eventually
from tests.gitserver import GitServer, Repository
from tests.sandboxes import Sandboxes

from sandkeeper.localcluster import gitops_sources
from sandkeeper.localcluster.apiserver import Kubectl, apply_crds, free_ports
from sandkeeper.localcluster.cluster import LocalCluster
from sandkeeper.localcluster.processes import Processes

Object = dict[str, Any]

MANIFEST = Path(__file__).parents[1] / "manifests" / "flux" / "sandboxes.yaml"
REQUESTED = "reconcile.fluxcd.io/requestedAt"  # what `flux reconcile` sets
TIMEOUT = 120.0
"""Seconds. A health check of Flux looks every 5 s."""


@contextlib.contextmanager
def flux(local: LocalCluster) -> Iterator[None]:
    """Both controllers run, and have all that they ask the cluster for."""
    found = gitops_sources.find()
    if found is None:
        pytest.skip("Flux is built by `make gitops`")
    apply_crds(local.kubectl, "\n---\n".join(path.read_text() for path in found.crds))
    folder = Path(tempfile.mkdtemp(prefix="sandkeeper-flux-"))
    processes = Processes(folder)
    artifacts, *health = free_ports(3)
    storage = ["--storage-path", f"{folder}/artifacts"]
    storage += [f"--{flag}=127.0.0.1:{artifacts}" for flag in ("storage-addr", "storage-adv-addr")]
    try:
        for (name, program), port in zip(found.flux.items(), health, strict=True):
            scratch = folder / name
            scratch.mkdir()
            (folder / "artifacts").mkdir(exist_ok=True)
            argv = [str(program), f"--health-addr=127.0.0.1:{port}", "--metrics-addr=0"]
            environment = {
                "PATH": os.defpath,
                "HOME": str(scratch),
                "TMPDIR": str(scratch),
                "KUBECONFIG": str(local.kubeconfig),
                "RUNTIME_NAMESPACE": "flux-system",
            }
            argv += storage if name == "source-controller" else []
            processes.spawn(name, argv, env=environment, tied=True)
        for name, port in zip(found.flux, health, strict=True):
            eventually(
                lambda n=name, p=port: _ready(processes, n, f"http://127.0.0.1:{p}/readyz"),
                timeout=TIMEOUT,
                seen=lambda n=name: processes.tail(n),
            )
        yield
    finally:
        for name in found.flux:
            processes.stop(name)
        shutil.rmtree(folder)


def _ready(processes: Processes, name: str, url: str) -> bool:
    processes.check(name)
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - loopback
            return True
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        pass
    return False


@dataclass(frozen=True, slots=True)
class Delivery:
    """manifests/flux/sandboxes.yaml for one repository and one namespace, which has the name of both objects.

    Methods that wait return the Kustomization as it then was, and raise AssertionError with what was seen last.
    """

    kubectl: Kubectl
    namespace: str
    repository: Repository

    @property
    def sandboxes(self) -> Sandboxes:
        return Sandboxes(self.kubectl, self.namespace)

    def commit(self, *manifests: Object) -> str:
        """The repository holds these and no others, and Flux is told so; returns the revision."""
        files = {f"{index}.yaml": yaml.safe_dump(each) for index, each in enumerate(manifests)}
        # Without any file there would be no artifact to take them away.
        revision = self.repository.commit({"README.md": "Sandboxes\n", **files})
        if self.exists:
            self._ask("gitrepository")
        return revision

    def deliver(self, **spec: Any) -> None:
        """Applies the manifest. spec: of the Kustomization, beyond what it has."""
        documents = list(yaml.safe_load_all(MANIFEST.read_text()))
        for each in documents:
            each["metadata"]["namespace"] = self.namespace
        source, kustomization = documents
        source["spec"]["url"] = self.repository.url
        kustomization["spec"] |= {"targetNamespace": self.namespace, **spec}
        self.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(documents))

    @property
    def exists(self) -> bool:
        return bool(self._run("get", "gitrepository", "sandboxes", "-o", "name", "--ignore-not-found"))

    def reconcile(self) -> Object:
        """One more pass over what was applied already, to its end."""
        token = self._ask("kustomization")
        return self.until(
            lambda body: body["status"].get("lastHandledReconcileAt") == token and _settled(body)
        )

    def until_applied(self, revision: str) -> Object:
        """The revision is applied, and all of it is well."""
        return self.until(
            lambda body: (
                body.get("status", {}).get("lastAppliedRevision") == revision
                and _settled(body)
                and condition_of(body, "Ready")["status"] == "True"
            )
        )

    def until_failed(self, revision: str) -> Object:
        """The revision was tried, and Flux has given up on it until the next retry."""
        return self.until(
            lambda body: (
                body.get("status", {}).get("lastAttemptedRevision") == revision
                and _settled(body)
                and condition_of(body, "Ready")["status"] == "False"
            )
        )

    def until(self, wanted: Callable[[Object], Any]) -> Object:
        """The first state of the Kustomization that is wanted."""
        seen: list[Object] = [{}]

        def look() -> bool:
            seen[0] = json.loads(self._run("get", "kustomization", "sandboxes", "-o", "json"))
            return bool(wanted(seen[0]))

        eventually(look, timeout=TIMEOUT, every=0.2, seen=lambda: json.dumps(seen[0].get("status"), indent=1))
        return seen[0]

    def delete(self) -> None:
        """Takes the Kustomization and all that it applied away; returns when all is gone."""
        self._run("delete", "kustomization", "sandboxes", "--ignore-not-found", f"--timeout={TIMEOUT:g}s")
        self._run("delete", "gitrepository", "sandboxes", "--ignore-not-found", f"--timeout={TIMEOUT:g}s")

    def _ask(self, kind: str) -> str:
        token = uuid.uuid4().hex
        self._run("annotate", "--overwrite", kind, "sandboxes", f"{REQUESTED}={token}")
        return token

    def _run(self, *args: str) -> str:
        return self.kubectl("-n", self.namespace, *args)


@contextlib.contextmanager
def delivery(local: LocalCluster, server: GitServer, namespace: str) -> Iterator[Delivery]:
    """A repository for a namespace, not delivered yet, and nothing of it left."""
    made = Delivery(local.kubectl, namespace, server.repository(namespace))
    try:
        yield made
    finally:
        made.delete()


def _settled(body: Object) -> bool:
    """A pass over this generation has ended: Ready is Unknown within one. (status.observedGeneration is set only where
    one has succeeded.)"""
    ready = condition_of(body, "Ready")
    current = ready.get("observedGeneration") == body["metadata"]["generation"]
    return current and ready["status"] in ("True", "False")
