"""Whole passes against a world in memory: what is called, what is written, and that it is enough."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.unit.control.fakes import SPEC, FakeStore, World

from sandkeeper.api import ASSIGNMENT_ANNOTATION, FINALIZER
from sandkeeper.control import act
from sandkeeper.control.observation import Key
from sandkeeper.wire import node_pb2
from sandkeeper.wire.errors import InvalidArgument, Unimplemented


@pytest.fixture
def world() -> World:
    return World()


async def running(world: World) -> Key:
    key = world.kube.create()
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")
    return key


async def test_apply_to_ready_is_one_pass_and_two_writes(world: World) -> None:
    key = world.kube.create()
    assert await world.reconciler.reconcile(key) is None
    assert world.kube.writes == ["metadata", "status"]
    assert [c for c in world.shim.calls if c != "Status"] == ["Create", "Start"]
    assert world.condition(key, "Ready") == ("True", "Running")
    status = world.status(key)
    assert status["phase"] == "Running"
    assert status["observedGeneration"] == 1
    assert status["nodeName"] == "n1"
    assert status["instance"] == 1
    assert status["pid"] == 100
    assert [c["type"] for c in status["conditions"]] == ["Scheduled", "Running", "Finished", "Ready"]
    assert all(c["lastTransitionTime"].startswith("2026") for c in status["conditions"])


async def test_a_ready_sandbox_costs_nothing(world: World) -> None:
    key = await running(world)
    before = world.effects()
    for _ in range(5):
        assert await world.reconciler.reconcile(key) is None
    assert world.effects() == before


async def test_usage_alone_is_not_worth_a_write(world: World) -> None:
    key = await running(world)
    before = world.effects()
    world.shim.records[f"{key.uid}-1"].usage.memory_bytes = 12345
    await world.reconciler.reconcile(key)
    assert world.effects() == before


@pytest.mark.parametrize(
    ("status", "ready", "phase"), [(0, ("True", "Completed"), "Succeeded"), (3, ("False", "Error"), "Failed")]
)
async def test_an_exit_is_written_before_the_node_forgets(
    world: World, status: int, ready: tuple[str, str], phase: str
) -> None:
    key = await running(world)
    world.shim.exit(f"{key.uid}-1", status)
    world.kube.faults = ["before"]
    await world.reconciler.reconcile(key)
    assert f"{key.uid}-1" in world.shim.records  # the status could not be written
    await world.settle(key)
    assert world.shim.records == {}
    assert world.status(key)["exitStatus"] == status
    assert world.status(key)["phase"] == phase
    assert world.condition(key, "Ready") == ready
    assert world.condition(key, "Finished") == ("True", ready[1])
    assert world.condition(key, "Stalled") == (None if status == 0 else ("True", "Error"))
    assert world.condition(key, "Reconciling") is None


async def test_of_many_that_end_at_once_each_is_told_before_any_is_cleared_away(world: World) -> None:
    keys = [world.kube.create(name) for name in ("a", "b", "c")]
    for key in keys:
        await world.settle(key)
        world.shim.exit(f"{key.uid}-1", 3)
    before = len(world.shim.calls)
    assert [await world.reconciler.reconcile(key) for key in keys] == [0.0, 0.0, 0.0]
    assert [world.status(key)["exitStatus"] for key in keys] == [3, 3, 3]
    assert len(world.shim.calls) == before
    assert [await world.reconciler.reconcile(key) for key in keys] == [None, None, None]
    assert world.shim.records == {}


async def test_an_end_that_does_not_stay_written_is_not_written_without_pause(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by an API server that drops what a newer operator writes."""
    key = await running(world)
    world.shim.exit(f"{key.uid}-1", 3)
    monkeypatch.setattr("sandkeeper.control.status.changed", lambda *_args, **_options: True)
    waits = [await world.reconciler.reconcile(key) for _ in range(5)]
    assert world.shim.records == {}
    assert all(wait is not None and wait >= 0.1 for wait in waits[2:])


async def test_an_ended_sandbox_needs_no_node(world: World) -> None:
    key = await running(world)
    world.shim.exit(f"{key.uid}-1", 0)
    await world.settle(key)
    world.nodes.set("n1", reachable=False)
    before = world.effects()
    await world.reconciler.reconcile(key)
    assert world.effects() == before


async def test_delete_shuts_down_then_releases(world: World) -> None:
    key = await running(world)
    world.kube.mark_deleted(key)
    await world.settle(key)
    assert not world.kube.exists(key)
    assert world.shim.records == {}
    assert world.kube.writes == ["metadata", "status", "metadata"]


async def test_a_released_object_is_not_worked_on_again(world: World) -> None:
    key = await running(world)
    world.kube.mark_deleted(key)
    world.store.freeze()  # the watch does not say yet that it is gone
    await world.settle(key)
    assert not world.kube.exists(key)
    before = world.effects()
    assert await world.reconciler.reconcile(key) is None
    assert world.effects() == before


async def test_delete_before_anything_was_done(world: World) -> None:
    key = world.kube.create()
    world.kube.mark_deleted(key)
    assert await world.reconciler.reconcile(key) is None
    assert world.shim.calls == []


async def test_delete_waits_for_an_unreachable_node(world: World) -> None:
    key = await running(world)
    world.nodes.set("n1", reachable=False)
    world.kube.mark_deleted(key)
    await world.settle(key)
    assert world.condition(key, "Ready") == ("Unknown", "NodeUnreachable")
    assert FINALIZER in world.kube.of(key)["metadata"]["finalizers"]
    world.nodes.set("n1", reachable=True)
    await world.settle(key)
    assert not world.kube.exists(key)
    assert world.shim.records == {}


@pytest.mark.parametrize("declared", ["deleted", "out of service"])
async def test_delete_is_free_where_the_node_is_declared_gone(world: World, declared: str) -> None:
    key = await running(world)
    if declared == "deleted":
        world.nodes.remove("n1")
    else:
        world.nodes.set("n1", reachable=False, out_of_service=True)
    world.kube.mark_deleted(key)
    await world.settle(key)
    assert not world.kube.exists(key)


async def test_unreachable_is_unknown_and_never_a_guess(world: World) -> None:
    key = await running(world)
    world.nodes.set("n1", reachable=False)
    await world.settle(key)
    assert world.condition(key, "Ready") == ("Unknown", "NodeUnreachable")
    assert world.condition(key, "Running") == ("Unknown", "NodeUnreachable")
    assert world.status(key)["pid"] == 100
    world.nodes.set("n1", reachable=True)
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")
    assert world.shim.starts == {f"{key.uid}-1": 1}


async def test_a_restarted_operator_says_nothing_of_a_node_it_has_not_heard(world: World) -> None:
    key = await running(world)
    world.nodes.set("n1", reachable=False, settled=False)
    before = world.effects()
    await world.another().reconcile(key)
    assert world.effects() == before


async def test_a_spec_change_replaces_the_instance(world: World) -> None:
    key = await running(world)
    world.kube.edit(key, containers=[{"name": "main", "image": "busybox:1.38"}])
    await world.settle(key)
    assert list(world.shim.records) == [f"{key.uid}-2"]
    assert world.status(key)["instance"] == 2
    assert world.condition(key, "Ready") == ("True", "Running")
    assert world.status(key)["observedGeneration"] == 2


async def test_a_finished_one_is_replaced_on_a_spec_change_and_its_exit_cleared(world: World) -> None:
    key = await running(world)
    world.shim.exit(f"{key.uid}-1", 3)
    await world.settle(key)
    world.kube.edit(key, containers=[{"name": "main", "image": "busybox:1.38"}])
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")
    assert "exitStatus" not in world.status(key)
    assert world.condition(key, "Stalled") is None


async def test_a_change_that_fits_nowhere_can_be_taken_back(world: World) -> None:
    """The first instance is gone by then, and was not lost: the next one runs, without a failurePolicy."""
    key = await running(world)
    world.kube.edit(key, runtime="nowhere")
    await world.settle(key)
    assert world.condition(key, "Ready") == ("False", "Unschedulable")
    assert world.status(key)["exitReason"] == "Stopped"
    world.kube.edit(key, runtime=None)
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")
    assert world.status(key)["instance"] == 2


async def test_placement_alone_does_not_replace(world: World) -> None:
    key = await running(world)
    world.kube.edit(key, nodeSelector={"zone": "b"}, terminationGracePeriodSeconds=1)
    await world.settle(key)
    assert world.status(key)["instance"] == 1


async def test_paused_and_back(world: World) -> None:
    key = await running(world)
    world.kube.edit(key, desiredState="Paused")
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Paused")
    assert world.condition(key, "Running") == ("False", "Paused")
    assert world.status(key)["phase"] == "Paused"
    world.kube.edit(key, desiredState="Running")
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")
    assert world.shim.starts == {f"{key.uid}-1": 1}


async def test_stopped_and_back_is_the_next_instance(world: World) -> None:
    key = await running(world)
    world.kube.edit(key, desiredState="Stopped")
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Stopped")
    assert world.condition(key, "Finished") == ("False", "NotFinished")
    assert world.status(key)["phase"] == "Stopped"
    assert world.status(key)["exitReason"] == "Stopped"
    assert world.shim.records == {}
    world.kube.edit(key, desiredState="Running")
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")
    assert list(world.shim.records) == [f"{key.uid}-2"]


async def test_stopped_from_the_first_is_never_assigned(world: World) -> None:
    key = world.kube.create(spec={**SPEC, "desiredState": "Stopped"})
    await world.settle(key)
    assert world.kube.writes == ["status"]
    assert world.condition(key, "Ready") == ("True", "Stopped")


async def test_shutdown_time(world: World) -> None:
    at = (world.clock.now.replace(minute=10)).isoformat()
    key = world.kube.create(spec={**SPEC, "shutdownTime": at})
    wait = await world.settle(key)
    assert wait == pytest.approx(600.001)
    world.clock.advance(wait or 0)
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Stopped")
    assert world.condition(key, "Finished") == ("True", "Stopped")


async def test_deadline_then_ttl_then_gone(world: World) -> None:
    key = world.kube.create(spec={**SPEC, "activeDeadlineSeconds": 60, "ttlSecondsAfterFinished": 5})
    wait = await world.settle(key)
    assert wait == pytest.approx(60.001)
    world.clock.advance(60.1)
    wait = await world.settle(key)
    assert world.status(key)["exitReason"] == "DeadlineExceeded"
    assert world.condition(key, "Ready") == ("False", "DeadlineExceeded")
    assert world.condition(key, "Stalled") == ("True", "DeadlineExceeded")
    assert wait == pytest.approx(5.001)
    world.clock.advance(5.1)
    await world.settle(key)
    await world.settle(key)
    assert not world.kube.exists(key)


async def test_lost_instance_stays_lost_without_a_failure_policy(world: World) -> None:
    key = await running(world)
    world.shim.records.clear()
    await world.settle(key)
    assert world.condition(key, "Ready") == ("False", "SandboxLost")
    assert world.condition(key, "Stalled") == ("True", "SandboxLost")
    assert world.shim.starts == {f"{key.uid}-1": 1}


async def test_a_stale_list_does_not_make_it_lost(world: World) -> None:
    key = world.kube.create()
    world.nodes.freeze()
    await world.reconciler.reconcile(key)
    assert world.condition(key, "Ready") == ("True", "Running")
    await world.reconciler.reconcile(key)
    assert world.condition(key, "Ready") == ("True", "Running")
    assert world.shim.starts == {f"{key.uid}-1": 1}


async def test_failure_policy_recreates_with_backoff_up_to_its_limit(world: World) -> None:
    policy = {"recreate": "OnFailure", "limit": 2, "backoffSeconds": 10}
    key = world.kube.create(spec={**SPEC, "failurePolicy": policy})
    for instance, wait in ((1, 10.001), (2, 20.001)):
        await world.settle(key)
        world.shim.exit(f"{key.uid}-{instance}", 1)
        assert await world.settle(key) == pytest.approx(wait)
        assert world.condition(key, "Finished") == ("False", "NotFinished")
        assert world.condition(key, "Stalled") is None
        world.clock.advance(wait)
        await world.settle(key)
        assert world.status(key)["recreations"] == instance
        assert world.condition(key, "Ready") == ("True", "Running")
    world.shim.exit(f"{key.uid}-3", 1)
    assert await world.settle(key) is None
    assert world.condition(key, "Stalled") == ("True", "Error")
    assert world.condition(key, "Finished") == ("True", "Error")


async def test_node_declared_gone_moves_it_only_with_a_failure_policy() -> None:
    world = World("n1", "n2")
    policy = {"recreate": "OnFailure", "limit": 1, "backoffSeconds": 0}
    key = world.kube.create(spec={**SPEC, "failurePolicy": policy})
    await world.settle(key)
    assert world.status(key)["nodeName"] == "n1"
    world.nodes.set("n1", reachable=False)
    await world.settle(key)
    assert world.nodes.shims["n2"].calls == []
    world.nodes.set("n1", out_of_service=True)
    await world.settle(key)
    assert world.status(key)["nodeName"] == "n2"
    assert world.condition(key, "Ready") == ("True", "Running")


async def test_many_nodes_lost_at_once_hold_every_remedy(world: World) -> None:
    policy = {"recreate": "OnFailure", "limit": 1, "backoffSeconds": 0}
    key = world.kube.create(spec={**SPEC, "failurePolicy": policy})
    await world.settle(key)
    world.nodes.mass_outage = True
    world.shim.records.clear()
    assert await world.settle(key) == 10.0
    assert world.status(key)["instance"] == 1
    world.nodes.mass_outage = False
    await world.settle(key)
    assert world.status(key)["instance"] == 2


async def test_image_pull_is_told_and_goes_on(world: World) -> None:
    world.shim.preparing = "PullingImage"
    key = world.kube.create()
    await world.settle(key)
    assert world.condition(key, "Ready") == ("False", "PullingImage")
    assert world.condition(key, "Reconciling") == ("True", "PullingImage")
    record = world.shim.records[f"{key.uid}-1"]
    record.reason = "ImagePullBackOff"
    await world.settle(key)
    assert world.condition(key, "Ready") == ("False", "ImagePullBackOff")
    assert ("Warning", "ImagePullBackOff") in world.recorder.events
    record.state = node_pb2.STATE_CREATED
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")


async def test_a_failed_start_stalls_and_a_fixed_spec_recovers(world: World) -> None:
    world.shim.failing = "StartError"
    key = world.kube.create()
    await world.settle(key)
    assert world.condition(key, "Ready") == ("False", "StartError")
    assert world.condition(key, "Stalled") == ("True", "StartError")
    world.shim.failing = ""
    world.kube.edit(key, containers=[{"name": "main", "image": "busybox:1.38"}])
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")
    assert world.condition(key, "Stalled") is None


async def test_a_refused_spec_stalls_and_a_fixed_one_recovers(world: World) -> None:
    world.shim.faults["create"] = [InvalidArgument("containers[0].image must be nice")] * 2
    key = world.kube.create()
    await world.reconciler.reconcile(key)
    assert world.condition(key, "Stalled") == ("True", "InvalidSpec")
    assert "containers[0].image" in world.status(key)["conditions"][-1]["message"]
    world.shim.faults.clear()
    world.kube.edit(key, containers=[{"name": "main", "image": "busybox:1.38"}])
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")


async def test_pause_where_the_shim_cannot(world: World) -> None:
    key = await running(world)
    world.shim.faults["pause"] = [Unimplemented("no freezer")]
    world.kube.edit(key, desiredState="Paused")
    await world.reconciler.reconcile(key)
    assert world.condition(key, "Ready") == ("False", "Unsupported")


async def test_unschedulable_says_why_and_room_mends_it(world: World) -> None:
    world.nodes.set("n1", unschedulable=True)
    key = world.kube.create()
    assert await world.settle(key) == 10.0
    assert world.condition(key, "Scheduled") == ("False", "Unschedulable")
    assert world.condition(key, "Ready") == ("False", "Unschedulable")
    assert world.kube.writes == ["status"]
    world.nodes.set("n1", unschedulable=False)
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")


@pytest.mark.parametrize("method", ["create", "start", "status"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_lost_replies_never_start_twice(method: str, when: str) -> None:
    world = World("n1", "n2")
    key = world.kube.create()
    world.nodes.freeze()
    world.shim.faults[method] = [when, when, when]
    await world.reconciler.reconcile(key)
    world.nodes.thaw()
    for _ in range(6):
        await world.reconciler.reconcile(key)
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")
    assert world.shim.starts == {f"{key.uid}-1": 1}
    assert world.nodes.shims["n2"].calls == []
    assert world.status(key)["instance"] == 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("write", [0, 1])
async def test_lost_writes_never_start_twice(write: int, when: str) -> None:
    world = World("n1", "n2")
    key = world.kube.create()
    world.kube.faults = ["none"] * write + [when]
    assert await world.reconciler.reconcile(key) is not None
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")
    assert world.shim.starts == {f"{key.uid}-1": 1}
    assert world.nodes.shims["n2"].calls == []


async def test_persistent_trouble_is_told_and_ends(world: World) -> None:
    key = world.kube.create()
    world.shim.faults["create"] = ["before"] * 5
    waits = [await world.reconciler.reconcile(key) for _ in range(4)]
    assert all(wait is not None and wait <= 30 for wait in waits)
    assert world.condition(key, "Ready") == ("Unknown", "ShimFailing")
    world.shim.faults.clear()
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")


async def test_a_stale_cache_is_refused_and_read_anew(world: World) -> None:
    key = world.kube.create()
    world.store.freeze()
    await world.reconciler.reconcile(key)
    await world.reconciler.reconcile(key)
    assert world.kube.writes == ["metadata", "status"]
    assert world.shim.starts == {f"{key.uid}-1": 1}


async def test_an_old_object_of_the_same_name_is_nobodys(world: World) -> None:
    old = world.kube.create()
    await world.settle(old)
    store = FakeStore(world.kube)
    store.freeze()
    world.kube.mark_deleted(old)
    await world.settle(old)
    new = world.kube.create()
    await world.settle(new)
    before = world.effects()
    lagging = world.another(store=store)
    await lagging.reconcile(old)
    assert world.effects()[0] == before[0]
    assert list(world.shim.records) == [f"{new.uid}-1"]


async def test_two_operators_start_one() -> None:
    world = World("n1", "n2")
    key = world.kube.create()
    stores = [FakeStore(world.kube), FakeStore(world.kube)]
    for store in stores:
        store.freeze()
    one, two = (world.another(store=store) for store in stores)
    await asyncio.gather(one.reconcile(key), two.reconcile(key))
    for store in stores:
        store.thaw()
    await asyncio.gather(one.reconcile(key), two.reconcile(key))
    await world.settle(key)
    assert sum((shim.starts for shim in world.nodes.shims.values()), start=world.shim.starts.__class__()) == {
        f"{key.uid}-1": 1
    }
    assert world.condition(key, "Ready") == ("True", "Running")


async def test_a_slow_call_is_told_and_holds_up_nothing(world: World) -> None:
    woken = asyncio.Event()
    reconciler = world.another(wake=lambda key: woken.set(), patience=0.0)
    release = asyncio.Event()
    start = world.shim.start

    async def slow(owner: object) -> int:
        await release.wait()
        return await start(owner)  # type: ignore[arg-type]

    world.shim.start = slow  # type: ignore[method-assign]
    key = world.kube.create()
    await reconciler.reconcile(key)
    assert world.condition(key, "Ready") == ("False", "Starting")
    assert world.status(key)["phase"] == "Starting"
    await reconciler.reconcile(key)
    assert world.shim.calls.count("Create") == 1
    release.set()
    async with asyncio.timeout(5):
        await woken.wait()
    await reconciler.reconcile(key)
    assert world.condition(key, "Ready") == ("True", "Running")
    await reconciler.close()


async def test_a_pass_steps_aside_for_a_slow_node_and_not_for_a_slow_api_server(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(act, "SLOW", 0.0)
    aside: list[Key] = []
    stepped = asyncio.Event()

    def step_aside(key: Key) -> None:
        aside.append(key)
        stepped.set()

    start, patch = world.shim.start, world.kube.patch_metadata
    during_the_write: list[Key] = []

    async def slow_patch(*args: Any) -> Any:
        for _ in range(10):  # rounds of the event loop
            await asyncio.sleep(0)
        during_the_write.extend(aside)
        return await patch(*args)

    async def slow_start(owner: Any) -> int:
        async with asyncio.timeout(5):
            await stepped.wait()
        return await start(owner)

    monkeypatch.setattr(world.kube, "patch_metadata", slow_patch)
    monkeypatch.setattr(world.shim, "start", slow_start)
    key = world.kube.create()
    await world.another(aside=step_aside, patience=5.0).reconcile(key)
    assert world.condition(key, "Ready") == ("True", "Running")
    assert during_the_write == []
    assert set(aside) == {key}


async def test_annotation_wiped_by_replace_is_restored(world: World) -> None:
    key = await running(world)
    world.kube.annotate(key, None, finalizers=[])
    await world.settle(key)
    raw = world.kube.of(key)
    assert json.loads(raw["metadata"]["annotations"][ASSIGNMENT_ANNOTATION])["instance"] == 1
    assert FINALIZER in raw["metadata"]["finalizers"]
    assert world.shim.starts == {f"{key.uid}-1": 1}


async def test_annotation_spoiled_while_the_node_is_away_waits() -> None:
    world = World("n1", "n2")
    key = world.kube.create()
    world.kube.faults = ["none", "before"]
    await world.reconciler.reconcile(key)  # assigned and started, but no status
    world.nodes.set("n1", reachable=False)
    world.kube.annotate(key, {ASSIGNMENT_ANNOTATION: "{spoiled"})
    await world.settle(key)
    assert world.condition(key, "Ready") == ("Unknown", "AssignmentLost")
    assert world.nodes.shims["n2"].calls == []
    world.nodes.set("n1", reachable=True)
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")
    assert world.shim.starts == {f"{key.uid}-1": 1}


async def test_a_copy_with_the_annotation_is_another_sandbox(world: World) -> None:
    key = await running(world)
    annotations = world.kube.of(key)["metadata"]["annotations"]
    copy = world.kube.create("b", annotations=annotations, finalizers=[FINALIZER])
    await world.settle(copy)
    assert sorted(world.shim.starts) == [f"{key.uid}-1", f"{copy.uid}-1"]


async def test_a_fenced_instance_goes_on_with_the_next(world: World) -> None:
    key = world.kube.create()
    world.shim.fences[key.uid] = 2
    await world.settle(key)
    assert world.status(key)["instance"] == 2
    assert world.condition(key, "Ready") == ("True", "Running")


async def test_two_do_not_take_the_last_room(world: World) -> None:
    spec = {"containers": [{"name": "main", "image": "a:1", "resources": {"limits": {"memory": "600Mi"}}}]}
    one, two = world.kube.create("a", spec), world.kube.create("b", spec)
    await asyncio.gather(world.reconciler.reconcile(one), world.reconciler.reconcile(two))
    assert sorted([world.condition(one, "Ready"), world.condition(two, "Ready")]) == [
        ("False", "Unschedulable"),
        ("True", "Running"),
    ]
    waiting = one if world.condition(one, "Ready") == ("False", "Unschedulable") else two
    other = two if waiting == one else one
    woken: list[Key] = []
    world.reconciler.wake = woken.append
    world.kube.mark_deleted(other)
    await world.settle(other)
    assert woken == [waiting]
    await world.settle(waiting)
    assert world.condition(waiting, "Ready") == ("True", "Running")


async def test_a_spec_that_cannot_be_read_can_be_deleted(world: World) -> None:
    key = await running(world)
    world.kube.edit(key, containers=[])
    await world.settle(key)
    assert world.condition(key, "Stalled") == ("True", "InvalidSpec")
    assert world.shim.records
    world.kube.mark_deleted(key)
    await world.settle(key)
    assert not world.kube.exists(key)
    assert not world.shim.records


async def test_retention_keeps_an_ended_instance_for_its_logs(world: World) -> None:
    world.reconciler = world.another(retention_seconds=60)
    key = await running(world)
    world.shim.exit(f"{key.uid}-1", 0)
    assert await world.settle(key) == pytest.approx(60.001)
    assert world.shim.records
    world.clock.advance(60.1)
    await world.settle(key)
    assert not world.shim.records
