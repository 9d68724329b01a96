"""Every command of docs/install.md is run by a test as it stands there, or is said here not to be, and why."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
from tests.documented import commands

TESTS = Path(__file__).parents[2]
DOCKER = "needs Docker"
SYSTEMD = "needs a machine that systemd has booted"
TRUST = "with these files: tests/integration/test_trust.py"
NOT_RUN = {
    "docker ": DOCKER,
    "kind ": DOCKER,
    "make kind-": DOCKER,
    "kubectl apply --server-side -k manifests/overlays/kind": DOCKER,
    "SANDKEEPER_TEST_KUBECONFIG=": "what it calls is tests/e2e/test_e2e_life.py",
    "kubectl label namespace TEAM": "it has a word to fill in: tests/integration/test_installed.py",
    "kubectl apply --server-side -f manifests/base/namespaces.yaml": TRUST,
    "kubectl -n sandkeeper-system create secret tls sandkeeper-ca": TRUST,
    "kubectl -n sandkeeper-system create secret generic sandkeeper-ca": TRUST,
    "kubectl -n sandkeeper-system get secret sandkeeper-ca": TRUST,
    "sandkeeper certificates ": "tests/unit/cli/test_cli_certificates.py",
    "apt-get ": SYSTEMD,
    "python3 -m venv ": SYSTEMD,
    "install ": SYSTEMD,
    "systemctl ": SYSTEMD,
}


@functools.cache
def documented() -> frozenset[str]:
    """The literals that tests give to `run_documented`."""
    calls = [
        node
        for path in (TESTS / "e2e").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "run_documented"
    ]
    return frozenset(str(call.args[1].value) for call in calls if isinstance(call.args[1], ast.Constant))


@pytest.mark.parametrize("command", commands())
def test_every_command_is_run_or_said_not_to_be(command: str) -> None:
    run = any(f"{command} ".startswith(f"{start} ") for start in documented())
    assert run or command.startswith(tuple(NOT_RUN)), "run it by `run_documented`, or say here why not"


def test_nothing_is_run_that_is_not_on_the_page() -> None:
    for start in documented():
        assert [each for each in commands() if each.startswith(start)], start
    for start in NOT_RUN:
        assert [each for each in commands() if each.startswith(start)], start
