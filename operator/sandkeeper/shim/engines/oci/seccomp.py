"""Resolves the distribution's seccomp profile to the OCI form.

Source: containers-common seccomp.json (`archMap`, per rule `includes` and
`excludes` by architecture and capability) and runtime-spec config-linux.md, Seccomp.
"""

from __future__ import annotations

import base64
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
    seccomp["syscalls"] = [
        _rule(rule) for rule in profile.get("syscalls") or () if _applies(rule, capabilities, arch)
    ]
    return seccomp


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
