"""Where the programs of a node come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandkeeper.localcluster import binaries, gobuild, node_sources
from sandkeeper.localcluster.binaries import BinariesError

NAMES = [(module, name) for module in node_sources.MODULES for name in module.programs]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what was made before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def put(module: gobuild.Module, name: str) -> None:
    path = binaries.cache_dir(module.folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_only_what_is_missing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in NAMES:
        if name != "kubelet":
            put(module, name)
    asked: list[str] = []

    def build(names: list[str], _target: Path, _say: object, module: gobuild.Module) -> list[str]:
        asked.extend(names)
        for name in names:
            put(module, name)
        return names

    monkeypatch.setattr(gobuild, "build", build)
    assert set(node_sources.ensure()) == {name for _, name in NAMES}
    assert set(node_sources.ensure()) == {name for _, name in NAMES}
    assert asked == ["kubelet"]


def test_what_cannot_be_built_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gobuild, "build", lambda *_: [])
    with pytest.raises(BinariesError, match=r"kubelet.*runc"):
        node_sources.ensure()
