"""Whom an event, and a relist, wakes."""

from __future__ import annotations

import pytest
from google.protobuf import any_pb2
from google.protobuf.message import Message

from sandkeeper.shim.engines.containerd.events import missed, subject
from sandkeeper.wire.containerd import events_pb2, process_pb2, taskevents_pb2, tasks_pb2


@pytest.mark.parametrize(
    ("topic", "event", "wakes"),
    [
        ("/tasks/exit", taskevents_pb2.TaskExit(container_id="box", id="box"), "box"),
        ("/tasks/exit", taskevents_pb2.TaskExit(container_id="box"), "box"),
        ("/tasks/exit", taskevents_pb2.TaskExit(container_id="box", id="an-exec"), ""),
        ("/tasks/oom", taskevents_pb2.TaskOOM(container_id="box"), "box"),
        ("/tasks/delete", taskevents_pb2.TaskDelete(container_id="box"), "box"),
        ("/sandboxes/exit", taskevents_pb2.SandboxExit(sandbox_id="sandbox"), "sandbox"),
        ("/tasks/start", taskevents_pb2.TaskOOM(container_id="box"), ""),
    ],
)
def test_whom_an_event_wakes(topic: str, event: Message, wakes: str) -> None:
    packed = any_pb2.Any(type_url=event.DESCRIPTOR.full_name, value=event.SerializeToString())
    assert subject(events_pb2.Envelope(topic=topic, event=packed)) == wakes


def test_an_event_that_cannot_be_read_wakes_nobody() -> None:
    broken = any_pb2.Any(value=b"\xff")
    assert subject(events_pb2.Envelope(topic="/tasks/exit", event=broken)) == ""


def test_a_relist_wakes_all_that_is_no_running_task() -> None:
    listed = tasks_pb2.ListTasksResponse(
        tasks=[
            process_pb2.Process(id="runs", status=process_pb2.RUNNING),
            process_pb2.Process(id="frozen", status=process_pb2.PAUSED),
            process_pb2.Process(id="ended", status=process_pb2.STOPPED),
            process_pb2.Process(id="anothers", status=process_pb2.STOPPED),
        ]
    )
    assert missed({"runs", "frozen", "ended", "gone"}, listed) == {"ended", "gone"}
