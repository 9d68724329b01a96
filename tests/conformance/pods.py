"""Pods by CRI: what kubelet asks of containerd, with sandboxes that are our shim's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.conformance.sandboxer import NAME, SECONDS, Sandboxer, sandboxer
from tests.containerds import import_images

from sandkeeper.localcluster.ocilayout import ImageDef, busybox_image
from sandkeeper.wire import cri_pb2, cri_pb2_grpc, node_pb2
from sandkeeper.wire.client import ShimClient, open_channel

PAUSE, BUSYBOX = "example.test/pause:1", "example.test/busybox:1"
NAMESPACE = "k8s.io"
CGROUP = f"pods-{os.getpid()}"
SUBNET = "10.231.7.0/24"
_PLUGINS = ("/usr/lib/cni", "/opt/cni/bin")


def _config(cni: Path) -> str:
    plugins = next((each for each in _PLUGINS if Path(each, "ptp").exists()), "")
    if not plugins:
        pytest.skip("pods need CNI's plugins: make setup installs them")
    runtime = "plugins.'io.containerd.cri.v1.runtime'"
    return f"""
[{runtime}]
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
[{runtime}.containerd.runtimes.{NAME}]
runtime_type = 'io.containerd.runc.v2'
sandboxer = '{NAME}'
[{runtime}.cni]
bin_dirs = ['{plugins}']
conf_dir = '{cni}'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = '{PAUSE}'
"""


def _network(folder: Path) -> None:
    """Two ends and no bridge between pods: nothing of it outlives a pod."""
    ipam = {"type": "host-local", "subnet": SUBNET, "dataDir": str(folder / "addresses")}
    plugin = {"type": "ptp", "ipam": ipam}
    text = json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [plugin]})
    (folder / "10-pods.conflist").write_text(text)


@contextlib.contextmanager
def pods(*, tasks: bool = False) -> Iterator[Sandboxer]:
    """As `sandboxer`, with CRI: its runtime handler `sandkeeper` makes pods in our shim."""
    cni = Path(tempfile.mkdtemp(prefix="sbx-cni-"))
    try:
        _network(cni)
        with sandboxer(tasks=tasks, cri=True, config=_config(cni), cgroups=(CGROUP,)) as node:
            # CRI wants its pause image even where a sandboxer needs none.
            import_images(node.containerd, {PAUSE: ImageDef(), BUSYBOX: busybox_image()}, NAMESPACE)
            yield node
    finally:
        shutil.rmtree(cni, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Kubelet:
    """What a kubelet calls. Every call raises grpc.aio.AioRpcError."""

    stub: Any
    shim: ShimClient

    async def call(self, method: str, **fields: Any) -> Any:
        request = getattr(cri_pb2, f"{method}Request")
        return await getattr(self.stub, method)(request(**fields), timeout=SECONDS, wait_for_ready=True)

    async def status(self, pod_id: str) -> cri_pb2.PodSandboxStatus:
        answer = await self.call("PodSandboxStatus", pod_sandbox_id=pod_id)
        found: cri_pb2.PodSandboxStatus = answer.status
        return found

    async def records(self) -> dict[str, node_pb2.SandboxRecord]:
        """What our shim has, by its own ids."""
        return {record.sandbox_id: record for record in (await self.shim.list()).sandboxes}

    async def remove(self, pod_id: str) -> None:
        """As kubelet ends a pod."""
        await self.call("StopPodSandbox", pod_sandbox_id=pod_id)
        await self.call("RemovePodSandbox", pod_sandbox_id=pod_id)


@contextlib.asynccontextmanager
async def kubelet(node: Sandboxer) -> AsyncIterator[Kubelet]:
    """Its connections to both."""
    async with open_channel(f"unix:{node.containerd.socket}") as channel:
        shim = ShimClient(f"unix:{node.shim.socket}")
        try:
            yield Kubelet(cri_pb2_grpc.RuntimeServiceStub(channel), shim)
        finally:
            await shim.close()


def pod(*, host_network: bool = False, **options: Any) -> cri_pb2.PodSandboxConfig:
    """A pod's configuration as kubelet writes it: a PID namespace for each container."""
    wishes = {
        "network": cri_pb2.NODE if host_network else cri_pb2.POD,
        "pid": cri_pb2.CONTAINER,
        "ipc": cri_pb2.POD,
        **options,
    }
    uid = str(uuid.uuid4())
    return cri_pb2.PodSandboxConfig(
        metadata={"name": f"pod-{uid[:8]}", "uid": uid, "namespace": "default"},
        hostname=f"pod-{uid[:8]}",
        linux={"cgroup_parent": f"/{CGROUP}", "security_context": {"namespace_options": wishes}},
    )


def container(name: str, script: str, **options: Any) -> cri_pb2.ContainerConfig:
    """One that runs a script of `sh`."""
    wishes = {"network": cri_pb2.POD, "pid": cri_pb2.CONTAINER, "ipc": cri_pb2.POD, **options}
    return cri_pb2.ContainerConfig(
        metadata={"name": name},
        image={"image": BUSYBOX},
        command=["sh", "-c", script],
        linux={"security_context": {"namespace_options": wishes}},
    )


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a call that must fail does."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("it was not refused")
