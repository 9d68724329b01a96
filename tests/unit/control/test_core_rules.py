"""The decision table, row by row: an observation for which each rule is the one that decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from tests.unit.control.fakes import EPOCH, SPEC

from sandkeeper.api import Sandbox, instance_digest
from sandkeeper.control import rules as r
from sandkeeper.control.actions import (
    Action,
    Assign,
    Delete,
    Pause,
    Release,
    Rest,
    Resume,
    Shutdown,
    Start,
    Stop,
    Verdict,
)
from sandkeeper.control.decide import RULES, decide, matching_rule
from sandkeeper.control.observation import Absent, Assignment, NodeView, Observation, Present, Unknown
from sandkeeper.wire import node_pb2

S = node_pb2
N1 = NodeView("n1", reachable=True, runtimes=frozenset({"crun"}), default_runtime="crun")
SILENT = replace(N1, reachable=False)
NOT_HEARD = replace(N1, reachable=False, settled=False)
NOW = EPOCH
RECREATE = {"failurePolicy": {"recreate": "OnFailure", "limit": 1, "backoffSeconds": 10}}


def record(state: int, **fields: Any) -> Present:
    found = node_pb2.SandboxRecord(sandbox_id="u-1", state=state, runtime="crun")  # type: ignore[arg-type]
    found.owner.uid, found.owner.instance = "u", 1
    if state >= S.STATE_RUNNING:
        found.started_at.FromDatetime(NOW - timedelta(seconds=fields.pop("ran", 5)))
        found.pid = 7
    exit_ = fields.pop("exit", None)
    if exit_ is not None:
        found.exit.status, found.exit.reason = exit_
        found.exit.exited_at.FromDatetime(NOW)
    for key, value in fields.items():
        setattr(found, key, value)
    return Present(found)


def status(**fields: Any) -> dict[str, Any]:
    return {"observedGeneration": 1, "instance": 1, "nodeName": "n1", "sandboxID": "u-1", **fields}


def ended(reason: str = "Completed", code: int = 0, ago: float = 0) -> dict[str, Any]:
    at = (NOW - timedelta(seconds=ago)).isoformat()
    return status(startedAt=at, exitedAt=at, exitReason=reason, exitStatus=code)


def see(
    spec: dict[str, Any] | None = None,
    status: dict[str, Any] | None = None,
    *,
    assigned: bool = True,
    outdated: bool = False,
    recreations: int = 0,
    **fields: Any,
) -> Observation:
    sandbox = Sandbox.model_validate({"spec": {**SPEC, **(spec or {})}, "status": status or {}})
    digest = instance_digest(sandbox.spec)
    assignment = Assignment("u", "n1", 1, "old" if outdated else digest, "crun", recreations)
    fields = {"node": N1 if assigned else None, "record": Absent(), "nodes": (N1,), **fields}
    return Observation(
        sandbox=sandbox,
        namespace="default",
        name="a",
        uid="u",
        generation=1,
        now=NOW,
        desired_digest=digest,
        assignment=assignment if assigned else None,
        **{"deleting": False, "finalizing": True, **fields},
    )


def condition(type_: str, value: str, reason: str, *, ago: float = 0, generation: int = 1) -> dict[str, Any]:
    at = (NOW - timedelta(seconds=ago)).isoformat()
    words = {"type": type_, "status": value, "reason": reason, "lastTransitionTime": at}
    return {**words, "observedGeneration": generation}


# The deadline is over: said, and not more.
OVER = status(startedAt=NOW.isoformat(), conditions=[condition("Ready", "False", "DeadlineExceeded")])

STOPPED = {"desiredState": "Stopped"}
PAUSED = {"desiredState": "Paused"}
RUNNING = record(S.STATE_RUNNING)
HOLDING = (("n1", RUNNING.record),)

ROWS: list[tuple[Observation, Callable[[Observation], bool], str, Verdict, type[Action]]] = [
    # the assignment
    (
        see(assigned=False, assignment_lost=True, holdings=HOLDING),
        r.assignment_restorable, "AssignmentRestored", Verdict.PROGRESSING, Assign,
    ),
    (
        see(status=status(), assigned=False, assignment_lost=True),
        r.assignment_restorable, "AssignmentRestored", Verdict.PROGRESSING, Assign,
    ),
    (
        see(assigned=False, assignment_lost=True, nodes=(SILENT,)),
        r.assignment_hidden, "AssignmentLost", Verdict.UNKNOWN, Rest,
    ),
    # deletion
    (see(assigned=False, deleting=True), r.deleting_and_absent, "Deleting", Verdict.PROGRESSING, Release),
    (
        see(assigned=False, deleting=True, finalizing=False),
        r.deleting_and_absent, "Deleting", Verdict.PROGRESSING, Rest,
    ),
    (
        see(deleting=True, record=Absent(proven=True)),
        r.deleting_and_absent, "Deleting", Verdict.PROGRESSING, Release,
    ),
    (see(deleting=True, node=None), r.deleting_and_absent, "Deleting", Verdict.PROGRESSING, Release),
    (
        see(deleting=True, node=replace(SILENT, out_of_service=True), record=Unknown()),
        r.deleting_and_absent, "Deleting", Verdict.PROGRESSING, Release,
    ),
    (
        see(deleting=True, node=NOT_HEARD, record=Unknown()),
        r.deleting_and_node_not_heard, "Deleting", Verdict.UNSAID, Rest,
    ),
    (
        see(deleting=True, node=SILENT, record=Unknown()),
        r.deleting_and_node_silent, "NodeUnreachable", Verdict.UNKNOWN, Rest,
    ),
    (see(deleting=True), r.deleting, "Deleting", Verdict.PROGRESSING, Shutdown),
    (see(deleting=True, record=RUNNING), r.deleting, "Deleting", Verdict.PROGRESSING, Shutdown),
    (see(invalid="spec: no"), r.unreadable, "InvalidSpec", Verdict.FAILED, Rest),
    # the end
    (
        see(record=record(S.STATE_EXITED, exit=(0, "Completed"))),
        r.ended_unrecorded, "Completed", Verdict.READY, Rest,
    ),
    (
        see(record=record(S.STATE_EXITED, exit=(3, "Error"))),
        r.ended_unrecorded, "Error", Verdict.FAILED, Rest,
    ),
    (
        see(record=record(S.STATE_EXITED, exit=(137, "OOMKilled")), spec=RECREATE),
        r.ended_unrecorded, "OOMKilled", Verdict.PROGRESSING, Rest,
    ),
    (
        see(record=record(S.STATE_EXITED, exit=(143, "Stopped"), ran=60), spec={"activeDeadlineSeconds": 60}),
        r.ended_unrecorded, "DeadlineExceeded", Verdict.FAILED, Rest,
    ),
    (
        see(
            record=record(S.STATE_EXITED, exit=(143, "Stopped")), spec={"activeDeadlineSeconds": 60}, status=OVER
        ),
        r.ended_unrecorded, "DeadlineExceeded", Verdict.FAILED, Rest,
    ),
    (
        see(record=record(S.STATE_EXITED, exit=(143, "Stopped")), spec=STOPPED),
        r.ended_unrecorded, "Stopped", Verdict.READY, Rest,
    ),
    (
        see(record=record(S.STATE_FAILED, reason="InvalidConfig")),
        r.ended_unrecorded, "InvalidConfig", Verdict.FAILED, Rest,
    ),
    (
        see(status=status(startedAt="2026-01-01T00:00:00Z"), record=Absent(proven=True)),
        r.ended_unrecorded, "SandboxLost", Verdict.FAILED, Rest,
    ),
    (
        see(status=status(startedAt="2026-01-01T00:00:00Z"), node=None, record=Unknown()),
        r.ended_unrecorded, "ShimLost", Verdict.FAILED, Rest,
    ),
    (
        see(status=ended(), outdated=True, record=record(S.STATE_EXITED, exit=(0, "Completed"))),
        r.superseded_on_node, "Replacing", Verdict.PROGRESSING, Shutdown,
    ),
    (see(status=ended(), outdated=True), r.superseded, "Replacing", Verdict.PROGRESSING, Assign),
    (see(status=ended("Stopped", 143)), r.superseded, "Replacing", Verdict.PROGRESSING, Assign),
    (
        see(status=ended("Error", 1, ago=11), spec=RECREATE, record=record(S.STATE_EXITED, exit=(1, "Error"))),
        r.recreation_is_due_on_node, "Error", Verdict.PROGRESSING, Shutdown,
    ),
    (
        see(status=ended("Error", 1, ago=11), spec=RECREATE),
        r.recreation_is_due, "Recreating", Verdict.PROGRESSING, Assign,
    ),
    (
        see(status=ended(ago=6), spec={"ttlSecondsAfterFinished": 5}),
        r.expired, "Completed", Verdict.READY, Delete,
    ),
    (
        see(status=ended(), record=record(S.STATE_EXITED, exit=(0, "Completed"))),
        r.forgettable_on_node, "Completed", Verdict.READY, Shutdown,
    ),
    (see(status=ended()), r.ended, "Completed", Verdict.READY, Rest),
    (see(status=ended("Stopped", 143), spec=STOPPED), r.ended, "Stopped", Verdict.READY, Rest),
    (see(status=ended("Error", 1), spec=RECREATE), r.ended, "Error", Verdict.PROGRESSING, Rest),
    (see(status=ended("Error", 1), spec=RECREATE, recreations=1), r.ended, "Error", Verdict.FAILED, Rest),
    (
        see(status=ended("Error", 1, ago=11), spec=RECREATE, mass_outage=True),
        r.ended, "Error", Verdict.PROGRESSING, Rest,
    ),
    # no instance
    (
        see(assigned=False, spec=STOPPED),
        r.stop_wanted_and_unassigned, "Stopped", Verdict.READY, Rest,
    ),
    (see(assigned=False), r.unassigned, "Scheduling", Verdict.PROGRESSING, Assign),
    (see(assigned=False, nodes=()), r.unassigned, "Unschedulable", Verdict.PROGRESSING, Rest),
    # its node
    (see(spec=STOPPED, node=None), r.stop_wanted_and_node_gone, "Stopped", Verdict.READY, Rest),
    (see(node=None, record=Unknown()), r.node_gone, "NodeGone", Verdict.PROGRESSING, Assign),
    (see(node=NOT_HEARD, record=Unknown()), r.node_not_heard, "NodeNotHeard", Verdict.UNSAID, Rest),
    (see(node=SILENT, record=Unknown()), r.node_silent, "NodeUnreachable", Verdict.UNKNOWN, Rest),
    (see(record=Unknown()), r.node_silent, "NodeUnreachable", Verdict.UNKNOWN, Rest),
    # what should not be
    (see(spec=STOPPED), r.stop_wanted_and_absent, "Stopped", Verdict.READY, Rest),
    (see(spec=STOPPED, record=RUNNING), r.stop_wanted_and_live, "Stopping", Verdict.PROGRESSING, Stop),
    (
        see(spec={"shutdownTime": "2025-12-31T23:59:59Z"}, record=RUNNING),
        r.stop_wanted_and_live, "Stopping", Verdict.PROGRESSING, Stop,
    ),
    (
        see(spec=STOPPED, record=record(S.STATE_PREPARING)),
        r.stop_wanted, "Stopping", Verdict.PROGRESSING, Shutdown,
    ),
    (
        see(outdated=True, record=Absent(proven=True)),
        r.outdated_and_absent, "Replacing", Verdict.PROGRESSING, Assign,
    ),
    (see(outdated=True), r.outdated, "Replacing", Verdict.PROGRESSING, Shutdown),
    (see(outdated=True, record=RUNNING), r.outdated_and_live, "Replacing", Verdict.PROGRESSING, Stop),
    (
        see(record=record(S.STATE_RUNNING, digest="another")),
        r.outdated_and_live, "Replacing", Verdict.PROGRESSING, Stop,
    ),
    # what should be
    (see(refusal=("Fenced", "")), r.fenced, "Replacing", Verdict.PROGRESSING, Assign),
    (see(refusal=("InvalidSpec", "image")), r.refused, "InvalidSpec", Verdict.FAILED, Rest),
    (
        see(record=record(S.STATE_PREPARING, reason="PullingImage")),
        r.preparing, "PullingImage", Verdict.PROGRESSING, Rest,
    ),
    (see(), r.not_started, "Starting", Verdict.PROGRESSING, Start),
    (see(record=record(S.STATE_CREATED)), r.not_started, "Starting", Verdict.PROGRESSING, Start),
    (
        see(record=record(S.STATE_RUNNING, ran=61), spec={"activeDeadlineSeconds": 60}),
        r.past_deadline_unsaid, "DeadlineExceeded", Verdict.PROGRESSING, Rest,
    ),
    (
        see(record=RUNNING, spec={"activeDeadlineSeconds": 60}, status=OVER),
        r.past_deadline, "DeadlineExceeded", Verdict.PROGRESSING, Stop,
    ),
    (see(record=RUNNING, spec=PAUSED), r.pause_wanted, "Pausing", Verdict.PROGRESSING, Pause),
    (see(record=record(S.STATE_PAUSED)), r.resume_wanted, "Resuming", Verdict.PROGRESSING, Resume),
    (see(record=record(S.STATE_PAUSED), spec=PAUSED), r.frozen, "Paused", Verdict.READY, Rest),
    (see(record=RUNNING), r.running, "Running", Verdict.READY, Rest),
    (see(record=record(99)), r.state_not_known, "UnknownState", Verdict.UNKNOWN, Rest),
]  # fmt: skip


def crash_loop() -> Observation:
    found = record(S.STATE_RUNNING)
    found.record.containers.add(
        name="main", state=S.CONTAINER_STATE_WAITING, reason="CrashLoopBackOff", message="back-off 10s"
    )
    return see(record=found)


ROWS.append((crash_loop(), r.crash_looping, "CrashLoopBackOff", Verdict.PROGRESSING, Rest))


@pytest.mark.parametrize(
    ("observation", "predicate", "reason", "verdict", "action"),
    ROWS,
    ids=[f"{index}-{row[1].__name__}" for index, row in enumerate(ROWS)],
)
def test_row(
    observation: Observation,
    predicate: Callable[[Observation], bool],
    reason: str,
    verdict: Verdict,
    action: type[Action],
) -> None:
    assert matching_rule(observation).when is predicate
    decision = decide(observation)
    assert (decision.reason, decision.verdict, type(decision.action)) == (reason, verdict, action)


def test_every_rule_has_a_row() -> None:
    assert {row[1] for row in ROWS} == {rule.when for rule in RULES}


@pytest.mark.parametrize("state", S.State.values())
def test_every_state_is_decided(state: int) -> None:
    assert decide(see(record=record(state)))


def test_one_call_at_a_time() -> None:
    assert decide(see(in_flight="Start")).action == Rest()
    assert decide(see(in_flight="Start")).reason == "Starting"


def test_the_first_assignment() -> None:
    decision = decide(see(assigned=False))
    assert isinstance(decision.action, Assign)
    assert (decision.action.assignment.node, decision.action.assignment.instance) == ("n1", 1)
    assert decision.action.assignment.runtime == "crun"


@pytest.mark.parametrize(
    ("observation", "instance", "recreations"),
    [
        (see(status=ended("Stopped", 143), recreations=2), 2, 0),
        (see(status=ended("Error", 1, ago=11), spec=RECREATE), 2, 1),
        (see(node=None, recreations=1), 2, 1),
        (see(outdated=True, record=Absent(proven=True), recreations=2), 2, 0),
    ],
)
def test_the_next_assignment(observation: Observation, instance: int, recreations: int) -> None:
    action = decide(observation).action
    assert isinstance(action, Assign)
    assert (action.assignment.instance, action.assignment.recreations) == (instance, recreations)
    assert action.assignment.digest == observation.desired_digest


def test_the_grace_period_is_todays() -> None:
    spec = {"terminationGracePeriodSeconds": 3}
    assert decide(see(deleting=True, record=RUNNING, spec=spec)).action == Shutdown(3)
    assert decide(see(deleting=True, record=record(S.STATE_CREATED), spec=spec)).action == Shutdown(None)
    assert decide(see(record=RUNNING, spec=spec | STOPPED)).action == Stop(3)


@pytest.mark.parametrize(
    ("observation", "seconds"),
    [
        (see(record=RUNNING), None),
        (see(record=RUNNING, spec={"activeDeadlineSeconds": 60}), 55.001),
        (see(record=RUNNING, spec={"shutdownTime": "2026-01-01T00:01:00Z"}), 60.001),
        (
            see(record=RUNNING, spec={"shutdownTime": "2026-01-01T00:01:00Z", "activeDeadlineSeconds": 60}),
            55.001,
        ),
        (see(status=ended(), spec={"ttlSecondsAfterFinished": 30}), 30.001),
        (see(status=ended("Error", 1), spec=RECREATE), 10.001),
        (see(status=ended(), record=record(S.STATE_EXITED, exit=(0, "")), retention=20), 20.001),
        (see(assigned=False, nodes=()), 10.0),
        # A lost node's return is told; a call to a node that answers failed, and nothing else tells of that.
        (see(node=SILENT, record=Unknown()), None),
        (see(record=Unknown()), 10.0),
    ],
)
def test_when_to_look_again(observation: Observation, seconds: float | None) -> None:
    assert decide(observation).requeue_after == (None if seconds is None else pytest.approx(seconds))
