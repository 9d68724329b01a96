"""Images in a containerd: named, fetched when they have to be, unpacked as snapshots, held by leases while they come.

skopeo fetches them, or they are taken from a layout on the node, as the oci engine does it; from there on they are
containerd's: content store, image names, snapshots. What others have put into the namespace (`ctr images import`)
is used as well. See docs/decisions/0009-containerd-engine.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.containerd import content, unpack
from sandkeeper.shim.engines.containerd.client import CallError, Client
from sandkeeper.shim.engines.oci.images import garbage, layouts, manifest
from sandkeeper.shim.engines.oci.images.flights import Flights
from sandkeeper.shim.engines.oci.images.folders import Folders
from sandkeeper.shim.engines.oci.images.manifest import Descriptor, Manifest, ManifestError, Platform
from sandkeeper.shim.engines.oci.images.reference import Reference, parse
from sandkeeper.shim.engines.oci.images.registry import Registry, pull_error
from sandkeeper.shim.engines.oci.images.types import Image, ImageConfig, ImageSettings, Progress
from sandkeeper.wire import node_pb2
from sandkeeper.wire.containerd import descriptor_pb2, images_pb2

log = logging.getLogger(__name__)

T = TypeVar("T")

_RESOLVES, _FETCHES, _UNPACKS = 32, 6, 2
_RESOLVE_SECONDS = 60.0
_DIGEST = "sandkeeper.dev/digest"
"""Label of an image: its manifest's digest in the registry, which skopeo's conversion may have changed."""
_MAX_NESTING = 3


def chain_of(image: Image) -> str:
    """The snapshot that a container's own is made on."""
    return image.rootfs.name.replace("-", ":", 1)


class ContainerdImages:
    """folder: our own. The few files of each image that we read ourselves are in it, named by the image's chain."""

    def __init__(
        self,
        client: Client,
        snapshotter: str,
        settings: ImageSettings,
        folder: Path,
        *,
        clock: Callable[[], float] = time.time,
        disk_usage: Callable[[Path], float] = garbage.disk_usage,
    ) -> None:
        self._client = client
        self._snapshotter = snapshotter
        self._settings = settings
        self._platform = Platform.local()
        self._folders = Folders(folder)
        self._registry = Registry(settings, self._platform)
        self._flights = Flights()
        self._resolving = asyncio.Semaphore(_RESOLVES)
        self._fetching = asyncio.Semaphore(_FETCHES)
        self._unpacking = asyncio.Semaphore(_UNPACKS)
        self._clock = clock
        self._disk_usage = disk_usage
        self._used: dict[str, float] = {}
        self._ready: dict[str, Image] = {}  # by the digest that containerd has it under
        self.snapshots: Path | None = None  # where they are on disk, if that is known

    async def open(self) -> None:
        """Raises EngineError `ImageStoreFailed` where the folder cannot be used."""
        try:
            await asyncio.to_thread(self._open)
        except OSError as error:
            raise EngineError("ImageStoreFailed", f"the image folder cannot be used: {error}") from None

    def _open(self) -> None:
        self._folders.make()
        self._folders.sweep()

    async def close(self) -> None:
        await self._flights.close()

    async def ensure(
        self, reference: str, policy: node_pb2.ImagePullPolicy.ValueType, progress: Progress
    ) -> Image:
        """As ImageStore.ensure."""
        ref = parse(reference)
        if policy != node_pb2.IMAGE_PULL_POLICY_ALWAYS:
            image = await self._present(ref)
            if image is not None:
                return image
        local = layouts.find(self._settings.image_layouts, ref, self._platform)
        if local is not None:
            taken = local
            return await self._flights.fly(
                f"{ref} {taken.manifest.digest}", lambda tell: self._take(ref, taken, tell), progress
            )
        if policy == node_pb2.IMAGE_PULL_POLICY_NEVER:
            raise EngineError(
                "ErrImageNeverPull", f"image {reference!r} is not on this node and its pull policy is Never"
            )
        return await self._flights.fly(str(ref), lambda tell: self._pull(ref, tell), progress)

    async def _present(self, ref: Reference, digest: str = "") -> Image | None:
        """The image if containerd has it whole; digest: only if it is that."""
        stored = await asyncio.to_thread(self._stored, ref)
        if stored is None or (digest and digest != (stored.labels.get(_DIGEST) or stored.target.digest)):
            return None
        try:
            async with self._unpacking:
                return await asyncio.to_thread(self._make_ready, stored)
        except CallError as error:
            if error.away:
                raise
            return None  # a part of it has gone: it has to be fetched again
        except OSError as error:
            raise pull_error(ref, f"it cannot be read: {error}") from None

    def _stored(self, ref: Reference) -> images_pb2.Image | None:
        found = self._client.found(self._client.images.Get, images_pb2.GetImageRequest(name=str(ref)))
        return found.image if found else None

    # -- from where

    async def _take(self, ref: Reference, local: layouts.Found, tell: Progress) -> Image:
        found = await self._present(ref, local.manifest.digest)
        if found is not None:
            return found
        tell("PullingImage", f"unpacking image {str(ref)!r} from its layout on the node")
        return await self._import(ref, local.layout, local.manifest, local.manifest.digest)

    async def _pull(self, ref: Reference, tell: Progress) -> Image:
        tell("PullingImage", f"pulling image {str(ref)!r}")
        seconds = self._settings.image_pull_timeout
        try:
            async with asyncio.timeout(seconds):
                async with self._resolving, asyncio.timeout(_RESOLVE_SECONDS):
                    digest = await self._registry.resolve(ref)
                image = await self._present(ref, digest)
                if image is None:
                    image = await self._fetch(ref, digest)
        except TimeoutError:
            raise pull_error(
                ref, f"the registry did not answer in time, or the pull was not complete in {seconds:g} s"
            ) from None
        return image

    async def _fetch(self, ref: Reference, digest: str) -> Image:
        async with self._folders.workspace() as work:
            layout = work / "layout"
            async with self._fetching:
                await self._registry.fetch(ref, digest, layout, work)
            try:
                local = layouts.tagged(layout)
            except (OSError, ManifestError) as error:
                raise pull_error(ref, f"skopeo left no usable layout: {error}") from None
            return await self._import(ref, layout, local, digest)

    async def _import(self, ref: Reference, layout: Path, entry: Descriptor, digest: str) -> Image:
        async with self._unpacking:
            try:
                # To its end even if the caller is cancelled: it reads the layout, which goes after us.
                return await _whole(asyncio.to_thread(self._bring, ref, layout, entry, digest))
            except (OSError, ManifestError) as error:
                raise pull_error(ref, f"it cannot be read: {error}") from None

    # -- into containerd

    def _bring(self, ref: Reference, layout: Path, entry: Descriptor, digest: str) -> Image:
        parsed = layouts.read_manifest(layout, entry.digest)
        links = {f"containerd.io/gc.ref.content.{index}": blob for index, blob in enumerate(parsed.blobs)}
        with content.passing_lease(self._client) as lease:
            for blob in parsed.blobs:
                content.write(self._client, blob, layouts.blob_path(layout, blob), {}, lease)
            content.write(self._client, entry.digest, layouts.blob_path(layout, entry.digest), links, lease)
            stored = images_pb2.Image(
                name=str(ref),
                labels={_DIGEST: digest},
                target=descriptor_pb2.Descriptor(
                    media_type=entry.media_type or manifest.OCI_MANIFEST, digest=entry.digest, size=entry.size
                ),
            )
            image = self._make_ready(stored, lease)
            create = images_pb2.CreateImageRequest(image=stored)
            if self._client.made(self._client.images.Create, create) is None:
                self._client.call(self._client.images.Update, images_pb2.UpdateImageRequest(image=stored))
        log.info("image ready", extra={"image": str(ref), "digest": digest, "bytes": parsed.size})
        return image

    def _make_ready(self, stored: images_pb2.Image, lease: str = "") -> Image:
        """Unpacks what is in the content store. Raises CallError, OSError, EngineError `InvalidImage`."""
        known = self._ready.get(stored.target.digest)
        if known is not None and unpack.has(self._client, self._snapshotter, chain_of(known)):
            self._used[known.digest] = self._clock()
            return known
        parsed = self._manifest(stored)
        document = manifest.read_object(content.read(self._client, parsed.config.digest))
        digest = stored.labels.get(_DIGEST) or stored.target.digest
        try:
            config = ImageConfig.from_oci(document)
        except ValueError as error:
            raise EngineError("InvalidImage", f"image {digest} cannot be used: {error}") from None
        found = document.get("architecture")
        if found and found != self._platform.architecture:
            raise EngineError(
                "InvalidImage", f"image {digest} is for {str(found)[:40]}, this node is {self._platform}"
            )
        ids = unpack.diff_ids(document)
        name = unpack.chain(ids)[-1] if ids else ""
        if not unpack.has(self._client, self._snapshotter, name):
            with content.passing_lease(self._client) if not lease else contextlib.nullcontext(lease) as held:
                unpack.unpack(self._client, self._snapshotter, parsed.layers, ids, held)
                # The image holds its snapshots from now on.
                link = {f"containerd.io/gc.ref.snapshot.{self._snapshotter}": name}
                content.label(self._client, parsed.config.digest, link)
        tree = self._folders.image(name)
        unpack.extract(self._client, self._snapshotter, name, tree)
        self._used[digest] = self._clock()
        image = self._ready[stored.target.digest] = Image(digest, tree, config)
        return image

    def _manifest(self, stored: images_pb2.Image) -> Manifest:
        digest = stored.target.digest
        try:
            for _ in range(_MAX_NESTING):
                document = manifest.parse(content.read(self._client, digest))
                if isinstance(document, Manifest):
                    return document
                digest = manifest.choose(document, self._platform).digest
        except ManifestError as error:
            raise EngineError("InvalidImage", f"image {stored.name!r} cannot be used: {error}") from None
        raise EngineError("InvalidImage", f"image {stored.name!r}: its indexes are nested too deeply")

    # -- out again

    async def collect(self, in_use: frozenset[str]) -> None:
        """Under disk pressure, removes images that nothing uses, least recently used first. What a sandbox holds by
        its lease stays on disk even then."""
        if self.snapshots is not None and self.snapshots.is_dir():
            await asyncio.to_thread(self._collect, self.snapshots, in_use)

    def _collect(self, disk: Path, in_use: frozenset[str]) -> None:
        if self._disk_usage(disk) < self._settings.image_disk_high or len(self._flights):
            return
        stored = self._client.call(self._client.images.List, images_pb2.ListImagesRequest()).images
        now = self._clock()

        def used(image: images_pb2.Image) -> float:
            digest = image.labels.get(_DIGEST) or image.target.digest
            return self._used.get(digest, image.updated_at.seconds)

        for image in sorted(stored, key=used):
            digest = image.labels.get(_DIGEST) or image.target.digest
            if digest in in_use or now - used(image) < garbage.MINIMUM_AGE:
                continue
            if self._disk_usage(disk) < self._settings.image_disk_low:
                break
            log.info("image removed", extra={"image": image.name, "digest": digest})
            self._client.found(
                self._client.images.Delete, images_pb2.DeleteImageRequest(name=image.name, sync=True)
            )


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    """Waits for work to its end; a cancellation meanwhile is raised after it."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
