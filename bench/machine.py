"""What was measured, and on what: versions, machine, commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from sandkeeper import __version__
from sandkeeper.localcluster import gobuild
from sandkeeper.localcluster.cluster import LocalCluster

ROOT = Path(__file__).resolve().parents[1]


def versions(cluster: LocalCluster) -> dict[str, str]:
    """Of what runs; the runtimes' only where the shim has any."""
    with cluster.shim(0) as shim:
        info = shim.info()
    found = {
        "sandkeeper": __version__,
        "python": platform.python_version(),
        "etcd": first_line(str(cluster.api.tools["etcd"].path), "--version"),
        "kube-apiserver": _api_version(cluster),
    }
    if info.engine == "oci":
        found |= {each.name: each.version for each in info.runtimes if each.ready}
        found["conmon"] = first_line(program("conmon"), "--version")
    return found


def machine() -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "kernel": platform.release(),
        "architecture": platform.machine(),
    }


def commit() -> str:
    """The checkout's, with `+` where something of it is changed; empty outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return ""
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def load() -> float:
    """The load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"bench: {name} is not in PATH")
    return found


def first_line(*command: str) -> str:
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/", timeout=30)
    return answer.stdout.splitlines()[0].strip()


def _api_version(cluster: LocalCluster) -> str:
    said = first_line(str(cluster.api.tools["kube-apiserver"].path), "--version")
    if "$Format" not in said:
        return said
    # Built here from its Go module, which knows its version only by go.mod.
    pins = (gobuild.MODULE / "go.mod").read_text().split()
    return f"Kubernetes {pins[pins.index('k8s.io/kubernetes') + 1]} (built from its module)"
