"""Fixtures for all tests. What needs a cluster asks for `cluster` or `namespace`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.cluster import TestCluster, fresh_namespace, plain_cluster


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
