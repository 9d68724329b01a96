"""F9, F17, F19: names that are used again, sandboxes and objects without their other half."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from tests.cluster import eventually
from tests.faults.network import Network, Trial, assigned, broken_network, gone, running, sandbox
from tests.faults.oracle import wanted
from tests.faults.workload import RUNNING
from tests.histories import Object, kstatus

from sandkeeper.api import ASSIGNMENT_ANNOTATION, FINALIZER
from sandkeeper.localcluster.cluster import OPERATOR
from sandkeeper.wire import controller_pb2, controller_pb2_grpc, node_pb2
from sandkeeper.wire.client import SANDBOXER
from sandkeeper.wire.ids import OwnerKey
from sandkeeper.wire.tls import ClientTLS

pytestmark = pytest.mark.cluster
THOROUGH = pytest.mark.thorough

NODE = "node-1"
BUSY = {"SIMULATED__START_SECONDS": "0.3", "SIMULATED__IMAGE_SECONDS": "0.5"}
"""Long enough for a test to act in mid-start."""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with broken_network(shim_env=BUSY) as made:
        yield made


@pytest.fixture
def trial(network: Network) -> Iterator[Trial]:
    with network.trial() as made:
        yield made


LIVES = {
    "runs": ((), RUNNING),
    "failed": (("exit", "3"), wanted("Failed", "False Error", exited="3 Error", Stalled="True")),
}


def strip_finalizers(trial: Trial, name: str) -> None:
    trial.user.patch(name, {"metadata": {"finalizers": None}})


# F9: deleted and made again under the same name, in mid-start


@pytest.mark.fault("F9")
def test_a_name_used_again_before_the_first_has_a_node(trial: Trial) -> None:
    refused = trial.network.api.answer(503, method="PATCH", resource="sandboxes")
    trial.make(sandbox("again"))
    eventually(lambda: refused.met > 0, timeout=60)
    trial.user.delete("again")
    trial.until("again", gone)
    trial.make(sandbox("again"))
    eventually(lambda: len(trial.network.objects.uids(trial.namespace, "again")) == 2, timeout=60)
    refused.end()
    trial.oracle().assert_right({"again": RUNNING})
    assert not trial.network.shims.lives(trial.uid("again", 0))


@pytest.mark.fault("F9")
@pytest.mark.parametrize("moment", ["PREPARING", pytest.param("CREATED", marks=THOROUGH)])
def test_a_name_used_again_in_mid_start(trial: Trial, moment: str) -> None:
    body = sandbox("again")
    if moment == "PREPARING":  # an image that is not on the node yet
        body["spec"]["containers"][0]["image"] = f"registry.example/{trial.namespace}:1"
    trial.make(body)
    trial.until("again", bool)
    eventually(lambda: trial.states("again") == [moment], timeout=60)
    trial.user.delete("again")
    trial.until("again", gone)
    trial.make(body)
    trial.oracle().assert_right({"again": RUNNING})
    assert len(trial.network.objects.uids(trial.namespace, "again")) == 2


@THOROUGH
@pytest.mark.fault("F9")
def test_a_name_used_again_while_the_first_is_on_its_way_to_a_node_that_is_cut_off(trial: Trial) -> None:
    for line in trial.network.lines:
        line.blackhole()
    trial.make(sandbox("again"))
    trial.until("again", assigned)
    trial.user.delete("again")
    trial.network.heal()
    trial.until("again", gone)
    trial.make(sandbox("again"))
    trial.oracle().assert_right({"again": RUNNING})


@pytest.mark.fault("F9")
def test_a_name_used_again_while_the_first_still_starts_without_its_finalizer(trial: Trial) -> None:
    trial.make(sandbox("again"))
    trial.until("again", bool)
    eventually(lambda: trial.states("again") == ["CREATED"], timeout=60)
    first = trial.uid("again")
    strip_finalizers(trial, "again")
    trial.user.delete("again")
    trial.until("again", gone)
    trial.make(sandbox("again"))
    trial.until("again", running)
    eventually(lambda: not trial.network.shims.present(first), timeout=60)
    trial.oracle().assert_right({"again": RUNNING})


@THOROUGH
@pytest.mark.fault("F9")
def test_a_name_that_comes_and_goes_leaves_the_last_of_its_objects(trial: Trial) -> None:
    for _ in range(6):
        trial.make(sandbox("again"))
        trial.user.run("delete", "sandbox", "again")
    trial.make(sandbox("again"))
    trial.oracle().assert_right({"again": RUNNING})
    assert len(trial.network.objects.uids(trial.namespace, "again")) == 7


# F17: a sandbox that no object owns


def plant(trial: Trial, owner: OwnerKey | None, sandbox_id: str = "") -> str:
    """A sandbox that runs on NODE, made past the operator; its id."""
    local = trial.network.local
    index = local.nodes.index(NODE)
    options = any_pb2.Any()
    config = node_pb2.SandboxConfig(
        digest="sha256:planted",
        containers=[node_pb2.ContainerConfig(name="main", image="busybox", command=["sleep", "1000"])],
    )
    metadata: tuple[tuple[str, str], ...] = ()
    if owner is not None:
        sandbox_id, metadata = owner.sandbox_id, owner.metadata()
        config.owner.CopyFrom(
            node_pb2.Owner(namespace=owner.namespace, name=owner.name, uid=owner.uid, instance=owner.instance)
        )
    options.Pack(config)
    with grpc.secure_channel(
        f"127.0.0.1:{local.plan.shim_ports[index]}",
        ClientTLS(local.tls).credentials(),
        options=[("grpc.ssl_target_name_override", NODE)],
    ) as channel:
        stub: Any = controller_pb2_grpc.ControllerStub(channel)
        create = controller_pb2.ControllerCreateRequest(
            sandbox_id=sandbox_id, options=options, sandboxer=SANDBOXER
        )
        stub.Create(create, timeout=30, metadata=metadata)
        start = controller_pb2.ControllerStartRequest(sandbox_id=sandbox_id, sandboxer=SANDBOXER)

        def started() -> bool:
            try:
                stub.Start(start, timeout=30, metadata=metadata)
            except grpc.RpcError as error:
                failed: Any = error
                if failed.code() is not grpc.StatusCode.UNAVAILABLE:  # its image is fetched
                    raise
                return False
            return True

        eventually(started, timeout=60)
    return sandbox_id


def present(trial: Trial) -> set[str]:
    return {life.record.sandbox_id for life in trial.network.shims.present()}


@pytest.mark.fault("F17")
def test_a_sandbox_whose_owner_never_was_is_shut_down(trial: Trial) -> None:
    planted = plant(trial, OwnerKey(trial.namespace, "nobody", "11111111-2222", 1))
    eventually(lambda: planted not in present(trial), timeout=60)
    trial.oracle().assert_right({})


@THOROUGH
@pytest.mark.fault("F17")
def test_a_sandbox_of_a_former_object_is_shut_down_and_its_name_s_next_is_not(trial: Trial) -> None:
    trial.make(sandbox("one", nodeName=NODE))
    trial.until("one", running)
    planted = plant(trial, OwnerKey(trial.namespace, "one", "11111111-3333", 3))
    eventually(lambda: planted not in present(trial), timeout=60)
    trial.oracle().assert_right({"one": RUNNING})


@pytest.mark.fault("F17")
def test_what_another_client_has_made_is_not_ours_to_judge(trial: Trial) -> None:
    foreign = plant(trial, None, f"foreign-{trial.namespace}")
    try:
        garbage = plant(trial, OwnerKey(trial.namespace, "nobody", "11111111-4444", 1))
        eventually(lambda: garbage not in present(trial), timeout=60)
        trial.oracle().assert_quiet()
        assert foreign in present(trial)
    finally:
        with trial.network.local.shim(trial.network.local.nodes.index(NODE)) as shim:
            shim.shutdown_all()


# F19: objects replaced, restored, stripped


def saved(trial: Trial, name: str) -> Object:
    """As `kubectl get -o yaml` writes it."""
    found: Object = json.loads(trial.user.run("get", "sandbox", name, "-o", "json"))
    return found


def kept_pid(trial: Trial, name: str) -> Callable[[], None]:
    """Asserts, when it is called, that the same process still runs."""
    before = trial.until(name, running)["status"]

    def check() -> None:
        after = trial.get(name)["status"]
        assert [after[part] for part in ("pid", "startedAt")] == [
            before[part] for part in ("pid", "startedAt")
        ]

    return check


@pytest.mark.fault("F19")
def test_an_object_that_is_replaced_by_force_is_a_new_one(trial: Trial) -> None:
    trial.make(sandbox("one"))
    trial.until("one", running)
    backup = json.dumps(saved(trial, "one"))
    trial.user.run("replace", "--force", "-f", "-", input=backup)
    trial.oracle().assert_right({"one": RUNNING})
    assert len(trial.network.objects.uids(trial.namespace, "one")) == 2


@pytest.mark.fault("F19")
def test_an_object_whose_metadata_is_replaced_keeps_its_sandbox(trial: Trial) -> None:
    trial.make(sandbox("one"))
    check = kept_pid(trial, "one")
    trial.user.run("replace", "-f", "-", input=json.dumps(sandbox("one")))
    trial.until("one", lambda body: assigned(body) and FINALIZER in body["metadata"].get("finalizers", []))
    trial.oracle().assert_right({"one": RUNNING})
    check()


@THOROUGH
@pytest.mark.fault("F19")
@pytest.mark.parametrize("spoiled", [None, "{}", "no json"])
def test_an_assignment_that_is_wiped_or_spoiled_is_found_again(trial: Trial, spoiled: str | None) -> None:
    trial.make(sandbox("one"))
    check = kept_pid(trial, "one")
    before = trial.get("one")["metadata"]["annotations"][ASSIGNMENT_ANNOTATION]
    trial.user.patch("one", {"metadata": {"annotations": {ASSIGNMENT_ANNOTATION: spoiled}}})
    trial.until(
        "one", lambda body: body["metadata"].get("annotations", {}).get(ASSIGNMENT_ANNOTATION) == before
    )
    trial.oracle().assert_right({"one": RUNNING})
    check()


@pytest.mark.fault("F19")
@pytest.mark.parametrize("life", list(LIVES))
@pytest.mark.parametrize("when", ["away", pytest.param("present", marks=THOROUGH)])
def test_an_object_restored_with_the_status_of_its_former_life_lives_anew(
    trial: Trial, life: str, when: str
) -> None:
    """when: the operator looks only when all is restored, or all the time (as Velero does: first the object)."""
    command, end = LIVES[life]
    trial.make(sandbox("one", *command))
    trial.until(
        "one", running if life == "runs" else lambda body: kstatus(body) == "Failed" if body else False
    )
    backup = saved(trial, "one")
    trial.user.run("delete", "sandbox", "one")
    if when == "away":
        trial.network.local.processes.stop(OPERATOR)
    metadata = {part: backup["metadata"][part] for part in ("name", "annotations", "finalizers")}
    trial.user.run("create", "-f", "-", input=json.dumps({**backup, "metadata": metadata}))
    eventually(lambda: len(trial.network.objects.uids(trial.namespace, "one")) == 2, timeout=60)
    if when == "present":
        trial.until("one", assigned)
    trial.user.run(
        *("patch", "sandbox", "one", "--subresource=status", "--type=merge", "-p"),
        json.dumps({"status": backup["status"]}),
    )
    if when == "away":
        trial.network.local.start_operator()
    uid = trial.uid("one")
    trial.until(
        "one", lambda body: body["status"].get("sandboxID") == f"{uid}-1" and kstatus(body) != "InProgress"
    )
    history = trial.network.objects.history(trial.namespace, "one")
    ours = [str(body["status"].get("sandboxID", "")).startswith(uid) for body in history]
    trial.oracle().assert_right(
        {"one": end}, since=len(ours) - ours[::-1].index(False) if False in ours else 0
    )
    assert len(trial.network.shims.lives(uid)) == 1, "it ran, under its own name"


@THOROUGH
@pytest.mark.fault("F19")
def test_an_object_restored_with_the_finalizer_alone_starts(trial: Trial) -> None:
    body = sandbox("one")
    body["metadata"]["finalizers"] = [FINALIZER]
    trial.make(body)
    trial.oracle().assert_right({"one": RUNNING})


@THOROUGH
@pytest.mark.fault("F19")
def test_a_copy_under_another_name_is_another_sandbox(trial: Trial) -> None:
    trial.make(sandbox("one"))
    trial.until("one", running)
    copy = saved(trial, "one")
    copy["metadata"] = {
        "name": "two",
        **{part: copy["metadata"][part] for part in ("annotations", "finalizers")},
    }
    trial.user.run("create", "-f", "-", input=json.dumps(copy))
    trial.oracle().assert_right({"one": RUNNING, "two": RUNNING})


@pytest.mark.fault("F19")
def test_a_finalizer_stripped_by_hand_leaves_nothing_on_the_node(trial: Trial) -> None:
    trial.make(sandbox("one"))
    check = kept_pid(trial, "one")
    strip_finalizers(trial, "one")
    trial.oracle().assert_right({"one": RUNNING})
    check()
    trial.user.delete("one")
    trial.until("one", gone)
    eventually(lambda: not trial.network.shims.present(trial.uid("one")), timeout=60)
    trial.oracle().assert_right({"one": None})


@THOROUGH
@pytest.mark.fault("F19")
def test_a_finalizer_stripped_while_the_node_is_cut_off_leaves_nothing_when_it_is_back(trial: Trial) -> None:
    trial.make(sandbox("one", nodeName=NODE))
    trial.until("one", running)
    trial.network.line(NODE).cut()
    trial.user.delete("one")
    strip_finalizers(trial, "one")
    trial.until("one", gone)
    trial.network.heal()
    eventually(lambda: not trial.network.shims.present(trial.uid("one")), timeout=60)
    trial.oracle().assert_right({"one": None})
