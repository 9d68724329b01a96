"""Small files in few system calls: the same as Python's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandkeeper.shim.engines.oci import files


@pytest.mark.parametrize("size", [0, 1, 64 * 1024 - 1, 64 * 1024, 300_000])
def test_what_is_written_is_read(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    files.write(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data
    assert files.read(tmp_path / "file") == data


def test_nothing_is_left_of_what_was_there(tmp_path: Path) -> None:
    files.write(str(tmp_path / "file"), b"long before")
    files.write(str(tmp_path / "file"), b"now")
    assert files.read(str(tmp_path / "file")) == b"now"


def test_a_file_of_the_kernel_is_read_to_its_end() -> None:
    """It says nothing of its size, and comes in pieces."""
    assert files.read("/proc/self/mountinfo") == Path("/proc/self/mountinfo").read_bytes()


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    read, write = os.pipe()
    try:
        os.write(write, b"first")
        os.write(write, b" second")
        os.close(write)
        assert files.read(f"/proc/self/fd/{read}") == b"first second"
    finally:
        os.close(read)


def test_what_cannot_be_read_or_written_is_said_and_nothing_stays_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        files.read(tmp_path)
    with pytest.raises(IsADirectoryError):
        files.write(tmp_path, b"")
    with pytest.raises(OSError, match="No space left"):
        files.write("/dev/full", b"x")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
