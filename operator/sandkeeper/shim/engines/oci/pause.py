"""The sandbox process: catatonit, which does nothing but hold the namespaces that the containers join.

It is made here and not by a runtime: three namespaces and one exec instead of
a runtime's whole ceremony (2 ms instead of 8). It runs nothing of a user's, as
nobody, without any capability, and the containers, in pid namespaces of their
own, do not see it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import subprocess
from pathlib import Path

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci import kernel
from sandkeeper.shim.engines.oci.processes import ProcessRef

_NOBODY = 65534
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
# In its environment: which sandbox, of the engine with which folder.
_MARK, _ROOT = "SANDKEEPER_SANDBOX", "SANDKEEPER_ROOT"
NAMESPACES = {"network": "net", "ipc": "ipc", "uts": "uts"}


def start(catatonit: str, root_dir: Path, sandbox_id: str, hostname: str, *, own_network: bool) -> ProcessRef:
    """Starts it from a thread that must end after this. Raises EngineError `StartError`."""
    try:
        kernel.unshare(
            kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | (kernel.CLONE_NEWNET if own_network else 0)
        )
        kernel.sethostname(hostname)
        if own_network:
            _loopback_up()
        kernel.drop_privileges(_NOBODY)
        child = subprocess.Popen(
            [catatonit, "-P"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={_MARK: sandbox_id, _ROOT: os.fspath(root_dir)},
            close_fds=True,
            start_new_session=True,
        )
    except OSError as error:
        raise EngineError("StartError", f"sandbox process: {error}", retryable=True) from None
    # It is to outlive this object: whoever waits for it reaps it by its pid.
    child.returncode = 0
    found = ProcessRef.of(child.pid)
    if found is None:
        raise EngineError("StartError", "sandbox process: it ended at once", retryable=True)
    return found


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def is_any(environment: list[bytes]) -> bool:
    """Whether an environment is a sandbox process's."""
    return any(each.startswith(f"{_MARK}=".encode()) for each in environment)


def find(root_dir: Path, sandbox_id: str) -> list[ProcessRef]:
    """Sandbox processes of a sandbox, by their environment: for one that a killed shim has not recorded."""
    wanted = {f"{_MARK}={sandbox_id}".encode(), f"{_ROOT}={root_dir}".encode()}
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208 - thousands of names, no paths needed
        if name.isdigit():
            with contextlib.suppress(OSError):
                if wanted.issubset(Path(f"/proc/{name}/environ").read_bytes().split(b"\0")):
                    ref = ProcessRef.of(int(name))
                    if ref is not None:
                        found.append(ref)
    return found
