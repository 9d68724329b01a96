"""From what is asked for to an OCI configuration: every field, and what is refused by which name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci import spec
from sandkeeper.shim.engines.oci.images.types import ImageConfig
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.rootfs import User
from sandkeeper.shim.engines.oci.seccomp import Seccomp
from sandkeeper.wire import node_pb2 as pb

OPTIONS = Options(Path("/var/lib/engine"), default_cpu_millis=500, default_memory_bytes=1000, default_pids=10)
SECCOMP = Seccomp({"defaultAction": "SCMP_ACT_ERRNO"})
AROUND = spec.Surroundings(
    rootfs="rootfs",
    user=User(),
    hostname="green",
    cgroups_path="/sandkeeper/u-1/main",
    namespaces={"network": "/proc/7/ns/net", "ipc": "/proc/7/ns/ipc", "uts": "/proc/7/ns/uts"},
    cgroup_v2=False,
    swap_accounting=True,
)
IMAGE = ImageConfig(
    env=("A=image", "PATH=/bin", "BARE", "=unnamed"),
    entrypoint=("/entry", "-x"),
    cmd=("cmd",),
    working_dir="/srv/app/",
)
KIB = 1024
FIELD = "containers[main]"


def container(**fields: Any) -> pb.ContainerConfig:
    return pb.ContainerConfig(**{"name": "main", "command": ["sh"], **fields})


def secured(**fields: Any) -> pb.ContainerConfig:
    return container(security_context=pb.SecurityContext(**fields))


def build(
    asked: pb.ContainerConfig | None = None,
    image: ImageConfig = IMAGE,
    around: spec.Surroundings = AROUND,
    options: Options = OPTIONS,
) -> dict[str, Any]:
    return spec.build(asked or container(), image, around, options, SECCOMP)


def env(**fields: Any) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in build(container(**fields))["process"]["env"])


def refusal(action: Any, *arguments: Any) -> str:
    """The message of the InvalidConfig that `action` must raise."""
    with pytest.raises(EngineError) as caught:
        action(*arguments)
    assert caught.value.reason == "InvalidConfig"
    assert not caught.value.retryable
    return caught.value.message


# The defaults


def test_what_asks_for_nothing_is_confined() -> None:
    found = build()
    assert found["process"]["noNewPrivileges"] is True
    assert found["process"]["user"] == {"uid": 0, "gid": 0}
    assert found["process"]["terminal"] is False
    assert "ambient" not in found["process"]["capabilities"]
    assert "inheritable" not in found["process"]["capabilities"]
    assert found["root"] == {"path": "rootfs", "readonly": False}
    linux = found["linux"]
    assert {"/proc/kcore", "/proc/keys", "/sys/firmware", "/proc/timer_list"} <= set(linux["maskedPaths"])
    assert {"/proc/sys", "/proc/sysrq-trigger", "/proc/bus"} <= set(linux["readonlyPaths"])
    assert linux["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert linux["cgroupsPath"] == "/sandkeeper/u-1/main"
    assert linux["resources"]["devices"] == [{"allow": False, "access": "rwm"}]


def test_the_kernels_file_systems_are_mounted_strictly() -> None:
    mounts = {each["destination"]: each for each in build()["mounts"]}
    for target in ("/proc", "/sys", "/sys/fs/cgroup", "/dev/mqueue", "/dev/shm"):
        assert {"nosuid", "noexec", "nodev"} <= set(mounts[target]["options"]), target
    assert "ro" in mounts["/sys"]["options"]
    assert "ro" in mounts["/sys/fs/cgroup"]["options"]
    assert f"size={OPTIONS.shm_bytes}" in mounts["/dev/shm"]["options"]
    assert {each["type"] for each in mounts.values()}.isdisjoint({"bind"})


def test_no_namespace_is_the_hosts_but_those_that_are_left_out() -> None:
    assert build()["linux"]["namespaces"] == [
        {"type": "pid"},
        {"type": "mount"},
        {"type": "network", "path": "/proc/7/ns/net"},
        {"type": "ipc", "path": "/proc/7/ns/ipc"},
        {"type": "uts", "path": "/proc/7/ns/uts"},
    ]
    new = replace(AROUND, namespaces={"network": ""}, cgroup_v2=True)
    assert build(around=new)["linux"]["namespaces"] == [
        {"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}, {"type": "network"},
    ]  # fmt: skip


def test_a_bind_replaces_the_kernels_mount_at_its_place() -> None:
    binds = (spec.Bind("/state/shm", "/dev/shm"), spec.Bind("/state/data", "/data", read_only=True))
    mounts = build(around=replace(AROUND, binds=binds))["mounts"]
    assert [each["type"] for each in mounts if each["destination"] == "/dev/shm"] == ["bind"]
    assert mounts[-1] == {
        "destination": "/data",
        "type": "bind",
        "source": "/state/data",
        "options": ["bind", "nosuid", "nodev", "rprivate", "ro"],
    }


# The process


@pytest.mark.parametrize(
    ("command", "args", "argv"),
    [
        ([], [], ["/entry", "-x", "cmd"]),
        ([], ["own"], ["/entry", "-x", "own"]),
        (["run"], [], ["run"]),
        (["run"], ["own", ""], ["run", "own", ""]),
    ],
)
def test_command_and_args_replace_entrypoint_and_cmd_as_in_a_pod(
    command: list[str], args: list[str], argv: list[str]
) -> None:
    assert build(container(command=command, args=args))["process"]["args"] == argv


@pytest.mark.parametrize(
    ("fields", "image"),
    [
        ({"command": []}, ImageConfig()),
        ({"command": [""]}, IMAGE),
        ({"command": [], "args": [""]}, ImageConfig(cmd=("x",))),
        ({"command": ["a\0b"]}, IMAGE),
        ({"args": ["\0"]}, IMAGE),
        ({"args": ["x" * (128 * KIB)]}, IMAGE),
        ({"args": ["x" * (64 * KIB)] * 13}, IMAGE),
    ],
)
def test_a_command_that_cannot_be_run_is_refused(fields: dict[str, Any], image: ImageConfig) -> None:
    assert refusal(build, container(**fields), image).startswith(f"{FIELD}.command:")


def test_the_longest_arguments_of_the_api_are_taken() -> None:
    asked = container(command=["x" * 32768] * 2, args=["é" * 32768] * 2)
    assert len(build(asked)["process"]["args"]) == 4


def test_the_later_environment_wins() -> None:
    found = env(env=[pb.EnvVar(name="B", value="one"), pb.EnvVar(name="B", value="two=2")])
    assert found == {"PATH": "/bin", "HOSTNAME": "green", "A": "image", "BARE": "", "B": "two=2"}
    found = env(env=[pb.EnvVar(name="A", value=""), pb.EnvVar(name="HOSTNAME", value="other")])
    assert (found["A"], found["HOSTNAME"]) == ("", "other")


def test_there_is_a_path_without_an_image() -> None:
    found = spec.environment(container(), ImageConfig(), "green")
    assert [entry for entry in found if entry.startswith("PATH=/usr/local/sbin:")]


@pytest.mark.parametrize("name", ["a b", "ä", "1A", "a.b-c", "\n", "a" * 1000])
def test_an_odd_name_of_a_variable_is_taken(name: str) -> None:
    assert env(env=[pb.EnvVar(name=name, value="x")])[name] == "x"


@pytest.mark.parametrize(("name", "value"), [("", "x"), ("=", "x"), ("A=B", "x"), ("A\0", "x"), ("A", "\0")])
def test_a_variable_that_is_none_is_refused_by_its_place(name: str, value: str) -> None:
    asked = container(env=[pb.EnvVar(name="GOOD"), pb.EnvVar(name=name, value=value)])
    assert refusal(build, asked).startswith(f"{FIELD}.env[1]:")


@pytest.mark.parametrize(("variables", "size"), [(1, 128 * KIB), (9, 120 * KIB), (20_000, 40)])
def test_an_environment_that_no_process_can_have_is_refused(variables: int, size: int) -> None:
    asked = container(env=[pb.EnvVar(name=f"V{n}", value="x" * size) for n in range(variables)])
    assert refusal(build, asked).startswith(f"{FIELD}.env:")


def test_an_environment_of_nearly_a_mebibyte_is_taken() -> None:
    asked = container(env=[pb.EnvVar(name=f"V{n}", value="x" * (127 * KIB)) for n in range(8)])
    assert len(build(asked)["process"]["env"]) == 8 + 4


@pytest.mark.parametrize(
    ("asked", "image", "cwd"),
    [
        ("", "", "/"),
        ("", "/srv/app/", "/srv/app"),
        ("/own", "/srv", "/own"),
        ("//own//./deep/", "/srv", "/own/deep"),
        ("/processes", "", "/processes"),
        ("/srv/proc", "", "/srv/proc"),
        ("/...", "", "/..."),
    ],
)
def test_working_folder(asked: str, image: str, cwd: str) -> None:
    found = build(container(working_dir=asked), replace(IMAGE, working_dir=image))
    assert found["process"]["cwd"] == cwd


BAD_PATHS = [
    "/proc", "/proc/self/fd/7", "//proc/self/fd/7", "/./proc/self", "/proc/.", "/proc/", "/sys/fs", "/dev/fd/3",
    "/dev", "/dev/shm", "relative", "./x", "../x", "/..", "/a/../b", "/a/..", "/srv/\0", "/a\nb",
    "/" + "a" * 256, "/" + "é" * 128, "/a" * 2048,
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_working_folder_that_leads_elsewhere_is_refused(path: str) -> None:
    assert refusal(build, container(working_dir=path)).startswith(f"{FIELD}.workingDir:")
    assert refusal(build, None, replace(IMAGE, working_dir=path)).startswith(f"{FIELD}.workingDir:")


# Mounts


def mounts(*paths: str, sub_path: str = "", volume: str = "data") -> pb.ContainerConfig:
    return container(
        volume_mounts=[pb.VolumeMount(name=volume, mount_path=path, sub_path=sub_path) for path in paths]
    )


def check_mounts(asked: pb.ContainerConfig) -> None:
    spec.check_mounts(pb.SandboxConfig(volumes=[pb.Volume(name="data")]), asked)


@pytest.mark.parametrize("path", ["/data", "/a//b/", "/etc", "/etc/hosts.d", "/dev/shm", "/srv/dev"])
def test_a_mount_path_may_be(path: str) -> None:
    check_mounts(mounts(path))


@pytest.mark.parametrize(
    "path",
    [
        *(path for path in BAD_PATHS if path != "/dev/shm"),
        "", "/", "//", "/.", "/dev/shm/", "/dev/shm/x", "/dev//shm", "/etc/hosts", "/etc/hostname/x",
        "//etc/resolv.conf",
    ],
)  # fmt: skip
def test_a_mount_path_may_not_be(path: str) -> None:
    assert refusal(check_mounts, mounts("/good", path)).startswith(f"{FIELD}.volumeMounts[1].mountPath:")


def test_no_two_mounts_are_at_one_place() -> None:
    message = refusal(check_mounts, mounts("/data", "/x", "//data/"))
    assert message.startswith(f"{FIELD}.volumeMounts[2].mountPath:")


def test_a_mount_of_no_volume_is_refused() -> None:
    message = refusal(check_mounts, mounts("/data", volume="other"))
    assert message.startswith(f"{FIELD}.volumeMounts[0].name:")


@pytest.mark.parametrize("path", ["a", "a/b", "a//b/", "...", "..a", ".hidden"])
def test_a_sub_path_may_be(path: str) -> None:
    check_mounts(mounts("/data", sub_path=path))


@pytest.mark.parametrize("path", ["/", "/a", "..", "a/..", "a/../b", ".", "./a", "a/./b", "a\0"])
def test_a_sub_path_may_not_be(path: str) -> None:
    message = refusal(check_mounts, mounts("/data", sub_path=path))
    assert message.startswith(f"{FIELD}.volumeMounts[0].subPath:")


def test_a_volume_of_less_than_nothing_is_refused() -> None:
    config = pb.SandboxConfig(volumes=[pb.Volume(name="a"), pb.Volume(name="b", size_limit_bytes=-1)])
    assert refusal(spec.check_volumes, config).startswith("volumes[b].sizeLimit:")


# Who runs it


def identity(image: User, gid: int | None = None, **fields: Any) -> User:
    return spec.identity(secured(**fields), image, gid)


def test_the_images_user_is_the_default() -> None:
    image = User(5, 6, (7, 8))
    assert identity(image) == image
    assert identity(image, run_as_group=0) == User(5, 0, (7, 8))
    assert build(around=replace(AROUND, user=image))["process"]["user"] == {
        "uid": 5, "gid": 6, "additionalGids": [7, 8],
    }  # fmt: skip


def test_run_as_user_leaves_the_images_groups_behind() -> None:
    image = User(0, 0, (4,))
    assert identity(image, run_as_user=9) == User(9, 0)
    assert identity(image, 3, run_as_user=9) == User(9, 3)
    assert identity(image, 3, run_as_user=9, run_as_group=2**31 - 1) == User(9, 2**31 - 1)
    assert identity(User(5, 5), run_as_user=0) == User(0, 0)


@pytest.mark.parametrize(("image", "fields"), [(0, {}), (5, {"run_as_user": 0})])
def test_root_is_refused_where_none_may_be(image: int, fields: dict[str, int]) -> None:
    asked = secured(run_as_non_root=True, **fields)
    message = refusal(spec.identity, asked, User(image, 5))
    assert message.startswith(f"{FIELD}.securityContext.runAsNonRoot:")


def test_who_is_not_root_may_be_where_root_may_not() -> None:
    assert identity(User(5), run_as_non_root=True).uid == 5
    assert identity(User(0), run_as_non_root=True, run_as_user=1, run_as_group=0) == User(1, 0)


@pytest.mark.parametrize(("field", "name"), [("run_as_user", "runAsUser"), ("run_as_group", "runAsGroup")])
@pytest.mark.parametrize("number", [-1, -(2**63), 2**31, 2**32, 2**63 - 1])
def test_an_id_that_no_process_can_have_is_refused(field: str, name: str, number: int) -> None:
    message = refusal(spec.identity, secured(**{field: number}), User(5))
    assert message.startswith(f"{FIELD}.securityContext.{name}:")


def test_the_rest_of_the_security_context() -> None:
    found = build(secured(allow_privilege_escalation=True, read_only_root_filesystem=True))
    assert found["process"]["noNewPrivileges"] is False
    assert found["root"]["readonly"] is True


# Capabilities


def caps(add: list[str], drop: list[str], allowed: tuple[str, ...] = ()) -> frozenset[str]:
    asked = secured(capabilities_add=add, capabilities_drop=drop)
    found = spec.capabilities(asked, allowed)
    document = build(asked, options=replace(OPTIONS, allowed_capabilities=allowed))
    sets = document["process"]["capabilities"]
    assert sets["bounding"] == sets["effective"] == sets["permitted"] == sorted(found)
    return found


def test_default_capabilities() -> None:
    found = caps([], [])
    assert found == spec.DEFAULT_CAPABILITIES
    assert found.isdisjoint({"CAP_SYS_ADMIN", "CAP_NET_RAW", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_SYS_PTRACE"})


def test_capabilities_are_dropped_and_added_in_either_spelling() -> None:
    assert caps([], ["ALL"]) == frozenset()
    assert caps([], ["cap_all"]) == frozenset()
    assert caps(["NET_RAW"], ["ALL"]) == {"CAP_NET_RAW"}
    assert caps(["chown"], ["CAP_CHOWN"]) == spec.DEFAULT_CAPABILITIES
    assert caps([], ["CAP_SETUID", "kill"]) == spec.DEFAULT_CAPABILITIES - {"CAP_SETUID", "CAP_KILL"}
    assert caps([], ["SYS_ADMIN"]) == spec.DEFAULT_CAPABILITIES


@pytest.mark.parametrize("name", ["SYS_ADMIN", "CAP_SYS_MODULE", "ALL", "cap_all", "", "CAP_", "CHOWN "])
def test_a_capability_beyond_those_allowed_is_refused(name: str) -> None:
    message = refusal(caps, ["CHOWN", name], ["ALL"])
    assert message.startswith(f"{FIELD}.securityContext.capabilities.add:")


def test_the_node_may_allow_more() -> None:
    assert caps(["SYS_ADMIN"], ["ALL"], ("CAP_SYS_ADMIN",)) == {"CAP_SYS_ADMIN"}
    assert caps(["CAP_SYS_ADMIN"], ["ALL"], ("sys_admin",)) == {"CAP_SYS_ADMIN"}
    assert "SYS_MODULE" in refusal(caps, ["SYS_MODULE"], [], ("SYS_ADMIN",))


# Limits


def limits(swap: bool = True, options: Options = OPTIONS, **fields: int) -> dict[str, Any]:
    return spec.resources(container(resources=pb.Resources(**fields)), options, swap)


def test_there_are_limits_without_any() -> None:
    found = limits()
    assert found["memory"] == {"limit": 1000, "swap": 1000}
    assert found["pids"] == {"limit": 10}
    assert found["cpu"] == {"shares": 512, "quota": 50_000, "period": 100_000}


def test_limits_that_are_asked_for() -> None:
    found = limits(swap=False, cpu_millis=2000, memory_bytes=7, pids=4194304)
    assert found["memory"] == {"limit": 7}
    assert found["pids"] == {"limit": 4194304}
    assert found["cpu"] == {"shares": 2048, "quota": 200_000, "period": 100_000}


@pytest.mark.parametrize(
    ("millis", "shares", "quota"), [(1, 2, 1000), (9, 9, 1000), (4_096_000, 262_144, 409_600_000)]
)
def test_cpu_stays_within_what_the_kernel_takes(millis: int, shares: int, quota: int) -> None:
    assert limits(cpu_millis=millis)["cpu"] == {"shares": shares, "quota": quota, "period": 100_000}


def test_a_node_may_leave_the_cpu_without_a_limit() -> None:
    assert limits(options=replace(OPTIONS, default_cpu_millis=0))["cpu"] == {}


@pytest.mark.parametrize(
    ("field", "name", "number"),
    [
        ("cpu_millis", "cpu", -1), ("cpu_millis", "cpu", 2**63 - 1), ("memory_bytes", "memory", -1),
        ("memory_bytes", "memory", -(2**63)), ("pids", "pids", -1), ("pids", "pids", 4194305),
    ],
)  # fmt: skip
def test_a_limit_that_would_be_none_is_refused(field: str, name: str, number: int) -> None:
    asked = container(resources=pb.Resources(**{field: number}))
    assert refusal(build, asked).startswith(f"{FIELD}.resources.limits.{name}:")


# The host name


@pytest.mark.parametrize(
    ("hostname", "owner", "found"),
    [
        ("green", "box", "green"), ("a" * 63, "box", "a" * 63), ("a.b-c", "", "a.b-c"), ("", "box", "box"),
        ("", "x" * 62 + ".y", "x" * 62), ("", "", "u-1"), ("", "bad name", "u-1"), ("", "-", "u-1"),
        ("", "a\n127.0.0.1 evil", "u-1"),
    ],
)  # fmt: skip
def test_host_name(hostname: str, owner: str, found: str) -> None:
    config = pb.SandboxConfig(hostname=hostname, owner=pb.Owner(name=owner))
    assert spec.host_name("u-1", config) == found


@pytest.mark.parametrize(
    "hostname", ["a" * 64, "é" * 40, "-a", "a-", "a b", "a\nb", "a\0", " ", "a/b", "a\n"]
)
def test_a_host_name_that_is_none_is_refused(hostname: str) -> None:
    assert refusal(spec.host_name, "u-1", pb.SandboxConfig(hostname=hostname)).startswith("hostname:")
