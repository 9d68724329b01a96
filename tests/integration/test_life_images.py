"""Sandboxes whose images come from a real registry on loopback."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.cluster import fresh_namespace, leaks_of, whole_cluster
from tests.images import Registry
from tests.images import registry as serving
from tests.sandboxes import Sandboxes

from sandkeeper.localcluster.cluster import LocalCluster
from sandkeeper.localcluster.ocilayout import busybox_image
from sandkeeper.localcluster.watching import manifest

pytestmark = [pytest.mark.cluster, pytest.mark.oci]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with serving(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def pulling(registry: Registry) -> Iterator[LocalCluster]:
    """A node that may reach that registry without TLS."""
    with whole_cluster(shim_env={"OCI__INSECURE_REGISTRIES": f'["{registry.host}"]'}) as local:
        yield local
        leaks_of(local, 0).assert_none()


@pytest.fixture
def there(pulling: LocalCluster) -> Iterator[Sandboxes]:
    with fresh_namespace(pulling.kubectl) as name:
        yield Sandboxes(pulling.kubectl, name)


def of_image(name: str, image: str, policy: str = "IfNotPresent") -> dict[str, object]:
    body = manifest(name)
    body["spec"]["containers"][0] |= {"image": image, "imagePullPolicy": policy}
    return body


def test_an_image_is_pulled_once_by_tag_and_by_digest(there: Sandboxes, registry: Registry) -> None:
    reference = registry.push("tools/busybox:1", busybox_image())
    there.apply(of_image("first", reference))
    digest = there.until_ready("first")["status"]["containers"][0]["imageID"]
    assert digest.startswith("sha256:")
    pinned = f"{registry.host}/tools/busybox@{digest}"
    there.apply(of_image("second", pinned))
    there.until_ready(
        "second"
    )  # another name: whether it is trusted is asked anew, nothing is unpacked again
    downloads = registry.blob_downloads()
    for name, image in (("third", pinned), ("fourth", reference)):
        there.apply(of_image(name, image))
        assert there.until_ready(name)["status"]["containers"][0]["imageID"] == digest
    assert registry.blob_downloads() == downloads


def test_a_new_image_is_another_instance(there: Sandboxes, registry: Registry) -> None:
    for tag in ("1", "2"):
        registry.push(f"tools/rolled:{tag}", busybox_image())
    there.apply(of_image("box", f"{registry.host}/tools/rolled:1"))
    there.until_instance("box", 1)
    there.apply(of_image("box", f"{registry.host}/tools/rolled:2"))
    there.until_instance("box", 2)


def test_one_that_comes_late_is_waited_for(there: Sandboxes, registry: Registry) -> None:
    """ErrImagePull is no end: it is tried again, and goes on when the image is there."""
    there.apply(of_image("box", f"{registry.host}/tools/late:1"))
    there.until_reason("box", "ErrImagePull", "ImagePullBackOff")
    registry.push("tools/late:1", busybox_image())
    assert there.until_ready("box")["status"]["instance"] == 1
