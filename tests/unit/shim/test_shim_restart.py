"""restartPolicy and the sandbox's end, as tables."""

from __future__ import annotations

import pytest

from sandkeeper.shim.restart import Backoff, ended_for_good, restarts, sandbox_exit
from sandkeeper.wire import node_pb2

NEVER = node_pb2.RESTART_POLICY_NEVER
ON_FAILURE = node_pb2.RESTART_POLICY_ON_FAILURE
ALWAYS = node_pb2.RESTART_POLICY_ALWAYS
UNKNOWN = 99

WAITING = node_pb2.CONTAINER_STATE_WAITING
RUNNING = node_pb2.CONTAINER_STATE_RUNNING
EXITED = node_pb2.CONTAINER_STATE_EXITED


@pytest.mark.parametrize(
    ("policy", "status", "again"),
    [
        (NEVER, 0, False),
        (NEVER, 1, False),
        (NEVER, 137, False),
        (ON_FAILURE, 0, False),
        (ON_FAILURE, 1, True),
        (ON_FAILURE, 143, True),
        (ALWAYS, 0, True),
        (ALWAYS, 1, True),
        (UNKNOWN, 1, False),
    ],
)
def test_restarts(policy: int, status: int, again: bool) -> None:
    assert restarts(policy, status) is again


@pytest.mark.parametrize(
    ("attempt", "seconds"), [(0, 1.0), (1, 2.0), (2, 4.0), (8, 256.0), (9, 300.0), (10**9, 300.0)]
)
def test_waits_double_up_to_the_longest(attempt: int, seconds: float) -> None:
    assert Backoff(1.0, 300.0).wait(attempt) == seconds


def test_the_longest_wait_bounds_the_first() -> None:
    assert Backoff(10.0, 5.0).wait(0) == 5.0


@pytest.mark.parametrize(
    ("states", "ended"),
    [
        ([], False),
        ([EXITED], True),
        ([EXITED, EXITED], True),
        ([EXITED, RUNNING], False),
        ([WAITING, EXITED], False),
        ([node_pb2.CONTAINER_STATE_UNSPECIFIED], False),
    ],
)
def test_ended_for_good(states: list[node_pb2.ContainerState.ValueType], ended: bool) -> None:
    assert ended_for_good([node_pb2.ContainerRecord(state=state) for state in states]) is ended


def container(
    name: str, status: int, at: float, *, reason: str = "", message: str = ""
) -> node_pb2.ContainerRecord:
    """A container that ended `at` seconds after 1970."""
    found = node_pb2.ContainerRecord(name=name, state=EXITED)
    found.exit.status = status
    found.exit.signal = status - 128 if status > 128 else 0
    found.exit.reason = reason or ("Error" if status else "Completed")
    found.exit.message = message
    found.exit.exited_at.FromNanoseconds(int(at * 1e9))
    return found


@pytest.mark.parametrize(
    ("containers", "stop_at", "status", "reason", "at"),
    [
        # Of one container, its own.
        ([("a", 0, 10)], 0, 0, "Completed", 10),
        ([("a", 3, 10)], 0, 3, "Error", 10),
        # Of several, the first to fail; else the first in the list. The time is the last one's.
        ([("a", 0, 20), ("b", 0, 10)], 0, 0, "Completed", 20),
        ([("a", 0, 10), ("b", 4, 20)], 0, 4, "Error", 20),
        ([("a", 5, 30), ("b", 4, 20), ("c", 0, 40)], 0, 4, "Error", 40),
        ([("a", 5, 20), ("b", 4, 20)], 0, 5, "Error", 20),
        # What ended after Stop ended because of it; what had failed before had not.
        ([("a", 143, 10)], 9, 143, "Stopped", 10),
        ([("a", 143, 10)], 10.005, 143, "Stopped", 10),
        ([("a", 0, 10)], 9, 0, "Stopped", 10),
        ([("a", 3, 10)], 11, 3, "Error", 10),
        ([("a", 3, 10), ("b", 143, 20)], 15, 3, "Error", 20),
        ([("a", 0, 10), ("b", 143, 20)], 15, 143, "Stopped", 20),
    ],
)
def test_sandbox_exit(
    containers: list[tuple[str, int, float]], stop_at: float, status: int, reason: str, at: float
) -> None:
    found = sandbox_exit([container(*each) for each in containers], stop_at)
    assert (found.status, found.reason, found.exited_at.seconds) == (status, reason, at)
    assert found.signal == (status - 128 if status > 128 else 0)


@pytest.mark.parametrize(
    ("containers", "ended", "reason"),
    [
        # The clock was set back after Stop: the end is long before it.
        ([("a", 143, 6400)], (), "Stopped"),
        ([("a", 0, 6400)], (), "Stopped"),
        # It was set back after the first one's end and before Stop.
        ([("a", 3, 13600), ("b", 0, 10001)], ("a",), "Error"),
        ([("a", 0, 13600), ("b", 143, 10001)], ("a",), "Stopped"),
        # It was set ahead after Stop.
        ([("a", 143, 13600)], (), "Stopped"),
    ],
)
def test_why_it_ended_is_known_though_a_clock_was_set(
    containers: list[tuple[str, int, float]], ended: tuple[str, ...], reason: str
) -> None:
    found = sandbox_exit([container(*each) for each in containers], 10000, ended)
    assert found.reason == reason


def test_an_end_that_is_put_at_the_start_is_no_end_before_stop() -> None:
    """The clock was set back, so that the end's own time was before the start."""
    stopped = container("a", 143, 9998)
    stopped.started_at.CopyFrom(stopped.exit.exited_at)
    assert sandbox_exit([stopped], 10000).reason == "Stopped"


def test_the_reason_of_a_container_is_the_sandboxs() -> None:
    found = sandbox_exit([container("a", 137, 10, reason="OOMKilled")], 0)
    assert (found.status, found.reason) == (137, "OOMKilled")


@pytest.mark.parametrize(
    ("containers", "message"),
    [
        ([container("a", 3, 10)], ""),
        ([container("a", 0, 10), container("b", 0, 10)], ""),
        ([container("a", 0, 10), container("b", 3, 10)], "container b ended with exit status 3"),
        ([container("a", 0, 10), container("b", 3, 10, message="its own words")], "its own words"),
    ],
)
def test_the_message_names_the_container_that_failed(
    containers: list[node_pb2.ContainerRecord], message: str
) -> None:
    assert sandbox_exit(containers, 0).message == message


def test_the_containers_are_left_as_they_are() -> None:
    containers = [container("a", 0, 10), container("b", 3, 20)]
    before = [each.SerializeToString() for each in containers]
    sandbox_exit(containers, 15)
    assert [each.SerializeToString() for each in containers] == before
