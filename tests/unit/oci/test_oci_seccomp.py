"""The seccomp profile: which rules are in force for which capabilities and machine, and what is taken out of them."""

from __future__ import annotations

import base64
import errno
import json
from pathlib import Path
from typing import Any

import pytest

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci import seccomp
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.seccomp import Seccomp, resolve
from sandkeeper.shim.engines.oci.spec import ADDABLE_CAPABILITIES, DEFAULT_CAPABILITIES

ALLOW, ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"
NONE: frozenset[str] = frozenset()
ADMIN = frozenset({"CAP_SYS_ADMIN"})
DENIED = (
    *("unshare", "setns", "mount", "umount", "umount2", "pivot_root", "mount_setattr", "move_mount"),
    *("open_tree", "fsopen", "fsconfig", "fsmount", "fspick", "add_key", "keyctl", "request_key"),
    *("syslog", "pidfd_getfd", "socketcall"),
)
# In containers-common's format, with a rule of each kind.
PROFILE: dict[str, Any] = {
    "defaultAction": ERRNO,
    "defaultErrnoRet": errno.ENOSYS,
    "defaultErrno": "ENOSYS",
    "archMap": [
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
        {"architecture": "SCMP_ARCH_S390X", "subArchitectures": ["SCMP_ARCH_S390"]},
        {"architecture": "SCMP_ARCH_RISCV64", "subArchitectures": None},
    ],
    "syscalls": [
        {"names": ["read", "clone", "clone3", *DENIED], "action": ALLOW, "args": [], "includes": {}},
        {"name": "old", "action": ALLOW, "args": None, "comment": "", "excludes": {}},
        {
            "names": ["personality"], "action": ALLOW,
            "args": [{"index": 0, "value": 8, "valueTwo": 0, "op": "SCMP_CMP_EQ", "comment": "x"}],
        },
        {"names": ["arch_prctl"], "action": ALLOW, "includes": {"arches": ["amd64", "x32"]}},
        {"names": ["s390_runtime_instr"], "action": ALLOW, "includes": {"arches": ["s390", "s390x"]}},
        {"names": ["not_on_arm"], "action": ALLOW, "excludes": {"arches": ["arm64"]}},
        {"names": ["bpf"], "action": ALLOW, "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {
            "names": ["bpf"], "action": ERRNO, "excludes": {"caps": ["CAP_SYS_ADMIN"]},
            "errnoRet": 1, "errno": "EPERM",
        },
        {"names": ["both"], "action": ALLOW, "includes": {"caps": ["CAP_A", "CAP_B"], "arches": ["amd64"]}},
        {"names": ["neither"], "action": ALLOW, "excludes": {"caps": ["CAP_A", "CAP_B"]}},
        {"names": ["traced"], "action": "SCMP_ACT_TRACE", "errnoRet": 3},
        {"names": ["killed"], "action": "SCMP_ACT_KILL", "errnoRet": 4},
    ],
}  # fmt: skip


def verdict(filter_: dict[str, Any], name: str, *args: int) -> tuple[str, int | None]:
    """What a filter does of a system call: (action, errno), as libseccomp has it."""
    for rule in filter_["syscalls"]:
        if name in rule["names"] and all(_matches(arg, args) for arg in rule.get("args", ())):
            return rule["action"], rule.get("errnoRet")
    return filter_["defaultAction"], filter_.get("defaultErrnoRet")


def _matches(arg: dict[str, Any], args: tuple[int, ...]) -> bool:
    value = args[arg["index"]]
    match arg["op"]:
        case "SCMP_CMP_EQ":
            return value == arg["value"]
        case "SCMP_CMP_NE":
            return value != arg["value"]
        case "SCMP_CMP_MASKED_EQ":
            return value & arg["value"] == arg["valueTwo"]
    raise AssertionError(arg["op"])


# Which rules are in force


@pytest.mark.parametrize(
    ("machine", "architectures"),
    [
        ("x86_64", ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
        ("aarch64", ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]),
        ("s390x", ["SCMP_ARCH_S390X", "SCMP_ARCH_S390"]),
        ("riscv64", ["SCMP_ARCH_RISCV64"]),
        ("ppc64le", ["SCMP_ARCH_PPC64LE"]),
    ],
)
def test_architectures(machine: str, architectures: list[str]) -> None:
    assert resolve(PROFILE, NONE, machine)["architectures"] == architectures


def test_a_machine_that_is_not_known_has_the_runtimes_own_architecture() -> None:
    found = resolve(PROFILE, NONE, "sparc64")
    assert "architectures" not in found
    assert verdict(found, "read")[0] == ALLOW
    assert verdict(found, "arch_prctl")[0] == ERRNO


@pytest.mark.parametrize(
    ("machine", "allowed", "denied"),
    [
        ("x86_64", {"arch_prctl", "not_on_arm"}, {"s390_runtime_instr"}),
        ("aarch64", set(), {"arch_prctl", "s390_runtime_instr", "not_on_arm"}),
        ("s390x", {"s390_runtime_instr", "not_on_arm"}, {"arch_prctl"}),
    ],
)
def test_rules_of_other_architectures_are_left_out(machine: str, allowed: set[str], denied: set[str]) -> None:
    found = resolve(PROFILE, NONE, machine)
    assert {verdict(found, name)[0] for name in allowed} <= {ALLOW}
    assert {verdict(found, name) for name in denied} == {(ERRNO, errno.ENOSYS)}


@pytest.mark.parametrize(
    ("caps", "both", "neither"),
    [
        (set(), ERRNO, ALLOW),
        ({"CAP_A"}, ERRNO, ERRNO),
        ({"CAP_A", "CAP_B"}, ALLOW, ERRNO),
        ({"CAP_C"}, ERRNO, ALLOW),
    ],
)
def test_includes_want_all_capabilities_and_excludes_any(caps: set[str], both: str, neither: str) -> None:
    found = resolve(PROFILE, frozenset(caps), "x86_64")
    assert verdict(found, "both")[0] == both
    assert verdict(found, "neither")[0] == neither


def test_a_rule_changes_with_a_capability() -> None:
    assert verdict(resolve(PROFILE, NONE, "x86_64"), "bpf") == (ERRNO, errno.EPERM)
    assert verdict(resolve(PROFILE, ADMIN, "x86_64"), "bpf") == (ALLOW, None)


def test_the_form_is_that_of_the_runtime_specification() -> None:
    found = resolve(PROFILE, NONE, "x86_64")
    assert found.keys() == {"defaultAction", "defaultErrnoRet", "architectures", "syscalls"}
    for rule in found["syscalls"]:
        assert rule.keys() <= {"names", "action", "errnoRet", "args"}
        assert rule["names"]
        for arg in rule.get("args", ()):
            assert arg.keys() == {"index", "value", "valueTwo", "op"}
    assert verdict(found, "old") == (ALLOW, None)
    assert verdict(found, "personality", 8) == (ALLOW, None)
    assert verdict(found, "personality", 9) == (ERRNO, errno.ENOSYS)
    # Only these two actions take a number.
    assert verdict(found, "traced") == ("SCMP_ACT_TRACE", 3)
    assert verdict(found, "killed") == ("SCMP_ACT_KILL", None)


def test_a_default_without_a_number_stays_without() -> None:
    assert "defaultErrnoRet" not in resolve({"defaultAction": ERRNO}, NONE, "x86_64")


# What is taken out

NEW_NAMESPACE = {
    "CLONE_NEWNS": 0x00020000,
    "CLONE_NEWCGROUP": 0x02000000,
    "CLONE_NEWUTS": 0x04000000,
    "CLONE_NEWIPC": 0x08000000,
    "CLONE_NEWUSER": 0x10000000,
    "CLONE_NEWPID": 0x20000000,
    "CLONE_NEWNET": 0x40000000,
}
# What glibc's fork and pthread_create pass.
FORK = 0x01200011
THREAD = 0x003D0F00


@pytest.mark.parametrize("caps", [NONE, DEFAULT_CAPABILITIES, ADDABLE_CAPABILITIES])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "s390x", "sparc64"])
def test_who_may_not_administer_gets_no_namespaces_mounts_or_keyrings(
    caps: frozenset[str], machine: str
) -> None:
    found = resolve(PROFILE, caps, machine)
    for name in DENIED:
        assert verdict(found, name) == (ERRNO, errno.EPERM), name
        assert not [r for r in found["syscalls"] if name in r["names"] and r["action"] == ALLOW], name
    assert verdict(found, "clone3") == (ERRNO, errno.ENOSYS)
    assert verdict(found, "read") == (ALLOW, None)


@pytest.mark.parametrize(("machine", "index"), [("x86_64", 0), ("aarch64", 0), ("s390x", 1)])
def test_clone_makes_processes_and_threads_but_no_namespaces(machine: str, index: int) -> None:
    found = resolve(PROFILE, DEFAULT_CAPABILITIES, machine)

    def clone(flags: int) -> str:
        args = [0, 0]
        # The other argument is an address, with any bits.
        args[1 - index], args[index] = 0x7FFFFFFFF000, flags
        return verdict(found, "clone", *args)[0]

    assert (clone(FORK), clone(THREAD)) == (ALLOW, ALLOW)
    for name, flag in NEW_NAMESPACE.items():
        assert clone(FORK | flag) == ERRNO, name


@pytest.mark.parametrize("caps", [NONE, DEFAULT_CAPABILITIES])
def test_sockets_are_those_of_the_network_namespace(caps: frozenset[str]) -> None:
    allowed = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16, "AF_PACKET": 17}
    for profile in (PROFILE, {**PROFILE, "syscalls": [{"names": ["socket"], "action": ALLOW, "args": []}]}):
        found = resolve(profile, caps, "x86_64")
        assert {family for family in range(64) if verdict(found, "socket", family, 0, 0)[0] == ALLOW} == set(
            allowed.values()
        )
        assert verdict(found, "socket", allowed["AF_NETLINK"], 0, 9) == (ERRNO, errno.EINVAL)


def test_who_may_administer_has_the_profile_untouched() -> None:
    found = resolve(PROFILE, ADMIN, "x86_64")
    for name in ("clone", "clone3", *DENIED):
        assert verdict(found, name, NEW_NAMESPACE["CLONE_NEWUSER"]) == (ALLOW, None)
    assert [rule["names"] for rule in found["syscalls"]] == [
        ["read", "clone", "clone3", *DENIED],
        *(["old"], ["personality"], ["arch_prctl"], ["not_on_arm"], ["bpf"], ["neither"]),
        *(["traced"], ["killed"]),
    ]


def test_the_profile_itself_is_not_changed() -> None:
    before = json.dumps(PROFILE)
    resolve(PROFILE, NONE, "x86_64")
    assert json.dumps(PROFILE) == before


def test_the_distributions_profile_is_narrowed() -> None:
    path = Options(Path("unused")).seccomp_profile
    if not path.exists():
        pytest.skip(f"{path} is not there: the package golang-github-containers-common has it")
    profile = seccomp.load(path)
    for machine in ("x86_64", "aarch64", "s390x"):
        found = resolve(profile, DEFAULT_CAPABILITIES, machine)
        assert {verdict(found, name) for name in DENIED} == {(ERRNO, errno.EPERM)}
        assert verdict(found, "clone3") == (ERRNO, errno.ENOSYS)
        assert verdict(found, "openat") == (ALLOW, None)
        for name in ("bpf", "init_module", "kexec_load", "perf_event_open", "open_by_handle_at"):
            assert verdict(found, name)[0] == ERRNO, name


# Reading it


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"7", b"{", b"\xff", b"{}", b'{"defaultAction": "x", "syscalls": [{}]}',
        b'{"defaultAction": "x", "syscalls": [7]}', b'{"defaultAction": "x", "archMap": [[]]}',
        b'{"defaultAction": "x", "syscalls": 7}',
        b'{"defaultAction": "x", "syscalls": [{"includes": 7, "action": "y"}]}',
    ],
)  # fmt: skip
def test_without_a_profile_nothing_is_run(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "seccomp.json"
    path.write_bytes(text)
    with pytest.raises(EngineError, match=r"seccomp\.json") as caught:
        seccomp.load(path)
    assert caught.value.reason == "NodeUnsupported"


def test_a_profile_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"seccomp\.json") as caught:
        seccomp.load(tmp_path / "seccomp.json")
    assert caught.value.reason == "NodeUnsupported"
    (tmp_path / "seccomp.json").write_text(json.dumps(PROFILE))
    assert seccomp.load(tmp_path / "seccomp.json") == PROFILE


# Compiled filters


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    """A container's state folder, as crun leaves it."""
    (tmp_path / "seccomp.bpf").write_bytes(b"12345678" * 3)
    return tmp_path


def test_a_filter_is_given_back_to_containers_of_the_same_capabilities(compiled: Path) -> None:
    found = Seccomp(PROFILE)
    assert found.annotations(NONE) == {}
    found.learn(NONE, compiled)
    assert found.annotations(NONE) == {"run.oci.seccomp_bpf_data": base64.b64encode(b"12345678" * 3).decode()}
    # Another set has another filter: this one would let through too much, or too little.
    assert found.annotations(ADMIN) == {}
    assert found.annotations(DEFAULT_CAPABILITIES) == {}


def test_the_first_filter_stays(compiled: Path) -> None:
    found = Seccomp(PROFILE)
    found.learn(NONE, compiled)
    (compiled / "seccomp.bpf").write_bytes(b"overwrit")
    found.learn(NONE, compiled)
    assert base64.b64decode(*found.annotations(NONE).values()) == b"12345678" * 3


@pytest.mark.parametrize("content", [b"", b"1234567", b"123456789"])
def test_what_is_no_whole_filter_is_not_learned(compiled: Path, content: bytes) -> None:
    (compiled / "seccomp.bpf").write_bytes(content)
    found = Seccomp(PROFILE)
    found.learn(NONE, compiled)
    assert found.annotations(NONE) == {}


def test_a_runtime_that_leaves_no_filter_teaches_none(tmp_path: Path) -> None:
    found = Seccomp(PROFILE)
    found.learn(NONE, tmp_path / "missing")
    assert found.annotations(NONE) == {}


def test_the_filters_kept_are_bounded(compiled: Path) -> None:
    found = Seccomp(PROFILE)
    sets = [frozenset({f"CAP_{number}"}) for number in range(100)]
    for caps in sets:
        found.learn(caps, compiled)
    assert sum(bool(found.annotations(caps)) for caps in sets) == 64
