"""The store's folders, and how anything comes into them and goes: by one rename.

<image_dir>/index.json                   reference -> digest, last use
<image_dir>/images/sha256-<hex>/         rootfs/ and image.json, complete or not there
<image_dir>/blobs/sha256/<hex>           a cache of what was downloaded, shared by all images
<image_dir>/work/<random>/               unfinished work; swept when no process holds it
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from sandkeeper.shim.engines.oci.images.manifest import OCI_MANIFEST, Descriptor
from sandkeeper.shim.engines.oci.images.reference import is_digest
from sandkeeper.shim.engines.oci.images.unpack import TAG


@dataclass(frozen=True, slots=True)
class Folders:
    root: Path

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def index(self) -> Path:
        return self.root / "index.json"

    def image(self, digest: str) -> Path:
        if not is_digest(digest):
            raise ValueError(f"not a digest: {digest!r}")
        return self.images / digest.replace(":", "-")

    def make(self) -> None:
        for folder in (self.root, self.images, self.blobs, self.blobs / "sha256", self.work):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)  # images hold setuid programs: only root may reach them

    @contextlib.asynccontextmanager
    async def workspace(self) -> AsyncIterator[Path]:
        """A folder for one piece of work, locked while it lasts, removed afterwards."""
        path = Path(tempfile.mkdtemp(dir=self.work))
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield path
        finally:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
            os.close(lock)

    def sweep(self) -> None:
        """Removes what a killed process left behind; what a living one works on stays."""
        for path in self.work.iterdir():
            with contextlib.suppress(OSError):
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(lock)

    def publish(self, made: Path, digest: str) -> None:
        """Gives a complete image folder its name; an incomplete one under that name makes room."""
        target = self.image(digest)
        if target.exists():
            shutil.rmtree(self.bury(target), ignore_errors=True)
        made.rename(target)
        sync_folder(self.images)

    def bury(self, folder: Path) -> Path:
        """Takes an image away at once; returns where its files are, to be removed (the sweep at the
        next start does it otherwise)."""
        grave = Path(tempfile.mkdtemp(dir=self.work))
        with contextlib.suppress(FileNotFoundError):
            folder.rename(grave / "removed")
        return grave


def layout_over(blobs: Path, layout: Path, entry: Descriptor | None = None) -> None:
    """An OCI layout of one image whose blobs are elsewhere, so that tools that rewrite index.json
    never meet each other, and nothing is copied. entry: the image's descriptor, if it is there already."""
    layout.mkdir(mode=0o700)
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (layout / "blobs").symlink_to(blobs.resolve(), target_is_directory=True)
    if entry is not None:
        named = {
            "mediaType": entry.media_type or OCI_MANIFEST,
            "digest": entry.digest,
            "size": entry.size,
            "annotations": {"org.opencontainers.image.ref.name": TAG},
        }
        (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))


def write_atomically(path: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).rename(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
