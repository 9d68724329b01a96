"""The heart of the operator: one table, read from top to bottom, the first rule that applies decides.

`decide` is a pure function of an Observation. A rule names when it applies (`rules`), what the situation is
called (the reason of Ready, the same word as in docs/concepts.md), what it means for Ready, and the plan:
what to do next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sandkeeper.control import rules as r
from sandkeeper.control.actions import (
    Action,
    Assign,
    Decision,
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
from sandkeeper.control.lifespan import STOPPED, ending, next_look, recreation_due, wish
from sandkeeper.control.observation import Assignment, Observation, Present
from sandkeeper.control.placement import Unschedulable, place

READY, PROGRESSING, FAILED, UNKNOWN = Verdict.READY, Verdict.PROGRESSING, Verdict.FAILED, Verdict.UNKNOWN

UNSCHEDULABLE = "Unschedulable"
# What waits for room or for nodes is looked at again after this; most changes wake it sooner.
RETRY_SECONDS = 10.0
_MAX_WORD = 256


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rule's function makes of an observation; what is None is as the rule says."""

    action: Action
    message: str = ""
    reason: str | None = None
    verdict: Verdict | None = None
    requeue_after: float | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    when: Callable[[Observation], bool]
    reason: str
    verdict: Verdict
    then: Callable[[Observation], Plan]


# Plans


def rest(o: Observation) -> Plan:
    return Plan(Rest())


def restore_assignment(o: Observation) -> Plan:
    """Write the annotation anew from what the newest record on a node says, else from the status."""
    status = o.sandbox.status
    holdings = r.holdings(o)
    message = f"annotation was lost; restored from {'the node' if holdings else 'the status'}"
    if holdings:
        node, record = max(holdings, key=lambda holding: (holding[1].owner.instance, holding[0]))
        found = Assignment(
            uid=o.uid,
            node=node,
            instance=record.owner.instance,
            # An annotation has room for what we wrote, not for whatever a node may say.
            digest=record.digest[:_MAX_WORD],
            runtime=record.runtime[:_MAX_WORD],
            recreations=status.recreations,
        )
        return Plan(Assign(found), message)
    # No record tells the digest: it is today's unless the spec has changed since the status was written.
    unchanged = status.observed_generation == o.generation
    found = Assignment(
        uid=o.uid,
        node=status.node_name or "",
        instance=status.instance or 1,
        digest=o.desired_digest if unchanged else "",
        runtime=status.runtime or "",
        recreations=status.recreations,
    )
    return Plan(Assign(found), message)


def wait_for_every_node(o: Observation) -> Plan:
    silent = sorted(node.name for node in o.nodes if not node.reachable and not node.out_of_service)
    return Plan(
        Rest(), f"annotation was lost; the sandbox may be on {', '.join(silent[:5])}, which do not answer"
    )


def wait_for_node(o: Observation) -> Plan:
    name = o.assignment.node if o.assignment else ""
    # Of a node that is lost the return is told. One call that failed nothing tells of.
    reachable = o.node is not None and o.node.reachable
    return Plan(
        Rest(),
        f"node {name} does not answer; what is on it is not known",
        requeue_after=RETRY_SECONDS if reachable else None,
    )


def release(o: Observation) -> Plan:
    return Plan(Release()) if o.finalizing else Plan(Rest())


def shut_down(o: Observation) -> Plan:
    """Everything on the node goes, with the grace period where something runs."""
    grace = o.sandbox.spec.termination_grace_period_seconds if r.live(o) else None
    return Plan(Shutdown(grace))


def forget(o: Observation) -> Plan:
    """The node drops an instance that ended: nothing runs, and how it ended is in the API."""
    return _outcome(o, Shutdown())


def record(o: Observation) -> Plan:
    """Nothing but the status write: it holds the end, and the next look goes on from there."""
    return _outcome(o, Rest())


def settle(o: Observation) -> Plan:
    # Due and not done: many nodes are lost at once, and nothing tells when that is over.
    held = recreation_due(o) is not None and o.mass_outage
    return replace(_outcome(o, Rest()), requeue_after=RETRY_SECONDS if held else None)


def expire(o: Observation) -> Plan:
    return _outcome(o, Delete())


def _outcome(o: Observation, action: Action) -> Plan:
    """What an ended instance means, with what is to be done about it."""
    end = ending(o)
    if end is None:
        return Plan(action)
    if wish(o) == STOPPED:
        return Plan(action, end.message, STOPPED, READY)
    if r.superseded(o):
        return Plan(action, end.message, "Replacing", PROGRESSING)
    if end.succeeded:
        return Plan(action, end.message, end.reason, READY)
    if recreation_due(o) is not None:
        return Plan(action, end.message, end.reason, PROGRESSING)
    return Plan(action, end.message or f"ended with exit status {end.status}", end.reason, FAILED)


def assign(o: Observation) -> Plan:
    """The first instance."""
    return _assign(o, instance=1, recreations=0)


def assign_next(o: Observation) -> Plan:
    """The next instance, because the spec or the wish changed."""
    last = o.assignment.instance if o.assignment else 0
    return _assign(o, instance=last + 1, recreations=0)


def assign_again(o: Observation) -> Plan:
    """The next instance in place of one that never ran, or that the shim refuses; not a recreation."""
    last = o.assignment.instance if o.assignment else 0
    return _assign(o, instance=last + 1, recreations=o.assignment.recreations if o.assignment else 0)


def recreate(o: Observation) -> Plan:
    """The next instance in place of one that failed: counted."""
    last = o.assignment.instance if o.assignment else 0
    return _assign(o, instance=last + 1, recreations=(o.assignment.recreations if o.assignment else 0) + 1)


def _assign(o: Observation, *, instance: int, recreations: int) -> Plan:
    spot = place(o.sandbox.spec, o.nodes, o.load, prefer=o.assignment.node if o.assignment else "")
    if isinstance(spot, Unschedulable):
        return Plan(Rest(), spot.message, UNSCHEDULABLE, requeue_after=RETRY_SECONDS)
    chosen = Assignment(
        uid=o.uid,
        node=spot.node,
        instance=instance,
        digest=o.desired_digest,
        runtime=spot.runtime,
        recreations=recreations,
    )
    return Plan(Assign(chosen))


def start(o: Observation) -> Plan:
    return Plan(Start())


def stop(o: Observation) -> Plan:
    return Plan(Stop(o.sandbox.spec.termination_grace_period_seconds))


def pause(o: Observation) -> Plan:
    return Plan(Pause())


def resume(o: Observation) -> Plan:
    return Plan(Resume())


def wait_for_known_state(o: Observation) -> Plan:
    return Plan(Rest(), f"the node says state {r.state(o)}, which this operator does not know")


def say_invalid(o: Observation) -> Plan:
    return Plan(Rest(), o.invalid)


def say_refusal(o: Observation) -> Plan:
    reason, message = o.refusal or ("Refused", "")
    return Plan(Rest(), message, reason)


def wait_for_preparation(o: Observation) -> Plan:
    """Named as the shim names it: PullingImage, ErrImagePull, ImagePullBackOff, ..."""
    if not isinstance(o.record, Present):
        return Plan(Rest())
    return Plan(Rest(), o.record.record.message, o.record.record.reason or None)


def wait_for_restart(o: Observation) -> Plan:
    if not isinstance(o.record, Present):
        return Plan(Rest())
    waiting = [c for c in o.record.record.containers if c.reason == r.CRASH_LOOP]
    return Plan(
        Rest(), "; ".join(f"container {c.name}: {c.message or 'waits for its restart'}" for c in waiting)
    )


RULES = (
    # when                               what it is called      Ready        what to do next
    # Without its assignment nothing can be said of an object, so that comes first.
    Rule(r.assignment_restorable, "AssignmentRestored", PROGRESSING, restore_assignment),
    Rule(r.assignment_hidden, "AssignmentLost", UNKNOWN, wait_for_every_node),
    # Deletion: the finalizer goes when absence is proven or declared, never by a guess.
    Rule(r.deleting_and_absent, "Deleting", PROGRESSING, release),
    Rule(r.deleting_and_node_not_heard, "Deleting", Verdict.UNSAID, rest),
    Rule(r.deleting_and_node_silent, "NodeUnreachable", UNKNOWN, wait_for_node),
    Rule(r.deleting, "Deleting", PROGRESSING, shut_down),
    Rule(r.unreadable, "InvalidSpec", FAILED, say_invalid),
    # An instance that ended: first its end goes into the API, then come the consequences.
    Rule(r.ended_unrecorded, "Ended", PROGRESSING, record),
    Rule(r.superseded_on_node, "Replacing", PROGRESSING, forget),
    Rule(r.superseded, "Replacing", PROGRESSING, assign_next),
    Rule(r.recreation_is_due_on_node, "Recreating", PROGRESSING, forget),
    Rule(r.recreation_is_due, "Recreating", PROGRESSING, recreate),
    Rule(r.expired, "Expired", PROGRESSING, expire),
    Rule(r.forgettable_on_node, "Ended", PROGRESSING, forget),
    Rule(r.ended, "Ended", PROGRESSING, settle),
    # No instance, and maybe none wanted.
    Rule(r.stop_wanted_and_unassigned, "Stopped", READY, rest),
    Rule(r.unassigned, "Scheduling", PROGRESSING, assign),
    # An instance that has not ended as far as we know: its node has the word.
    Rule(r.stop_wanted_and_node_gone, "Stopped", READY, rest),
    Rule(r.node_gone, "NodeGone", PROGRESSING, assign_again),
    Rule(r.node_not_heard, "NodeNotHeard", Verdict.UNSAID, rest),
    Rule(r.node_silent, "NodeUnreachable", UNKNOWN, wait_for_node),
    # What is there and should not be.
    Rule(r.stop_wanted_and_absent, "Stopped", READY, rest),
    Rule(r.stop_wanted_and_live, "Stopping", PROGRESSING, stop),
    Rule(r.stop_wanted, "Stopping", PROGRESSING, shut_down),
    Rule(r.outdated_and_absent, "Replacing", PROGRESSING, assign_next),
    Rule(r.outdated_and_live, "Replacing", PROGRESSING, stop),
    Rule(r.outdated, "Replacing", PROGRESSING, shut_down),
    # What should be and is not.
    Rule(r.fenced, "Replacing", PROGRESSING, assign_again),
    Rule(r.refused, "Refused", FAILED, say_refusal),
    Rule(r.preparing, "Preparing", PROGRESSING, wait_for_preparation),
    Rule(r.not_started, "Starting", PROGRESSING, start),
    Rule(r.past_deadline_unsaid, "DeadlineExceeded", PROGRESSING, rest),
    Rule(r.past_deadline, "DeadlineExceeded", PROGRESSING, stop),
    Rule(r.pause_wanted, "Pausing", PROGRESSING, pause),
    Rule(r.resume_wanted, "Resuming", PROGRESSING, resume),
    # What should be and is.
    Rule(r.crash_looping, "CrashLoopBackOff", PROGRESSING, wait_for_restart),
    Rule(r.frozen, "Paused", READY, rest),
    Rule(r.running, "Running", READY, rest),
    Rule(r.state_not_known, "UnknownState", UNKNOWN, wait_for_known_state),
)


def matching_rule(o: Observation) -> Rule:
    """The rule that decides. One always applies: the last ones cover every number that a state can be."""
    return next(rule for rule in RULES if rule.when(o))


def decide(o: Observation) -> Decision:
    """What to do next about `o`, and what to say of it. Pure; never raises."""
    rule = matching_rule(o)
    plan = rule.then(o)
    decision = Decision(
        action=plan.action,
        reason=plan.reason or rule.reason,
        verdict=plan.verdict or rule.verdict,
        message=plan.message,
        requeue_after=_sooner(plan.requeue_after, next_look(o)),
    )
    # One call at a time: while one is under way the world is only described.
    return replace(decision, action=Rest()) if o.in_flight else decision


def _sooner(one: float | None, other: float | None) -> float | None:
    times = [seconds for seconds in (one, other) if seconds is not None]
    return min(times, default=None)
