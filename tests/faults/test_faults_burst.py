"""F14: very many at once, a fifth of which can never start."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from statistics import median

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.cluster import condition_of
from tests.faults.network import Network, Trial, broken_network, sandbox
from tests.faults.oracle import wanted
from tests.faults.report import FINDINGS
from tests.faults.workload import RUNNING
from tests.histories import Object

from sandkeeper.api import API_VERSION, SANDBOXES
from sandkeeper.localcluster.watching import connection

pytestmark = [pytest.mark.cluster, pytest.mark.fault("F14")]

_CONNECTIONS = 48
QUIET = 8.0
"""Seconds, in which every object is looked at once or more."""
BROKEN = wanted("Failed", "False StartError", exited="128 StartError", Stalled="True")
GOOD = {"assign": 1, "create": 1, "start": 1}
"""What the operator does for one that starts, beside its status: a write and two calls."""
BAD = {"assign": 1, "create": 1, "shutdown": 1}
"""For one that cannot start. Its Start has no effect, and is in no trace: see `calls`."""
STATUS_WRITES = range(1, 4)
"""One; on a machine that has more to do, also that the node is slow, which is told after three seconds."""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    env = {
        "RESYNC_INTERVAL": "5",
        "LIST_INTERVAL": "30",
        "RELIST_INTERVAL": "2",
        "NODE_UNREACHABLE_AFTER": "60",
    }
    with broken_network(operator=False, operator_env=env) as made:
        made.local.start_operator(env={"EFFECTS_FILE": str(made.local.folder / "effects-operator.jsonl")})
        made.kubectl("wait", "sandboxnodes", "--all", "--for=condition=Ready", "--timeout=60s")
        yield made


@pytest.fixture
def trial(network: Network) -> Iterator[Trial]:
    with network.trial() as made:
        yield made


def good(number: int) -> Object:
    return sandbox(f"good-{number}", memory="1Mi")


def broken(number: int) -> Object:
    """A program that is not there."""
    return sandbox(f"broken-{number}", f"/nonexistent-{number}", memory="1Mi")


async def _at_once(network: Network, requests: list[tuple[str, str, Object | None]]) -> None:
    """All of them, over a few dozen connections. requests: method, path below the API's group, body."""
    server, context = connection(network.local.kubeconfig)
    connector = aiohttp.TCPConnector(ssl=context, limit=_CONNECTIONS)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def one(method: str, path: str, body: Object | None) -> None:
            async with session.request(method, f"{server}/apis/{API_VERSION}/{path}", json=body) as answer:
                assert answer.status < 300, await answer.text()
                await answer.read()

        await asyncio.gather(*(one(*each) for each in requests))


def apply(trial: Trial, bodies: list[Object]) -> None:
    path = f"namespaces/{trial.namespace}/{SANDBOXES}"
    asyncio.run(_at_once(trial.network, [("POST", path, body) for body in bodies]))


def delete(trial: Trial, names: list[str]) -> None:
    path = f"namespaces/{trial.namespace}/{SANDBOXES}"
    asyncio.run(_at_once(trial.network, [("DELETE", f"{path}/{name}", None) for name in names]))


def done(trial: Trial, names: list[str]) -> dict[str, Counter[str]]:
    """By name: how often the operator has done what to each object, the shims' part of it among it."""
    uids = {trial.uid(name): name for name in names}
    found: dict[str, Counter[str]] = {name: Counter() for name in names}
    trace = trial.network.local.folder / "effects-operator.jsonl"
    for line in trace.read_text().splitlines():
        each = json.loads(line)
        subject = each["subject"]
        name = uids.get(subject.rpartition("-")[0])  # a call names the instance
        if name is None and subject.startswith(f"{trial.namespace}/sandboxes/"):
            name = subject.split("/")[2]  # a write names the path
        if name in found:
            found[name][each["effect"]] += 1
    return found


def calls(network: Network) -> Counter[str]:
    """By method: the operator's calls to shims, those that failed among them."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(network.local.operator_get("/metrics")):
        for sample in family.samples:
            if sample.name == "sandkeeper_shim_call_seconds_count":
                found[sample.labels["method"]] += int(sample.value)
    return found


def assert_not_held_up(trial: Trial, names: list[str]) -> None:
    """Half of those that start are Ready about when half of the others have failed: neither waits for the other."""
    waits: dict[bool, list[float]] = {True: [], False: []}
    for name in names:
        body = trial.get(name)
        began = datetime.fromisoformat(body["metadata"]["creationTimestamp"])
        told = datetime.fromisoformat(condition_of(body, "Ready")["lastTransitionTime"])
        waits[name.startswith("good")].append((told - began).total_seconds())
    assert median(waits[True]) <= 2 * median(waits[False]) + 5, {k: median(v) for k, v in waits.items()}


@pytest.mark.parametrize("size", [50, pytest.param(1000, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("share", [0.2, pytest.param(0.0, marks=pytest.mark.thorough)])
@pytest.mark.timeout(600)
def test_what_cannot_start_costs_no_storm_and_holds_up_no_other(
    trial: Trial, size: int, share: float
) -> None:
    """share: of those that cannot start. The cost of a good one is the same with and without them."""
    bad = int(size * share)
    bodies = [broken(number) for number in range(bad)] + [good(number) for number in range(size - bad)]
    bodies.sort(key=lambda body: zlib.crc32(body["metadata"]["name"].encode()))  # mixed
    names = [body["metadata"]["name"] for body in bodies]
    before = calls(trial.network)
    apply(trial, bodies)
    oracle = trial.oracle()
    FINDINGS.note(end=False, starts=False, leaks=False)
    oracle.until({name: RUNNING if name.startswith("good") else BROKEN for name in names}, timeout=240)
    FINDINGS.note(end=True)
    oracle.assert_quiet(QUIET, within=90)
    made = calls(trial.network) - before
    assert (made["Create"], made["Start"]) == (size, size)
    assert made["Status"] <= size, "one look after a Start, at most"
    for name, counted in done(trial, names).items():
        assert counted.pop("write_status") in STATUS_WRITES, name
        assert counted == (GOOD if name.startswith("good") else BAD), name
    if bad:
        assert_not_held_up(trial, names)
    assert oracle.wrong() == []
    FINDINGS.note(starts=True, leaks=True)
    delete(trial, names)
    oracle.until(dict.fromkeys(names), timeout=240)
