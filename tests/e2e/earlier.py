"""The tree of an earlier commit, for tests that upgrade from it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from tests.e2e.install import ROOT

COMMIT = "UPGRADE_FROM"
"""Environment variable: a commit. Default: that before the last change of what is installed."""
_INSTALLED = ("manifests", "crds", "operator", "Dockerfile")


def tree(folder: Path) -> Path:
    """All files of that commit, below `folder`. Skips the test where this clone does not have it."""
    named = os.environ.get(COMMIT)
    commit = named or _before_the_last_change()
    archive = folder / "earlier.tar"
    if not commit or _git("archive", f"--output={archive}", commit) is None:
        assert not named, f"{COMMIT}={named}: there is no such commit in this clone"
        pytest.skip("this clone has no earlier commit (a shallow one, or no git at all)")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "earlier", filter="data")
    return folder / "earlier"


def installer(earlier: Path) -> ModuleType:
    """That commit's own tests/e2e/install.py: how it is installed is its own affair."""
    spec = importlib.util.spec_from_file_location("earlier_install", earlier / "tests" / "e2e" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def _before_the_last_change() -> str:
    if _git("diff", "--quiet", "HEAD", "--", *_INSTALLED) is None:
        return "HEAD"
    last = _git("log", "-1", "--format=%H", "--", *_INSTALLED)
    return f"{last}^" if last else ""


def _git(*words: str) -> str | None:
    """What it prints; None where it fails."""
    try:
        result = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
