"""The shim's effects by name, and an engine and records that fail at them on command.

Used only where the settings name a failpoint or a trace (`sandkeeper.failpoints`); otherwise the engine and the
records are as they are.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path

from sandkeeper.failpoints import Effects, Note
from sandkeeper.shim.engines.base import (
    Engine,
    EngineError,
    ExecSession,
    ProcessExit,
    ProcessState,
    Progress,
    RuntimeInfo,
    UsageSample,
)
from sandkeeper.shim.records import Records, Saved
from sandkeeper.wire import node_pb2

EFFECTS: Mapping[str, str] = {
    "record_create": "a new sandbox is on disk",
    "record_save": "a change of its record is on disk",
    "record_remove": "its record is gone",
    "fence": "the highest instance of an owner is on disk",
    "prepare": "images, root file systems and cgroups are there",
    "start": "the sandbox process runs",
    "start_container": "a container runs",
    "kill": "a signal was sent",
    "pause": "all processes are frozen",
    "resume": "all processes are thawed",
    "remove": "processes, mounts, cgroups and folders are gone",
}
"""Everything that the shim changes outside itself, in the order of a sandbox's life."""

READS = ("inspect", "wait", "usage", "exec", "logs", "list", "collect")
"""What has no effect that must happen once, and can fail as well."""


def effects(failpoints: Mapping[str, str], trace: Path | None) -> Effects:
    """Raises ValueError, OSError; see Effects."""
    return Effects((*EFFECTS, *READS), failpoints, trace)


def _input_output_error(message: str) -> Exception:
    return OSError(errno.EIO, message)


def _engine_error(message: str) -> Exception:
    return EngineError("Failpoint", message, retryable=True)


class FaultyRecords(Records):
    """Fails with OSError, as a disk does."""

    def __init__(self, state_dir: Path, effects: Effects) -> None:
        super().__init__(state_dir)
        self._effects = effects

    def _at(self, name: str, subject: str) -> AbstractContextManager[Note]:
        return self._effects.at_once(name, subject, _input_output_error)

    def create(self, saved: Saved) -> None:
        with self._at("record_create", saved.record.sandbox_id):
            super().create(saved)

    def save(self, saved: Saved, *, sync: bool = False) -> None:
        with self._at("record_save", saved.record.sandbox_id):
            super().save(saved, sync=sync)

    def remove(self, sandbox_id: str) -> None:
        with self._at("record_remove", sandbox_id):
            super().remove(sandbox_id)

    def raise_fence(self, uid: str, instance: int) -> None:
        with self._at("fence", f"{uid}-{instance}"):
            super().raise_fence(uid, instance)


class FaultyEngine(Engine):
    """Another engine, with faults around its methods."""

    def __init__(self, inner: Engine, effects: Effects) -> None:
        self._inner = inner
        self._effects = effects
        self.name = inner.name  # type: ignore[misc]  # it passes for the other

    def _at(self, name: str, subject: str = "") -> AbstractAsyncContextManager[Note]:
        return self._effects.at(name, subject, _engine_error)

    async def open(self) -> None:
        await self._inner.open()

    async def close(self) -> None:
        await self._inner.close()

    def runtimes(self) -> tuple[RuntimeInfo, ...]:
        return self._inner.runtimes()

    def features(self) -> frozenset[str]:
        return self._inner.features()

    async def prepare(
        self, sandbox_id: str, config: node_pb2.SandboxConfig, progress: Progress
    ) -> Mapping[str, str]:
        async with self._at("prepare", sandbox_id):
            return await self._inner.prepare(sandbox_id, config, progress)

    async def start(self, sandbox_id: str, config: node_pb2.SandboxConfig) -> int:
        async with self._at("start", sandbox_id) as note:
            note["pid"] = pid = await self._inner.start(sandbox_id, config)
        return pid

    async def start_container(
        self, sandbox_id: str, config: node_pb2.SandboxConfig, container: str, attempt: int
    ) -> int:
        async with self._at("start_container", f"{sandbox_id}/{container}/{attempt}") as note:
            note["pid"] = pid = await self._inner.start_container(sandbox_id, config, container, attempt)
        return pid

    async def inspect(self, sandbox_id: str, container: str, attempt: int) -> ProcessState:
        async with self._at("inspect", sandbox_id):
            return await self._inner.inspect(sandbox_id, container, attempt)

    async def wait(self, sandbox_id: str, container: str, attempt: int) -> ProcessExit:
        async with self._at("wait", sandbox_id):
            return await self._inner.wait(sandbox_id, container, attempt)

    async def kill(self, sandbox_id: str, container: str, attempt: int, signal: int) -> None:
        async with self._at("kill", sandbox_id):
            await self._inner.kill(sandbox_id, container, attempt, signal)

    async def pause(self, sandbox_id: str) -> None:
        async with self._at("pause", sandbox_id):
            await self._inner.pause(sandbox_id)

    async def resume(self, sandbox_id: str) -> None:
        async with self._at("resume", sandbox_id):
            await self._inner.resume(sandbox_id)

    async def usage(self, sandbox_id: str) -> UsageSample | None:
        async with self._at("usage", sandbox_id):
            return await self._inner.usage(sandbox_id)

    async def exec(
        self,
        sandbox_id: str,
        container: str,
        attempt: int,
        command: list[str],
        *,
        tty: bool,
        stdin: bool,
        size: tuple[int, int] | None,
    ) -> ExecSession:
        async with self._at("exec", sandbox_id):
            return await self._inner.exec(
                sandbox_id, container, attempt, command, tty=tty, stdin=stdin, size=size
            )

    async def logs(
        self, sandbox_id: str, container: str, *, follow: bool, tail_lines: int, timestamps: bool
    ) -> AsyncIterator[bytes]:
        async with self._at("logs", sandbox_id):
            async for piece in self._inner.logs(
                sandbox_id, container, follow=follow, tail_lines=tail_lines, timestamps=timestamps
            ):
                yield piece

    async def remove(self, sandbox_id: str) -> None:
        async with self._at("remove", sandbox_id):
            await self._inner.remove(sandbox_id)

    async def list(self) -> frozenset[str]:
        async with self._at("list"):
            return await self._inner.list()

    async def collect(self, in_use: frozenset[str]) -> None:
        async with self._at("collect"):
            await self._inner.collect(in_use)
