"""What becomes of Sandboxes when their machine is restarted, or drained."""

from __future__ import annotations

import json

import pytest
from tests.cluster import eventually
from tests.e2e import remains
from tests.e2e.install import PATIENCE, SYSTEM, Installation
from tests.e2e.test_e2e_install import started
from tests.sandboxes import Object, Sandboxes, current, ready

from sandkeeper.localcluster.onenode import NODE

pytestmark = [pytest.mark.e2e, PATIENCE]

AGAIN = {"recreate": "OnFailure", "limit": 3, "backoffSeconds": 0}
SLOW = 180.0
"""Seconds: kubelet backs off, and Kubernetes' own programs take their time."""


def test_a_restart_of_the_machine_ends_what_ran_as_each_asked_for(
    installation: Installation, sandboxes: Sandboxes
) -> None:
    """docs/operations.md, "Restarts": what ran ends with `SandboxLost` and goes through failurePolicy."""
    never, again = sandboxes.make("never"), sandboxes.make("again", failurePolicy=AGAIN)
    frozen = sandboxes.make("frozen", desiredState="Paused", failurePolicy=AGAIN)
    ended = sandboxes.make("ended", "sh", "-c", "exit 3")
    for name in (never, again, frozen):
        sandboxes.until_ready(name)
    sandboxes.until_finished(ended)
    before = {name: sandboxes.status(name) for name in (never, again, frozen, ended)}

    boot = installation.node.restart_machine()
    installation.until_boot(boot)

    lost = sandboxes.until(never, lambda body: body["status"].get("exitReason"), timeout=SLOW)["status"]
    assert (lost["exitReason"], lost["instance"]) == ("SandboxLost", 1)
    for name in (again, frozen):
        after = sandboxes.until(
            name, lambda body: instance(body) == 2 and ready(body) == "True", timeout=SLOW
        )
        assert after["status"]["sandboxID"] != before[name]["sandboxID"]
    assert started(installation, sandboxes.status(again)["pid"])
    assert sandboxes.status(ended) == before[ended]
    # Of what ran before nothing is left but the record of the one that was not started anew.
    remains.assert_none(installation.node, [before[name]["sandboxID"] for name in (again, frozen)])

    ids = [sandboxes.status(name)["sandboxID"] for name in (never, again, frozen, ended)]
    for name in (never, again, frozen, ended):
        sandboxes.delete(name)
        sandboxes.until_gone(name)
    remains.assert_none(installation.node, ids)


def instance(body: Object) -> int | None:
    """The newest generation's; None where there is no such status yet."""
    return body["status"].get("instance") if current(body) else None


def test_a_drained_node_keeps_its_sandboxes(installation: Installation, sandboxes: Sandboxes) -> None:
    """Sandboxes are no Pods, and the DaemonSet's Pods stay: the operator alone goes, and comes back."""
    kubectl = installation.kubectl
    name = sandboxes.make("stays")
    before = sandboxes.until_ready(name)["status"]
    life = started(installation, before["pid"])
    kubectl("drain", NODE, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=180s")
    try:
        pods = json.loads(kubectl("-n", SYSTEM, "get", "pods", "-o", "json"))["items"]
        assert not [each for each in pods if each["spec"].get("nodeName")]
        assert started(installation, before["pid"]) == life
    finally:
        kubectl("uncordon", NODE)
    installation.roll("deployment")
    sandboxes.until_ready(sandboxes.make("after"))
    after = sandboxes.until_ready(name)["status"]
    for field in ("sandboxID", "instance", "pid", "startedAt"):
        assert after[field] == before[field]
    assert eventually(lambda: started(installation, after["pid"]), timeout=60) == life
