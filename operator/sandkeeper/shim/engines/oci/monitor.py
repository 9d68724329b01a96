"""conmon: makes a container through its runtime, then holds its output and its exit code without us.

Source: conmon 2.1 (`conmon --help`, src/ctrl.c for the pipes): the file descriptors named by _OCI_SYNCPIPE
and _OCI_STARTPIPE carry the pid or the error, and the permission to go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.shim.engines.oci.folders import AttemptFolder
from sandkeeper.shim.engines.oci.processes import ProcessRef, reap
from sandkeeper.shim.engines.oci.tools import ENVIRONMENT, clean

_MAX_MESSAGE = 64 * 1024
MARK = b"--sandkeeper-monitor"
"""Among the arguments of another engine's monitors."""


def create(
    conmon: str, runtime: str, runtime_root: Path, folder: AttemptFolder, log_bytes: int, cgroups: Cgroups,
    seconds: float,
) -> int:  # fmt: skip
    """Has conmon create the container of a bundle. Returns the pid of its first process, which waits for `start`.

    Raises EngineError `StartError` with the runtime's words.
    """
    argv = [
        *(conmon, "--api-version", "1", "--cid", folder.runtime_id, "--cuuid", folder.runtime_id),
        *("--name", folder.runtime_id, "--runtime", runtime, "--bundle", str(folder.run)),
        *("--container-pidfile", str(folder.pid_file), "--conmon-pidfile", str(folder.monitor_pid_file)),
        *("--exit-dir", str(folder.exit_file.parent), "--persist-dir", str(folder.oom_file.parent)),
        *("--log-path", f"k8s-file:{folder.log}", "--log-size-max", str(log_bytes), "--no-sync-log"),
        *("--log-level", "error", "--socket-dir-path", str(folder.run), "--full-attach"),
        *("--runtime-arg", f"--root={runtime_root}"),
    ]
    sync_read, sync_write = os.pipe()
    start_read, start_write = os.pipe()
    environment = {**ENVIRONMENT, "_OCI_SYNCPIPE": str(sync_write)}
    passed = [sync_write]
    if cgroups.v2:
        # v2: conmon is moved out of our cgroup before it makes anything. v1: it was born outside.
        environment["_OCI_STARTPIPE"] = str(start_read)
        passed.append(start_read)
    deadline = time.monotonic() + seconds
    try:
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=environment,
                pass_fds=passed,
            )
        except OSError as error:
            raise EngineError("StartError", f"conmon cannot be run: {error}") from None
        finally:
            os.close(sync_write)
            os.close(start_read)
        if cgroups.v2:
            _end_child(child, deadline)
            if pid := read_pid(folder.monitor_pid_file):
                cgroups.adopt(pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(start_write, b"\0")
        answer = _read_line(sync_read, deadline)
        _end_child(child, deadline)
    finally:
        os.close(sync_read)
        os.close(start_write)
    return _pid_of(answer, seconds)


def _end_child(child: subprocess.Popen[bytes], deadline: float) -> None:
    """Waits for what we started of conmon, which ends when its monitor has been forked; not past the deadline."""
    if child.returncode is not None:
        return
    fd = os.pidfd_open(child.pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            child.kill()
    finally:
        os.close(fd)
    child.wait()


def _read_line(fd: int, deadline: float) -> bytes | None:
    """What comes until the end of a line or of the stream; None when the time is up."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    answer = b""
    while not answer.endswith(b"\n") and len(answer) < _MAX_MESSAGE:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        more = os.read(fd, 4096)
        if not more:
            break
        answer += more
    return answer


def _pid_of(answer: bytes | None, seconds: float) -> int:
    if answer is None:
        raise EngineError("StartError", f"the container was not created within {seconds:g} s", retryable=True)
    try:
        document = json.loads(answer)
        # `pid` until API version 1, `data` since.
        pid = int(document.get("data", document.get("pid", -1)))
        message = clean(str(document.get("message", "")))
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        pid, message = -1, clean(answer.decode(errors="replace"))
    if pid <= 0:
        raise EngineError("StartError", message or "conmon ended without a word")
    return pid


def read_pid(path: Path) -> int:
    """The pid in a file; 0 where there is none."""
    try:
        return int(path.read_text())
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return 0


def find(folder: AttemptFolder) -> ProcessRef | None:
    """The live monitor of an attempt, by its pid file, checked to be this attempt's."""
    pid = read_pid(folder.monitor_pid_file)
    if pid <= 0:
        return None
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return ProcessRef.of(pid) if folder.runtime_id.encode() in words else None


def is_any(words: list[bytes]) -> bool:
    """Whether a command line is a monitor's."""
    return b"--conmon-pidfile" in words or MARK in words


def end(monitor: ProcessRef, seconds: float) -> None:
    """Lets a monitor end by itself, as it does after its container; then by force."""
    if not monitor.join(seconds):
        monitor.send(signal.SIGKILL)
        monitor.join(5.0)
    reap(monitor.pid)
