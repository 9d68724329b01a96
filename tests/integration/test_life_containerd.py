"""Sandboxes as users make them, on a node whose shim has the containerd engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.cluster import fresh_namespace, leaks_of, whole_cluster
from tests.containerds import containerd
from tests.images import Registry
from tests.images import registry as serving
from tests.sandboxes import Sandboxes

from sandkeeper.localcluster.cluster import LocalCluster
from sandkeeper.localcluster.containerd import Containerd
from sandkeeper.localcluster.ocilayout import busybox_image
from sandkeeper.localcluster.watching import manifest

pytestmark = [pytest.mark.cluster, pytest.mark.oci]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with serving(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def daemon() -> Iterator[Containerd]:
    with containerd() as made:
        yield made


@pytest.fixture(scope="module")
def local(registry: Registry, daemon: Containerd) -> Iterator[LocalCluster]:
    shim = {
        "CONTAINERD__SOCKET": str(daemon.socket),
        "OCI__INSECURE_REGISTRIES": f'["{registry.host}"]',
        "OCI__RUNTIMES": '["runc"]',
    }
    with whole_cluster(shims=1, engine="containerd", shim_env=shim) as made:
        yield made
        leaks_of(made, 0).assert_none()
        left = daemon.ctr("containers", "list", "--quiet", namespace=made.cgroup_parent(0))
        assert not left.split()
        assert not daemon.shims()


@pytest.fixture
def there(local: LocalCluster) -> Iterator[Sandboxes]:
    with fresh_namespace(local.kubectl) as name:
        yield Sandboxes(local.kubectl, name)


def test_an_image_from_a_registry_becomes_containerds(
    there: Sandboxes, local: LocalCluster, registry: Registry, daemon: Containerd
) -> None:
    reference = registry.push("tools/busybox:1", busybox_image())
    body = manifest("pulled")
    body["spec"]["containers"][0]["image"] = reference
    there.apply(body)
    status = there.until_ready("pulled")["status"]
    assert status["runtime"] == "runc"
    assert status["containers"][0]["imageID"].startswith("sha256:")
    names = daemon.ctr("images", "list", "--quiet", namespace=local.cgroup_parent(0))
    assert reference in names.split()


def test_a_sandbox_does_not_notice_a_restart_of_containerd(there: Sandboxes, daemon: Containerd) -> None:
    there.make("box", "sleep", "1000")
    before = there.until_ready("box")["status"]
    daemon.kill()
    daemon.start()
    there.make("later", "sh", "-c", "exit 0")
    there.until("later", lambda seen: seen.get("status", {}).get("exitReason") == "Completed")
    after = there.status("box")
    assert (after["instance"], after["pid"]) == (before["instance"], before["pid"])
