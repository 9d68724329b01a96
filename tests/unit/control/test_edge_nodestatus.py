"""The status of a SandboxNode: what it says, and that it is written only when that changed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from sandkeeper.api import SandboxNodeStatus
from sandkeeper.control import nodelink, nodestatus
from sandkeeper.control.nodestatus import NodeStatusWriter, node_status
from sandkeeper.control.ports import Conflict, Raw, Rejected
from sandkeeper.wire import node_pb2

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class FakeLink:
    def __init__(self) -> None:
        self.reachable = True
        self.reason, self.message = nodelink.READY, "the shim answers"
        self.tried = self
        self.info = node_pb2.InfoResponse(
            node_name="n1",
            version="0.1.0",
            engine="oci",
            runtimes=[
                node_pb2.Runtime(name="crun", version="1.8.1", ready=True),
                node_pb2.Runtime(name="runsc", message="not found"),
            ],
            default_runtime="crun",
            capacity=node_pb2.NodeResources(cpu_millis=2500, memory_bytes=2 << 30, pids=100, sandboxes=50),
            allocatable=node_pb2.NodeResources(cpu_millis=2000, memory_bytes=1 << 30, pids=90, sandboxes=40),
            boot_id="boot-1",
        )

    def is_set(self) -> bool:
        return True


def node(status: Raw | None = None) -> Raw:
    return {"metadata": {"name": "n1", "uid": "uid-n1", "generation": 3}, "status": status or {}}


def status_of(link: FakeLink, body: Raw | None = None, sandboxes: int = 4) -> SandboxNodeStatus:
    return node_status(body or node(), link, sandboxes, NOW)  # type: ignore[arg-type]


def test_a_reachable_node_says_what_it_is() -> None:
    status = status_of(FakeLink())
    assert status.engine == "oci"
    assert [(r.name, r.ready, r.message) for r in status.runtimes] == [
        ("crun", True, ""),
        ("runsc", False, "not found"),
    ]
    assert status.capacity is not None
    assert (status.capacity.cpu, status.capacity.memory, status.capacity.pids) == ("2500m", "2Gi", 100)
    assert (status.sandboxes, status.boot_id, status.observed_generation) == (4, "boot-1", 3)
    (ready,) = status.conditions
    assert (ready.type, ready.status, ready.reason) == ("Ready", "True", "ShimReady")


def test_an_unreachable_node_keeps_what_it_last_said_and_ready_is_unknown() -> None:
    link = FakeLink()
    before = nodestatus._dump(status_of(link))
    silent = FakeLink()
    silent.info = node_pb2.InfoResponse()
    silent.reachable, silent.reason, silent.message = False, nodelink.UNREACHABLE, "no answer"
    status = status_of(silent, node(before))
    assert status.engine == "oci"
    assert status.conditions[0].status == "Unknown"
    assert status.conditions[0].reason == "ShimUnreachable"


def test_a_false_identity_is_ready_false() -> None:
    link = FakeLink()
    link.reachable, link.reason, link.message = False, nodelink.IDENTITY_MISMATCH, "calls itself 'x'"
    assert status_of(link).conditions[0].status == "False"


def test_a_node_without_a_working_runtime_is_not_ready() -> None:
    link = FakeLink()
    del link.info.runtimes[0]
    assert status_of(link).conditions[0].reason == "NoRuntime"


def test_what_a_shim_says_is_cut_to_the_schemas_bounds() -> None:
    link = FakeLink()
    link.info.engine = "e" * 5000
    link.info.capacity.cpu_millis = 2**62
    link.info.capacity.memory_bytes = -5
    link.info.capacity.sandboxes = 2**40
    link.info.runtimes.extend(node_pb2.Runtime(name=f"r{n}", message="m" * 9000) for n in range(100))
    link.info.runtimes.append(node_pb2.Runtime(name="", ready=True))
    status = status_of(link)
    assert status.engine is not None
    assert len(status.engine) == 256
    assert status.capacity is not None
    assert (status.capacity.cpu, status.capacity.memory) == ("1000000", "0")
    assert len(status.runtimes) == 32
    assert all(len(runtime.message) <= 1024 for runtime in status.runtimes)


class Desk:
    """A writer with one node and an API server that applies merge patches."""

    def __init__(self) -> None:
        self.object, self.link, self.count = node(), FakeLink(), 4
        self.patches: list[Raw] = []
        self.error: Exception | None = None
        self.now = 1000.0
        self.writer = NodeStatusWriter(
            self, self, lambda name: self.count, clock=lambda: NOW, monotonic=lambda: self.now
        )

    def links(self) -> Any:
        return {"n1": self.link}

    def body(self, name: str) -> Raw | None:
        return self.object if name == "n1" else None

    async def patch_node_status(self, name: str, body: Raw) -> Raw:
        if self.error is not None:
            raise self.error
        self.patches.append(body)
        merged = {**self.object["status"], **body["status"]}
        answer = {**self.object, "status": {k: v for k, v in merged.items() if v is not None}}
        self.object = answer
        return answer


async def test_it_is_written_once() -> None:
    desk = Desk()
    assert await desk.writer.write("n1") is None
    assert await desk.writer.write("n1") is None
    assert len(desk.patches) == 1
    assert desk.patches[0]["metadata"]["uid"] == "uid-n1"


async def test_a_new_operator_writes_nothing_where_nothing_changed() -> None:
    desk = Desk()
    await desk.writer.write("n1")
    again = NodeStatusWriter(desk, desk, lambda name: desk.count, clock=lambda: NOW.replace(year=2027))
    assert await again.write("n1") is None
    assert len(desk.patches) == 1


async def test_the_count_alone_is_written_at_a_low_rate() -> None:
    desk = Desk()
    await desk.writer.write("n1")
    desk.count, desk.now = 5, desk.now + 10
    assert await desk.writer.write("n1") == pytest.approx(20)
    assert len(desk.patches) == 1
    desk.now += 20
    await desk.writer.write("n1")
    assert desk.patches[-1]["status"]["sandboxes"] == 5


async def test_a_change_of_substance_does_not_wait() -> None:
    desk = Desk()
    await desk.writer.write("n1")
    desk.link.reachable, desk.link.reason = False, nodelink.UNREACHABLE
    await desk.writer.write("n1")
    assert len(desk.patches) == 2


async def test_what_is_gone_is_taken_away_by_the_patch() -> None:
    desk = Desk()
    desk.object["status"] = {"leftover": "of an older version"}
    await desk.writer.write("n1")
    assert desk.patches[0]["status"]["leftover"] is None


async def test_a_refusal_is_tried_again_later_and_a_conflict_waits_for_news() -> None:
    desk = Desk()
    desk.error = Rejected("invalid")
    assert await desk.writer.write("n1") == 30.0
    desk.error = Conflict("another object")
    assert await desk.writer.write("n1") is None
    desk.error = None
    await desk.writer.write("n1")
    assert len(desk.patches) == 1


async def test_a_node_that_is_gone_is_no_work() -> None:
    assert await Desk().writer.write("unknown") is None
