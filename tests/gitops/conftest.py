"""A git server, and Flux beside the cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.cluster import leaks_of
from tests.flux import Delivery, delivery, flux
from tests.gitserver import GitServer

from sandkeeper.localcluster.cluster import LocalCluster


@pytest.fixture(scope="session")
def server(local: LocalCluster) -> Iterator[GitServer]:
    """Nothing may be left on the nodes afterwards."""
    with GitServer() as found, flux(local):
        yield found
    for index in range(len(local.nodes)):
        leaks_of(local, index).assert_none()


@pytest.fixture
def git(server: GitServer, local: LocalCluster, home: str) -> Iterator[Delivery]:
    """A repository for a namespace of the test's own, not delivered yet."""
    with delivery(local, server, home) as found:
        yield found
