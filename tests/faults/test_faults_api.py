"""F7: the API server is away, slow, or answers with errors, before or after it has done what was asked."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from tests.cluster import eventually
from tests.faults.network import Network, Trial, broken_network, running, sandbox
from tests.faults.workload import RUNNING, Workload

pytestmark = [pytest.mark.cluster, pytest.mark.fault("F7")]
THOROUGH = pytest.mark.thorough

WRITTEN = ("sandboxes", "sandboxes/status")


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with broken_network() as made:
        yield made


@pytest.fixture
def trial(network: Network) -> Iterator[Trial]:
    with network.trial() as made:
        yield made


def test_what_changes_while_the_api_server_is_away_is_made_up_for(trial: Trial) -> None:
    work = Workload(trial)
    work.begin()
    trial.network.api.down()
    work.go_on()
    trial.network.api.up()
    work.assert_right()


@THOROUGH
def test_an_api_server_that_is_killed_and_started_again_costs_no_sandbox(trial: Trial) -> None:
    work = Workload(trial)
    work.begin()
    local = trial.network.local
    local.processes.kill("kube-apiserver")
    work.until_ended("ends")
    local.api.start(tied=True)
    local.api.wait()
    work.go_on()
    work.assert_right()


@pytest.mark.parametrize(
    "code", [409, *(pytest.param(code, marks=THOROUGH) for code in (410, 429, 500, 503))]
)
def test_a_write_that_is_refused_is_made_again(trial: Trial, code: int) -> None:
    work, api = Workload(trial), trial.network.api
    work.begin()
    faults = [api.answer(code, method="PATCH", resource=resource, times=4) for resource in WRITTEN]
    work.go_on()
    work.assert_right()
    assert [fault.met for fault in faults] == [4, 4]


@pytest.mark.parametrize("how", ["reset", *(pytest.param(how, marks=THOROUGH) for how in ("500", "504"))])
def test_a_write_whose_reply_is_lost_is_not_taken_for_undone(trial: Trial, how: str) -> None:
    work, api = Workload(trial), trial.network.api
    work.begin()
    faults = [
        api.reset(lost=True, method="PATCH", resource=resource, times=4)
        if how == "reset"
        else api.answer(int(how), lost=True, method="PATCH", resource=resource, times=4)
        for resource in WRITTEN
    ]
    work.go_on()
    work.assert_right()
    assert [fault.met for fault in faults] == [4, 4]


@THOROUGH
@pytest.mark.parametrize("code", [410, 429, 500])
def test_lists_and_watches_that_are_refused_are_asked_for_again(trial: Trial, code: int) -> None:
    work, api = Workload(trial), trial.network.api
    work.begin()
    faults = [api.answer(code, verb=verb, resource="sandboxes", times=3) for verb in ("watch", "read")]
    assert api.cut() == 1
    work.go_on()
    work.assert_right()
    eventually(lambda: [fault.met for fault in faults] == [3, 3], timeout=60)
    eventually(lambda: api.watches() == 1, timeout=60)


@THOROUGH
def test_a_slow_api_server_is_waited_for(trial: Trial) -> None:
    work, api = Workload(trial), trial.network.api
    work.begin()
    slow = api.delay(0.4, method="PATCH")
    work.go_on()
    work.assert_right()
    assert slow.met > 0


@THOROUGH
def test_a_slow_watch_delays_and_breaks_nothing(trial: Trial) -> None:
    work, api = Workload(trial), trial.network.api
    work.begin()
    slow = api.slow(0.2)
    work.go_on()
    work.assert_right()
    assert slow.met > 0


def test_an_api_server_that_asks_for_time_gets_it(trial: Trial) -> None:
    api = trial.network.api
    asked = api.answer(429, method="PATCH", resource="sandboxes", times=1, retry_after=2)
    trial.make(sandbox("one"))
    eventually(lambda: asked.met == 1, timeout=60)
    refused = time.monotonic()
    trial.until("one", running)
    first = next(each for each in api.writes(name="one"))
    assert first.at - refused > 1.9
    trial.oracle().assert_right({"one": RUNNING})


@THOROUGH
def test_an_object_that_nobody_may_write_is_left_alone_until_it_may(trial: Trial) -> None:
    api = trial.network.api
    refused = api.answer(403, method="PATCH", name="one")
    trial.make(sandbox("one"), sandbox("two"))
    trial.until("two", running)
    eventually(lambda: refused.met > 1, timeout=60)
    assert not trial.network.shims.lives(trial.uid("one")), "nothing starts that is not written down"
    refused.end()
    trial.oracle().assert_right({"one": RUNNING, "two": RUNNING})
