"""Pods of which containerd's CRI makes the sandbox in our shim."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from tests.cluster import eventually
from tests.conformance.pods import NAMESPACE, PAUSE, Kubelet, kubelet, pod, pods, refused
from tests.conformance.sandboxer import NAME, Sandboxer
from tests.containerds import import_images
from tests.images import ImageDef

from sandkeeper.conformance.server import until
from sandkeeper.localcluster.processes import start_time
from sandkeeper.wire import cri_pb2, node_pb2

pytestmark = [pytest.mark.oci]

READY, NOT_READY = cri_pb2.SANDBOX_READY, cri_pb2.SANDBOX_NOTREADY


@pytest.fixture(scope="module")
def node() -> Iterator[Sandboxer]:
    with pods() as made:
        yield made


@pytest.fixture
async def cri(node: Sandboxer) -> AsyncIterator[Kubelet]:
    """Every pod that a test leaves is ended after it."""
    async with kubelet(node) as made:
        yield made
        for each in (await made.call("ListPodSandbox")).items:
            await made.remove(each.id)
        eventually(lambda: not node.shim.leftovers(), seen=node.shim.leftovers)


async def run(cri: Kubelet, config: cri_pb2.PodSandboxConfig) -> tuple[str, node_pb2.SandboxRecord]:
    """A pod's id, and the shim's record of it."""
    before = await cri.records()
    answer = await cri.call("RunPodSandbox", config=config, runtime_handler=NAME)
    (made,) = (record for name, record in (await cri.records()).items() if name not in before)
    return answer.pod_sandbox_id, made


async def test_a_pod_is_ready_in_our_shim_with_cnis_address(cri: Kubelet) -> None:
    config = pod()
    pod_id, record = await run(cri, config)
    status = await cri.status(pod_id)
    assert status.state == READY
    assert record.state == node_pb2.STATE_RUNNING
    assert status.network.ip
    assert f"-- {status.network.ip}\n" in Path(f"/proc/{record.pid}/net/fib_trie").read_text()
    inside = ["nsenter", "-t", str(record.pid), "--uts", "uname", "-n"]
    said = subprocess.run(inside, check=True, capture_output=True, text=True).stdout
    assert said.strip() == config.hostname

    await cri.call("StopPodSandbox", pod_sandbox_id=pod_id)
    assert (await cri.status(pod_id)).state == NOT_READY
    assert start_time(record.pid) is None
    await cri.call("RemovePodSandbox", pod_sandbox_id=pod_id)
    assert record.sandbox_id not in await cri.records()


async def test_a_pod_on_the_nodes_network(cri: Kubelet) -> None:
    pod_id, record = await run(cri, pod(host_network=True))
    assert (await cri.status(pod_id)).state == READY
    own, its = (Path(f"/proc/{each}/ns/net").stat().st_ino for each in ("self", record.pid))
    assert own == its


async def test_kubelet_sees_the_end_of_a_sandbox_process(cri: Kubelet) -> None:
    pod_id, record = await run(cri, pod())
    subprocess.run(["kill", "-KILL", str(record.pid)], check=True)

    async def state() -> int:
        return (await cri.status(pod_id)).state

    await until(state, lambda found: found == NOT_READY)


async def test_what_cannot_be_kept_is_refused_and_leaves_nothing(cri: Kubelet) -> None:
    config = pod()
    config.linux.sysctls["net.core.somaxconn"] = "1024"
    _, words = await refused(cri.call("RunPodSandbox", config=config, runtime_handler=NAME))
    assert "sysctls" in words
    assert not await cri.records()
    assert not (await cri.call("ListPodSandbox")).items


async def test_a_pod_that_cri_forgets_does_not_stay(node: Sandboxer, cri: Kubelet) -> None:
    """Without its pause image CRI gives up between Create and Start, and asks for no Shutdown."""
    node.containerd.ctr("images", "remove", "--sync", PAUSE, namespace=NAMESPACE)
    try:
        _, words = await refused(cri.call("RunPodSandbox", config=pod(), runtime_handler=NAME))
        assert "image" in words
    finally:
        import_images(node.containerd, {PAUSE: ImageDef()}, NAMESPACE)
    await until(cri.records, lambda records: not records)


async def test_a_pod_outlives_a_restart_of_containerd(node: Sandboxer, cri: Kubelet) -> None:
    pod_id, record = await run(cri, pod())
    node.containerd.kill()
    node.containerd.start()

    async def state() -> int | None:
        with contextlib.suppress(grpc.aio.AioRpcError):  # it finds its pods only after it answers
            return (await cri.status(pod_id)).state
        return None

    assert await until(state, lambda found: found is not None) == READY
    assert (await cri.records())[record.sandbox_id].pid == record.pid


async def test_a_pod_outlives_a_restart_of_the_shim(node: Sandboxer, cri: Kubelet) -> None:
    pod_id, record = await run(cri, pod())
    await node.restart_shim()
    async with kubelet(node) as after:

        async def state() -> int | None:
            with contextlib.suppress(grpc.aio.AioRpcError):
                return (await after.status(pod_id)).state
            return None

        assert await until(state, lambda found: found == READY) == READY
        assert (await after.records())[record.sandbox_id].pid == record.pid
        await after.remove(pod_id)
