"""Sandboxes from a git repository, delivered by Flux's own source-controller and kustomize-controller."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.cluster import condition_of
from tests.flux import Delivery
from tests.images import stalled
from tests.sandboxes import Object

from sandkeeper.localcluster.cluster import LocalCluster
from sandkeeper.localcluster.watching import manifest

pytestmark = [pytest.mark.cluster, pytest.mark.oci, pytest.mark.gitops]

FOREVER = ("sleep", "86400")
FLUX = "kustomize-controller"
EXAMPLES = Path(__file__).parents[2] / "examples"
WRITES = ("POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION")


def delivered(git: Delivery, *manifests: Object) -> Object:
    """The Kustomization when all of the first commit is well."""
    revision = git.commit(*manifests)
    git.deliver()
    return git.until_applied(revision)


def test_a_commit_runs_and_the_next_replaces_it(git: Delivery) -> None:
    delivered(git, manifest("box", *FOREVER))
    # `wait: true` has waited for it: it is looked at once.
    first = git.sandboxes.get("box")
    assert condition_of(first, "Ready")["reason"] == "Running"
    assert first["status"]["instance"] == 1
    git.until_applied(git.commit(manifest("box", "sleep", "86401")))
    second = git.sandboxes.get("box")
    assert second["metadata"]["uid"] == first["metadata"]["uid"]
    assert (second["status"]["instance"], condition_of(second, "Ready")["reason"]) == (2, "Running")
    assert second["status"]["pid"] != first["status"]["pid"]


def test_a_commit_pauses_resumes_and_stops(git: Delivery) -> None:
    delivered(git, manifest("box", *FOREVER))
    first = git.sandboxes.get("box")["status"]
    for wish, reason in (("Paused", "Paused"), ("Running", "Running")):
        git.until_applied(git.commit(manifest("box", *FOREVER, desiredState=wish)))
        status = git.sandboxes.get("box")
        assert condition_of(status, "Ready")["reason"] == reason
        assert (status["status"]["instance"], status["status"]["pid"]) == (1, first["pid"])
    git.until_applied(git.commit(manifest("box", *FOREVER, desiredState="Stopped")))
    assert condition_of(git.sandboxes.get("box"), "Ready")["reason"] == "Stopped"


def test_what_the_schema_refuses_fails_with_the_field_and_changes_nothing(git: Delivery) -> None:
    delivered(git, manifest("box", *FOREVER))
    before = git.sandboxes.get("box")
    broken = manifest("box", *FOREVER)
    broken["spec"]["containers"][0]["resources"]["limits"]["memory"] = "plenty"
    failed = condition_of(git.until_failed(git.commit(broken, manifest("other", *FOREVER))), "Ready")
    assert failed["reason"] == "ReconciliationFailed"
    assert "Sandbox" in failed["message"]
    assert "spec.containers[0].resources.limits.memory" in failed["message"]
    assert git.sandboxes.get("box")["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
    assert git.sandboxes.get("other") == {}
    git.until_applied(git.commit(manifest("box", *FOREVER), manifest("other", *FOREVER)))


def test_what_fails_when_it_runs_is_named_and_the_next_commit_recovers(git: Delivery) -> None:
    good = manifest("good", *FOREVER)
    delivered(git, good, manifest("bad", *FOREVER))
    kustomization = git.until_failed(git.commit(good, manifest("bad", "sh", "-c", "exit 3")))
    failed = condition_of(kustomization, "Ready")
    assert failed["reason"] == "HealthCheckFailed"
    assert f"Sandbox/{git.namespace}/bad status: 'Failed'" in failed["message"]
    assert "/good" not in failed["message"]
    # Where a user looks next.
    stalled = condition_of(git.sandboxes.get("bad"), "Stalled")
    assert (stalled["status"], git.sandboxes.get("bad")["status"]["exitStatus"]) == ("True", 3)
    git.until_applied(git.commit(good, manifest("bad", "true")))
    assert condition_of(git.sandboxes.get("bad"), "Ready")["reason"] == "Completed"
    assert git.sandboxes.get("good")["status"]["instance"] == 1


def test_what_is_not_there_in_time_is_named(git: Delivery) -> None:
    """Flux takes no other commit until then: see `timeout` in docs/gitops.md."""
    with stalled() as registry:
        late = manifest("late", *FOREVER)
        late["spec"]["containers"][0]["image"] = f"{registry.host}/never/answers:1"
        revision = git.commit(late)
        git.deliver(timeout="30s")
        failed = condition_of(git.until_failed(revision), "Ready")
        assert failed["reason"] == "HealthCheckFailed"
        assert f"Sandbox/{git.namespace}/late status: 'InProgress'" in failed["message"]
        git.until_applied(git.commit(manifest("late", *FOREVER)))


def test_one_that_deletes_itself_is_made_anew(git: Delivery) -> None:
    """As docs/gitops.md says of ttlSecondsAfterFinished."""
    # Flux looks every 5 s, and must have seen it before it goes.
    delivered(git, manifest("box", "true", ttlSecondsAfterFinished=30))
    first = git.sandboxes.get("box")["metadata"]["uid"]
    git.sandboxes.until_gone("box")
    git.reconcile()
    assert git.sandboxes.get("box")["metadata"]["uid"] != first


def test_what_a_commit_takes_out_is_shut_down_and_deleted(git: Delivery, local: LocalCluster) -> None:
    delivered(git, manifest("stays", *FOREVER), manifest("goes", *FOREVER))
    gone, stays = (git.sandboxes.get(name)["status"]["sandboxID"] for name in ("goes", "stays"))
    git.until_applied(git.commit(manifest("stays", *FOREVER)))
    git.sandboxes.until_gone("goes")
    assert (gone in known(local), stays in known(local)) == (False, True)
    git.delete()
    git.sandboxes.until_gone("stays")
    assert stays not in known(local)


def test_ten_reconciles_write_nothing(git: Delivery, local: LocalCluster) -> None:
    """Nothing that the API server or the operator adds to a Sandbox is drift to Flux."""
    names = ("hello", "paused", "recreate", "restart", "sleeper", "two-containers")
    boxes = [yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text()) for name in names]
    boxes.append({**manifest("bare"), "spec": {"containers": [{"name": "main", "image": "busybox:1.37"}]}})
    delivered(git, *boxes)
    before = versions(git), writes(local)
    for _ in range(10):
        assert condition_of(git.reconcile(), "Ready")["status"] == "True"
    assert (versions(git), writes(local)) == before


def test_a_change_by_hand_is_taken_back(git: Delivery) -> None:
    delivered(git, manifest("box", *FOREVER))
    git.sandboxes.patch("box", {"spec": {"desiredState": "Stopped"}})
    git.sandboxes.until_reason("box", "Stopped")
    git.reconcile()
    assert git.sandboxes.until_instance("box", 2)["spec"]["desiredState"] == "Running"


def test_the_spec_is_fluxs_and_the_status_is_the_operators(git: Delivery) -> None:
    """Server-side apply knows who owns which field: the operator none of the spec, in the whole life."""
    delivered(git, manifest("box", *FOREVER))
    git.until_applied(git.commit(manifest("box", "true")))
    git.until_applied(git.commit(manifest("box", *FOREVER, desiredState="Paused")))
    owners = json.loads(git.sandboxes.run("get", "sandbox", "box", "-o", "json", "--show-managed-fields"))
    fields: dict[str, set[str]] = {}
    for entry in owners["metadata"]["managedFields"]:
        fields.setdefault(entry["manager"], set()).update(entry["fieldsV1"])
    assert {name for name, owned in fields.items() if "f:spec" in owned} == {FLUX}
    assert "f:status" not in fields[FLUX]


def versions(git: Delivery) -> dict[str, tuple[str, int]]:
    """Sandbox -> its resourceVersion and its generation."""
    items = json.loads(git.sandboxes.run("get", "sandboxes", "-o", "json"))["items"]
    found = [each["metadata"] for each in items]
    return {each["name"]: (each["resourceVersion"], each["generation"]) for each in found}


def writes(local: LocalCluster) -> float:
    """Requests that were to write a Sandbox or its status, by whomever, whatever came of them; Flux' dry runs are
    none. One that changes nothing leaves no trace but this."""
    families = text_string_to_metric_families(local.kubectl("get", "--raw", "/metrics"))
    family = next(each for each in families if each.name == "apiserver_request")
    return sum(
        sample.value
        for sample in family.samples
        if sample.labels["resource"] == "sandboxes"
        and sample.labels["verb"] in WRITES
        and not sample.labels["dry_run"]
    )


def known(local: LocalCluster) -> set[str]:
    """What the shims have records of."""
    found: set[str] = set()
    for index in range(len(local.nodes)):
        with local.shim(index) as shim:
            found |= {each.sandbox_id for each in shim.list().sandboxes}
    return found
