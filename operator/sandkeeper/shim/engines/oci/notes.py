"""What the engine notes of a sandbox beside the kernel's own lists, and reads back after a restart of the shim."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandkeeper.shim.engines.oci.folders import AttemptFolder, SandboxFolder
from sandkeeper.shim.engines.oci.images.types import Image, ImageConfig
from sandkeeper.shim.engines.oci.processes import ProcessRef, boot_id, read_json, write_json


@dataclass(frozen=True, slots=True)
class Started:
    """An attempt that was started: its first process, and the conmon that watches it."""

    process: ProcessRef
    monitor: ProcessRef | None


def read_started(folder: AttemptFolder) -> Started | None:
    """None where the attempt was not started, as far as is recorded."""
    document = read_json(folder.started)
    if not document:
        return None
    process = ProcessRef.from_json(document.get("process"))
    return Started(process, ProcessRef.from_json(document.get("monitor"))) if process else None


def write_prepared(folder: SandboxFolder, runtime: str, images: Mapping[str, Image]) -> None:
    found = {name: _image_json(image) for name, image in images.items()}
    write_json(folder.prepared, {"runtime": runtime, "boot": boot_id(), "images": found})


def begin(folder: SandboxFolder) -> None:
    """Notes that the sandbox process is about to be started, in this boot. Raises OSError."""
    document = read_json(folder.prepared) or {}
    if document.get("boot") != boot_id():
        write_json(folder.prepared, {**document, "boot": boot_id()})
    # A second name for the same file: a new one would be the dearer by an inode.
    with contextlib.suppress(FileExistsError):
        try:
            os.link(folder.prepared, folder.starting)
        except PermissionError:  # a file system without links
            folder.starting.touch()


def of_earlier_boot(folder: SandboxFolder) -> bool:
    """It was started, and the machine has been restarted since: its processes are gone, whatever pids say."""
    boot = (read_json(folder.starting) or {}).get("boot")
    return isinstance(boot, str) and boot != boot_id()


def read_runtime(folder: SandboxFolder) -> str:
    """The program; empty where it is not known."""
    return str((read_json(folder.prepared) or {}).get("runtime") or "")


def read_image(folder: SandboxFolder, container: str) -> Image | None:
    """What prepare found for a container; None where it has not been prepared, or that is damaged."""
    try:
        document = (read_json(folder.prepared) or {})["images"][container]
        config: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in document["config"].items()
        }
        return Image(document["digest"], Path(document["rootfs"]), ImageConfig(**config))
    except (KeyError, TypeError, AttributeError):
        return None


def note_kill(folder: SandboxFolder, number: int) -> None:
    """Which signal the sandbox process gets from us. A disk without room for that keeps no process alive."""
    with contextlib.suppress(OSError):
        write_json(folder.killed, {"signal": number})


def _image_json(image: Image) -> dict[str, Any]:
    config = {name: getattr(image.config, name) for name in ImageConfig.__slots__}
    config["labels"] = dict(config["labels"])
    return {"digest": image.digest, "rootfs": os.fspath(image.rootfs), "config": config}
