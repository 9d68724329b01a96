"""F13: the clock of the operator, or of the node, is set by an hour while everything goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from tests.cluster import condition_of, eventually
from tests.faults.clocks import SetClock, forget
from tests.faults.network import Network, broken_network, sandbox
from tests.faults.oracle import Oracle, wanted
from tests.faults.workload import END, Workload

from sandkeeper.localcluster.cluster import OPERATOR

pytestmark = [pytest.mark.cluster, pytest.mark.oci, pytest.mark.fault("F13")]

HOUR = 3600
NODE = "node-1"
OVERDUE = wanted("Failed", "False DeadlineExceeded", exited="137 DeadlineExceeded", Stalled="True")


@dataclass(frozen=True, slots=True)
class Clocks:
    network: Network
    operator: SetClock
    node: SetClock


@pytest.fixture(scope="module")
def clocks() -> Iterator[Clocks]:
    """Operator and shim with a clock of their own each, both right. What ends stays on the node for a moment."""
    with broken_network(shims=1, engine="oci", operator=False, operator_env={"RETENTION": "1"}) as network:
        local = network.local
        made = Clocks(network, SetClock(local.folder / "clock-o"), SetClock(local.folder / "clock-n"))
        local.processes.stop(NODE)
        local.start_shim(0, under=made.node.under)
        local.start_operator(under=made.operator.under)
        local.kubectl("wait", "sandboxnodes", "--all", "--for=condition=Ready", "--timeout=60s")
        pids = [pid for name in (NODE, OPERATOR) if (pid := local.processes.pid(name)) is not None]
        yield made
    for pid in pids:
        forget(pid)


class Scenario(Workload):
    """The workload, with all that waits for a time: begun before the clock is set, and after."""

    def begin(self) -> None:
        super().begin()
        self.trial.make(sandbox("limited", activeDeadlineSeconds=6))
        self.trial.until("limited", lambda body: body.get("status", {}).get("startedAt"))

    def go_on(self) -> None:
        again = {"recreate": "OnFailure", "limit": 1, "backoffSeconds": 1}
        self.trial.make(
            sandbox("limited-later", activeDeadlineSeconds=2),
            sandbox("expires", "true", ttlSecondsAfterFinished=1),
            sandbox("again", "sh", "-c", "exit 5", failurePolicy=again),
        )
        super().go_on()

    def assert_right(self, oracle: Oracle | None = None, *, timeout: float = 90.0) -> None:
        wanted_too = {
            "limited": OVERDUE,
            "limited-later": OVERDUE,
            "expires": None,
            "again": wanted("Failed", "False Error", instance=2, exited="5 Error", Stalled="True"),
        }
        (oracle or self.trial.oracle()).assert_right({**END, **wanted_too}, timeout=timeout, clocks=True)


@pytest.mark.parametrize(
    ("whose", "seconds"),
    [
        ("operator", HOUR),
        pytest.param("operator", -HOUR, marks=pytest.mark.thorough),
        pytest.param("node", HOUR, marks=pytest.mark.thorough),
        pytest.param("node", -HOUR, marks=pytest.mark.thorough),
    ],
)
def test_a_clock_is_set(clocks: Clocks, whose: str, seconds: int) -> None:
    clock: SetClock = getattr(clocks, whose)
    with clocks.network.trial() as trial:
        scenario = Scenario(trial)
        try:
            scenario.begin()
            clock.set(seconds)
            scenario.go_on()
            scenario.assert_right()
            body = trial.get("comes")
        finally:
            clock.set(0)
    # It was set, and the times that are told are that clock's.
    told = (
        body["status"]["startedAt"]
        if whose == "node"
        else condition_of(body, "Running")["lastTransitionTime"]
    )
    assert abs(datetime.now(UTC) + timedelta(seconds=seconds) - datetime.fromisoformat(told)) < timedelta(
        minutes=20
    )
    assert clocks.network.local.processes.alive(OPERATOR)
    eventually(lambda: "sandkeeper_queue" in clocks.network.local.operator_get("/metrics"))
