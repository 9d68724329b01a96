"""The containerd engine with a real containerd: what it shares with no other engine."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.containerds import containerd, import_images
from tests.integration.test_engines import Box, container, execute, monitor_of, until
from tests.leaks import Leaks

from sandkeeper.localcluster.containerd import Containerd
from sandkeeper.localcluster.containerd_sources import SOURCES, Source
from sandkeeper.localcluster.ocilayout import busybox_image, write_layout
from sandkeeper.shim.engines.base import SANDBOX_PROCESS, EngineError
from sandkeeper.shim.engines.containerd import ContainerdEngine, ttrpc
from sandkeeper.shim.engines.containerd.images import ContainerdImages
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.shim.settings import ContainerdSettings, OCISettings, ShimSettings
from sandkeeper.wire import node_pb2 as pb

pytestmark = [pytest.mark.oci, pytest.mark.asyncio(loop_scope="module")]

IMAGE = "docker.io/library/busybox:1.37"
IMPORTED = "example.test/imported:1"
NAMESPACE = "sandkeeper"


@dataclass
class Node:
    """A containerd, and the settings of a shim for it."""

    daemon: Containerd
    settings: ShimSettings
    leaks: Leaks
    engines: list[ContainerdEngine] = field(default_factory=list)

    async def engine(self) -> ContainerdEngine:
        """Another shim's engine over the same folders; closed at the end."""
        made = ContainerdEngine(self.settings)
        await made.open()
        self.engines.append(made)
        return made

    def ctr(self, *arguments: str) -> str:
        return self.daemon.ctr(*arguments, namespace=NAMESPACE)


@contextlib.contextmanager
def node_with(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp(f"ctrd-{source}-{os.getpid()}-")
    write_layout(folder / "layout", {IMAGE: busybox_image()})
    parent = f"test-{folder.name}"
    with containerd(source) as daemon:
        settings = ShimSettings(
            node_name="test",
            state_dir=folder / "state",
            run_dir=folder / "run",
            engine="containerd",
            containerd=ContainerdSettings(socket=daemon.socket),
            oci=OCISettings(runtimes=("runc",), image_layouts=(folder / "layout",), cgroup_parent=parent),
        )
        leaks = Leaks(folder, parent)
        yield Node(daemon, settings, leaks)
        leaks.assert_none()
    # A containerd that a test has started again was in the engine's cgroup, as the test was.
    Cgroups(parent, hide_v2=False).close()


@pytest.fixture(scope="module", params=SOURCES)
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with node_with(request.param, tmp_path_factory) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(node: Node) -> AsyncIterator[ContainerdEngine]:
    made = await node.engine()
    yield made
    for each in reversed(node.engines):  # each goes back to where it came from
        await each.close()


Make = Callable[..., Box]


@contextlib.asynccontextmanager
async def boxes(node: Node, engine: ContainerdEngine) -> AsyncIterator[Make]:
    """Makes sandboxes; removes them, and looks that nothing is left, in containerd neither."""
    made: list[Box] = []

    def box(*containers: pb.ContainerConfig, **fields: Any) -> Box:
        owner = pb.Owner(namespace="default", name="box", uid="u", instance=1)
        made.append(Box(engine, pb.SandboxConfig(owner=owner, containers=containers, **fields)))
        return made[-1]

    yield box
    if node.daemon.pid is None:
        node.daemon.start()
    for each in made:
        await until(functools.partial(gone, each), bool, 60.0)
    assert await engine.list() == frozenset()
    node.leaks.assert_none()
    assert left_in(node) == []


@pytest_asyncio.fixture(loop_scope="module")
async def make(node: Node, engine: ContainerdEngine) -> AsyncIterator[Make]:
    async with boxes(node, engine) as made:
        yield made


async def gone(box: Box) -> bool:
    """Removed; not as long as containerd, just started, does not answer."""
    try:
        await box.engine.remove(box.id)
    except EngineError as error:
        if not error.retryable:
            raise
        return False
    return True


def left_in(node: Node) -> list[str]:
    """Whatever containerd has that is no image's."""
    found = [f"container {each}" for each in node.ctr("containers", "list", "--quiet").split()]
    found += [f"task {line}" for line in node.ctr("tasks", "list").splitlines()[1:]]
    found += [f"lease {each}" for each in node.ctr("leases", "list", "--quiet").split()]
    snapshots = [line.split() for line in node.ctr("snapshots", "list").splitlines()[1:]]
    found += [f"snapshot {words[0]}" for words in snapshots if words[-1] != "Committed"]
    found += [f"shim {pid}" for pid in node.daemon.shims()]
    return found


# -- images and what holds them


async def test_an_image_that_others_have_imported_is_used(make: Make, node: Node) -> None:
    import_images(node.daemon, {IMPORTED: busybox_image()}, NAMESPACE)
    box = make(container("echo here", image=IMPORTED, image_pull_policy=pb.IMAGE_PULL_POLICY_NEVER))
    ended, output = await box.run()
    assert (ended.status, output) == (0, "here\n")


async def test_an_image_in_use_may_be_removed_and_nothing_stays_of_it(make: Make, node: Node) -> None:
    box = make(container("sleep 1000"), container("exit 2", name="again"))
    await box.start()
    for name in node.ctr("images", "list", "--quiet").split():
        node.ctr("images", "remove", "--sync", name)
    await box.wait("again")
    await box.engine.start_container(box.id, box.config, "again", 1)
    assert (await box.wait("again", 1)).status == 2
    status, found = await execute(box, ["ls", "/bin/sh"])
    assert (status, found["stdout"]) == (0, b"/bin/sh\n")
    await box.engine.remove(box.id)
    assert node.ctr("snapshots", "list").splitlines()[1:] == []
    assert node.ctr("content", "list", "--quiet").split() == []
    again = make(container("exit 3"))  # it is fetched anew
    ended, _ = await again.run()
    assert ended.status == 3


async def test_an_image_that_is_not_there_and_never_pulled_is_refused(make: Make) -> None:
    never = container("true", image="example.test/nowhere:1", image_pull_policy=pb.IMAGE_PULL_POLICY_NEVER)
    with pytest.raises(EngineError) as caught:
        await make(never).prepare()
    assert (caught.value.reason, caught.value.retryable) == ("ErrImageNeverPull", False)


async def test_images_that_nothing_uses_go_when_the_disk_is_full(
    make: Make, node: Node, engine: ContainerdEngine, tmp_path: Path
) -> None:
    box = make(container("true"))
    digests = await engine.prepare(box.id, box.config, lambda *_: None)
    import_images(node.daemon, {IMPORTED: busybox_image()}, NAMESPACE)
    store = ContainerdImages(
        engine._client, "overlayfs", node.settings.oci, tmp_path,
        clock=lambda: time.time() + 1000, disk_usage=lambda _: 99.0,
    )  # fmt: skip
    store.snapshots = tmp_path
    await store.collect(frozenset(digests.values()))
    kept = node.ctr("images", "list", "--quiet").split()
    assert IMAGE in kept
    await store.collect(frozenset())
    assert node.ctr("images", "list", "--quiet").split() == []
    # What a sandbox has prepared is held by its lease all the same.
    await box.engine.start(box.id, box.config)
    await box.engine.start_container(box.id, box.config, "main", 0)
    assert (await box.wait()).status == 0


# -- tasks


async def test_a_sandbox_has_one_shim_of_containerd(make: Make, node: Node) -> None:
    box = make(container("exit 4", name="first"), container("sleep 1000", name="second"))
    await box.start()
    assert len(node.daemon.shims()) == 1
    # The one that the shim was started for goes, and comes again.
    assert (await box.wait("first")).status == 4
    await box.engine.start_container(box.id, box.config, "first", 1)
    assert (await box.wait("first", 1)).status == 4
    await box.engine.start_container(box.id, box.config, "first", 2)
    session = await box.engine.exec(box.id, "second", 0, ["echo", "on"], tty=False, stdin=False, size=None)
    assert [piece async for piece in session.output()] == [("stdout", b"on\n")]
    assert await session.wait() == 0
    await session.kill()
    assert len(node.daemon.shims()) == 1


async def test_the_socket_of_its_shim_goes_with_it(make: Make, node: Node) -> None:
    box = make(container("sleep 1000"), container("exit 0", name="other"))
    await box.start()
    bundles = node.daemon.state.glob("io.containerd.runtime.v2.task/*/*")
    found = {Path(address.path) for each in bundles if (address := ttrpc.Address.in_bundle(each))}
    assert [each.is_socket() for each in found] == [True]
    await box.engine.remove(box.id)
    assert [each.exists() for each in found] == [False]


async def test_a_name_longer_than_containerds(make: Make) -> None:
    name = "a" * 63
    box = make(container("echo long; sleep 1000", name=name))
    await box.start()
    await box.said("long\n", name)


# -- containerd goes away


async def test_sandboxes_go_on_over_a_restart(make: Make, node: Node) -> None:
    box = make(container("echo one; sleep 1000"), container("exit 5", name="short"))
    pids = await box.start()
    assert (await box.wait("short")).status == 5
    node.daemon.kill()
    assert (await box.engine.inspect(box.id, "main", 0)).pid == pids["main"]
    assert (await box.engine.inspect(box.id, SANDBOX_PROCESS, 0)).pid == pids[SANDBOX_PROCESS]
    assert await box.engine.usage(box.id) is not None
    await box.said("one\n")
    node.daemon.start()
    assert (await box.engine.inspect(box.id, "main", 0)).pid == pids["main"]
    assert (await box.wait("short")).status == 5
    status, found = await patient_exec(box, ["echo", "again"])
    assert (status, found["stdout"]) == (0, b"again\n")


async def patient_exec(box: Box, command: list[str]) -> tuple[int, dict[str, bytes]]:
    """Also where containerd has just been started, and the connection to it not yet."""

    async def attempt() -> tuple[int, dict[str, bytes]] | None:
        with contextlib.suppress(EngineError):
            return await execute(box, command)
        return None

    found: tuple[int, dict[str, bytes]] = await until(attempt, lambda found: found is not None, 60.0)
    return found


async def test_an_exit_while_containerd_is_away_is_seen_at_once(make: Make, node: Node) -> None:
    box = make(
        container("sleep 1000"),
        container("trap 'exit 6' TERM; echo ready; while :; do sleep 0.02; done", name="trap"),
    )
    await box.start()
    await box.said("ready\n", "trap")
    node.daemon.kill()
    await box.engine.kill(box.id, "main", 0, signal.SIGKILL)
    await box.engine.kill(box.id, "trap", 0, signal.SIGTERM)
    assert (await box.wait()).signal == 9
    assert (await box.wait("trap")).status == 6
    node.daemon.start()
    assert (await box.wait("trap")).status == 6


async def test_an_exit_while_containerd_and_the_shim_are_away_is_found(make: Make, node: Node) -> None:
    """By the monitor, before a containerd that comes back throws it away."""
    box = make(container("mkfifo /tmp/go; echo ready; cat /tmp/go; exit 7"))
    await box.start()
    await box.said("ready\n")
    fifo = Path(f"/proc/{(await box.engine.inspect(box.id, 'main', 0)).pid}/root/tmp/go")
    node.daemon.kill()
    fifo.write_text("")  # nobody of ours waits for it: `wait` has not been called
    await until(lambda: exit_file(box), Path.exists, 60.0)
    node.daemon.start()
    node.daemon.restart()
    again = await node.engine()
    second = Box(again, box.config, box.id)
    assert (await second.wait()).status == 7


def exit_file(box: Box) -> Path:
    return Path(box.engine._options.root_dir) / "sandboxes" / box.id / "main.0" / f"{box.id}.main.0"


async def test_starts_and_removals_wait_for_containerd(make: Make, node: Node) -> None:
    box = make(container("sleep 1000"))
    await box.prepare()
    await box.engine.start(box.id, box.config)
    node.daemon.kill()
    with pytest.raises(EngineError) as caught:
        await box.engine.start_container(box.id, box.config, "main", 0)
    assert caught.value.passes
    assert await box.engine.list() == {box.id}
    with pytest.raises(EngineError) as caught:
        await box.engine.remove(box.id)
    assert caught.value.retryable
    node.daemon.start()
    await until(lambda: gone(box), bool, 60.0)
    assert left_in(node) == []


async def test_an_exit_is_known_without_its_monitor(make: Make) -> None:
    box = make(container("mkfifo /tmp/go; echo ready; cat /tmp/go; exit 8"))
    await box.start()
    await box.said("ready\n")
    pid = (await box.engine.inspect(box.id, "main", 0)).pid
    os.kill(monitor_of(box), signal.SIGKILL)
    Path(f"/proc/{pid}/root/tmp/go").write_text("")
    assert (await box.wait()).status == 8


async def test_a_program_does_not_wait_for_its_log(make: Make) -> None:
    """One that prints more than a fifo holds, and nobody of the shim's own process reads."""
    box = make(container("i=0; while test $i -lt 20000; do i=$((i+1)); echo line $i; done; exit 9"))
    await box.start()
    assert (await box.wait()).status == 9
    assert (await box.output(tail_lines=1)) == "line 20000\n"


# -- which containerd it is


async def test_no_containerd_is_named_with_what_to_do(node: Node, tmp_path: Path) -> None:
    chosen = ContainerdSettings(socket=tmp_path / "nowhere.sock")
    engine = ContainerdEngine(node.settings.model_copy(update={"containerd": chosen}))
    with pytest.raises(EngineError, match=r"nowhere\.sock is not there.*containerd\.socket"):
        await engine.open()


async def test_an_unknown_snapshotter_is_named(node: Node) -> None:
    chosen = ContainerdSettings(socket=node.daemon.socket, snapshotter="nosuch")
    engine = ContainerdEngine(node.settings.model_copy(update={"containerd": chosen}))
    with pytest.raises(EngineError, match="nosuch"):
        await engine.open()


async def test_another_snapshotter_serves_as_well(node: Node) -> None:
    """containerd's `native`: copies, no overlay."""
    folder = Path(node.settings.state_dir).parent / "native"
    chosen = ContainerdSettings(socket=node.daemon.socket, snapshotter="native", namespace="second")
    settings = node.settings.model_copy(
        update={"containerd": chosen, "state_dir": folder / "state", "run_dir": folder / "run"}
    )
    engine = ContainerdEngine(settings)
    await engine.open()
    box = Box(
        engine, pb.SandboxConfig(containers=[container("echo native >/x; cat /x")]), f"{uuid.uuid4()}-1"
    )
    try:
        ended, output = await box.run()
        assert (ended.status, output) == (0, "native\n")
    finally:
        await engine.remove(box.id)
        await engine.close()


async def test_what_is_found_at_the_start(engine: ContainerdEngine) -> None:
    (info,) = engine.runtimes()
    assert (info.name, info.ready) == ("runc", True)
    assert await asyncio.wait_for(engine.list(), 10) == frozenset()
