"""docs/install.md's commands, to be run as they stand there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sandkeeper.localcluster.onenode import OneNode

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "install.md"
PROGRAMS = (
    "kubectl",
    "sandkeeper",
    "docker",
    "kind",
    "make",
    "apt-get",
    "python3",
    "install",
    "systemctl",
    "rm",
)


def commands() -> list[str]:
    """What is set off on the page and begins with a program, without comments."""
    lines = [line.strip() for line in PAGE.read_text().splitlines() if line.startswith("    ")]
    found = [line for line in lines if line.partition(" ")[0] in PROGRAMS or "/bin/" in line]
    return [line.partition("  #")[0].strip() for line in found]


def the_command(start: str) -> str:
    """The page's one command that begins with these words. Raises LookupError."""
    found = {each for each in commands() if f"{each} ".startswith(f"{start} ")}
    if len(found) != 1:
        raise LookupError(f"{len(found)} commands of {PAGE.name} begin with {start!r}")
    return found.pop()


def run_documented(node: OneNode, start: str, *, here: bool = True) -> str:
    """Runs the command of docs/install.md that begins so; returns what it prints.

    From this repository with the administrator's kubeconfig; or, where it is not `here`, on the node.
    """
    command = the_command(start)
    if not here:
        return node.run_within("sh", "-c", command)
    kubectl, ours = node.api.tools["kubectl"].path, Path(sys.executable)
    environment = os.environ | {
        "PATH": os.pathsep.join((str(kubectl.parent), str(ours.parent), os.environ["PATH"])),
        "KUBECONFIG": str(node.kubeconfig),
        "KUBECACHEDIR": str(node.folder / "kubectl-cache"),
    }
    result = subprocess.run(
        [*node.namespaces.enter_network, "sh", "-c", command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{command}: {result.stderr}"
    return result.stdout
