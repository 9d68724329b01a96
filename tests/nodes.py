"""What runs on the nodes of a cluster, looked at from here."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ON_NODE = "SANDKEEPER_TEST_ON_NODE"
"""A command that runs another on a node, whose name stands for {node}: docker exec {node}. Empty: this machine."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """prefix: what to put before a command to run it on a node. states: node -> its shim's state_dir."""

    prefix: tuple[str, ...] = ()
    states: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def named(cls) -> Nodes:
        """As the environment says; with the state_dir that manifests/ give."""
        return cls(tuple(shlex.split(os.environ.get(ON_NODE, ""))))

    def run(self, node: str, *argv: str) -> str:
        """What it prints. Raises AssertionError when it fails."""
        done = self._run(node, *argv)
        assert done.returncode == 0, f"{argv} on {node}: {done.stderr.strip()}"
        return done.stdout

    def alive(self, status: Mapping[str, Any], pid: int = 0) -> bool:
        """Whether a process of a Sandbox with this status is there: the sandbox process where no other is named."""
        done = self._run(status["nodeName"], "test", "-d", f"/proc/{pid or status['pid']}")
        assert (done.returncode, done.stderr) in ((0, ""), (1, "")), done.stderr
        return done.returncode == 0

    def sandboxes(self, node: str) -> set[str]:
        """Ids of the sandboxes of which the shim there has records."""
        folder = self.states.get(node, Path("/var/lib/sandkeeper")) / "sandboxes"
        return set(self.run(node, "ls", str(folder)).split())

    def _run(self, node: str, *argv: str) -> subprocess.CompletedProcess[str]:
        prefix = [word.replace("{node}", node) for word in self.prefix]
        return subprocess.run([*prefix, *argv], capture_output=True, text=True, check=False, timeout=60)
