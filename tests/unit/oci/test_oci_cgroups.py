"""cgroups v1, hybrid and v2, over plain folders in the place of the kernel's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sandkeeper.shim.engines.base import EngineError, UsageSample
from sandkeeper.shim.engines.oci.cgroups import MONITORS, Cgroups, Mount, find_mounts
from sandkeeper.wire.ids import valid_id

ID = "u-1"

V2 = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
25 22 0:22 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
29 25 0:26 / /sys/fs/cgroup rw,nosuid,nodev shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
"""
V1 = """\
31 23 0:28 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:11 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:12 - cgroup cgroup rw,memory
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
"""
HYBRID = f"{V1}41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
ROOT = Path("/sys/fs/cgroup")


# What is mounted


def test_v2_is_found() -> None:
    found = Cgroups("sandkeeper", mountinfo=V2)
    assert found.v2
    assert [each.point for each in found.hierarchies] == [ROOT]
    assert found.hidden == ()


def test_v1_is_found() -> None:
    found = Cgroups("sandkeeper", mountinfo=V1)
    assert not found.v2
    assert found.hidden == ()
    assert found.hierarchies == (
        Mount(ROOT / "cpu,cpuacct", frozenset({"cpu", "cpuacct"})),
        Mount(ROOT / "memory", frozenset({"memory"})),
        Mount(ROOT / "freezer", frozenset({"freezer"})),
        Mount(ROOT / "pids", frozenset({"pids"})),
        Mount(ROOT / "systemd", frozenset({"name=systemd"})),
    )


def test_beside_v1_v2_is_hidden() -> None:
    found = Cgroups("sandkeeper", mountinfo=HYBRID)
    assert not found.v2
    assert found.hidden == (str(ROOT / "unified"),)
    assert found.hierarchies == Cgroups("sandkeeper", mountinfo=V1).hierarchies


def test_a_hierarchy_that_is_mounted_twice_is_used_once() -> None:
    again = V1 + V1.replace("/sys/fs/cgroup", "/elsewhere")
    assert find_mounts(again) == find_mounts(V1)
    assert find_mounts(V2 + V2.replace("/sys/fs/cgroup", "/elsewhere")) == ((), ROOT)


@pytest.mark.parametrize(
    "mountinfo", ["", "\n", V2.splitlines()[0], "no mount at all", "1 2 3 4 5 - cgroup2"]
)
def test_a_node_without_cgroups_is_told(mountinfo: str) -> None:
    with pytest.raises(EngineError, match="cgroup") as caught:
        Cgroups("sandkeeper", mountinfo=mountinfo)
    assert caught.value.reason == "NodeUnsupported"


@pytest.mark.parametrize(
    ("written", "point"),
    [
        (r"/mnt/a\040b", "/mnt/a b"), (r"/mnt/a\134040b", r"/mnt/a\040b"), (r"/mnt/\011\012", "/mnt/\t\n"),
        ("/mnt/a\u2028b\x0b\x85", "/mnt/a\u2028b\x0b\x85"), ("/mnt/a\u00a0b", "/mnt/a\u00a0b"),
        ("/mnt/\udcff", "/mnt/\udcff"),
    ],
)  # fmt: skip
def test_a_mount_point_of_any_name_is_read_as_it_is(written: str, point: str) -> None:
    assert find_mounts(V2.replace("/sys/fs/cgroup", written)) == ((), Path(point))
    # Nor does one that is no cgroup's disturb.
    assert find_mounts(V1.replace("/sys/fs/cgroup ", f"{written} ")) == find_mounts(V1)


# Ids as paths


def test_paths_are_those_of_the_runtime_specification() -> None:
    found = Cgroups("sandkeeper", mountinfo=V2)
    assert found.path(ID) == "/sandkeeper/u-1"
    assert found.path(ID, "main") == "/sandkeeper/u-1/main"


def test_no_sandbox_is_called_as_the_monitors_are() -> None:
    assert not valid_id(MONITORS)


# Over plain folders

Make = Callable[[str], Cgroups]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Cgroups over folders below tmp_path, laid out as in a mountinfo."""

    def cgroups(mountinfo: str) -> Cgroups:
        found = Cgroups("sandkeeper", mountinfo=mountinfo.replace("/sys/fs/cgroup", str(tmp_path)))
        for each in found.hierarchies:
            each.point.mkdir(exist_ok=True)
        return found

    return cgroups


each_version = pytest.mark.parametrize("mountinfo", [V1, HYBRID, V2], ids=["v1", "hybrid", "v2"])


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@each_version
def test_a_sandbox_has_a_cgroup_in_each_hierarchy_until_it_is_removed(make: Make, mountinfo: str) -> None:
    found = make(mountinfo)
    found.make_parent()
    assert (found.list(), found.exists(ID)) == (frozenset(), False)
    for _ in range(2):
        found.make(ID)
    assert (found.list(), found.exists(ID)) == ({ID}, True)
    for each in found.hierarchies:
        folder = each.point / "sandkeeper" / ID
        assert folder.is_dir()
        (folder / "cgroup.subtree_control").unlink(missing_ok=True)  # the kernel's own go with the folder
        (folder / "main" / "below").mkdir(parents=True)
    found.remove_container(ID, "main")
    assert found.exists(ID)
    for _ in range(2):
        found.remove(ID)
    assert (found.list(), found.exists(ID)) == (frozenset(), False)


@each_version
def test_a_cgroup_that_does_not_go_is_told(make: Make, mountinfo: str) -> None:
    found = make(mountinfo)
    found.make_parent()
    found.make(ID)
    write(found.hierarchies[0].point / "sandkeeper" / ID, busy="")
    with pytest.raises(EngineError, match=ID) as caught:
        found.remove(ID, 0.0)
    assert (caught.value.reason, caught.value.retryable) == ("RemoveFailed", True)


def test_a_parent_that_cannot_be_made_is_told(make: Make, tmp_path: Path) -> None:
    found = make(V2)
    write(tmp_path, sandkeeper="a file")
    with pytest.raises(EngineError) as caught:
        found.make_parent()
    assert caught.value.reason == "NodeUnsupported"


def test_v2_hands_its_controllers_down(make: Make, tmp_path: Path) -> None:
    found = make(V2)
    found.make_parent()
    for folder in (tmp_path, tmp_path / "sandkeeper"):
        assert (folder / "cgroup.subtree_control").read_text().startswith("+")


def test_a_new_cpuset_of_v1_takes_processes(make: Make, tmp_path: Path) -> None:
    found = make(V1 + "38 31 0:35 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n")
    write(tmp_path / "cpuset", cpuset__cpus="0-3\n", cpuset__mems="0\n")
    write(tmp_path / "cpuset" / "sandkeeper", cpuset__cpus="\n", cpuset__mems="1\n")
    found.make_parent()
    parent = tmp_path / "cpuset" / "sandkeeper"
    assert (parent / "cpuset.cpus").read_text() == "0-3\n"
    assert (parent / "cpuset.mems").read_text() == "1\n"


@pytest.mark.parametrize(
    ("mountinfo", "path"),
    [
        (V1, "memory/memory.memsw.limit_in_bytes"), (V1, "memory/sandkeeper/memory.memsw.limit_in_bytes"),
        (V2, "sandkeeper/memory.swap.max"),
    ],
)  # fmt: skip
def test_swap_accounting_is_seen(make: Make, tmp_path: Path, mountinfo: str, path: str) -> None:
    found = make(mountinfo)
    assert not found.has_swap_accounting
    write((tmp_path / path).parent, **{(tmp_path / path).name: "max"})
    assert found.has_swap_accounting


@each_version
def test_the_processes_of_all_containers_are_found(make: Make, mountinfo: str) -> None:
    found = make(mountinfo)
    assert found.pids(ID) == frozenset()
    folder = found.hierarchies[0].point / "sandkeeper" / ID
    write(folder, cgroup__procs="0\n")
    write(folder / "main", cgroup__procs="7\n8\n")
    write(folder / "main" / "below", cgroup__procs="9\n")
    write(found.hierarchies[-1].point / "sandkeeper" / ID / "other", cgroup__procs="10\n")
    write(found.hierarchies[0].point / "sandkeeper" / "u-11", cgroup__procs="11\n")
    assert found.pids(ID) == {7, 8, 9, 10}


def test_usage_on_v1(make: Make, tmp_path: Path) -> None:
    found = make(V1)
    assert found.usage(ID) is None
    write(tmp_path / "cpu,cpuacct/sandkeeper" / ID, cpuacct__usage="2500999\n")
    write(tmp_path / "memory/sandkeeper" / ID, memory__usage_in_bytes="4096\n")
    assert found.usage(ID) is None
    write(tmp_path / "pids/sandkeeper" / ID, pids__current="3\n")
    assert found.usage(ID) == UsageSample(cpu_usage_usec=2500, memory_bytes=4096, pids=3)


def test_usage_on_v2(make: Make, tmp_path: Path) -> None:
    found = make(V2)
    folder = tmp_path / "sandkeeper" / ID
    write(folder, cpu__stat="usage_usec 2500\nuser_usec 1\n", memory__current="4096\n", pids__current="3\n")
    assert found.usage(ID) == UsageSample(cpu_usage_usec=2500, memory_bytes=4096, pids=3)


@pytest.mark.parametrize("text", ["", "usage_usec\n", "usage_usec x\n", "a b c\n", "user_usec 1\n"])
def test_usage_that_cannot_be_read_is_none(make: Make, tmp_path: Path, text: str) -> None:
    found = make(V2)
    write(tmp_path / "sandkeeper" / ID, cpu__stat=text, memory__current="1", pids__current="1")
    assert found.usage(ID) is None


@pytest.mark.parametrize(
    ("mountinfo", "path", "text", "kills"),
    [
        (
            V1,
            "memory/sandkeeper/u-1/main/memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
            2,
        ),
        (V1, "memory/sandkeeper/u-1/main/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n", 0),
        (V2, "sandkeeper/u-1/main/memory.events", "low 0\nhigh 0\nmax 5\noom 1\noom_kill 1\n", 1),
        (V2, "sandkeeper/u-1/main/memory.events", "garbage\n", 0),
        (V2, "sandkeeper/u-1/other/memory.events", "oom_kill 1\n", 0),
    ],
)
def test_kills_for_memory(
    make: Make, tmp_path: Path, mountinfo: str, path: str, text: str, kills: int
) -> None:
    found = make(mountinfo)
    write((tmp_path / path).parent, **{(tmp_path / path).name: text})
    assert found.oom_kills(ID, "main") == kills


# Freezing


def test_freezing_on_v1(make: Make, tmp_path: Path) -> None:
    found = make(V1)
    assert not found.is_frozen(ID)
    state = tmp_path / "freezer/sandkeeper" / ID / "freezer.state"
    write(state.parent, freezer__state="THAWED\n")
    assert not found.is_frozen(ID)
    found.freeze(ID, True)
    assert (state.read_text(), found.is_frozen(ID)) == ("FROZEN", True)
    found.freeze(ID, False)
    assert (state.read_text(), found.is_frozen(ID)) == ("THAWED", False)
    state.write_text("FREEZING\n")
    assert found.is_frozen(ID)


def test_what_does_not_freeze_is_let_go_for_a_moment(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As v1 behaves where a thread is frozen that another's execve waits for: FREEZING until it is thawed."""
    found, written = make(V1), list[str]()
    write(tmp_path / "freezer/sandkeeper" / ID, freezer__state="THAWED\n")
    monkeypatch.setattr(Path, "write_text", lambda _path, text: written.append(text))
    monkeypatch.setattr(Path, "read_text", lambda _path: written[-1] if "THAWED" in written else "FREEZING\n")
    found.freeze(ID, True)
    assert written[-2:] == ["THAWED", "FROZEN"]


def test_freezing_on_v2(make: Make, tmp_path: Path) -> None:
    found = make(V2)
    folder = tmp_path / "sandkeeper" / ID
    write(folder, cgroup__freeze="0\n", cgroup__events="populated 1\nfrozen 1\n")
    assert not found.is_frozen(ID)
    found.freeze(ID, True)
    assert ((folder / "cgroup.freeze").read_text(), found.is_frozen(ID)) == ("1", True)
    with pytest.raises(EngineError) as caught:
        found.freeze(ID, False, 0.0)
    assert (caught.value.reason, caught.value.retryable) == ("PauseFailed", True)


@each_version
def test_what_is_not_there_does_not_freeze(make: Make, mountinfo: str) -> None:
    with pytest.raises(EngineError) as caught:
        make(mountinfo).freeze(ID, True)
    assert (caught.value.reason, caught.value.retryable) == ("PauseFailed", True)


# The monitors


@each_version
def test_monitors_are_moved_to_their_own_cgroup(make: Make, mountinfo: str) -> None:
    found = make(mountinfo)
    found.make_parent()
    found.adopt(7)
    for each in found.hierarchies:
        assert (each.point / "sandkeeper" / MONITORS / "cgroup.procs").read_text() == "7"


@each_version
def test_the_shared_cgroups_go_with_the_last_sandbox(make: Make, mountinfo: str) -> None:
    found = make(mountinfo)
    found.make_parent()
    found.make(ID)
    for each in found.hierarchies:
        (each.point / "sandkeeper" / "cgroup.subtree_control").unlink(missing_ok=True)
    found.close()
    assert found.list() == {ID}
    found.remove(ID)
    found.close()
    assert not any((each.point / "sandkeeper").exists() for each in found.hierarchies)


def test_only_what_is_in_the_monitors_cgroup_as_a_whole_is_found_there(make: Make) -> None:
    """A shim has threads in it (7, of process 5): it is not in it. 8 is in one hierarchy alone."""
    found = make(V1)
    assert found.in_monitors() == frozenset()
    for index, each in enumerate(found.hierarchies):
        more = "8\n" if index == 0 else ""
        folder = each.point / "sandkeeper" / MONITORS
        write(folder, cgroup__procs=f"0\n2\n3\n5\n{more}", tasks=f"0\n2\n3\n4\n7\n{more}")
    assert found.in_monitors() == frozenset({2, 3})
    on_v2 = make(V2)
    write(on_v2.hierarchies[0].point / "sandkeeper" / MONITORS, cgroup__procs="2\n")
    assert on_v2.in_monitors() == frozenset()


def test_beside_v1_what_a_shim_starts_is_in_no_cgroup_of_its_pod(make: Make, tmp_path: Path) -> None:
    """containerd and kubelet end a Pod by killing what is in its cgroups, that of v2 among them."""
    home = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    pod = tmp_path / "unified" / home.removeprefix("0::").lstrip("/")
    pod.mkdir(parents=True)
    found = make(HYBRID)
    found.make_parent()
    monitors = tmp_path / "unified" / "sandkeeper" / MONITORS
    assert (monitors / "cgroup.procs").read_text() == str(os.getpid())
    (monitors / "cgroup.procs").unlink()  # the kernel's own goes with the folder
    found.close()
    assert (pod / "cgroup.procs").read_text() == str(os.getpid())
    assert not [each for each in found.parents if each.exists()]
