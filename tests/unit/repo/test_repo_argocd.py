"""Argo CD's view of every status that the operator can compute, and of its actions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from tests import argocd
from tests.unit.control import fakes
from tests.unit.control.test_core_rules import ROWS as DECISIONS
from tests.unit.control.test_core_status import ROWS as STATUSES

from sandkeeper.control import status
from sandkeeper.control.actions import Verdict
from sandkeeper.control.decide import decide
from sandkeeper.control.observation import Observation

SEEN = [row[0] for row in DECISIONS] + [row[0] for row in STATUSES]
OFFERED = {"Running": {"pause", "stop"}, "Paused": {"resume", "stop"}, "Stopped": {"start"}}
RESULT = {"pause": "Paused", "resume": "Running", "stop": "Stopped", "start": "Running"}


def body(o: Observation) -> argocd.Object:
    """The object as the API server has it after the status write."""
    metadata: dict[str, Any] = {"name": o.name, "uid": o.uid, "generation": o.generation}
    if o.deleting:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    written = status.compute(o, decide(o)).to_dict()
    return {"metadata": metadata, "spec": o.sandbox.spec.to_dict(), "status": written}


def wish(desired: str | None) -> argocd.Object:
    spec: dict[str, Any] = {"containers": [{"name": "main", "image": "busybox", "args": ["a", "b"]}]}
    return {
        "metadata": {"name": "one", "generation": 1},
        "spec": {**spec, **({"desiredState": desired} if desired else {})},
    }


@pytest.mark.parametrize("o", SEEN, ids=[f"{n}-{decide(o).reason}" for n, o in enumerate(SEEN)])
def test_health_follows_the_verdict(o: Observation) -> None:
    decision = decide(o)
    wanted = {Verdict.READY: "Healthy", Verdict.FAILED: "Degraded"}.get(decision.verdict, "Progressing")
    if decision.reason == "Paused":
        wanted = "Suspended"
    if o.deleting:
        wanted = "Progressing"
    found, message = argocd.health(body(o))
    assert found == wanted
    assert message.startswith("Deleting" if o.deleting else decision.reason)


def test_before_the_operator_has_looked_it_is_progressing() -> None:
    new = {**wish(None), "status": fakes.DEFAULT_STATUS}
    assert argocd.health(new)[0] == "Progressing"
    # As `argocd app sync` sees one that its API server has no default status for.
    assert argocd.health(wish(None))[0] == "Progressing"


def test_a_commit_makes_it_progressing_at_once() -> None:
    for o in SEEN:
        after = body(o)
        after["metadata"]["generation"] += 1
        assert argocd.health(after)[0] == "Progressing"


@pytest.mark.parametrize("desired", [None, "Running", "Paused", "Stopped"])
def test_actions_change_the_wish_and_nothing_else(desired: str | None) -> None:
    before = wish(desired)
    offered = argocd.actions(before)
    assert offered == OFFERED[desired or "Running"]
    for name in offered:
        wanted = copy.deepcopy(before)
        wanted["spec"]["desiredState"] = RESULT[name]
        assert argocd.act(name, before) == wanted


def test_actions_leave_a_whole_object_as_it_was() -> None:
    for o in SEEN:
        before = body(o)
        for name in argocd.actions(before):
            after = argocd.act(name, before)
            after["spec"]["desiredState"] = before["spec"].get("desiredState")
            assert argocd.without_empty(after) == argocd.without_empty(before)


def test_every_action_is_offered_and_defined() -> None:
    assert argocd.defined() == set(RESULT) == set().union(*OFFERED.values())


def test_the_patch_touches_only_our_keys() -> None:
    patch = yaml.safe_load(argocd.CONFIG_MAP.read_text())
    assert (patch["kind"], patch["metadata"]["name"]) == ("ConfigMap", "argocd-cm")
    assert all(key.endswith(".sandkeeper.dev_Sandbox") for key in patch["data"])
    # By this label Argo CD finds its configuration.
    assert patch["metadata"]["labels"]["app.kubernetes.io/part-of"] == "argocd"
