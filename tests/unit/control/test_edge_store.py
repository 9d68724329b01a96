"""Store and informer: what is news, what is not, and that nothing is missed for good."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sandkeeper.api import ASSIGNMENT_ANNOTATION
from sandkeeper.control import informer
from sandkeeper.control.informer import Informer
from sandkeeper.control.kube import Unavailable
from sandkeeper.control.metrics import Metrics
from sandkeeper.control.observation import Assignment, Key
from sandkeeper.control.ports import Raw
from sandkeeper.control.queue import Queue
from sandkeeper.control.store import Store, key_of, newer


def sandbox(name: str, version: int | str = 1, *, uid: str = "", node: str = "", phase: str = "") -> Raw:
    uid = uid or f"uid-{name}"
    metadata: dict[str, Any] = {
        "namespace": "default",
        "name": name,
        "uid": uid,
        "resourceVersion": str(version),
        "managedFields": [{"manager": "kubectl"}],
    }
    if node:
        text = Assignment(uid, node, 1, "digest", "crun").dump()
        metadata["annotations"] = {ASSIGNMENT_ANNOTATION: text}
    body: Raw = {"kind": "Sandbox", "metadata": metadata, "spec": {}}
    if phase:
        body["status"] = {"phase": phase}
    return body


@pytest.mark.parametrize(
    ("candidate", "known", "expected"),
    [
        ("2", "1", True),
        ("10", "9", True),
        ("1", "1", False),
        ("1", "2", False),
        ("a", "b", True),
        ("a", "a", False),
    ],
)
def test_newer(candidate: str, known: str, expected: bool) -> None:
    assert newer(candidate, known) is expected


def test_put_is_news_once_and_never_goes_back() -> None:
    store = Store()
    key = store.put(sandbox("a", 5))
    assert key == Key("default", "a", "uid-a")
    assert store.put(sandbox("a", 5)) is None
    assert store.put(sandbox("a", 4)) is None
    assert store.put(sandbox("a", 6)) == key
    found = store.get(key)
    assert found is not None
    assert found["metadata"]["resourceVersion"] == "6"
    assert "managedFields" not in found["metadata"]


def test_what_is_gone_does_not_come_back() -> None:
    store = Store()
    key = key_of(sandbox("a"))
    store.put(sandbox("a", 1))
    assert store.remove(key)
    assert not store.remove(key)
    assert store.put(sandbox("a", 2)) is None
    assert store.get(key) is None
    assert store.by_uid("uid-a") is None


def test_the_same_name_again_is_another_object() -> None:
    store = Store()
    store.put(sandbox("a", 1, uid="one"))
    store.put(sandbox("a", 2, uid="two"))
    store.remove(Key("default", "a", "one"))
    assert store.keys() == (Key("default", "a", "two"),)
    assert store.by_uid("two") == Key("default", "a", "two")


def test_indexes_follow_the_objects() -> None:
    store = Store()
    store.put(sandbox("a", 1))
    store.put(sandbox("b", 1, node="n1", phase="Running"))
    assert store.on_node("") == (key_of(sandbox("a")),)
    assert dict(store.counts()) == {("", "Pending"): 1, ("n1", "Running"): 1}
    store.put(sandbox("a", 2, node="n1", phase="Running"))
    assert store.on_node("") == ()
    assert store.count_on("n1") == 2
    store.remove(key_of(sandbox("b")))
    store.put(sandbox("a", 3, node="n2", phase="Failed"))
    assert dict(store.counts()) == {("n2", "Failed"): 1}
    assert store.count_on("n1") == 0


@pytest.mark.parametrize(
    "annotation",
    [
        "",
        "{",
        "[]",
        "null",
        json.dumps({"uid": "other", "node": "n1"}),
        '{"uid":"uid-a","node":7}',
        "[" * 10000,
    ],
)
def test_an_annotation_that_is_none_of_ours_assigns_nothing(annotation: str) -> None:
    store = Store()
    body = sandbox("a")
    body["metadata"]["annotations"] = {ASSIGNMENT_ANNOTATION: annotation}
    store.put(body)
    assert store.count_on("") == 1


# The informer


class FakeKube:
    """What a LIST would say."""

    def __init__(self) -> None:
        self.objects: dict[str, Raw] = {}
        self.node_objects: dict[str, Raw] = {}
        self.asked: list[str | None] = []
        self.down = False
        self.during: Any = None

    async def sandboxes(self, namespace: str | None = None) -> AsyncIterator[Raw]:
        self.asked.append(namespace)
        if self.down:
            raise Unavailable("down")
        for body in list(self.objects.values()):
            if self.during is not None:
                self.during()
            yield body

    async def nodes(self) -> list[Raw]:
        return list(self.node_objects.values())


class FakeNodes:
    """Only notes."""

    def __init__(self) -> None:
        self.bodies: dict[str, Raw] = {}

    def put(self, body: Raw) -> None:
        self.bodies[body["metadata"]["name"]] = body

    def remove(self, name: str, uid: str) -> None:
        self.bodies.pop(name, None)

    def uids(self) -> dict[str, str]:
        return {name: body["metadata"]["uid"] for name, body in self.bodies.items()}


class Desk:
    """An informer with a queue that nobody works off."""

    def __init__(self, namespaces: tuple[str, ...] = ()) -> None:
        self.store, self.kube, self.nodes, self.metrics = Store(), FakeKube(), FakeNodes(), Metrics()
        self.passes: list[str] = []
        self.queue: Queue[Key] = Queue(self.work)
        self.informer = Informer(
            self.store,
            self.nodes,
            self.queue,
            self.kube,
            self.metrics,
            namespaces,
        )

    async def work(self, key: Key) -> float | None:
        self.passes.append(key.name)
        return None

    def waiting(self) -> list[str]:
        return sorted(key.name for key in self.queue._ready)

    def clear(self) -> None:
        self.queue._ready.clear()
        self.queue._since.clear()

    def missed(self) -> float:
        return self.metrics.registry.get_sample_value("sandkeeper_watch_missed_total") or 0.0


async def test_a_watch_event_is_a_key_in_the_queue_once() -> None:
    desk = Desk()
    desk.informer.sandbox_event(None, sandbox("a", 1))
    assert desk.waiting() == ["a"]
    desk.clear()
    desk.informer.sandbox_event("MODIFIED", sandbox("a", 1))
    assert desk.waiting() == []
    desk.informer.sandbox_event("DELETED", sandbox("a", 2))
    assert desk.waiting() == ["a"]
    desk.clear()
    desk.informer.sandbox_event("DELETED", sandbox("a", 2))
    assert desk.waiting() == []


async def test_the_event_of_an_own_write_is_no_news() -> None:
    desk = Desk()
    desk.informer.sandbox_event("ADDED", sandbox("a", 1))
    desk.clear()
    desk.informer.answered(sandbox("a", 2), True)
    assert desk.informer.watch_lag() > 0
    desk.informer.sandbox_event("MODIFIED", sandbox("a", 2))
    assert desk.waiting() == []
    assert desk.informer.watch_lag() == 0


async def test_what_a_live_read_shows_first_is_news() -> None:
    desk = Desk()
    desk.informer.answered(sandbox("a", 2), False)
    assert desk.waiting() == ["a"]


async def test_a_watch_that_is_ahead_of_the_answer_leaves_no_echo() -> None:
    desk = Desk()
    desk.informer.sandbox_event("MODIFIED", sandbox("a", 2))
    desk.informer.answered(sandbox("a", 2), True)
    assert desk.informer.watch_lag() == 0


async def test_an_echo_of_an_object_that_is_gone_is_not_waited_for() -> None:
    desk = Desk()
    desk.informer.answered(sandbox("a", 2), True)
    desk.store.remove(key_of(sandbox("a")))
    assert desk.informer.watch_lag() == 0


async def test_news_from_a_node_wake_the_owner_alone() -> None:
    desk = Desk()
    desk.informer.sandbox_event("ADDED", sandbox("a", 1))
    desk.informer.sandbox_event("ADDED", sandbox("b", 1))
    desk.clear()
    desk.informer.records_changed(["uid-b", "uid-unknown", ""])
    assert desk.waiting() == ["b"]


async def test_a_changed_node_wakes_its_own_and_the_unassigned() -> None:
    desk = Desk()
    for name, node in [("a", "n1"), ("b", "n2"), ("c", "")]:
        desk.informer.sandbox_event("ADDED", sandbox(name, 1, node=node))
    desk.clear()
    desk.informer.node_changed("n1")
    assert desk.waiting() == ["a", "c"]


async def test_fill_takes_everything_in_before_the_first_pass() -> None:
    desk = Desk(namespaces=("one", "two"))
    desk.kube.objects = {"a": sandbox("a")}
    desk.kube.node_objects = {"n1": {"metadata": {"name": "n1", "uid": "1"}}}
    await desk.informer.fill()
    assert desk.kube.asked == ["one", "two"]
    assert desk.waiting() == ["a"]
    assert list(desk.nodes.bodies) == ["n1"]


async def test_the_first_passes_are_over_what_is_not_as_it_should_be() -> None:
    desk = Desk()
    ready = {"observedGeneration": 1, "conditions": [{"type": "Ready", "status": "True"}]}
    failed = {"observedGeneration": 1, "conditions": [{"type": "Ready", "status": "False"}]}
    for name, metadata, status in [
        ("a-ready", {}, ready),
        ("b-new", {}, {}),
        ("c-changed", {"generation": 2}, ready),
        ("d-deleted", {"deletionTimestamp": "2026-01-01T00:00:00Z"}, ready),
        ("e-failed", {}, failed),
        ("f-ready", {}, ready),
    ]:
        body = sandbox(name)
        body["metadata"] |= {"generation": 1, **metadata}
        desk.kube.objects[name] = {**body, "status": status}
    await desk.informer.fill()
    assert [key.name for key in desk.queue._ready] == [
        *("b-new", "c-changed", "d-deleted", "e-failed"),
        *("a-ready", "f-ready"),
    ]


async def test_the_comparison_mends_what_the_watch_missed() -> None:
    desk = Desk()
    for name in ["same", "changed", "deleted"]:
        desk.informer.sandbox_event("ADDED", sandbox(name, 1))
    desk.informer.node_event("ADDED", {"metadata": {"name": "gone", "uid": "1"}})
    desk.clear()
    desk.kube.objects = {n: sandbox(n, v) for n, v in [("same", 1), ("changed", 2), ("added", 1)]}
    desk.kube.node_objects = {"new": {"metadata": {"name": "new", "uid": "2"}}}
    assert await desk.informer.compare_once() == 4
    assert desk.waiting() == ["added", "changed", "deleted"]
    assert desk.store.get(key_of(sandbox("deleted"))) is None
    assert list(desk.nodes.bodies) == ["new"]
    assert desk.missed() == 4
    desk.clear()
    assert await desk.informer.compare_once() == 0
    assert desk.waiting() == []


async def test_what_is_created_during_the_comparison_is_not_taken_for_deleted() -> None:
    desk = Desk()
    desk.kube.objects = {"a": sandbox("a")}
    desk.kube.during = lambda: desk.informer.sandbox_event("ADDED", sandbox("late", 1))
    await desk.informer.compare_once()
    assert desk.store.get(key_of(sandbox("late"))) is not None


async def test_a_watch_that_begins_anew_is_followed_by_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()
    await desk.informer.fill()
    desk.informer.sandbox_event(None, sandbox("a", 1))
    assert not desk.informer._compare_now.is_set(), "the first list comes right after ours"
    monkeypatch.setattr(informer, "_RELISTED", 0.0)
    desk.informer.sandbox_event(None, sandbox("a", 1))
    assert desk.informer._compare_now.is_set()


async def test_the_comparison_goes_on_after_an_outage() -> None:
    desk = Desk()
    desk.kube.down = True
    desk.kube.objects = {"a": sandbox("a")}
    task = asyncio.create_task(desk.informer.compare(0.01))
    async with asyncio.timeout(5):
        while not desk.kube.asked:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        desk.kube.down = False
        while desk.informer.compared_at is None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert desk.waiting() == ["a"]


async def test_every_key_is_looked_at_again_though_nothing_tells_of_it() -> None:
    desk = Desk()
    for number in range(50):
        desk.store.put(sandbox(f"s{number}"))
    tasks = [
        asyncio.create_task(desk.queue.run()),
        asyncio.create_task(desk.informer.resync(0.05)),
    ]
    async with asyncio.timeout(5):
        while len(desk.passes) < 100:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert set(desk.passes) == {f"s{number}" for number in range(50)}
