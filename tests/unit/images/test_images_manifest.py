"""Manifests, indexes, platforms and image configurations."""

import json
from typing import Any

import pytest

from sandkeeper.shim.engines.oci.images import manifest
from sandkeeper.shim.engines.oci.images.manifest import Descriptor, Manifest, ManifestError, Platform
from sandkeeper.shim.engines.oci.images.types import ImageConfig

D = "sha256:" + "a" * 64
AMD64 = Platform("linux", "amd64", ("", "v1"))
ARM = Platform("linux", "arm", ("v7", "v6", "v5", ""))


def entry(architecture: str, variant: str = "", os: str = "linux", digit: str = "b") -> Descriptor:
    where = {"os": os, "architecture": architecture} | ({"variant": variant} if variant else {})
    return Descriptor(manifest.OCI_MANIFEST, "sha256:" + digit * 64, 1, {}, where)


def descriptor(**extra: Any) -> dict[str, Any]:
    return {"mediaType": "x", "digest": D, "size": 3, **extra}


def test_a_manifest_is_read() -> None:
    document = {"schemaVersion": 2, "config": descriptor(size=1), "layers": [descriptor(), descriptor()]}
    parsed = manifest.parse(json.dumps(document).encode())
    assert isinstance(parsed, Manifest)
    assert parsed.size == 7
    assert parsed.blobs == (D, D, D)


def test_an_index_is_read() -> None:
    document = {"schemaVersion": 2, "mediaType": manifest.DOCKER_LIST, "manifests": [descriptor()]}
    assert manifest.parse(json.dumps(document).encode()) == (Descriptor("x", D, 3),)


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"schemaVersion": 1, "fsLayers": []},
        {"schemaVersion": 2},
        {"schemaVersion": 2, "mediaType": "text/html", "layers": []},
        {"schemaVersion": 2, "mediaType": manifest.OCI_INDEX},
        {"schemaVersion": 2, "layers": []},
        {"schemaVersion": 2, "layers": [], "config": "x"},
        {"schemaVersion": 2, "layers": {}, "config": descriptor()},
        {"schemaVersion": 2, "layers": [], "manifests": [], "config": descriptor()},
        {"schemaVersion": 2, "layers": [descriptor(digest="sha256:../../x")], "config": descriptor()},
        {"schemaVersion": 2, "layers": [descriptor(digest=7)], "config": descriptor()},
        {"schemaVersion": 2, "layers": [descriptor(size=-1)], "config": descriptor()},
        {"schemaVersion": 2, "layers": [descriptor(size="1")], "config": descriptor()},
        {"schemaVersion": 2, "layers": [descriptor(annotations=[1])], "config": descriptor()},
    ],
)
def test_what_is_no_manifest_is_refused(document: object) -> None:
    with pytest.raises(ManifestError):
        manifest.parse(json.dumps(document).encode())


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"{", b"[" * 100_000, b" " * (manifest.MAX_MANIFEST_BYTES + 1)]
)
def test_what_is_no_json_is_refused(content: bytes) -> None:
    with pytest.raises(ManifestError):
        manifest.parse(content)


@pytest.mark.parametrize(
    ("entries", "wanted", "chosen"),
    [
        ([entry("arm64"), entry("amd64", digit="c")], AMD64, 1),
        ([entry("amd64", "v1")], AMD64, 0),
        ([entry("amd64", "v1"), entry("amd64", digit="c")], AMD64, 1),
        ([entry("amd64", os="windows"), entry("amd64", digit="c")], AMD64, 1),
        ([entry("amd64", digit="c"), entry("amd64", digit="d")], AMD64, 0),
        ([entry("arm", "v5"), entry("arm", "v7", digit="c"), entry("arm", "v6")], ARM, 1),
        ([entry("arm", "v8"), entry("arm", "v6", digit="c")], ARM, 1),
        ([Descriptor("x", D, 1)], AMD64, 0),
        ([entry("unknown", os="unknown"), entry("amd64", digit="c")], AMD64, 1),
    ],
)
def test_the_platform_is_chosen(entries: list[Descriptor], wanted: Platform, chosen: int) -> None:
    assert manifest.choose(entries, wanted) is entries[chosen]


@pytest.mark.parametrize(
    "entries",
    [[], [entry("arm64")], [entry("amd64", "v3")], [entry("amd64", os="windows")], [entry("arm")] * 2],
)
def test_no_image_for_the_platform_is_said(entries: list[Descriptor]) -> None:
    with pytest.raises(ManifestError, match="linux/amd64"):
        manifest.choose(entries, AMD64)


def test_the_local_platform_is_linux() -> None:
    assert Platform.local().os == "linux"
    assert Platform.local().architecture


def test_an_image_configuration_is_read() -> None:
    config = ImageConfig.from_oci(
        {
            "config": {
                "Env": ["A=1"],
                "Entrypoint": ["/e"],
                "Cmd": None,
                "WorkingDir": "/w",
                "User": "1:2",
                "StopSignal": "SIGINT",
                "Labels": {"k": "v"},
            }
        }
    )
    assert config == ImageConfig(("A=1",), ("/e",), (), "/w", "1:2", "SIGINT", {"k": "v"})
    assert ImageConfig.from_oci({}) == ImageConfig.from_oci({"config": None}) == ImageConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Env", "A=1"),
        ("Env", ["a\0"]),
        ("Cmd", [1]),
        ("User", 0.5),
        ("WorkingDir", "/\0"),
        ("Labels", {"a": 1}),
    ],
)
def test_a_wrong_image_configuration_names_its_field(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"config.{key}"):
        ImageConfig.from_oci({"config": {key: value}})
