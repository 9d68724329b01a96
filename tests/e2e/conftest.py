"""A Kubernetes of one node for all tests here, and the proof that nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster import fresh_namespace
from tests.e2e.install import Installation, image_archive, install
from tests.e2e.remains import cgroups
from tests.images import busybox_image
from tests.leaks import Leaks
from tests.sandboxes import Sandboxes

from sandkeeper.localcluster.apiserver import NotReady
from sandkeeper.localcluster.containerd import ContainerdFailed
from sandkeeper.localcluster.namespaces import NamespacesFailed
from sandkeeper.localcluster.onenode import OneNode
from sandkeeper.localcluster.processes import ProcessDied

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
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(made)
        except (ContainerdFailed, NamespacesFailed, NotReady, ProcessDied) as error:
            if os.environ.get("SANDKEEPER_TEST_NODE") != "optional":
                raise
            # Nothing of ours is at work yet.
            pytest.skip(f"no node of Kubernetes becomes ready on this machine: {error}")
        made.import_images({BUSYBOX: busybox_image()})
        yield made
    assert not made.folder.exists(), f"left behind: {made.folder}"
    Leaks(made.folder, made.cgroup).assert_none(60)
    left = [str(each) for each in cgroups(f"{made.cgroup}*")]
    assert not left, f"left behind: {left}"
    assert _machine() == before


@pytest.fixture(scope="session")
def installation(node: OneNode, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Sandkeeper on the node, by the manifests and the image of this tree."""
    return install(node, image_archive(tmp_path_factory.mktemp("image")))


@pytest.fixture
def sandboxes(installation: Installation) -> Iterator[Sandboxes]:
    """What a user does in a namespace of their own."""
    with fresh_namespace(installation.kubectl) as name:
        yield Sandboxes(installation.kubectl, name)


def _machine() -> dict[str, str]:
    """What kubelet and our manifests would leave on a machine that they have to themselves."""
    files = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys")
    folders = ("/var/lib/kubelet", "/var/lib/sandkeeper", "/var/log/pods", "/etc/sandkeeper")
    return {
        **{name: Path("/proc/sys", name).read_text() for name in files},
        **{name: str(sorted(Path(name).glob("*"))) for name in folders},
    }
