"""Operator and shim killed, or answered with an error, at each of their effects.

Every run is the same scenario: the workload with one effect that fails once. It must end as it does without a fault.
"""

from __future__ import annotations

import json
from collections import Counter
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

# Which time is a later one, for what happens more than once in the scenario: so many have gone well before it.
LATER = {
    "assign": 5,
    "create": 5,
    "start": 5,
    "write_status": 8,
    "pause": 1,
    "stop": 1,
    "shutdown": 3,
    "release": 1,
}
LATER_SHIM = {
    "record_create": 5,
    "record_save": 20,
    "record_remove": 3,
    "fence": 3,
    "prepare": 5,
    "start": 5,
    "start_container": 5,
    "kill": 3,
    "pause": 1,
    "remove": 3,
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
        self.trial.until("resumes", lambda body: body.get("status", {}).get("phase") == "Paused")

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


def cases(
    effects: Mapping[str, str], later: Mapping[str, int], hows: tuple[str, ...], quick: set[tuple[str, str]]
) -> list[object]:
    """Each effect in each way, at its first time and, where it has one, at a later time."""
    found = []
    for effect in effects:
        for how in hows:
            for passed in (0, later.get(effect, 0))[: 1 + (effect in later)]:
                marks = [] if not passed and (effect, how) in quick else [pytest.mark.thorough]
                terms = f"{passed}*off->1*{how}" if passed else f"1*{how}"
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
@pytest.mark.parametrize(
    ("effect", "terms"), cases(OPERATOR_EFFECTS, LATER, (KILLED_BEFORE, KILLED_AFTER), QUICK)
)
def test_the_operator_is_killed_at_an_effect(simulated: Network, effect: str, terms: str) -> None:
    assert_died(run(simulated, operator={effect: terms}, shim={}), OPERATOR, terms)


@pytest.mark.fault("F5")
@pytest.mark.parametrize(("effect", "terms"), cases(OPERATOR_EFFECTS, LATER, (FAILED, LOST), QUICK))
def test_a_reply_to_the_operator_is_lost(simulated: Network, effect: str, terms: str) -> None:
    assert_died(run(simulated, operator={effect: terms}, shim={}), OPERATOR, terms)


@pytest.mark.oci
@pytest.mark.fault("F2")
@pytest.mark.parametrize(
    ("effect", "terms"),
    cases(SHIM_EFFECTS, LATER_SHIM, (KILLED_BEFORE, KILLED_AFTER, FAILED, LOST), QUICK_SHIM),
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


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("simulated", marks=pytest.mark.fault("F1")),
        pytest.param("real", marks=[pytest.mark.fault("F2"), pytest.mark.oci, pytest.mark.thorough]),
    ],
)
def test_without_a_fault_each_effect_happens(request: pytest.FixtureRequest, engine: str) -> None:
    """The reference run, and the proof that the scenario comes by every effect that the others fail at, each so often
    that they can."""
    network: Network = request.getfixturevalue(engine)
    local = network.local
    traces = {"operator": local.folder / "effects-o.jsonl", "shim": local.folder / "effects-s.jsonl"}
    local.processes.stop(OPERATOR)
    local.processes.stop(NODE)
    local.start_shim(0, env={"EFFECTS_FILE": str(traces["shim"])})
    local.start_operator(env={"EFFECTS_FILE": str(traces["operator"])})
    with network.trial() as trial:
        scenario = Scenario(trial)
        scenario.begin()
        scenario.go_on()
        scenario.assert_right(trial.oracle())
        happened = {
            process: Counter(json.loads(line)["effect"] for line in trace.read_text().splitlines())
            for process, trace in traces.items()
        }
    local.processes.stop(NODE)
    local.start_shim(0)
    for process, effects, later in (
        ("operator", OPERATOR_EFFECTS, LATER),
        ("shim", SHIM_EFFECTS, LATER_SHIM),
    ):
        wanted = {effect: 1 + later.get(effect, 0) for effect in effects}
        assert {name: number for name, number in wanted.items() if happened[process][name] < number} == {}, (
            happened
        )
