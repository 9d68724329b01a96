"""Resolves the distribution's seccomp profile to the OCI form, and narrows it to what Docker's allows.

containers-common's profile lets a container make user namespaces, for Podman inside Podman; code that
nobody trusts gets none.

Source: containers-common seccomp.json (`archMap`, per rule `includes` and
`excludes` by architecture and capability) and runtime-spec config-linux.md, Seccomp.
"""

from __future__ import annotations

import base64
import errno
import functools
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sandkeeper.shim.engines.base import EngineError

_ARCHITECTURES = {
    "x86_64": ("amd64", "SCMP_ARCH_X86_64"),
    "aarch64": ("arm64", "SCMP_ARCH_AARCH64"),
    "s390x": ("s390x", "SCMP_ARCH_S390X"),
    "ppc64le": ("ppc64le", "SCMP_ARCH_PPC64LE"),
    "riscv64": ("riscv64", "SCMP_ARCH_RISCV64"),
}

_NARROWED = (
    # Namespaces and mounts of one's own: most of the kernel's recent holes are reached through them.
    "unshare", "setns", "mount", "umount", "umount2", "pivot_root", "mount_setattr", "move_mount", "open_tree",
    "fsopen", "fsconfig", "fsmount", "fspick",
    # Keyrings are shared by all containers of a user.
    "add_key", "keyctl", "request_key",
    # The kernel's log tells addresses; another process's files are its own.
    "syslog", "pidfd_getfd",
    # Calls socket with arguments that no filter can see (32-bit programs; they fall back to socket).
    "socketcall",
)  # fmt: skip
_SOCKETS = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_PACKET": 17}
"""Families that belong to the network namespace. AF_VSOCK would reach the hypervisor from any of them; AF_ALG and the
old protocols are the kernel's least tended code."""
_AF_NETLINK, _NETLINK_AUDIT = 16, 9
_NEW_NAMESPACE = 0x7E020000
"""clone(2): CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""

_MAX_COMPILED = 64
_INSTRUCTION_BYTES = 8  # struct sock_filter


def load(path: Path) -> dict[str, Any]:
    """Reads a profile. Raises EngineError `NodeUnsupported`: without it nothing is run."""
    try:
        profile = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise EngineError("NodeUnsupported", f"seccomp profile {path}: {error}") from None
    if not isinstance(profile, dict) or "defaultAction" not in profile:
        raise EngineError("NodeUnsupported", f"seccomp profile {path}: must have `defaultAction`")
    try:
        resolve(profile, frozenset())
    except (KeyError, TypeError, AttributeError) as error:
        raise EngineError("NodeUnsupported", f"seccomp profile {path}: {error!r}") from None
    return profile


def resolve(profile: Mapping[str, Any], capabilities: frozenset[str], machine: str = "") -> dict[str, Any]:
    """What `linux.seccomp` is for a container with these capabilities on this machine."""
    arch, native = _ARCHITECTURES.get(machine or platform.machine(), ("", ""))
    seccomp: dict[str, Any] = {"defaultAction": profile["defaultAction"]}
    if profile.get("defaultErrnoRet") is not None:
        seccomp["defaultErrnoRet"] = profile["defaultErrnoRet"]
    architectures = [native] if native else []
    for entry in profile.get("archMap") or ():
        if entry.get("architecture") == native:
            architectures += entry.get("subArchitectures") or ()
    if architectures:
        seccomp["architectures"] = architectures
    rules = [_rule(rule) for rule in profile.get("syscalls") or () if _applies(rule, capabilities, arch)]
    seccomp["syscalls"] = rules if "CAP_SYS_ADMIN" in capabilities else _narrow(rules, arch)
    return seccomp


def _narrow(rules: list[dict[str, Any]], arch: str) -> list[dict[str, Any]]:
    """The rules for a process that may not administer: no new namespaces, mounts or keyrings, sockets of a few kinds.

    Source: moby's profiles/seccomp/default.json, the rules for `clone`, `clone3` and CAP_SYS_ADMIN.
    """
    denied = {*_NARROWED, "clone", "clone3", "socket"}
    kept = [{**rule, "names": [name for name in rule["names"] if name not in denied]} for rule in rules]
    flags = {"index": 1 if arch == "s390x" else 0, "value": _NEW_NAMESPACE, "valueTwo": 0}
    return [
        *(rule for rule in kept if rule["names"]),
        {"names": list(_NARROWED), "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM},
        {
            "names": ["clone"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{**flags, "op": "SCMP_CMP_MASKED_EQ"}],
        },
        # Its flags lie in memory, where no filter can look; libc falls back to clone.
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
        *(
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [_is(0, family)]}
            for family in _SOCKETS.values()
        ),
        {
            "names": ["socket"],
            "action": "SCMP_ACT_ALLOW",
            "args": [_is(0, _AF_NETLINK), _is(2, _NETLINK_AUDIT, "SCMP_CMP_NE")],
        },
        # As a kernel without audit says it, which is what libaudit expects.
        {
            "names": ["socket"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": errno.EINVAL,
            "args": [_is(0, _AF_NETLINK), _is(2, _NETLINK_AUDIT)],
        },
    ]


def _is(index: int, value: int, op: str = "SCMP_CMP_EQ") -> dict[str, Any]:
    return {"index": index, "value": value, "valueTwo": 0, "op": op}


def _applies(rule: Mapping[str, Any], capabilities: frozenset[str], arch: str) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if includes.get("arches") and arch not in includes["arches"]:
        return False
    if not capabilities.issuperset(includes.get("caps") or ()):
        return False
    return arch not in (excludes.get("arches") or ()) and capabilities.isdisjoint(excludes.get("caps") or ())


def _rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    resolved: dict[str, Any] = {
        "names": list(rule.get("names") or ([rule["name"]] if rule.get("name") else ())),
        "action": rule["action"],
    }
    if rule.get("errnoRet") is not None and rule["action"] in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        resolved["errnoRet"] = rule["errnoRet"]
    if rule.get("args"):
        resolved["args"] = [
            {key: arg[key] for key in ("index", "value", "valueTwo", "op") if key in arg}
            for arg in rule["args"]
        ]
    return resolved


class Seccomp:
    """A profile with what it resolves to and compiles to, kept per set of capabilities.

    Compiling takes a runtime longer than all else that it does (14 ms of crun's 23). crun takes a
    compiled filter by an annotation (crun(1), run.oci.seccomp_bpf_data); we give it back the one that
    it made itself for the first container of a kind. A runtime that does not know the annotation
    compiles `linux.seccomp`, which is always there.
    """

    ANNOTATION = "run.oci.seccomp_bpf_data"

    def __init__(self, profile: Mapping[str, Any]) -> None:
        self.resolve = functools.lru_cache(maxsize=64)(functools.partial(resolve, profile))
        self._compiled: dict[frozenset[str], str] = {}

    def annotations(self, capabilities: frozenset[str]) -> dict[str, str]:
        """What goes into the configuration's `annotations`."""
        compiled = self._compiled.get(capabilities)
        return {self.ANNOTATION: compiled} if compiled else {}

    def learn(self, capabilities: frozenset[str], state_folder: Path) -> None:
        """Keeps the filter that crun left in a created container's state folder; nothing where there is none."""
        if capabilities in self._compiled or len(self._compiled) >= _MAX_COMPILED:
            return
        try:
            compiled = (state_folder / "seccomp.bpf").read_bytes()
        except OSError:
            return
        if compiled and len(compiled) % _INSTRUCTION_BYTES == 0:
            self._compiled[capabilities] = base64.b64encode(compiled).decode()
