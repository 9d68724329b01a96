"""One sandbox on this node: the states between Create and Shutdown, and who may move it from one to the next.

    PREPARING ──► CREATED ──start──► RUNNING ◄──pause/resume──► PAUSED ──► EXITED
         └──────► FAILED ◄──────────────┘                          (shutdown: gone)

Each step of its life is made under one lock. Nothing waits under it for a process to end, so a Stop with a
shorter grace overtakes one with a longer. After a kill of the shim, `recover` goes on from the record.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sandkeeper.shim import changes
from sandkeeper.shim.engines.base import SANDBOX_PROCESS, Engine, EngineError
from sandkeeper.shim.errors import NotReady, Refused, UnknownSandbox, Unsupported, WrongState
from sandkeeper.shim.kept import Kept
from sandkeeper.shim.podfiles import PodFiles
from sandkeeper.shim.records import Records, Saved
from sandkeeper.shim.restart import Backoff
from sandkeeper.shim.run import Run
from sandkeeper.shim.settings import ShimSettings
from sandkeeper.shim.tasks import Tasks
from sandkeeper.shim.taskservice import TaskServices
from sandkeeper.shim.watch import Journal
from sandkeeper.wire import node_pb2, types_pb2
from sandkeeper.wire.times import to_timestamp

log = logging.getLogger(__name__)

KILL_SECONDS = 20.0
"""How long a process may take to end after SIGKILL before Stop says so."""


@dataclass(frozen=True, slots=True)
class Node:
    """What all sandboxes of a node share. gone: called when one has been removed."""

    engine: Engine
    records: Records
    journal: Journal
    settings: ShimSettings
    starts: asyncio.Semaphore
    gone: Callable[[str], None]
    tasks: TaskServices
    pod_files: PodFiles


class Instance:
    """Any method may be called by any number of callers at once, and again after it failed."""

    def __init__(self, node: Node, saved: Saved, *, found: bool) -> None:
        """found: on disk, by a start of the shim."""
        self._node = node
        self._engine = node.engine
        self._kept = Kept(node.records, node.journal, saved, durable=found)
        self._step = asyncio.Lock()
        self._tasks = Tasks(saved.record.sandbox_id)
        # Prepared, or failed, or found to take a while: Create may answer.
        self._settled = asyncio.Event()
        # EXITED, FAILED or removed: Wait may answer.
        self._final = asyncio.Event()
        self._run = Run(self._kept, node.engine, node.settings, self._step, self._tasks, self._final)
        self._creation: asyncio.Task[None] | None = None
        self._preparation: asyncio.Task[None] | None = None
        self._removal: asyncio.Task[None] | None = None

    @property
    def record(self) -> node_pb2.SandboxRecord:
        """What Status says."""
        return self._kept.record

    @property
    def config(self) -> node_pb2.SandboxConfig:
        return self._kept.config

    @property
    def sandbox_id(self) -> str:
        return self._kept.sandbox_id

    @property
    def live(self) -> bool:
        return self._kept.live

    @property
    def removing(self) -> bool:
        """Shutdown has begun; nothing brings it back."""
        return self._kept.asked.removing

    # Create

    async def create(self) -> None:
        """Records it durably and prepares it; returns when it is CREATED or FAILED, or known to take a while.

        Raises OSError where it cannot be recorded: then nothing is left of it.
        """
        if self._creation is None:
            self._creation = asyncio.create_task(self._create())
        await asyncio.shield(self._creation)
        await self._settled.wait()

    @property
    def durable(self) -> bool:
        """A kill of the shim would not lose it: it may be told of."""
        return self._kept.durable

    async def recorded(self) -> None:
        """Returns when it is on disk. Raises OSError where it cannot be recorded, and so will never be."""
        if self._creation is not None:
            await asyncio.shield(self._creation)

    async def prepared(self) -> None:
        """Returns when it is CREATED, or FAILED, or further."""
        if self._preparation is not None:
            await asyncio.wait([self._preparation])

    async def _create(self) -> None:
        # Side by side: what is prepared without a record is cleared away by the next start of the shim.
        self._preparation = self._tasks.spawn(self._prepare())
        try:
            await self._kept.create()
        except OSError:
            self._kept.asked.removing = True
            await self._tasks.cancel()
            await self._engine.remove(self.sandbox_id)
            self._node.records.remove(self.sandbox_id)
            self._node.gone(self.sandbox_id)
            raise

    async def _prepare(self) -> None:
        backoff = Backoff(self._node.settings.pull_backoff, self._node.settings.pull_backoff_max)
        attempt = 0
        while True:
            try:
                digests = await self._engine.prepare(self.sandbox_id, self.config, self._progress)
                break
            except EngineError as error:
                if not error.retryable:
                    await self._kept.insist(changes.failed(error), sync=True)
                    self._failed(error)
                    return
                wait = backoff.wait(attempt)
                await self._kept.insist(changes.waiting(error, wait, first=attempt == 0))
                self._settled.set()
                await asyncio.sleep(wait)
            attempt += 1
        await self._kept.insist(changes.prepared(digests))
        self._settled.set()

    def _progress(self, container: str, reason: str, message: str) -> None:
        if self.record.state == node_pb2.STATE_PREPARING:
            self._kept.tell(changes.progress(container, reason, message))
            self._settled.set()

    async def _fail(self, error: EngineError) -> None:
        await self._kept.update(changes.failed(error), sync=True)
        self._failed(error)

    def _failed(self, error: EngineError) -> None:
        self._settled.set()
        self._final.set()
        log.info("sandbox failed", extra={"sandbox": self.sandbox_id, "reason": error.reason})

    # Start

    async def start(self) -> int:
        """Returns the sandbox process's pid. Raises NotReady while it is prepared, WrongState where it has run
        already or can never run."""
        async with self._step:
            match self.record.state:
                case node_pb2.STATE_RUNNING | node_pb2.STATE_PAUSED:
                    return self.record.pid
                case node_pb2.STATE_PREPARING:
                    raise NotReady(f"sandbox {self.sandbox_id!r} is being prepared: {self.record.reason}")
                case node_pb2.STATE_FAILED:
                    raise WrongState(f"{self.record.reason}: {self.record.message}")
                case node_pb2.STATE_EXITED:
                    raise WrongState(f"sandbox {self.sandbox_id!r} has exited; an instance runs once")
            if self.removing:
                raise NotReady(f"sandbox {self.sandbox_id!r} is being shut down")
            async with self._node.starts:
                return await self._start()

    async def _start(self) -> int:
        try:
            await self._start_task_service()
            pid = await self._engine.start(self.sandbox_id, self.config)
        except EngineError as error:
            if error.retryable:
                raise NotReady(f"{error.reason}: {error.message}") from error
            await self._fail(error)
            # containerd's CRI asks for no Shutdown after a Start that failed.
            await self._quietly(self._node.tasks.end(self.sandbox_id))
            raise WrongState(f"{error.reason}: {error.message}") from error
        names = [container.name for container in self.config.containers]
        outcomes = await asyncio.gather(
            *(self._engine.start_container(self.sandbox_id, self.config, name, 0) for name in names),
            return_exceptions=True,
        )
        pids: dict[str, int] = {}
        errors: dict[str, EngineError] = {}
        for name, outcome in zip(names, outcomes, strict=True):
            if isinstance(outcome, int):
                pids[name] = outcome
            elif isinstance(outcome, EngineError):
                errors[name] = outcome
            else:
                raise outcome
        running = changes.running(pid, pids)
        if errors and all(error.passes for error in errors.values()):
            # The same call again finds what was started, and starts the rest.
            first = next(iter(errors.values()))
            raise NotReady(f"{first.reason}: {first.message}")
        if errors:
            raise await self._start_failed(running, list(pids), errors)
        await self._kept.update(running)
        self._run.follow()
        self._tasks.spawn(self._end_with_task_service())
        return pid

    async def _start_task_service(self) -> None:
        if self._node.tasks.wanted(self.config):
            self._node.pod_files.write(self.config)
            process = await self._node.tasks.start(self.sandbox_id, self.config.containerd)
            await self._engine.adopt(process.pid)

    async def _end_with_task_service(self) -> None:
        """Without it nothing can be run in the sandbox any more: its end tells containerd's client to make another."""
        if self._node.tasks.wanted(self.config):
            await self._node.tasks.ended(self.sandbox_id)
            if self.live and not self.removing:
                log.warning("task service ended", extra={"sandbox": self.sandbox_id})
                await self._quietly(self._engine.kill(self.sandbox_id, SANDBOX_PROCESS, 0, signal.SIGKILL))

    async def _start_failed(
        self, running: changes.Change, started: list[str], errors: dict[str, EngineError]
    ) -> Refused:
        """Ends what was started beside a container that was not: a sandbox runs whole or not at all."""
        for name in started:
            await self._engine.kill(self.sandbox_id, name, 0, signal.SIGKILL)
        exits = {name: changes.start_error(name, error) for name, error in errors.items()}
        first = next(iter(exits.values()))
        for name in started:
            exits[name] = changes.exit_of(await self._engine.wait(self.sandbox_id, name, 0))

        def ended(record: node_pb2.SandboxRecord) -> None:
            running(record)
            for container in record.containers:
                changes.container_exits(container, exits[container.name])

        await self._run.conclude(ended, first)
        return WrongState(f"{first.reason}: {first.message}")

    # Wait, Stop, Shutdown, Pause, Resume

    async def wait(self) -> node_pb2.Exit:
        """The exit, once there is one. Raises WrongState where there will be none, UnknownSandbox once removed."""
        await self._final.wait()
        if self.record.state == node_pb2.STATE_EXITED:
            return self.record.exit
        if self.record.state == node_pb2.STATE_FAILED:
            raise WrongState(f"{self.record.reason}: {self.record.message}")
        raise UnknownSandbox(self.sandbox_id)

    async def stop(self, grace: float) -> None:
        """SIGTERM, after `grace` seconds SIGKILL; returns when all has ended. Nothing is restarted from here on.

        What never ran is left alone. Raises NotReady where a process does not end even then.
        """
        async with self._step:
            if not self.live:
                return
            if not self._kept.asked.stop_at:
                self._kept.asked.stop_at = time.time()
                self._kept.asked.ended = changes.ended(self.record)
                await self._kept.update(changes.unchanged)
            await self._run.send(signal.SIGTERM if grace > 0 else signal.SIGKILL)
        if await self._ends_within(grace):
            return
        async with self._step:
            if self.live:
                await self._run.send(signal.SIGKILL)
        if not await self._ends_within(KILL_SECONDS):
            raise NotReady(f"sandbox {self.sandbox_id!r} has not ended {KILL_SECONDS:g} s after SIGKILL")

    async def _ends_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._final.wait()
        except TimeoutError:
            return False
        return True

    async def shutdown(self) -> None:
        """Stops it if it runs, and leaves nothing of it. Raises EngineError, NotReady or OSError where something
        does not go away."""
        if self._removal is None or (self._removal.done() and not self._kept.forgotten):
            self._removal = asyncio.create_task(self._remove())
        await asyncio.shield(self._removal)

    async def _remove(self) -> None:
        if self._creation is not None:
            await asyncio.wait([self._creation])
        if not self.removing:
            self._kept.asked.removing = True
            with contextlib.suppress(OSError):  # a full disk must not keep what would free it
                await self._kept.update(changes.unchanged)
        if self._preparation is not None:
            self._preparation.cancel()
            await self.prepared()
        await self.stop(float(self.config.termination_grace_period_seconds))
        async with self._step:
            await self._tasks.cancel()
            await self._node.tasks.end(self.sandbox_id)
            self._node.pod_files.remove(self.config)
            await self._engine.remove(self.sandbox_id)
            await self._kept.forget()
        self._node.gone(self.sandbox_id)
        self._settled.set()
        self._final.set()

    async def pause(self) -> None:
        """Freezes all processes. Raises WrongState where none run, Unsupported where the engine cannot."""
        async with self._step:
            self._must_run("paused")
            if self.record.state == node_pb2.STATE_RUNNING:
                await self._run.freeze()

    async def resume(self) -> None:
        """Thaws them. Raises as `pause`."""
        async with self._step:
            self._must_run("resumed")
            if self.record.state == node_pb2.STATE_PAUSED:
                await self._run.thaw()

    def _must_run(self, what: str) -> None:
        if "Pause" not in self._engine.features():
            raise Unsupported(f"the {self._engine.name} engine cannot pause")
        if not self.live:
            state = node_pb2.State.Name(self.record.state).removeprefix("STATE_")
            raise WrongState(f"sandbox {self.sandbox_id!r} is {state} and cannot be {what}")

    # Looking into it

    def container(self, name: str) -> node_pb2.ContainerRecord:
        """A container by name; empty: the only one, or the first. Raises UnknownSandbox."""
        for container in self.record.containers:
            if not name or container.name == name:
                return container
        raise UnknownSandbox(self.sandbox_id, container=name)

    def running_container(self, name: str) -> node_pb2.ContainerRecord:
        """As `container`; raises WrongState where it does not run."""
        container = self.container(name)
        if not self.live or container.state != node_pb2.CONTAINER_STATE_RUNNING:
            raise WrongState(f"container {container.name!r} does not run")
        return container

    async def metrics(self) -> types_pb2.Metric:
        """A fresh sample: a Usage, taken into the record too; or as a sandboxer says it, in a type of its own, where
        nobody else knows. Raises WrongState where nothing runs."""
        found = await self._engine.usage(self.sandbox_id) if self.live else None
        if found is None or not self.live:
            raise WrongState(f"sandbox {self.sandbox_id!r} does not run")
        metric = types_pb2.Metric(id=self.sandbox_id, timestamp=to_timestamp(datetime.now(UTC)))
        if found.foreign is not None:
            metric.data.CopyFrom(found.foreign)
            return metric
        sample = node_pb2.Usage(
            cpu_usage_usec=found.cpu_usage_usec,
            memory_bytes=found.memory_bytes,
            pids=found.pids,
            sampled_at=metric.timestamp,
        )
        self._kept.tell(lambda record: record.usage.CopyFrom(sample))
        metric.data.Pack(sample)
        return metric

    # After a restart of the shim

    async def recover(self) -> None:
        """Goes on from the record: what was asked for is carried through, what ended meanwhile is found."""
        if self.record.state != node_pb2.STATE_PREPARING:
            self._settled.set()
        if self.record.state in (node_pb2.STATE_EXITED, node_pb2.STATE_FAILED):
            self._final.set()
        self._creation = asyncio.create_task(_nothing())
        if self.live:
            async with self._step:
                await self._run.find_ends()
            if self.live:
                self._run.follow()
                self._tasks.spawn(self._end_with_task_service())
        grace = float(self.config.termination_grace_period_seconds)
        if self.removing:
            self._tasks.spawn(self._quietly(self.shutdown()))
        elif self.live and self._kept.asked.stop_at:
            self._tasks.spawn(self._quietly(self.stop(grace)))
        elif self.record.state == node_pb2.STATE_PREPARING:
            self._preparation = self._tasks.spawn(self._prepare())
        elif self.record.state == node_pb2.STATE_CREATED:
            # Cut off between two processes of a Start? Its caller will ask again, or Shutdown.
            if (await self._engine.inspect(self.sandbox_id, SANDBOX_PROCESS, 0)).started:
                self._tasks.spawn(self._quietly(self.start()))
        elif self.record.state == node_pb2.STATE_EXITED:
            self._tasks.spawn(self._run.end_sandbox_process())

    async def _quietly(self, work: Coroutine[Any, Any, object]) -> None:
        try:
            await work
        except (EngineError, Refused, OSError) as error:
            log.warning("not carried through yet", extra={"sandbox": self.sandbox_id, "error": str(error)})

    async def close(self) -> None:
        """Stops looking; what runs runs on."""
        await self._tasks.cancel()


async def _nothing() -> None:
    return None
