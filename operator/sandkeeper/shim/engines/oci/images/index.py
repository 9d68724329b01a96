"""Which reference is which image, and when each was last used: in memory, and in index.json.

The file is a help, not the truth: the truth is the image folders. A lost or damaged index is
rebuilt from them; only names that an image got after it was pulled are forgotten then.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sandkeeper.shim.engines.oci.images import unpack
from sandkeeper.shim.engines.oci.images.folders import Folders, write_atomically
from sandkeeper.shim.engines.oci.images.reference import is_digest
from sandkeeper.shim.engines.oci.images.types import Image

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Entry:
    image: Image
    size: int
    blobs: frozenset[str]
    references: list[str]
    last_used: float


@dataclass(slots=True)
class Index:
    folders: Folders
    clock: Callable[[], float] = time.time
    images: dict[str, Entry] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)

    def load(self) -> None:
        """Reads the image folders, then index.json for what only it knows."""
        self.images.clear()
        self.references.clear()
        for folder in self.folders.images.iterdir():
            try:
                image, about = unpack.load(folder)
                if self.folders.image(image.digest) != folder:
                    raise ValueError(f"{folder.name}: holds {image.digest}")
            except (OSError, ValueError) as error:
                # Left alone: a container may still stand on it. A new pull replaces it.
                log.warning("image folder ignored", extra={"folder": str(folder), "error": str(error)})
                continue
            used = folder.stat().st_mtime
            self.images[image.digest] = Entry(
                image, about["size"], frozenset(about["blobs"]), about["references"], used
            )
            self.references.update((reference, image.digest) for reference in about["references"])
        try:
            document = json.loads(self.folders.index.read_bytes())
            references = {str(k): str(v) for k, v in document["references"].items()}
            used_at = {str(k): float(v["lastUsed"]) for k, v in document["images"].items()}
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("image index rebuilt", extra={"error": str(error)})
            return
        self.references.update((r, d) for r, d in references.items() if is_digest(d) and d in self.images)
        for digest, used in used_at.items():
            if digest in self.images:
                self.images[digest].last_used = min(used, self.clock())

    def save(self) -> None:
        document = {
            "version": 1,
            "references": self.references,
            "images": {d: {"size": e.size, "lastUsed": e.last_used} for d, e in self.images.items()},
        }
        write_atomically(self.folders.index, json.dumps(document, indent=1, sort_keys=True).encode())

    def get(self, reference: str) -> Image | None:
        """The image of a normalized reference; counts as a use of it."""
        digest = self.references.get(reference)
        return self.by_digest(digest) if digest else None

    def by_digest(self, digest: str) -> Image | None:
        entry = self.images.get(digest)
        if entry is None:
            return None
        if not entry.image.rootfs.is_dir():  # removed behind our back
            self.forget(digest)
            return None
        entry.last_used = self.clock()
        return entry.image

    def name(self, reference: str, digest: str) -> None:
        """Lets the reference mean this image from now on, on disk too."""
        if self.references.get(reference) != digest:
            self.references[reference] = digest
            self.save()

    def add(self, image: Image, size: int, blobs: frozenset[str], references: list[str]) -> None:
        self.images[image.digest] = Entry(image, size, blobs, references, self.clock())
        self.references.update((reference, image.digest) for reference in references)
        self.save()

    def forget(self, digest: str) -> None:
        self.images.pop(digest, None)
        self.references = {r: d for r, d in self.references.items() if d != digest}
