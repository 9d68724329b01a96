"""OCI image layouts made in pure Python: for the demo, offline nodes and tests.

The same input gives the same bytes, and so the same digests (with the same version of zlib).
Source: OCI image spec 1.1 (image-layout.md).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PASSWD = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
_GROUP = b"root:x:0:\nnogroup:x:65534:\n"


@dataclass(frozen=True, slots=True)
class ImageDef:
    """An image to build, of one layer.

    files: path in the image -> content (mode 0644), or (content, mode). symlinks: path -> target.
    directories: path -> mode. Parents come by themselves, mode 0755. Everything belongs to root.
    """

    files: Mapping[str, bytes | tuple[bytes, int]] = field(default_factory=dict)
    symlinks: Mapping[str, str] = field(default_factory=dict)
    directories: Mapping[str, int] = field(default_factory=dict)
    env: tuple[str, ...] = (_PATH,)
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    stop_signal: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    architecture: str = field(
        default_factory=lambda: _ARCHITECTURES.get(platform.machine(), platform.machine())
    )


def busybox_image(busybox: Path = Path("/bin/busybox"), *, base: ImageDef | None = None) -> ImageDef:
    """An image with a static busybox, its applets linked in /bin, and `sh` as its command.

    base: taken for all that busybox does not set. Raises OSError or CalledProcessError where
    `busybox` cannot be read or run.
    """
    base = base or ImageDef()
    listing = subprocess.run([str(busybox), "--list"], check=True, capture_output=True, text=True, cwd="/")
    applets = sorted(set(listing.stdout.split()) - {"busybox"})
    files: dict[str, bytes | tuple[bytes, int]] = {
        "bin/busybox": (busybox.read_bytes(), 0o755),
        "etc/passwd": _PASSWD,
        "etc/group": _GROUP,
        **base.files,
    }
    return replace(
        base,
        files=files,
        symlinks={**{f"bin/{name}": "busybox" for name in applets}, **base.symlinks},
        directories={
            "tmp": 0o1777,
            "root": 0o700,
            "dev": 0o755,
            "proc": 0o755,
            "sys": 0o755,
            **base.directories,
        },
        cmd=base.cmd or ("sh",),
    )


def write_layout(path: Path, images: Mapping[str, ImageDef | Mapping[str, ImageDef]]) -> dict[str, str]:
    """Writes an OCI layout at `path`: reference -> image, or -> {name: image} for an index of
    several platforms. What is there already stays, its tags are replaced. Returns reference ->
    digest of the manifest or index. index.json comes last and at once, so a reader never sees half."""
    blobs = path / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    _replace(path / "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    digests: dict[str, str] = {}
    entries: list[dict[str, Any]] = []
    for reference, image in images.items():
        if isinstance(image, ImageDef):
            entry = _write_image(blobs, image)
        else:
            parts = [_write_image(blobs, one) for one in image.values()]
            entry = _write_json(blobs, "application/vnd.oci.image.index.v1+json", {"manifests": parts})
        digests[reference] = entry["digest"]
        entries.append({**entry, "annotations": {"org.opencontainers.image.ref.name": reference}})
    index = path / "index.json"
    if index.exists():
        kept = json.loads(index.read_bytes())["manifests"]
        name = "org.opencontainers.image.ref.name"
        entries = [e for e in kept if e.get("annotations", {}).get(name) not in digests] + entries
    _replace(index, _json({"schemaVersion": 2, "manifests": entries}))
    return digests


def layer(image: ImageDef) -> bytes:
    """The image's only layer as an uncompressed tar."""
    members: dict[str, tuple[tarfile.TarInfo, bytes]] = {}

    def add(name: str, kind: bytes, mode: int, content: bytes = b"", target: str = "") -> None:
        for parent in reversed(Path(name).parents[:-1]):
            if parent.as_posix() not in members:
                add(parent.as_posix(), tarfile.DIRTYPE, 0o755)
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.size, info.linkname = kind, mode, len(content), target
        members[name] = (info, content)

    for name, mode in image.directories.items():
        add(name, tarfile.DIRTYPE, mode)
    for name, value in image.files.items():
        content, mode = value if isinstance(value, tuple) else (value, 0o644)
        add(name, tarfile.REGTYPE, mode, content)
    for name, target in image.symlinks.items():
        add(name, tarfile.SYMTYPE, 0o777, target=target)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in members.values():
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _write_image(blobs: Path, image: ImageDef) -> dict[str, Any]:
    tar = layer(image)
    compressed = gzip.compress(tar, compresslevel=6, mtime=0)
    config = {
        "architecture": image.architecture,
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": {
            "Env": list(image.env),
            "Entrypoint": list(image.entrypoint),
            "Cmd": list(image.cmd),
            "WorkingDir": image.working_dir,
            "User": image.user,
            "StopSignal": image.stop_signal,
            "Labels": dict(image.labels),
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(tar).hexdigest()}"]},
    }
    manifest = {
        "config": _write_json(blobs, "application/vnd.oci.image.config.v1+json", config, versioned=False),
        "layers": [_write_blob(blobs, "application/vnd.oci.image.layer.v1.tar+gzip", compressed)],
    }
    entry = _write_json(blobs, "application/vnd.oci.image.manifest.v1+json", manifest)
    return {**entry, "platform": {"os": "linux", "architecture": image.architecture}}


def _write_json(
    blobs: Path, media_type: str, document: Mapping[str, Any], *, versioned: bool = True
) -> dict[str, Any]:
    head = {"schemaVersion": 2, "mediaType": media_type} if versioned else {}
    return _write_blob(blobs, media_type, _json({**head, **document}))


def _write_blob(blobs: Path, media_type: str, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    if not (blobs / digest).exists():
        _replace(blobs / digest, content)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
