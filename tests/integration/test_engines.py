"""The real engines with real containers, on each runtime that this machine has: the same tests for each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.containerds import containerd
from tests.leaks import Leaks

from sandkeeper.localcluster.containerd_sources import Source
from sandkeeper.localcluster.ocilayout import busybox_image, write_layout
from sandkeeper.shim.engines.base import SANDBOX_PROCESS, EngineError, ExecSession, ProcessExit
from sandkeeper.shim.engines.oci import OCIEngine, spec
from sandkeeper.shim.engines.oci.cgroups import MONITORS
from sandkeeper.shim.main import make_engine
from sandkeeper.shim.settings import OCISettings, ShimSettings
from sandkeeper.wire import node_pb2 as pb

pytestmark = [pytest.mark.oci, pytest.mark.asyncio(loop_scope="module")]

IMAGE = "docker.io/library/busybox:1.37"
MIB = 1024 * 1024
LOG_BYTES = 64 * 1024
SOURCES: dict[str, Source] = {"containerd-2": "module", "containerd-1": "debian"}


def settings_in(folder: Path) -> ShimSettings:
    """As the fixture `folder` has noted it, so that another process can have the same engine."""
    chosen = json.loads((folder / "engine").read_text())
    oci = OCISettings(
        runtimes=("crun", "runc"),
        image_layouts=(folder / "layout",),
        cgroup_parent=f"test-engine-{folder.name}",
        log_max_bytes=LOG_BYTES,
    )
    return ShimSettings(
        node_name="test", state_dir=folder / "state", run_dir=folder / "run", oci=oci, **chosen
    )


@pytest.fixture(scope="module", params=["oci", "containerd-2", "containerd-1"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An engine's, which it is, and an image."""
    made = tmp_path_factory.mktemp(f"{request.param}-{os.getpid()}-")
    write_layout(made / "layout", {IMAGE: busybox_image()})
    with contextlib.ExitStack() as stack:
        chosen: dict[str, Any] = {"engine": request.param}
        if request.param in SOURCES:
            daemon = stack.enter_context(containerd(SOURCES[request.param]))
            chosen = {"engine": "containerd", "containerd": {"socket": str(daemon.socket)}}
        (made / "engine").write_text(json.dumps(chosen))
        yield made


@pytest.fixture(scope="module")
def leaks(folder: Path) -> Leaks:
    return Leaks(folder, f"test-engine-{folder.name}")


@pytest.fixture(scope="module", autouse=True)
def nothing_left(leaks: Leaks) -> Iterator[None]:
    yield
    leaks.assert_none()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path) -> AsyncIterator[OCIEngine]:
    made = make_engine(settings_in(folder))
    assert isinstance(made, OCIEngine)
    await made.open()
    yield made
    await made.close()


@pytest.fixture(params=["crun", "runc"])
def runtime(request: pytest.FixtureRequest, engine: OCIEngine) -> str:
    info = next(each for each in engine.runtimes() if each.name == request.param)
    if not info.ready:
        pytest.skip(f"{info.name}: {info.message}")
    return info.name


def container(script: str = "", *, name: str = "main", **fields: Any) -> pb.ContainerConfig:
    chosen = {"image": IMAGE, "command": ["sh", "-c", script], **fields}
    return pb.ContainerConfig(name=name, **chosen)


@dataclass
class Box:
    """One sandbox and what a test does with it."""

    engine: OCIEngine
    config: pb.SandboxConfig
    id: str = field(default_factory=lambda: f"{uuid.uuid4()}-1")

    async def prepare(self) -> None:
        await self.engine.prepare(self.id, self.config, lambda *_: None)

    async def start(self) -> dict[str, int]:
        """Pids by container; the sandbox process under its own name."""
        await self.prepare()
        pids = {SANDBOX_PROCESS: await self.engine.start(self.id, self.config)}
        for each in self.config.containers:
            pids[each.name] = await self.engine.start_container(self.id, self.config, each.name, 0)
        return pids

    async def wait(self, name: str = "main", attempt: int = 0) -> ProcessExit:
        return await asyncio.wait_for(self.engine.wait(self.id, name, attempt), 20)

    async def output(self, name: str = "main", **options: Any) -> str:
        chosen = {"follow": False, "tail_lines": 0, "timestamps": False, **options}
        pieces = [piece async for piece in self.engine.logs(self.id, name, **chosen)]
        return b"".join(pieces).decode()

    async def run(self) -> tuple[ProcessExit, str]:
        await self.start()
        ended = await self.wait()
        return ended, await self.output()

    async def said(self, text: str, name: str = "main") -> None:
        await until(lambda: self.output(name), lambda output: text in output)


Make = Callable[..., Box]


@pytest_asyncio.fixture(loop_scope="module")
async def make(engine: OCIEngine, runtime: str, leaks: Leaks) -> AsyncIterator[Make]:
    """Makes sandboxes of the runtime at hand; removes them, and looks that nothing is left."""
    made: list[Box] = []

    def box(*containers: pb.ContainerConfig, **fields: Any) -> Box:
        owner = pb.Owner(namespace="default", name="box", uid="u", instance=1)
        config = pb.SandboxConfig(runtime=runtime, owner=owner, containers=containers, **fields)
        made.append(Box(engine, config))
        return made[-1]

    yield box
    for each in made:
        await engine.remove(each.id)
    assert await engine.list() == frozenset()
    leaks.assert_none()


async def until(look: Callable[[], Any], good: Callable[[Any], bool], seconds: float = 10.0) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        seen = look()
        if asyncio.iscoroutine(seen):
            seen = await seen
        if good(seen):
            return seen
        assert time.monotonic() < deadline, f"still: {seen!r}"
        await asyncio.sleep(0.01)


def namespace(pid: int, kind: str) -> int:
    return Path(f"/proc/{pid}/ns/{kind}").stat().st_ino


# -- how it ends


async def test_runtimes_are_proved(engine: OCIEngine) -> None:
    ready = [each for each in engine.runtimes() if each.ready]
    assert ready
    assert engine.runtimes()[0].ready
    assert all(each.version for each in ready)


@pytest.mark.parametrize(("status", "reason"), [(0, "Completed"), (3, "Error")])
async def test_exit_status(make: Make, status: int, reason: str) -> None:
    ended, _ = await make(container(f"exit {status}")).run()
    assert (ended.status, ended.signal, ended.reason) == (status, 0, reason)


async def test_a_signal_is_told_apart(make: Make) -> None:
    box = make(container("sleep 1000"))
    pids = await box.start()
    os.kill(pids["main"], signal.SIGKILL)
    ended = await box.wait()
    assert (ended.status, ended.signal, ended.reason) == (137, 9, "Signaled")


async def test_out_of_memory_is_told_apart(make: Make) -> None:
    box = make(container("x=a; while :; do x=$x$x; done", resources=pb.Resources(memory_bytes=16 * MIB)))
    ended, _ = await box.run()
    assert (ended.status, ended.signal, ended.reason) == (137, 9, "OOMKilled")


async def test_term_reaches_the_program(make: Make) -> None:
    box = make(container("trap 'exit 7' TERM; echo ready; while :; do sleep 0.02; done"))
    await box.start()
    await box.said("ready")
    await box.engine.kill(box.id, "main", 0, signal.SIGTERM)
    ended = await box.wait()
    assert (ended.status, ended.reason) == (7, "Error")


async def test_kill_of_what_has_ended_is_success(make: Make) -> None:
    box = make(container("exit 0"))
    await box.run()
    await box.engine.kill(box.id, "main", 0, signal.SIGKILL)
    assert (await box.wait()).reason == "Completed"


async def test_many_may_wait(make: Make) -> None:
    box = make(container("sleep 0.1; exit 4"))
    await box.start()
    ends = await asyncio.gather(*(box.wait() for _ in range(8)))
    assert {each.status for each in ends} == {4}


async def test_the_sandbox_process_ends_by_a_signal(make: Make) -> None:
    box = make()
    pids = await box.start()
    waiting = asyncio.create_task(box.wait(SANDBOX_PROCESS))
    state = await box.engine.inspect(box.id, SANDBOX_PROCESS, 0)
    assert state.pid == pids[SANDBOX_PROCESS]
    await box.engine.kill(box.id, SANDBOX_PROCESS, 0, signal.SIGTERM)
    ended = await waiting
    assert (ended.status, ended.reason) == (143, "Signaled")
    state = await box.engine.inspect(box.id, SANDBOX_PROCESS, 0)
    assert state.exit is not None
    assert state.exit.reason == "Signaled"


async def test_a_sandbox_process_that_others_end_is_lost(make: Make) -> None:
    box = make()
    pids = await box.start()
    os.kill(pids[SANDBOX_PROCESS], signal.SIGKILL)
    assert (await box.wait(SANDBOX_PROCESS)).reason == "SandboxLost"


async def test_an_exit_that_nobody_saw_is_lost(make: Make) -> None:
    box = make(container("sleep 1000"))
    pids = await box.start()
    for pid in [*witnesses(box, pids["main"]), pids["main"]]:
        with contextlib.suppress(ProcessLookupError):  # containerd ends what has lost its shim
            os.kill(pid, signal.SIGKILL)
    assert (await box.wait()).reason == "SandboxLost"


def witnesses(box: Box, pid: int) -> list[int]:
    """Who would see it end: its monitor, and the shim of containerd that it is a child of."""
    monitor = monitor_of(box)
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return [monitor] if parent in (monitor, os.getpid()) else [monitor, parent]


def monitor_of(box: Box) -> int:
    made = box.engine._containers
    found = made._monitor(made.folder(box.id).container("main").attempt(0))
    assert found is not None
    return found.pid


async def test_removal_answers_who_waits(make: Make) -> None:
    box = make(container("sleep 1000"))
    await box.start()
    waiting = [asyncio.create_task(box.wait(name)) for name in ("main", SANDBOX_PROCESS)]
    await asyncio.sleep(0)
    await box.engine.remove(box.id)
    ends = await asyncio.gather(*waiting)
    assert ends[1].reason == "Signaled"


# -- starting


async def test_an_unknown_command_is_a_start_error(make: Make) -> None:
    box = make(container(command=["/no/such/program"]))
    await box.prepare()
    await box.engine.start(box.id, box.config)
    with pytest.raises(EngineError, match="no/such/program") as caught:
        await box.engine.start_container(box.id, box.config, "main", 0)
    assert caught.value.reason == "StartError"


async def test_every_step_may_be_repeated(make: Make) -> None:
    box = make(container("sleep 1000"))
    assert await box.start() == await box.start()


async def test_a_restart_has_a_fresh_root(make: Make) -> None:
    box = make(container("echo run; test -e /mark && exit 5; touch /mark; exit 1"))
    await box.run()
    await box.engine.start_container(box.id, box.config, "main", 1)
    assert (await box.wait(attempt=1)).status == 1
    assert await box.output() == "run\nrun\n"


async def test_an_unknown_runtime_is_refused(engine: OCIEngine) -> None:
    box = Box(engine, pb.SandboxConfig(runtime="nosuch", containers=[container("true")]))
    with pytest.raises(EngineError, match="nosuch") as caught:
        await box.prepare()
    assert caught.value.reason == "RuntimeNotFound"


async def test_a_caller_that_gives_up_leaves_nothing(make: Make) -> None:
    box = make(container("sleep 1000"))
    await box.prepare()
    await box.engine.start(box.id, box.config)
    starting = asyncio.create_task(box.engine.start_container(box.id, box.config, "main", 0))
    await asyncio.sleep(0)
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    await box.engine.remove(box.id)


async def test_remove_is_repeatable_and_takes_unknown_ids(make: Make) -> None:
    box = make(container("sleep 1000"))
    await box.start()
    assert box.id in await box.engine.list()
    await box.engine.remove(box.id)
    await box.engine.remove(box.id)
    await box.engine.remove(f"{uuid.uuid4()}-1")
    assert box.id not in await box.engine.list()


# -- what containers share and what they may


async def test_containers_share_namespaces_and_volumes(make: Make) -> None:
    mount = [pb.VolumeMount(name="data", mount_path="/data")]
    box = make(
        container("echo hello >/data/word; sleep 1000", name="writer", volume_mounts=mount),
        container(
            "until test -s /data/word; do sleep 0.01; done; cat /data/word; sleep 1000",
            name="reader",
            volume_mounts=mount,
        ),
        volumes=[pb.Volume(name="data")],
    )
    pids = await box.start()
    for kind in ("net", "ipc", "uts"):
        assert namespace(pids["writer"], kind) == namespace(pids["reader"], kind)
        assert namespace(pids["writer"], kind) != namespace(os.getpid(), kind)
    for kind in ("pid", "mnt"):
        assert namespace(pids["writer"], kind) != namespace(pids["reader"], kind)
    await box.said("hello", "reader")


async def test_a_memory_volume_is_bounded(make: Make) -> None:
    box = make(
        container(
            "dd if=/dev/zero of=/data/x bs=1M count=8; cat /proc/mounts",
            volume_mounts=[pb.VolumeMount(name="data", mount_path="/data")],
        ),
        volumes=[pb.Volume(name="data", memory=True, size_limit_bytes=2 * MIB)],
    )
    _, output = await box.run()
    assert "No space left" in output
    assert any(" /data tmpfs " in line and "nosuid" in line for line in output.splitlines())


async def test_a_memory_volume_may_be_the_shared_memory(make: Make) -> None:
    box = make(
        container(
            "grep ' /dev/shm ' /proc/mounts; df -k /dev/shm",
            volume_mounts=[pb.VolumeMount(name="shm", mount_path="/dev/shm")],
        ),
        volumes=[pb.Volume(name="shm", memory=True, size_limit_bytes=3 * MIB)],
    )
    ended, output = await box.run()
    assert ended.status == 0, output
    assert "size=3072k" in output
    assert output.count(" /dev/shm ") == 1


async def test_a_volume_may_be_inside_another(make: Make) -> None:
    box = make(
        container(
            "touch /srv/inner/low /srv/high; ls /srv/inner; cat /etc/hostname",
            volume_mounts=[
                pb.VolumeMount(name="low", mount_path="/srv/inner"),
                pb.VolumeMount(name="high", mount_path="/srv"),
                pb.VolumeMount(name="etc", mount_path="/etc"),
            ],
        ),
        volumes=[pb.Volume(name="low"), pb.Volume(name="high"), pb.Volume(name="etc")],
        hostname="green",
    )
    _, output = await box.run()
    assert output.split() == ["low", "green"]


async def test_a_sub_path_cannot_leave_its_volume(make: Make) -> None:
    mount = pb.VolumeMount(name="data", mount_path="/data")
    through = pb.VolumeMount(name="data", mount_path="/data", sub_path="out")
    box = make(
        container("ln -s / /data/out", name="first", volume_mounts=[mount]),
        container("ls /data", name="second", volume_mounts=[through]),
        volumes=[pb.Volume(name="data")],
    )
    await box.prepare()
    await box.engine.start(box.id, box.config)
    await box.engine.start_container(box.id, box.config, "first", 0)
    await box.wait("first")
    with pytest.raises(EngineError, match="subPath") as caught:
        await box.engine.start_container(box.id, box.config, "second", 0)
    assert caught.value.reason == "InvalidConfig"


def limits_of(pid: int) -> dict[str, str]:
    """The limit files of the cgroup that a process is in."""
    points: dict[str, str] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(maxsplit=2)
        if kind == "cgroup2":
            points[""] = left.split()[4]
        for word in options.split(",") if kind == "cgroup" else ():
            points[word] = left.split()[4]
    found: dict[str, str] = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            for name in ("pids.max", "memory.max", "memory.limit_in_bytes", "cpu.max", "cpu.cfs_quota_us"):
                file = Path(points.get(controller, "/nowhere") + path, name)
                if file.exists():
                    found[name] = file.read_text().strip()
    return found


async def test_limits_are_set_in_the_cgroup(make: Make) -> None:
    limits = pb.Resources(cpu_millis=250, memory_bytes=32 * MIB, pids=17)
    box = make(container("sleep 1000", resources=limits), container("sleep 1000", name="plain"))
    pids = await box.start()
    found, plain = limits_of(pids["main"]), limits_of(pids["plain"])
    assert found["pids.max"] == "17"
    assert found.get("memory.max", found.get("memory.limit_in_bytes")) == str(32 * MIB)
    assert found.get("cpu.max", found.get("cpu.cfs_quota_us", "")).split()[0] == "25000"
    defaults = OCISettings()
    assert plain["pids.max"] == str(defaults.default_pids)
    assert plain.get("memory.max", plain.get("memory.limit_in_bytes")) == str(defaults.default_memory_bytes)
    # What the runtime ran in it to start them may still be there for a moment.
    used = await until(lambda: box.engine.usage(box.id), lambda used: used is not None and used.pids == 2)
    assert used.memory_bytes > 0


async def test_what_outlives_the_shim_is_not_in_its_cgroups(make: Make, folder: Path) -> None:
    box = make(container("sleep 1000"))
    pids = await box.start()
    pid = pids[SANDBOX_PROCESS]
    monitors = f"/test-engine-{folder.name}/{MONITORS}"

    def elsewhere() -> list[str]:
        """Hierarchies in which it is not; v2 beside v1, too."""
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        return [line for line in lines if not line.endswith(f":{monitors}")]

    assert await until(elsewhere, lambda found: not found, seconds=60.0) == []


async def test_the_defences_are_on(make: Make) -> None:
    # Not every kernel has each of them.
    masked = [path for path in spec.MASKED_PATHS if Path(path).exists()]
    peek = "; ".join(f"ls -A {path} 2>&1 | grep -v {path}; cat {path} 2>/dev/null" for path in masked)
    script = f"cat /proc/self/status; ls /sys/class/net; {{ {peek}; }} | wc -c"
    _, output = await make(container(script)).run()
    status = dict(line.split(":\t") for line in output.splitlines() if ":\t" in line)
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == mask(spec.DEFAULT_CAPABILITIES)
    assert int(status["CapInh"], 16) == 0
    interface, behind_masks = output.splitlines()[-2:]
    assert interface == "lo"
    assert ":\t" in output.splitlines()[-3]
    assert behind_masks == "0"


CAPABILITY_BITS = {
    **dict(
        zip(
            ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL"),
            (0, 1, 3, 4, 5),
            strict=True,
        )
    ),
    **dict(
        zip(("CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE"), (6, 7, 8, 10), strict=True)
    ),
    **dict(zip(("CAP_NET_RAW", "CAP_SYS_CHROOT", "CAP_SETFCAP"), (13, 18, 31), strict=True)),
}


def mask(capabilities: frozenset[str]) -> int:
    return sum(1 << CAPABILITY_BITS[name] for name in capabilities)


async def test_capabilities_are_dropped_and_added(make: Make) -> None:
    context = pb.SecurityContext(capabilities_drop=["ALL"], capabilities_add=["NET_RAW"])
    _, output = await make(container("grep CapEff /proc/self/status", security_context=context)).run()
    assert int(output.split()[1], 16) == 1 << 13


@pytest.mark.parametrize(
    "script",
    [
        "unshare -U true",  # by seccomp: user namespaces need CAP_SYS_ADMIN
        "mount -t tmpfs none /tmp",
        "echo 1 >/proc/sys/kernel/sysrq",
        "echo b >/proc/sysrq-trigger",
        "mknod /tmp/x b 8 0",
        "if test -d /sys/fs/cgroup/pids; then mkdir /sys/fs/cgroup/pids/x; else mkdir /sys/fs/cgroup/x; fi",
        "echo x >/etc/hosts",
    ],
)
async def test_it_is_not_allowed(make: Make, script: str) -> None:
    ended, _ = await make(container(f"({script}) 2>/dev/null && exit 99; exit 42")).run()
    assert ended.status == 42


async def test_the_filter_is_the_same_for_each_container(make: Make) -> None:
    """crun is given the filter that it compiled for the first."""
    for _ in range(2):
        ended, _ = await make(
            container("unshare -U true && exit 99; unshare -i true && exit 98; exit 42")
        ).run()
        assert ended.status == 42


async def test_hostname(make: Make) -> None:
    box = make(container("hostname; cat /etc/hostname; echo $HOSTNAME"), hostname="green")
    assert (await box.run())[1].split() == ["green"] * 3


async def test_a_read_only_root(make: Make) -> None:
    context = pb.SecurityContext(read_only_root_filesystem=True)
    ended, output = await make(container("touch /x", security_context=context)).run()
    assert ended.status == 1
    assert "Read-only file system" in output


async def test_run_as_user(make: Make) -> None:
    context = pb.SecurityContext(run_as_user=1234, run_as_group=567)
    _, output = await make(container("id -u; id -g; umask", security_context=context)).run()
    assert output.split()[:2] == ["1234", "567"]


async def test_root_is_refused_where_none_may_be(make: Make) -> None:
    box = make(container("id", security_context=pb.SecurityContext(run_as_non_root=True)))
    with pytest.raises(EngineError, match="runAsNonRoot") as caught:
        await box.prepare()
    assert caught.value.reason == "InvalidConfig"


async def test_environment_and_working_directory(make: Make) -> None:
    env = [pb.EnvVar(name="WORD", value="a b=c")]
    _, output = await make(container('pwd; echo "$WORD"', working_dir="/tmp", env=env)).run()
    assert output == "/tmp\na b=c\n"


async def test_host_network_needs_the_nodes_leave(make: Make) -> None:
    box = make(container("true"), network=pb.NETWORK_HOST)
    with pytest.raises(EngineError, match="network"):
        await box.prepare()


# -- pause, exec, logs

COUNTING = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done"


async def test_pause_and_resume(make: Make) -> None:
    box = make(container(COUNTING))
    await box.start()
    await box.said("3\n")
    await box.engine.pause(box.id)
    before = await until(box.output, lambda _: True)
    await asyncio.sleep(0.2)  # not to wait for something: to see that nothing comes
    seen = await box.output()
    assert len(seen.split()) <= len(before.split()) + 1  # conmon may still have had a line
    await box.engine.pause(box.id)
    with pytest.raises(EngineError, match="paused"):
        await execute(box, ["true"])
    await box.engine.resume(box.id)
    await until(box.output, lambda output: len(output) > len(seen))


async def test_a_paused_container_can_be_killed(make: Make) -> None:
    box = make(container("sleep 1000"))
    await box.start()
    await box.engine.pause(box.id)
    await box.engine.kill(box.id, "main", 0, signal.SIGKILL)
    assert (await box.wait()).signal == 9


async def test_a_paused_sandbox_can_be_removed(make: Make) -> None:
    box = make(container("sleep 1000"))
    await box.start()
    await box.engine.pause(box.id)
    await box.engine.remove(box.id)


async def execute(
    box: Box, command: list[str], *, tty: bool = False, data: bytes | None = None
) -> tuple[int, dict[str, bytes]]:
    size = (101, 33) if tty else None
    session = await box.engine.exec(
        box.id, "main", 0, command, tty=tty, stdin=data is not None or tty, size=size
    )
    try:
        typing = asyncio.create_task(type_in(session, data))
        found = {"stdout": b"", "stderr": b""}
        async for stream, piece in session.output():
            found[stream] += piece
        await typing
        return await asyncio.wait_for(session.wait(), 10), found
    finally:
        await session.kill()


async def type_in(session: ExecSession, data: bytes | None) -> None:
    """Beside the reading of the output: a program that echoes would stand still otherwise."""
    if data is not None:
        await session.write_stdin(data)
        await session.close_stdin()


async def test_exec(make: Make) -> None:
    box = make(container("sleep 1000"))
    await box.start()
    status, found = await execute(box, ["sh", "-c", "echo out; echo err >&2; exit 9"])
    assert (status, found) == (9, {"stdout": b"out\n", "stderr": b"err\n"})
    status, found = await execute(box, ["cat"], data=b"x" * 300_000)
    assert (status, len(found["stdout"])) == (0, 300_000)
    # crun 1.8 gives the terminal its size at times only when the program runs already.
    waits = "test -t 0 && until stty size 2>/dev/null | grep -q '^33 101'; do :; done && echo sized"
    status, found = await execute(box, ["sh", "-c", waits], tty=True)
    assert (status, b"sized" in found["stdout"]) == (0, True)
    status, found = await execute(box, ["grep", "-E", "Seccomp:|NoNewPrivs:|CapEff:", "/proc/self/status"])
    confined = dict(line.split(b":\t") for line in found["stdout"].splitlines())
    assert confined[b"Seccomp"] == b"2"
    assert confined[b"NoNewPrivs"] == b"1"
    assert int(confined[b"CapEff"], 16) == mask(spec.DEFAULT_CAPABILITIES)


async def test_exec_of_an_unknown_command_ends(make: Make) -> None:
    box = make(container("sleep 1000"))
    await box.start()
    status, _ = await execute(box, ["/no/such/program"])
    assert status != 0


async def test_an_exec_can_be_killed(make: Make) -> None:
    box = make(container("sleep 1000"))
    await box.start()
    session = await box.engine.exec(
        box.id, "main", 0, ["sh", "-c", "echo on; sleep 1000"], tty=False, stdin=False, size=None
    )
    output = session.output()
    assert await anext(output) == ("stdout", b"on\n")
    await session.kill()
    await session.kill()
    assert await session.wait() != 0
    await output.aclose()  # type: ignore[attr-defined]


async def test_logs_keep_order_and_lines(make: Make) -> None:
    box = make(container("for i in 1 2 3 4 5; do echo line $i; done; printf end"))
    _, output = await box.run()
    assert output == "line 1\nline 2\nline 3\nline 4\nline 5\nend"
    assert await box.output(tail_lines=2) == "line 5\nend"
    first = (await box.output(timestamps=True)).splitlines()[0]
    stamp, _, text = first.partition(" ")
    assert text == "line 1"
    assert stamp.startswith("20")


async def test_logs_are_followed_to_the_end(make: Make) -> None:
    box = make(container("for i in 1 2 3; do echo $i; sleep 0.05; done"))
    await box.start()
    following = asyncio.create_task(box.output(follow=True))
    await box.wait()
    await box.engine.kill(box.id, SANDBOX_PROCESS, 0, signal.SIGKILL)
    assert await asyncio.wait_for(following, 10) == "1\n2\n3\n"


async def test_logs_are_bounded(make: Make, folder: Path) -> None:
    box = make(
        container("i=0; while test $i -lt 6000; do i=$((i+1)); echo line $i is quite a long one; done")
    )
    await box.run()
    files = list((folder / "state").glob(f"*/sandboxes/{box.id}/main.*/log*"))
    assert 0 < sum(each.stat().st_size for each in files) <= LOG_BYTES
    assert (await box.output()).endswith("line 6000 is quite a long one\n")


# -- the shim is killed

KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from sandkeeper.shim.main import make_engine
from sandkeeper.wire import node_pb2 as pb
from tests.integration.test_engines import settings_in

async def main():
    engine = make_engine(settings_in(Path(sys.argv[1])))
    await engine.open()
    config = pb.SandboxConfig.FromString(bytes.fromhex(sys.argv[3]))
    await engine.prepare(sys.argv[2], config, lambda *_: None)
    await engine.start(sys.argv[2], config)
    for each in config.containers:
        await engine.start_container(sys.argv[2], config, each.name, 0)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def started_by_a_killed_shim(box: Box, folder: Path) -> None:
    arguments = [str(folder), box.id, box.config.SerializeToString().hex()]
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, *arguments, cwd=Path(__file__).parents[2]
    )
    assert await asyncio.wait_for(child.wait(), 30) == -signal.SIGKILL


async def test_a_killed_shims_sandboxes_are_found(make: Make, folder: Path) -> None:
    box = make(
        container("while ! test -e /stop; do sleep 0.02; done; exit 6"),
        container("exit 5", name="short"),
    )
    await started_by_a_killed_shim(box, folder)
    assert (await box.wait("short")).status == 5
    pid = (await box.engine.inspect(box.id, "main", 0)).pid
    assert pid > 0
    assert (await box.engine.inspect(box.id, SANDBOX_PROCESS, 0)).pid > 0
    assert await box.start() == {
        SANDBOX_PROCESS: (await box.engine.inspect(box.id, SANDBOX_PROCESS, 0)).pid,
        "main": pid,
        "short": (await box.start())["short"],
    }
    await execute(box, ["touch", "/stop"])
    assert (await box.wait()).status == 6


async def test_a_new_engine_goes_on(make: Make, folder: Path) -> None:
    """What the first engine started, a second over the same folder pauses, restarts and removes."""
    box = make(container("sleep 1000"), container("exit 5", name="short"))
    pids = await box.start()
    again = make_engine(settings_in(folder))
    assert isinstance(again, OCIEngine)
    await again.open()
    try:
        second = Box(again, box.config, box.id)
        assert box.id in await again.list()
        assert (await second.wait("short")).status == 5
        assert (await again.inspect(box.id, "main", 0)).pid == pids["main"]
        await again.start_container(box.id, box.config, "short", 1)
        assert (await second.wait("short", 1)).status == 5
        await again.pause(box.id)
        await again.remove(box.id)
    finally:
        await again.close()
