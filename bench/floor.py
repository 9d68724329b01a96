"""The floor under a sandbox: bare conmon + runtime, create and start, with nothing of Sandkeeper's.

What is measured: from the spawn of conmon until `RUNTIME start` has returned, of a bundle whose root file
system holds a static busybox. The same binaries that the shim uses, in the same run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


class Floor:
    """Raw containers, one after the other. `prefix` is what the shim puts before a runtime's command line on
    this machine (empty on most: see docs/operations.md, "cgroups in hybrid mode")."""

    def __init__(self, folder: Path, *, runtime: str, conmon: str, busybox: Path, prefix: Sequence[str] = ()) -> None:
        self._runtime, self._conmon, self._prefix = runtime, conmon, list(prefix)
        self._folder = folder
        self._bundle = folder / "bundle"
        (self._bundle / "rootfs" / "bin").mkdir(parents=True)
        shutil.copy(busybox, self._bundle / "rootfs" / "bin" / "sleep")
        for name in ("exits", "persist", "sock"):
            (folder / name).mkdir()
        self._run([self._runtime, "spec"], cwd=self._bundle)
        config = json.loads((self._bundle / "config.json").read_text())
        config["process"].update(args=["/bin/sleep", "1000"], terminal=False)
        config["process"].pop("rlimits", None)
        (self._bundle / "config.json").write_text(json.dumps(config))

    def _run(self, command: list[str], **kwargs: object) -> None:
        subprocess.run([*self._prefix, *command], check=True, capture_output=True, timeout=30, **kwargs)  # type: ignore[call-overload]

    def sample(self, number: int) -> float:
        """Creates, starts and removes one container; returns the seconds of create + start."""
        name = f"sandkeeper-floor-{os.getpid()}-{number}"
        reader, writer = os.pipe()
        began = time.perf_counter()
        subprocess.run(
            [
                *self._prefix, self._conmon, "--api-version", "1", "--full-attach", "--socket-dir-path", str(self._folder / "sock"),
                "-c", name, "-u", name, "-n", name, "-r", self._runtime, "-b", str(self._bundle),
                "--exit-dir", str(self._folder / "exits"), "--persist-dir", str(self._folder / "persist"),
                "-p", str(self._folder / f"{name}.pid"), "-l", f"k8s-file:{self._folder / name}.log",
            ],
            env={"_OCI_SYNCPIPE": str(writer), "PATH": os.environ["PATH"]},
            pass_fds=(writer,), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd="/", check=True, timeout=30,
        )  # fmt: skip
        os.close(writer)
        with os.fdopen(reader) as pipe:
            pid = next((data for line in pipe if (data := json.loads(line).get("data", 0)) > 0), 0)
        if not pid:
            raise RuntimeError(f"{self._conmon} + {self._runtime}: create failed")
        self._run([self._runtime, "start", name], cwd="/")
        took = time.perf_counter() - began
        self._run([self._runtime, "delete", "--force", name], cwd="/")
        return took
