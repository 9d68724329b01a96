"""The store's decisions, with skopeo and umoci replaced by a runner that counts and fails on command."""

import asyncio
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from sandkeeper.localcluster.ocilayout import ImageDef, write_layout
from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci.images import Image, ImageStore, StoreSettings, garbage
from sandkeeper.shim.engines.oci.images.reference import parse
from sandkeeper.shim.engines.oci.images.tools import ToolError
from sandkeeper.wire.node_pb2 import (
    IMAGE_PULL_POLICY_ALWAYS as ALWAYS,
)
from sandkeeper.wire.node_pb2 import (
    IMAGE_PULL_POLICY_IF_NOT_PRESENT as IF_NOT_PRESENT,
)
from sandkeeper.wire.node_pb2 import (
    IMAGE_PULL_POLICY_NEVER as NEVER,
)

A, B, C = "registry.test/a:1", "registry.test/b:1", "registry.test/c:1"


class FakeTools:
    """A registry kept as an OCI layout; answers skopeo's and umoci's calls from it."""

    def __init__(self, layout: Path) -> None:
        self.layout = layout
        self.tags: dict[str, str] = {}
        self.calls: list[str] = []
        self.called = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail: dict[str, str] = {}
        self.links: dict[str, str] = {}

    def put(self, reference: str, image: ImageDef) -> str:
        digest = write_layout(self.layout, {reference: image})[reference]
        self.tags[reference] = self.tags[str(parse(reference).at(digest))] = digest
        return digest

    def count(self, what: str) -> int:
        return self.calls.count(what)

    async def __call__(self, argv: Sequence[str], extra: Mapping[str, str]) -> bytes:
        what = next(word for word in argv if word in ("inspect", "copy", "unpack"))
        self.calls.append(what)
        self.called.set()
        await self.gate.wait()
        if what in self.fail:
            raise ToolError(self.fail[what])
        if what == "inspect":
            digest = self.tags.get(argv[-1].removeprefix("docker://"))
            if digest is None:
                raise ToolError("manifest unknown")
            return (self.layout / "blobs/sha256" / digest[7:]).read_bytes()
        if what == "copy":
            target = Path(argv[-1].removeprefix("oci:").removesuffix(":image"))
            digest = self.tags[argv[-2].removeprefix("docker://")]
            shutil.copytree(self.layout / "blobs", (target / "blobs").resolve(), dirs_exist_ok=True)
            entry = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 1}
            (target / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
            return b""
        rootfs = Path(argv[-1])
        rootfs.mkdir()
        (rootfs / "file").write_text("x")
        for name, target_name in self.links.items():
            (rootfs / name).symlink_to(target_name)
        return b""


@pytest.fixture
def fake(tmp_path: Path) -> FakeTools:
    return FakeTools(tmp_path / "registry")


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


async def opened(tmp_path: Path, fake: FakeTools, **changes: object) -> ImageStore:
    percent = changes.pop("percent", lambda _: 0.0)
    clock = changes.pop("clock", Clock())
    settings = StoreSettings(tmp_path / "store", **changes)  # type: ignore[arg-type]
    store = ImageStore(settings, run=fake, disk_usage=percent, clock=clock)  # type: ignore[arg-type]
    await store.open()
    return store


def silent(reason: str, message: str) -> None:
    pass


async def test_a_pulled_image_is_unpacked_once_and_kept_over_a_restart(
    tmp_path: Path, fake: FakeTools
) -> None:
    digest = fake.put(A, ImageDef(cmd=("x",), env=("K=V",)))
    store = await opened(tmp_path, fake)
    assert await store.present(A) is None
    said: list[tuple[str, str]] = []
    image = await store.ensure(A, IF_NOT_PRESENT, lambda reason, message: said.append((reason, message)))
    assert image.digest == digest
    assert (image.rootfs / "file").read_text() == "x"
    assert image.config.cmd == ("x",)
    assert image.config.env == ("K=V",)
    assert [reason for reason, _ in said] == ["PullingImage"]
    assert await store.ensure(A, IF_NOT_PRESENT, silent) == image
    await store.close()
    again = await opened(tmp_path, fake)
    assert await again.present("registry.test/a:1") == image
    assert fake.calls == ["inspect", "copy", "unpack"]
    assert list((tmp_path / "store" / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("policy", "here", "calls"),
    [
        (IF_NOT_PRESENT, False, ["inspect", "copy", "unpack"]),
        (IF_NOT_PRESENT, True, []),
        (ALWAYS, False, ["inspect", "copy", "unpack"]),
        (ALWAYS, True, ["inspect"]),
        (NEVER, True, []),
        (NEVER, False, "ErrImageNeverPull"),
    ],
)
async def test_pull_policies(
    tmp_path: Path, fake: FakeTools, policy: int, here: bool, calls: list[str] | str
) -> None:
    fake.put(A, ImageDef())
    store = await opened(tmp_path, fake)
    if here:
        await store.ensure(A, IF_NOT_PRESENT, silent)
        fake.calls.clear()
    if isinstance(calls, str):
        with pytest.raises(EngineError) as caught:
            await store.ensure(A, policy, silent)  # type: ignore[arg-type]
        assert caught.value.reason == calls
        assert fake.calls == []
    else:
        await store.ensure(A, policy, silent)  # type: ignore[arg-type]
        assert fake.calls == calls


async def test_always_follows_a_tag_that_moved(tmp_path: Path, fake: FakeTools) -> None:
    old = fake.put(A, ImageDef(cmd=("old",)))
    store = await opened(tmp_path, fake)
    await store.ensure(A, IF_NOT_PRESENT, silent)
    new = fake.put(A, ImageDef(cmd=("new",)))
    assert (await store.ensure(A, IF_NOT_PRESENT, silent)).digest == old
    assert (await store.ensure(A, ALWAYS, silent)).digest == new
    present = await store.present(A)
    assert present is not None
    assert present.digest == new


async def test_two_names_of_one_image_share_its_tree(tmp_path: Path, fake: FakeTools) -> None:
    fake.put(A, ImageDef())
    fake.put(B, ImageDef())
    store = await opened(tmp_path, fake)
    first, second = await asyncio.gather(*(store.ensure(name, IF_NOT_PRESENT, silent) for name in (A, B)))
    assert first == second
    assert fake.count("unpack") == 1
    assert fake.count("copy") == 2  # the trust policy, which skopeo checks, goes by name


async def test_many_at_once_pull_once_and_all_hear_of_it(tmp_path: Path, fake: FakeTools) -> None:
    fake.put(A, ImageDef())
    store = await opened(tmp_path, fake)
    fake.gate.clear()
    said: list[str] = []
    tasks = [
        asyncio.create_task(store.ensure(A, IF_NOT_PRESENT, lambda reason, _: said.append(reason)))
        for _ in range(20)
    ]
    await fake.called.wait()
    for task in tasks[:5]:
        task.cancel()
    fake.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert fake.calls == ["inspect", "copy", "unpack"]
    assert sum(isinstance(r, asyncio.CancelledError) for r in results) == 5
    assert len({r.digest for r in results if isinstance(r, Image)}) == 1
    assert len(said) == 20


async def test_a_pull_that_nobody_waits_for_ends(tmp_path: Path, fake: FakeTools) -> None:
    fake.put(A, ImageDef())
    store = await opened(tmp_path, fake)
    fake.gate.clear()
    task = asyncio.create_task(store.ensure(A, IF_NOT_PRESENT, silent))
    await fake.called.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    fake.gate.set()
    assert (await store.ensure(A, IF_NOT_PRESENT, silent)).digest
    assert fake.count("copy") == 1


async def test_a_failed_pull_is_shared_told_and_can_be_repeated(tmp_path: Path, fake: FakeTools) -> None:
    fake.put(A, ImageDef())
    store = await opened(tmp_path, fake)
    fake.fail["copy"] = "Get https://u:hunter22@x/: connection refused"
    for _ in range(2):
        with pytest.raises(EngineError) as caught:
            await store.ensure(A, IF_NOT_PRESENT, silent)
        assert (caught.value.reason, caught.value.retryable) == ("ErrImagePull", True)
    fake.fail.clear()
    await store.ensure(A, IF_NOT_PRESENT, silent)


async def test_an_image_that_cannot_be_unpacked_is_fetched_anew(tmp_path: Path, fake: FakeTools) -> None:
    fake.put(A, ImageDef())
    store = await opened(tmp_path, fake)
    fake.fail["unpack"] = "digest mismatch"
    with pytest.raises(EngineError) as caught:
        await store.ensure(A, IF_NOT_PRESENT, silent)
    assert caught.value.retryable
    assert list((tmp_path / "store/blobs/sha256").iterdir()) == []
    assert list((tmp_path / "store/images").iterdir()) == []
    assert list((tmp_path / "store/work").iterdir()) == []


async def test_a_stalled_pull_times_out(tmp_path: Path, fake: FakeTools) -> None:
    fake.put(A, ImageDef())
    fake.gate.clear()
    store = await opened(tmp_path, fake, image_pull_timeout=0.05)
    with pytest.raises(EngineError) as caught:
        await store.ensure(A, IF_NOT_PRESENT, silent)
    assert (caught.value.reason, caught.value.retryable) == ("ErrImagePull", True)


@pytest.mark.parametrize("name", ["dev", "proc", "sys"])
async def test_a_link_in_place_of_a_mount_point_is_refused(
    tmp_path: Path, fake: FakeTools, name: str
) -> None:
    fake.put(A, ImageDef())
    fake.links = {name: "/etc"}
    store = await opened(tmp_path, fake)
    with pytest.raises(EngineError) as caught:
        await store.ensure(A, IF_NOT_PRESENT, silent)
    assert (caught.value.reason, caught.value.retryable) == ("InvalidImage", False)
    assert f"/{name}" in caught.value.message
    assert await store.present(A) is None


async def test_an_image_for_another_machine_is_refused(tmp_path: Path, fake: FakeTools) -> None:
    fake.put(A, ImageDef(architecture="pdp11"))
    store = await opened(tmp_path, fake)
    with pytest.raises(EngineError, match="pdp11") as caught:
        await store.ensure(A, IF_NOT_PRESENT, silent)
    assert caught.value.reason == "InvalidImage"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"references": 1}', b'{"images": {}}', b"\xff\xfe"])
async def test_a_damaged_index_is_rebuilt(tmp_path: Path, fake: FakeTools, content: bytes) -> None:
    fake.put(A, ImageDef())
    store = await opened(tmp_path, fake)
    image = await store.ensure(A, IF_NOT_PRESENT, silent)
    (tmp_path / "store/index.json").write_bytes(content)
    again = await opened(tmp_path, fake)
    assert await again.ensure(A, NEVER, silent) == image
    await again.ensure(A, ALWAYS, silent)
    assert fake.count("unpack") == 1


async def test_an_index_that_lies_is_not_believed(tmp_path: Path, fake: FakeTools) -> None:
    store = await opened(tmp_path, fake)
    lies = {A: "sha256:" + "0" * 64, B: "../../etc"}
    (tmp_path / "store/index.json").write_text(json.dumps({"references": lies, "images": {}}))
    await store.open()
    assert await store.present(A) is None
    assert await store.present(B) is None


async def test_half_made_work_and_damaged_images_do_no_harm(tmp_path: Path, fake: FakeTools) -> None:
    digest = fake.put(A, ImageDef())
    store = await opened(tmp_path, fake)
    left = tmp_path / "store/work/left"
    (left / "image/rootfs").mkdir(parents=True)
    damaged = tmp_path / "store/images" / digest.replace(":", "-")
    (damaged / "rootfs").mkdir(parents=True)
    (damaged / "image.json").write_text("{")
    (tmp_path / "store/images/stray").mkdir()
    await store.open()
    assert not left.exists()
    assert await store.present(A) is None
    image = await store.ensure(A, IF_NOT_PRESENT, silent)
    assert (image.rootfs / "file").exists()


async def test_an_image_removed_by_hand_is_fetched_again(tmp_path: Path, fake: FakeTools) -> None:
    fake.put(A, ImageDef())
    store = await opened(tmp_path, fake)
    image = await store.ensure(A, IF_NOT_PRESENT, silent)
    shutil.rmtree(image.rootfs.parent)
    assert await store.present(A) is None
    assert (await store.ensure(A, IF_NOT_PRESENT, silent)).rootfs.is_dir()


async def test_the_folders_are_for_root_only(tmp_path: Path, fake: FakeTools) -> None:
    fake.put(A, ImageDef())
    store = await opened(tmp_path, fake)
    image = await store.ensure(A, IF_NOT_PRESENT, silent)
    for folder in (tmp_path / "store", tmp_path / "store/images", image.rootfs.parent):
        assert folder.stat().st_mode & 0o7777 == 0o700
        assert folder.stat().st_uid == os.getuid()


async def test_an_unusable_folder_is_said(tmp_path: Path, fake: FakeTools) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(EngineError) as caught:
        await opened(tmp_path, fake)
    assert caught.value.reason == "ImageStoreFailed"


class Disk:
    """In percent: a fixed part, and 10 for each image folder, and 1 for each blob."""

    def __init__(self, store: Path, fixed: float) -> None:
        self.store, self.fixed = store, fixed

    def __call__(self, _: Path) -> float:
        images = len(list((self.store / "images").iterdir()))
        return self.fixed + 10 * images + len(list((self.store / "blobs/sha256").iterdir()))


async def filled(
    tmp_path: Path, fake: FakeTools, fixed: float, clock: Clock
) -> tuple[ImageStore, dict[str, str]]:
    digests = {name: fake.put(name, ImageDef(cmd=(name,))) for name in (A, B, C)}
    disk = Disk(tmp_path / "store", fixed)
    store = await opened(tmp_path, fake, percent=disk, clock=clock, image_disk_high=80, image_disk_low=75)
    for name in (A, B, C):
        await store.ensure(name, IF_NOT_PRESENT, silent)
        clock.now += 1000
    return store, digests


async def here(store: ImageStore) -> str:
    document = json.loads(store._folders.index.read_bytes())
    return "".join(sorted(name[-3] for name in document["references"]))


async def test_nothing_is_collected_below_the_high_mark(tmp_path: Path, fake: FakeTools) -> None:
    store, _ = await filled(tmp_path, fake, 40, Clock())
    await store.collect(frozenset())
    assert await here(store) == "abc"


@pytest.mark.parametrize(
    ("fixed", "used_last", "in_use", "left"),
    [
        (45, "", "", "bc"),  # 82 percent: an image goes with two blobs, the layer is shared: 70
        (45, "a", "", "ac"),
        (55, "", "", "c"),
        (45, "", "a", "ac"),
        (90, "", "", ""),
        (90, "", "b", "b"),
    ],
)
async def test_the_least_recently_used_goes_first(
    tmp_path: Path, fake: FakeTools, fixed: float, used_last: str, in_use: str, left: str
) -> None:
    clock = Clock()
    store, digests = await filled(tmp_path, fake, fixed, clock)
    names = {"a": A, "b": B, "c": C}
    for letter in used_last:
        await store.ensure(names[letter], IF_NOT_PRESENT, silent)
        clock.now += 1000
    await store.collect(frozenset(digests[names[letter]] for letter in in_use))
    assert await here(store) == left
    for letter, name in names.items():
        image = await store.present(name)
        assert (image is not None) == (letter in left)
        if image is not None:
            assert (image.rootfs / "file").exists()
    assert list((tmp_path / "store/work").iterdir()) == []


async def test_what_was_just_handed_out_stays(tmp_path: Path, fake: FakeTools) -> None:
    clock = Clock()
    store, _ = await filled(tmp_path, fake, 90, clock)
    await store.present(A)
    clock.now += garbage.MINIMUM_AGE / 2
    await store.collect(frozenset())
    assert await here(store) == "a"


async def test_blobs_stay_while_a_pull_counts_on_them(tmp_path: Path, fake: FakeTools) -> None:
    clock = Clock()
    store, _ = await filled(tmp_path, fake, 90, clock)
    blobs = tmp_path / "store/blobs/sha256"
    before = len(list(blobs.iterdir()))
    fake.gate.clear()
    fake.called.clear()
    fake.put("registry.test/d:1", ImageDef(cmd=("d",)))
    pull = asyncio.create_task(store.ensure("registry.test/d:1", IF_NOT_PRESENT, silent))
    await fake.called.wait()
    await store.collect(frozenset())
    assert len(list(blobs.iterdir())) == before
    fake.gate.set()
    assert (await pull).rootfs.is_dir()
    await store.collect(frozenset())
    assert list(blobs.iterdir()) == []


async def test_a_collected_image_can_be_had_again(tmp_path: Path, fake: FakeTools) -> None:
    store, _ = await filled(tmp_path, fake, 90, Clock())
    await store.collect(frozenset())
    assert (await store.ensure(A, IF_NOT_PRESENT, silent)).rootfs.is_dir()


def test_disk_usage_is_a_percentage(tmp_path: Path) -> None:
    assert 0 <= garbage.disk_usage(tmp_path) <= 100
