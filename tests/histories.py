"""What must hold in every history of a Sandbox: all versions of one object that the API server had, in order.

`violations` is pure. A rule looks at two versions that follow each other ({} stands before the first) and
yields a line for each thing that must not be. Only what a user can see counts: no rule knows how the operator
comes to a status.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Literal

from tests import argocd

from sandkeeper.api import ASSIGNMENT_ANNOTATION, FINALIZER, Sandbox, instance_digest

Object = dict[str, Any]
Rule = Callable[[Object, Object], Iterable[str]]
KStatus = Literal["Current", "InProgress", "Failed", "Terminating"]

_EXIT = ("exitedAt", "exitStatus", "exitSignal", "exitReason", "exitMessage")


def violations(versions: Sequence[Object], rules: Sequence[Rule] | None = None) -> list[str]:
    """One line for each rule that a pair of versions breaks, empty for a history that is right.

    versions: of one object (one UID), oldest first; every one of them, or a rule may speak of a step that was two.
    """
    found: list[str] = []
    before: Object = {}
    for after in versions:
        for rule in RULES if rules is None else rules:
            metadata = after["metadata"]
            found += [
                f"{metadata['name']} at {metadata['resourceVersion']}: {line}" for line in rule(before, after)
            ]
        before = after
    return found


def kstatus(body: Object) -> KStatus:
    """What `kubectl wait`, Flux and Argo CD make of an object. Source: cli-utils' pkg/kstatus/status, for a kind
    that it does not know."""
    metadata, status = body["metadata"], body.get("status") or {}
    if metadata.get("deletionTimestamp"):
        return "Terminating"
    if status.get("observedGeneration", metadata["generation"]) != metadata["generation"]:
        return "InProgress"
    conditions = _conditions(body)
    if _is(conditions, "Reconciling", "True"):
        return "InProgress"
    if _is(conditions, "Stalled", "True"):
        return "Failed"
    return "InProgress" if "Ready" in conditions and not _is(conditions, "Ready", "True") else "Current"


# Rules


def current_is_true(before: Object, after: Object) -> Iterator[str]:
    """Whoever waits for Current gets what the spec asks for, and nothing else."""
    if kstatus(after) != "Current":
        return
    status, wish = after.get("status") or {}, after["spec"].get("desiredState", "Running")
    conditions = _conditions(after)
    if "Ready" not in conditions:
        yield "it is Current without a condition Ready"
    if "shutdownTime" in after["spec"] and status.get("phase") == "Stopped":
        wish = "Stopped"
    runs = _is(conditions, "Running", "True") and bool(status.get("pid")) and "exitedAt" not in status
    completed = _is(conditions, "Finished", "True") and status.get("exitReason") == "Completed"
    frozen = status.get("phase") == "Paused" and bool(status.get("pid")) and "exitedAt" not in status
    stopped = not _is(conditions, "Running", "True") and not status.get("pid")
    if not {"Running": runs or completed, "Paused": frozen or completed, "Stopped": stopped}[wish]:
        yield f"it is Current, wanted is {wish}, and the status says {status.get('phase')}"
    assignment = _assignment(after)
    if assignment is None or wish == "Stopped":
        return
    if status.get("instance") != assignment["instance"]:
        yield (
            f"it is Current with the status of instance {status.get('instance')}, assigned is"
            f" {assignment['instance']}"
        )
    if assignment["digest"] != instance_digest(Sandbox.model_validate(after).spec):
        yield "it is Current and the instance is of another spec"


def argo_cd_agrees(before: Object, after: Object) -> Iterator[str]:
    """Argo CD's health says what kstatus says, and tells apart what was frozen as asked: that is Argo's Suspended."""
    frozen = (
        after["spec"].get("desiredState") == "Paused" and after.get("status", {}).get("phase") == "Paused"
    )
    wanted = {"Current": "Suspended" if frozen else "Healthy", "Failed": "Degraded"}
    found, message = argocd.health(after)
    if found != wanted.get(kstatus(after), "Progressing"):
        yield f"it is {kstatus(after)}, and to Argo CD it is {found}: {message}"


def generations_are_observed_in_order(before: Object, after: Object) -> Iterator[str]:
    """observedGeneration is never ahead of the generation, and never goes back."""
    generation, seen = after["metadata"]["generation"], _observed(after)
    if seen > generation:
        yield f"observedGeneration {seen} is ahead of generation {generation}"
    if before and seen < _observed(before):
        yield f"observedGeneration went back from {_observed(before)} to {seen}"
    for kind, condition in _conditions(after).items():
        if condition.get("observedGeneration", 0) > generation:
            yield f"{kind} observed generation {condition['observedGeneration']}, ahead of {generation}"


def times_change_with_the_status_alone(before: Object, after: Object) -> Iterator[str]:
    """lastTransitionTime moves when the condition's status does, and never back."""
    if not before or _observed(before) == 0:
        return  # the schema's default is no observation: its time is that of nothing
    earlier = _conditions(before)
    for kind, condition in _conditions(after).items():
        old = earlier.get(kind)
        if old is None:
            continue
        was, is_ = old["lastTransitionTime"], condition["lastTransitionTime"]
        if old["status"] == condition["status"] and was != is_:
            yield f"{kind} is still {condition['status']}, and its lastTransitionTime moved from {was} to {is_}"
        if datetime.fromisoformat(is_) < datetime.fromisoformat(was):
            yield f"the lastTransitionTime of {kind} went back from {was} to {is_}"


def an_exit_stays(before: Object, after: Object) -> Iterator[str]:
    """How an instance ended stays as it was first seen, until a later instance has something to say."""
    old, new = before.get("status") or {}, after.get("status") or {}
    if "exitedAt" not in old or (new.get("instance") or 0) > old.get("instance", 0):
        return
    for field in _EXIT:
        if old.get(field) != new.get(field):
            yield f"{field} of instance {old.get('instance')} was {old.get(field)!r} and is {new.get(field)!r}"


def instances_only_grow(before: Object, after: Object) -> Iterator[str]:
    """An instance's number is used once: it has one node, and none comes back after a later one."""
    old, new = _assignment(before), _assignment(after)
    if old is not None and new is not None:
        if new["instance"] < old["instance"]:
            yield f"the assigned instance went back from {old['instance']} to {new['instance']}"
        if new["instance"] == old["instance"] and new["node"] != old["node"]:
            yield f"instance {new['instance']} moved from {old['node']} to {new['node']}"
    was, is_ = ((body.get("status") or {}).get("instance") or 0 for body in (before, after))
    if is_ < was:
        yield f"the status went back from instance {was} to {is_ or 'none'}"
    if new is not None and is_ > new["instance"]:
        yield f"the status speaks of instance {is_}, assigned is {new['instance']}"


def an_instance_starts_once(before: Object, after: Object) -> Iterator[str]:
    """The same instance has the same pid and the same start for as long as it is seen."""
    old, new = before.get("status") or {}, after.get("status") or {}
    if not old.get("instance") or old.get("instance") != new.get("instance"):
        return
    for field in ("pid", "createdAt", "startedAt"):
        if old.get(field) and new.get(field) and old[field] != new[field]:
            yield f"{field} of instance {new['instance']} was {old[field]} and is {new[field]}"
    if old.get("exitedAt") and new.get("pid"):
        yield f"instance {new['instance']} had ended and has pid {new['pid']}"


def the_finalizer_comes_with_the_assignment(before: Object, after: Object) -> Iterator[str]:
    """No node hears of an instance before its object is kept from vanishing."""
    old, new = _assignment(before), _assignment(after)
    if new is None or (old is not None and old["instance"] == new["instance"]):
        return
    metadata = after["metadata"]
    if FINALIZER not in (metadata.get("finalizers") or ()) and not metadata.get("deletionTimestamp"):
        yield f"instance {new['instance']} was assigned without the finalizer"


RULES: tuple[Rule, ...] = (
    current_is_true,
    argo_cd_agrees,
    generations_are_observed_in_order,
    times_change_with_the_status_alone,
    an_exit_stays,
    instances_only_grow,
    an_instance_starts_once,
    the_finalizer_comes_with_the_assignment,
)


# Parts


def _conditions(body: Object) -> dict[str, Object]:
    return {item["type"]: item for item in (body.get("status") or {}).get("conditions") or []}


def _is(conditions: dict[str, Object], kind: str, status: str) -> bool:
    return kind in conditions and conditions[kind]["status"] == status


def _observed(body: Object) -> int:
    return int((body.get("status") or {}).get("observedGeneration") or 0)


def _assignment(body: Object) -> Object | None:
    """The assignment that is the object's own: one of another UID came with a copy, and says nothing."""
    if not body:
        return None
    text = (body["metadata"].get("annotations") or {}).get(ASSIGNMENT_ANNOTATION)
    try:
        found = json.loads(text or "")
    except ValueError:
        return None
    own = isinstance(found, dict) and found.get("uid") == body["metadata"]["uid"] and "instance" in found
    return found if own else None
