"""What runs between Start and the end: each container waited for, started again by restartPolicy, and the
sandbox's own end concluded from theirs."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from sandkeeper.shim import changes
from sandkeeper.shim.engines.base import SANDBOX_PROCESS, Engine, EngineError, ProcessExit
from sandkeeper.shim.kept import RETRY_SECONDS, Kept
from sandkeeper.shim.restart import Backoff, ended_for_good, restarts, sandbox_exit
from sandkeeper.shim.settings import ShimSettings
from sandkeeper.shim.tasks import Tasks
from sandkeeper.wire import node_pb2

log = logging.getLogger(__name__)


class Run:
    """One run of a sandbox. step: held for each step of its life; methods marked so want it held by the caller.

    final: set when the sandbox has ended for good.
    """

    def __init__(
        self,
        kept: Kept,
        engine: Engine,
        settings: ShimSettings,
        step: asyncio.Lock,
        tasks: Tasks,
        final: asyncio.Event,
    ) -> None:
        self._kept = kept
        self._engine = engine
        self._settings = settings
        self._step = step
        self._tasks = tasks
        self._final = final
        self._thawed = asyncio.Event()
        self._lost: node_pb2.Exit | None = None
        self._crashes: dict[str, int] = {}

    def follow(self) -> None:
        """Waits for the ends of all that the record says runs."""
        if self._kept.record.state == node_pb2.STATE_RUNNING:
            self._thawed.set()
        self._tasks.spawn(self._follow_sandbox())
        for container in self._kept.record.containers:
            if container.state == node_pb2.CONTAINER_STATE_RUNNING:
                self._tasks.spawn(self._follow_container(container.name, container.restart_count))
            elif container.state == node_pb2.CONTAINER_STATE_WAITING:
                wait = self._settings.restart_backoff
                self._tasks.spawn(self._restart(container.name, container.restart_count + 1, wait))

    async def find_ends(self) -> None:
        """After a restart of the shim: what ended meanwhile. Containers before the sandbox process, since the
        exit of one that ended by itself says more than that all is gone. Step held."""
        for container in self._kept.record.containers:
            if container.state == node_pb2.CONTAINER_STATE_RUNNING:
                name, attempt = container.name, container.restart_count
                found = await self._engine.inspect(self._kept.sandbox_id, name, attempt)
                if found.exit is not None:
                    await self._container_ended(name, attempt, changes.exit_of(found.exit), follow=False)

    async def send(self, number: int) -> None:
        """A signal to every container that runs, frozen ones thawed; those that wait for their restart have
        ended now. Step held."""
        kept = self._kept
        if not kept.config.containers:
            await self._engine.kill(kept.sandbox_id, SANDBOX_PROCESS, 0, number)
        for container in kept.record.containers:
            if container.state == node_pb2.CONTAINER_STATE_RUNNING:
                await self._engine.kill(kept.sandbox_id, container.name, container.restart_count, number)
        if kept.record.state == node_pb2.STATE_PAUSED:
            await self.thaw()
        if ended_for_good(changes.changed(kept.record, changes.no_more_restarts).containers):
            await self.conclude(changes.no_more_restarts)
        else:
            await kept.update(changes.no_more_restarts)

    async def freeze(self) -> None:
        """Step held."""
        self._thawed.clear()
        await self._engine.pause(self._kept.sandbox_id)
        await self._kept.update(changes.state(node_pb2.STATE_PAUSED))

    async def thaw(self) -> None:
        """Step held."""
        await self._engine.resume(self._kept.sandbox_id)
        await self._kept.update(changes.state(node_pb2.STATE_RUNNING))
        self._thawed.set()

    async def conclude(self, change: changes.Change, ended: node_pb2.Exit | None = None) -> None:
        """The sandbox has ended for good. The sandbox process is ended when, and only when, that is on disk:
        until then it shows that the containers' exits are theirs. Step held."""
        asked = self._kept.asked

        def conclusion(record: node_pb2.SandboxRecord) -> None:
            change(record)
            if self._lost is not None and not asked.stop_at:
                changes.exited(record, self._lost)
            else:
                changes.exited(record, ended or sandbox_exit(record.containers, asked.stop_at, asked.ended))

        await self._kept.update(conclusion, sync=True)
        self._final.set()
        self._tasks.spawn(self.end_sandbox_process())

    async def end_sandbox_process(self) -> None:
        try:
            await self._engine.kill(self._kept.sandbox_id, SANDBOX_PROCESS, 0, signal.SIGKILL)
        except EngineError as error:
            log.warning(
                "sandbox process not ended", extra={"sandbox": self._kept.sandbox_id, "error": str(error)}
            )

    # The ends

    async def _follow_container(self, name: str, attempt: int) -> None:
        ended = await self._end_of(name, attempt)
        await self._surely(lambda: self._container_ended(name, attempt, ended))

    async def _follow_sandbox(self) -> None:
        ended = await self._end_of(SANDBOX_PROCESS, 0)
        await self._surely(lambda: self._sandbox_ended(ended))

    async def _sandbox_ended(self, ended: node_pb2.Exit) -> bool:
        if not self._kept.live:
            return True
        if self._kept.config.containers:
            self._lost = ended
            await self.send(signal.SIGKILL)
            return True
        if self._kept.asked.stop_at:
            ended.reason = "Stopped"
        await self.conclude(changes.unchanged, ended)
        return True

    async def _end_of(self, name: str, attempt: int) -> node_pb2.Exit:
        try:
            ended = await self._engine.wait(self._kept.sandbox_id, name, attempt)
        except EngineError as error:
            ended = ProcessExit(255, 0, datetime.now(UTC), "SandboxLost", error.message)
        return changes.exit_of(ended)

    async def _container_ended(
        self, name: str, attempt: int, ended: node_pb2.Exit, *, follow: bool = True
    ) -> bool:
        if not self._kept.live or self._container(name).restart_count != attempt:
            return True
        over = self._kept.asked.stop_at or self._lost is not None
        again = not over and restarts(self._kept.config.restart_policy, ended.status)
        wait = self._next_wait(name, attempt, ended) if again else None
        change = changes.container_ended(name, ended, again_after=wait)
        if ended_for_good(changes.changed(self._kept.record, change).containers):
            await self.conclude(change)
            return True
        await self._kept.update(change, sync=not again)
        if wait is not None and follow:
            self._tasks.spawn(self._restart(name, attempt + 1, wait))
        return True

    # Restarts

    def _next_wait(self, name: str, attempt: int, ended: node_pb2.Exit) -> float:
        """Seconds until a container is started again: more each time, the first again after a long run."""
        settings, since = self._settings, self._container(name).started_at
        ran = (ended.exited_at.ToNanoseconds() - since.ToNanoseconds()) / 1e9
        crashes = 0 if ran >= settings.restart_reset else self._crashes.get(name, attempt)
        self._crashes[name] = crashes + 1
        return Backoff(settings.restart_backoff, settings.restart_backoff_max).wait(crashes)

    async def _restart(self, name: str, attempt: int, wait: float) -> None:
        await asyncio.sleep(wait)
        while not await self._surely(lambda: self._start_again(name, attempt)):
            await self._thawed.wait()

    async def _start_again(self, name: str, attempt: int) -> bool:
        """False while the sandbox is paused."""
        kept = self._kept
        if not kept.live or kept.asked.stop_at or self._lost is not None:
            return True
        if kept.record.state == node_pb2.STATE_PAUSED:
            return False
        try:
            pid = await self._engine.start_container(kept.sandbox_id, kept.config, name, attempt)
        except EngineError as error:
            if error.passes:
                raise
            await kept.update(changes.restarted(name, 0, attempt))
            return await self._container_ended(name, attempt, changes.start_error(name, error))
        await kept.update(changes.restarted(name, pid, attempt))
        self._tasks.spawn(self._follow_container(name, attempt))
        return True

    # Parts

    def _container(self, name: str) -> node_pb2.ContainerRecord:
        return changes.container_of(self._kept.record, name)

    async def _surely(self, step: Callable[[], Coroutine[Any, Any, bool]]) -> bool:
        """A step that must not be lost because a disk is full for a while: repeated until it is made."""
        while True:
            async with self._step:
                try:
                    return await step()
                except (OSError, EngineError) as error:
                    log.error("tried again", extra={"sandbox": self._kept.sandbox_id, "error": str(error)})
            await asyncio.sleep(RETRY_SECONDS)
