"""F10: two operators at once, as in a rolling update or after a partition of the control plane."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from tests.cluster import condition_of, eventually
from tests.faults.apiproxy import ApiProxy
from tests.faults.network import Network, Trial, assigned, broken_network, running, sandbox
from tests.faults.oracle import wanted
from tests.faults.workload import RUNNING, Workload
from tests.histories import kstatus

from sandkeeper.localcluster.pki import CA
from sandkeeper.wire.tls import OPERATOR_IDENTITY

pytestmark = [pytest.mark.cluster, pytest.mark.fault("F10")]
THOROUGH = pytest.mark.thorough


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    # An image takes long enough for a test to act before the sandbox starts.
    with broken_network(shim_env={"SIMULATED__IMAGE_SECONDS": "0.5"}) as made:
        yield made


@pytest.fixture
def trial(network: Network) -> Iterator[Trial]:
    with network.trial() as made:
        yield made


def test_two_operators_come_to_the_end_that_one_comes_to(trial: Trial) -> None:
    with trial.network.another_operator() as port:
        work = Workload(trial)
        work.begin()
        work.go_on()
        work.assert_right(trial.oracle(port))


@THOROUGH
def test_an_operator_takes_over_from_one_that_was_killed(trial: Trial) -> None:
    network = trial.network
    work = Workload(trial)
    work.begin()
    network.local.kill_operator()
    with network.another_operator():
        work.go_on()
        network.local.start_operator()
        work.assert_right()


@contextlib.contextmanager
def lagging_operator(network: Network, name: str) -> Iterator[tuple[int, ApiProxy]]:
    """One that knows only what it saw when it started: it is shown no event and does not compare."""
    with ApiProxy(network.local.kubeconfig, network.local.folder / name) as api:
        env = {"LIST_INTERVAL": "3600"}
        with network.another_operator(kubeconfig=api.kubeconfig, env=env) as port:
            api.drop()
            yield port, api


def test_an_operator_that_is_behind_does_no_harm(trial: Trial) -> None:
    """Whatever it did to a sandbox, the other would have to undo, and not come to rest."""
    work = Workload(trial)
    work.begin()
    with lagging_operator(trial.network, "behind"):
        work.go_on()
        work.assert_right()


def test_an_operator_that_is_cut_off_from_the_api_server_alone_starts_nothing_twice(trial: Trial) -> None:
    """It knows that the instance is assigned, and of nothing that came of it; the shims it reaches."""
    body = sandbox("one", "exit", "3")
    body["spec"]["containers"][0]["image"] = f"registry.example/{trial.namespace}:1"  # takes its time
    with (
        ApiProxy(trial.network.local.kubeconfig, trial.network.local.folder / "cut") as api,
        trial.network.another_operator(kubeconfig=api.kubeconfig, env={"LIST_INTERVAL": "3600"}) as port,
    ):
        refused = api.answer(503, resource="sandboxes/status")
        dropped = api.drop(wanted=lambda event: "startedAt" in event["object"]["status"])
        trial.make(body)
        trial.until("one", assigned)
        eventually(lambda: api.passed(name="one", wanted=lambda event: assigned(event["object"])), timeout=60)
        api.down()
        trial.until("one", lambda body: kstatus(body) == "Failed")
        eventually(lambda: not trial.network.shims.present(trial.uid("one")), timeout=60)
        oracle = trial.oracle(port, apis=(api,))
        passes = oracle.passes()
        eventually(lambda: oracle.passes() > passes + 10, timeout=60)
        for fault in (refused, dropped):
            fault.end()
        api.up()
        oracle.assert_right({"one": wanted("Failed", "False Error", exited="3 Error", Stalled="True")})
    assert sum(len(life.pids) for life in trial.network.shims.lives(trial.uid("one"))) == 1


@THOROUGH
def test_an_operator_that_reaches_no_shim_does_no_harm_that_outlasts_it(trial: Trial) -> None:
    network = trial.network
    trial.make(sandbox("one"))
    trial.until("one", running)
    ca = CA.create(network.local.folder / "other-ca", "another CA")
    other = ca.client("operator", hosts=(OPERATOR_IDENTITY,))
    env = {"TLS_CA": str(other.ca), "TLS_CERT": str(other.cert), "TLS_KEY": str(other.key)}
    with network.another_operator(env=env):
        trial.until("one", lambda body: condition_of(body, "Ready")["status"] == "Unknown")
    trial.oracle().assert_right({"one": RUNNING})


@THOROUGH
@pytest.mark.fault("F17")
def test_a_sandbox_whose_object_no_event_told_of_is_left_alone(trial: Trial) -> None:
    """The cache of the operator that is behind says that nobody owns it; the API server says who does."""
    with lagging_operator(trial.network, "collects") as (port, api):
        trial.make(sandbox("one"))
        trial.until("one", running)
        asked = len(api.served(method="GET", name="one"))
        eventually(lambda: len(api.served(method="GET", name="one")) > asked, timeout=60)
        trial.oracle(port, apis=(api,)).assert_right({"one": RUNNING})
