"""The runtimes, each proved by a container that it really runs."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandkeeper.shim.engines.base import EngineError, RuntimeInfo
from sandkeeper.shim.engines.oci import tools
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.shim.engines.oci.images.types import ImageConfig
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.rootfs import User
from sandkeeper.shim.engines.oci.seccomp import Seccomp
from sandkeeper.shim.engines.oci.spec import Surroundings, build, capabilities
from sandkeeper.wire import node_pb2

_PROBES = 2
_PROBE_SECONDS = 20.0
PROBE = node_pb2.ContainerConfig(name="probe", command=["/catatonit", "--version"])


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime as probed. seconds: the shortest life of a container that does nothing."""

    info: RuntimeInfo
    program: str
    seconds: float = float("inf")


def probe_all(options: Options, cgroups: Cgroups, seccomp: Seccomp) -> Mapping[str, Runtime]:
    """Tries every configured runtime, in the thread's mount namespace; those that are not installed too."""
    return {
        name: probe(name, program, options, cgroups, seccomp) for name, program in options.runtimes.items()
    }


def ordered(runtimes: Mapping[str, Runtime], default: str) -> tuple[RuntimeInfo, ...]:
    """The default first (named, else the fastest that works), then by speed, then what does not work."""
    found = sorted(
        runtimes.values(), key=lambda each: (not each.info.ready, each.info.name != default, each.seconds)
    )
    return tuple(each.info for each in found)


def probe(name: str, program: str, options: Options, cgroups: Cgroups, seccomp: Seccomp) -> Runtime:
    """Runs a container with the defences and limits of a real one; a failure is a message, not an error."""
    path = shutil.which(program, path=tools.ENVIRONMENT["PATH"])
    if path is None:
        return Runtime(RuntimeInfo(name, message=f"{program} is not installed"), program)
    try:
        version = version_of(path)
        shortest = min(_run_container(path, options, cgroups, seccomp) for _ in range(_PROBES))
    except (EngineError, OSError) as error:
        message = error.message if isinstance(error, EngineError) else str(error)
        return Runtime(RuntimeInfo(name, message=message), path)
    return Runtime(RuntimeInfo(name, version=version, ready=True), path, shortest)


def version_of(program: str) -> str:
    """As it says itself. Raises OSError."""
    return _version(tools.run([program, "--version"], _PROBE_SECONDS))


def _version(result: tools.Result) -> str:
    first = result.output.splitlines()[0] if result.output else ""
    return first.rpartition("version ")[2].strip()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A container that does nothing but end, with the defences and limits of a real one."""

    folder: Path
    name: str
    document: dict[str, Any]


@contextlib.contextmanager
def bundle(options: Options, cgroups: Cgroups, seccomp: Seccomp) -> Iterator[Bundle]:
    """Its folder is there as long as it is looked at; its cgroup goes as well. Raises EngineError, OSError."""
    catatonit = shutil.which(options.catatonit, path=tools.ENVIRONMENT["PATH"])
    if catatonit is None:
        raise EngineError("NodeUnsupported", f"{options.catatonit} is not installed")
    options.root_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix="probe-", dir=options.root_dir) as place:
        folder = Path(place)
        name = folder.name.replace("_", "x")
        for each in ("rootfs/dev", "rootfs/proc", "rootfs/sys"):
            (folder / each).mkdir(parents=True)
        shutil.copy(catatonit, folder / "rootfs/catatonit")
        around = Surroundings(
            rootfs=str(folder / "rootfs"),
            user=User(),
            hostname="probe",
            cgroups_path=cgroups.path(name),
            namespaces={"network": "", "ipc": "", "uts": ""},
            cgroup_v2=cgroups.v2,
            swap_accounting=cgroups.has_swap_accounting,
        )
        document = build(PROBE, ImageConfig(), around, options, seccomp)
        (folder / "config.json").write_text(json.dumps(document))
        try:
            yield Bundle(folder, name, document)
        finally:
            cgroups.remove(name)


def _run_container(program: str, options: Options, cgroups: Cgroups, seccomp: Seccomp) -> float:
    """Seconds that a whole container takes. Raises EngineError with the runtime's words."""
    with bundle(options, cgroups, seccomp) as made:
        runtime = [program, f"--root={made.folder / 'runtime'}"]
        began = time.monotonic()
        try:
            result = tools.run([*runtime, "run", "--bundle", str(made.folder), made.name], _PROBE_SECONDS)
            took = time.monotonic() - began
            if result.status != 0:
                raise EngineError("NodeUnsupported", result.words or f"exit status {result.status}")
            # Created once more, not started: what a runtime leaves of its seccomp filter spares it work later.
            if not seccomp.annotations(capabilities(PROBE)):
                create = [*runtime, "create", "--bundle", str(made.folder), made.name]
                tools.run(create, _PROBE_SECONDS, quiet=True)
                seccomp.learn(capabilities(PROBE), made.folder / "runtime" / made.name)
            return took
        finally:
            tools.run([*runtime, "delete", "--force", made.name], _PROBE_SECONDS)
