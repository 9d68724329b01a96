"""F12: a node's records are damaged while its shim is away; its disk is full, or slow."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster import eventually, leaks_of
from tests.counted import ONE_SANDBOX, counted, end, processes, run_of, runs
from tests.faults.network import Network, Trial, broken_network, sandbox
from tests.faults.oracle import wanted
from tests.faults.workload import END, RUNNING, Workload
from tests.histories import Object, kstatus

from sandkeeper.localcluster.cluster import OPERATOR, LocalCluster
from sandkeeper.shim.engines.oci import kernel
from sandkeeper.wire import node_pb2

pytestmark = [pytest.mark.cluster, pytest.mark.oci, pytest.mark.fault("F12")]

NODE = "node-1"
DISK = "24m"
AGAIN = {"recreate": "OnFailure", "limit": 3, "backoffSeconds": 2}
LOST = wanted("Failed", "False SandboxLost", exited="None SandboxLost", Stalled="True")
NEXT = wanted("Running", "True Running", instance=2, on_node="RUNNING")


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").touch()


def _another(path: Path) -> None:
    """The intact file of another object's sandbox."""
    uid = path.parent.name.rpartition("-")[0]
    path.write_text(path.read_text().replace(uid, str(uuid.uuid4())))


def _bare(path: Path) -> None:
    """What can be read and names this sandbox, and says nothing of it."""
    record = {"record": {"sandboxId": path.parent.name}, "asked": {"stop_at": 0, "removing": False}}
    path.write_text(json.dumps(record))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": _truncated,
    "empty": lambda path: path.write_bytes(b""),
    "random": lambda path: path.write_bytes(bytes(range(256)) * 3),
    "another shape": lambda path: path.write_text('{"record": [], "asked": 7, "containers": {}}'),
    "a list": lambda path: path.write_text("[]"),
    "a folder": _folder,
    "removed": Path.unlink,
    "another's": _another,
    "bare": _bare,
}
QUICK = ("bare",)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """One node whose state is on a small disk of its own, and on which what has ended stays for a while."""
    with broken_network(shims=1, engine="oci", operator_env={"RETENTION": "3600"}) as made:
        local = made.local
        local.processes.stop(NODE)
        state = local.node_folder(0) / "state"
        shutil.rmtree(state)
        state.mkdir()
        kernel.mount("tmpfs", str(state), "tmpfs", 0, f"size={DISK}")
        try:
            local.start_shim(0)
            yield made
            eventually(lambda: not left(local), seen=lambda: left(local))
        finally:
            local.processes.stop(NODE)
            kernel.umount(str(state), kernel.MNT_DETACH)
            state.rmdir()


def left(local: LocalCluster) -> list[str]:
    disk = f"mount {local.node_folder(0) / 'state'} "
    return [each for each in leaks_of(local, 0).found() if not each.startswith(disk)]


@pytest.fixture
def trial(network: Network) -> Iterator[Trial]:
    local = network.local
    with network.trial() as made:
        try:
            yield made
        finally:
            if not local.processes.alive(NODE):
                local.start_shim(0)
            local.start_operator()


def records(trial: Trial, name: str) -> Path:
    return state_of(trial) / "sandboxes" / sandbox_id(trial, name)


def engines(trial: Trial, name: str) -> list[Path]:
    roots = (state_of(trial), trial.network.local.run_folder(0))
    return [root / "oci" / "sandboxes" / sandbox_id(trial, name) for root in roots]


def state_of(trial: Trial) -> Path:
    return trial.network.local.node_folder(0) / "state"


def sandbox_id(trial: Trial, name: str) -> str:
    return str(trial.get(name)["status"]["sandboxID"])


def running(body: Object) -> bool:
    return bool(body) and body["status"].get("phase") == "Running" and kstatus(body) == "Current"


# Damaged records


@pytest.mark.parametrize(
    "damage", [each if each in QUICK else pytest.param(each, marks=pytest.mark.thorough) for each in DAMAGES]
)
def test_a_sandbox_whose_record_is_damaged_is_lost_and_no_other(trial: Trial, damage: str) -> None:
    local, spoil = trial.network.local, DAMAGES[damage]
    for file in ("record", "config"):
        trial.make(
            counted(f"{file}-never"),
            counted(f"{file}-again", failurePolicy=AGAIN),
            sandbox(f"{file}-ended", "sh", "-c", "exit 3"),
        )
    trial.make(counted("kept"), sandbox("kept-ended", "sh", "-c", "exit 4"))
    lost = {f"{file}-{name}": file for file in ("record", "config") for name in ("never", "again")}
    ended = {f"{file}-ended": file for file in ("record", "config")}
    before = {name: trial.until(name, running) for name in (*lost, "kept")}
    for name in (*ended, "kept-ended"):
        trial.until(name, lambda body: "exitedAt" in body["status"])
    kept = run_of(local, before["kept"])

    local.kill_shim(0)
    assert all(map(runs, before.values()))
    for name, file in (lost | ended).items():
        spoil(records(trial, name) / f"{file}.json")
    local.start_shim(0)

    for name in lost:
        assert processes(before[name]["status"]["sandboxID"]) == []
    trial.oracle().assert_right(
        {name: NEXT if "again" in name else LOST for name in lost}
        | {name: wanted("Failed", "False Error", exited="3 Error", Stalled="True") for name in ended}
        | {
            "kept": RUNNING,
            "kept-ended": wanted("Failed", "False Error", exited="4 Error", Stalled="True", on_node="EXITED"),
        }
    )
    assert run_of(local, trial.get("kept")) == kept


@pytest.mark.thorough
def test_an_exit_that_nothing_but_the_damaged_record_knew_is_told_as_lost(trial: Trial) -> None:
    local = trial.network.local
    trial.make(counted("never"), counted("again", failurePolicy=AGAIN))
    bodies = {name: trial.until(name, running) for name in ("never", "again")}
    local.processes.stop(OPERATOR)
    for body in bodies.values():
        end(local, body, 5)
    for body in bodies.values():
        eventually(lambda body=body: _state(trial, body) == node_pb2.STATE_EXITED)
    local.kill_shim(0)
    for name in bodies:
        _truncated(records(trial, name) / "record.json")
    local.start_shim(0)
    local.start_operator()
    trial.oracle().assert_right({"never": LOST, "again": NEXT})


ENGINE_FILES = (
    "prepared.json",
    "starting",
    "process.json",
    "main.0/started.json",
    "main.0/config.json",
    "main.0/pid",
    "main.0/conmon.pid",
)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(each, marks=pytest.mark.thorough)
        for each in ("empty", "another shape", "a folder", "removed")
    ],
)
def test_what_the_engine_noted_is_found_again_in_the_kernel(trial: Trial, damage: str) -> None:
    """Damage beside the records costs no sandbox that runs, its exit is known, and nothing is left of it."""
    local, spoil = trial.network.local, DAMAGES[damage]
    files = {file.rpartition("/")[2].replace(".", "-"): file for file in ENGINE_FILES}
    trial.make(*(counted(name) for name in files))
    before = {name: trial.until(name, running) for name in files}
    runs_before = {name: run_of(local, body) for name, body in before.items()}
    local.kill_shim(0)
    for name, file in files.items():
        spoil(next(folder / file for folder in engines(trial, name) if (folder / file).exists()))
    local.start_shim(0)
    oracle = trial.oracle()
    oracle.until(dict.fromkeys(files, RUNNING))
    assert {name: run_of(local, trial.get(name)) for name in files} == runs_before
    for body in before.values():
        end(local, body, 5)
    ended = wanted("Failed", "False Error", exited="5 Error", Stalled="True", on_node="EXITED")
    oracle.assert_right(dict.fromkeys(files, ended))
    for name in files:
        trial.user.delete(name)
    for name, body in before.items():
        trial.until(name, lambda found: not found)
        assert processes(body["status"]["sandboxID"]) == []


def _state(trial: Trial, body: Object) -> int:
    return trial.network.shims.lives(body["metadata"]["uid"])[-1].record.state


# A full disk


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Not one page is free on the file system of a folder; whatever is freed meanwhile may be used again."""
    ballast = folder / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        with pytest.raises(OSError, match="No space left"):
            (folder / "probe").write_bytes(b"x")
        (folder / "probe").unlink()
        yield
    finally:
        ballast.unlink()


WORKS = "trap 'exit 4' USR1; while :; do sleep 0.05; done"


def worker(name: str, **spec: Any) -> Object:
    """Ends with 4 when its first process gets SIGUSR1: no disk is needed for that."""
    return sandbox(name, "sh", "-c", WORKS, **spec)


def container_pid(body: Object) -> int:
    return int(body["status"]["containers"][0]["pid"])


@pytest.mark.parametrize("away", ["", pytest.param("away", marks=pytest.mark.thorough)])
def test_a_disk_that_is_full_for_a_while_loses_no_exit_and_leaves_no_half(trial: Trial, away: str) -> None:
    """away: the shim is killed while the disk is full, and started again when it is not."""
    local, user = trial.network.local, trial.user
    names = ("stays", "stops", "leaves")
    trial.make(
        *(sandbox(name) for name in names),
        *(worker(name) for name in ("ends", "killed")),
        worker("again", restartPolicy="OnFailure"),
        worker("replaced", failurePolicy=AGAIN),
    )
    bodies = {name: trial.until(name, running) for name in (*names, "ends", "killed", "again", "replaced")}
    with full_disk(state_of(trial)):
        if away:
            local.kill_shim(0)
        for name in ("ends", "again", "replaced"):
            os.kill(container_pid(bodies[name]), signal.SIGUSR1)
        os.kill(container_pid(bodies["killed"]), signal.SIGKILL)
        user.delete("leaves")
        user.patch("stops", {"spec": {"desiredState": "Stopped"}})
        trial.make(sandbox("comes"), sandbox("brief", "sh", "-c", "exit 6"))
        for name in ("ends", "killed", "again", "replaced"):
            eventually(lambda name=name: _gone(container_pid(bodies[name])))
        trial.until("comes", lambda body: body["metadata"].get("finalizers"))
    if away:
        local.start_shim(0)
    trial.oracle().assert_right(
        {
            "stays": RUNNING,
            "stops": wanted("Stopped", "True Stopped", exited="137 Stopped", on_node="EXITED"),
            "leaves": None,
            "ends": wanted("Failed", "False Error", exited="4 Error", Stalled="True", on_node="EXITED"),
            "killed": wanted(
                "Failed", "False Signaled", exited="137 Signaled", Stalled="True", on_node="EXITED"
            ),
            "again": RUNNING,
            "replaced": NEXT,
            "comes": RUNNING,
            "brief": wanted("Failed", "False Error", exited="6 Error", Stalled="True", on_node="EXITED"),
        }
    )
    assert trial.get("again")["status"]["containers"][0]["restartCount"] == 1
    for name in ("stays", "again", "replaced", "comes"):
        assert len(processes(sandbox_id(trial, name))) == len(ONE_SANDBOX)


def _gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    "failpoints",
    [
        pytest.param(
            {"record_create": "delay(0.5)", "record_save": "delay(0.5)", "fence": "delay(0.5)"},
            marks=pytest.mark.thorough,
        ),
        pytest.param({"record_save": "3*off->5*error(disk)"}, marks=pytest.mark.thorough),
        pytest.param(
            {"record_remove": "2*error(disk)", "fence": "2*error(disk)"}, marks=pytest.mark.thorough
        ),
    ],
    ids=["slow", "fails now and then", "forgets nothing at first"],
)
def test_a_slow_or_failing_disk_costs_time_and_nothing_else(trial: Trial, failpoints: dict[str, str]) -> None:
    local = trial.network.local
    local.processes.stop(NODE)
    local.start_shim(0, env={"FAILPOINTS": json.dumps(failpoints)})
    try:
        work = Workload(trial)
        work.begin()
        work.go_on()
        trial.oracle().assert_right(
            {
                name: body and ({**body, "on node": ["EXITED"]} if "exit" in body else body)
                for name, body in END.items()
            }
        )
    finally:
        local.restart_shim(0)
