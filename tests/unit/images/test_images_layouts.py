"""Images found in local OCI layouts, and the layouts that the project itself makes."""

import json
from pathlib import Path

import pytest

from sandkeeper.localcluster.ocilayout import ImageDef, write_layout
from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci.images import layouts
from sandkeeper.shim.engines.oci.images.manifest import Platform
from sandkeeper.shim.engines.oci.images.reference import parse

HERE = Platform.local()
NAME = "docker.io/library/busybox:1.37"


@pytest.mark.parametrize(
    ("asked", "annotation", "found"),
    [
        ("busybox:1.37", NAME, True),
        ("docker.io/busybox:1.37", "busybox:1.37", True),
        ("busybox", "busybox", True),
        ("busybox:1.37", "busybox:1.36", False),
        ("busybox:1.37", "1.37", False),
        ("busybox:1.37", "elsewhere.test/busybox:1.37", False),
        ("busybox:1.37", "not a reference!", False),
    ],
)
def test_an_image_is_found_by_its_name(tmp_path: Path, asked: str, annotation: str, found: bool) -> None:
    write_layout(tmp_path, {annotation: ImageDef()})
    assert (layouts.find([tmp_path], parse(asked), HERE) is not None) == found


def test_containerds_annotation_counts_too(tmp_path: Path) -> None:
    digest = write_layout(tmp_path, {"1.37": ImageDef()})["1.37"]
    index = json.loads((tmp_path / "index.json").read_text())
    index["manifests"][0]["annotations"]["io.containerd.image.name"] = NAME
    (tmp_path / "index.json").write_text(json.dumps(index))
    found = layouts.find([tmp_path], parse("busybox:1.37"), HERE)
    assert found is not None
    assert found.manifest.digest == digest


def test_an_image_is_found_by_name_and_digest(tmp_path: Path) -> None:
    digest = write_layout(tmp_path, {NAME: ImageDef()})[NAME]
    assert layouts.find([tmp_path], parse(f"busybox@{digest}"), HERE) is not None
    assert layouts.find([tmp_path], parse(f"other@{digest}"), HERE) is None
    assert layouts.find([tmp_path], parse("busybox@sha256:" + "0" * 64), HERE) is None


def test_the_platform_is_chosen_from_an_index(tmp_path: Path) -> None:
    images = {"here": ImageDef(cmd=("here",)), "there": ImageDef(architecture="pdp11")}
    write_layout(tmp_path, {NAME: images})
    found = layouts.find([tmp_path], parse(NAME), HERE)
    assert found is not None
    assert found.manifest.platform["architecture"] == HERE.architecture
    assert found.manifest.digest == write_layout(tmp_path / "one", {NAME: images["here"]})[NAME]


def test_the_first_layout_with_the_image_wins_and_broken_ones_are_skipped(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "index.json").write_text("{")
    write_layout(tmp_path / "one", {NAME: ImageDef(cmd=("1",))})
    write_layout(tmp_path / "two", {NAME: ImageDef(cmd=("2",))})
    found = layouts.find([tmp_path / "none", broken, tmp_path / "one", tmp_path / "two"], parse(NAME), HERE)
    assert found is not None
    assert found.layout == tmp_path / "one"


@pytest.mark.parametrize("harm", ["remove", "change", "other"])
def test_a_layout_that_does_not_hold_what_it_names_is_an_error(tmp_path: Path, harm: str) -> None:
    digest = write_layout(tmp_path, {NAME: ImageDef(architecture="pdp11")})[NAME]
    blob = tmp_path / "blobs/sha256" / digest[7:]
    if harm == "remove":
        blob.unlink()
    elif harm == "change":
        blob.write_bytes(blob.read_bytes() + b" ")
    else:
        write_layout(
            tmp_path, {NAME: {"there": ImageDef(architecture="pdp11"), "too": ImageDef(architecture="vax")}}
        )
    with pytest.raises(EngineError) as caught:
        layouts.find([tmp_path], parse(NAME), HERE)
    assert (caught.value.reason, caught.value.retryable) == ("ErrImagePull", True)


def test_the_same_image_has_the_same_digest(tmp_path: Path) -> None:
    image = ImageDef(
        files={"a/b": b"x", "c": (b"y", 0o755)}, symlinks={"d": "c"}, directories={"tmp": 0o1777}
    )
    assert write_layout(tmp_path / "1", {NAME: image}) == write_layout(tmp_path / "2", {NAME: image})


def test_a_layout_is_added_to_and_its_tags_are_replaced(tmp_path: Path) -> None:
    write_layout(tmp_path, {"a:1": ImageDef(cmd=("1",)), "b:1": ImageDef()})
    changed = write_layout(tmp_path, {"a:1": ImageDef(cmd=("2",))})
    index = json.loads((tmp_path / "index.json").read_text())
    names = {e["annotations"]["org.opencontainers.image.ref.name"]: e["digest"] for e in index["manifests"]}
    assert set(names) == {"a:1", "b:1"}
    assert len(index["manifests"]) == 2
    assert names["a:1"] == changed["a:1"]
