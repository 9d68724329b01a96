"""F11: a node's machine is restarted. Its records are there, all else is gone, and pids mean other processes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster import eventually, leaks_of
from tests.counted import ONE_SANDBOX, counted, end, processes
from tests.faults import reboot
from tests.faults.network import Network, Trial, broken_network, sandbox
from tests.faults.oracle import wanted
from tests.faults.workload import RUNNING
from tests.histories import Object, kstatus

from sandkeeper.localcluster.cluster import OPERATOR, LocalCluster
from sandkeeper.localcluster.processes import start_time
from sandkeeper.wire import node_pb2

pytestmark = [pytest.mark.cluster, pytest.mark.oci, pytest.mark.fault("F11")]

NODE = "node-1"
AGAIN = {"recreate": "OnFailure", "limit": 3, "backoffSeconds": 2}
LOST = wanted("Failed", "False SandboxLost", exited="None SandboxLost", Stalled="True", on_node="EXITED")
NEXT = wanted("Running", "True Running", instance=2, on_node="RUNNING")
STOPPED = wanted("Stopped", "True Stopped", exited="None SandboxLost", on_node="EXITED", Finished="True")


def exited(status: int, reason: str = "Error") -> Object:
    return wanted("Failed", f"False {reason}", exited=f"{status} {reason}", Stalled="True", on_node="EXITED")


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """One node, on which what has ended stays for a while."""
    with broken_network(shims=1, engine="oci", operator_env={"RETENTION": "3600"}) as made:
        yield made
        leaks_of(made.local, 0).assert_none()


@pytest.fixture
def trial(network: Network) -> Iterator[Trial]:
    """Its sandboxes go before the machine's true boot id is back: they are of another."""
    local = network.local
    try:
        with network.trial() as made:
            try:
                yield made
            finally:
                if not local.processes.alive(NODE):
                    boot(local)
                local.start_operator()
    finally:
        local.processes.stop(NODE)
        local.start_shim(0)


def running(body: Object) -> bool:
    return bool(body) and kstatus(body) == "Current" and bool(body["status"].get("pid"))


def restart(local: LocalCluster, *, spared: frozenset[int] = frozenset(), **start: Any) -> None:
    """The shim's own process is killed already."""
    reboot.power_off(local.cgroup_parent(0), local.run_folder(0), spared)
    boot(local, **start)


def boot(local: LocalCluster, **start: Any) -> None:
    local.start_shim(0, under=reboot.run_booted(reboot.new_boot(local.folder)), **start)


def pids(body: Object) -> dict[str, int]:
    """Of its sandbox process, its container and the monitor of that."""
    container = int(body["status"]["containers"][0]["pid"])
    parent = Path(f"/proc/{container}/stat").read_text().rpartition(")")[2].split()[1]
    return {"sandbox": int(body["status"]["pid"]), "container": container, "monitor": int(parent)}


def test_what_ran_is_lost_and_what_had_ended_is_known(trial: Trial) -> None:
    local, user = trial.network.local, trial.user
    trial.make(
        *(counted(name) for name in ("never", "unseen", "leaves", "stops", "changes")),
        counted("again", failurePolicy=AGAIN),
        counted("restarts", restartPolicy="Always"),
        counted("pauses", desiredState="Paused", failurePolicy=AGAIN),
        sandbox("ended", "sh", "-c", "exit 3"),
        sandbox("completed", "true"),
    )
    names = ("never", "unseen", "leaves", "stops", "changes", "again", "restarts", "pauses")
    before = {name: trial.until(name, running) for name in names}
    for name in ("ended", "completed"):
        trial.until(name, lambda body: "exitedAt" in body["status"])
    exit_before = {name: trial.get(name)["status"]["exitedAt"] for name in ("ended", "completed")}
    local.kill_shim(0)
    end(local, before["unseen"], 5)
    eventually(lambda: "conmon" not in processes(before["unseen"]["status"]["sandboxID"]))
    user.delete("leaves")
    user.patch("stops", {"spec": {"desiredState": "Stopped"}})
    trial.make(counted("changes", hostname="other"))
    restart(local)
    trial.oracle().assert_right(
        {
            "never": LOST,
            "restarts": LOST,
            "again": NEXT,
            "pauses": wanted("Paused", "True Paused", instance=2, on_node="PAUSED"),
            "unseen": exited(5),
            "ended": exited(3),
            "completed": wanted("Succeeded", "True Completed", exited="0 Completed", on_node="EXITED"),
            "leaves": None,
            "stops": STOPPED,
            "changes": NEXT,
        }
    )
    assert {name: trial.get(name)["status"]["exitedAt"] for name in exit_before} == exit_before
    for name in ("again", "pauses", "changes"):
        assert processes(trial.get(name)["status"]["sandboxID"]) == ONE_SANDBOX
    for body in before.values():
        assert processes(body["status"]["sandboxID"]) == []


def test_a_pid_that_is_another_processs_now_is_never_signalled(trial: Trial) -> None:
    """Three pids of the record have been given to strangers; a fourth process has its pid and its start time too."""
    local = trial.network.local
    trial.make(counted("strangers", failurePolicy=AGAIN), counted("twin"), counted("deleted"))
    names = ("strangers", "twin", "deleted")
    before = {name: pids(trial.until(name, running)) for name in names}
    ids = {name: trial.get(name)["status"]["sandboxID"] for name in names}
    twin = before["twin"]["sandbox"]
    local.kill_shim(0)
    trial.user.delete("deleted")
    reboot.power_off(local.cgroup_parent(0), local.run_folder(0), frozenset({twin}))
    with contextlib.ExitStack() as stack:
        stack.callback(reboot.kill, twin)
        taken = [*before["strangers"].values(), *before["deleted"].values()]
        try:
            strangers = [stack.enter_context(reboot.with_pid(pid)) for pid in taken]
        except OSError as error:
            pytest.skip(str(error))
        since = {pid: start_time(pid) for pid in (*taken, twin)}
        boot(local)
        oracle = trial.oracle()
        oracle.until({"strangers": NEXT, "twin": LOST, "deleted": None})
        trial.user.delete("twin")
        trial.user.delete("strangers")
        oracle.assert_right(dict.fromkeys(names))
        assert {pid: start_time(pid) for pid in since} == since
        assert all(each.poll() is None for each in strangers)
    for sandbox_id in ids.values():
        assert processes(sandbox_id) == []


@pytest.mark.thorough
def test_a_machine_that_restarts_again_and_again(trial: Trial) -> None:
    """Each time the next instance, until failurePolicy has had enough; what was only recorded starts for the first
    time."""
    local = trial.network.local
    trial.make(counted("again", failurePolicy={**AGAIN, "limit": 2}), sandbox("always", failurePolicy=AGAIN))
    for instance in (1, 2, 3):
        for name in ("again", "always"):
            trial.until(name, lambda body, n=instance: body["status"].get("instance") == n and running(body))
        local.kill_shim(0)
        if instance == 3:
            trial.make(sandbox("late"))
        restart(local)
    trial.oracle().assert_right(
        {
            "again": {**LOST, "instance": 3},
            "always": wanted("Running", "True Running", instance=4, on_node="RUNNING"),
            "late": RUNNING,
        }
    )


@pytest.mark.thorough
def test_a_machine_that_restarts_between_create_and_start(trial: Trial) -> None:
    local = trial.network.local
    local.processes.stop(NODE)
    local.start_shim(0, env={"FAILPOINTS": json.dumps({"start": "error(cut)"})})
    trial.make(sandbox("one"), sandbox("other"))
    for name in ("one", "other"):
        eventually(lambda name=name: _states(trial, name) == [node_pb2.STATE_CREATED])
    trial.user.delete("other")
    local.kill_shim(0)
    restart(local)
    trial.oracle().assert_right({"one": RUNNING, "other": None})


@pytest.mark.thorough
def test_the_operator_restarts_with_the_machine(trial: Trial) -> None:
    local = trial.network.local
    trial.make(
        counted("never"), counted("again", failurePolicy=AGAIN), sandbox("ended", "sh", "-c", "exit 3")
    )
    for name in ("never", "again"):
        trial.until(name, running)
    trial.until("ended", lambda body: "exitedAt" in body["status"])
    local.kill_operator()
    local.kill_shim(0)
    reboot.power_off(local.cgroup_parent(0), local.run_folder(0))
    local.start_operator(ready=False)
    boot(local)
    local.start_operator()
    trial.oracle().assert_right({"never": LOST, "again": NEXT, "ended": exited(3)})
    assert local.processes.alive(OPERATOR)


def _states(trial: Trial, name: str) -> list[int]:
    if not trial.get(name):
        return []
    return [life.record.state for life in trial.network.shims.present(trial.uid(name))]
