"""The models: reading what the API server serves, writing what it takes."""

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from sandkeeper.api import (
    Sandbox,
    SandboxSpec,
    SandboxStatus,
    instance_digest,
    process_spec,
)

CONTAINER = {"name": "main", "image": "busybox:1.37"}


def spec(**fields: object) -> SandboxSpec:
    return SandboxSpec.model_validate({"containers": [CONTAINER], **fields})


def container(**fields: object) -> SandboxSpec:
    return SandboxSpec.model_validate({"containers": [CONTAINER | fields]})


def test_unknown_fields_of_a_newer_schema_are_dropped() -> None:
    sandbox = Sandbox.model_validate(
        {
            "apiVersion": "sandkeeper.dev/v1alpha1",
            "kind": "Sandbox",
            "metadata": {"name": "a", "managedFields": []},
            "spec": {"containers": [CONTAINER | {"later": 1}], "later": {}},
            "status": {"later": []},
            "later": None,
        }
    )
    assert "later" not in str(sandbox.to_dict())


def test_an_unknown_value_of_a_spec_field_is_refused_and_not_guessed() -> None:
    with pytest.raises(ValidationError, match="desiredState"):
        spec(desiredState="Hibernated")


def test_models_are_values() -> None:
    with pytest.raises(ValidationError):
        spec().hostname = "b"  # type: ignore[misc]


def test_status_is_written_as_the_api_server_has_it() -> None:
    status = SandboxStatus(
        observed_generation=2,
        sandbox_id="u-1",
        started_at=datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
        exit_message="x" * 9000,
    )
    written = status.to_dict()
    assert written["sandboxID"] == "u-1"
    assert written["startedAt"] == "2026-01-02T03:04:05.000678Z"
    assert len(written["exitMessage"]) == 4096
    assert "pid" not in written
    assert SandboxStatus.model_validate(written) == status


def test_a_quantity_may_be_a_number() -> None:
    limits = container(resources={"limits": {"cpu": 2, "memory": "64Mi"}}).containers[0].resources.limits
    assert (limits.cpu, limits.memory, limits.pids) == ("2", "64Mi", None)


@pytest.mark.parametrize(
    ("image", "policy"),
    [
        ("busybox", "Always"),
        ("busybox:latest", "Always"),
        ("registry.example.com:5000/a/b", "Always"),
        ("busybox:1.37", "IfNotPresent"),
        ("registry.example.com:5000/a/b:1", "IfNotPresent"),
        (f"busybox@sha256:{'0' * 64}", "IfNotPresent"),
        (f"busybox:latest@sha256:{'0' * 64}", "IfNotPresent"),
    ],
)
def test_pull_policy_defaults_as_a_pods(image: str, policy: str) -> None:
    assert container(image=image).containers[0].pull_policy == policy
    assert container(image=image, imagePullPolicy="Never").containers[0].pull_policy == "Never"


@pytest.mark.parametrize(
    "changed",
    [
        {"desiredState": "Paused"},
        {"nodeName": "n"},
        {"nodeSelector": {"a": "b"}},
        {"failurePolicy": {"recreate": "OnFailure"}},
        {"terminationGracePeriodSeconds": 1},
        {"activeDeadlineSeconds": 1},
        {"shutdownTime": "2030-01-01T00:00:00Z"},
        {"ttlSecondsAfterFinished": 0},
        {"volumes": []},
        {"restartPolicy": "Never"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_digest_stays_where_the_process_does(changed: dict[str, object]) -> None:
    assert instance_digest(spec(**changed)) == instance_digest(spec())


@pytest.mark.parametrize(
    "changed",
    [
        {"runtime": "runc"},
        {"hostname": "h"},
        {"network": "Host"},
        {"restartPolicy": "Always"},
        {"volumes": [{"name": "v", "emptyDir": {}}]},
        {"containers": [CONTAINER | {"image": "busybox:2"}]},
        {"containers": [CONTAINER | {"command": ["a"]}]},
        {"containers": [CONTAINER | {"env": [{"name": "A", "value": "b"}]}]},
        {"containers": [CONTAINER | {"resources": {"limits": {"pids": 2}}}]},
        {"containers": [CONTAINER, CONTAINER | {"name": "second"}]},
    ],
    ids=str,
)
def test_digest_changes_with_the_process(changed: dict[str, object]) -> None:
    assert instance_digest(spec(**changed)) != instance_digest(spec())


def test_digest_does_not_depend_on_how_an_amount_is_written() -> None:
    one, other = (
        SandboxSpec.model_validate(
            {
                "containers": [CONTAINER | {"resources": {"limits": {"cpu": cpu, "memory": memory}}}],
                "volumes": [{"name": "v", "emptyDir": {"sizeLimit": memory}}],
            }
        )
        for cpu, memory in ((1, "1Gi"), ("1000m", "1024Mi"))
    )
    assert instance_digest(one) == instance_digest(other)


def test_digest_is_the_same_in_every_release() -> None:
    """It is kept in objects: another digest for the same spec would replace every sandbox on an upgrade."""
    assert process_spec(spec()) == {"containers": [{"image": "busybox:1.37", "name": "main"}]}
    assert instance_digest(spec()) == (
        "sha256:591a49d833a08bfc30740af81d41d16356304ad086aa05e2480c2b05aa0eef01"
    )
