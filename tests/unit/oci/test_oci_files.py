"""Folders, volumes and mounts of a sandbox: no name or id leads out of them."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci import filesystems
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.shim.engines.oci.containers import Containers
from sandkeeper.shim.engines.oci.folders import SandboxFolder
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.seccomp import Seccomp
from sandkeeper.wire import node_pb2 as pb

BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/",
    "a/..",
    "a\0b",
    "a..b",
    ".a",
    "a.",
    "a b",
    "a" * 77,
    "a\n",
    "ä",
]


@pytest.fixture
def sandbox(tmp_path: Path) -> SandboxFolder:
    folder = SandboxFolder.under(tmp_path, tmp_path / "run", "u-1")
    for each in (folder.path, folder.run):
        each.mkdir(parents=True)
    return folder


# Names


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_no_safe_file_name_makes_no_path(sandbox: SandboxFolder, name: str) -> None:
    for field, make in (
        ("sandbox_id", lambda: SandboxFolder.under(sandbox.path, sandbox.run, name)),
        ("containers", lambda: sandbox.container(name)),
        ("volumes", lambda: sandbox.volume(name)),
    ):
        with pytest.raises(EngineError, match=field) as caught:
            make()
        assert caught.value.reason == "InvalidConfig"


def test_what_must_outlive_the_machines_restart_is_on_disk_and_all_else_in_memory(
    sandbox: SandboxFolder, tmp_path: Path
) -> None:
    attempt = sandbox.container("main").attempt(3)
    assert attempt.path == tmp_path / "sandboxes" / "u-1" / "main.3"
    assert attempt.run == tmp_path / "run" / "sandboxes" / "u-1" / "main.3"
    assert attempt.runtime_id == "u-1.main.3"
    for name in ("upper", "work", "exit_file", "log"):
        assert getattr(attempt, name).is_relative_to(attempt.path), name
    for name in ("rootfs", "config", "subpaths", "pid_file", "monitor_pid_file", "started", "exit_copy",
                 "oom_file"):  # fmt: skip
        assert getattr(attempt, name).is_relative_to(attempt.run), name
    for name in ("prepared", "starting", "volumes"):
        assert getattr(sandbox, name).is_relative_to(sandbox.path), name
    for name in ("process", "exit", "killed", "runtime_root", "etc"):
        assert getattr(sandbox, name).is_relative_to(sandbox.run), name


def test_attempts_of_which_anything_is_left_come_in_order(sandbox: SandboxFolder) -> None:
    assert sandbox.attempts() == []
    for name in (
        "main.10",
        "main.9",
        "main.0",
        "a.b.1",
        "main.exit",
        "main.²",
        "main.-1",
        "main",
        "prepared.json",
    ):
        (sandbox.path / name).mkdir()
    for name in ("main.0", "side.0", ".side.1", "lost+found.1", "etc"):
        (sandbox.run / name).mkdir()
    found = [(each.container, each.attempt) for each in sandbox.attempts()]
    assert found == [("a.b", 1), ("main", 0), ("main", 9), ("main", 10), ("side", 0)]
    assert [each.attempt for each in sandbox.container("main").attempts()] == [0, 9, 10]
    assert [each.attempt for each in sandbox.container("b").attempts()] == []


def test_what_is_no_sandbox_is_not_listed(sandbox: SandboxFolder, tmp_path: Path) -> None:
    """What is listed and has no record is removed, by its id."""
    for name in ("lost+found", "..x", "a b"):
        (tmp_path / "sandboxes" / name).mkdir()
        (tmp_path / "run" / "sandboxes" / name).mkdir()
        (tmp_path / "cgroup" / "sandkeeper" / name).mkdir(parents=True)
    (tmp_path / "cgroup" / "sandkeeper" / "u-2").mkdir()
    (tmp_path / "run" / "sandboxes" / "u-3").mkdir()
    cgroups = Cgroups("sandkeeper", mountinfo=f"1 2 3 / {tmp_path}/cgroup rw - cgroup2 cgroup2 rw")
    cgroups.make_parent()
    # Threads are not needed to look.
    engine = Containers(Options(tmp_path, tmp_path / "run"), cgroups, Seccomp({"defaultAction": "x"}), None)  # type: ignore[arg-type]
    assert engine.list() == {"u-1", "u-2", "u-3"}


# Volumes


def volumes(*names: str) -> pb.SandboxConfig:
    return pb.SandboxConfig(volumes=[pb.Volume(name=name) for name in names])


def test_a_volume_is_an_empty_folder_for_any_user(sandbox: SandboxFolder) -> None:
    filesystems.make_volumes(sandbox, volumes("data", "more"), Options(sandbox.path))
    assert stat.S_IMODE(sandbox.volume("data").stat().st_mode) == 0o777
    (sandbox.volume("data") / "word").write_text("hello")
    filesystems.make_volumes(sandbox, volumes("data", "more"), Options(sandbox.path))
    assert (sandbox.volume("data") / "word").read_text() == "hello"
    assert list(sandbox.volume("more").iterdir()) == []


@pytest.mark.parametrize("name", ["..", "../../../outside", "/etc"])
def test_a_volume_is_made_nowhere_else(sandbox: SandboxFolder, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(0o700)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EngineError, match="volumes"):
        filesystems.make_volumes(sandbox, volumes(name), Options(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before
    assert stat.S_IMODE(outside.stat().st_mode) == 0o700


# Mounts


def mount(path: str, name: str = "data", **fields: object) -> pb.VolumeMount:
    return pb.VolumeMount(name=name, mount_path=path, **fields)  # type: ignore[arg-type]


def binds(sandbox: SandboxFolder, *mounts: pb.VolumeMount) -> list[tuple[str, str, bool]]:
    container = pb.ContainerConfig(name="main", volume_mounts=mounts)
    found = filesystems.binds(sandbox, sandbox.container("main").attempt(0), container)
    roots = (sandbox.etc, sandbox.volumes)
    assert all(any(Path(each.source).is_relative_to(root) for root in roots) for each in found)
    return [("/".join(Path(each.source).parts[-2:]), each.target, each.read_only) for each in found]


def test_a_container_has_the_sandboxs_own_etc(sandbox: SandboxFolder) -> None:
    assert binds(sandbox) == [
        ("etc/hosts", "/etc/hosts", True),
        ("etc/hostname", "/etc/hostname", True),
        ("etc/resolv.conf", "/etc/resolv.conf", True),
    ]


def test_what_is_above_is_mounted_before_what_is_below(sandbox: SandboxFolder) -> None:
    found = binds(
        sandbox,
        mount("/a/b/c"),
        mount("/a//b/", "more", read_only=True),
        mount("/etc"),
        mount("/dev/shm"),
        mount("/a"),
    )
    assert [(source, target) for source, target, _ in found] == [
        ("volumes/data", "/etc"),
        ("volumes/data", "/a"),
        ("etc/hosts", "/etc/hosts"),
        ("etc/hostname", "/etc/hostname"),
        ("etc/resolv.conf", "/etc/resolv.conf"),
        ("volumes/more", "/a/b"),
        ("volumes/data", "/dev/shm"),
        ("volumes/data", "/a/b/c"),
    ]
    assert [target for _, target, read_only in found if read_only and not target.startswith("/etc/")] == [
        "/a/b"
    ]


@pytest.mark.parametrize("path", ["/proc/self", "/dev", "relative", "/a/../b", "/", "/etc/hosts"])
def test_a_mount_to_where_none_may_be_is_refused(sandbox: SandboxFolder, path: str) -> None:
    with pytest.raises(EngineError, match=r"containers\[main\]\.volumeMounts\[1\]\.mountPath"):
        binds(sandbox, mount("/data"), mount(path))


@pytest.mark.parametrize("sub_path", ["..", "a/../..", "link", "link/deeper", "file", "."])
def test_a_sub_path_does_not_lead_out_of_its_volume(
    sandbox: SandboxFolder, tmp_path: Path, sub_path: str
) -> None:
    filesystems.make_volumes(sandbox, volumes("data"), Options(tmp_path))
    (sandbox.volume("data") / "link").symlink_to(tmp_path)
    (sandbox.volume("data") / "file").write_text("")
    with pytest.raises(EngineError, match=r"volumeMounts\[0\]\.subPath") as caught:
        binds(sandbox, mount("/data", sub_path=sub_path))
    assert caught.value.reason == "InvalidConfig"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run", "sandboxes"]


@pytest.mark.parametrize(
    ("path", "quoted"),
    [("/a b", "/a b"), ("/a,b", "/a\\,b"), ("/a:b", "/a\\:b"), ("/a\\:b", "/a\\\\\\:b")],
)
def test_a_path_is_one_word_among_the_overlays_options(path: str, quoted: str) -> None:
    assert filesystems._quote(path) == quoted


# /etc


def test_etc_without_a_network_names_no_server(sandbox: SandboxFolder) -> None:
    for _ in range(2):
        filesystems.make_etc(sandbox, "green", host_network=False)
    assert (sandbox.etc / "hostname").read_text() == "green\n"
    assert "127.0.0.1\tgreen\n" in (sandbox.etc / "hosts").read_text()
    assert (sandbox.etc / "resolv.conf").read_text() == ""


def test_etc_with_the_hosts_network_has_the_hosts_servers(
    sandbox: SandboxFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystems, "_HOST_RESOLV_CONF", tmp_path / "resolv.conf")
    filesystems.make_etc(sandbox, "green", host_network=True)
    assert (sandbox.etc / "resolv.conf").read_text() == ""
    (tmp_path / "resolv.conf").write_text("nameserver 192.0.2.1\n")
    filesystems.make_etc(sandbox, "green", host_network=True)
    assert (sandbox.etc / "resolv.conf").read_text() == "nameserver 192.0.2.1\n"
