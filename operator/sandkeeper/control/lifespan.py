"""The life of one instance: how it ended, what that means, and when something is due. Pure.

A node's clock may be hours off ours, and either may be set to another time at any moment. So a node's times are told
as they are, but nothing that is due is reckoned from them alone: see `due_after_end` and `Observation.ran`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from google.protobuf.timestamp_pb2 import Timestamp

from sandkeeper.api import READY, RUNNING, SCHEDULED, find_condition
from sandkeeper.control.observation import Absent, Observation, Present
from sandkeeper.wire import node_pb2

COMPLETED = "Completed"
STOPPED = "Stopped"
DEADLINE_EXCEEDED = "DeadlineExceeded"
SANDBOX_LOST = "SandboxLost"
NODE_LOST = "ShimLost"
START_ERROR = "StartError"

# Both times are the node's: an exit this much before the deadline still counts as the deadline's.
CLOCK_SKEW_SECONDS = 2.0
MAX_BACKOFF_SECONDS = 3600.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# The first and last second that a datetime and a Timestamp can hold: the years 1 and 9999.
_EARLIEST, _LATEST = -62_135_596_800, 253_402_300_799

Wish = Literal["Running", "Paused", "Stopped"]
LIVE = (node_pb2.STATE_RUNNING, node_pb2.STATE_PAUSED)


@dataclass(frozen=True, slots=True)
class Ending:
    """How an instance ended. `status` is None where no process gave one (lost, never started)."""

    reason: str
    at: datetime
    status: int | None = None
    signal: int | None = None
    message: str = ""

    @property
    def succeeded(self) -> bool:
        return self.status == 0 and self.reason == COMPLETED


def moment(stamp: Timestamp) -> datetime:
    """A protobuf timestamp as an aware datetime; what is out of range becomes the nearest that is in it."""
    seconds = max(_EARLIEST, min(stamp.seconds, _LATEST))
    nanos = max(0, min(stamp.nanos, 999_999_999))
    return _EPOCH + timedelta(seconds=seconds, microseconds=nanos // 1000)


def later(at: datetime, seconds: float) -> datetime:
    """`seconds` after `at`, which a node may have set to any time; the end of all time where that is past it."""
    try:
        return at + timedelta(seconds=seconds)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)


def shut_down_due(o: Observation) -> bool:
    """shutdownTime has passed."""
    at = o.sandbox.spec.shutdown_time
    return at is not None and o.now >= at


def wish(o: Observation) -> Wish:
    """What should be now: desiredState, and Stopped from shutdownTime on."""
    return "Stopped" if shut_down_due(o) else o.sandbox.spec.desired_state


def of_this_instance(o: Observation) -> bool:
    """The status in the API speaks of the instance that is assigned now, and not of one that another object of
    that name had: a backup that is restored may bring its status along."""
    status = o.sandbox.status
    if o.assignment is None or status.instance != o.assignment.instance:
        return False
    return status.sandbox_id in (None, f"{o.uid}-{o.assignment.instance}")


def was_started(o: Observation) -> bool:
    """The API's status says that this instance ran."""
    return of_this_instance(o) and o.sandbox.status.started_at is not None


def recorded_ending(o: Observation) -> Ending | None:
    """The end of this instance as the API's status has it: safe, whatever becomes of the node."""
    status = o.sandbox.status
    if not of_this_instance(o) or status.exited_at is None:
        return None
    return Ending(
        reason=status.exit_reason or "Error",
        at=status.exited_at,
        status=status.exit_status,
        signal=status.exit_signal,
        message=status.exit_message or "",
    )


def ending(o: Observation) -> Ending | None:
    """The end of this instance: from the API, else from the node, else because it is lost; None while it
    lives."""
    if o.assignment is None:
        return None
    recorded = recorded_ending(o)
    if recorded is not None:
        return recorded
    if isinstance(o.record, Present) and (end := _ending_on_node(o, o.record.record)) is not None:
        return end
    if o.node is None or o.node.out_of_service:
        gone = f"node {o.assignment.node} is declared gone"
        return Ending(NODE_LOST, o.now, message=gone) if was_started(o) else None
    if isinstance(o.record, Absent) and o.record.proven and was_started(o):
        lost = f"node {o.assignment.node} does not know the instance any more"
        return Ending(SANDBOX_LOST, o.now, message=lost)
    return None


def _ending_on_node(o: Observation, record: node_pb2.SandboxRecord) -> Ending | None:
    if record.state == node_pb2.STATE_FAILED:
        return Ending(record.reason or START_ERROR, o.now, message=record.message)
    if record.state != node_pb2.STATE_EXITED:
        return None
    exit_ = record.exit
    reason = exit_.reason or (COMPLETED if exit_.status == 0 else "Error")
    at = moment(exit_.exited_at) if exit_.HasField("exited_at") else o.now
    if reason == STOPPED and _ended_by_deadline(o, record, at):
        reason = DEADLINE_EXCEEDED
    lost = reason == SANDBOX_LOST
    return Ending(reason, at, None if lost else exit_.status, exit_.signal or None, exit_.message)


def _ended_by_deadline(o: Observation, record: node_pb2.SandboxRecord, at: datetime) -> bool:
    limit = o.sandbox.spec.active_deadline_seconds
    if limit is None or wish(o) == "Stopped":
        return False
    if deadline_said(o):
        return True
    return record.HasField("started_at") and later(at, CLOCK_SKEW_SECONDS) >= later(
        moment(record.started_at), limit
    )


def deadline(o: Observation) -> datetime | None:
    """When activeDeadlineSeconds ends the running instance."""
    limit = o.sandbox.spec.active_deadline_seconds
    if limit is None or not isinstance(o.record, Present) or not o.record.record.HasField("started_at"):
        return None
    if o.ran is not None:
        return later(o.now, limit - o.ran)
    return later(moment(o.record.record.started_at), limit)


def deadline_said(o: Observation) -> bool:
    """The status says already that activeDeadlineSeconds is over for this instance. It is written before the
    instance is stopped: afterwards nothing else tells surely why it was."""
    found = find_condition(o.sandbox.status.conditions, READY)
    return (
        of_this_instance(o)
        and found is not None
        and (found.reason, found.observed_generation) == (DEADLINE_EXCEEDED, o.generation)
    )


def run_already(o: Observation) -> float:
    """Seconds that an instance may have run when it is seen for the first time: as the node says, but not longer
    than we have known of it. 0 where we have not told that it runs yet: it was started just now."""
    if not isinstance(o.record, Present) or not was_started(o):
        return 0.0
    ran = (o.now - moment(o.record.record.started_at)).total_seconds()
    scheduled = find_condition(o.sandbox.status.conditions, SCHEDULED)
    if scheduled is not None and scheduled.status == "True":
        ran = min(ran, (o.now - scheduled.last_transition_time).total_seconds())
    return max(0.0, ran)


def restart_wanted(o: Observation) -> bool:
    """It ended because it was asked to, and is asked to run again."""
    end = ending(o)
    return end is not None and end.reason == STOPPED and wish(o) != "Stopped"


def recreation_due(o: Observation) -> datetime | None:
    """When failurePolicy makes a new instance of one that failed; None where it does not."""
    end, policy = ending(o), o.sandbox.spec.failure_policy
    if end is None or o.assignment is None or policy.recreate != "OnFailure":
        return None
    if end.succeeded or end.reason in (STOPPED, DEADLINE_EXCEEDED) or wish(o) == "Stopped":
        return None
    if o.assignment.recreations >= policy.limit:
        return None
    # float ** may overflow; the bound is reached long before.
    factor = 2.0 ** min(o.assignment.recreations, 32)
    return due_after_end(o, end, min(policy.backoff_seconds * factor, MAX_BACKOFF_SECONDS))


def due_after_end(o: Observation, end: Ending, seconds: float) -> datetime:
    """`seconds` after the end, by our own clock.

    The end as the node has it counts only between what is surely before it and now. Otherwise it is the moment at
    which we wrote that nothing runs any more; a clock that was set back since then delays by no more than that.
    """
    seen = find_condition(o.sandbox.status.conditions, RUNNING) if recorded_ending(o) is not None else None
    if seen is None or seen.status != "False":
        return later(min(end.at, o.now), seconds)
    ours = seen.last_transition_time
    return later(end.at if ours <= end.at <= o.now else min(ours, o.now), seconds)


def expiry(o: Observation) -> datetime | None:
    """When ttlSecondsAfterFinished deletes the object of an instance that is finished for good."""
    ttl, end = o.sandbox.spec.ttl_seconds_after_finished, recorded_ending(o)
    if ttl is None or end is None or not finished_for_good(o):
        return None
    return due_after_end(o, end, ttl)


def finished_for_good(o: Observation) -> bool:
    """It ended, and nothing that is asked for now starts it again."""
    end = ending(o)
    if end is None or recreation_due(o) is not None or restart_wanted(o):
        return False
    # One that `desiredState: Stopped` stopped waits to run again.
    return end.reason != STOPPED or shut_down_due(o)


def forget_due(o: Observation) -> datetime | None:
    """When the node may forget an instance whose end is safe in the API."""
    end = recorded_ending(o)
    return None if end is None else due_after_end(o, end, o.retention)


def next_look(o: Observation) -> float | None:
    """Seconds until the clock alone changes what is to be done; None where it never does."""
    moments = [deadline(o), recreation_due(o), expiry(o)]
    if not shut_down_due(o):
        moments.append(o.sandbox.spec.shutdown_time)
    if isinstance(o.record, Present):
        moments.append(forget_due(o))
    ahead = [(at - o.now).total_seconds() for at in moments if at is not None and at > o.now]
    # A millisecond over, so that the timer never fires just before the moment.
    return min(ahead) + 0.001 if ahead else None
