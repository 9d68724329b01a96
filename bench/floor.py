"""The floor under a sandbox: bare conmon + runtime, create and start, with nothing of Sandkeeper's.

What is measured: from the spawn of conmon until `RUNTIME start` has returned, of a bundle whose root file
system holds a static busybox. The same binaries as the shim's, in the same run, and where a host needs a mount
namespace for crun (cgroup v1 and v2 side by side) in one that was made before, as the shim has it.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.shim.engines.oci.threads import Threads


class Floor:
    """Raw containers, so many at once."""

    def __init__(
        self,
        folder: Path,
        *,
        runtime: str,
        conmon: str,
        busybox: Path = Path("/bin/busybox"),
        at_once: int = 1,
    ) -> None:
        self._runtime, self._conmon, self._folder = runtime, conmon, folder
        self._bundle = folder / "bundle"
        (self._bundle / "rootfs" / "bin").mkdir(parents=True)
        shutil.copy(busybox, self._bundle / "rootfs" / "bin" / "sleep")
        for name in ("exits", "persist", "sock"):
            (folder / name).mkdir()
        self._run("spec", cwd=self._bundle)
        config = json.loads((self._bundle / "config.json").read_text())
        config["process"].update(args=["/bin/sleep", "1000"], terminal=False)
        config["process"].pop("rlimits", None)
        (self._bundle / "config.json").write_text(json.dumps(config))
        # The parent's name is not used: only what is to be hidden is asked for.
        self._threads = Threads(at_once, hide=Cgroups("sandkeeper-floor").hidden)

    def _run(self, *command: str, cwd: str | Path = "/", check: bool = True) -> None:
        subprocess.run([self._runtime, *command], check=check, capture_output=True, timeout=30, cwd=cwd)

    async def sample(self, number: int) -> float:
        """Creates, starts and removes one container; returns the seconds of create + start."""
        try:
            return await self.start(str(number))
        finally:
            await self.remove(str(number))

    async def start(self, name: str) -> float:
        """Creates and starts one; returns the seconds of it. It is to be removed also where this raises."""
        return await self._threads.run(lambda: self._start(self._id(name)))

    async def remove(self, name: str) -> None:
        """Kills and removes it, if it is there."""
        await self._threads.run(lambda: self._run("delete", "--force", self._id(name), check=False))

    @staticmethod
    def _id(name: str) -> str:
        return f"sandkeeper-floor-{os.getpid()}-{name}"

    def _start(self, name: str) -> float:
        began = time.perf_counter()
        self._create(name)
        self._run("start", name)
        return time.perf_counter() - began

    def _create(self, name: str) -> None:
        reader, writer = os.pipe()
        with os.fdopen(reader) as pipe:
            try:
                subprocess.run(
                    [
                        *(self._conmon, "--api-version", "1", "--full-attach"),
                        *("--socket-dir-path", str(self._folder / "sock")),
                        *("-c", name, "-u", name, "-n", name, "-r", self._runtime, "-b", str(self._bundle)),
                        *(
                            "--exit-dir",
                            str(self._folder / "exits"),
                            "--persist-dir",
                            str(self._folder / "persist"),
                        ),
                        *(
                            "-p",
                            str(self._folder / f"{name}.pid"),
                            "-l",
                            f"k8s-file:{self._folder / name}.log",
                        ),
                    ],
                    env={"_OCI_SYNCPIPE": str(writer), "PATH": os.environ["PATH"]},
                    pass_fds=(writer,),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    check=True,
                    timeout=30,
                )
            finally:
                os.close(writer)
            # conmon goes on by itself; its first line is the container's pid, or -1 and why not.
            answered, _, _ = select.select([pipe], [], [], 30)
            said = pipe.readline() if answered else ""
        if not said or json.loads(said)["data"] <= 0:
            raise RuntimeError(f"{self._conmon} with {self._runtime}: {said.strip() or 'no answer'}")
