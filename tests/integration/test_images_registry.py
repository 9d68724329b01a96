"""The image store against a real registry on loopback, with the real skopeo and umoci."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import images
from tests.images import PASSWORD, ImageDef, Registry, busybox_image

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci.images import ImageStore, StoreSettings
from sandkeeper.wire.node_pb2 import IMAGE_PULL_POLICY_ALWAYS as ALWAYS
from sandkeeper.wire.node_pb2 import IMAGE_PULL_POLICY_IF_NOT_PRESENT as IF_NOT_PRESENT
from sandkeeper.wire.node_pb2 import IMAGE_PULL_POLICY_NEVER as NEVER

pytestmark = [
    pytest.mark.oci,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(shutil.which(tool) for tool in ("skopeo", "umoci", "docker-registry")),
        reason="needs root, skopeo, umoci and docker-registry",
    ),
]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with images.registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


def silent(reason: str, message: str) -> None:
    pass


async def opened(tmp_path: Path, host: str = "", **changes: object) -> ImageStore:
    if host:
        changes = {"insecure_registries": (host,), **changes}
    store = ImageStore(StoreSettings(tmp_path / "store", **changes))  # type: ignore[arg-type]
    await store.open()
    return store


async def failure(store: ImageStore, reference: str) -> EngineError:
    with pytest.raises(EngineError) as caught:
        await store.ensure(reference, IF_NOT_PRESENT, silent)
    assert caught.value.reason == "ErrImagePull"
    assert caught.value.retryable
    assert reference.partition("@")[0] in caught.value.message
    assert list((store._folders.work).iterdir()) == []
    return caught.value


def conf(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "registries.conf"
    path.write_text(text)
    return path


async def test_an_image_is_pulled_and_unpacked(registry: Registry, tmp_path: Path) -> None:
    reference = registry.push("busybox:1.37", busybox_image(base=ImageDef(env=("A=b",), working_dir="/tmp")))
    insecure = conf(tmp_path, f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n')
    store = await opened(tmp_path, registries_conf=insecure)
    image = await store.ensure(reference, IF_NOT_PRESENT, silent)
    assert image.config.env == ("A=b",)
    assert image.config.cmd == ("sh",)
    assert image.config.working_dir == "/tmp"
    assert (image.rootfs / "tmp").stat().st_mode & 0o7777 == 0o1777
    assert (image.rootfs / "bin/sh").readlink() == Path("busybox")
    ran = subprocess.run(
        ["chroot", str(image.rootfs), "/bin/sh", "-c", "echo works"], capture_output=True, cwd="/"
    )
    assert ran.stdout == b"works\n"
    manifest = subprocess.run(
        ["skopeo", "inspect", "--tls-verify=false", "--format={{.Digest}}", f"docker://{reference}"],
        check=True,
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert image.digest == manifest.stdout.strip()
    assert await store.ensure(reference, NEVER, silent) == image


async def test_always_asks_for_the_manifest_alone_and_follows_the_tag(
    registry: Registry, tmp_path: Path
) -> None:
    reference = registry.push("moving:1", ImageDef(files={"v": b"1"}))
    store = await opened(tmp_path, registry.host)
    first = await store.ensure(reference, ALWAYS, silent)
    before = registry.blob_downloads()
    assert await store.ensure(reference, ALWAYS, silent) == first
    assert registry.blob_downloads() == before
    registry.push("moving:1", ImageDef(files={"v": b"2"}))
    assert await store.ensure(reference, IF_NOT_PRESENT, silent) == first
    assert ((await store.ensure(reference, ALWAYS, silent)).rootfs / "v").read_bytes() == b"2"
    assert (first.rootfs / "v").read_bytes() == b"1"


async def test_layers_that_are_here_are_not_fetched_again(registry: Registry, tmp_path: Path) -> None:
    one = registry.push("shared/one:1", ImageDef(files={"a": b"shared"}, cmd=("one",)))
    two = registry.push("shared/two:1", ImageDef(files={"a": b"shared"}, cmd=("two",)))
    store = await opened(tmp_path, registry.host)
    await store.ensure(one, IF_NOT_PRESENT, silent)
    before = registry.blob_downloads()
    await store.ensure(two, IF_NOT_PRESENT, silent)
    assert registry.blob_downloads() == before + 1  # its configuration


async def test_many_images_at_once(registry: Registry, tmp_path: Path) -> None:
    names = [registry.push(f"many:{i}", ImageDef(files={"a": b"shared"}, cmd=(str(i),))) for i in range(6)]
    store = await opened(tmp_path, registry.host)
    pulled = await asyncio.gather(*(store.ensure(n, IF_NOT_PRESENT, silent) for n in names for _ in range(3)))
    assert sorted({image.config.cmd[0] for image in pulled}) == list("012345")


async def test_references_by_digest(registry: Registry, tmp_path: Path) -> None:
    here = ImageDef(files={"a": b"here"})
    reference = registry.push("multi:1", {"there": ImageDef(architecture="pdp11"), "here": here})
    store = await opened(tmp_path, registry.host)
    image = await store.ensure(reference, IF_NOT_PRESENT, silent)
    assert (image.rootfs / "a").read_bytes() == b"here"
    listed = subprocess.run(
        ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{reference}"],
        check=True,
        capture_output=True,
        cwd="/",
    ).stdout
    assert image.digest in listed.decode()
    name = reference.removesuffix(":1")
    by_manifest = await store.ensure(f"{name}@{image.digest}", IF_NOT_PRESENT, silent)
    by_both = await store.ensure(f"{name}:other@{image.digest}", NEVER, silent)
    assert by_manifest == by_both == image
    await failure(store, f"{name}@sha256:{'0' * 64}")


async def test_no_image_for_this_platform(registry: Registry, tmp_path: Path) -> None:
    parts = {"a": ImageDef(architecture="pdp11"), "b": ImageDef(architecture="vax")}
    error = await failure(await opened(tmp_path, registry.host), registry.push("foreign:1", parts))
    assert "linux/pdp11, linux/vax" in error.message


@pytest.mark.parametrize("flags", [("--format=v2s2",), ("--dest-compress-format=zstd",)])
async def test_dockers_format_and_zstd(registry: Registry, tmp_path: Path, flags: tuple[str, ...]) -> None:
    reference = registry.push("other:1", ImageDef(files={"a": flags[0].encode()}), *flags)
    store = await opened(tmp_path, registry.host)
    image = await store.ensure(reference, IF_NOT_PRESENT, silent)
    assert (image.rootfs / "a").read_bytes() == flags[0].encode()
    again = await store.ensure(f"{reference.rpartition(':')[0]}@{image.digest}", ALWAYS, silent)
    assert again == image


async def test_a_mirror_is_honored(registry: Registry, tmp_path: Path) -> None:
    registry.push("mirrored/app:1", ImageDef(files={"a": b"mirror"}))
    mirrors = conf(
        tmp_path,
        '[[registry]]\nlocation = "upstream.invalid"\n'
        f'[[registry.mirror]]\nlocation = "{registry.host}/mirrored"\ninsecure = true\n',
    )
    store = await opened(tmp_path, registries_conf=mirrors)
    image = await store.ensure("upstream.invalid/app:1", IF_NOT_PRESENT, silent)
    assert (image.rootfs / "a").read_bytes() == b"mirror"


async def test_a_registry_that_asks_for_a_password(tmp_path: Path) -> None:
    with images.registry(tmp_path / "registry", auth=True) as private:
        reference = private.push("secret:1", ImageDef())
        wrong = tmp_path / "wrong.json"
        images.write_authfile(wrong, private.host, "not-the-password")
        for authfile in (None, wrong):
            error = await failure(await opened(tmp_path, private.host, image_auth_file=authfile), reference)
            assert "access was denied" in error.message
            assert "not-the-password" not in error.message
            assert PASSWORD not in error.message
        store = await opened(tmp_path, private.host, image_auth_file=private.authfile)
        await store.ensure(reference, IF_NOT_PRESENT, silent)


async def test_unknown_images(registry: Registry, tmp_path: Path) -> None:
    registry.push("known:1", ImageDef())
    store = await opened(tmp_path, registry.host)
    for name in ("unknown:1", "known:2"):
        error = await failure(store, f"{registry.host}/{name}")
        assert "the image was not found" in error.message


async def test_an_unreachable_registry(tmp_path: Path) -> None:
    error = await failure(await opened(tmp_path), f"127.0.0.1:{images.free_port()}/app:1")
    assert "the registry cannot be reached" in error.message


async def test_a_registry_without_tls_is_not_trusted_unasked(registry: Registry, tmp_path: Path) -> None:
    store = await opened(tmp_path, registries_conf=conf(tmp_path, ""))
    error = await failure(store, registry.push("plain:1", ImageDef()))
    assert "TLS" in error.message


async def test_a_registry_that_never_answers_delays_nobody_else(registry: Registry, tmp_path: Path) -> None:
    good = registry.push("good:1", ImageDef())
    with images.stalled() as silent_registry:
        store = await opened(tmp_path, registry.host, image_pull_timeout=3.0)
        bad = asyncio.create_task(failure(store, f"{silent_registry.host}/app:1"))
        assert await asyncio.to_thread(silent_registry.reached.wait, 20)
        await store.ensure(good, IF_NOT_PRESENT, silent)
        assert not bad.done()
        assert "3 s" in (await bad).message


async def test_the_trust_policy_is_honored(registry: Registry, tmp_path: Path) -> None:
    reference = registry.push("trusted/app:1", ImageDef())
    policy = tmp_path / "policy.json"
    rules: dict[str, object] = {"default": [{"type": "reject"}]}
    policy.write_text(json.dumps(rules))
    store = await opened(tmp_path, registry.host, image_policy=policy)
    assert "trust policy" in (await failure(store, reference)).message
    rules["transports"] = {"docker": {f"{registry.host}/trusted": [{"type": "insecureAcceptAnything"}]}}
    policy.write_text(json.dumps(rules))
    await store.ensure(reference, IF_NOT_PRESENT, silent)
    assert "trust policy" in (await failure(store, registry.push("app:1", ImageDef()))).message


async def test_a_damaged_download_is_fetched_anew(registry: Registry, tmp_path: Path) -> None:
    one = registry.push("damaged/one:1", ImageDef(files={"a": b"damage me"}, cmd=("one",)))
    two = registry.push("damaged/two:1", ImageDef(files={"a": b"damage me"}, cmd=("two",)))
    store = await opened(tmp_path, registry.host)
    await store.ensure(one, IF_NOT_PRESENT, silent)
    for blob in (tmp_path / "store/blobs/sha256").iterdir():
        content = bytearray(blob.read_bytes())
        content[-20] ^= 0xFF
        blob.write_bytes(content)
    await failure_of_content(store, two)
    assert (await store.ensure(two, IF_NOT_PRESENT, silent)).config.cmd == ("two",)


async def failure_of_content(store: ImageStore, reference: str) -> None:
    with pytest.raises(EngineError) as caught:
        await store.ensure(reference, IF_NOT_PRESENT, silent)
    assert (caught.value.reason, caught.value.retryable) == ("ErrImagePull", True)


async def test_an_image_cannot_write_outside_its_tree(registry: Registry, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    hostile = ImageDef(
        files={"link/owned": b"x", "up/owned": b"x"}, symlinks={"link": str(outside), "up": "../../.."}
    )
    store = await opened(tmp_path, registry.host)
    image = await store.ensure(registry.push("hostile:1", hostile), IF_NOT_PRESENT, silent)
    assert not (image.rootfs.parent / "owned").exists()
    assert list(outside.iterdir()) == []
    assert not list(tmp_path.glob("owned")) + list((tmp_path / "store").glob("*/owned"))


async def test_links_in_place_of_mount_points_are_refused(registry: Registry, tmp_path: Path) -> None:
    store = await opened(tmp_path, registry.host)
    for name in ("dev", "proc", "sys"):
        with pytest.raises(EngineError) as caught:
            await store.ensure(
                registry.push(f"links:{name}", ImageDef(symlinks={name: "/etc"})), IF_NOT_PRESENT, silent
            )
        assert (caught.value.reason, caught.value.retryable) == ("InvalidImage", False)
    assert list((tmp_path / "store/images").iterdir()) == []


async def test_a_local_layout_needs_no_registry(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    images.write_layout(layout, {"docker.io/library/busybox:1.37": busybox_image()})
    store = await opened(tmp_path, image_layouts=(layout,))
    image = await store.ensure("busybox:1.37", NEVER, silent)
    assert (image.rootfs / "bin/busybox").exists()
    assert await store.ensure("docker.io/busybox:1.37", ALWAYS, silent) == image
    assert list((tmp_path / "store/blobs/sha256").iterdir()) == []
    changed = images.write_layout(
        layout, {"docker.io/library/busybox:1.37": busybox_image(base=ImageDef(cmd=("x",)))}
    )
    assert await store.ensure("busybox:1.37", IF_NOT_PRESENT, silent) == image
    newer = await store.ensure("busybox:1.37", ALWAYS, silent)
    assert newer.digest == changed["docker.io/library/busybox:1.37"]
    # Both trees of one image name are there until they are collected: containers may stand on either.
    assert image.rootfs.exists()


KILLED = """
import asyncio, sys
from pathlib import Path
from sandkeeper.shim.engines.oci.images import ImageStore, StoreSettings

async def main():
    store = ImageStore(StoreSettings(Path(sys.argv[1]), insecure_registries=(sys.argv[2].partition("/")[0],)))
    await store.open()
    await store.ensure(sys.argv[2], 0, lambda reason, message: None)

asyncio.run(main())
"""

SLOW_TOOL = """#!/bin/sh
for last; do :; done
mkdir -p "$last/etc"
echo $$ > "$MARK.tmp" && mv "$MARK.tmp" "$MARK"
exec sleep 600
"""


@pytest.mark.parametrize("tool", ["umoci", "skopeo"])
async def test_a_shim_killed_in_the_middle_leaves_no_half_image(
    registry: Registry, tmp_path: Path, tool: str
) -> None:
    reference = registry.push("killed:1", ImageDef(files={"whole": b"x"}))
    tools, mark = tmp_path / "tools", tmp_path / "mark"
    tools.mkdir()
    script = SLOW_TOOL.replace("$MARK", str(mark))
    if tool == "skopeo":  # only its copy is slow
        real = shutil.which("skopeo")
        script = script.replace(
            "#!/bin/sh\n", f'#!/bin/sh\ncase "$*" in *" inspect "*) exec {real} "$@";; esac\n'
        )
        script = script.replace('mkdir -p "$last/etc"', "")
    (tools / tool).write_text(script)
    (tools / tool).chmod(0o755)
    store_folder = tmp_path / "store"
    shim = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(store_folder), reference],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        cwd="/",
    )
    try:
        await poll(mark.exists)
    finally:
        shim.send_signal(signal.SIGKILL)
        shim.wait()
    await poll(lambda: not alive(int(mark.read_text())))
    assert list((store_folder / "work").iterdir())
    assert list((store_folder / "images").iterdir()) == []
    store = await opened(tmp_path, registry.host)
    assert list((store_folder / "work").iterdir()) == []
    assert await store.present(reference) is None
    assert ((await store.ensure(reference, IF_NOT_PRESENT, silent)).rootfs / "whole").exists()


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


async def poll(condition: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come about in time"
        await asyncio.sleep(0.02)
