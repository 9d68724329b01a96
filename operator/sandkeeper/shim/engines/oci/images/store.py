"""The node's images: where they come from, when they are fetched, when they go.

A reference names an image in a local layout or a registry; its resolved digest
names the unpacked tree, which all containers of that image share.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci.images import garbage, layouts, tools, unpack
from sandkeeper.shim.engines.oci.images.flights import Flights
from sandkeeper.shim.engines.oci.images.folders import Folders, layout_over
from sandkeeper.shim.engines.oci.images.index import Index
from sandkeeper.shim.engines.oci.images.manifest import Descriptor, ManifestError, Platform
from sandkeeper.shim.engines.oci.images.reference import Reference, parse
from sandkeeper.shim.engines.oci.images.registry import Registry, pull_error
from sandkeeper.shim.engines.oci.images.types import Image, ImageSettings, Progress
from sandkeeper.wire import node_pb2

log = logging.getLogger(__name__)

# Each is a process of some 30 MiB: bounds that many different images at once must keep.
_RESOLVES = 32
_RESOLVE_SECONDS = 60.0  # a manifest is small: a registry that hangs must not hold a place for long
_FETCHES = 6
_UNPACKS = 2


class ImageStore:
    """Images of one node. One per image folder and event loop; call `open` first."""

    def __init__(
        self,
        settings: ImageSettings,
        *,
        run: tools.Runner = tools.run,
        disk_usage: Callable[[Path], float] = garbage.disk_usage,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._run = run
        self._disk_usage = disk_usage
        self._clock = clock
        self._platform = Platform.local()
        self._folders = Folders(Path(settings.image_dir).absolute())
        self._index = Index(self._folders, clock)
        self._registry = Registry(settings, self._platform, run)
        self._by_reference = Flights()
        self._by_digest = Flights()
        self._resolving = asyncio.Semaphore(_RESOLVES)
        self._fetching = asyncio.Semaphore(_FETCHES)
        self._unpacking = asyncio.Semaphore(_UNPACKS)

    async def open(self) -> None:
        """Makes the folders, removes what a killed shim left half done, reads the index.

        Raises EngineError `ImageStoreFailed` where the folder cannot be used.
        """
        try:
            await asyncio.to_thread(self._open)
        except OSError as error:
            raise EngineError("ImageStoreFailed", f"the image folder cannot be used: {error}") from None

    def _open(self) -> None:
        self._folders.make()
        self._folders.sweep()
        self._index.load()

    async def close(self) -> None:
        """Ends pulls under way; what is half done is removed."""
        await self._by_reference.close()
        await self._by_digest.close()
        if self._index.images:
            self._index.save()

    async def present(self, reference: str) -> Image | None:
        """The image if it is unpacked here; no network, no process. Raises `InvalidImageName`."""
        return self._index.get(str(parse(reference)))

    async def ensure(
        self, reference: str, policy: node_pb2.ImagePullPolicy.ValueType, progress: Progress
    ) -> Image:
        """The image, fetched and unpacked if the policy asks for it.

        progress is called before anything slow begins. Raises EngineError: `InvalidImageName`,
        `ErrImageNeverPull`, `InvalidImage` (no repetition helps), `ErrImagePull` (retryable).
        """
        ref = parse(reference)
        if policy != node_pb2.IMAGE_PULL_POLICY_ALWAYS:
            image = self._index.get(str(ref))
            if image is not None:
                return image
        found = layouts.find(self._settings.image_layouts, ref, self._platform)
        if found is not None:
            image = self._index.by_digest(found.manifest.digest)
            if image is not None:
                self._index.name(str(ref), image.digest)
                return image
            local = found
            return await self._by_reference.fly(
                f"{ref} {local.manifest.digest}", lambda tell: self._take(ref, local, tell), progress
            )
        if policy == node_pb2.IMAGE_PULL_POLICY_NEVER:
            raise EngineError(
                "ErrImageNeverPull", f"image {reference!r} is not on this node and its pull policy is Never"
            )
        return await self._by_reference.fly(str(ref), lambda tell: self._pull(ref, tell), progress)

    async def collect(self, in_use: frozenset[str]) -> None:
        """Under disk pressure, removes what can be had again: see `garbage.collect`."""
        await garbage.collect(
            self._index,
            self._folders,
            in_use,
            high=self._settings.image_disk_high,
            low=self._settings.image_disk_low,
            usage=self._disk_usage,
            busy=lambda: bool(len(self._by_reference) or len(self._by_digest)),
        )

    async def _take(self, ref: Reference, found: layouts.Found, tell: Progress) -> Image:
        """From a layout on the node."""
        tell("PullingImage", f"unpacking image {str(ref)!r} from its layout on the node")
        image = await self._unpacked(ref, found.manifest.digest, found.layout, found.manifest)
        self._index.name(str(ref), image.digest)
        return image

    async def _pull(self, ref: Reference, tell: Progress) -> Image:
        """From its registry: only the manifest where the name meant the same digest before."""
        tell("PullingImage", f"pulling image {str(ref)!r}")
        seconds = self._settings.image_pull_timeout
        try:
            async with asyncio.timeout(seconds):
                async with self._resolving, asyncio.timeout(_RESOLVE_SECONDS):
                    digest = await self._registry.resolve(ref)
                image = self._index.get(str(ref))
                if image is None or image.digest != digest:
                    image = await self._fetch(ref, digest)
        except TimeoutError:
            raise pull_error(
                ref, f"the registry did not answer in time, or the pull was not complete in {seconds:g} s"
            ) from None
        return image

    async def _fetch(self, ref: Reference, digest: str) -> Image:
        """Done also where another name brought the image here: the trust policy goes by name. Then
        all blobs are here as well, and little is fetched."""
        async with self._folders.workspace() as work:
            layout = work / "layout"
            layout_over(self._folders.blobs, layout)
            async with self._fetching:
                await self._registry.fetch(ref, digest, layout, work)
            try:
                # Converted from Docker's format, the manifest has another digest here than in the registry.
                local = layouts.tagged(layout)
            except (OSError, ManifestError) as error:
                raise pull_error(ref, f"skopeo left no usable layout: {error}") from None
        image = self._index.by_digest(digest)
        if image is None:
            try:
                image = await self._unpacked(ref, digest, self._folders.root, local)
            except EngineError:
                garbage.drop_blobs(self._folders, local.digest)  # one may be damaged: fetch it anew
                raise
        self._index.name(str(ref), digest)
        return image

    async def _unpacked(self, ref: Reference, digest: str, source: Path, entry: Descriptor) -> Image:
        """Unpacks the image `entry` of source/blobs and publishes it under the digest: once, whoever asks."""

        async def make(_: Progress) -> Image:
            async with self._unpacking:
                async with self._folders.workspace() as work:
                    layout_over(source / "blobs", work / "layout", entry)
                    made = work / "image"
                    parsed, config = await unpack.unpack(
                        work / "layout", entry.digest, made, self._platform, self._run
                    )
                    blobs = frozenset({entry.digest, *parsed.blobs})
                    try:
                        size = await asyncio.to_thread(unpack.seal, made, [str(ref)], digest, blobs, config)
                    except OSError as error:
                        raise pull_error(ref, f"it cannot be written: {error.strerror}") from None
                    # Nothing is awaited from here on: published and known are one step for everyone else.
                    self._folders.publish(made, digest)
                    image = Image(digest, self._folders.image(digest) / "rootfs", config)
                    self._index.add(image, size, blobs, [str(ref)])
                    log.info("image ready", extra={"image": str(ref), "digest": digest, "bytes": size})
                    return image

        return await self._by_digest.fly(digest, make, _silent)


def _silent(reason: str, message: str) -> None:
    """Progress was told to whoever asked, by reference."""
