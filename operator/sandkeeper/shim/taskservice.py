"""The Task service of a sandbox that containerd asked for: a containerd-shim beside our sandbox process.

containerd runs a pod's containers by calling the Task service (ttrpc, `containerd.task.v3.Task`) at the address that
Start and Status answer. It is containerd's own shim, started as containerd starts it, in the node's mount namespace;
the containers that it runs join the namespaces of our sandbox process. It outlives us, and containerd.

    RUN_DIR/tasks/ID/        its bundle
        asked.json           containerd's namespace and id: with them it is found, whatever else is lost
        config.json, log     what it wants to find
        address              what containerd is told
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci.pause import marks
from sandkeeper.shim.engines.oci.processes import ProcessRef, descendants, pids, read_json, write_json
from sandkeeper.shim.settings import SandboxerSettings
from sandkeeper.wire import node_pb2
from sandkeeper.wire.ids import valid_id

_START_SECONDS = 30.0
_GRACE_SECONDS = 5.0
_KILL_SECONDS = 10.0
_ADDRESS = re.compile(rb"unix://(/[\x21\x23-\x7e]+)")


def address_in(answer: bytes) -> str:
    """The socket that a containerd-shim says it listens on: in a message (2.3), in JSON (2.0) or alone (1.x)."""
    found = _ADDRESS.search(answer)
    return found[1].decode() if found else ""


class TaskServices:
    """Those of all sandboxes. Every method is safe to repeat, and after a kill of the shim at any point."""

    def __init__(self, run_dir: Path, settings: SandboxerSettings) -> None:
        self._folder = run_dir / "tasks"
        self._settings = settings

    def wanted(self, config: node_pb2.SandboxConfig) -> bool:
        """Whether a sandbox has one: where the node is set up for it, and containerd runs what is in it."""
        return bool(self._settings.task_shim and config.containerd.namespace and not config.containers)

    async def start(self, local_id: str, asked: node_pb2.ContainerdSandbox) -> ProcessRef:
        """Starts it, or finds it started. Raises EngineError `StartError`."""
        return await asyncio.to_thread(self._start, local_id, asked.namespace, asked.sandbox_id)

    def address(self, local_id: str) -> str:
        """Of one that was started, as containerd wants it; else empty."""
        try:
            return (self._folder / local_id / "address").read_text()
        except OSError:
            return ""

    async def ended(self, local_id: str) -> None:
        """Returns when it does not run."""
        found = await asyncio.to_thread(self._find, local_id)
        if found is not None:
            await found.ended()

    async def end(self, local_id: str) -> None:
        """Leaves nothing of it, nor of what runs in its containers. Raises EngineError `RemoveFailed`."""
        if (self._folder / local_id).exists():
            await asyncio.to_thread(self._end, local_id)

    def list(self) -> frozenset[str]:
        """The sandboxes of which there is anything."""
        with contextlib.suppress(FileNotFoundError):
            return frozenset(each.name for each in self._folder.iterdir() if valid_id(each.name))
        return frozenset()

    # Blocking

    def _start(self, local_id: str, namespace: str, sandbox_id: str) -> ProcessRef:
        folder = self._folder / local_id
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(folder / "asked.json", {"namespace": namespace, "id": sandbox_id})
        write_json(folder / "config.json", {})
        if not (folder / "log").is_symlink():
            (folder / "log").symlink_to(os.devnull)  # a fifo would stop it where nobody reads
        argv = [
            *(self._settings.task_shim, "-namespace", namespace, "-id", sandbox_id),
            *("-address", str(self._settings.containerd_socket), "start"),
        ]
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            # Some take it from here and some from their arguments; events go to the second.
            "GRPC_ADDRESS": str(self._settings.containerd_socket),
            "TTRPC_ADDRESS": f"{self._settings.containerd_socket}.ttrpc",
            **marks(local_id),
        }
        try:
            result = subprocess.run(
                argv,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_START_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineError("StartError", f"task service: {error}") from None
        address = address_in(result.stdout)
        process = self._find(local_id)
        if result.returncode != 0 or not address or process is None:
            words = result.stderr.decode(errors="replace").strip()[-300:] or "it did not start"
            raise EngineError("StartError", f"task service: {words}")
        (folder / "address").write_text(f"ttrpc+unix://{address}")
        return process

    def _find(self, local_id: str) -> ProcessRef | None:
        """By its arguments: what it was told is what nobody else was told."""
        asked = read_json(self._folder / local_id / "asked.json") or {}
        wanted = [asked.get("namespace", ""), asked.get("id", ""), str(self._settings.containerd_socket)]
        arguments = [b"-namespace", b"-id", b"-address"]
        for pid in pids():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                given = dict(itertools.pairwise(words))
                if [given.get(name) for name in arguments] == [each.encode() for each in wanted] and not (
                    {b"start", b"delete"} & set(words)
                ):
                    return ProcessRef.of(pid)
        return None

    def _end(self, local_id: str) -> None:
        folder = self._folder / local_id
        process = self._find(local_id)
        if process is not None:
            _kill_below(process)
            process.send(signal.SIGTERM)  # it removes its socket
            if not process.join(_GRACE_SECONDS):
                process.send(signal.SIGKILL)
                process.join(_GRACE_SECONDS)
        if self._find(local_id) is not None:
            raise EngineError("RemoveFailed", "the task service does not end", retryable=True)
        socket = self.address(local_id).partition("unix://")[2]
        if socket:
            Path(socket).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _kill_below(process: ProcessRef) -> None:
    """Ends what it runs. It reaps them, and tells containerd, which forgets them by itself."""
    deadline = time.monotonic() + _KILL_SECONDS
    while left := [ref for pid in descendants(process.pid) if (ref := ProcessRef.of(pid)) is not None]:
        if time.monotonic() > deadline:
            raise EngineError("RemoveFailed", "what the task service runs does not end", retryable=True)
        for each in left:
            each.send(signal.SIGKILL)
        for each in left:
            each.join(max(0.0, deadline - time.monotonic()))
