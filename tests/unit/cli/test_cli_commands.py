"""The command line as users meet it: every command has help, wrong settings end with status 2 and their name."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from sandkeeper.cli.main import kubectl_plugin, main

COMMANDS = ["shim", "operator", "local", "demo", "certificates", "crds", "conformance", "version"]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the developer's reaches a test, and no cluster of theirs is touched."""
    import os

    for name in list(os.environ):
        if name.startswith("SANDKEEPER_") or name in ("KUBECONFIG", "KEEP"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SANDKEEPER_LOCAL_DIR", str(tmp_path / "cluster"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.output


def test_the_list_of_commands_is_all_of_them() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize("command", ["logs", "exec"])
def test_the_plugin_has_help(command: str) -> None:
    result = CliRunner().invoke(kubectl_plugin, [command, "--help"])
    assert result.exit_code == 0, result.output
    assert "SANDKEEPER_TLS_CA" in result.output


@pytest.mark.parametrize("asked", ["version", "--version"])
def test_the_version_is_the_packages(asked: str) -> None:
    assert CliRunner().invoke(main, [asked]).output.strip() == version("sandkeeper")


def test_crds_are_documents_for_kubectl() -> None:
    documents = list(yaml.safe_load_all(CliRunner().invoke(main, ["crds"]).output))
    assert {document["kind"] for document in documents} == {"CustomResourceDefinition"}
    assert {document["metadata"]["name"] for document in documents} == {
        "sandboxes.sandkeeper.dev",
        "sandboxnodes.sandkeeper.dev",
    }


def test_an_unknown_command_is_a_usage_error() -> None:
    assert CliRunner().invoke(main, ["nosuch"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["shim", "--sandboxes", "0"], "SANDKEEPER_SHIM_SANDBOXES"),
        (["shim", "--oci-cgroup-parent", "../up"], "SANDKEEPER_SHIM_OCI__CGROUP_PARENT"),
        (["shim", "--listen", "127.0.0.1:1"], "mutual TLS"),
        (["shim", "--config", "/does/not/exist"], "/does/not/exist"),
        (["operator", "--concurrency", "none"], "SANDKEEPER_OPERATOR_CONCURRENCY"),
        (["operator", "--config", "/does/not/exist"], "/does/not/exist"),
    ],
)
def test_a_wrong_setting_is_named(arguments: list[str], named: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert named in result.output


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    assert CliRunner().invoke(main, ["local", "status"]).exit_code == 1
    assert CliRunner().invoke(main, ["local", "down"]).exit_code == 0
    assert not (tmp_path / "cluster").exists()


def test_without_a_kubeconfig_the_plugin_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = CliRunner().invoke(kubectl_plugin, ["logs", "a"])
    assert result.exit_code == 1
    assert "Error:" in result.output
