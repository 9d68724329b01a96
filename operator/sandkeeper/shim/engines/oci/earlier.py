"""What an earlier shim over the same folders has left running, if it was killed."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from signal import SIGKILL

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci import monitor, pause
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.shim.engines.oci.folders import SandboxFolder
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.processes import ProcessRef, read_json

log = logging.getLogger(__name__)


def end_calls(cgroups: Cgroups) -> None:
    """Ends what an earlier shim was calling when it was killed, such as a runtime that hangs: its answer would
    reach nobody. On v2 it is in that shim's own cgroup, and not ours to find."""
    for pid in cgroups.in_monitors():
        with contextlib.suppress(OSError):
            ref, process = ProcessRef.of(pid), Path(f"/proc/{pid}")
            words, environment = (
                (process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ")
            )
            if ref is not None and not monitor.is_any(words) and not pause.is_any(environment):
                log.warning(
                    "left-over process ended",
                    extra={"pid": pid, "program": words[0].decode(errors="replace")},
                )
                ref.send(SIGKILL)


def survivor(options: Options) -> int:
    """A process that lives in an earlier shim's mount namespace; 0 where there is none."""
    own = os.readlink("/proc/self/ns/mnt")  # noqa: PTH115 - not a path
    root = options.run_root / "sandboxes"
    for name in sorted(each.name for each in root.iterdir()) if root.exists() else ():
        with contextlib.suppress(EngineError, OSError):
            folder = SandboxFolder.under(options.root_dir, options.run_root, name)
            candidates = [ProcessRef.from_json(read_json(folder.process) or {})]
            candidates += [monitor.find(attempt) for attempt in folder.attempts()]
            for ref in candidates:
                if ref is None or not ref.alive():
                    continue
                # One with a root of its own (containerd's `rootfs`) has a mount namespace with nothing else in it.
                with_our_root = Path(f"/proc/{ref.pid}/root").samefile("/")
                if with_our_root and os.readlink(f"/proc/{ref.pid}/ns/mnt") != own:  # noqa: PTH115
                    return ref.pid
    return 0
