"""A real containerd in a folder of its own, beside whatever the machine runs: for tests, benches and trying out.

It shares nothing with another containerd: root, state, sockets and temporary files are below its folder. Only its
shims' sockets are where containerd has them, in /run/containerd/s, under names made of the folder's path. `close`
leaves nothing: shims, what runs in them, mounts, sockets, cgroups, folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import grpc

from sandkeeper.localcluster import containerd_sources
from sandkeeper.localcluster.containerd_sources import Source
from sandkeeper.localcluster.processes import Processes, start_time
from sandkeeper.shim.engines.oci import kernel
from sandkeeper.shim.engines.oci.processes import descendants, pids

READY_TIMEOUT = 60.0
_POLL = 0.02
_NAME = "containerd"
_LONGEST = 107 - len("/containerd.sock.ttrpc")  # unix(7): a socket's path has 107 bytes at most
_VERSION_CALL = "/containerd.services.version.v1.Version/Version"

Say = Callable[[str], None]


class ContainerdFailed(Exception):
    """containerd did not get ready, or what was asked of `ctr` failed. The message has what it said last."""


class Containerd:
    """One containerd. `with Containerd("module") as it:` starts it and leaves nothing behind."""

    def __init__(
        self,
        source: Source = "module",
        *,
        folder: Path | None = None,
        sandboxers: Mapping[str, Path] | None = None,
        cri: bool = False,
        config: str = "",
        cgroups: Collection[str] = (),
        processes: Processes | None = None,
        say: Say | None = None,
    ) -> None:
        """source: built from the pinned module (2.x), or Debian's package. Raises BinariesError where it cannot be had.

        folder: empty or not there, at most 85 bytes of path; default: a temporary one.
        sandboxers: name -> unix socket, as proxy plugins of type `sandbox`.
        cri: with the CRI plugin, which is left out otherwise.
        config: more TOML, after ours.
        cgroups: names directly below the cgroup root that only its containers are in; removed at the end.
        processes: what starts it, where it is not to be here; of the same folder.
        """
        self.programs = containerd_sources.ensure(source, say=say).path
        self.source = source
        self.folder = folder or Path(tempfile.mkdtemp(prefix="ctrd-"))
        if len(os.fsencode(self.folder)) > _LONGEST:
            raise ValueError(f"{self.folder} is too long for the path of a socket: at most {_LONGEST} bytes")
        self._sandboxers = dict(sandboxers or {})
        self._cri = cri
        self._config = config
        self._cgroups = tuple(cgroups)
        self._processes = processes or Processes(self.folder)
        self._sockets: set[Path] = set()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def socket(self) -> Path:
        return self.folder / "containerd.sock"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def pid(self) -> int | None:
        """None while it does not run."""
        return self._processes.pid(_NAME)

    def channel(self) -> grpc.Channel:
        """A blocking channel to it; the caller closes it."""
        return grpc.insecure_channel(f"unix:{self.socket}")

    # Its life

    def start(self) -> None:
        """Returns when it answers. Raises ContainerdFailed."""
        for name in ("root", "state", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        path = self.folder / "config.toml"
        path.write_text(self._toml())
        environment = {
            "PATH": os.pathsep.join((str(self.programs), os.environ.get("PATH", os.defpath), "/usr/sbin")),
            "TMPDIR": str(self.folder / "tmp"),
        }
        argv = [str(self.programs / "containerd"), "--config", str(path)]
        self._processes.spawn(_NAME, argv, env=environment, tied=True)
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT
        while time.monotonic() < deadline:
            if self.pid is None:
                raise ContainerdFailed(f"containerd ended:\n{self._processes.tail(_NAME)}")
            if self._answers():
                return
            time.sleep(_POLL)
        raise ContainerdFailed(f"containerd does not answer:\n{self._processes.tail(_NAME)}")

    def _answers(self) -> bool:
        with self.channel() as channel:
            call: Any = channel.unary_unary(
                _VERSION_CALL, request_serializer=bytes, response_deserializer=bytes
            )
            with contextlib.suppress(grpc.RpcError):
                call(b"", timeout=2.0)
                return True
        return False

    def stop(self) -> None:
        """Ends containerd as a service manager does; its shims, and what they run, go on. Repeatable."""
        self._processes.stop(_NAME)

    def kill(self) -> None:
        """Ends it with SIGKILL; its shims go on."""
        self._processes.kill(_NAME)

    def restart(self) -> None:
        """Stops and starts it: it finds its shims again."""
        self.stop()
        self.start()

    def power_off(self) -> None:
        """Ends it and all that it runs at once, as a machine without power does: what it has on disk is left."""
        self.kill()
        self._end_shims()
        shutil.rmtree(self.state, ignore_errors=True)

    def close(self) -> None:
        """Leaves nothing of it, nor of what was run with it. Repeatable."""
        self._note_sockets()
        self.stop()
        self._end_shims()
        for target in reversed(self.mounts()):
            with contextlib.suppress(OSError):
                kernel.umount(target, kernel.MNT_DETACH)
        for socket in self._sockets:
            socket.unlink(missing_ok=True)
        for name in self._cgroups:
            for point in _cgroup_points():
                remove_cgroup(point / name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end_shims(self) -> None:
        """SIGKILL to every shim of ours and all below it: one that is asked nicely asks containerd first."""
        deadline = time.monotonic() + 10.0
        below = {pid for shim in self.shims() for pid in descendants(shim)}
        while left := [pid for pid in {*self.shims(), *below} if start_time(pid) is not None]:
            if time.monotonic() > deadline:
                raise ContainerdFailed(f"processes {left} do not end")
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_POLL)

    # What belongs to it

    def shims(self) -> list[int]:
        """The pids of its shims: they have its socket's path in their arguments."""
        found, wanted = [], os.fsencode(self.socket)
        for pid in pids():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if wanted in words and b"containerd-shim" in words[0]:
                    found.append(pid)
        return found

    def mounts(self) -> list[str]:
        """What is mounted below its folder, in the order in which it was."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [target for line in lines if (target := line.split()[4]).startswith(f"{self.folder}/")]

    def _note_sockets(self) -> None:
        """A shim that is killed leaves its socket; only while its bundle is there is it known which it was."""
        for path in self.state.glob("io.containerd.runtime.v2.task/*/*/address"):
            with contextlib.suppress(OSError):
                self._sockets.add(Path(path.read_text().strip().removeprefix("unix://")))
        inodes = {inode for pid in self.shims() for inode in _socket_inodes(pid)}
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
            fields = line.split(maxsplit=7)
            if len(fields) == 8 and fields[6] in inodes and fields[7].startswith("/run/containerd/s/"):
                self._sockets.add(Path(fields[7]))

    # Asking it

    def ctr(self, *arguments: str, namespace: str = "default", seconds: float = 120.0) -> str:
        """What `ctr` prints. Raises ContainerdFailed."""
        argv = [str(self.programs / "ctr"), "--address", str(self.socket), "--namespace", namespace]
        result = subprocess.run(
            [*argv, *arguments],
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        if result.returncode != 0:
            raise ContainerdFailed(f"ctr {' '.join(arguments)}: {result.stderr.strip()}")
        return result.stdout

    def log(self, lines: int = 15) -> str:
        """The last of what it has written, for a message to people."""
        return self._processes.tail(_NAME, lines)

    def _toml(self) -> str:
        # 1.x reads version 2. What is switched off would reach out of the folder, or take time for nothing.
        off = ["io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.devmapper"]
        if not self._cri:
            off += [
                "io.containerd.grpc.v1.cri",
                "io.containerd.cri.v1.images",
                "io.containerd.cri.v1.runtime",
            ]
        lines = [
            f"version = {3 if self.source == 'module' else 2}",
            f"root = '{self.folder}/root'",
            f"state = '{self.state}'",
            f"disabled_plugins = {off!r}",
            f"[grpc]\naddress = '{self.socket}'",
            f"[plugins.'io.containerd.internal.v1.opt']\npath = '{self.folder}/opt'",
        ]
        for name, socket in self._sandboxers.items():
            lines.append(f"[proxy_plugins.'{name}']\ntype = 'sandbox'\naddress = '{socket}'")
        return "\n".join([*lines, self._config, ""])


def _socket_inodes(pid: int) -> Iterator[str]:
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            kind, _, inode = os.readlink(link).partition(":")  # noqa: PTH115 - not a path
            if kind == "socket":
                yield inode.strip("[]")


def _cgroup_points() -> list[Path]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [Path(line.split()[4]) for line in lines if line.partition(" - ")[2].startswith("cgroup")]


def remove_cgroup(path: Path) -> None:
    """With all below it, as far as nothing is in them."""
    if not path.is_dir():
        return
    for folder, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)  # noqa: PTH106
