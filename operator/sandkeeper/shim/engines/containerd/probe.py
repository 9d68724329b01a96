"""The runtimes as containerd runs them, each proved by a task."""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from sandkeeper.shim.engines.base import EngineError, RuntimeInfo
from sandkeeper.shim.engines.containerd import tasks
from sandkeeper.shim.engines.containerd.client import CallError, Client, start_error
from sandkeeper.shim.engines.oci import runtimes, tools
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.runtimes import Runtime
from sandkeeper.shim.engines.oci.seccomp import Seccomp
from sandkeeper.wire.containerd import tasks_pb2

_PROBES = 2
_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Prober:
    client: Client
    options: Options
    cgroups: Cgroups
    seccomp: Seccomp

    def all(self) -> Mapping[str, Runtime]:
        """Those that do not work too. Raises CallError where containerd goes away meanwhile."""
        return {name: self.one(name, program) for name, program in self.options.runtimes.items()}

    def one(self, name: str, program: str) -> Runtime:
        """program: the runtime's, which io.containerd.runc.v2 calls, or containerd's name for one of another kind."""
        try:
            shortest = min(self._run(program) for _ in range(_PROBES))
        except (EngineError, OSError) as error:
            if isinstance(error, CallError):
                if error.away:
                    raise
                error = start_error(error)
            message = error.message if isinstance(error, EngineError) else str(error)
            return Runtime(RuntimeInfo(name, message=message), program)
        return Runtime(RuntimeInfo(name, version=_version(program), ready=True), program, shortest)

    def _run(self, program: str) -> float:
        """Seconds that a whole task takes. Raises EngineError with the runtime's words."""
        name = f"probe-{uuid.uuid4()}"
        with runtimes.bundle(self.options, self.cgroups, self.seccomp) as made:
            root = made.folder / "runtime"
            try:
                tasks.create_container(self.client, name, made.document, program, root, {})
                began = time.monotonic()
                tasks.create(self.client, name, program, root, (), tasks.Files(), _SECONDS)
                tasks.start(self.client, name, _SECONDS)
                wait = tasks_pb2.WaitRequest(container_id=name)
                status = self.client.call(self.client.tasks.Wait, wait, seconds=_SECONDS).exit_status
                took = time.monotonic() - began
                if status != 0:
                    raise EngineError("NodeUnsupported", f"exit status {status}")
                return took
            finally:
                with contextlib.suppress(EngineError):
                    tasks.delete(self.client, name)


def _version(program: str) -> str:
    """Where the program is on this side too: containerd may have another file system."""
    path = None if tasks.is_type(program) else shutil.which(program, path=tools.ENVIRONMENT["PATH"])
    if path is None:
        return program
    return runtimes.version_of(path)
