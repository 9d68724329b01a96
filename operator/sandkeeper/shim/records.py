"""What a shim knows, on disk: one folder per sandbox, each file replaced as a whole.

    STATE/sandboxes/ID/config.json   what Create asked for (0600: it holds environment values)
    STATE/sandboxes/ID/record.json   what has become of it, and what was asked of the shim since
    STATE/fences/UID                 the highest instance seen of an owner

A write is a new file, then a rename: a kill at any point leaves the old or the new one. What must outlive a power
cut (a new sandbox, an exit, a fence) is fsynced too; what only tells of processes that a power cut ends is not.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from google.protobuf import json_format

from sandkeeper.wire import node_pb2
from sandkeeper.wire.ids import fence_of, valid_id

_HALF = "~"
"""Ends the names of files that are being written; no identifier has it."""

_NO_FILE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP))
"""What is there is no file, and never will be one. Any other error may pass, and says nothing of the sandbox."""

FENCE_SECONDS = 24 * 3600
"""How long a fence outlives its sandbox: far longer than any call can be under way."""


@dataclass(slots=True)
class Asked:
    """What was asked of the shim and must be carried through after a restart."""

    # Unix time of the first Stop; 0 for none.
    stop_at: float = 0.0
    # Which containers had ended before it, by themselves.
    ended: tuple[str, ...] = ()
    # Shutdown has begun: nothing may bring the sandbox back.
    removing: bool = False
    # Paths of cgroups and the like are the engine's; this is only for people who read the file.
    version: int = 1


@dataclass(slots=True)
class Saved:
    """One sandbox as it is on disk."""

    config: node_pb2.SandboxConfig
    record: node_pb2.SandboxRecord
    asked: Asked = field(default_factory=Asked)


class Records:
    """All of them. Methods block on the disk; ids are checked before they become file names."""

    def __init__(self, state_dir: Path) -> None:
        self._sandboxes = state_dir / "sandboxes"
        self._fences = state_dir / "fences"

    def open(self) -> None:
        """Makes the folders and drops what half-written files there are. Raises OSError."""
        for folder in (self._sandboxes, self._fences):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self._fences, *self._sandboxes.iterdir()):
            for left in folder.glob(f"*{_HALF}"):
                left.unlink(missing_ok=True)
        self._forget_fences()

    def create(self, saved: Saved) -> None:
        """Writes a new sandbox durably."""
        folder = self._folder(saved.record.sandbox_id)
        folder.mkdir(mode=0o700, exist_ok=True)
        _write(folder / "config.json", _dump(saved.config), sync=True)
        self.save(saved, sync=True)  # and with it the folder that both are in
        _sync_folder(self._sandboxes)

    def save(self, saved: Saved, *, sync: bool = False) -> None:
        """Writes what has become of a sandbox. sync: must outlive a power cut."""
        record = json_format.MessageToDict(saved.record)
        text = json.dumps({"record": record, "asked": asdict(saved.asked)}, separators=(",", ":"))
        _replace(self._folder(saved.record.sandbox_id) / "record.json", text.encode(), sync=sync)

    def remove(self, sandbox_id: str) -> None:
        """Forgets a sandbox; one that is not there is no error."""
        folder = self._folder(sandbox_id)
        with contextlib.suppress(FileNotFoundError):
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)
            else:
                folder.unlink()

    def discard(self, sandbox_id: str) -> None:
        """Forgets one that cannot be made sense of. Its id alone tells which instance must not come again."""
        uid, instance = fence_of(sandbox_id)
        with contextlib.suppress(OSError):  # a full disk must not keep what would free it
            if instance > self.fence(uid):
                self.raise_fence(uid, instance)
        self.remove(sandbox_id)

    def load(self) -> Iterator[tuple[str, Saved | None]]:
        """(id, sandbox) of all; None where its files cannot be made sense of. Raises OSError where the disk
        does not say what is in them."""
        for folder in sorted(self._sandboxes.iterdir()):
            if valid_id(folder.name):
                yield folder.name, _load(folder)

    # Fences

    def fence(self, uid: str) -> int:
        """The highest instance seen of an owner, 0 for none."""
        if not valid_id(uid):
            return 0
        try:
            return int((self._fences / uid).read_text())
        except (OSError, ValueError):
            return 0

    def raise_fence(self, uid: str, instance: int) -> None:
        """Notes an instance durably; lower ones are refused from now on."""
        if not valid_id(uid):
            raise ValueError("owner.uid must be an identifier")
        _replace(self._fences / uid, str(instance).encode(), sync=True)

    def _forget_fences(self) -> None:
        oldest = time.time() - FENCE_SECONDS
        owners = {saved.record.owner.uid for _, saved in self.load() if saved is not None}
        for mark in self._fences.iterdir():
            if mark.is_dir():
                shutil.rmtree(mark)  # none of ours, and in the way of one
            elif mark.name not in owners and mark.stat().st_mtime < oldest:
                mark.unlink(missing_ok=True)

    def _folder(self, sandbox_id: str) -> Path:
        if not valid_id(sandbox_id):
            raise ValueError(f"sandbox_id {sandbox_id!r} must be an identifier")
        return self._sandboxes / sandbox_id


def _load(folder: Path) -> Saved | None:
    try:
        config = json_format.Parse(
            (folder / "config.json").read_bytes(), node_pb2.SandboxConfig(), ignore_unknown_fields=True
        )
        raw = json.loads((folder / "record.json").read_bytes())
        record = json_format.ParseDict(raw["record"], node_pb2.SandboxRecord(), ignore_unknown_fields=True)
        asked = Asked(
            stop_at=float(raw["asked"]["stop_at"]),
            ended=tuple(str(name) for name in raw["asked"].get("ended", ())),
            removing=bool(raw["asked"]["removing"]),
        )
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        json_format.ParseError,
        RecursionError,
    ):
        return None
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise
    saved = Saved(config, record, asked)
    return saved if record.sandbox_id == folder.name and _consistent(saved) else None


def _consistent(saved: Saved) -> bool:
    """Both files are of one sandbox, and say of it what every one has."""
    config, record = saved.config, saved.record
    return (
        record.state in node_pb2.State.values()
        and record.state != node_pb2.STATE_UNSPECIFIED
        and record.owner == config.owner
        and record.digest == config.digest
        and [each.name for each in record.containers] == [each.name for each in config.containers]
        and record.HasField("exit") == (record.state == node_pb2.STATE_EXITED)
        and math.isfinite(saved.asked.stop_at)
    )


def _dump(message: node_pb2.SandboxConfig) -> bytes:
    return json_format.MessageToJson(message, indent=None).encode()


def _replace(path: Path, data: bytes, *, sync: bool) -> None:
    _write(path, data, sync=sync)
    if sync:
        _sync_folder(path.parent)


def _write(path: Path, data: bytes, *, sync: bool) -> None:
    """As `_replace`, but for the name: that is on disk when the folder is."""
    fresh = path.with_name(f"{path.name}{_HALF}")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
        if sync:
            os.fdatasync(handle)
    finally:
        os.close(handle)
    os.replace(fresh, path)  # noqa: PTH105 - on the hot path


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
