"""`make kind-up`, `kind-test` and `kind-down` where there is no Docker; and what they take from kind-config.yaml."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("command", "client"), [("up", False), ("up", True), ("test", True), ("down", True)])
def test_without_docker_it_says_what_would_help(tmp_path: Path, command: str, client: bool) -> None:
    if client:
        (tmp_path / "docker").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "docker").chmod(0o755)
    cache = tmp_path / "cache"
    environment = os.environ | {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, ROOT / "hack" / "kind.py", command],
        env=environment | {"PYTHONPATH": str(ROOT / "operator")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "apt-get install docker.io" in done.stderr
    assert "make e2e" in done.stderr
    assert not cache.exists()  # nothing was built for it


def test_every_target_is_a_command() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in ("up", "test", "down"):
        assert re.search(
            rf"^kind-{command}: .*\n\t@\$\(py\) hack/kind\.py {command}\b", makefile, re.MULTILINE
        )
