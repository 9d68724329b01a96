"""Where the tests' containerds come from, and what is refused before one is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandkeeper.localcluster import gobuild
from sandkeeper.localcluster.binaries import BinariesError
from sandkeeper.localcluster.containerd import Containerd
from sandkeeper.localcluster.containerd_sources import PROGRAMS, SOURCES, Source, ensure, find, folder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test builds or fetches anything, or finds what was made before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(gobuild, "build", lambda *_: [])


def make(source: Source, *names: str) -> None:
    folder(source).mkdir(parents=True)
    for name in names:
        (folder(source) / name).write_text("#!/bin/sh\n")
        (folder(source) / name).chmod(0o755)


@pytest.mark.parametrize("source", SOURCES)
def test_the_cache_serves_only_what_is_whole(source: Source) -> None:
    make(source, "containerd")
    assert find(source) is None
    with pytest.raises(BinariesError):
        ensure(source)


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_in_the_cache_is_not_made_again(source: Source) -> None:
    make(source, *PROGRAMS)
    assert ensure(source).path == folder(source)


def test_debians_needs_debians_tools() -> None:
    with pytest.raises(BinariesError, match="apt-get"):
        ensure("debian")


def test_a_folder_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    make("module", *PROGRAMS)
    with pytest.raises(ValueError, match="too long"):
        Containerd(folder=tmp_path / ("x" * 90))
