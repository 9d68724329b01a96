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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci import kernel, tools
from sandkeeper.shim.engines.oci.processes import ProcessRef
from sandkeeper.wire import types_pb2

_NOBODY = 65534
_MOUNT_SECONDS = 20.0
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
# In its environment: which sandbox, of the engine with which folder.
_MARK, _ROOT = "SANDKEEPER_SANDBOX", "SANDKEEPER_ROOT"
Apart = Callable[[Callable[[], int]], int]
NAMESPACES = {"network": "net", "ipc": "ipc", "uts": "uts"}


@dataclass(frozen=True, slots=True)
class Around:
    """What is around a sandbox process: namespaces of its own, where it joins none of another's.

    netns: path of the network namespace that it joins; host_*: it stays in the node's.
    rootfs: what is mounted as its root, at the folder `root`, seen by it alone; empty: it has the node's.
    """

    hostname: str
    host_network: bool = False
    netns: str = ""
    host_ipc: bool = False
    own_pids: bool = False
    rootfs: tuple[types_pb2.Mount, ...] = ()
    root: Path = Path("/")

    def enter(self) -> None:
        """Puts the calling thread, or what it runs next, into all of it. Raises OSError, EngineError."""
        own_network = not (self.host_network or self.netns)
        # With the node's network comes the node's host name, as in a pod.
        kernel.unshare(
            kernel.CLONE_FS  # its root and folder change, and no other thread's
            | (0 if self.host_ipc else kernel.CLONE_NEWIPC)
            | (0 if self.host_network else kernel.CLONE_NEWUTS)
            | (kernel.CLONE_NEWNET if own_network else 0)
        )
        if not self.host_network:
            kernel.sethostname(self.hostname)
        if own_network:
            _loopback_up()
        elif self.netns:
            _join_network(self.netns)
        if self.rootfs:
            _change_root(self.rootfs, self.root)
        if self.own_pids:  # last: the next process that this thread starts is the first of it
            kernel.unshare(kernel.CLONE_NEWPID)


def start(apart: Apart, catatonit: str, root_dir: Path, sandbox_id: str, around: Around) -> ProcessRef:
    """Starts it. Raises EngineError `StartError`, `InvalidConfig`.

    apart: runs something in a thread that ends with it.
    """
    environment = {**marks(sandbox_id), _ROOT: os.fspath(root_dir)}
    try:
        pid = apart(lambda: _spawn(catatonit, around, environment))
    except OSError as error:
        raise EngineError("StartError", f"sandbox process: {error}", retryable=True) from None
    found = ProcessRef.of(pid)
    if found is None:
        raise EngineError("StartError", "sandbox process: it ended at once", retryable=True)
    return found


def _spawn(catatonit: str, around: Around, environment: dict[str, str]) -> int:
    program = Path(catatonit)
    kernel.last_capability()  # found while there is a /proc
    with contextlib.ExitStack() as closing:
        folder = os.open(program.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        closing.callback(os.close, folder)
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        closing.callback(os.close, nothing)
        around.enter()
        # Its root may have no such program: it is found from where it is. It is static.
        os.fchdir(folder)
        kernel.drop_privileges(_NOBODY)
        child = subprocess.Popen(
            [catatonit, "-P"],
            executable=f"./{program.name}",
            stdin=nothing,
            stdout=nothing,
            stderr=nothing,
            env=environment,
            close_fds=True,
            start_new_session=True,
        )
    # It is to outlive this object: whoever waits for it reaps it by its pid.
    child.returncode = 0
    return child.pid


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def _join_network(path: str) -> None:
    """By the path as the node sees it: in our mount namespace it may not be mounted."""
    try:
        found = os.open(f"/proc/{os.getpid()}/root{path}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            kernel.setns(found, kernel.CLONE_NEWNET)
        finally:
            os.close(found)
    except OSError as error:
        raise EngineError("InvalidConfig", f"netns_path: {path!r}: {error.strerror}") from None


def _change_root(mounts: tuple[types_pb2.Mount, ...], root: Path) -> None:
    """In a mount namespace of the thread's own, so that nothing is to be unmounted when the process has ended."""
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    root.mkdir(exist_ok=True)
    for mount in mounts:
        # Without helpers (-i): what may be mounted is the kernel's business, not a program's.
        kind = "none" if mount.type == "bind" else mount.type
        options = ",".join(mount.options) or "defaults"
        argv = ["mount", "-n", "-i", "-t", kind, "-o", options, "--", mount.source or "none", str(root)]
        result = tools.run(argv, _MOUNT_SECONDS)
        if result.status != 0:
            raise EngineError("InvalidConfig", f"rootfs: {result.words or 'it cannot be mounted'}")
    kernel.pivot_root(str(root))


def marks(sandbox_id: str) -> dict[str, str]:
    """In the environment of what belongs to a sandbox and is to outlive the shim."""
    return {_MARK: sandbox_id}


def is_any(environment: list[bytes]) -> bool:
    """Whether an environment has `marks`."""
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
