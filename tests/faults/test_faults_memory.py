"""F18: the kernel ends a process for want of memory: a container's, the sandbox process, conmon, the shim."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster import eventually, leaks_of
from tests.counted import ONE_SANDBOX, counted, end, processes, run_of, starts
from tests.faults.network import Network, Trial, broken_network, sandbox
from tests.faults.oracle import wanted
from tests.faults.supervisor import Supervisor
from tests.faults.workload import END, RUNNING, Workload
from tests.histories import Object, kstatus

from sandkeeper.localcluster.processes import start_time

pytestmark = [pytest.mark.cluster, pytest.mark.oci, pytest.mark.fault("F18")]

NODE = "node-1"
MEMORY = Path("/sys/fs/cgroup/memory")
AGAIN = {"recreate": "OnFailure", "limit": 1, "backoffSeconds": 2}
LOST = wanted("Failed", "False SandboxLost", exited="None SandboxLost", Stalled="True")
NEXT = wanted("Running", "True Running", instance=2, on_node="RUNNING")
GREEDY = "tail /dev/zero"
# Greedy at its first start only.
ONCE = "test -e /data/greedy && exec sleep 86400; touch /data/greedy; exec tail /dev/zero"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with broken_network(shims=1, engine="oci", shim_env={"RESTART_BACKOFF": "0.2"}) as made:
        yield made
        leaks_of(made.local, 0).assert_none()


@pytest.fixture
def trial(network: Network) -> Iterator[Trial]:
    with network.trial() as made:
        try:
            yield made
        finally:
            if not network.local.processes.alive(NODE):
                network.local.start_shim(0)


def running(body: Object) -> bool:
    return bool(body) and kstatus(body) == "Current" and bool(body["status"].get("pid"))


def with_data(body: Object) -> Object:
    body["spec"]["volumes"] = [{"name": "data", "emptyDir": {}}]
    body["spec"]["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
    return body


def killed(instance: int = 1) -> Object:
    return wanted("Failed", "False OOMKilled", exited="137 OOMKilled", Stalled="True", instance=instance)


def monitor_of(body: Object) -> int:
    """The container's conmon."""
    stat = Path(f"/proc/{body['status']['containers'][0]['pid']}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


# A container


def test_a_container_that_wants_too_much_ends_for_that_reason_and_no_other_does(trial: Trial) -> None:
    pair = with_data(sandbox("pair", "sh", "-c", GREEDY))
    beside = {**pair["spec"]["containers"][0], "name": "beside", "command": ["sleep", "86400"]}
    pair["spec"]["containers"].append(beside)
    trial.make(
        counted("beside"),
        pair,
        sandbox("never", "sh", "-c", GREEDY),
        sandbox("again", "sh", "-c", GREEDY, failurePolicy=AGAIN),
        with_data(sandbox("restarts", "sh", "-c", ONCE, restartPolicy="OnFailure")),
    )
    before = run_of(trial.network.local, trial.until("beside", running))
    restarted = trial.until(
        "restarts", lambda body: running(body) and body["status"]["containers"][0]["restartCount"] == 1
    )
    oracle = trial.oracle()
    oracle.assert_right(
        {"never": killed(), "again": killed(2), "restarts": RUNNING, "beside": RUNNING, "pair": RUNNING}
    )
    assert restarted["status"]["containers"][0]["exitReason"] == "OOMKilled"
    assert [each["state"] for each in trial.get("pair")["status"]["containers"]] == ["Exited", "Running"]
    assert trial.get("pair")["status"]["containers"][0]["exitReason"] == "OOMKilled"
    assert run_of(trial.network.local, trial.get("beside")) == before


# What holds it


@pytest.mark.parametrize("away", ["", pytest.param("away", marks=pytest.mark.thorough)])
def test_without_its_sandbox_process_a_sandbox_is_lost_whole(trial: Trial, away: str) -> None:
    """away: it happens while the shim is killed as well."""
    local = trial.network.local
    trial.make(
        counted("never"), counted("again", failurePolicy=AGAIN), counted("always", restartPolicy="Always")
    )
    before = {name: trial.until(name, running) for name in ("never", "again", "always")}
    if away:
        local.kill_shim(0)
    for body in before.values():
        os.kill(body["status"]["pid"], signal.SIGKILL)
    if away:
        local.start_shim(0)
    trial.oracle().assert_right({"never": LOST, "always": LOST, "again": NEXT})
    for body in before.values():
        assert processes(body["status"]["sandboxID"]) == []


@pytest.mark.parametrize("away", ["", pytest.param("away", marks=pytest.mark.thorough)])
def test_without_its_monitor_a_container_runs_on_and_its_end_is_known(trial: Trial, away: str) -> None:
    """How it ended nobody can say any more."""
    local = trial.network.local
    names = ("stays", "ends", "again", "stops", "leaves", "restarts")
    policies = {"again": {"failurePolicy": AGAIN}, "restarts": {"restartPolicy": "OnFailure"}}
    trial.make(*(counted(name, **policies.get(name, {})) for name in names))
    before = {name: trial.until(name, running) for name in names}
    stays = run_of(local, before["stays"])
    for body in before.values():
        monitor = monitor_of(body)
        os.kill(monitor, signal.SIGKILL)
        eventually(lambda monitor=monitor: start_time(monitor) is None)
    if away:
        local.kill_shim(0)
    for name in ("ends", "again", "restarts"):
        end(local, before[name], 0)
    trial.user.patch("stops", {"spec": {"desiredState": "Stopped"}})
    trial.user.delete("leaves")
    if away:
        local.start_shim(0)
    trial.oracle().assert_right(
        {
            "stays": RUNNING,
            "ends": LOST,
            "again": NEXT,
            "restarts": RUNNING,
            "stops": wanted("Stopped", "True Stopped", exited="255 Stopped"),
            "leaves": None,
        }
    )
    assert run_of(local, trial.get("stays")) == stays
    assert starts(local, trial.get("restarts")) == 2
    assert processes(trial.get("restarts")["status"]["sandboxID"]) == ONE_SANDBOX
    for name in ("ends", "again", "stops", "leaves"):
        assert processes(before[name]["status"]["sandboxID"]) == []


# The shim


@contextlib.contextmanager
def memory_cgroup(pid: int, limit: int) -> Iterator[Path]:
    """What this process takes from now on may be so many bytes in all. v1: what it has is another cgroup's."""
    folder = MEMORY / f"test-shim-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        (folder / "cgroup.procs").write_text(str(pid))
        yield folder
    finally:
        for left in (folder / "cgroup.procs").read_text().split():
            (MEMORY / "cgroup.procs").write_text(left)
        eventually(lambda: _removed(folder))


def _removed(cgroup: Path) -> bool:
    with contextlib.suppress(OSError):
        cgroup.rmdir()
    return not cgroup.exists()


def test_a_shim_that_gets_no_memory_comes_back_to_all_that_it_had(trial: Trial) -> None:
    if not (MEMORY / "memory.limit_in_bytes").exists():
        pytest.skip("the memory controller is not cgroup v1's: what the shim has already would count")
    local = trial.network.local
    work = Workload(trial)
    work.begin()
    pid = local.processes.pid(NODE)
    assert pid is not None
    with memory_cgroup(pid, 1024 * 1024) as cgroup, Supervisor(local) as supervisor:
        trial.make(*(sandbox(f"more-{number}") for number in range(10)))
        eventually(lambda: supervisor.deaths[NODE], timeout=60)
        assert "oom_kill 0" not in (cgroup / "memory.oom_control").read_text()
        work.go_on()
        for number in range(10):
            trial.user.delete(f"more-{number}")
        trial.oracle().assert_right({**END, **{f"more-{number}": None for number in range(10)}})
    assert supervisor.deaths == {NODE: 1}
