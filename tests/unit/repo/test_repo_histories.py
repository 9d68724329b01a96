"""The checker of histories: what is right passes, and each rule can fail."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from tests import histories
from tests.histories import Object, kstatus, violations

from sandkeeper.api import ASSIGNMENT_ANNOTATION, FINALIZER, Sandbox, instance_digest

T0, T1, T2 = (f"2030-01-01T00:00:0{second}.000000Z" for second in range(3))
UID = "4a7b"


def condition(kind: str, status: str, at: str = T1, generation: int = 1, reason: str = "Because") -> Object:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "lastTransitionTime": at,
        "observedGeneration": generation,
    }


def created() -> Object:
    """As the API server first has it: the schema's default status."""
    unknown = {"type": "Ready", "status": "Unknown", "reason": "Pending", "lastTransitionTime": T0}
    return {
        "metadata": {"name": "one", "uid": UID, "resourceVersion": "1", "generation": 1},
        "spec": {"containers": [{"name": "main", "image": "busybox"}]},
        "status": {"observedGeneration": 0, "conditions": [unknown]},
    }


def assigned(body: Object, instance: int = 1, node: str = "node-1") -> Object:
    after = copy.deepcopy(body)
    digest = instance_digest(Sandbox.model_validate(after).spec)
    value = {"uid": UID, "node": node, "instance": instance, "digest": digest, "runtime": "crun"}
    after["metadata"]["annotations"] = {ASSIGNMENT_ANNOTATION: json.dumps(value)}
    after["metadata"]["finalizers"] = [FINALIZER]
    return after


def running(instance: int = 1, **status: Any) -> Object:
    body = assigned(created(), instance)
    body["status"] = {
        "observedGeneration": 1,
        "instance": instance,
        "phase": "Running",
        "pid": 100 + instance,
        "startedAt": T1,
        "conditions": [condition("Running", "True"), condition("Ready", "True")],
        **status,
    }
    return body


def failed(status: int = 3, instance: int = 1) -> Object:
    body = running(instance)
    del body["status"]["pid"]
    body["status"] |= {
        "phase": "Failed",
        "exitedAt": T2,
        "exitStatus": status,
        "exitReason": "Error",
        "conditions": [
            condition("Running", "False", T2),
            condition("Finished", "True", T2),
            condition("Ready", "False", T2),
            condition("Stalled", "True", T2),
        ],
    }
    return body


def completed() -> Object:
    body = failed(0)
    body["status"] |= {
        "phase": "Succeeded",
        "exitReason": "Completed",
        "conditions": [condition("Finished", "True", T2), condition("Ready", "True")],
    }
    return body


def changed(body: Object, **spec: Any) -> Object:
    after = copy.deepcopy(body)
    after["spec"] |= spec
    after["metadata"]["generation"] += 1
    return after


def put(body: Object, *path: str, to: Any) -> Object:
    after = copy.deepcopy(body)
    inner = after
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return after


def dropped(body: Object, *fields: str) -> Object:
    after = copy.deepcopy(body)
    for field in fields:
        after["status"].pop(field)
    return after


def conditions(body: Object, *those: Object) -> Object:
    return put(body, "status", "conditions", to=list(those))


def test_a_life_from_creation_to_the_end_of_the_next_instance_is_right() -> None:
    new_image = changed(failed(), containers=[{"name": "main", "image": "alpine"}])
    replaced = running(2, startedAt=T2)
    replaced["spec"], replaced["metadata"]["generation"] = new_image["spec"], 2
    replaced = assigned(replaced, 2, "node-2")
    replaced["status"]["observedGeneration"] = 2
    replaced["status"]["conditions"] = [
        condition("Ready", "True", T2, 2),
        condition("Running", "True", T2, 2),
    ]
    deleted = put(replaced, "metadata", "deletionTimestamp", to=T2)
    history = [created(), assigned(created()), running(), failed(), new_image, replaced, deleted]
    assert violations(history) == []


def test_wishes_that_are_met_are_right() -> None:
    stopped = dropped(changed(running(), desiredState="Stopped"), "pid")
    stopped["status"] |= {"observedGeneration": 2, "phase": "Stopped"}
    stopped = conditions(stopped, condition("Running", "False", T2), condition("Ready", "True"))
    for body in (paused(), stopped, completed()):
        assert kstatus(body) == "Current"
        assert violations([body]) == []


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (created(), "InProgress"),
        (running(), "Current"),
        (changed(running(), hostname="other"), "InProgress"),
        (failed(), "Failed"),
        (put(running(), "metadata", "deletionTimestamp", to=T2), "Terminating"),
        (
            conditions(running(), condition("Ready", "True"), condition("Reconciling", "True")),
            "InProgress",
        ),
        (conditions(running(), condition("Ready", "Unknown")), "InProgress"),
        (put(running(), "status", to={}), "Current"),
    ],
)
def test_kstatus_is_as_cli_utils_computes_it(body: Object, wanted: str) -> None:
    assert kstatus(body) == wanted


def paused(reason: str = "Paused") -> Object:
    body = changed(running(), desiredState="Paused")
    body["status"] |= {"observedGeneration": 2, "phase": "Paused"}
    return conditions(body, condition("Running", "False", T2), condition("Ready", "True", reason=reason))


OTHER_SPEC = changed(running(), containers=[{"name": "main", "image": "alpine"}])
OTHER_SPEC["status"]["observedGeneration"] = 2


WRONG: list[tuple[list[Object], histories.Rule]] = [
    ([dropped(running(), "pid")], histories.current_is_true),
    ([put(running(), "status", to={})], histories.current_is_true),
    ([put(running(), "spec", "desiredState", to="Stopped")], histories.current_is_true),
    ([put(running(), "spec", "desiredState", to="Paused")], histories.current_is_true),
    ([put(completed(), "status", "exitReason", to="Error")], histories.current_is_true),
    ([assigned(running(), 2)], histories.current_is_true),
    ([OTHER_SPEC], histories.current_is_true),
    # Argo CD knows what is frozen by the reason.
    ([paused("Frozen")], histories.argo_cd_agrees),
    (
        [put(running(), "status", "observedGeneration", to=2)],
        histories.generations_are_observed_in_order,
    ),
    (
        [running(), put(running(), "status", "observedGeneration", to=0)],
        histories.generations_are_observed_in_order,
    ),
    (
        [conditions(running(), condition("Ready", "True", generation=2))],
        histories.generations_are_observed_in_order,
    ),
    (
        [running(), conditions(running(), condition("Ready", "True", T2))],
        histories.times_change_with_the_status_alone,
    ),
    (
        [running(), conditions(running(), condition("Ready", "False", T0))],
        histories.times_change_with_the_status_alone,
    ),
    ([failed(), dropped(failed(), "exitStatus")], histories.an_exit_stays),
    ([failed(), failed(4)], histories.an_exit_stays),
    ([failed(), created()], histories.an_exit_stays),
    (
        [assigned(created(), 2), assigned(created(), 1)],
        histories.instances_only_grow,
    ),
    (
        [assigned(created()), assigned(created(), node="node-2")],
        histories.instances_only_grow,
    ),
    ([running(), created()], histories.instances_only_grow),
    ([assigned(running(2), 1)], histories.instances_only_grow),
    ([running(), running(pid=7)], histories.an_instance_starts_once),
    ([running(), running(startedAt=T2)], histories.an_instance_starts_once),
    ([failed(), put(failed(), "status", "pid", to=7)], histories.an_instance_starts_once),
    (
        [created(), put(assigned(created()), "metadata", "finalizers", to=[])],
        histories.the_finalizer_comes_with_the_assignment,
    ),
]


@pytest.mark.parametrize(("history", "rule"), WRONG)
def test_each_rule_can_fail(history: list[Object], rule: histories.Rule) -> None:
    assert violations(history, [rule]) != []
    assert violations(history) != []


def test_every_rule_is_shown_to_fail() -> None:
    assert {rule for _, rule in WRONG} == set(histories.RULES)


def test_an_assignment_of_another_object_says_nothing() -> None:
    copied = assigned(created())
    copied["metadata"]["uid"] = "another"
    assert violations([created(), copied], [histories.the_finalizer_comes_with_the_assignment]) == []


def test_the_default_status_may_be_followed_by_any_time() -> None:
    unknown = conditions(running(), condition("Ready", "Unknown", T2))
    assert violations([created(), unknown], [histories.times_change_with_the_status_alone]) == []


def test_a_violation_names_the_object_and_the_version() -> None:
    assert violations([dropped(running(), "pid")])[0].startswith("one at 1: it is Current")
