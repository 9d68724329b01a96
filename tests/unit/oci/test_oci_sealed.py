"""Sealed copies of runtimes: real programs, really run."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandkeeper.shim.engines.oci.sealed import Sealed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seals are Linux's")


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Sealed]:
    copies = Sealed(tmp_path / "sealed")
    yield copies
    copies.close()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program by a runtime's name, which ends with 0 whatever it is asked."""
    path = tmp_path / "bin" / "crun"
    path.parent.mkdir()
    shutil.copy(shutil.which("true") or "/bin/true", path)
    return path


def _said(program: str) -> int:
    return subprocess.run([program, "--version"], capture_output=True, check=False, timeout=60).returncode


def test_a_copy_runs_by_the_runtimes_name_and_nobody_can_change_it(sealed: Sealed, program: Path) -> None:
    path = sealed.of(str(program))
    assert path != str(program)
    assert Path(path).name == "crun"
    assert _said(path) == 0
    with Path(path).open("rb") as copy:
        assert copy.read() == program.read_bytes()
        # Exactly these: any other set, and a runtime makes a copy of its own again.
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        assert fcntl.fcntl(copy, fcntl.F_GET_SEALS) == seals
    with Path(path).open("r+b", buffering=0) as copy, pytest.raises(PermissionError):
        copy.write(b"x")


def test_there_is_one_copy_until_the_program_is_replaced(sealed: Sealed, program: Path) -> None:
    first = sealed.of(str(program))
    assert sealed.of(str(program)) == first
    fresh = program.with_name("new")
    shutil.copy(shutil.which("echo") or "/bin/echo", fresh)
    fresh.rename(program)
    second = sealed.of(str(program))
    assert second != first
    assert Path(second).read_bytes() == program.read_bytes()
    # What was about to be run is still there.
    assert _said(first) == 0


def test_what_does_not_look_for_seals_is_run_from_where_it_is(sealed: Sealed, program: Path) -> None:
    other = program.rename(program.with_name("runsc"))
    for each in (str(other), "crun", "/nowhere/crun", ""):
        assert sealed.of(each) == each


def test_what_cannot_be_run_from_a_copy_is_run_from_where_it_is(sealed: Sealed, program: Path) -> None:
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    assert sealed.of(str(program)) == str(program)


def test_names_of_a_killed_shims_copies_are_removed_and_closing_leaves_none(
    tmp_path: Path, program: Path
) -> None:
    folder = tmp_path / "sealed"
    (folder / "7").mkdir(parents=True)
    (folder / "7" / "crun").symlink_to("/proc/0/fd/7")
    before = len(list(Path("/proc/self/fd").iterdir()))
    other, copies = Sealed(folder), Sealed(folder)
    assert not list(folder.iterdir())
    path = other.of(str(program))
    # One more over the same folder lets the names of those that live be.
    Sealed(folder)
    assert _said(path) == 0
    assert copies.of(str(program)) != path
    copies.close()
    assert _said(path) == 0
    other.close()
    assert not folder.exists()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
