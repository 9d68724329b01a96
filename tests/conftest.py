"""Fixtures for all tests. What needs a cluster asks for `cluster` or `namespace`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.cluster import KUBECONFIG, TestCluster, fresh_namespace, named, plain_cluster, whole_cluster
from tests.faults.recorders import Objects
from tests.histories import violations
from tests.nodes import Nodes
from tests.sandboxes import Sandboxes

from sandkeeper.localcluster.apiserver import Kubectl
from sandkeeper.localcluster.cluster import LocalCluster


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults", choices=("quick", "all"), default="quick", help="which of tests/faults are run"
    )


_MAY_BE_TRIED_AGAIN = 3
"""Tests in one run. With more than these it is not the machine."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names those that passed, or failed, only when they were tried again (pytest-rerunfailures)."""
    again = terminalreporter.stats.get("rerun", [])
    for report in again:
        terminalreporter.section(f"tried again: {report.nodeid}", sep="-")
        terminalreporter.write_line(str(report.longrepr))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    again = len(reporter.stats.get("rerun", [])) if reporter else 0
    if exitstatus == pytest.ExitCode.OK and again > _MAY_BE_TRIED_AGAIN:
        print(f"\n{again} tests had to be tried again; {_MAY_BE_TRIED_AGAIN} may")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def cluster() -> Iterator[TestCluster]:
    """An API server with our CRDs."""
    with plain_cluster() as found:
        yield found


@pytest.fixture
def namespace(cluster: TestCluster) -> Iterator[str]:
    """A namespace for one test."""
    with fresh_namespace(cluster.kubectl) as name:
        yield name


@pytest.fixture(scope="session")
def local() -> Iterator[LocalCluster]:
    """A whole cluster with two nodes that run real containers, shared by all tests that only read and write objects.

    A test that kills a part of it makes one of its own: `whole_cluster`. At the end every version of every object
    that they made must have been true (tests/histories.py).
    """
    if named():
        pytest.skip(f"it looks into a local cluster's parts, and {KUBECONFIG} names another cluster")
    with whole_cluster(shims=2, engine="oci") as found, Objects(found.kubeconfig) as objects:
        yield found
        wrong = [line for history in objects.histories() for line in violations(history)]
        assert not wrong, "untrue history:\n" + "\n".join(wrong)


@pytest.fixture(scope="session")
def installed(request: pytest.FixtureRequest) -> Kubectl:
    """kubectl of a cluster with operator and nodes: the one that the developer names, else `local`."""
    kubectl: Kubectl = request.getfixturevalue("cluster" if named() else "local").kubectl
    return kubectl


@pytest.fixture(scope="session")
def nodes(request: pytest.FixtureRequest) -> Nodes:
    """Its nodes."""
    if named():
        return Nodes.named()
    local: LocalCluster = request.getfixturevalue("local")
    return Nodes(states={name: local.node_folder(index) / "state" for index, name in enumerate(local.nodes)})


@pytest.fixture
def home(installed: Kubectl) -> Iterator[str]:
    """A namespace of it for one test."""
    with fresh_namespace(installed) as name:
        yield name


@pytest.fixture
def sandboxes(installed: Kubectl, home: str) -> Sandboxes:
    """What a user does in that namespace."""
    return Sandboxes(installed, home)
