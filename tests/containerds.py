"""The containerds that tests run, and the one place that says why there is none."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sandkeeper.localcluster.binaries import BinariesError
from sandkeeper.localcluster.containerd import Containerd
from sandkeeper.localcluster.containerd_sources import Source
from sandkeeper.localcluster.ocilayout import ImageDef, layer, write_layout


def need_containerd() -> None:
    """Skips the test where no containerd can run containers at all."""
    if os.geteuid() != 0:
        pytest.skip("containerd needs root")
    if shutil.which("runc", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin") is None:
        pytest.skip("containerd needs runc: make setup installs it")


@contextlib.contextmanager
def containerd(source: Source = "module", **options: Any) -> Iterator[Containerd]:
    """A containerd that runs until the end of the block, of which nothing is left then.

    It is skipped only where it can never be had. `make setup` makes both, and fails where it cannot.
    """
    need_containerd()
    try:
        made = Containerd(source, **options)
    except BinariesError as error:
        pytest.skip(f"no containerd ({source}): {error}")
    with made:
        yield made
    left = [*made.shims(), *made.mounts()]
    assert not left, f"left of {made.folder}: {left}"


def import_images(into: Containerd, images: Mapping[str, ImageDef], namespace: str) -> None:
    """Makes images and imports them under their full names (`example.test/pause:1`)."""
    layout, archive = into.folder / "tmp" / "layout", into.folder / "tmp" / "images.tar"
    write_layout(layout, images)
    # containerd takes the image's name from this annotation, as it stands.
    index = layout / "index.json"
    index.write_text(
        index.read_text().replace("org.opencontainers.image.ref.name", "io.containerd.image.name")
    )
    with tarfile.open(archive, "w") as tar:
        for each in sorted(layout.iterdir()):
            tar.add(each, arcname=each.name)
    into.ctr("images", "import", str(archive), namespace=namespace)
    shutil.rmtree(layout)
    archive.unlink()


def unpacked(image: ImageDef, folder: Path) -> Path:
    """The image's files as a folder."""
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(layer(image))) as tar:
        tar.extractall(folder, filter="fully_trusted")  # noqa: S202 - made above
    return folder
