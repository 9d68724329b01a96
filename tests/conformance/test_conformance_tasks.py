"""Pods whose containers run in our sandboxes: containerd calls the Task service that the shim has beside them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from tests.cluster import eventually
from tests.conformance.pods import NAMESPACE, Kubelet, container, kubelet, pod, pods
from tests.conformance.sandboxer import NAME, SECONDS, Sandboxer

from sandkeeper.conformance.server import until
from sandkeeper.localcluster.processes import start_time
from sandkeeper.wire import controller_pb2, controller_pb2_grpc, cri_pb2
from sandkeeper.wire.client import open_channel

pytestmark = [pytest.mark.oci]

READY, NOT_READY = cri_pb2.SANDBOX_READY, cri_pb2.SANDBOX_NOTREADY
RUNNING, EXITED = cri_pb2.CONTAINER_RUNNING, cri_pb2.CONTAINER_EXITED
FOREVER = "sleep 1000"


@pytest.fixture(scope="module")
def node() -> Iterator[Sandboxer]:
    with pods(tasks=True) as made:
        yield made


@pytest.fixture
async def cri(node: Sandboxer) -> AsyncIterator[Kubelet]:
    """Every pod that a test leaves is ended after it, and with it all that ran in it."""
    async with kubelet(node) as made:
        yield made
        for each in (await made.call("ListPodSandbox")).items:
            await made.remove(each.id)
        eventually(lambda: not left(node), seen=lambda: left(node))


def left(node: Sandboxer) -> list[str]:
    tasks = [f"task service {each}" for each in (node.shim.folder / "run" / "tasks").glob("*")]
    return [*node.shim.leftovers(), *tasks, *(f"containerd-shim {pid}" for pid in node.containerd.shims())]


class Pod:
    """One pod that runs."""

    def __init__(self, cri: Kubelet, config: cri_pb2.PodSandboxConfig, pod_id: str) -> None:
        self.cri, self.config, self.id = cri, config, pod_id

    async def run(self, made: cri_pb2.ContainerConfig) -> str:
        """A container that was started; its id."""
        answer = await self.cri.call(
            "CreateContainer", pod_sandbox_id=self.id, config=made, sandbox_config=self.config
        )
        await self.cri.call("StartContainer", container_id=answer.container_id)
        return str(answer.container_id)

    async def exec(self, container_id: str, script: str) -> str:
        answer = await self.cri.call("ExecSync", container_id=container_id, cmd=["sh", "-c", script])
        assert answer.exit_code == 0, answer.stderr
        return str(answer.stdout.decode())

    async def state(self, container_id: str) -> tuple[int, int]:
        status = (await self.cri.call("ContainerStatus", container_id=container_id)).status
        return status.state, status.exit_code

    async def pid(self) -> int:
        """Of its sandbox process."""
        (record,) = (await self.cri.records()).values()
        return int(record.pid)


async def running(cri: Kubelet, config: cri_pb2.PodSandboxConfig | None = None) -> Pod:
    config = config or pod()
    answer = await cri.call("RunPodSandbox", config=config, runtime_handler=NAME)
    return Pod(cri, config, answer.pod_sandbox_id)


async def test_containers_share_the_pods_namespaces(cri: Kubelet) -> None:
    made = await running(cri)
    one, other = await made.run(container("one", FOREVER)), await made.run(container("other", FOREVER))
    address = (await cri.status(made.id)).network.ip
    pid = await made.pid()
    look = "for kind in net ipc uts pid; do readlink /proc/self/ns/$kind; done"
    seen = [(await made.exec(each, look)).split() for each in (one, other)]
    pods_own = [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("net", "ipc", "uts", "pid")]  # noqa: PTH115
    assert seen[0][:3] == seen[1][:3] == pods_own[:3]
    assert len({seen[0][3], seen[1][3], pods_own[3]}) == 3
    assert f"inet {address}/" in await made.exec(one, "ip -4 -o address")
    assert (await made.exec(other, "hostname")).strip() == made.config.hostname


async def test_a_shared_pid_namespace_is_the_pods_and_not_the_nodes(cri: Kubelet) -> None:
    made = await running(cri, pod(pid=cri_pb2.POD))
    one = await made.run(container("one", FOREVER, pid=cri_pb2.POD))
    processes = await made.exec(one, "ps -o pid,args")
    assert "catatonit" in processes.splitlines()[1]
    assert processes.splitlines()[1].split()[0] == "1"
    own = os.readlink(f"/proc/{await made.pid()}/ns/pid")  # noqa: PTH115
    assert (await made.exec(one, "readlink /proc/self/ns/pid")).strip() == own


async def test_containers_have_the_pods_resolv_conf_and_hostname(node: Sandboxer, cri: Kubelet) -> None:
    config = pod()
    config.dns_config.servers.extend(["10.0.0.10", "10.0.0.11"])
    config.dns_config.searches.extend(["default.svc.cluster.local", "cluster.local"])
    config.dns_config.options.append("ndots:5")
    made = await running(cri, config)
    one = await made.run(container("one", FOREVER))
    assert (await made.exec(one, "cat /etc/resolv.conf")).splitlines() == [
        "search default.svc.cluster.local cluster.local",
        "nameserver 10.0.0.10",
        "nameserver 10.0.0.11",
        "options ndots:5",
    ]
    assert await made.exec(one, "cat /etc/hostname") == f"{config.hostname}\n"
    await cri.remove(made.id)
    assert not list(node.containerd.folder.glob(f"root/io.containerd.grpc.v1.cri/sandboxes/{made.id}"))


async def test_an_exit_and_another_attempt(cri: Kubelet) -> None:
    made = await running(cri)
    one = await made.run(container("one", "exit 3"))
    await until(lambda: made.state(one), lambda seen: seen == (EXITED, 3))
    await cri.call("RemoveContainer", container_id=one)
    again = await made.run(container("one", FOREVER))
    await cri.call("StopContainer", container_id=again, timeout=0)
    assert await made.state(again) == (EXITED, 137)
    assert (await cri.status(made.id)).state == READY


async def test_all_goes_with_the_pod(node: Sandboxer, cri: Kubelet) -> None:
    made = await running(cri)
    await made.run(container("one", FOREVER))
    (service,) = node.containerd.shims()
    # Not in the shim's own cgroup, with which it would end.
    assert "_monitors" in Path(f"/proc/{service}/cgroup").read_text()
    await cri.remove(made.id)
    assert not node.containerd.shims()
    assert not left(node)


async def test_a_shutdown_ends_containers_that_still_run(node: Sandboxer, cri: Kubelet) -> None:
    """Whoever asks for it, and whether or not containerd knows."""
    made = await running(cri)
    one = await made.run(container("one", "sleep 4321"))
    async with open_channel(f"unix:{node.shim.socket}") as channel:
        stub = controller_pb2_grpc.ControllerStub(channel)
        await stub.Shutdown(
            controller_pb2.ControllerShutdownRequest(sandbox_id=made.id),
            metadata=(("containerd-namespace", NAMESPACE),),
            timeout=SECONDS,
        )
    assert not node.containerd.shims()
    assert not [pid for pid in pids() if b"sleep\x004321\x00" in command(pid)]
    await until(lambda: made.state(one), lambda seen: seen[0] == EXITED)


async def test_the_sandbox_ends_with_its_task_service(node: Sandboxer, cri: Kubelet) -> None:
    made = await running(cri)
    pid = await made.pid()
    (service,) = node.containerd.shims()
    subprocess.run(["kill", "-KILL", str(service)], check=True)

    async def state() -> int:
        return (await cri.status(made.id)).state

    await until(state, lambda seen: seen == NOT_READY)
    assert start_time(pid) is None


async def test_a_start_that_fails_leaves_no_task_service(node: Sandboxer) -> None:
    """containerd's CRI forgets such a sandbox, and asks for no Shutdown."""
    async with node.client() as client:
        await client.call("Create", "failing", netns_path="/proc/version")
        assert await client.code("Start", "failing") == grpc.StatusCode.FAILED_PRECONDITION
        assert not node.containerd.shims()
        await client.call("Shutdown", "failing")


async def test_containers_outlive_a_restart_of_the_shim(node: Sandboxer, cri: Kubelet) -> None:
    made = await running(cri)
    one = await made.run(container("one", FOREVER))
    service = node.containerd.shims()
    await node.restart_shim()

    async def state() -> int | None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            return (await cri.status(made.id)).state
        return None

    assert await until(state, lambda seen: seen == READY) == READY
    assert node.containerd.shims() == service
    assert await made.state(one) == (RUNNING, 0)
    await made.exec(await made.run(container("two", FOREVER)), "true")


async def test_containers_outlive_a_restart_of_containerd(node: Sandboxer, cri: Kubelet) -> None:
    made = await running(cri)
    one = await made.run(container("one", FOREVER))
    node.containerd.kill()
    node.containerd.start()

    async def state() -> tuple[int, int] | None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            return await made.state(one)
        return None

    assert await until(state, lambda seen: seen is not None) == (RUNNING, 0)
    await made.exec(one, "true")
    await made.exec(await made.run(container("two", FOREVER)), "true")


def pids() -> list[int]:
    return [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]


def command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
