"""Operator and shim killed, or answered with an error, at each of their effects.

Every run is the same scenario: the workload with one effect that fails once. It must end as it does without a fault.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import pytest
from tests.faults.network import Network, broken_network, sandbox
from tests.faults.oracle import Oracle
from tests.faults.supervisor import Supervisor
from tests.faults.workload import END, RUNNING, Workload

from sandkeeper.control.faults import EFFECTS as OPERATOR_EFFECTS
from sandkeeper.localcluster.cluster import OPERATOR
from sandkeeper.shim.faults import EFFECTS as SHIM_EFFECTS

pytestmark = pytest.mark.cluster

KILLED_BEFORE, KILLED_AFTER, FAILED, LOST = "panic", "panic(after)", "error(cut)", "lose(cut)"
NODE = "node-1"
QUICK = {
    ("assign", KILLED_AFTER),
    ("create", KILLED_AFTER),
    ("start", KILLED_AFTER),
    ("start", LOST),
    ("write_status", KILLED_BEFORE),
    ("shutdown", LOST),
    ("release", KILLED_BEFORE),
}
QUICK_SHIM = {
    ("record_create", KILLED_AFTER),
    ("start", KILLED_AFTER),
    ("start_container", KILLED_BEFORE),
    ("record_save", FAILED),
    ("remove", KILLED_AFTER),
}


class Scenario(Workload):
    """The workload, with what else has effects of its own: the node changes, one is resumed, one expires."""

    def begin(self) -> None:
        for closed in (True, False):
            change = json.dumps({"spec": {"unschedulable": closed}})
            self.trial.user.run("patch", "sandboxnode", NODE, "--type=merge", "-p", change)
        super().begin()
        self.trial.make(
            sandbox("resumes", desiredState="Paused"), sandbox("expires", "true", ttlSecondsAfterFinished=0)
        )
        self.trial.until("resumes", lambda body: body["status"].get("phase") == "Paused")

    def go_on(self) -> None:
        self.trial.user.patch("resumes", {"spec": {"desiredState": "Running"}})
        super().go_on()

    def assert_right(self, oracle: Oracle | None = None, *, timeout: float = 60.0) -> None:
        (oracle or self.trial.oracle()).assert_right(
            {**END, "resumes": RUNNING, "expires": None}, timeout=timeout
        )


@pytest.fixture(scope="module")
def simulated() -> Iterator[Network]:
    with broken_network(shims=1) as network:
        yield network


@pytest.fixture(scope="module")
def real() -> Iterator[Network]:
    with broken_network(shims=1, engine="oci") as network:
        yield network


def cases(effects: Mapping[str, str], hows: tuple[str, ...], quick: set[tuple[str, str]]) -> list[object]:
    """Each effect in each way, at its first time and at a later one."""
    found = []
    for effect in effects:
        for how in hows:
            for after in (0, 3):
                marks = [] if after == 0 and (effect, how) in quick else [pytest.mark.thorough]
                terms = f"{after}*off->1*{how}" if after else f"1*{how}"
                found.append(pytest.param(effect, terms, marks=marks, id=f"{effect}-{terms}"))
    return found


def run(network: Network, *, operator: Mapping[str, str], shim: Mapping[str, str]) -> Supervisor:
    """The scenario with faults; returns who died."""
    local = network.local
    if operator:
        local.processes.stop(OPERATOR)
    if shim:
        local.processes.stop(NODE)
        local.start_shim(0, env={"FAILPOINTS": json.dumps(shim)})
    if operator:
        local.start_operator(env={"FAILPOINTS": json.dumps(operator)}, ready=False)
    with network.trial() as trial, Supervisor(local) as supervisor:
        scenario = Scenario(trial)
        scenario.begin()
        scenario.go_on()
        scenario.assert_right()
    return supervisor


def assert_died(supervisor: Supervisor, name: str, terms: str) -> None:
    """The fault happened: what was to be killed has died once, what was to fail has not."""
    assert supervisor.deaths[name] == (1 if "panic" in terms else 0), f"{name} at {terms}"


@pytest.mark.fault("F1")
@pytest.mark.parametrize(("effect", "terms"), cases(OPERATOR_EFFECTS, (KILLED_BEFORE, KILLED_AFTER), QUICK))
def test_the_operator_is_killed_at_an_effect(simulated: Network, effect: str, terms: str) -> None:
    assert_died(run(simulated, operator={effect: terms}, shim={}), OPERATOR, terms)


@pytest.mark.fault("F5")
@pytest.mark.parametrize(("effect", "terms"), cases(OPERATOR_EFFECTS, (FAILED, LOST), QUICK))
def test_a_reply_to_the_operator_is_lost(simulated: Network, effect: str, terms: str) -> None:
    assert_died(run(simulated, operator={effect: terms}, shim={}), OPERATOR, terms)


@pytest.mark.oci
@pytest.mark.fault("F2")
@pytest.mark.parametrize(
    ("effect", "terms"), cases(SHIM_EFFECTS, (KILLED_BEFORE, KILLED_AFTER, FAILED, LOST), QUICK_SHIM)
)
def test_the_shim_is_killed_or_fails_at_an_effect(real: Network, effect: str, terms: str) -> None:
    assert_died(run(real, operator={}, shim={effect: terms}), NODE, terms)


@pytest.mark.oci
@pytest.mark.fault("F3")
@pytest.mark.parametrize(
    ("operator", "shim"),
    [
        ("create", "record_create"),
        pytest.param("start", "start", marks=pytest.mark.thorough),
        pytest.param("start", "start_container", marks=pytest.mark.thorough),
        pytest.param("write_status", "record_save", marks=pytest.mark.thorough),
        pytest.param("stop", "kill", marks=pytest.mark.thorough),
        pytest.param("shutdown", "remove", marks=pytest.mark.thorough),
        pytest.param("shutdown", "fence", marks=pytest.mark.thorough),
        pytest.param("release", "record_remove", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("how", [KILLED_BEFORE, pytest.param(KILLED_AFTER, marks=pytest.mark.thorough)])
def test_both_are_killed(real: Network, operator: str, shim: str, how: str) -> None:
    died = run(real, operator={operator: f"1*{how}"}, shim={shim: f"1*{how}"})
    assert_died(died, OPERATOR, how)
    assert_died(died, NODE, how)


@pytest.mark.fault("F1")
def test_without_a_fault_each_effect_happens(simulated: Network) -> None:
    """The reference run, and the proof that the scenario comes by every effect that the others fail at."""
    trace = simulated.local.folder / "effects-operator.jsonl"
    simulated.local.processes.stop(OPERATOR)
    simulated.local.start_operator(env={"EFFECTS_FILE": str(trace)})
    with simulated.trial() as trial:
        scenario = Scenario(trial)
        scenario.begin()
        scenario.go_on()
        scenario.assert_right()
    for file, effects in (
        (trace, OPERATOR_EFFECTS),
        (simulated.local.folder / "effects-shim.jsonl", SHIM_EFFECTS),
    ):
        happened = {json.loads(line)["effect"] for line in file.read_text().splitlines()}
        assert set(effects) <= happened
