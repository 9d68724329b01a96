"""The containerds of the tests: each starts, runs a container, is found again after a kill, and leaves nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.containerds import containerd, import_images
from tests.images import busybox_image

from sandkeeper.localcluster.containerd_sources import SOURCES, Source
from sandkeeper.localcluster.processes import start_time

pytestmark = [pytest.mark.oci]

IMAGE = "example.test/busybox:1"


@pytest.mark.parametrize("source", SOURCES)
def test_a_container_outlives_its_containerd_and_not_its_harness(source: Source) -> None:
    group = f"harness-{source}-{os.getpid()}"
    with containerd(source, cgroups=(group,)) as it:
        import_images(it, {IMAGE: busybox_image()}, group)
        it.ctr("run", "--detach", IMAGE, "one", "sleep", "600", namespace=group)
        (pid,) = running(it.ctr("tasks", "list", namespace=group))
        it.kill()
        assert start_time(int(pid)) is not None
        it.start()
        it.restart()
        assert running(it.ctr("tasks", "list", namespace=group)) == [pid]
        assert it.shims()
        assert it.mounts()
        folder, cgroups = it.folder, list(Path("/sys/fs/cgroup").glob(f"**/{group}"))
        assert cgroups
    assert not folder.exists()
    assert start_time(int(pid)) is None
    assert not [each for each in cgroups if each.exists()]


def running(listing: str) -> list[str]:
    """The pids in `ctr tasks list`: NAME, PID, STATUS."""
    return [line.split()[1] for line in listing.splitlines()[1:] if line.split()[2] == "RUNNING"]
