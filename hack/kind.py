#!/usr/bin/env python3
"""Sandkeeper on a cluster of kind's, for trying and for tests: `make kind-up`, `make kind-test`, `make kind-down`.

kind is the one that gomodules/kind pins; the cluster is kind-config.yaml's, its kubeconfig build/kind/kubeconfig.
kind makes nodes of Docker's containers: without Docker there is `make e2e`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from sandkeeper.localcluster import binaries, gobuild
from sandkeeper.localcluster.apiserver import Kubectl, KubectlError
from sandkeeper.localcluster.binaries import BinariesError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "kind-config.yaml"
FOLDER = ROOT / "build" / "kind"
KUBECONFIG = FOLDER / "kubeconfig"
ARCHIVE = ROOT / "build" / "sandkeeper.tar"
MANIFESTS = ROOT / "manifests"
SYSTEM, NODES = "sandkeeper-system", "sandkeeper-node"
BODIES = ("tests/integration/test_life.py",)
NO_DOCKER = (
    "kind: no Docker answers here, and kind makes its nodes of Docker's containers.\n"
    "  To have it: apt-get install docker.io, or https://docs.docker.com/engine/install; `docker info` must work.\n"
    "  Without Docker: `make e2e` runs a Kubernetes of one node, kubelet and all, and the same tests."
)
SECONDS = 300
WAIT = f"--timeout={SECONDS}s"


def up(kind: Path) -> None:
    """A cluster with this tree's image and manifests, all of it Ready. Again: brings what has changed."""
    made = make_cluster(kind)
    run(sys.executable, str(ROOT / "hack" / "image.py"), "--output", str(ARCHIVE))
    run(str(kind), "load", "image-archive", str(ARCHIVE), "--name", name())
    install(kubectl(), again=not made)
    say(
        f"export KUBECONFIG={KUBECONFIG.relative_to(ROOT)}    # then: kubectl get sandboxnodes; make kind-test"
    )


def make_cluster(kind: Path) -> bool:
    """Whether it was made now, and not there already."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    there = name() in run(str(kind), "get", "clusters", show=False).split()
    if there:
        run(str(kind), "export", "kubeconfig", "--name", name(), "--kubeconfig", str(KUBECONFIG))
    else:
        run(
            *(str(kind), "create", "cluster", "--config", str(CONFIG)),
            *("--kubeconfig", str(KUBECONFIG), "--wait", "300s"),
        )
    return not there


def install(
    cluster: Kubectl, *, again: bool = False, overlay: Path = MANIFESTS / "overlays" / "kind"
) -> None:
    """As docs/install.md says. again: new Pods even where the manifests are the same, for the image is not."""
    say(cluster("apply", "--server-side", "-k", str(overlay)))
    pods = ((SYSTEM, "deployment/sandkeeper-operator"), (NODES, "daemonset/sandkeeper-shim"))
    for namespace, each in pods:
        if again:
            cluster("-n", namespace, "rollout", "restart", each)
        say(cluster("-n", namespace, "rollout", "status", each, WAIT))
    # No shim is on the control plane: it is tainted. The others write their SandboxNodes themselves. (kubectl has
    # `wait --for=create` from 1.31 on.)
    deadline = time.monotonic() + SECONDS
    for node in cluster("get", "nodes", "-l", "!node-role.kubernetes.io/control-plane", "-o", "name").split():
        while cluster.run("get", f"sandbox{node}").returncode != 0:
            if time.monotonic() > deadline:
                sys.exit(f"kind: no sandbox{node}: see kubectl -n {NODES} logs daemonset/sandkeeper-shim")
            time.sleep(1)
    say(cluster("wait", "sandboxnodes", "--all", "--for=condition=Ready", WAIT))


def test(arguments: list[str]) -> int:
    """The tests' exit code."""
    if not KUBECONFIG.exists():
        sys.exit("kind: there is no cluster of `make kind-up`")
    environment = {
        "SANDKEEPER_TEST_KUBECONFIG": str(KUBECONFIG),
        "SANDKEEPER_TEST_CONTEXT": f"kind-{name()}",
        "SANDKEEPER_TEST_ON_NODE": "docker exec {node}",
    }
    argv = [sys.executable, "-m", "pytest", *BODIES, *arguments]
    return subprocess.run(argv, cwd=ROOT, env=os.environ | environment, check=False).returncode


def down(kind: Path) -> None:
    """Nothing of it is left. Repeatable."""
    run(str(kind), "delete", "cluster", "--name", name(), "--kubeconfig", str(KUBECONFIG))
    shutil.rmtree(FOLDER, ignore_errors=True)


def name() -> str:
    return str(yaml.safe_load(CONFIG.read_text())["name"])


def kubectl() -> Kubectl:
    return Kubectl(binaries.ensure(("kubectl",))["kubectl"].path, KUBECONFIG, context=f"kind-{name()}")


def run(*argv: str, show: bool = True) -> str:
    """Runs it in the root of the tree, for kind-config.yaml's paths are from there; its output where it is not shown.
    Ends the program when it fails."""
    done = subprocess.run(
        argv,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=None if show else subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"kind: {' '.join(argv)} failed")
    return done.stdout or ""


def say(text: str) -> None:
    sys.stdout.write(f"{text.rstrip()}\n")


def docker_answers() -> bool:
    """Its client is often there where no Docker is."""
    try:
        done = subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("up", "test", "down"))
    given, arguments = parser.parse_known_args()
    if not docker_answers():
        sys.exit(NO_DOCKER)
    try:
        if given.command == "test":
            sys.exit(test(arguments))
        kind = binaries.built("kind", gobuild.KIND, say=say)
        up(kind) if given.command == "up" else down(kind)
    except (BinariesError, KubectlError) as error:
        sys.exit(f"kind: {error}")


if __name__ == "__main__":
    main()
