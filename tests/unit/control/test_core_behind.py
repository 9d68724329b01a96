"""An operator whose picture is old: what it does must be right for the object as it is now."""

from __future__ import annotations

import pytest
from tests.unit.control.fakes import SPEC, FakeStore, World

from sandkeeper.control.observation import Key
from sandkeeper.control.ports import KubeError, Raw
from sandkeeper.control.reconciler import Reconciler


@pytest.fixture
def world() -> World:
    return World()


def behind(world: World) -> Reconciler:
    """A second operator that sees nothing of what happens from now on."""
    store = FakeStore(world.kube)
    store.freeze()
    return world.another(store=store)


async def running(world: World, **spec: object) -> Key:
    key = world.kube.create(spec={**SPEC, **spec})
    await world.settle(key)
    return key


@pytest.mark.parametrize(
    ("cached", "now"), [("Paused", "Running"), ("Running", "Paused"), ("Stopped", "Running")]
)
async def test_a_wish_that_was_taken_back_is_not_fulfilled(world: World, cached: str, now: str) -> None:
    key = await running(world)
    world.kube.edit(key, desiredState=cached)
    second = behind(world)
    world.kube.edit(key, desiredState=now)
    await world.settle(key)
    calls = [call for call in world.shim.calls if call != "Status"]
    await second.reconcile(key)
    assert [call for call in world.shim.calls if call != "Status"] == calls


async def test_a_deadline_that_was_taken_back_stops_nothing(world: World) -> None:
    key = await running(world, activeDeadlineSeconds=10)
    second = behind(world)
    world.kube.edit(key, activeDeadlineSeconds=None)
    world.clock.advance(11)
    await second.reconcile(key)
    assert world.shim.running(key.uid) == [f"{key.uid}-1"]


async def test_a_life_span_that_was_taken_back_deletes_nothing(world: World) -> None:
    key = await running(world, ttlSecondsAfterFinished=10)
    world.shim.exit(f"{key.uid}-1", 0)
    await world.settle(key)
    second = behind(world)
    world.kube.edit(key, ttlSecondsAfterFinished=None)
    world.clock.advance(11)
    await second.reconcile(key)
    assert "deletionTimestamp" not in world.kube.of(key)["metadata"]


async def test_an_instance_that_ran_and_was_forgotten_is_not_started_again(world: World) -> None:
    key = world.kube.create()
    world.shim.faults["create"] = ["before"]
    await world.reconciler.reconcile(key)
    second = behind(world)  # it knows of the assignment and of nothing after it
    await world.settle(key)
    world.shim.exit(f"{key.uid}-1", 3)
    await world.settle(key)
    assert not world.shim.records
    await second.reconcile(key)
    assert world.shim.starts == {f"{key.uid}-1": 1}


async def test_nothing_is_started_anew_while_the_api_server_does_not_say_that_it_is_wanted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = world.kube.create()
    world.shim.faults["create"] = ["before"]
    await world.reconciler.reconcile(key)

    async def unreachable(namespace: str, name: str) -> Raw:
        raise KubeError("unreachable")

    with monkeypatch.context() as cut:
        cut.setattr(world.kube, "get", unreachable)
        assert await world.reconciler.reconcile(key)
        assert not world.shim.records
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")
