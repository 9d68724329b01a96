"""Our shim as containerd's sandboxer, with a real containerd as its client.

What a test does it asks of containerd's socket; what comes of it is looked for in the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from tests.cluster import eventually
from tests.conformance.sandboxer import NAME, Client, Sandboxer, any_of, sandboxer

from sandkeeper.conformance.server import until
from sandkeeper.localcluster.processes import start_time
from sandkeeper.wire import cri_pb2, node_pb2

pytestmark = [pytest.mark.oci]

NOT_FOUND, OK = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OK
SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"


@pytest.fixture(scope="module")
def node() -> Iterator[Sandboxer]:
    with sandboxer() as made:
        yield made


@pytest.fixture
async def client(node: Sandboxer) -> AsyncIterator[Client]:
    async with node.client() as made:
        yield made


@pytest.fixture
async def box(client: Client) -> AsyncIterator[str]:
    """The id of a sandbox that is not there yet, and not any more after the test."""
    sandbox_id = f"box-{uuid.uuid4().hex}"
    yield sandbox_id
    await client.remove(sandbox_id)


def namespace_of(pid: int | str, kind: str) -> int:
    """Which namespace a process is in."""
    return Path(f"/proc/{pid}/ns/{kind}").stat().st_ino


def gone(pid: int) -> bool:
    return start_time(pid) is None


# -- what containerd makes of us


def test_the_plugin_loads(node: Sandboxer) -> None:
    listing = [line.split() for line in node.containerd.ctr("plugins", "list").splitlines()]
    found = {words[1]: words[-1] for words in listing if words[:1] == ["io.containerd.sandbox.controller.v1"]}
    assert found[NAME] == "ok"


# -- a whole life


async def test_from_create_to_shutdown(node: Sandboxer, client: Client, box: str) -> None:
    await client.remember(box)
    spec = any_of(SPEC, json.dumps({"ociVersion": "1.3.0", "hostname": "named-by-spec"}).encode())
    asked = {"sandbox_id": box, "spec": spec, "sandboxer": NAME, "runtime": {"name": "any"}}
    created = await client.call("Create", box, sandbox=asked, annotations={"a.b/c": "d"})
    assert created.sandbox_id == box
    assert (await client.call("Status", box)).pid == 0

    started = await client.call("Start", box)
    pid = started.pid
    assert Path(f"/proc/{pid}/comm").read_text().strip() == "catatonit"
    assert started.HasField("created_at")
    hostname = subprocess.run(
        ["nsenter", "-t", str(pid), "--uts", "uname", "-n"], check=True, capture_output=True, text=True
    )
    assert hostname.stdout.strip() == "named-by-spec"
    for kind in ("net", "ipc", "uts", "pid"):
        assert namespace_of(pid, kind) != namespace_of("self", kind)

    brief, verbose = await client.call("Status", box), await client.call("Status", box, verbose=True)
    assert (brief.sandbox_id, brief.state, brief.pid) == (box, "SANDBOX_READY", pid)
    assert not brief.info
    assert json.loads(verbose.info["sandkeeper"])["sandboxId"] == box
    assert (await client.record(box)).sandbox_id == box

    metrics = (await client.call("Metrics", box)).metrics
    assert metrics.id == box
    assert metrics.data.Is(node_pb2.Usage.DESCRIPTOR)

    waits = [asyncio.ensure_future(client.call("Wait", box)) for _ in range(20)]
    await client.call("Stop", box, timeout_secs=10)
    answers = await asyncio.gather(*waits)
    first = answers[0]
    assert all(answer == first for answer in answers)
    assert gone(pid)
    ended = await client.call("Status", box)
    assert (ended.state, ended.pid, ended.exited_at) == ("SANDBOX_NOTREADY", 0, first.exited_at)
    assert await client.call("Wait", box) == first

    await client.call("Shutdown", box)
    assert await client.code("Shutdown", box) == NOT_FOUND
    assert await client.code("Wait", box) == NOT_FOUND
    eventually(lambda: not node.shim.leftovers(), seen=node.shim.leftovers)


async def test_shutdown_ends_what_runs(client: Client, box: str) -> None:
    pid = await client.run(box)
    waiting = asyncio.ensure_future(client.code("Wait", box))
    await client.call("Shutdown", box)
    assert gone(pid)
    assert await waiting in (OK, NOT_FOUND)


async def test_an_end_that_nobody_asked_for_is_told(client: Client, box: str) -> None:
    pid = await client.run(box)
    waiting = asyncio.ensure_future(client.call("Wait", box))
    subprocess.run(["kill", "-KILL", str(pid)], check=True)
    # Whoever killed it, and whether it had ended by itself, nobody can say afterwards.
    assert (await waiting).exit_status == 255
    assert (await client.record(box)).exit.reason == "SandboxLost"


async def test_create_again(client: Client, box: str) -> None:
    assert await client.code("Create", box) == OK
    assert await client.code("Create", box) == OK
    assert await client.code("Create", box, annotations={"a": "b"}) == grpc.StatusCode.ALREADY_EXISTS
    pid = (await client.call("Start", box)).pid
    assert (await client.call("Start", box)).pid == pid


@pytest.mark.parametrize("method", ["Start", "Stop", "Wait", "Status", "Metrics", "Shutdown"])
async def test_an_unknown_id(client: Client, box: str, method: str) -> None:
    assert await client.code(method, box) == NOT_FOUND


async def test_update_changes_nothing(client: Client, box: str) -> None:
    pid = await client.run(box)
    # Always with a runtime: containerd 2.3.7 dies of a sandbox without one.
    asked = {"sandbox_id": box, "runtime": {"name": "any"}, "labels": {"a": "b"}}
    assert await client.code("Update", box, sandbox=asked, fields=["labels"]) == OK
    assert (await client.call("Status", box)).pid == pid


# -- what Create carries


@contextlib.contextmanager
def network_namespace(folder: Path) -> Iterator[Path]:
    """One that lives by its mount alone, as CNI's do."""
    path = folder / f"net-{uuid.uuid4().hex[:8]}"
    path.touch()
    subprocess.run(["unshare", f"--net={path}", "true"], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


async def test_the_network_namespace_is_joined(node: Sandboxer, client: Client, box: str) -> None:
    with network_namespace(node.folder) as path:
        pid = await client.run(box, netns_path=str(path))
        assert namespace_of(pid, "net") == path.stat().st_ino
        await client.call("Shutdown", box)


@pytest.mark.parametrize("path", ["/proc/version", "/nowhere/net"])
async def test_what_is_no_network_namespace_is_refused(client: Client, box: str, path: str) -> None:
    await client.call("Create", box, netns_path=path)
    assert await client.code("Start", box) == grpc.StatusCode.FAILED_PRECONDITION
    assert "netns_path" in (await client.record(box)).message


def rootfs(folder: Path, kind: str) -> list[dict[str, object]]:
    """Mounts as a snapshotter gives them; in the root there is a file `mark`."""
    lower = folder / f"root-{uuid.uuid4().hex[:8]}"
    lower.mkdir()
    (lower / "mark").write_text("here")
    if kind == "bind":
        return [{"type": "bind", "source": str(lower), "options": ["rbind", "ro"]}]
    upper, work = lower.with_suffix(".upper"), lower.with_suffix(".work")
    upper.mkdir()
    work.mkdir()
    layers = [f"workdir={work}", f"upperdir={upper}", f"lowerdir={lower}"]
    return [{"type": "overlay", "source": "overlay", "options": layers}]


@pytest.mark.parametrize("kind", ["bind", "overlay"])
async def test_the_rootfs_is_the_sandbox_processs(
    node: Sandboxer, client: Client, box: str, kind: str
) -> None:
    pid = await client.run(box, rootfs=rootfs(node.folder, kind))
    assert Path(f"/proc/{pid}/root/mark").read_text() == "here"
    assert not Path(f"/proc/{pid}/root/etc").exists()
    assert len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines()) == 1
    await client.call("Shutdown", box)
    eventually(lambda: not node.shim.leftovers(), seen=node.shim.leftovers)


async def test_a_rootfs_that_cannot_be_mounted_is_refused(client: Client, box: str) -> None:
    await client.call("Create", box, rootfs=[{"type": "nonsense", "source": "none"}])
    assert await client.code("Start", box) == grpc.StatusCode.FAILED_PRECONDITION
    assert "rootfs" in (await client.record(box)).message


async def test_options_are_ours_or_a_pods(client: Client, box: str) -> None:
    strange = any_of("example.test/Other", b"")
    assert await client.code("Create", box, options=strange) == grpc.StatusCode.INVALID_ARGUMENT
    pod = cri_pb2.PodSandboxConfig(hostname="a-pod")
    packed = any_of("runtime.v1.PodSandboxConfig", pod.SerializeToString())
    assert await client.code("Create", box, options=packed) == OK


# -- two namespaces, two restarts


async def test_one_id_in_two_namespaces_is_two_sandboxes(node: Sandboxer, client: Client, box: str) -> None:
    async with node.client("another") as other:
        pid, second = await client.run(box), await other.run(box)
        assert pid != second
        await other.call("Shutdown", box)
        assert gone(second)
        assert (await client.call("Status", box)).pid == pid
        assert await other.code("Status", box) == NOT_FOUND


async def test_containerd_is_restarted_in_the_middle(node: Sandboxer, box: str) -> None:
    async with node.client() as before:
        pid = await before.run(box)
        waiting = asyncio.ensure_future(before.code("Wait", box))
        await before.call("Status", box)
        node.containerd.kill()
        node.containerd.start()
        async with node.client() as after:
            assert (await after.call("Status", box)).pid == pid
            await after.call("Stop", box)
            await after.call("Wait", box)
            await waiting
            await after.call("Shutdown", box)
    assert gone(pid)


async def test_the_shim_is_restarted_under_containerd(node: Sandboxer, client: Client, box: str) -> None:
    pid = await client.run(box)
    waiting = asyncio.ensure_future(client.call("Wait", box))
    await node.restart_shim()

    async def seen() -> int:
        """containerd's connection comes back by itself; until then it says UNAVAILABLE."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            return int((await client.call("Status", box)).pid)
        return 0

    assert await until(seen, bool) == pid
    await client.call("Stop", box, timeout_secs=1)
    assert (await waiting) == await client.call("Wait", box)


async def test_a_root_of_its_own_is_no_other_sandboxs(node: Sandboxer, client: Client, box: str) -> None:
    """After a restart the shim goes on in the mount namespace of an earlier one: not in this sandbox's."""
    await client.run(box, rootfs=rootfs(node.folder, "bind"))
    await node.restart_shim()
    await until(lambda: client.code("Status", box), lambda code: code == OK)
    pid = await client.run(f"{box}-2", rootfs=rootfs(node.folder, "overlay"))
    assert Path(f"/proc/{pid}/root/mark").exists()
    await client.call("Shutdown", f"{box}-2")
