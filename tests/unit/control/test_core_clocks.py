"""F13: clocks that are an hour apart, or are set by an hour while something is waited for, either way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.unit.control.fakes import SPEC, World

from sandkeeper.control.observation import Key

HOUR = 3600.0
Jump = Callable[[World], None]


def node_by(seconds: float) -> Jump:
    def jump(world: World) -> None:
        world.shim.clock.ahead += seconds

    return jump


def operator_by(seconds: float) -> Jump:
    def jump(world: World) -> None:
        world.clock.ahead += seconds

    return jump


def restarted(jump: Jump) -> Jump:
    """The operator is started anew as well."""

    def both(world: World) -> None:
        jump(world)
        world.reconciler = world.another()

    return both


JUMPS = {
    "node ahead": node_by(HOUR),
    "node back": node_by(-HOUR),
    "operator ahead": operator_by(HOUR),
    "operator back": operator_by(-HOUR),
}
each_jump = pytest.mark.parametrize("jump", JUMPS.values(), ids=JUMPS)


async def wait_for(world: World, key: Key, done: Callable[[], bool], *, most: float) -> float:
    """Passes as the clock that nobody sets goes on; seconds until `done`."""
    waited = 0.0
    while True:
        wait = await world.settle(key)
        if done():
            return waited
        assert wait is not None, "nothing is waited for"
        assert waited + wait <= most
        world.clock.advance(wait)
        waited += wait


def finished(world: World, key: Key) -> Callable[[], bool]:
    return lambda: (world.condition(key, "Finished") or ("",))[0] == "True"


async def assert_ended_by_deadline(world: World, key: Key) -> None:
    assert world.status(key)["exitReason"] == "DeadlineExceeded"
    assert world.condition(key, "Stalled") == ("True", "DeadlineExceeded")
    assert world.shim.starts == {f"{key.uid}-1": 1}
    before = world.effects()
    assert await world.another().reconcile(key) is None
    assert world.effects() == before


@each_jump
async def test_a_deadline_holds_with_clocks_that_differ(jump: Jump) -> None:
    world = World()
    jump(world)
    key = world.kube.create(spec={**SPEC, "activeDeadlineSeconds": 60})
    waited = await wait_for(world, key, finished(world, key), most=61)
    assert waited == pytest.approx(60, abs=0.1)
    await assert_ended_by_deadline(world, key)


@each_jump
async def test_a_deadline_holds_when_a_clock_is_set(jump: Jump) -> None:
    world = World()
    key = world.kube.create(spec={**SPEC, "activeDeadlineSeconds": 60})
    await world.settle(key)
    world.clock.advance(30)
    jump(world)
    waited = await wait_for(world, key, finished(world, key), most=31)
    assert waited == pytest.approx(30, abs=0.1)
    await assert_ended_by_deadline(world, key)


@each_jump
async def test_a_deadline_ends_it_once_also_after_a_restart_of_the_operator(jump: Jump) -> None:
    """Then nobody has measured: by how much it is late or early is the clocks' matter."""
    world = World()
    key = world.kube.create(spec={**SPEC, "activeDeadlineSeconds": 60})
    await world.settle(key)
    world.clock.advance(30)
    restarted(jump)(world)
    await wait_for(world, key, finished(world, key), most=HOUR + 61)
    await assert_ended_by_deadline(world, key)


@each_jump
async def test_with_clocks_that_differ_a_restart_of_the_operator_changes_no_deadline(jump: Jump) -> None:
    world = World()
    jump(world)
    key = world.kube.create(spec={**SPEC, "activeDeadlineSeconds": 60})
    await world.settle(key)
    world.clock.advance(30)
    world.reconciler = world.another()
    waited = await wait_for(world, key, finished(world, key), most=61)
    assert waited >= 29
    await assert_ended_by_deadline(world, key)


@each_jump
@pytest.mark.parametrize("when", ["before", "after"])
async def test_what_was_stopped_for_its_deadline_is_not_started_again(jump: Jump, when: str) -> None:
    """The operator has gone in between, and came back with another clock."""
    world = World()
    key = world.kube.create(spec={**SPEC, "activeDeadlineSeconds": 60})
    await world.settle(key)
    world.shim.faults["stop"] = [when]
    world.clock.advance(60.1)
    await world.reconciler.reconcile(key)
    restarted(jump)(world)
    await wait_for(world, key, finished(world, key), most=HOUR + 61)
    await assert_ended_by_deadline(world, key)


@each_jump
async def test_what_ended_leaves_node_and_api_in_time(jump: Jump) -> None:
    world = World()
    jump(world)
    world.reconciler = world.another(retention_seconds=20)
    key = world.kube.create(spec={**SPEC, "ttlSecondsAfterFinished": 50})
    await world.settle(key)
    world.clock.advance(100)
    world.shim.exit(f"{key.uid}-1", 3)
    waited = await wait_for(world, key, lambda: not world.shim.records, most=21)
    assert waited >= 19
    waited += await wait_for(world, key, lambda: not world.kube.exists(key), most=31)
    assert waited >= 49


@each_jump
async def test_what_ended_leaves_node_and_api_when_a_clock_is_set(jump: Jump) -> None:
    """One that is set back makes it wait for that much longer, and no more."""
    world = World()
    world.reconciler = world.another(retention_seconds=20)
    key = world.kube.create(spec={**SPEC, "ttlSecondsAfterFinished": 50})
    await world.settle(key)
    world.shim.exit(f"{key.uid}-1", 3)
    await world.settle(key)
    jump(world)
    await wait_for(world, key, lambda: not world.kube.exists(key), most=HOUR + 51)
    assert not world.shim.records


@each_jump
async def test_a_recreation_waits_for_its_back_off(jump: Jump) -> None:
    world = World()
    jump(world)
    policy = {"recreate": "OnFailure", "limit": 1, "backoffSeconds": 10}
    key = world.kube.create(spec={**SPEC, "failurePolicy": policy})
    await world.settle(key)
    world.clock.advance(100)
    world.shim.exit(f"{key.uid}-1", 1)
    waited = await wait_for(world, key, lambda: world.status(key)["instance"] == 2, most=11)
    assert waited >= 9
    assert world.shim.starts == {f"{key.uid}-1": 1, f"{key.uid}-2": 1}
