"""Mount, network, PID, UTS and IPC namespaces for programs that would otherwise leave much on the machine.

Their first process is a pause that reaps. When it ends, and it ends with whoever made it, the kernel ends all the
others, and with them go their mounts, interfaces and addresses.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sandkeeper.localcluster.processes import start_time
from sandkeeper.shim.engines.oci import kernel

T = TypeVar("T")
CLONE_NEWPID = 0x20000000
_KINDS = {
    "pid": CLONE_NEWPID,
    "net": kernel.CLONE_NEWNET,
    "uts": kernel.CLONE_NEWUTS,
    "ipc": kernel.CLONE_NEWIPC,
    "mnt": kernel.CLONE_NEWNS,  # the last: then the others' files are out of sight
}
_TIMEOUT = 30.0
_POLL = 0.02
# Run as root by sh: $1 the host's name, $2 the file that says "ready", $3 the pause, then pairs of source and target.
# Shared within, so that a pod's mounts may propagate; nothing reaches the machine.
_SET_UP = """set -e
name=$1 ready=$2 pause=$3; shift 3
mount --make-rshared /
while [ $# -gt 0 ]; do mount --bind "$1" "$2"; shift 2; done
hostname "$name"
ip link set lo up
: > "$ready"
exec "$pause" -P
"""


class NamespacesFailed(Exception):
    """They could not be made. The message has what was said last."""


class Namespaces:
    """One set of namespaces, from `start` to `close`."""

    def __init__(self, folder: Path, hostname: str, binds: Mapping[Path, str]) -> None:
        """folder: for a few files of its own. binds: folder -> existing folder of the machine that it hides within."""
        self._folder = folder
        self._net = folder / "net"
        self._hostname = hostname
        self._binds = dict(binds)
        self._maker: subprocess.Popen[bytes] | None = None
        self._first = 0
        self._children: list[subprocess.Popen[bytes]] = []
        self._inside: ThreadPoolExecutor | None = None
        self._network: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """Returns when programs can be started in them. Raises NamespacesFailed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        ready, log = self._folder / "ready", self._folder / "log"
        ready.unlink(missing_ok=True)
        pause = shutil.which("catatonit") or "/usr/libexec/podman/catatonit"
        pairs = [str(word) for pair in self._binds.items() for word in pair]
        argv = [
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *("unshare", "--mount", "--net", "--pid", "--uts", "--ipc", "--propagation", "private"),
            *("--mount-proc", "--kill-child", "--fork", "--"),
            *("/bin/sh", "-c", _SET_UP, "sh", self._hostname, str(ready), pause, *pairs),
        ]
        with log.open("wb") as output:
            self._maker = subprocess.Popen(
                argv,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"},
            )
        deadline = time.monotonic() + _TIMEOUT
        while not ready.exists():
            if self._maker.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace").strip()
                self.close()
                raise NamespacesFailed(f"no namespaces could be made: {said}")
            time.sleep(_POLL)
        children = Path(f"/proc/{self._maker.pid}/task/{self._maker.pid}/children")
        self._first = int(children.read_text().split()[0])
        self._net.unlink(missing_ok=True)
        self._net.symlink_to(f"/proc/{self._first}/ns/net")
        self._inside = ThreadPoolExecutor(1, "inside", self._enter, (tuple(_KINDS),))
        self._network = ThreadPoolExecutor(1, "network", self._enter, (("net",),))

    @property
    def pid(self) -> int:
        """The first process's, as the machine counts."""
        return self._first

    @property
    def enter_network(self) -> Sequence[str]:
        """What to put before a command so that it runs in the network alone: whichever it is by then."""
        return ("nsenter", f"--net={self._net}", "--")

    @property
    def enter(self) -> Sequence[str]:
        """What to put before a command so that it runs within. For what ends by itself: a signal to it ends nsenter."""
        return ("nsenter", f"--target={self.pid}", "--mount", "--net", "--uts", "--ipc", "--pid", "--")

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """subprocess.Popen within them. Its pid is the machine's: it can be waited for and killed from outside.

        A thread that has entered them starts it, so no nsenter stands between.
        """
        if self._inside is None:
            raise RuntimeError("start comes first")

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(list(argv), **options)

        self._children = [child for child in self._children if child.poll() is None]
        self._children.append(self._inside.submit(start).result())
        return self._children[-1]

    def in_network(self, function: Callable[[], T]) -> T:
        """What the function returns when it is called in the network, with all else as it is here."""
        if self._network is None:
            raise RuntimeError("start comes first")
        return self._network.submit(function).result()

    def _enter(self, kinds: Sequence[str]) -> None:
        with contextlib.ExitStack() as stack:
            opened = []
            for kind in kinds:
                descriptor = os.open(f"/proc/{self._first}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
                opened.append((descriptor, _KINDS[kind]))
            if "mnt" in kinds:
                kernel.unshare(kernel.CLONE_FS)  # a thread that shares its root cannot change it
            for descriptor, flag in opened:
                kernel.setns(descriptor, flag)

    def close(self) -> None:
        """Ends every process in them; returns when all are gone. Repeatable."""
        if self._maker is None:
            return
        if self._first:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._first, signal.SIGKILL)
        self._maker.kill()
        self._maker.wait()
        deadline = time.monotonic() + _TIMEOUT
        while self._first and start_time(self._first) is not None:  # the kernel waits for all others first,
            for child in self._children:
                child.poll()  # and those that are our children are gone only when we have asked
            if time.monotonic() > deadline:
                raise NamespacesFailed(f"the namespaces' first process, {self._first}, does not end")
            time.sleep(_POLL)
        for executor in (self._inside, self._network):
            if executor is not None:
                executor.shutdown()  # its thread holds them
        self._maker, self._first, self._inside, self._network = None, 0, None, None
        self._children = []
