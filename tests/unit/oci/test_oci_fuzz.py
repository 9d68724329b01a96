"""Whatever a client, an image or a tool says: an answer or an EngineError, and no path outside."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci import filesystems, monitor, rootfs, spec, tools
from sandkeeper.shim.engines.oci.cgroups import Cgroups, find_mounts
from sandkeeper.shim.engines.oci.containers import Containers
from sandkeeper.shim.engines.oci.folders import SandboxFolder
from sandkeeper.shim.engines.oci.images.types import Image, ImageConfig
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.seccomp import Seccomp, resolve
from sandkeeper.wire import node_pb2 as pb

FAST = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
DIGEST = f"sha256:{'0' * 64}"

# What the wire can carry, and what an image's JSON can: halves of characters as well.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = st.sampled_from(["main", "side", "data", "u-1", "A.b_c"]) | texts
parts = st.sampled_from(
    [*" abä\0\n", "", ".", "..", "...", "proc", "sys", "dev", "shm", "etc", "hosts", "self", "fd", "a" * 256]
)  # fmt: skip
paths = st.lists(parts, max_size=6).map("/".join) | texts
sizes = st.sampled_from([131071, 131072, 500_000])
long_texts = texts | sizes.map("x".__mul__)


def mostly(plain: Any, odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """So that not every configuration has something wrong in it."""
    return st.integers(0, 15).flatmap(lambda each: odd if each == 15 else st.just(plain))


def numbers(bits: int = 64) -> st.SearchStrategy[int]:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    edges = [low, -1, 0, 1, 1000, 4_194_304, 2**31 - 1, 2**31, 2**32, high]
    return st.sampled_from([edge for edge in edges if edge <= high]) | st.integers(low, high)


capabilities = st.sampled_from(["ALL", "CHOWN", "CAP_NET_RAW", "SYS_ADMIN", "cap_kill", ""]) | texts
mounts = st.builds(
    pb.VolumeMount,
    name=mostly("data", names),
    mount_path=mostly("/a/./b", paths) | st.sampled_from(["/data", "/dev/shm", "/etc"]),
    read_only=st.booleans(),
    sub_path=mostly("", paths),
)
containers = st.builds(
    pb.ContainerConfig,
    name=names,
    image=texts,
    command=mostly(["sh"], st.lists(long_texts, max_size=3)),
    args=mostly([], st.lists(long_texts, max_size=3)),
    env=mostly([], st.lists(st.builds(pb.EnvVar, name=texts, value=long_texts), max_size=3)),
    working_dir=mostly("", paths),
    resources=st.builds(
        pb.Resources,
        cpu_millis=mostly(0, numbers()),
        memory_bytes=mostly(0, numbers()),
        pids=mostly(0, numbers()),
    ),
    security_context=st.builds(
        pb.SecurityContext,
        run_as_user=mostly(None, numbers()),
        run_as_group=mostly(None, numbers()),
        run_as_non_root=mostly(False, st.booleans()),
        read_only_root_filesystem=st.booleans(),
        allow_privilege_escalation=st.booleans(),
        capabilities_add=mostly([], st.lists(capabilities, max_size=2)),
        capabilities_drop=st.lists(capabilities, max_size=2),
    ),
    volume_mounts=st.lists(mounts, max_size=3, unique_by=lambda each: each.mount_path),
)
configs = st.builds(
    pb.SandboxConfig,
    owner=st.builds(pb.Owner, namespace=texts, name=names, uid=texts, instance=st.integers(0, 2**32 - 1)),
    hostname=mostly("", names),
    network=mostly(0, st.sampled_from([1, 2, -1, 2**31 - 1])),
    containers=st.lists(containers, min_size=1, max_size=2, unique_by=lambda each: each.name),
    volumes=st.lists(
        st.builds(pb.Volume, name=mostly("data", names), size_limit_bytes=mostly(0, numbers())),
        min_size=1,
        max_size=3,
    ),
)

any_texts = st.text(max_size=12)
accounts = any_texts | st.sampled_from(
    ["root", "0:0", "app:staff", "-1", "9" * 5000, "4294967296:1", ":", "²"]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_texts, inner, max_size=3),
    max_leaves=5,
)


def field(plain: Any, odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return mostly(plain, odd | json_values)


execution = st.fixed_dictionaries(
    {},
    optional={
        "Env": field(["PATH=/bin"], st.lists(any_texts, max_size=3)),
        "Entrypoint": field(["/entry"], st.lists(any_texts, max_size=2)),
        "Cmd": field(["sh"], st.lists(any_texts, max_size=2)),
        "WorkingDir": field("/srv", paths),
        "User": field("app", accounts),
        "StopSignal": field("SIGTERM", any_texts),
        "Labels": field({"a": "b"}, st.dictionaries(any_texts, any_texts, max_size=2)),
    },
)
documents = st.fixed_dictionaries({"config": execution | execution | json_values}) | st.just({})


@dataclass(frozen=True)
class World:
    """An engine's folders without the engine."""

    root: Path
    image: Path
    options: Options
    containers: Containers


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("fuzz")
    image = root / "image"
    (image / "etc").mkdir(parents=True)
    (image / "etc" / "passwd").write_text("root:x:0:0::/:\napp:x:5:6::/:\n")
    (image / "etc" / "group").write_text("staff:x:7:app\n")
    options = Options(root / "engine", allowed_capabilities=("NET_ADMIN",))
    cgroups = Cgroups("sandkeeper", mountinfo=f"1 2 3 / {root}/cgroup rw - cgroup2 cgroup2 rw")
    profile = Seccomp({"defaultAction": "SCMP_ACT_ERRNO"})
    # No process is made: the threads are not needed.
    return World(root, image, options, Containers(options, cgroups, profile, None))  # type: ignore[arg-type]


def images(world: World, config: pb.SandboxConfig, found: ImageConfig) -> Mapping[str, Image]:
    return {each.name: Image(DIGEST, world.image, found) for each in config.containers}


def unless_refused(make: Callable[[], Any], reason: str = "InvalidConfig", field: str = "") -> Any:
    """What `make` returns; None where it raises the EngineError that it may."""
    try:
        return make()
    except EngineError as error:
        refusal = error
    assert (refusal.reason, refusal.retryable) == (reason, False)
    assert refusal.message.startswith(field)
    assert refusal.message.strip()
    return None


def image_config(document: dict[str, Any]) -> ImageConfig:
    """As the image store hands it out; of one that it refuses, a plain one."""
    try:
        return ImageConfig.from_oci(json.loads(json.dumps(document)))
    except ValueError:
        return ImageConfig(cmd=("sh",))


@FAST
@given(config=configs, document=documents, sandbox_id=mostly("u-1", names))
def test_any_configuration_is_confined_or_refused(
    world: World, config: pb.SandboxConfig, document: dict[str, Any], sandbox_id: str
) -> None:
    known = images(world, config, image_config(document))
    found = unless_refused(lambda: world.containers.check(sandbox_id, config, known))
    if found is not None:
        for container in config.containers:
            confined(found[container.name], config, container)
            unless_refused(lambda: bound(world, sandbox_id, container))  # noqa: B023


def confined(document: dict[str, Any], config: pb.SandboxConfig, container: pb.ContainerConfig) -> None:
    json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    process, linux = document["process"], document["linux"]
    inside(process["cwd"])
    assert process["args"]
    assert process["args"][0]
    assert not [each for each in (*process["args"], *process["env"]) if "\0" in each]
    assert all("=" in each[1:] for each in process["env"])
    user = process["user"]
    assert all(0 <= number < 2**31 for number in (user["uid"], user["gid"], *user.get("additionalGids", ())))
    assert user["uid"] or not container.security_context.run_as_non_root
    allowed = spec.ADDABLE_CAPABILITIES | {"CAP_NET_ADMIN"}
    assert {name for each in process["capabilities"].values() for name in each} <= allowed
    assert process["noNewPrivileges"] is not container.security_context.allow_privilege_escalation
    resources = linux["resources"]
    assert 0 < resources["memory"]["limit"] < 2**63
    assert 0 < resources["pids"]["limit"] <= 4194304
    assert 1000 <= resources["cpu"]["quota"] < 2**63
    assert 2 <= resources["cpu"]["shares"] <= 2**18
    assert {"pid", "mount", "network", "ipc", "uts", "cgroup"} == {
        each["type"] for each in linux["namespaces"]
    }
    assert config.network != pb.NETWORK_HOST
    assert linux["seccomp"]
    assert linux["maskedPaths"] == list(spec.MASKED_PATHS)
    assert linux["cgroupsPath"].startswith("/sandkeeper/")
    assert ".." not in linux["cgroupsPath"]


def inside(path: str) -> None:
    assert path.startswith("/")
    assert posixpath.normpath(path) == path
    assert not path.startswith("//")
    assert not f"{path}/".startswith(("/proc/", "/sys/", "/dev/"))


def bound(world: World, sandbox_id: str, container: pb.ContainerConfig) -> None:
    plain = pb.ContainerConfig(name=container.name)
    plain.volume_mounts.extend(each for each in container.volume_mounts if not each.sub_path)
    sandbox = SandboxFolder.under(world.options.root_dir, world.options.run_root, sandbox_id)
    attempt = sandbox.container(container.name).attempt(0)
    targets = []
    for bind in filesystems.binds(sandbox, attempt, plain):
        source = posixpath.normpath(bind.source)
        assert source == bind.source
        assert source.startswith((f"{sandbox.volumes}/", f"{sandbox.etc}/"))
        if bind.target != "/dev/shm":
            inside(bind.target)
        targets.append(bind.target)
    assert len(set(targets)) == len(targets)


@FAST
@given(name=names | paths)
def test_any_name_is_in_its_folder_or_refused(world: World, name: str) -> None:
    root = world.options.root_dir
    sandbox = SandboxFolder.under(root, root / "run", "u-1")
    for make in (
        lambda: SandboxFolder.under(root, root / "run", name).path,
        lambda: sandbox.container(name).attempt(0).exit_file,
        lambda: sandbox.volume(name),
    ):
        path = unless_refused(make)
        if path is not None:
            assert posixpath.normpath(path) == str(path)
            assert path.is_relative_to(root / "sandboxes")
            assert name in path.parts or path.name == f"u-1.{name}.0"


@FAST
@given(path=paths)
def test_any_path_is_inside_or_refused(path: str) -> None:
    for check in (spec.check_path, spec.check_mount_path):
        found = unless_refused(lambda: check("field", path), field="field:")  # noqa: B023
        if found not in (None, "/dev/shm"):
            inside(found)


@FAST
@given(path=paths)
def test_any_sub_path_is_inside_or_refused(path: str) -> None:
    found = unless_refused(lambda: spec.check_sub_path("field", path), field="field:")
    if found is not None:
        below = posixpath.normpath(posixpath.join("/volume", found))
        assert f"{below}/".startswith("/volume/")


lines = st.lists(accounts | st.integers().map(str), max_size=6).map(":".join)
tables = st.lists(lines | any_texts, max_size=4).map("\n".join)


@FAST
@given(passwd=tables, group=tables, user=accounts)
def test_any_accounts_of_an_image_make_a_user_or_are_refused(
    world: World, passwd: str, group: str, user: str
) -> None:
    image = world.root / "accounts"
    (image / "etc").mkdir(parents=True, exist_ok=True)
    for name, text in (("passwd", passwd), ("group", group)):
        (image / "etc" / name).write_bytes(text.encode(errors="surrogatepass"))
    found = unless_refused(lambda: rootfs.resolve_user(image, user), field="image: ")
    if found is not None:
        assert all(0 <= number < 2**31 for number in (found.uid, found.gid, *found.groups))


words = st.sampled_from(
    ["cgroup", "cgroup2", "-", "/", "rw", "rw,memory", "/sys/fs/cgroup", r"\040", r"\777", ""]
)
mountinfos = st.lists(st.lists(words | any_texts, max_size=10).map(" ".join), max_size=4).map("\n".join)


@FAST
@given(mountinfo=mountinfos)
def test_any_table_of_mounts_is_read(mountinfo: str) -> None:
    hierarchies, unified = find_mounts(mountinfo)
    found = unless_refused(lambda: Cgroups("sandkeeper", mountinfo=mountinfo), "NodeUnsupported")
    assert (found is None) == (not hierarchies and unified is None)
    assert found is None or found.v2 == (not hierarchies)


@FAST
@given(answer=st.binary(max_size=100) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_answer_of_a_monitor_is_a_pid_or_an_error(answer: bytes) -> None:
    pid = unless_refused(lambda: monitor._pid_of(answer, 1.0), "StartError")
    assert pid is None or pid > 0


@FAST
@given(text=st.text(max_size=700))
def test_any_output_of_a_tool_is_cut_to_one_line(text: str) -> None:
    found = tools.clean(text)
    assert len(found) <= 501
    assert "\n" not in found


conditions = st.none() | st.fixed_dictionaries(
    {}, optional={"caps": st.lists(capabilities, max_size=2), "arches": st.lists(texts, max_size=2)}
)
rules = st.fixed_dictionaries(
    {"names": st.lists(texts, max_size=3), "action": st.sampled_from(["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"])},
    optional={"includes": conditions, "excludes": conditions, "errnoRet": st.none() | st.integers(0, 200)},
)


@FAST
@given(
    found=st.lists(rules | st.just({"names": ["mount", "x"], "action": "SCMP_ACT_ALLOW"}), max_size=4),
    caps=st.frozensets(capabilities),
    machine=st.sampled_from(["x86_64", "aarch64", "s390x", "riscv64", "odd"]),
)
def test_no_profile_lets_who_may_not_administer_mount(
    found: list[dict[str, Any]], caps: frozenset[str], machine: str
) -> None:
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": found}
    resolved = resolve(profile, caps - {"CAP_SYS_ADMIN"}, machine)
    allowed = {
        name
        for rule in resolved["syscalls"]
        if rule["action"] == "SCMP_ACT_ALLOW" and not rule.get("args")
        for name in rule["names"]
    }
    assert allowed.isdisjoint({"mount", "unshare", "setns", "clone", "clone3", "keyctl"})
