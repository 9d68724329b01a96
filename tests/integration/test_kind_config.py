"""kind-config.yaml, read by kind's own loader. It needs no Docker, and no cluster is made of it."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandkeeper.localcluster import binaries, gobuild

CONFIG = Path(__file__).parents[2] / "kind-config.yaml"
Object = dict[str, Any]


@pytest.fixture(scope="module")
def program() -> Path:
    """What reads it. The first time it is built."""
    return binaries.built("kind-config", gobuild.KIND, say=lambda line: print(line, file=sys.stderr))


def read(program: Path, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, path], capture_output=True, text=True, check=False, timeout=60)


def test_kind_takes_ours(program: Path) -> None:
    answer = read(program, CONFIG)
    assert (answer.returncode, answer.stderr) == (0, "")
    wanted = [f"{node['role']} {node['image']}" for node in yaml.safe_load(CONFIG.read_text())["nodes"]]
    assert answer.stdout.splitlines() == wanted


def misspelt(config: Object) -> None:
    config["nodes"][1]["extraMount"] = []


def no_such_role(config: Object) -> None:
    config["nodes"][1]["role"] = "node"


def no_control_plane(config: Object) -> None:
    del config["nodes"][0]


def no_such_version(config: Object) -> None:
    config["apiVersion"] = "kind.x-k8s.io/v1alpha5"


def a_subnet_that_is_none(config: Object) -> None:
    config["networking"] = {"podSubnet": "everywhere"}


@pytest.mark.parametrize(
    "broken",
    [misspelt, no_such_role, no_control_plane, no_such_version, a_subnet_that_is_none],
    ids=lambda function: function.__name__,
)
def test_kind_refuses(program: Path, tmp_path: Path, broken: Callable[[Object], None]) -> None:
    config = copy.deepcopy(yaml.safe_load(CONFIG.read_text()))
    broken(config)
    (tmp_path / "kind.yaml").write_text(yaml.safe_dump(config))
    answer = read(program, tmp_path / "kind.yaml")
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"{tmp_path / 'kind.yaml'}: ")
