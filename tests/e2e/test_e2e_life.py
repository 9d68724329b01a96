"""The life of Sandboxes (integration/test_life.py) on the node, by its kubeconfig, as on any other cluster."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
from tests.cluster import KUBECONFIG
from tests.e2e.install import ROOT, Installation
from tests.nodes import ON_NODE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

BODIES = ("tests/integration/test_life.py",)


def test_the_life_of_sandboxes(installation: Installation) -> None:
    """pytest runs in the node's network, for nothing outside reaches its API server."""
    namespaces = installation.node.namespaces
    environment = os.environ | {
        KUBECONFIG: str(installation.node.kubeconfig),
        ON_NODE: shlex.join(namespaces.enter),
    }
    argv = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-rs", *BODIES]
    done = subprocess.run(
        [*namespaces.enter_network, *argv],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr + installation.why()
