"""Events: aggregated, limited, posted in the background, and never in anybody's way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from sandkeeper.control import events
from sandkeeper.control.events import Level, Recorder
from sandkeeper.control.kube import Unavailable
from sandkeeper.control.metrics import Metrics
from sandkeeper.control.ports import Gone, Raw

DEADLINE = 5.0


def sandbox(name: str = "a") -> Raw:
    return {
        "apiVersion": "sandkeeper.dev/v1alpha1",
        "kind": "Sandbox",
        "metadata": {"namespace": "default", "name": name, "uid": f"uid-{name}", "resourceVersion": "7"},
    }


class FakeKube:
    def __init__(self) -> None:
        self.created: list[Raw] = []
        self.patched: list[tuple[str, Raw]] = []
        self.down = False
        self.expired = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def create_event(self, namespace: str, body: Raw) -> Raw:
        await self.gate.wait()
        if self.down:
            raise Unavailable("down")
        assert body["metadata"]["namespace"] == namespace
        self.created.append(body)
        return body

    async def patch_event(self, namespace: str, name: str, body: Raw) -> Raw:
        if self.expired:
            raise Gone(name)
        self.patched.append((name, body))
        return body


class Desk:
    def __init__(self, level: Level = "All", **options: Any) -> None:
        self.kube, self.metrics = FakeKube(), Metrics()
        self.recorder = Recorder(self.kube, self.metrics, level, **options)

    def count(self, outcome: str) -> float:
        return self.metrics.registry.get_sample_value("sandkeeper_events_total", {"outcome": outcome}) or 0.0

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def posting(desk: Desk) -> AsyncIterator[Desk]:
    task = asyncio.create_task(desk.recorder.run())
    try:
        yield desk
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_event_has_what_the_api_demands() -> None:
    async with posting(Desk()) as desk:
        desk.recorder.event(sandbox(), "Warning", "OOMKilled", "Wait", "exit status 137")
        await desk.until(lambda: len(desk.kube.created) == 1)
    body = desk.kube.created[0]
    assert body["metadata"]["name"].startswith("a.")
    assert body["eventTime"].endswith("Z")
    assert {key: body[key] for key in ("type", "reason", "action", "note", "reportingController")} == {
        "type": "Warning",
        "reason": "OOMKilled",
        "action": "Wait",
        "note": "exit status 137",
        "reportingController": events.CONTROLLER,
    }
    assert body["regarding"]["uid"] == "uid-a"
    assert body["reportingInstance"]
    assert "series" not in body


async def test_an_event_of_a_cluster_wide_object_goes_to_the_default_namespace() -> None:
    async with posting(Desk()) as desk:
        node = {"kind": "SandboxNode", "metadata": {"name": "n1", "uid": "u"}}
        desk.recorder.event(node, "Warning", "Unreachable", "Relist", "no answer")
        await desk.until(lambda: len(desk.kube.created) == 1)
    assert desk.kube.created[0]["metadata"]["namespace"] == "default"
    assert "namespace" not in desk.kube.created[0]["regarding"]


async def test_the_same_again_is_one_event_with_a_series(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_SERIES_EVERY", 0.01)
    async with posting(Desk()) as desk:
        desk.recorder.event(sandbox(), "Warning", "BackOff", "Start", "note")
        await desk.until(lambda: len(desk.kube.created) == 1)
        for _ in range(50):
            desk.recorder.event(sandbox(), "Warning", "BackOff", "Start", "note")
        await desk.until(lambda: bool(desk.kube.patched))
    assert len(desk.kube.created) == 1
    assert len(desk.kube.patched) == 1
    name, patch = desk.kube.patched[0]
    assert name == desk.kube.created[0]["metadata"]["name"]
    assert patch["series"]["count"] == 51
    assert desk.count("aggregated") == 50


async def test_a_series_whose_event_has_expired_is_created_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_SERIES_EVERY", 0.01)
    async with posting(Desk()) as desk:
        desk.recorder.event(sandbox(), "Warning", "BackOff", "Start", "note")
        await desk.until(lambda: len(desk.kube.created) == 1)
        desk.kube.expired = True
        desk.recorder.event(sandbox(), "Warning", "BackOff", "Start", "note")
        await desk.until(lambda: len(desk.kube.created) == 2)


async def test_one_object_cannot_flood() -> None:
    async with posting(Desk()) as desk:
        for number in range(100):
            desk.recorder.event(sandbox("noisy"), "Warning", "Different", "Start", f"note {number}")
        desk.recorder.event(sandbox("calm"), "Warning", "Different", "Start", "note")
        await desk.until(lambda: any(e["regarding"]["name"] == "calm" for e in desk.kube.created))
    assert len(desk.kube.created) == 26
    assert desk.count("limited") == 75


async def test_a_full_queue_drops_and_counts() -> None:
    desk = Desk(queue_size=3)
    desk.kube.gate.clear()
    for number in range(10):
        desk.recorder.event(sandbox(str(number)), "Warning", "Reason", "Start", "note")
    assert desk.count("dropped") == 7
    async with posting(desk):
        desk.kube.gate.set()
        await desk.until(lambda: len(desk.kube.created) == 3)


async def test_a_failure_to_post_is_counted_and_the_next_is_posted() -> None:
    async with posting(Desk()) as desk:
        desk.kube.down = True
        desk.recorder.event(sandbox("a"), "Warning", "Reason", "Start", "note")
        await desk.until(lambda: desk.count("failed") == 1)
        desk.kube.down = False
        desk.recorder.event(sandbox("b"), "Warning", "Reason", "Start", "note")
        await desk.until(lambda: len(desk.kube.created) == 1)


async def test_nothing_is_raised_for_something_that_is_no_object() -> None:
    desk = Desk()
    desk.recorder.event({}, "Warning", "Reason", "Start", "note")
    assert desk.count("failed") == 1


async def test_a_note_is_cut_to_the_apis_limit() -> None:
    async with posting(Desk()) as desk:
        desk.recorder.event(sandbox(), "Warning", "Reason", "Start", "ä" * 5000)
        await desk.until(lambda: len(desk.kube.created) == 1)
    assert len(desk.kube.created[0]["note"].encode()) <= 1024


@pytest.mark.parametrize(
    ("level", "posted"),
    [
        ("None", []),
        ("Warning", ["OOMKilled"]),
        ("Notable", ["OOMKilled", "Recreated"]),
        ("All", ["OOMKilled", "Recreated", "Started"]),
    ],
)
async def test_levels(level: Level, posted: list[str]) -> None:
    async with posting(Desk(level)) as desk:
        desk.recorder.event(sandbox(), "Normal", "Started", "Start", "note")
        desk.recorder.event(sandbox(), "Normal", "Recreated", "Assign", "note")
        desk.recorder.event(sandbox(), "Warning", "OOMKilled", "Wait", "note")
        await desk.recorder.drain(DEADLINE)
    assert sorted(event["reason"] for event in desk.kube.created) == posted
