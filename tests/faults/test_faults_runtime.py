"""F4: the runtime or conmon fails, hangs, talks nonsense, is killed, or does what it says it did not."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster import condition_of, eventually, leaks_of
from tests.counted import ONE_SANDBOX, counted, end, processes, run_of, runs, starts
from tests.faults.brokentools import BrokenTools
from tests.faults.network import Network, Trial, broken_network, sandbox
from tests.faults.oracle import wanted
from tests.faults.workload import RUNNING
from tests.histories import Object, kstatus

from sandkeeper.localcluster.processes import ProcessDied

pytestmark = [pytest.mark.cluster, pytest.mark.oci, pytest.mark.fault("F4")]

NODE = "node-1"
AGAIN = {"recreate": "OnFailure", "limit": 50, "backoffSeconds": 1}
NOT_STARTED = wanted("Failed", "False StartError", exited="128 StartError", Stalled="True")
TIMEOUT = 2.0
FAILING = [
    *(("create", mode) for mode in ("fail", "hang", "garbage", "killed", "lies", "idle", "endless")),
    *(("start", mode) for mode in ("fail", "hang", "garbage", "killed", "lies", "endless")),
    *(("conmon", mode) for mode in ("fail", "hang", "killed", "dies", "idle", "babbles")),
    *(("conmon", f"says-{words}") for words in ("", "{}", "[1]", '{"data": -1}', '{"data": 1}', "x" * 5000)),
]
QUICK = {("start", "killed"), ("conmon", "hang")}


@pytest.fixture(scope="module")
def tools() -> Iterator[BrokenTools]:
    folder = Path(tempfile.mkdtemp(prefix="sbx-tools-"))
    try:
        yield BrokenTools(folder, "crun")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def network(tools: BrokenTools) -> Iterator[Network]:
    env = {
        "OCI__RUNTIMES": json.dumps([str(tools.runtime)]),
        "OCI__CONMON": str(tools.conmon),
        "OCI__RUNTIME_TIMEOUT": str(TIMEOUT),
        "RESTART_BACKOFF": "0.2",
    }
    with broken_network(shims=1, engine="oci", shim_env=env) as made:
        yield made


@pytest.fixture
def trial(network: Network, tools: BrokenTools) -> Iterator[Trial]:
    """Nothing is left of any process, whatever it was that hung or lied."""
    with network.trial() as made:
        try:
            yield made
        finally:
            tools.mend()
            if not network.local.processes.alive(NODE):
                network.local.start_shim(0)
    leaks_of(network.local, 0).assert_none()


def running(body: Object) -> bool:
    return bool(body) and kstatus(body) == "Current" and bool(body["status"].get("pid"))


def alone(trial: Trial, name: str) -> None:
    """It runs, once."""
    found = processes(trial.get(name)["status"]["sandboxID"])
    assert len(found) == len(ONE_SANDBOX), found


def case(command: str, mode: str, *, quick: bool) -> object:
    marks = [] if quick else [pytest.mark.thorough]
    return pytest.param(command, mode, marks=marks, id=f"{command}-{mode[:20]}")


@pytest.mark.parametrize(("command", "mode"), [case(*each, quick=each in QUICK) for each in FAILING])
def test_a_start_that_fails_says_why_and_the_next_one_is_as_good_as_ever(
    trial: Trial, tools: BrokenTools, command: str, mode: str
) -> None:
    tools.set(command, mode)
    trial.make(sandbox("bad"), sandbox("tries", failurePolicy=AGAIN))
    bad = trial.until("bad", lambda body: condition_of(body, "Stalled").get("status") == "True")
    assert condition_of(bad, "Ready")["message"]
    assert trial.user.until_event("bad", "StartError")["type"] == "Warning"
    trial.until("tries", lambda body: body["status"].get("instance", 0) >= 2)
    tools.mend()
    trial.make(sandbox("good"))
    trial.until("good", running)
    tries = trial.until("tries", running)["status"]["instance"]
    trial.oracle().assert_right(
        {
            "bad": NOT_STARTED,
            "tries": wanted("Running", "True Running", instance=tries, on_node="RUNNING"),
            "good": RUNNING,
        }
    )
    alone(trial, "good")
    alone(trial, "tries")


@pytest.mark.parametrize(
    "command",
    [pytest.param(each, marks=pytest.mark.thorough) for each in ("create", "start", "conmon")],
)
def test_a_start_that_is_only_noisy_works(trial: Trial, tools: BrokenTools, command: str) -> None:
    tools.set(command, "noisy")
    trial.make(sandbox("one"))
    trial.oracle().assert_right({"one": RUNNING})


@pytest.mark.parametrize(
    ("command", "mode"),
    [
        case(command, mode, quick=(command, mode) == ("delete", "fail"))
        for command in ("delete", "create", "start", "conmon")
        for mode in ("fail", "once-fail", "hang", "once-hang", "lies", "killed", "noisy")
        if command == "delete" or mode.startswith("once")
    ],
)
def test_a_restart_goes_through_a_runtime_that_fails_at_it(
    trial: Trial, tools: BrokenTools, command: str, mode: str
) -> None:
    """What fails at the start of the next attempt counts as an end of it."""
    trial.make(counted("again", restartPolicy="OnFailure"), counted("beside"))
    body = trial.until("again", running)
    beside = run_of(trial.network.local, trial.until("beside", running))
    tools.set(command, mode)
    end(trial.network.local, body, 3)
    restarts = 1 if command == "delete" else 2
    trial.until(
        "again", lambda found: found["status"]["containers"][0]["restartCount"] == restarts and running(found)
    )
    tools.mend()
    trial.oracle().assert_right({"again": RUNNING, "beside": RUNNING})
    assert run_of(trial.network.local, trial.get("beside")) == beside
    assert starts(trial.network.local, trial.get("again")) == 2
    alone(trial, "again")


@pytest.mark.parametrize("mode", ["fail", pytest.param("hang", marks=pytest.mark.thorough)])
def test_no_runtime_is_needed_to_stop_and_to_remove(trial: Trial, tools: BrokenTools, mode: str) -> None:
    trial.make(*(sandbox(name) for name in ("stops", "leaves", "pauses")))
    for name in ("stops", "leaves", "pauses"):
        trial.until(name, running)
    for command in ("kill", "delete", "state", "pause", "resume", "create", "start", "conmon"):
        tools.set(command, mode)
    trial.user.patch("stops", {"spec": {"desiredState": "Stopped"}})
    trial.user.patch("pauses", {"spec": {"desiredState": "Paused"}})
    trial.user.delete("leaves")
    trial.oracle().assert_right(
        {
            "stops": wanted("Stopped", "True Stopped", exited="137 Stopped"),
            "leaves": None,
            "pauses": wanted("Paused", "True Paused", on_node="PAUSED"),
        }
    )


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(each, marks=pytest.mark.thorough)
        for each in ("fail", "hang", "garbage", "killed", "idle")
    ],
)
def test_a_start_that_was_cut_off_is_made_again_though_the_runtime_cannot_tell_its_state(
    trial: Trial, tools: BrokenTools, mode: str
) -> None:
    """The shim is killed between create and start; afterwards `state` is of no help."""
    local = trial.network.local
    local.processes.stop(NODE)
    local.start_shim(0, env={"OCI__RUNTIME_TIMEOUT": "60"})
    tools.set("start", "once-hang")
    trial.make(counted("cut"))
    eventually(lambda: tools.met("start"))
    local.kill_shim(0)
    tools.set("state", mode)
    local.start_shim(0)
    trial.oracle().assert_right({"cut": RUNNING})
    alone(trial, "cut")
    assert starts(local, trial.get("cut")) == 1


@pytest.mark.thorough
def test_a_start_that_hangs_holds_up_no_other(trial: Trial, tools: BrokenTools) -> None:
    local = trial.network.local
    local.processes.stop(NODE)
    local.start_shim(0, env={"OCI__RUNTIME_TIMEOUT": "15"})
    for number in range(3):
        tools.set("start", "once-hang")
        trial.make(sandbox(f"hangs-{number}"))
        eventually(lambda: tools.met("start"))
    trial.make(*(sandbox(f"good-{number}") for number in range(10)))
    for number in range(10):
        trial.until(f"good-{number}", running)
    assert not any(condition_of(trial.get(f"hangs-{number}"), "Stalled") for number in range(3))
    trial.oracle().assert_right(
        {f"hangs-{number}": NOT_STARTED for number in range(3)}
        | {f"good-{number}": RUNNING for number in range(10)}
    )


@pytest.mark.thorough
def test_a_shim_that_finds_no_runtime_serves_nothing_and_ends_nothing(
    trial: Trial, tools: BrokenTools
) -> None:
    local = trial.network.local
    trial.make(counted("stays"))
    body = trial.until("stays", running)
    before = run_of(local, body)
    local.processes.stop(NODE)
    tools.set("run", "fail")
    with pytest.raises(ProcessDied, match="no luck today"):
        local.start_shim(0)
    trial.until("stays", lambda found: condition_of(found, "Ready")["reason"] == "NodeUnreachable")
    assert runs(body)
    tools.mend()
    local.start_shim(0)
    trial.oracle().assert_right({"stays": RUNNING})
    assert run_of(local, trial.get("stays")) == before
