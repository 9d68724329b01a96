"""Where Flux comes from: what is in the cache is taken, what is not whole is made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandkeeper.localcluster import binaries, gobuild
from sandkeeper.localcluster.binaries import BinariesError
from sandkeeper.localcluster.gitops_sources import FLUX, crd_folder, ensure, find


@pytest.fixture(autouse=True)
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a Go module's files in place of a download; nothing is built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gobuild, "build", lambda *_: [])
    monkeypatch.setattr(gobuild, "source", lambda *_: tmp_path / "module")
    for name in ("config/crd/bases/one.yaml", "manifests/crds/application-crd.yaml"):
        (tmp_path / "module" / name).parent.mkdir(parents=True)
        (tmp_path / "module" / name).write_text("kind: CustomResourceDefinition\n")
        (tmp_path / "module" / name).chmod(0o444)
    return tmp_path / "module"


def make(name: str) -> None:
    path = binaries.cache_dir(FLUX[name].folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_the_cache_serves_only_what_is_whole() -> None:
    make("source-controller")
    assert find() is None
    with pytest.raises(BinariesError):
        ensure()


def test_crds_are_copied_once_and_can_be_replaced(upstream: Path) -> None:
    for name in FLUX:
        make(name)
    found = ensure()
    assert [path.name for path in found.crds] == ["one.yaml", "one.yaml", "application-crd.yaml"]
    assert not [path for path in found.crds if path.stat().st_mode & 0o222 == 0]
    assert not list(crd_folder(FLUX["source-controller"]).parent.glob(".crds-*"))
    (upstream / "config/crd/bases/one.yaml").unlink()
    assert ensure() == found


def test_without_the_module_there_is_no_empty_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FLUX:
        make(name)
    monkeypatch.setattr(gobuild, "source", lambda *_: None)
    with pytest.raises(BinariesError):
        ensure()
    assert not any(crd_folder(module).exists() for module in FLUX.values())
