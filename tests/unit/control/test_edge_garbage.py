"""Garbage: only what is surely nobody's is shut down."""

from __future__ import annotations

from typing import Any

import pytest

from sandkeeper.api import ASSIGNMENT_ANNOTATION
from sandkeeper.control.garbage import GarbageCollector
from sandkeeper.control.kube import Unavailable
from sandkeeper.control.metrics import Metrics
from sandkeeper.control.observation import Assignment
from sandkeeper.control.ports import Gone, Raw, Rejected
from sandkeeper.control.store import Store
from sandkeeper.wire import errors, node_pb2
from sandkeeper.wire.ids import OwnerKey


def record(uid: str, instance: int = 1, **owner: Any) -> node_pb2.SandboxRecord:
    fields: dict[str, Any] = {
        "namespace": "default",
        "name": f"name-{uid}",
        "uid": uid,
        "instance": instance,
    } | owner
    return node_pb2.SandboxRecord(sandbox_id=f"{uid}-{instance}", owner=node_pb2.Owner(**fields))


def sandbox(uid: str, instance: int = 0, version: int = 1) -> Raw:
    metadata: dict[str, Any] = {
        "namespace": "default",
        "name": f"name-{uid}",
        "uid": uid,
        "resourceVersion": str(version),
    }
    if instance:
        text = Assignment(uid, "elsewhere", instance, "digest", "crun").dump()
        metadata["annotations"] = {ASSIGNMENT_ANNOTATION: text}
    return {"kind": "Sandbox", "metadata": metadata}


class FakeLink:
    def __init__(self, *records: node_pb2.SandboxRecord) -> None:
        self.reachable = True
        self.held = list(records)
        self.client = self
        self.shut_down: list[OwnerKey] = []
        self.error: Exception | None = None

    def records(self) -> tuple[node_pb2.SandboxRecord, ...]:
        return tuple(self.held)

    async def shutdown(self, owner: OwnerKey) -> None:
        self.shut_down.append(owner)
        if self.error is not None:
            raise self.error
        self.held = [one for one in self.held if one.sandbox_id != owner.sandbox_id]


class Desk:
    """One node, an API server, and a clock that stands still."""

    def __init__(self, *records: node_pb2.SandboxRecord, namespaces: tuple[str, ...] = ()) -> None:
        self.link, self.store, self.metrics = FakeLink(*records), Store(), Metrics()
        self.live: dict[str, Raw] = {}
        self.reads = 0
        self.error: Exception | None = None
        self.now = 0.0
        self.garbage = GarbageCollector(
            self.store,
            self,  # type: ignore[arg-type]
            self,
            self.metrics,
            min_age=60,
            namespaces=namespaces,
            monotonic=lambda: self.now,
        )

    def links(self) -> dict[str, FakeLink]:
        return {"n1": self.link}

    async def get(self, namespace: str, name: str) -> Raw:
        self.reads += 1
        if self.error is not None:
            raise self.error
        if name not in self.live:
            raise Gone(name)
        return self.live[name]

    async def sweep_after(self, seconds: float) -> int:
        self.now += seconds
        return await self.garbage.sweep()

    def gone(self) -> list[str]:
        return [owner.sandbox_id for owner in self.link.shut_down]


async def test_an_orphan_goes_after_the_minimum_age() -> None:
    desk = Desk(record("u1", 3))
    assert await desk.sweep_after(0) == 0
    assert await desk.sweep_after(59) == 0
    assert await desk.sweep_after(2) == 1
    assert desk.link.shut_down == [OwnerKey("default", "name-u1", "u1", 3)]
    assert await desk.sweep_after(100) == 0
    assert len(desk.link.shut_down) == 1


async def test_what_an_object_owns_stays_without_any_read() -> None:
    desk = Desk(record("u1"))
    desk.store.put(sandbox("u1", 1))
    await desk.sweep_after(0)
    assert await desk.sweep_after(1000) == 0
    assert desk.reads == 0


async def test_an_object_that_only_the_api_server_knows_stays() -> None:
    desk = Desk(record("u1"))
    desk.live["name-u1"] = sandbox("u1", 1)
    await desk.sweep_after(0)
    assert await desk.sweep_after(61) == 0
    assert desk.reads == 1
    assert await desk.sweep_after(1) == 0
    assert desk.reads == 1, "its age counts anew"


async def test_an_object_of_the_same_name_and_another_uid_does_not_own_it() -> None:
    desk = Desk(record("u1"))
    desk.live["name-u1"] = sandbox("u2")
    await desk.sweep_after(0)
    assert await desk.sweep_after(61) == 1


async def test_a_superseded_instance_goes_and_the_current_one_stays() -> None:
    desk = Desk(record("u1", 1), record("u1", 2))
    body = sandbox("u1", 2)
    desk.store.put(body)
    desk.live["name-u1"] = body
    await desk.sweep_after(0)
    assert await desk.sweep_after(61) == 1
    assert desk.gone() == ["u1-1"]


@pytest.mark.parametrize("error", [Unavailable("down"), Rejected("forbidden")])
async def test_without_an_answer_nothing_goes(error: Exception) -> None:
    desk = Desk(record("u1"))
    desk.error = error
    await desk.sweep_after(0)
    assert await desk.sweep_after(61) == 0
    assert desk.gone() == []
    desk.error = None
    assert await desk.sweep_after(1) == 1


async def test_a_shim_that_fails_is_asked_again() -> None:
    desk = Desk(record("u1"))
    desk.link.error = errors.Unavailable("cut")
    await desk.sweep_after(0)
    assert await desk.sweep_after(61) == 0
    desk.link.error = errors.NotFound("gone already")
    assert await desk.sweep_after(1) == 1


@pytest.mark.parametrize(
    "owner",
    [{"uid": ""}, {"name": ""}, {"namespace": ""}, {"instance": 0}],
    ids=lambda owner: next(iter(owner)),
)
async def test_what_names_no_owner_is_not_ours_to_judge(owner: dict[str, Any]) -> None:
    desk = Desk(record("u1", **owner) if "uid" not in owner and "instance" not in owner else _bare(owner))
    await desk.sweep_after(0)
    assert await desk.sweep_after(1000) == 0


def _bare(owner: dict[str, Any]) -> node_pb2.SandboxRecord:
    one = record("u1")
    for name, value in owner.items():
        setattr(one.owner, name, value)
    return one


async def test_a_namespaced_operator_leaves_other_namespaces_alone() -> None:
    desk = Desk(record("u1"), record("u2", namespace="other"), namespaces=("default",))
    await desk.sweep_after(0)
    assert await desk.sweep_after(61) == 1
    assert desk.gone() == ["u1-1"]


async def test_an_unreachable_node_is_left_alone_and_its_suspects_are_not_forgotten() -> None:
    desk = Desk(record("u1"))
    await desk.sweep_after(0)
    desk.link.reachable = False
    assert await desk.sweep_after(61) == 0
    desk.link.reachable = True
    assert await desk.sweep_after(1) == 1


async def test_one_that_finds_an_owner_in_time_starts_anew() -> None:
    desk = Desk(record("u1"))
    await desk.sweep_after(0)
    desk.store.put(sandbox("u1", 1))
    assert await desk.sweep_after(61) == 0
    desk.store.remove(next(iter(desk.store.keys())))
    assert await desk.sweep_after(1) == 0
    assert await desk.sweep_after(61) == 1
