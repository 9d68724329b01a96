"""The predicates of the decision table: what may be true of an observation. Each is pure and says one
thing."""

from __future__ import annotations

from sandkeeper.control.lifespan import (
    LIVE,
    deadline,
    deadline_said,
    ending,
    expiry,
    forget_due,
    recorded_ending,
    recreation_due,
    restart_wanted,
    wish,
)
from sandkeeper.control.observation import Absent, Observation, Present, Unknown
from sandkeeper.wire import node_pb2

MAX_INSTANCE = 2**31 - 1  # status.instance is an int32
CRASH_LOOP = "CrashLoopBackOff"
FENCED = "Fenced"


def state(o: Observation) -> int:
    """The record's state; UNSPECIFIED where there is no record."""
    return o.record.record.state if isinstance(o.record, Present) else node_pb2.STATE_UNSPECIFIED


def live(o: Observation) -> bool:
    """Its processes exist: running or frozen."""
    return state(o) in LIVE


# The assignment


def assignment_restorable(o: Observation) -> bool:
    """The annotation was wiped or spoiled (kubectl replace does that), but a node or the status has what it
    said."""
    return o.assignment_lost and (bool(holdings(o)) or status_names_instance(o))


def holdings(o: Observation) -> tuple[tuple[str, node_pb2.SandboxRecord], ...]:
    """The records of this object on any node that name an instance."""
    return tuple(each for each in o.holdings if 1 <= each[1].owner.instance <= MAX_INSTANCE)


def status_names_instance(o: Observation) -> bool:
    """The status tells where which instance of *this* object is (a status may have been copied as well)."""
    status = o.sandbox.status
    ours = (status.sandbox_id or "").startswith(f"{o.uid}-")
    return ours and bool(status.node_name) and bool(status.instance)


def assignment_hidden(o: Observation) -> bool:
    """It was assigned, nobody that answers knows where, and somebody does not answer."""
    return o.assignment_lost and any(not node.reachable and not node.out_of_service for node in o.nodes)


def unassigned(o: Observation) -> bool:
    return o.assignment is None


# The node


def node_gone(o: Observation) -> bool:
    """An administrator declared it gone: the SandboxNode was deleted or marked out of service."""
    return o.assignment is not None and (o.node is None or o.node.out_of_service)


def node_not_heard(o: Observation) -> bool:
    """The operator has only just started, and the node's time to answer is not over."""
    return o.node is not None and not o.node.settled


def node_silent(o: Observation) -> bool:
    """Nobody can say what is on the node."""
    if o.assignment is None or node_gone(o):
        return False
    return o.node is None or not o.node.reachable or isinstance(o.record, Unknown)


# Deletion


def deleting(o: Observation) -> bool:
    return o.deleting


def deleting_and_absent(o: Observation) -> bool:
    """Nothing of it can be running: never assigned, proven absent, or on a node that is declared gone."""
    return o.deleting and (unassigned(o) or proven_absent(o) or node_gone(o))


def deleting_and_node_not_heard(o: Observation) -> bool:
    return o.deleting and node_not_heard(o)


def deleting_and_node_silent(o: Observation) -> bool:
    return o.deleting and node_silent(o)


def unreadable(o: Observation) -> bool:
    """The spec is none that today's schema knows."""
    return bool(o.invalid)


# The end of an instance


def ended(o: Observation) -> bool:
    return ending(o) is not None


def ended_unrecorded(o: Observation) -> bool:
    """How it ended is not in the API yet: that comes before everything that lets the node forget."""
    return ended(o) and recorded_ending(o) is None


def on_node(o: Observation) -> bool:
    """The node still has the record, and can be asked to drop it."""
    return isinstance(o.record, Present) and o.node is not None and o.node.reachable


def superseded(o: Observation) -> bool:
    """It ended, and another instance is asked for: of a changed spec, or after a stop."""
    return ended(o) and wish(o) != "Stopped" and (outdated(o) or restart_wanted(o))


def superseded_on_node(o: Observation) -> bool:
    return superseded(o) and on_node(o)


def recreation_is_due(o: Observation) -> bool:
    """It failed and failurePolicy's back-off is over. With many nodes lost at once the fault is likelier
    ours."""
    at = recreation_due(o)
    return at is not None and at <= o.now and not o.mass_outage


def recreation_is_due_on_node(o: Observation) -> bool:
    return recreation_is_due(o) and on_node(o)


def expired(o: Observation) -> bool:
    """ttlSecondsAfterFinished is over."""
    at = expiry(o)
    return at is not None and at <= o.now


def forgettable_on_node(o: Observation) -> bool:
    """Its end is safe in the API and the node still holds it."""
    at = forget_due(o)
    return at is not None and at <= o.now and on_node(o)


# What should be, against what is


def stop_wanted(o: Observation) -> bool:
    return wish(o) == "Stopped"


def stop_wanted_and_unassigned(o: Observation) -> bool:
    return stop_wanted(o) and unassigned(o)


def stop_wanted_and_node_gone(o: Observation) -> bool:
    return stop_wanted(o) and node_gone(o)


def stop_wanted_and_absent(o: Observation) -> bool:
    return stop_wanted(o) and isinstance(o.record, Absent)


def stop_wanted_and_live(o: Observation) -> bool:
    return stop_wanted(o) and live(o)


def outdated(o: Observation) -> bool:
    """The instance is of another spec than the one that is asked for now."""
    if o.assignment is None:
        return False
    if isinstance(o.record, Present) and o.record.record.digest not in ("", o.assignment.digest):
        return True
    return o.assignment.digest != o.desired_digest


def outdated_and_absent(o: Observation) -> bool:
    return outdated(o) and proven_absent(o)


def outdated_and_live(o: Observation) -> bool:
    """It runs. It is stopped before it is shut down, so that its end is in the API as one that was asked for:
    without that, a change that is taken back meanwhile would find it lost."""
    return outdated(o) and live(o)


def proven_absent(o: Observation) -> bool:
    return isinstance(o.record, Absent) and o.record.proven


def fenced(o: Observation) -> bool:
    """The shim has seen a newer instance of this object than the one that is assigned."""
    return o.refusal is not None and o.refusal[0] == FENCED


def refused(o: Observation) -> bool:
    """The shim will not do it, and said why."""
    return o.refusal is not None


def preparing(o: Observation) -> bool:
    """The node is fetching images or making file systems; it will tell."""
    return state(o) == node_pb2.STATE_PREPARING


def not_started(o: Observation) -> bool:
    """Not on the node, or there and ready for Start."""
    return isinstance(o.record, Absent) or state(o) in (node_pb2.STATE_CREATED, node_pb2.STATE_UNSPECIFIED)


def past_deadline(o: Observation) -> bool:
    at = deadline(o)
    return at is not None and live(o) and (at <= o.now or deadline_said(o))


def past_deadline_unsaid(o: Observation) -> bool:
    """That it is stopped for its deadline goes into the API before it is stopped: one that is stopped for no such
    reason is started again."""
    return past_deadline(o) and not deadline_said(o)


def pause_wanted(o: Observation) -> bool:
    return wish(o) == "Paused" and state(o) == node_pb2.STATE_RUNNING


def resume_wanted(o: Observation) -> bool:
    return wish(o) == "Running" and state(o) == node_pb2.STATE_PAUSED


def crash_looping(o: Observation) -> bool:
    """A container waits for its restart under restartPolicy."""
    return isinstance(o.record, Present) and any(
        container.state == node_pb2.CONTAINER_STATE_WAITING and container.reason == CRASH_LOOP
        for container in o.record.record.containers
    )


def frozen(o: Observation) -> bool:
    return state(o) == node_pb2.STATE_PAUSED


def running(o: Observation) -> bool:
    return state(o) == node_pb2.STATE_RUNNING


def state_not_known(o: Observation) -> bool:
    """A state that this operator has no word for: the shim is newer than it."""
    return state(o) not in node_pb2.State.values()
