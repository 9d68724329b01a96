"""Root file systems and volumes, mounted in the engine's mount namespace."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from pathlib import Path

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci import files, kernel, rootfs
from sandkeeper.shim.engines.oci.folders import AttemptFolder, SandboxFolder
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.spec import ETC_FILES, Bind, check_mount_path
from sandkeeper.wire import node_pb2

_HOST_RESOLV_CONF = Path("/etc/resolv.conf")


def make_attempt(folder: AttemptFolder, image_rootfs: str) -> None:
    """The folders of an attempt and its root, mounted; what is there already is kept."""
    if os.path.ismount(folder.rootfs):
        return
    for each in (folder.rootfs, folder.upper):
        each.mkdir(parents=True, exist_ok=True)
    folder.work.mkdir(exist_ok=True)
    # The root of the overlay is the upper folder's: with the image's owner and mode.
    found = Path(image_rootfs).stat()
    folder.upper.chmod(found.st_mode & 0o7777)
    os.chown(folder.upper, found.st_uid, found.st_gid)
    layers = f"lowerdir={_quote(image_rootfs)},upperdir={_quote(folder.upper)},workdir={_quote(folder.work)}"
    try:
        # volatile: no write-back when it is unmounted; its content goes with it.
        kernel.mount("overlay", str(folder.rootfs), "overlay", kernel.MS_NODEV, f"{layers},volatile")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise EngineError("StartError", f"root file system: {error}", retryable=True) from None
        # A work folder that was mounted as volatile before, or a kernel that knows no such option.
        shutil.rmtree(folder.work)
        folder.work.mkdir()
        kernel.mount("overlay", str(folder.rootfs), "overlay", kernel.MS_NODEV, layers)


def _quote(path: str | Path) -> str:
    """Overlay's option syntax: a comma ends an option, a colon a layer."""
    return str(path).replace("\\", "\\\\").replace(",", "\\,").replace(":", "\\:")


def make_etc(folder: SandboxFolder, hostname: str, *, host_network: bool) -> None:
    """The files of /etc that are the sandbox's own. No network: no name server."""
    folder.etc.mkdir(exist_ok=True)
    files.write(folder.etc / "hostname", f"{hostname}\n".encode())
    files.write(
        folder.etc / "hosts",
        f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.0.1\t{hostname}\n".encode(),
    )
    servers = ""
    if host_network:
        with contextlib.suppress(OSError):
            servers = _HOST_RESOLV_CONF.read_text(errors="replace")
    files.write(folder.etc / "resolv.conf", servers.encode())


def make_volumes(folder: SandboxFolder, config: node_pb2.SandboxConfig, options: Options) -> None:
    """An empty folder each; for `memory` a tmpfs of the size asked for, never without a bound."""
    for volume in config.volumes:
        path = folder.volume(volume.name)
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o777)
        if volume.memory and not os.path.ismount(path):
            size = volume.size_limit_bytes or options.default_memory_bytes
            flags = kernel.MS_NOSUID | kernel.MS_NODEV
            try:
                kernel.mount("tmpfs", str(path), "tmpfs", flags, f"size={size},mode=1777")
            except OSError as error:
                raise EngineError("StartError", f"volumes[{volume.name}]: {error}", retryable=True) from None


def binds(
    sandbox: SandboxFolder, attempt: AttemptFolder, container: node_pb2.ContainerConfig
) -> tuple[Bind, ...]:
    """The mounts of a container: /etc's files and its volumes, sub-paths opened safely and pinned.

    What is mounted later hides what is below it, so that the shorter path comes first.
    """
    found = [Bind(str(sandbox.etc / name), f"/etc/{name}", read_only=True) for name in ETC_FILES]
    for index, mount in enumerate(container.volume_mounts):
        field = f"containers[{container.name}].volumeMounts[{index}]"
        source = sandbox.volume(mount.name)
        if mount.sub_path:
            source = _pin(sandbox.volume(mount.name), mount.sub_path, attempt.subpaths / str(index), field)
        target = check_mount_path(f"{field}.mountPath", mount.mount_path)
        found.append(Bind(str(source), target, mount.read_only))
    return tuple(sorted(found, key=lambda bind: bind.target.count("/")))


def _pin(volume: Path, sub_path: str, target: Path, field: str) -> Path:
    """Bind-mounts a folder of a volume: what runs beside may swap the path for a link at any time, but not
    what was opened."""
    target.mkdir(parents=True, exist_ok=True)
    if os.path.ismount(target):
        return target
    try:
        fd = rootfs.open_beneath(volume, sub_path, make=True)
        try:
            kernel.mount(f"/proc/thread-self/fd/{fd}", str(target), "", _MS_BIND)
        finally:
            os.close(fd)
    except OSError as error:
        raise EngineError("InvalidConfig", f"{field}.subPath: {error.strerror or error}") from None
    return target


_MS_BIND = 0x1000


def unmount_attempt(folder: AttemptFolder) -> None:
    for target in (*_children(folder.subpaths), folder.rootfs):
        unmount(target)


def unmount_all(folder: SandboxFolder) -> None:
    """Everything that is mounted for a sandbox."""
    for attempt in folder.attempts():
        unmount_attempt(attempt)
    for volume in _children(folder.volumes):
        unmount(volume)


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def unmount(target: Path, seconds: float = 2.0) -> None:
    """Unmounts what is mounted there, if anything is. Held by a process that is just ending: waits, then detaches."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            kernel.umount(str(target))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                with contextlib.suppress(OSError):
                    kernel.umount(str(target), kernel.MNT_DETACH)
                return
            time.sleep(0.002)
