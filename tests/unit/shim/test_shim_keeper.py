"""The shim's core over the simulated engine: the states of a sandbox, restarts, stops, and what a restart of the
shim finds."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from sandkeeper.shim import kept
from sandkeeper.shim.engines.base import SANDBOX_PROCESS, EngineError
from sandkeeper.shim.engines.simulated import SimulatedEngine
from sandkeeper.shim.errors import BadRequest, Full, NotReady, Taken, UnknownSandbox, WrongState
from sandkeeper.shim.instance import Instance
from sandkeeper.shim.keeper import Keeper
from sandkeeper.shim.main import make_server
from sandkeeper.shim.settings import ShimSettings
from sandkeeper.wire import node_pb2
from sandkeeper.wire.ids import OwnerKey

FOREVER = ["sleep", "infinity"]
OWNER = OwnerKey("ns", "box", "5f3c2b1a", 1)
Make = Callable[..., Awaitable[Keeper]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Opens a shim over the test's state directory; the next one is the shim started again."""
    opened: list[Keeper] = []

    async def open_keeper(**settings: object) -> Keeper:
        while opened:
            await opened.pop().close()
        quick = {"restart_backoff": 0.01, "pull_backoff": 0.01, "pull_backoff_max": 0.02}
        made = ShimSettings.model_validate(
            {"node_name": "n", "state_dir": tmp_path, "engine": "simulated", **quick, **settings}
        )
        keeper = make_server(made).keeper
        opened.append(keeper)
        await keeper.open()
        return keeper

    yield open_keeper
    for each in opened:
        await each.close()


def config(
    *commands: list[str], owner: OwnerKey = OWNER, image: str = "busybox", policy: int = 0, grace: int = 1
) -> node_pb2.SandboxConfig:
    return node_pb2.SandboxConfig(
        owner=node_pb2.Owner(
            namespace=owner.namespace, name=owner.name, uid=owner.uid, instance=owner.instance
        ),
        digest="sha256:1",
        restart_policy=node_pb2.RestartPolicy.Name(policy),  # type: ignore[arg-type]
        termination_grace_period_seconds=grace,
        containers=[
            node_pb2.ContainerConfig(name=f"c{index}", image=image, command=command)
            for index, command in enumerate(commands)
        ],
    )


async def create(keeper: Keeper, *commands: list[str], owner: OwnerKey = OWNER, **more: object) -> Instance:
    asked = config(*commands, owner=owner, **more)  # type: ignore[arg-type]
    instance = await keeper.create(owner.sandbox_id, asked, owner)
    await until(lambda: instance.record.state != node_pb2.STATE_PREPARING)
    return instance


async def run(keeper: Keeper, *commands: list[str], **more: object) -> Instance:
    instance = await create(keeper, *commands, **more)  # type: ignore[arg-type]
    await instance.start()
    return instance


async def until(condition: Callable[[], object]) -> None:
    async def holds() -> object:
        return condition()

    await eventually(holds)


async def eventually(condition: Callable[[], Awaitable[object]], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.002)


# Create


async def test_create_records_and_prepares(make: Make) -> None:
    instance = await create(await make(), FOREVER)
    assert instance.record.state == node_pb2.STATE_CREATED
    assert instance.record.pid == 0
    assert instance.record.containers[0].image_id.startswith("sha256:")


async def test_create_again_is_the_same_sandbox(make: Make) -> None:
    keeper = await make()
    first = await create(keeper, FOREVER)
    assert await keeper.create(OWNER.sandbox_id, config(FOREVER), OWNER) is first
    other = config(FOREVER)
    other.digest = "sha256:2"
    with pytest.raises(Taken):
        await keeper.create(OWNER.sandbox_id, other, OWNER)
    assert len(keeper.all()) == 1


async def test_preparing_goes_on_when_the_disk_does(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandkeeper.shim.kept.RETRY_SECONDS", 0.01)
    keeper = await make(failpoints={"record_save": "1*off->3*error"})
    assert (await create(keeper, FOREVER)).record.state == node_pb2.STATE_CREATED
    keeper = await make(failpoints={"record_save": "1*off->3*error"})
    other = OwnerKey("ns", "other", "77aa", 1)
    assert (await create(keeper, FOREVER, owner=other, image="invalid")).record.state == node_pb2.STATE_FAILED


async def test_create_many_at_once_makes_one(make: Make) -> None:
    keeper = await make()
    made = await asyncio.gather(*(keeper.create(OWNER.sandbox_id, config(FOREVER), OWNER) for _ in range(20)))
    assert len({id(each) for each in made}) == 1


async def test_nobody_hears_of_what_is_not_on_disk_yet(make: Make) -> None:
    """A kill now would leave nothing of it: then nothing may have been said of it."""
    keeper = await make(failpoints={"record_create": "1*delay(0.2)"}, simulated={"image_seconds": 0.05})
    told = keeper.journal.sequence
    creating = asyncio.create_task(keeper.create(OWNER.sandbox_id, config(FOREVER), OWNER))
    await until(lambda: keeper._sandboxes)
    status = asyncio.create_task(keeper.get(OWNER.sandbox_id, OWNER).recorded())
    while not creating.done():
        on_disk = list(keeper.settings.state_dir.glob("sandboxes/*/record.json"))
        if not on_disk:
            assert keeper.all() == ()
            assert keeper.journal.sequence == told
            assert not status.done()
        await asyncio.sleep(0.005)
    await status
    assert keeper.all() == (creating.result(),)
    assert keeper.journal.sequence > told


@pytest.mark.parametrize(
    ("sandbox_id", "change", "names"),
    [
        ("../../etc", {}, "sandbox_id"),
        ("another", {}, "sandbox_id"),
        (OWNER.sandbox_id, {"owner": node_pb2.Owner(uid="other", instance=1)}, "owner"),
        (OWNER.sandbox_id, {"containers": [node_pb2.ContainerConfig(name="../x")]}, "containers[].name"),
        (OWNER.sandbox_id, {"containers": [node_pb2.ContainerConfig(name="a")] * 2}, "containers[].name"),
        (OWNER.sandbox_id, {"volumes": [node_pb2.Volume(name="a/b")]}, "volumes[].name"),
        (
            OWNER.sandbox_id,
            {"containers": [node_pb2.ContainerConfig(name=f"a{i}") for i in range(17)]},
            "containers",
        ),
    ],
)
async def test_create_refuses_what_can_never_be_and_leaves_nothing(
    make: Make, tmp_path: Path, sandbox_id: str, change: dict[str, object], names: str
) -> None:
    keeper = await make()
    asked = config(FOREVER)
    for field in change:
        asked.ClearField(field)  # type: ignore[arg-type]
    asked.MergeFrom(node_pb2.SandboxConfig(**change))  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match=names.replace("[", r"\[").replace("]", r"\]")):
        await keeper.create(sandbox_id, asked, OWNER)
    assert not keeper.all()
    assert not list((tmp_path / "sandboxes").iterdir())


async def test_an_older_instance_is_fenced_also_after_shutdown_and_restart(make: Make) -> None:
    keeper = await make()
    second = OwnerKey("ns", "box", OWNER.uid, 2)
    await (await create(keeper, FOREVER, owner=second)).shutdown()
    keeper = await make()
    with pytest.raises(WrongState, match="older"):
        await keeper.create(OWNER.sandbox_id, config(FOREVER), OWNER)


async def test_the_next_instance_waits_for_the_one_before(make: Make) -> None:
    keeper = await make()
    first = await run(keeper, FOREVER)
    second = OwnerKey("ns", "box", OWNER.uid, 2)
    with pytest.raises(NotReady):
        await keeper.create(second.sandbox_id, config(FOREVER, owner=second), second)
    await first.shutdown()
    await create(keeper, FOREVER, owner=second)


async def test_a_call_for_another_owner_is_refused(make: Make) -> None:
    keeper = await make()
    await create(keeper, FOREVER)
    with pytest.raises(WrongState):
        keeper.get(OWNER.sandbox_id, OwnerKey("ns", "box", OWNER.uid, 2))
    with pytest.raises(WrongState):
        keeper.get(OWNER.sandbox_id, OwnerKey("ns", "box", "other", 1))
    with pytest.raises(UnknownSandbox):
        keeper.get("other-1", None)


async def test_a_full_node_says_so(make: Make) -> None:
    keeper = await make(sandboxes=1)
    await create(keeper, FOREVER)
    other = OwnerKey("ns", "b", "other", 1)
    with pytest.raises(Full):
        await keeper.create(other.sandbox_id, config(FOREVER, owner=other), other)


async def test_an_image_that_may_come_is_tried_again(make: Make) -> None:
    keeper = await make(failpoints={"prepare": "3*error(busy)"})
    instance = await keeper.create(OWNER.sandbox_id, config(FOREVER), OWNER)
    assert instance.record.state == node_pb2.STATE_PREPARING
    assert instance.record.reason == "Failpoint"
    with pytest.raises(NotReady):
        await instance.start()
    await until(lambda: instance.record.state == node_pb2.STATE_CREATED)
    assert (instance.record.reason, instance.record.message) == ("", "")


async def test_a_pull_that_fails_again_and_again_backs_off(make: Make) -> None:
    keeper = await make()
    instance = await keeper.create(OWNER.sandbox_id, config(FOREVER, image="missing"), OWNER)
    await until(lambda: instance.record.reason == "ImagePullBackOff")
    assert instance.record.containers[0].reason == "ImagePullBackOff"
    assert "manifest unknown" in instance.record.message
    await instance.shutdown()
    assert not keeper.all()


async def test_what_can_never_be_prepared_has_failed(make: Make) -> None:
    instance = await create(await make(), FOREVER, image="invalid")
    assert instance.record.state == node_pb2.STATE_FAILED
    assert instance.record.reason == "InvalidImageName"
    for call in (instance.start, instance.wait):
        with pytest.raises(WrongState, match="InvalidImageName"):
            await call()


async def test_a_disk_that_takes_no_record_leaves_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = await make()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("sandkeeper.shim.records.Records.create", full)
        with pytest.raises(OSError, match="No space"):
            await keeper.create(OWNER.sandbox_id, config(FOREVER), OWNER)
    assert not keeper.all()
    assert not await keeper.engine.list()
    await create(keeper, FOREVER)


# Start, and the end


async def test_start_is_once_however_often_it_is_asked(make: Make) -> None:
    instance = await create(await make(), FOREVER, FOREVER)
    pids = await asyncio.gather(*(instance.start() for _ in range(10)))
    assert len(set(pids)) == 1
    assert pids[0] == instance.record.pid
    assert instance.record.state == node_pb2.STATE_RUNNING
    assert all(container.pid for container in instance.record.containers)


async def test_a_lost_reply_of_the_engine_starts_nothing_twice(make: Make) -> None:
    keeper = await make(failpoints={"start": "1*lose(reply)"})
    instance = await create(keeper, FOREVER)
    with pytest.raises(NotReady):
        await instance.start()
    first = (await keeper.engine.inspect(OWNER.sandbox_id, SANDBOX_PROCESS, 0)).pid
    assert await instance.start() == first


@pytest.mark.parametrize(
    ("command", "status", "signal", "reason"),
    [
        (["exit", "0"], 0, 0, "Completed"),
        (["exit", "3"], 3, 0, "Error"),
        (["signal", "11"], 139, 11, "Signaled"),
        (["oom"], 137, 9, "OOMKilled"),
    ],
)
async def test_the_end_is_told_apart(
    make: Make, command: list[str], status: int, signal: int, reason: str
) -> None:
    instance = await run(await make(), command)
    ended = await instance.wait()
    assert (ended.status, ended.signal, ended.reason) == (status, signal, reason)
    assert instance.record.state == node_pb2.STATE_EXITED
    assert instance.record.pid == 0
    assert await instance.wait() == ended
    with pytest.raises(WrongState, match="exited"):
        await instance.start()


async def test_the_first_to_fail_decides(make: Make) -> None:
    instance = await run(await make(), ["exit", "0"], ["exit", "4"], ["sleep", "0.05"])
    ended = await instance.wait()
    assert ended.status == 4
    assert "c1" in ended.message


async def test_a_container_that_does_not_start_ends_the_others(make: Make) -> None:
    keeper = await make()
    instance = await create(keeper, FOREVER, ["missing-program"])
    with pytest.raises(WrongState, match=r"StartError: containers\[c1\]"):
        await instance.start()
    assert instance.record.state == node_pb2.STATE_EXITED
    assert (instance.record.exit.status, instance.record.exit.reason) == (128, "StartError")
    assert (await keeper.engine.inspect(OWNER.sandbox_id, "c0", 0)).exit is not None


@pytest.mark.parametrize("failure", ["error", "lose"])
async def test_what_the_node_cannot_just_now_is_no_failed_start(make: Make, failure: str) -> None:
    """The same Start again starts what is missing, and nothing twice."""
    keeper = await make(failpoints={"start_container": f"1*off->1*{failure}"})
    instance = await create(keeper, FOREVER, FOREVER)
    with pytest.raises(NotReady, match="Failpoint"):
        await instance.start()
    assert instance.record.state == node_pb2.STATE_CREATED
    first = (await keeper.engine.inspect(OWNER.sandbox_id, "c0", 0)).pid
    await instance.start()
    assert instance.record.state == node_pb2.STATE_RUNNING
    pids = [each.pid for each in instance.record.containers]
    assert pids[0] == first != pids[1] > 0


async def test_the_sandbox_process_goes_when_the_end_is_known(make: Make) -> None:
    keeper = await make()
    instance = await run(keeper, ["exit", "0"])
    await instance.wait()

    async def gone() -> bool:
        return (await keeper.engine.inspect(OWNER.sandbox_id, SANDBOX_PROCESS, 0)).exit is not None

    await eventually(gone)


async def test_a_lost_sandbox_process_ends_the_sandbox(make: Make) -> None:
    keeper = await make()
    instance = await run(keeper, FOREVER, policy=node_pb2.RESTART_POLICY_ALWAYS)
    await keeper.engine.kill(OWNER.sandbox_id, SANDBOX_PROCESS, 0, 9)
    assert (await instance.wait()).reason == "SandboxLost" or instance.record.exit.status == 137
    assert instance.record.containers[0].state == node_pb2.CONTAINER_STATE_EXITED
    assert instance.record.containers[0].restart_count == 0


async def test_an_exit_is_not_lost_to_a_full_disk(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandkeeper.shim.run.RETRY_SECONDS", 0.01)
    keeper = await make()
    instance = await run(keeper, ["sleep", "0.02"])
    failures = 3

    def save(self: object, *args: object, **kwargs: object) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, *args, **kwargs)  # type: ignore[arg-type]

    original = kept.Records.save
    monkeypatch.setattr(kept.Records, "save", save)
    assert (await instance.wait()).status == 0
    assert failures < 0


# restartPolicy


async def test_on_failure_starts_again_and_counts(make: Make) -> None:
    keeper = await make()
    instance = await run(keeper, ["exit", "1"], policy=node_pb2.RESTART_POLICY_ON_FAILURE)
    await until(lambda: instance.record.containers[0].restart_count >= 2)
    assert instance.record.state == node_pb2.STATE_RUNNING
    assert instance.record.containers[0].exit.status == 1
    await instance.stop(0)
    assert instance.record.state == node_pb2.STATE_EXITED


async def test_a_restart_that_the_node_cannot_do_just_now_is_not_counted(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandkeeper.shim.run.RETRY_SECONDS", 0.01)
    keeper = await make(failpoints={"start_container": "1*off->3*error"})
    instance = await run(keeper, ["ignore-term", "sleep", "0.01"], policy=node_pb2.RESTART_POLICY_ALWAYS)
    await until(lambda: instance.record.containers[0].restart_count)
    assert instance.record.containers[0].exit.reason == "Completed"
    assert instance.record.containers[0].restart_count == 1


async def test_on_failure_leaves_a_success_alone(make: Make) -> None:
    instance = await run(await make(), ["exit", "0"], policy=node_pb2.RESTART_POLICY_ON_FAILURE)
    assert (await instance.wait()).status == 0
    assert instance.record.containers[0].restart_count == 0


async def test_waits_grow_and_say_so(make: Make) -> None:
    keeper = await make(restart_backoff=30)
    instance = await run(keeper, ["exit", "0"], policy=node_pb2.RESTART_POLICY_ALWAYS)
    await until(lambda: instance.record.containers[0].reason == "CrashLoopBackOff")
    assert instance.record.containers[0].state == node_pb2.CONTAINER_STATE_WAITING
    assert instance.record.containers[0].message == "exit status 0; started again after 30 s"
    async with asyncio.timeout(5):
        await instance.stop(5)  # it need not wait for the restart
    assert instance.record.exit.status == 0


async def test_nothing_is_started_again_while_paused(make: Make) -> None:
    keeper = await make(restart_backoff=0.05)
    instance = await run(keeper, FOREVER, ["exit", "1"], policy=node_pb2.RESTART_POLICY_ALWAYS)
    await until(lambda: instance.record.containers[1].reason == "CrashLoopBackOff")
    await instance.pause()
    await asyncio.sleep(0.1)
    assert instance.record.containers[1].restart_count == 0
    await instance.resume()
    await until(lambda: instance.record.containers[1].restart_count > 0)


# Stop, Shutdown, Pause


async def test_stop_terms_then_kills(make: Make) -> None:
    keeper = await make()
    instance = await run(keeper, ["ignore-term", *FOREVER])
    await instance.stop(0.05)
    assert (instance.record.exit.status, instance.record.exit.reason) == (137, "Stopped")
    before = instance.record
    await instance.stop(1)
    assert instance.record == before


async def test_a_shorter_stop_overtakes_a_longer(make: Make) -> None:
    instance = await run(await make(), ["ignore-term", *FOREVER])
    slow = asyncio.create_task(instance.stop(60))
    await until(lambda: instance._kept.asked.stop_at)
    async with asyncio.timeout(5):
        await instance.stop(0)
        await slow
    assert instance.record.exit.status == 137


async def test_stop_of_what_never_ran_changes_nothing(make: Make) -> None:
    instance = await create(await make(), FOREVER)
    await instance.stop(1)
    assert instance.record.state == node_pb2.STATE_CREATED
    assert await instance.start()


async def test_stop_wakes_a_paused_sandbox(make: Make) -> None:
    instance = await run(await make(), FOREVER)
    await instance.pause()
    assert instance.record.state == node_pb2.STATE_PAUSED
    await instance.pause()
    await instance.stop(5)
    assert (instance.record.exit.status, instance.record.exit.reason) == (143, "Stopped")
    with pytest.raises(WrongState):
        await instance.resume()


@pytest.mark.parametrize("state", ["created", "running", "paused", "exited", "failed", "preparing"])
async def test_shutdown_leaves_nothing_in_any_state(make: Make, tmp_path: Path, state: str) -> None:
    keeper = await make()
    match state:
        case "created":
            instance = await create(keeper, FOREVER)
        case "failed":
            instance = await create(keeper, FOREVER, image="invalid")
        case "preparing":
            instance = await keeper.create(OWNER.sandbox_id, config(FOREVER, image="missing"), OWNER)
        case "exited":
            instance = await run(keeper, ["exit", "0"])
            await instance.wait()
        case _:
            instance = await run(keeper, FOREVER)
            if state == "paused":
                await instance.pause()
    waiting = asyncio.create_task(instance.wait())
    await asyncio.gather(*(instance.shutdown() for _ in range(3)))
    assert not keeper.all()
    assert not await keeper.engine.list()
    assert not list((tmp_path / "sandboxes").iterdir())
    outcome = (await asyncio.gather(waiting, return_exceptions=True))[0]
    if state in ("created", "preparing"):
        assert isinstance(outcome, UnknownSandbox)
    elif state == "failed":
        assert isinstance(outcome, WrongState)
    else:
        assert isinstance(outcome, node_pb2.Exit)


async def test_a_shutdown_that_failed_can_be_repeated(make: Make) -> None:
    keeper = await make(failpoints={"remove": "1*error(busy)"})
    instance = await run(keeper, FOREVER)
    with pytest.raises(EngineError, match="busy"):
        await instance.shutdown()
    assert keeper.all()
    await instance.shutdown()
    assert not keeper.all()


async def test_the_journal_has_every_state(make: Make) -> None:
    keeper = await make()
    instance = await run(keeper, ["exit", "3"])
    await instance.wait()
    await instance.shutdown()
    keeper.journal.close()
    seen = [change async for change in keeper.journal.follow(keeper.journal.epoch, 0)]
    states = [change.sandbox.state for change in seen if not change.removed]
    wanted = [node_pb2.STATE_CREATED, node_pb2.STATE_RUNNING, node_pb2.STATE_EXITED]
    assert [state for state in dict.fromkeys(states) if state in wanted] == wanted
    assert seen[-1].removed
    assert seen[-1].sandbox.owner.uid == OWNER.uid


# A client that knows only containerd's protocol


async def test_a_sandbox_without_containers_lives_by_its_process(make: Make) -> None:
    keeper = await make()
    instance = await keeper.create("plain", None, None)
    assert instance.record.state == node_pb2.STATE_CREATED
    await instance.start()
    await instance.stop(5)
    assert instance.record.state == node_pb2.STATE_EXITED
    assert instance.record.exit.reason == "Stopped"


# A restart of the shim


async def test_what_runs_is_found_again(make: Make) -> None:
    instance = await run(await make(), FOREVER)
    before = instance.record
    keeper = await make()
    again = keeper.get(OWNER.sandbox_id, OWNER)
    assert again.record == before
    assert await again.start() == before.pid
    await again.stop(5)
    assert again.record.exit.reason == "Stopped"


async def test_an_end_while_the_shim_was_away_is_known(make: Make) -> None:
    keeper = await make()
    await run(keeper, ["sleep", "0.1"])
    await keeper.close()
    await asyncio.sleep(0.2)
    again = (await make()).get(OWNER.sandbox_id, OWNER)
    assert (await again.wait()).reason == "Completed"


async def test_a_restart_is_due_also_after_the_shim_was_away(make: Make) -> None:
    keeper = await make(restart_backoff=0.2)
    instance = await run(keeper, ["exit", "1"], policy=node_pb2.RESTART_POLICY_ALWAYS)
    await until(lambda: instance.record.containers[0].reason == "CrashLoopBackOff")
    again = (await make()).get(OWNER.sandbox_id, OWNER)
    await until(lambda: again.record.containers[0].restart_count >= 1)


async def test_a_shutdown_that_was_cut_off_is_carried_through(make: Make) -> None:
    keeper = await make(failpoints={"remove": "error(cut)"})
    instance = await run(keeper, FOREVER)
    with pytest.raises(EngineError):
        await instance.shutdown()
    keeper = await make()
    await until(lambda: not keeper.all())
    assert not await keeper.engine.list()


async def test_shutdowns_that_were_cut_off_may_end_while_the_shim_starts(make: Make) -> None:
    keeper = await make(failpoints={"remove": "error(cut)"})
    owners = [OwnerKey("ns", "box", f"uid-{number}", 1) for number in range(4)]
    for owner in owners:
        instance = await create(keeper, FOREVER, owner=owner)
        if owner is not owners[-1]:
            with pytest.raises(EngineError):
                await instance.shutdown()
    # The last one is looked into while the others end.
    keeper = await make(failpoints={"inspect": "delay(0.3)"})
    await until(lambda: len(keeper.all()) == 1)


async def test_a_stop_that_was_cut_off_is_carried_through(make: Make) -> None:
    keeper = await make()
    instance = await run(keeper, ["ignore-term", *FOREVER], policy=node_pb2.RESTART_POLICY_ALWAYS)
    asyncio_task = asyncio.create_task(instance.stop(60))
    await until(lambda: instance._kept.asked.stop_at)
    asyncio_task.cancel()
    again = (await make()).get(OWNER.sandbox_id, OWNER)
    assert (await again.wait()).reason == "Stopped"


async def test_a_start_that_was_cut_off_is_finished(make: Make) -> None:
    keeper = await make(failpoints={"start_container": "hang"})
    instance = await create(keeper, FOREVER)
    starting = asyncio.create_task(instance.start())

    async def started() -> object:
        return (await keeper.engine.inspect(OWNER.sandbox_id, SANDBOX_PROCESS, 0)).started

    await eventually(started)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    again = (await make()).get(OWNER.sandbox_id, OWNER)
    await until(lambda: again.record.state == node_pb2.STATE_RUNNING)


async def test_preparing_goes_on(make: Make) -> None:
    keeper = await make(failpoints={"prepare": "error(busy)"})
    await keeper.create(OWNER.sandbox_id, config(FOREVER), OWNER)
    again = (await make()).get(OWNER.sandbox_id, OWNER)
    await until(lambda: again.record.state == node_pb2.STATE_CREATED)


async def test_what_no_record_owns_is_removed(make: Make, tmp_path: Path) -> None:
    keeper = await make()
    await run(keeper, FOREVER)
    await keeper.close()
    (tmp_path / "sandboxes" / OWNER.sandbox_id / "record.json").write_text("{")
    keeper = await make()
    assert not keeper.all()
    assert not await keeper.engine.list()


async def test_two_shims_on_one_folder_are_refused(make: Make, tmp_path: Path) -> None:
    keeper = await make()
    other = Keeper(keeper.settings, SimulatedEngine(keeper.settings))
    with pytest.raises(BlockingIOError):
        await other.open()
    await other.close()
