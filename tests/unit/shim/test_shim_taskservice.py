"""The Task service beside a sandbox process: what of it can be seen without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.settings import SandboxerSettings
from sandkeeper.shim.taskservice import TaskServices, address_in
from sandkeeper.wire import node_pb2

SOCKET = "/run/containerd/s/92e82399"


@pytest.mark.parametrize(
    "answer",
    [
        f"unix://{SOCKET}",
        f"unix://{SOCKET}\n",
        f'{{"version":3,"address":"unix://{SOCKET}","protocol":"ttrpc"}}',
        f"\x08\x03\x12\x21unix://{SOCKET}\x1a\x05ttrpc",
    ],
)
def test_the_address_in_every_versions_answer(answer: str) -> None:
    assert address_in(answer.encode()) == SOCKET


def test_an_answer_without_one() -> None:
    assert address_in(b"") == ""


@pytest.mark.parametrize(
    ("program", "config", "wanted"),
    [
        ("shim", node_pb2.SandboxConfig(containerd={"namespace": "k8s.io"}), True),
        ("", node_pb2.SandboxConfig(containerd={"namespace": "k8s.io"}), False),
        ("shim", node_pb2.SandboxConfig(), False),
        ("shim", node_pb2.SandboxConfig(containerd={"namespace": "a"}, containers=[{"name": "b"}]), False),
    ],
)
def test_who_has_one(tmp_path: Path, program: str, config: node_pb2.SandboxConfig, wanted: bool) -> None:
    assert TaskServices(tmp_path, SandboxerSettings(task_shim=program)).wanted(config) is wanted


async def test_one_that_cannot_be_started_leaves_nothing(tmp_path: Path) -> None:
    services = TaskServices(tmp_path, SandboxerSettings(task_shim=str(tmp_path / "absent")))
    with pytest.raises(EngineError, match="absent"):
        await services.start("box", node_pb2.ContainerdSandbox(namespace="a", sandbox_id="b"))
    assert services.address("box") == ""
    assert services.list() == {"box"}
    await services.end("box")
    assert services.list() == frozenset()
