"""The status, computed in one place from what was observed and decided; and what a change of it is worth.
Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from google.protobuf.timestamp_pb2 import Timestamp

from sandkeeper.api import (
    FINISHED,
    READY,
    RECONCILING,
    RUNNING,
    SCHEDULED,
    STALLED,
    Condition,
    ContainerStatus,
    Phase,
    SandboxStatus,
    Usage,
    find_condition,
    remove_condition,
    set_condition,
)
from sandkeeper.control import rules
from sandkeeper.control.actions import Assign, Decision, Verdict
from sandkeeper.control.decide import UNSCHEDULABLE
from sandkeeper.control.lifespan import (
    STOPPED,
    Ending,
    ending,
    finished_for_good,
    moment,
    of_this_instance,
    wish,
)
from sandkeeper.control.observation import Observation, Present
from sandkeeper.wire import node_pb2

ConditionStatus = Literal["True", "False", "Unknown"]

_REASON = re.compile(r"[A-Za-z](?:[A-Za-z0-9]{0,126}[A-Za-z0-9])?")
_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
# The schema's: what every JSON number can hold exactly.
_MAX_INT = 2**53 - 1
_CONTAINER_STATES = {
    node_pb2.CONTAINER_STATE_RUNNING: "Running",
    node_pb2.CONTAINER_STATE_EXITED: "Exited",
}
_READY_OF: dict[Verdict, ConditionStatus] = {
    Verdict.READY: "True",
    Verdict.PROGRESSING: "False",
    Verdict.FAILED: "False",
    Verdict.UNKNOWN: "Unknown",
    Verdict.UNSAID: "Unknown",
}


@dataclass(frozen=True, slots=True)
class Happening:
    """Something that a change of the status tells, for the object's Events."""

    type: Literal["Normal", "Warning"]
    reason: str
    action: str
    note: str


def compute(o: Observation, decision: Decision) -> SandboxStatus:
    """The status that `o` and `decision` amount to. The end of an instance, once seen, stays until the
    next."""
    before = o.sandbox.status if of_this_instance(o) else SandboxStatus()
    end = ending(o)
    # What runs by the record, and has ended as we know, is from before the end: a Watch stream may be behind.
    behind = end is not None and rules.live(o)
    record = o.record.record if isinstance(o.record, Present) and not behind else None
    assignment = o.assignment
    status = SandboxStatus(
        observed_generation=o.generation,
        conditions=_conditions(o, decision, end),
        phase=_phase(o, decision, end),
        node_name=assignment.node if assignment else None,
        instance=assignment.instance if assignment else None,
        sandbox_id=f"{assignment.uid}-{assignment.instance}" if assignment else None,
        runtime=((record.runtime if record else "") or assignment.runtime or None) if assignment else None,
        pid=record.pid or None if record and rules.live(o) else _pid_of_silent(o, before),
        created_at=_time(record, "created_at") or before.created_at,
        started_at=_time(record, "started_at") or before.started_at,
        containers=_containers(o, record) if record else before.containers,
        addresses=tuple(record.addresses)[:16] if record and rules.live(o) else (),
        usage=_usage(record) or before.usage,
        recreations=assignment.recreations if assignment else 0,
    )
    return status if end is None else status.model_copy(update=_exit_fields(end))


def _exit_fields(end: Ending) -> dict[str, Any]:
    return {
        "exited_at": end.at,
        "exit_status": None if end.status is None else max(0, min(end.status, 255)),
        "exit_signal": None if not end.signal else max(0, min(end.signal, 128)),
        "exit_reason": word(end.reason, "Error"),
        "exit_message": end.message[:4096] or None,
    }


def _pid_of_silent(o: Observation, before: SandboxStatus) -> int | None:
    """A node that does not answer may well still run it: its pid stays until something else is known."""
    return before.pid if rules.node_silent(o) and ending(o) is None else None


def _conditions(o: Observation, decision: Decision, end: Ending | None) -> tuple[Condition, ...]:
    # The schema's default is not an observation: its time of 1970 must not be carried on.
    conditions = o.sandbox.status.conditions if o.sandbox.status.observed_generation else ()
    reason = word(decision.reason, "Unknown")

    def put(type_: str, status: ConditionStatus, reason: str, message: str = "") -> None:
        nonlocal conditions
        conditions = set_condition(
            conditions, type_, status, reason, message, now=o.now, observed_generation=o.generation
        )

    silent = end is None and (rules.node_silent(o) or rules.state_not_known(o))
    if o.assignment is not None:
        put(SCHEDULED, "True", "Assigned", f"instance {o.assignment.instance} is on node {o.assignment.node}")
    elif reason == UNSCHEDULABLE:
        put(SCHEDULED, "False", reason, decision.message)
    else:
        put(SCHEDULED, "Unknown" if o.assignment_lost else "False", reason, decision.message)

    if end is not None:
        put(RUNNING, "False", word(end.reason, "Error"), end.message)
    elif silent:
        put(RUNNING, "Unknown", reason, decision.message)
    elif rules.running(o):
        put(RUNNING, "True", "Running")
    else:
        put(RUNNING, "False", "Paused" if rules.frozen(o) else reason, decision.message)

    if end is not None and finished_for_good(o):
        put(FINISHED, "True", word(end.reason, "Error"), end.message)
    else:
        put(FINISHED, "Unknown" if silent else "False", reason if silent else "NotFinished")

    put(READY, _READY_OF[decision.verdict], reason, decision.message)
    if decision.verdict is Verdict.FAILED:
        put(STALLED, "True", reason, decision.message)
    else:
        conditions = remove_condition(conditions, STALLED)
    if decision.verdict in (Verdict.PROGRESSING, Verdict.UNKNOWN):
        put(RECONCILING, "True", reason, decision.message)
    else:
        conditions = remove_condition(conditions, RECONCILING)
    return conditions


def _phase(o: Observation, decision: Decision, end: Ending | None) -> Phase:
    if o.deleting:
        return "Terminating"
    if decision.verdict is Verdict.UNKNOWN:
        return "Unknown"
    if wish(o) == "Stopped" and decision.verdict is Verdict.READY:
        return "Stopped"
    if end is not None:
        if end.reason == STOPPED:
            return "Stopped"
        if not finished_for_good(o):
            return "Pending"
        return "Succeeded" if end.succeeded else "Failed"
    if decision.verdict is Verdict.FAILED:
        return "Failed"
    if decision.reason in ("Stopping", "Replacing", "DeadlineExceeded"):
        return "Stopping"
    if rules.running(o):
        return "Running"
    if rules.frozen(o):
        return "Paused"
    return "Starting" if o.assignment is not None else "Pending"


def _containers(o: Observation, record: node_pb2.SandboxRecord) -> tuple[ContainerStatus, ...]:
    """The record's containers, those only that the spec's schema could name, each name once."""
    seen: dict[str, ContainerStatus] = {}
    for container in record.containers[:16]:
        if not _LABEL.fullmatch(container.name):
            continue
        exited = container.HasField("exit")
        state = _CONTAINER_STATES.get(container.state, "Waiting")
        runs = state == "Running"
        if runs and rules.frozen(o):
            state = "Paused"
        seen[container.name] = ContainerStatus(
            name=container.name,
            state=state,
            pid=container.pid or None if runs else None,
            restart_count=min(container.restart_count, 2**31 - 1),
            started_at=_moment(container.started_at) if container.HasField("started_at") else None,
            exited_at=_moment(container.exit.exited_at)
            if exited and container.exit.HasField("exited_at")
            else None,
            exit_status=min(container.exit.status, 255) if exited else None,
            exit_signal=min(container.exit.signal, 128) or None if exited else None,
            exit_reason=word(container.exit.reason, "Error") if exited else None,
            image_id=container.image_id or None,
            reason=word(container.reason, "Unknown") if container.reason else None,
            message=container.message or None,
        )
    return tuple(seen.values())


def _usage(record: node_pb2.SandboxRecord | None) -> Usage | None:
    if record is None or not record.HasField("usage"):
        return None
    usage = record.usage
    return Usage(
        cpu_usage_milliseconds=min(usage.cpu_usage_usec // 1000, _MAX_INT),
        memory_bytes=min(usage.memory_bytes, _MAX_INT),
        pids=min(usage.pids, _MAX_INT),
        sampled_at=_moment(usage.sampled_at) if usage.HasField("sampled_at") else None,
    )


def _time(
    record: node_pb2.SandboxRecord | None, field: Literal["created_at", "started_at"]
) -> datetime | None:
    if record is None or not record.HasField(field):
        return None
    return _moment(getattr(record, field))


def _moment(stamp: Timestamp) -> datetime:
    return moment(stamp)


def word(text: str, otherwise: str) -> str:
    """`text` where it may stand as a reason; a server may send anything, and must not cost the whole
    status."""
    return text if _REASON.fullmatch(text) else otherwise


def changed(before: SandboxStatus, after: SandboxStatus, *, usage_interval: float = 0.0) -> bool:
    """Whether `after` is worth a write: anything but usage differs, or usage is that much newer (0:
    never)."""
    if (
        before.model_copy(update={"usage": None}).to_dict()
        != after.model_copy(update={"usage": None}).to_dict()
    ):
        return True
    if usage_interval <= 0 or after.usage is None or after.usage.sampled_at is None:
        return False
    if before.usage is None or before.usage.sampled_at is None:
        return True
    # Whichever is later: the node's clock may have been set back.
    return abs((after.usage.sampled_at - before.usage.sampled_at).total_seconds()) >= usage_interval


def merge_patch(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The JSON merge patch (RFC 7386) that makes `before` into `after`: lists whole, removed keys as null."""
    patch: dict[str, Any] = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            if inner := merge_patch(old, value):
                patch[key] = inner
        elif key not in before or old != value:
            patch[key] = value
    patch.update({key: None for key in before if key not in after})
    return patch


def happenings(o: Observation, decision: Decision, after: SandboxStatus) -> list[Happening]:
    """What the step from the status before to `after` is worth telling in Events."""
    before = o.sandbox.status
    found: list[Happening] = []
    same = before.instance == after.instance
    if after.instance is not None and not same:
        verb = "Replace" if before.instance else "Assign"
        found.append(Happening("Normal", "Scheduled", verb, _message(after.conditions, SCHEDULED)))
    if _status(after, RUNNING) == "True" and not (same and _status(before, RUNNING) == "True"):
        found.append(
            Happening("Normal", "Started", "Start", f"instance {after.instance} runs, pid {after.pid}")
        )
    if after.exited_at is not None and not (same and before.exited_at is not None):
        fine = (
            after.exit_status == 0 or after.exit_reason == STOPPED
        ) and after.exit_reason != "DeadlineExceeded"
        note = f"exit status {after.exit_status}" if after.exit_status is not None else "no exit status"
        note = f"{note}: {after.exit_message}" if after.exit_message else note
        found.append(Happening("Normal" if fine else "Warning", after.exit_reason or "Error", "Wait", note))
    elif decision.verdict is not Verdict.READY and _reason(before, READY) != _reason(after, READY):
        trouble = decision.verdict in (Verdict.FAILED, Verdict.UNKNOWN) or _is_trouble(decision)
        if trouble:
            found.append(
                Happening("Warning", word(decision.reason, "Unknown"), "Reconcile", decision.message or "-")
            )
    return found


def _is_trouble(decision: Decision) -> bool:
    """On the way, but not as it should be."""
    reason = decision.reason
    return reason in (UNSCHEDULABLE, rules.CRASH_LOOP, "NodeGone") or (
        reason not in ("PullingImage",) and "Image" in reason and not isinstance(decision.action, Assign)
    )


def _status(status: SandboxStatus, type_: str) -> str | None:
    found = find_condition(status.conditions, type_)
    return found.status if found else None


def _reason(status: SandboxStatus, type_: str) -> str | None:
    found = find_condition(status.conditions, type_)
    return found.reason if found else None


def _message(conditions: tuple[Condition, ...], type_: str) -> str:
    found = find_condition(conditions, type_)
    return found.message if found else ""
