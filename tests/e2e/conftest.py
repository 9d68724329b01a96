"""A Kubernetes of one node for all tests here, and the proof that nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.images import busybox_image
from tests.leaks import Leaks

from sandkeeper.localcluster.onenode import OneNode

BUSYBOX = "sandkeeper.test/busybox:1"


@pytest.fixture(scope="session")
def node() -> Iterator[OneNode]:
    """One node for all."""
    with fresh_node() as made:
        yield made


@contextlib.contextmanager
def fresh_node(**options: Any) -> Iterator[OneNode]:
    """One node that is Ready, with busybox at hand. At its end the machine is as it was."""
    if os.geteuid() != 0:
        pytest.skip("a node needs root")
    before = _machine()
    made = OneNode(say=lambda line: print(line, file=sys.stderr), **options)
    with made:
        made.import_images({BUSYBOX: busybox_image()})
        yield made
    assert not made.folder.exists(), f"left behind: {made.folder}"
    Leaks(made.folder, made.cgroup).assert_none(60)
    left = [str(each) for each in Path("/sys/fs/cgroup").glob(f"*/{made.cgroup}")]
    assert not left, f"left behind: {left}"
    assert _machine() == before


def _machine() -> dict[str, str]:
    """What kubelet, CNI and containerd would change on a machine that they have to themselves."""
    interfaces = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    names = " ".join(sorted(line.split()[0] for line in interfaces.splitlines() if " cni" in f" {line}"))
    files = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys")
    found = {name: Path("/proc/sys", name).read_text() for name in files}
    for folder in ("/var/lib/kubelet", "/var/lib/cni", "/var/log/pods", "/etc/cni", "/run/containerd/s"):
        found[folder] = str(sorted(Path(folder).glob("*")))
    return {**found, "interfaces": names}
