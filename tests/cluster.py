"""The cluster that tests talk to: a local one made for the session, or any that the developer names.

SANDKEEPER_TEST_KUBECONFIG names a kubeconfig (SANDKEEPER_TEST_CONTEXT one of its contexts). Tests create and
delete freely, so only contexts whose name says that they are for it are taken. What asks for `cluster` needs its API
server alone; what asks for `sandboxes` needs Sandkeeper on it, installed, with busybox:1.37 at hand; what asks for
`local` is skipped there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tests.leaks import Leaks

from sandkeeper.localcluster import binaries
from sandkeeper.localcluster.apiserver import ApiServer, Kubectl, KubectlError, apply_crds
from sandkeeper.localcluster.cluster import LocalCluster
from sandkeeper.localcluster.processes import Processes

KUBECONFIG = "SANDKEEPER_TEST_KUBECONFIG"
CONTEXT = "SANDKEEPER_TEST_CONTEXT"
ALLOWED_PREFIXES = ("kind-", "sandkeeper")


@dataclass(frozen=True, slots=True)
class TestCluster:
    """kubeconfig: its path. kubectl: called with kubectl's arguments (and input=, check=), returns its output."""

    __test__ = False

    kubeconfig: Path
    kubectl: Kubectl


def named() -> str:
    """The kubeconfig that the developer names; empty where it is to be a local cluster."""
    return os.environ.get(KUBECONFIG, "")


def named_context(path: Path, context: str = "") -> str:
    """The context to use of a developer's kubeconfig. Raises ValueError for one that is not for tests."""
    name = str(context or yaml.safe_load(path.read_text()).get("current-context") or "")
    if not name.startswith(ALLOWED_PREFIXES):
        raise ValueError(f"context {name!r} of {path} must start with one of {', '.join(ALLOWED_PREFIXES)}")
    return name


@contextlib.contextmanager
def plain_cluster() -> Iterator[TestCluster]:
    """An API server with our CRDs; no shim, no operator."""
    if given := named():
        path = Path(given).resolve()
        context = named_context(path, os.environ.get(CONTEXT, ""))
        with tempfile.TemporaryDirectory(prefix="sandkeeper-test-") as folder:
            tools = binaries.ensure(("kubectl",))
            kubectl = Kubectl(tools["kubectl"].path, path, context=context, cache=Path(folder))
            apply_crds(kubectl)
            yield TestCluster(path, kubectl)
        return
    folder = Path(tempfile.mkdtemp(prefix="sandkeeper-test-"))
    server = ApiServer(folder, Processes(folder))
    try:
        server.start(tied=True)
        server.wait()
        server.apply_crds()
        yield TestCluster(server.kubeconfig, server.kubectl)
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def whole_cluster(**options: Any) -> Iterator[LocalCluster]:
    """API server, shims and operator, and nothing left of them. options: as of LocalCluster.up."""
    folder = Path(tempfile.mkdtemp(prefix="sbx-"))  # short: sockets lie below
    local = LocalCluster(folder)
    try:
        local.up(tied=True, **options)
        yield local
    finally:
        local.down()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def fresh_namespace(kubectl: Kubectl) -> Iterator[str]:
    """A namespace of its own. What a test left in it is deleted afterwards."""
    name = f"test-{uuid.uuid4().hex[:10]}"
    kubectl("create", "namespace", name)
    try:
        yield name
    finally:
        kubectl("-n", name, "delete", "sandboxes", "--all", "--wait=false", "--ignore-not-found")
        try:
            eventually(lambda: not kubectl("-n", name, "get", "sandboxes", "-o", "name"), timeout=60)
        finally:
            kubectl("delete", "namespace", name, "--wait=false")


def eventually(
    condition: Callable[[], Any],
    *,
    timeout: float = 30.0,
    every: float = 0.05,
    seen: Callable[[], Any] | None = None,
) -> Any:
    """The first true answer of `condition`. Raises AssertionError at the deadline, with what `seen` says."""
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s" + (f"; seen: {seen()}" if seen else ""))
        time.sleep(every)
    return answer


def leaks_of(local: LocalCluster, index: int) -> Leaks:
    """What sandboxes may have left on a node; its shim may live."""
    node = local.nodes[index]
    pid = local.status()[node]
    ignore = () if pid is None else (pid,)
    return Leaks(local.node_folder(index), local.cgroup_parent(index), ignore, local.run_folder(index))


def condition_of(sandbox: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A condition of an object, {} where it has none of that type."""
    conditions = sandbox.get("status", {}).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind), {})


__all__ = [
    "KubectlError",
    "TestCluster",
    "condition_of",
    "eventually",
    "fresh_namespace",
    "leaks_of",
    "named",
    "plain_cluster",
    "whole_cluster",
]
