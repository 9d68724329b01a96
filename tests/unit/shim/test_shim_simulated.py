"""The simulated engine: scripted containers, state over a restart of the shim, streams, failpoints, scale."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from sandkeeper import __version__
from sandkeeper.shim import faults
from sandkeeper.shim.engines.base import SANDBOX_PROCESS, Engine, EngineError, ExecSession, ProcessState
from sandkeeper.shim.engines.simulated import SimulatedEngine, scripts
from sandkeeper.shim.engines.simulated.engine import FIRST_PID
from sandkeeper.shim.faults import FaultyEngine
from sandkeeper.shim.settings import ShimSettings, SimulatedSettings
from sandkeeper.wire import node_pb2

ID = "5f3c2b1a-1"
FOREVER = ["sleep", "infinity"]
Make = Callable[..., Awaitable[Engine]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Opens an engine over the test's state directory; the next one is the shim started again."""
    engines: list[Engine] = []

    async def open_engine(failpoints: Mapping[str, str] | None = None, **simulated: object) -> Engine:
        for each in engines:
            await each.close()
        settings = ShimSettings(
            node_name="n", state_dir=tmp_path, simulated=SimulatedSettings.model_validate(simulated)
        )
        engine: Engine = SimulatedEngine(settings)
        engines.append(FaultyEngine(engine, faults.effects(failpoints, None)) if failpoints else engine)
        await engines[-1].open()
        return engines[-1]

    yield open_engine
    for each in engines:
        await each.close()


def config(*command: str, args: tuple[str, ...] = (), image: str = "busybox") -> node_pb2.SandboxConfig:
    container = node_pb2.ContainerConfig(name="main", image=image, command=command, args=args)
    return node_pb2.SandboxConfig(containers=[container])


def silent(container: str, reason: str, message: str) -> None:
    """Progress that nobody looks at."""


async def run(engine: Engine, asked: node_pb2.SandboxConfig, sandbox_id: str = ID) -> int:
    """Brings a sandbox up with all its containers; returns its pid."""
    await engine.prepare(sandbox_id, asked, silent)
    pid = await engine.start(sandbox_id, asked)
    for container in asked.containers:
        await engine.start_container(sandbox_id, asked, container.name, 0)
    return pid


async def end_of(engine: Engine, name: str = "main", attempt: int = 0) -> tuple[int, int, str]:
    async with asyncio.timeout(10):
        ended = await engine.wait(ID, name, attempt)
    return ended.status, ended.signal, ended.reason


# The node


async def test_it_offers_one_runtime(make: Make) -> None:
    engine = await make()
    (runtime,) = engine.runtimes()
    assert (runtime.name, runtime.version, runtime.ready) == ("simulated", __version__, True)
    assert engine.features() == {"Pause", "Exec", "Logs"}


# How containers end


@pytest.mark.parametrize(
    ("command", "end"),
    [
        (["true"], (0, 0, "Completed")),
        (["exit", "3"], (3, 0, "Error")),
        (["sh", "-c", "exit 3"], (3, 0, "Error")),
        (["/bin/sh", "-c", "echo hello; exit 0"], (0, 0, "Completed")),
        (["sh", "-c", "false"], (1, 0, "Error")),
        (["signal", "9"], (137, 9, "Signaled")),
        (["sh", "-c", "kill -11 $$"], (139, 11, "Signaled")),
        (["oom"], (137, 9, "OOMKilled")),
        (["sleep", "0.01"], (0, 0, "Completed")),
        (["sh", "-c", "sleep 0.01 && exit 4"], (4, 0, "Error")),
    ],
)
async def test_a_container_ends_as_its_command_says(
    make: Make, command: list[str], end: tuple[int, int, str]
) -> None:
    engine = await make()
    await run(engine, config(*command))
    assert await end_of(engine) == end
    assert (await engine.inspect(ID, "main", 0)).exit == await engine.wait(ID, "main", 0)


async def test_command_and_args_are_one_command_line(make: Make) -> None:
    engine = await make()
    await run(engine, config("sh", "-c", args=("exit 7",)))
    assert await end_of(engine) == (7, 0, "Error")


@pytest.mark.parametrize(
    ("command", "signal", "end"),
    [
        (FOREVER, 15, (143, 15, "Signaled")),
        (FOREVER, 9, (137, 9, "Signaled")),
        (FOREVER, 2, (130, 2, "Signaled")),
        (["nginx"], 15, (143, 15, "Signaled")),
        ([], 15, (143, 15, "Signaled")),
        (["sh", "-c", "trap 'exit 0' TERM; sleep 1000"], 15, (0, 0, "Completed")),
        (["ignore-term", "sleep", "1000"], 9, (137, 9, "Signaled")),
    ],
)
async def test_signals(make: Make, command: list[str], signal: int, end: tuple[int, int, str]) -> None:
    engine = await make()
    await run(engine, config(*command))
    await engine.kill(ID, "main", 0, signal)
    assert await end_of(engine) == end
    await engine.kill(ID, "main", 0, signal)
    assert await end_of(engine) == end


@pytest.mark.parametrize(
    "command", [["ignore-term", "nginx"], ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]]
)
async def test_sigterm_can_be_ignored(make: Make, command: list[str]) -> None:
    engine = await make()
    await run(engine, config(*command))
    await engine.kill(ID, "main", 0, 15)
    assert (await engine.inspect(ID, "main", 0)).pid
    await engine.kill(ID, "main", 0, 9)
    assert await end_of(engine) == (137, 9, "Signaled")


async def test_a_signal_to_what_never_was_is_success(make: Make) -> None:
    engine = await make()
    await engine.kill("none-1", "main", 0, 9)
    await run(engine, config(*FOREVER))
    await engine.kill(ID, "other", 0, 9)


async def test_containers_end_with_the_sandbox_process(make: Make) -> None:
    engine = await make()
    await run(engine, config(*FOREVER))
    await engine.kill(ID, SANDBOX_PROCESS, 0, 15)
    assert await end_of(engine, SANDBOX_PROCESS) == (143, 15, "Signaled")
    assert await end_of(engine) == (137, 9, "Signaled")
    with pytest.raises(EngineError, match="StartError"):
        await engine.start_container(ID, config(*FOREVER), "main", 1)
    with pytest.raises(EngineError, match="StartError"):
        await engine.start(ID, config(*FOREVER))


async def test_many_wait_and_one_may_leave(make: Make) -> None:
    engine = await make()
    await run(engine, config(*FOREVER))
    waits = [asyncio.create_task(engine.wait(ID, "main", 0)) for _ in range(5)]
    await asyncio.sleep(0)
    waits[0].cancel()
    await engine.kill(ID, "main", 0, 9)
    ends = await asyncio.gather(*waits[1:])
    assert {each.status for each in ends} == {137}
    assert waits[0].cancelled()


async def test_wait_for_what_was_not_started(make: Make) -> None:
    engine = await make()
    with pytest.raises(EngineError, match="NotStarted"):
        await engine.wait(ID, "main", 0)
    assert await engine.inspect(ID, "main", 0) == ProcessState()


# Start


async def test_start_is_repeatable_with_the_same_pid(make: Make) -> None:
    engine = await make(start_seconds=0.01)
    asked = config(*FOREVER)
    await engine.prepare(ID, asked, silent)
    pids = await asyncio.gather(*(engine.start(ID, asked) for _ in range(5)))
    assert len(set(pids)) == 1
    assert pids[0] >= FIRST_PID
    first = await engine.start_container(ID, asked, "main", 0)
    assert await engine.start_container(ID, asked, "main", 0) == first
    assert first not in pids


async def test_what_was_not_prepared_does_not_start(make: Make) -> None:
    engine = await make()
    with pytest.raises(EngineError, match="NotPrepared"):
        await engine.start(ID, config())


@pytest.mark.parametrize("program", ["/usr/bin/nonexistent", "missing"])
async def test_a_program_that_there_is_not_does_not_start(make: Make, program: str) -> None:
    engine = await make()
    asked = config(program)
    await engine.prepare(ID, asked, silent)
    await engine.start(ID, asked)
    with pytest.raises(EngineError, match="StartError") as failed:
        await engine.start_container(ID, asked, "main", 0)
    assert program in failed.value.message
    assert not failed.value.retryable


async def test_attempts_are_separate(make: Make) -> None:
    engine = await make()
    asked = config("exit", "3")
    await run(engine, asked)
    await end_of(engine)
    pids = [await engine.start_container(ID, asked, "main", attempt) for attempt in (1, 2)]
    assert len(set(pids)) == 2
    assert await end_of(engine, attempt=2) == (3, 0, "Error")


# Images


async def test_an_image_takes_its_time_once(make: Make) -> None:
    engine = await make(image_seconds=0.05)
    told: list[tuple[str, str]] = []
    before = time.monotonic()
    digests = await engine.prepare(ID, config(), lambda name, reason, _: told.append((name, reason)))
    assert time.monotonic() - before >= 0.05
    assert told == [("main", "PullingImage")]
    assert digests["main"].startswith("sha256:")
    again = await engine.prepare("other-1", config(), lambda name, reason, _: told.append((name, reason)))
    assert again == digests
    assert len(told) == 1


@pytest.mark.parametrize(
    ("asked", "reason", "retryable"),
    [
        (config(image="registry.test/missing:1"), "ErrImagePull", True),
        (config(image="Invalid//invalid"), "InvalidImageName", False),
        (config(image=""), "InvalidImageName", False),
        (node_pb2.SandboxConfig(runtime="crun"), "RuntimeNotFound", False),
        (node_pb2.SandboxConfig(network=node_pb2.NETWORK_HOST), "InvalidConfig", False),
    ],
)
async def test_what_cannot_be_prepared(
    make: Make, asked: node_pb2.SandboxConfig, reason: str, retryable: bool
) -> None:
    engine = await make()
    with pytest.raises(EngineError) as failed:
        await engine.prepare(ID, asked, silent)
    assert (failed.value.reason, failed.value.retryable) == (reason, retryable)
    assert await engine.list() == frozenset()


async def test_an_image_is_never_pulled_if_so_asked(make: Make) -> None:
    engine = await make()
    asked = config()
    asked.containers[0].image_pull_policy = node_pb2.IMAGE_PULL_POLICY_NEVER
    with pytest.raises(EngineError, match="ErrImageNeverPull"):
        await engine.prepare(ID, asked, silent)
    await engine.prepare(ID, config(), silent)
    assert await engine.prepare("other-1", asked, silent)


async def test_an_id_that_is_no_file_name_is_refused(make: Make, tmp_path: Path) -> None:
    engine = await make()
    with pytest.raises(EngineError, match="InvalidConfig"):
        await engine.prepare("../outside", config(), silent)
    assert list((tmp_path / "simulated").iterdir()) == []


# Pause


async def test_what_is_paused_does_not_end_by_itself(make: Make) -> None:
    engine = await make()
    await run(engine, config("sleep", "0.05"))
    for _ in range(2):
        await engine.pause(ID)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.15):
            await engine.wait(ID, "main", 0)
    for _ in range(2):
        await engine.resume(ID)
    assert await end_of(engine) == (0, 0, "Completed")


async def test_what_is_paused_can_be_killed(make: Make) -> None:
    engine = await make()
    await run(engine, config(*FOREVER))
    await engine.pause(ID)
    await engine.kill(ID, "main", 0, 15)
    assert await end_of(engine) == (143, 15, "Signaled")


async def test_what_does_not_run_cannot_be_paused(make: Make) -> None:
    engine = await make()
    await engine.prepare(ID, config(), silent)
    with pytest.raises(EngineError, match="NotRunning"):
        await engine.pause(ID)


# Over a restart of the shim


async def test_what_ran_runs_on_with_the_same_pid(make: Make) -> None:
    engine = await make()
    pid = await run(engine, config(*FOREVER))
    found = await engine.inspect(ID, "main", 0)
    engine = await make()
    assert await engine.list() == {ID}
    assert (await engine.inspect(ID, SANDBOX_PROCESS, 0)).pid == pid
    assert await engine.inspect(ID, "main", 0) == found
    assert await engine.start(ID, config(*FOREVER)) == pid
    other = await run(engine, config(*FOREVER), "other-1")
    assert other not in (pid, found.pid)
    await engine.kill(ID, "main", 0, 15)
    assert await end_of(engine) == (143, 15, "Signaled")


async def test_an_end_while_the_shim_was_away_is_known(make: Make) -> None:
    engine = await make()
    await run(engine, config("sh", "-c", "sleep 0.02; exit 5"))
    await engine.close()
    await asyncio.sleep(0.05)  # longer than the container's life
    before = time.time()
    engine = await make()
    assert await end_of(engine) == (5, 0, "Error")
    assert (await engine.wait(ID, "main", 0)).exited_at.timestamp() < before


async def test_an_exit_outlives_the_shim(make: Make) -> None:
    engine = await make()
    await run(engine, config(*FOREVER))
    await engine.kill(ID, "main", 0, 9)
    ended = await engine.wait(ID, "main", 0)
    engine = await make()
    assert await engine.wait(ID, "main", 0) == ended


async def test_what_does_not_fit_a_page_is_found_again(make: Make, tmp_path: Path) -> None:
    engine = await make()
    asked = config("nginx", args=tuple(f"line {number}" for number in range(1000)))
    await run(engine, asked)
    said = await read_logs(engine)
    assert (tmp_path / "simulated" / f"{ID}.json").stat().st_size > 4096
    engine = await make()
    assert await read_logs(engine) == said


async def test_paused_stays_paused(make: Make) -> None:
    engine = await make()
    await run(engine, config("sleep", "0.01"))
    await engine.pause(ID)
    engine = await make()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await engine.wait(ID, "main", 0)
    await engine.resume(ID)
    assert await end_of(engine) == (0, 0, "Completed")


async def test_a_reboot_loses_what_ran(make: Make, tmp_path: Path) -> None:
    engine = await make()
    await run(engine, config(*FOREVER))
    file = tmp_path / "simulated" / f"{ID}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "boot_id": "another"}))
    engine = await make()
    assert (await end_of(engine))[2] == "SandboxLost"
    assert (await end_of(engine, SANDBOX_PROCESS))[2] == "SandboxLost"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"processes": [{}], "images": [], "paused": false}']
)
async def test_a_file_that_cannot_be_read_is_dropped(make: Make, tmp_path: Path, text: str) -> None:
    engine = await make()
    await run(engine, config(*FOREVER))
    folder = tmp_path / "simulated"
    (folder / "torn-1.json").write_text(text)
    (folder / f"{ID}.json.tmp").write_text("half")
    with (folder / f"{ID}.json").open("a") as longer:
        longer.write("rest of what was there before")
    engine = await make()
    assert await engine.list() == {ID}
    assert [each.name for each in folder.iterdir()] == [f"{ID}.json"]


async def test_remove_leaves_nothing(make: Make, tmp_path: Path) -> None:
    engine = await make()
    await run(engine, config(*FOREVER))
    waiting = asyncio.create_task(engine.wait(ID, "main", 0))
    await asyncio.sleep(0)
    for _ in range(2):
        await engine.remove(ID)
    assert (await waiting).status == 137
    assert await engine.list() == frozenset()
    assert list((tmp_path / "simulated").iterdir()) == []
    assert await engine.usage(ID) is None


# Usage, logs, exec


async def test_usage_is_of_what_runs(make: Make) -> None:
    engine = await make()
    await engine.prepare(ID, config(), silent)
    assert await engine.usage(ID) is None
    await run(engine, config(*FOREVER))
    sample = await engine.usage(ID)
    assert sample is not None
    assert sample.pids == 2
    assert sample.memory_bytes > 0
    await engine.kill(ID, SANDBOX_PROCESS, 0, 9)
    assert await engine.usage(ID) is None


async def read_logs(
    engine: Engine, *, follow: bool = False, tail_lines: int = 0, timestamps: bool = False
) -> bytes:
    pieces = [
        piece
        async for piece in engine.logs(
            ID, "main", follow=follow, tail_lines=tail_lines, timestamps=timestamps
        )
    ]
    return b"".join(pieces)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (config("nginx"), b"started\n"),
        (config("nginx", args=("one", "two")), b"one\ntwo\n"),
        (config("sh", "-c", "echo 'a; b'; echo c >&2; exit 1"), b"a; b\nc\n"),
    ],
)
async def test_logs_are_scripted(make: Make, asked: node_pb2.SandboxConfig, said: bytes) -> None:
    engine = await make()
    await run(engine, asked)
    assert await read_logs(engine) == said
    await engine.kill(ID, SANDBOX_PROCESS, 0, 9)
    assert await read_logs(engine) == said
    assert await read_logs(engine, tail_lines=1) == said.splitlines(keepends=True)[-1]
    stamp, _, text = (await read_logs(engine, timestamps=True)).splitlines(keepends=True)[0].partition(b" ")
    assert stamp.startswith(b"20")
    assert text == said.splitlines(keepends=True)[0]


async def test_logs_are_of_all_attempts(make: Make) -> None:
    engine = await make()
    asked = config("sh", "-c", "echo once")
    await run(engine, asked)
    await end_of(engine)
    await engine.start_container(ID, asked, "main", 1)
    assert await read_logs(engine) == b"once\nonce\n"


async def test_logs_are_followed_to_the_end(make: Make) -> None:
    engine = await make()
    await run(engine, config("sh", "-c", "echo one; sleep 0.05; echo two; sleep 1000; echo three"))
    pieces = engine.logs(ID, "main", follow=True, tail_lines=0, timestamps=False)
    async with asyncio.timeout(10):
        assert await anext(pieces) == b"one\n"
        assert await anext(pieces) == b"two\n"
        following = asyncio.create_task(pieces.__anext__())
        await asyncio.sleep(0)
        await engine.kill(ID, SANDBOX_PROCESS, 0, 9)
        with pytest.raises(StopAsyncIteration):
            await following


async def test_removal_ends_the_followers(make: Make) -> None:
    engine = await make()
    await engine.prepare(ID, config(), silent)
    following = asyncio.create_task(read_logs(engine, follow=True))
    await asyncio.sleep(0)
    await engine.remove(ID)
    async with asyncio.timeout(10):
        assert await following == b""


async def session(engine: Engine, *command: str, stdin: bool = False) -> ExecSession:
    return await engine.exec(ID, "main", 0, list(command), tty=False, stdin=stdin, size=None)


async def outcome(of: ExecSession) -> tuple[dict[str, bytes], int]:
    streams = {"stdout": b"", "stderr": b""}
    async with asyncio.timeout(10):
        async for stream, data in of.output():
            streams[stream] += data
        return streams, await of.wait()


async def test_exec_echoes_its_input(make: Make) -> None:
    engine = await make()
    await run(engine, config(*FOREVER))
    cat = await session(engine, "cat", stdin=True)
    await cat.write_stdin(b"one ")
    await cat.write_stdin(b"two")
    await cat.close_stdin()
    assert await outcome(cat) == ({"stdout": b"one two", "stderr": b""}, 0)
    await cat.kill()
    assert await cat.wait() == 0


@pytest.mark.parametrize(
    ("command", "streams", "status"),
    [
        (["exit", "3"], (b"", b""), 3),
        (["cat"], (b"", b""), 0),
        (["sh", "-c", "echo out; echo err >&2; exit 4"], (b"out\n", b"err\n"), 4),
        (["sh", "-c", "sleep 0.01; echo late"], (b"late\n", b""), 0),
    ],
)
async def test_exec_does_as_its_command_says(
    make: Make, command: list[str], streams: tuple[bytes, bytes], status: int
) -> None:
    engine = await make()
    await run(engine, config(*FOREVER))
    found, ended = await outcome(await session(engine, *command))
    assert ((found["stdout"], found["stderr"]), ended) == (streams, status)


async def test_exec_of_a_program_that_there_is_not(make: Make) -> None:
    engine = await make()
    await run(engine, config(*FOREVER))
    found, ended = await outcome(await session(engine, "missing"))
    assert ended == 127
    assert found["stderr"]


async def test_exec_can_be_killed_and_ends_with_its_container(make: Make) -> None:
    engine = await make()
    await run(engine, config(*FOREVER))
    first, second = await session(engine, *FOREVER), await session(engine, "cat", stdin=True)
    for _ in range(2):
        await first.kill()
    assert (await outcome(first))[1] == 137
    await engine.kill(ID, "main", 0, 9)
    assert (await outcome(second))[1] == 137


async def test_exec_needs_a_container_that_runs(make: Make) -> None:
    engine = await make()
    await run(engine, config("exit", "0"))
    await end_of(engine)
    with pytest.raises(EngineError, match="NotRunning"):
        await session(engine, "cat")


# Failpoints and scale


async def test_a_lost_reply_leaves_the_effect(make: Make) -> None:
    engine = await make(failpoints={"start": "1*lose(reply lost)"})
    await engine.prepare(ID, config(), silent)
    with pytest.raises(EngineError) as failed:
        await engine.start(ID, config())
    assert failed.value.retryable
    pid = (await engine.inspect(ID, SANDBOX_PROCESS, 0)).pid
    assert pid
    assert await engine.start(ID, config()) == pid


@pytest.mark.parametrize("method", ["prepare", "start", "start_container", "kill", "pause", "remove", "list"])
async def test_an_error_leaves_no_effect_and_the_same_call_again_succeeds(make: Make, method: str) -> None:
    engine = await make(failpoints={method: "1*error(boom)"})
    asked = config(*FOREVER)
    failures = 0
    for step in (
        lambda: engine.prepare(ID, asked, silent),
        lambda: engine.start(ID, asked),
        lambda: engine.start_container(ID, asked, "main", 0),
        lambda: engine.pause(ID),
        lambda: engine.kill(ID, "main", 0, 9),
        lambda: engine.list(),
        lambda: engine.remove(ID),
    ):
        try:
            await step()
        except EngineError:
            failures += 1
            await step()
    assert failures == 1
    assert await engine.list() == frozenset()


async def test_a_disk_that_cannot_be_written_is_an_error_that_may_pass(make: Make, tmp_path: Path) -> None:
    engine = await make()
    asked = config(*FOREVER)
    await engine.prepare(ID, asked, silent)
    blocker = tmp_path / "simulated" / f"{ID}.json"
    blocker.unlink()
    blocker.mkdir()
    with pytest.raises(EngineError) as failed:
        await engine.start(ID, asked)
    assert failed.value.retryable
    assert await engine.inspect(ID, SANDBOX_PROCESS, 0) == ProcessState()
    blocker.rmdir()
    assert await engine.start(ID, asked)


async def test_ten_thousand_sandboxes_need_no_task(make: Make) -> None:
    engine = await make()
    asked = config("sleep", "1000")
    tasks = len(asyncio.all_tasks())
    for number in range(10_000):
        await run(engine, asked, f"uid-{number}")
    assert len(asyncio.all_tasks()) == tasks
    again = await make()
    assert len(await again.list()) == 10_000


def test_shell_scripts_are_read_statement_by_statement() -> None:
    assert scripts.read(["sh", "-c", "sleep 1\nsleep 2; exit 3; echo never"]) == scripts.Script(
        seconds=3.0, status=3
    )
    assert scripts.read(["sh", "-c", "'open quote"]).status == 2
    assert scripts.read(["sh", "-c", "exec sleep 5"]).seconds == 5
    assert scripts.read(["sh", "-c", "sleep 5 & wait"]) == scripts.FOREVER
