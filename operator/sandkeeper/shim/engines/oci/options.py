"""What the engine is configured with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Options:
    """The engine's settings. `from_settings` takes each by its name from `ShimSettings.oci`, then from
    `ShimSettings` itself, else the default here."""

    # The engine's own folder; nothing else may write there.
    root_dir: Path
    # What tells of processes; best in memory, and so on another file system than root_dir: what conmon has to say of
    # an end has room when a sandbox has filled that one. None: in root_dir.
    run_dir: Path | None = None
    # Name -> program of the runtimes to try; a bare name is looked up in PATH.
    runtimes: Mapping[str, str] = field(
        default_factory=lambda: {"crun": "crun", "runc": "runc", "runsc": "runsc"}
    )
    # Empty: the fastest that works.
    default_runtime: str = ""
    conmon: str = "conmon"
    catatonit: str = "catatonit"
    # A profile in containers-common's format.
    seccomp_profile: Path = Path("/usr/share/containers/seccomp.json")
    # Limits of a container that names none of its own.
    default_cpu_millis: int = 1000
    default_memory_bytes: int = 512 * MIB
    default_pids: int = 1024
    # Cgroup under which every sandbox has its own.
    cgroup_parent: str = "sandkeeper"
    # Bound on one container's log in bytes.
    log_max_bytes: int = 16 * MIB
    # Size of each container's /dev/shm.
    shm_bytes: int = 64 * MIB
    # Longest that one call of a runtime may take, in seconds.
    runtime_timeout: float = 60.0
    # Capabilities that a container may add beyond Docker's default set.
    allowed_capabilities: tuple[str, ...] = ()
    allow_host_network: bool = False
    concurrency: int = 32

    @property
    def run_root(self) -> Path:
        return self.run_dir or self.root_dir / "run"

    @classmethod
    def from_settings(cls, settings: Any, engine: str = "oci") -> Self:
        """Takes ShimSettings (or anything shaped like it). engine: whose folders, and whose section comes first."""
        oci = getattr(settings, "oci", settings)
        values: dict[str, Any] = {}
        for each in dataclasses.fields(cls):
            for source in (getattr(settings, engine, oci), oci, settings):
                value = getattr(source, each.name, None)
                if value not in (None, "", (), [], {}):
                    values[each.name] = value
                    break
        if "root_dir" not in values:
            values["root_dir"] = Path(settings.state_dir) / engine
        if not isinstance(values.get("runtimes", {}), Mapping):
            values["runtimes"] = {str(name).rpartition("/")[2]: str(name) for name in values["runtimes"]}
        values["root_dir"] = Path(values["root_dir"]).absolute()
        if "run_dir" in values:
            values["run_dir"] = Path(values["run_dir"]).absolute() / engine
        return cls(**values)
