"""What the programs of a node are configured with (onenode.py)."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from sandkeeper.localcluster.ocilayout import ImageDef

PODS = "10.88.0.0/24"
PAUSE = "sandkeeper.test/pause:1"
BOOT_ID = "/proc/sys/kernel/random/boot_id"


def pause_image() -> ImageDef:
    pause = Path(shutil.which("catatonit") or "/usr/libexec/podman/catatonit")
    return ImageDef(files={"pause": (pause.read_bytes(), 0o755)}, entrypoint=("/pause", "-P"))


def cni_config() -> dict[str, Any]:
    ipam = {"type": "host-local", "ranges": [[{"subnet": PODS}]], "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipam": ipam}
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}


def containerd_config(cni: Path, runc: Path, base_spec: Path, sandboxer: str) -> str:
    plugins = next(
        (p for p in ("/usr/lib/cni", "/opt/cni/bin") if Path(p, "bridge").exists()), "/usr/lib/cni"
    )
    runtime = "plugins.'io.containerd.cri.v1.runtime'"
    ours = f"[{runtime}.containerd.runtimes.{sandboxer}]\nruntime_type = 'io.containerd.runc.v2'"
    ours += f"\nsandboxer = '{sandboxer}'\n[{runtime}.containerd.runtimes.{sandboxer}.options]"
    ours += f"\nBinaryName = '{runc}'\n"
    return f"""{ours if sandboxer else ""}
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = '{PAUSE}'
[{runtime}]
restrict_oom_score_adj = true
[{runtime}.cni]
bin_dirs = ['{plugins}']
conf_dir = '{cni}'
[{runtime}.containerd]
default_runtime_name = 'runc'
[{runtime}.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
base_runtime_spec = '{base_spec}'
[{runtime}.containerd.runtimes.runc.options]
BinaryName = '{runc}'
SystemdCgroup = false
"""


def base_spec(ctr: Path, boot_id: Path) -> str:
    """What containerd makes every Pod's container of: its own default, and the boot id that the node has.

    A container has a /proc of its own; runc refuses mounts there, but runs hooks before it enters the root.
    """
    printed = subprocess.run([str(ctr), "oci", "spec"], check=True, capture_output=True, text=True, cwd="/")
    spec: dict[str, Any] = json.loads(printed.stdout)
    argv = ["mount", "--bind", str(boot_id), BOOT_ID.lstrip("/")]
    spec["hooks"] = {"createContainer": [{"path": shutil.which("mount") or "/bin/mount", "args": argv}]}
    return json.dumps(spec)
