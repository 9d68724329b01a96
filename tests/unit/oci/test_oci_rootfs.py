"""What is read of an image's files, and by whom its process is run: no link of a hostile image is followed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci import rootfs
from sandkeeper.shim.engines.oci.rootfs import User

SECRET = "root:x:77:77:secret\n"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A root file system, beside a file that is not its own."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "passwd").write_text(SECRET)
    (tmp_path / "image" / "etc").mkdir(parents=True)
    return tmp_path / "image"


# Mount points


@pytest.mark.parametrize("name", ["dev", "proc", "sys"])
@pytest.mark.parametrize("target", ["/", "etc", "missing", "../outside", None])
def test_a_mount_point_that_is_no_folder_is_refused(image: Path, name: str, target: str | None) -> None:
    if target is None:
        (image / name).write_text("")
    else:
        (image / name).symlink_to(target)
    with pytest.raises(EngineError, match=f"/{name} ") as caught:
        rootfs.check(image)
    assert caught.value.reason == "InvalidImage"


def test_mount_points_that_are_folders_or_missing_will_do(image: Path) -> None:
    rootfs.check(image)
    for name in ("dev", "proc", "sys"):
        (image / name).mkdir()
    rootfs.check(image)


# Folders below a volume


def opened(folder: Path, relative: str, *, make: bool = False) -> Path:
    """Where open_beneath led."""
    fd = rootfs.open_beneath(folder, relative, make=make)
    try:
        return Path(f"/proc/self/fd/{fd}").readlink()
    finally:
        os.close(fd)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_a_folder_beneath_is_opened_or_made(image: Path) -> None:
    volume = image.resolve()
    assert opened(volume, "") == volume
    assert opened(volume, "etc/") == volume / "etc"
    with pytest.raises(FileNotFoundError):
        opened(volume, "a/b")
    assert opened(volume, "a//b/", make=True) == volume / "a" / "b"
    assert [stat.S_IMODE((volume / name).stat().st_mode) for name in ("a", "a/b")] == [0o777, 0o777]


def test_a_folder_that_was_there_keeps_its_mode(image: Path) -> None:
    (image / "etc").chmod(0o700)
    opened(image, "etc/below", make=True)
    assert stat.S_IMODE((image / "etc").stat().st_mode) == 0o700


@pytest.mark.parametrize("make", [False, True])
@pytest.mark.parametrize(
    "relative", ["..", "etc/..", "etc/../..", ".", "etc/.", "link", "link/x", "etc/up", "file", "file/x"]
)
def test_nothing_leads_out_of_the_folder(image: Path, relative: str, make: bool) -> None:
    (image / "link").symlink_to("../outside")
    (image / "etc" / "up").symlink_to("../..")
    (image / "file").write_text("")
    before, held = sorted(image.parent.rglob("*")), descriptors()
    with pytest.raises(OSError, match=r"."):
        opened(image, relative, make=make)
    assert sorted(image.parent.rglob("*")) == before
    assert descriptors() == held


def test_a_link_put_in_place_of_a_new_folder_changes_nothing_outside(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs in a container may do so between any two system calls."""
    outside = image.parent / "outside"
    outside.chmod(0o700)
    mkdir = os.mkdir

    def swapped(name: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        mkdir(name, mode, dir_fd=dir_fd)
        os.rmdir(name, dir_fd=dir_fd)
        os.symlink(outside, name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", swapped)
    held = descriptors()
    with pytest.raises(NotADirectoryError):
        opened(image, "new", make=True)
    assert stat.S_IMODE(outside.stat().st_mode) == 0o700
    assert descriptors() == held


# Files


def test_a_file_is_read(image: Path) -> None:
    (image / "etc" / "passwd").write_bytes(b"root:\xff\n")
    assert rootfs.read_text(image, "etc/passwd") == "root:\ufffd\n"


def test_of_a_large_file_only_the_beginning_is_read(image: Path) -> None:
    with (image / "etc" / "passwd").open("wb") as file:
        file.truncate(2**40)
    assert len(rootfs.read_text(image, "etc/passwd")) == 2**20


@pytest.mark.parametrize("target", ["../../outside/passwd", "group", "/etc/passwd"])
def test_a_link_in_place_of_a_file_is_not_followed(image: Path, target: str) -> None:
    (image / "etc" / "group").write_text(SECRET)
    (image / "etc" / "passwd").symlink_to(target)
    assert rootfs.read_text(image, "etc/passwd") == ""


def test_a_link_in_place_of_a_folder_is_not_followed(image: Path) -> None:
    (image / "etc").rmdir()
    (image / "etc").symlink_to("../outside")
    assert rootfs.read_text(image, "etc/passwd") == ""


def test_what_is_no_file_is_empty(image: Path) -> None:
    os.mkfifo(image / "etc" / "passwd")
    (image / "etc" / "group").mkdir()
    held = descriptors()
    assert [rootfs.read_text(image, f"etc/{name}") for name in ("passwd", "group", "missing")] == [""] * 3
    assert rootfs.read_text(image, "missing/passwd") == ""
    assert descriptors() == held


# Users

PASSWD = """\
# a comment:x:1:1
root:x:0:0:root:/root:/bin/sh
app:x:1000:1001:::
1000:x:5:6::/:
broken
half:x:9
nogid:x:10:
huge:x:4294967296:7:::
endless:x:1:{digits}:::
negative:x:-1:7:::
twice:x:20:21:::
twice:x:22:23:::
""".format(digits="9" * 5000)
GROUP = """\
root:x:0:
app:x:1001:app
staff:x:50:root,app
extra:x:60:other,app,
1001:x:8:
negative:x:-5:negative
"""


@pytest.fixture
def users(image: Path) -> Path:
    (image / "etc" / "passwd").write_text(PASSWD)
    (image / "etc" / "group").write_text(GROUP)
    return image


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("", User(0, 0, (50,))),
        ("root", User(0, 0, (50,))),
        ("0", User(0, 0, (50,))),
        ("app", User(1000, 1001, (50, 60))),
        ("app:", User(1000, 1001, (50, 60))),
        ("app:staff", User(1000, 50)),
        ("app:7", User(1000, 7)),
        # A name goes before a number, as in Docker.
        ("1000", User(5, 6)),
        ("app:1001", User(1000, 8)),
        ("7", User(7, 0)),
        ("7:8", User(7, 8)),
        (":staff", User(0, 50)),
        ("2147483647:2147483647", User(2**31 - 1, 2**31 - 1)),
        ("twice", User(20, 21)),
    ],
)
def test_user(users: Path, text: str, user: User) -> None:
    assert rootfs.resolve_user(users, text) == user


def test_an_image_without_accounts_has_numbers_only(image: Path) -> None:
    assert rootfs.resolve_user(image, "") == User(0, 0)
    assert rootfs.resolve_user(image, "7:8") == User(7, 8)
    with pytest.raises(EngineError, match="app"):
        rootfs.resolve_user(image, "app")


@pytest.mark.parametrize(
    "text",
    [
        "nobody", "app:nobody", "half", "nogid", "huge", "endless", "negative", "app:negative", "-1", "7:-1", "1.5",
        " app", "app ", "2147483648", "7:2147483648", "4294967295", "9" * 5000, "7:" + "9" * 5000, "²", "a:b:c",
        "broken", "/", "#", "\0",
    ],
)  # fmt: skip
def test_a_user_that_the_image_lacks_is_refused(users: Path, text: str) -> None:
    with pytest.raises(EngineError, match="image: ") as caught:
        rootfs.resolve_user(users, text)
    assert (caught.value.reason, caught.value.retryable) == ("InvalidConfig", False)


@pytest.mark.parametrize("gid", ["9" * 5000, "4294967296"])
def test_a_group_that_no_process_can_have_is_refused(users: Path, gid: str) -> None:
    (users / "etc" / "group").write_text(f"huge:x:{gid}:app\n")
    with pytest.raises(EngineError, match="gid") as caught:
        rootfs.resolve_user(users, "app")
    assert caught.value.reason == "InvalidConfig"


def test_accounts_outside_of_the_image_are_not_read(image: Path) -> None:
    (image / "etc" / "passwd").symlink_to("../../outside/passwd")
    assert rootfs.resolve_user(image, "") == User(0, 0)
