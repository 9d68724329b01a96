"""What a container is to be, as an OCI runtime configuration: a pure function of what was asked for.

Source: OCI runtime-spec 1.0 (config.md, config-linux.md). Safe by default, as Docker's and Podman's defaults.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci.images.types import ImageConfig
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.rootfs import User
from sandkeeper.shim.engines.oci.seccomp import Seccomp
from sandkeeper.wire import node_pb2

# Podman's default set: Docker's without MKNOD, NET_RAW and AUDIT_WRITE.
DEFAULT_CAPABILITIES = frozenset(
    "CAP_" + name
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE"),
        *("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
    )
)
# What a container may add unless the node allows more: the rest of Docker's set.
ADDABLE_CAPABILITIES = DEFAULT_CAPABILITIES | {"CAP_MKNOD", "CAP_NET_RAW", "CAP_AUDIT_WRITE"}

MASKED_PATHS = (
    *("/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
    *("/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi"),
    *("/sys/firmware", "/sys/devices/virtual/powercap"),
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_KERNEL_FOLDERS = ("/proc", "/sys", "/dev")
SHM = "/dev/shm"  # noqa: S108
# Files of /etc that are the sandbox's own.
ETC_FILES = ("hosts", "hostname", "resolv.conf")
# execve(2): both together have to fit in a quarter of the stack limit, 2 MiB; each string in 32 pages.
_MAX_ENV_BYTES = 1024 * 1024
_MAX_ARGUMENT_BYTES = 768 * 1024
_MAX_STRING_BYTES = 128 * 1024
_MAX_PATH_BYTES, _MAX_NAME_BYTES = 4095, 255  # limits.h: PATH_MAX without its NUL, NAME_MAX
_MAX_ID = 2**31 - 1
_MAX_CPU_MILLIS = 4096 * 1000
_MAX_MEMORY_BYTES = 2**63 - 1
_MAX_PIDS = 4194304  # the kernel's PID_MAX_LIMIT
_MAX_CPU_SHARES = 2**18  # the kernel's
_HOST_NAME = re.compile(r"[A-Za-z0-9](?:[-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Bind:
    """A host path that the engine made, mounted into the container."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is not asked for but found or made on the node."""

    rootfs: str
    user: User
    hostname: str
    cgroups_path: str
    # Kind of namespace (`network`, `ipc`, `uts`) -> path to join; empty: a new one.
    namespaces: Mapping[str, str]
    cgroup_v2: bool
    swap_accounting: bool
    binds: tuple[Bind, ...] = ()


def invalid(field: str, message: str) -> EngineError:
    return EngineError("InvalidConfig", f"{field}: {message}")


def check_path(field: str, path: str) -> str:
    """An absolute path inside a container, outside of the kernel's folders. Returns it normalized.

    Raises EngineError `InvalidConfig` that names the field (runc's CVE-2024-21626 came in by process.cwd).
    """
    if "\0" in path or "\n" in path:
        raise invalid(field, "must not hold NUL or a line break")
    raw = path.encode()
    if len(raw) > _MAX_PATH_BYTES or any(len(part) > _MAX_NAME_BYTES for part in raw.split(b"/")):
        raise invalid(
            field, f"must be at most {_MAX_PATH_BYTES} bytes, and {_MAX_NAME_BYTES} between two `/`"
        )
    if not path.startswith("/"):
        raise invalid(field, f"must be an absolute path, not {path!r}")
    if ".." in path.split("/"):
        raise invalid(field, f"must not hold `..`: {path!r}")
    normal = posixpath.normpath("/" + path.lstrip("/"))
    if any(normal == each or normal.startswith(each + "/") for each in _KERNEL_FOLDERS):
        raise invalid(field, f"must not be under /proc, /sys or /dev: {path!r}")
    return normal


def check_mount_path(field: str, path: str) -> str:
    """Where a volume may be: below the root, and not in place of what every container has mounted, /dev/shm
    excepted. Returns it normalized. Raises EngineError `InvalidConfig` that names the field."""
    target = path if path == SHM else check_path(field, path)
    if target == "/":
        raise invalid(field, "must not be the root")
    if any(f"{target}/".startswith(f"/etc/{name}/") for name in ETC_FILES):
        raise invalid(field, f"must not be one of the files in /etc that are the sandbox's own: {target!r}")
    return target


def check_sub_path(field: str, path: str) -> str:
    """A path below a volume. Raises EngineError `InvalidConfig` that names the field."""
    if "\0" in path or path.startswith("/") or any(part in ("..", ".") for part in path.split("/")):
        raise invalid(field, f"must be a relative path without `..`: {path!r}")
    return path


def check_volumes(config: node_pb2.SandboxConfig) -> None:
    """Raises EngineError `InvalidConfig` for a size that no volume can have."""
    for volume in config.volumes:
        if volume.size_limit_bytes < 0:
            raise invalid(f"volumes[{volume.name}].sizeLimit", "must not be negative")


def check_mounts(config: node_pb2.SandboxConfig, container: node_pb2.ContainerConfig) -> None:
    """Raises EngineError `InvalidConfig` for a mount of no volume, or to where none may be."""
    volumes = {volume.name for volume in config.volumes}
    taken: set[str] = set()
    for index, mount in enumerate(container.volume_mounts):
        field = f"containers[{container.name}].volumeMounts[{index}]"
        if mount.name not in volumes:
            raise invalid(f"{field}.name", f"there is no volume {mount.name!r}")
        target = check_mount_path(f"{field}.mountPath", mount.mount_path)
        if target in taken:
            raise invalid(f"{field}.mountPath", f"must be unique: {target!r}")
        taken.add(target)
        check_sub_path(f"{field}.subPath", mount.sub_path)


def capabilities(container: node_pb2.ContainerConfig, allowed: tuple[str, ...] = ()) -> frozenset[str]:
    """The capabilities left after `drop` and `add`. Raises EngineError `InvalidConfig` for one not to be had."""
    field = f"containers[{container.name}].securityContext.capabilities"
    drop = {_capability(name) for name in container.security_context.capabilities_drop}
    add = {_capability(name) for name in container.security_context.capabilities_add}
    may_add = ADDABLE_CAPABILITIES | {_capability(name) for name in allowed}
    if refused := sorted(add - may_add):
        raise invalid(f"{field}.add", f"this node does not allow {', '.join(refused)}")
    kept = frozenset() if "CAP_ALL" in drop else DEFAULT_CAPABILITIES - drop
    return frozenset(kept | add)


def _capability(name: str) -> str:
    upper = name.upper()
    return upper if upper.startswith("CAP_") else f"CAP_{upper}"


def arguments(container: node_pb2.ContainerConfig, image: ImageConfig) -> list[str]:
    """What is run, by Kubernetes' rule: `command` replaces entrypoint and cmd, `args` replaces cmd."""
    field = f"containers[{container.name}].command"
    if container.command:
        argv = [*container.command, *container.args]
    else:
        argv = [*image.entrypoint, *(container.args or image.cmd)]
    if not argv or not argv[0]:
        raise invalid(field, "must be set: the image names no command")
    if any("\0" in each for each in argv):
        raise invalid(field, "must not hold NUL")
    if _too_long(argv, _MAX_ARGUMENT_BYTES):
        raise invalid(field, "must be at most 128 KiB each, and 768 KiB in all with `args`")
    return argv


def _too_long(strings: Iterable[str], most: int) -> bool:
    """Whether execve(2) would refuse them: each takes a NUL and a pointer besides."""
    sizes = [len(each.encode()) + 1 for each in strings]
    return max(sizes, default=0) > _MAX_STRING_BYTES or sum(sizes) + 8 * len(sizes) > most


def host_name(sandbox_id: str, config: node_pb2.SandboxConfig) -> str:
    """The one asked for, else the owner's name, else the id. Raises EngineError `InvalidConfig`."""
    if config.hostname:
        if not _HOST_NAME.fullmatch(config.hostname):
            raise invalid(
                "hostname", f"must be at most 63 letters, digits, `-`, `.`, not {config.hostname!r}"
            )
        return config.hostname
    candidates = (
        name[:63].rstrip("-._") for name in (config.owner.name, config.containerd.sandbox_id, sandbox_id)
    )
    return next((name for name in candidates if _HOST_NAME.fullmatch(name)), "sandbox")


def environment(container: node_pb2.ContainerConfig, image: ImageConfig, hostname: str) -> list[str]:
    """PATH and HOSTNAME, then the image's, then the container's own: the later wins."""
    values = {"PATH": _DEFAULT_PATH, "HOSTNAME": hostname}
    for entry in image.env:
        name, _, value = entry.partition("=")
        if name:
            values[name] = value
    for index, variable in enumerate(container.env):
        field = f"containers[{container.name}].env[{index}]"
        if not variable.name or "=" in variable.name or "\0" in variable.name + variable.value:
            raise invalid(field, "must have a name without `=`, and no NUL")
        values[variable.name] = variable.value
    result = [f"{name}={value}" for name, value in values.items()]
    if _too_long(result, _MAX_ENV_BYTES):
        raise invalid(f"containers[{container.name}].env", "must be at most 128 KiB each, and 1 MiB in all")
    return result


def asked_ids(container: node_pb2.ContainerConfig) -> tuple[int | None, int | None]:
    """runAsUser and runAsGroup. Raises EngineError `InvalidConfig` for a number that no process can have."""
    context = container.security_context
    uid = context.run_as_user if context.HasField("run_as_user") else None
    gid = context.run_as_group if context.HasField("run_as_group") else None
    for name, number in (("runAsUser", uid), ("runAsGroup", gid)):
        _within(f"containers[{container.name}].securityContext.{name}", number or 0, _MAX_ID)
    return uid, gid


def _within(field: str, number: int, most: int) -> int:
    if not 0 <= number <= most:
        raise invalid(field, f"must be from 0 to {most}, not {number}")
    return number


def identity(container: node_pb2.ContainerConfig, from_image: User, known_gid: int | None = None) -> User:
    """Who runs it: runAsUser and runAsGroup before the image's user. Raises EngineError `InvalidConfig`.

    known_gid: the group that the image's /etc/passwd has for runAsUser.
    """
    uid, gid = asked_ids(container)
    user = from_image
    if uid is not None:
        user = User(uid, known_gid or 0)
    if gid is not None:
        user = User(user.uid, gid, user.groups)
    if container.security_context.run_as_non_root and user.uid == 0:
        raise invalid(
            f"containers[{container.name}].securityContext.runAsNonRoot",
            "the container would run as root: set runAsUser to a number above 0",
        )
    return user


def resources(container: node_pb2.ContainerConfig, options: Options, swap_accounting: bool) -> dict[str, Any]:
    """cgroup limits from the container, else the node's default: always memory and pids, and CPU unless
    the node's default is 0. Raises EngineError `InvalidConfig`: what is negative is no limit to the kernel."""
    asked, field = container.resources, f"containers[{container.name}].resources.limits"
    cpu_millis = _within(f"{field}.cpu", asked.cpu_millis, _MAX_CPU_MILLIS) or options.default_cpu_millis
    memory = _within(f"{field}.memory", asked.memory_bytes, _MAX_MEMORY_BYTES) or options.default_memory_bytes
    pids = _within(f"{field}.pids", asked.pids, _MAX_PIDS) or options.default_pids
    limits: dict[str, Any] = {"limit": memory}
    if swap_accounting:
        limits["swap"] = memory  # memory and swap together: no swap
    cpu = {
        "shares": min(max(2, cpu_millis * 1024 // 1000), _MAX_CPU_SHARES),
        "quota": max(1000, cpu_millis * 100),
        "period": 100_000,
    }
    return {
        "cpu": cpu if cpu_millis else {},
        "memory": limits,
        "pids": {"limit": pids},
        "devices": [{"allow": False, "access": "rwm"}],
    }


def process(
    container: node_pb2.ContainerConfig,
    image: ImageConfig,
    user: User,
    hostname: str,
    allowed_capabilities: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The `process` object: also what `exec` runs by, with other arguments."""
    caps = sorted(capabilities(container, allowed_capabilities))
    cwd = container.working_dir or image.working_dir or "/"
    field = f"containers[{container.name}].workingDir"
    who: dict[str, Any] = {"uid": user.uid, "gid": user.gid}
    if user.groups:
        who["additionalGids"] = list(user.groups)
    return {
        "terminal": False,
        "user": who,
        "args": arguments(container, image),
        "env": environment(container, image, hostname),
        "cwd": check_path(field, cwd),
        "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
        "noNewPrivileges": not container.security_context.allow_privilege_escalation,
    }


def build(
    container: node_pb2.ContainerConfig,
    image: ImageConfig,
    around: Surroundings,
    options: Options,
    seccomp: Seccomp,
) -> dict[str, Any]:
    """The whole configuration. Raises EngineError `InvalidConfig`, naming the field at fault."""
    caps = capabilities(container, options.allowed_capabilities)
    namespaces: list[dict[str, str]] = [{"type": "pid"}, {"type": "mount"}]
    if around.cgroup_v2:
        namespaces.append({"type": "cgroup"})
    for kind, path in around.namespaces.items():
        namespaces.append({"type": kind, "path": path} if path else {"type": kind})
    bound = {bind.target for bind in around.binds}
    return {
        # What every runtime in use reads: later versions refuse nothing of it.
        "ociVersion": "1.0.0",
        "process": process(container, image, around.user, around.hostname, options.allowed_capabilities),
        "root": {
            "path": around.rootfs,
            "readonly": container.security_context.read_only_root_filesystem,
        },
        "mounts": [
            *(each for each in _kernel_mounts(options) if each["destination"] not in bound),
            *(_bind(each) for each in around.binds),
        ],
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": around.cgroups_path,
            "resources": resources(container, options, around.swap_accounting),
            "seccomp": seccomp.resolve(caps),
            "maskedPaths": list(MASKED_PATHS),
            "readonlyPaths": list(READONLY_PATHS),
        },
        "annotations": seccomp.annotations(caps),
    }


def _kernel_mounts(options: Options) -> list[dict[str, Any]]:
    strict = ["nosuid", "noexec", "nodev"]
    shm_size = f"size={options.shm_bytes}"
    return [
        _mount("/proc", "proc", "proc", strict),
        _mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount(
            "/dev/pts",
            "devpts",
            "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        _mount(SHM, "tmpfs", "shm", [*strict, "mode=1777", shm_size]),
        _mount("/dev/mqueue", "mqueue", "mqueue", strict),
        _mount("/sys", "sysfs", "sysfs", [*strict, "ro"]),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", [*strict, "relatime", "ro"]),
    ]


def _mount(target: str, kind: str, source: str, options: list[str]) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": options}


def _bind(bind: Bind) -> dict[str, Any]:
    options = ["bind", "nosuid", "nodev", "rprivate", "ro" if bind.read_only else "rw"]
    return _mount(bind.target, "bind", bind.source, options)
