"""All sandboxes of a node: who owns which id, what a restart finds, what is done now and then for all of them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from sandkeeper.shim import changes
from sandkeeper.shim.engines.base import Engine, EngineError
from sandkeeper.shim.errors import BadRequest, Full, NotReady, Taken, UnknownSandbox, WrongState
from sandkeeper.shim.instance import Instance, Node
from sandkeeper.shim.podfiles import PodFiles
from sandkeeper.shim.records import Asked, Records, Saved
from sandkeeper.shim.settings import ShimSettings
from sandkeeper.shim.tasks import Tasks
from sandkeeper.shim.taskservice import TaskServices
from sandkeeper.shim.watch import Journal
from sandkeeper.wire import node_pb2
from sandkeeper.wire.ids import OwnerKey, valid_id

log = logging.getLogger(__name__)

MAX_CONTAINERS = 16


class Keeper:
    def __init__(self, settings: ShimSettings, engine: Engine, records: Records | None = None) -> None:
        self.settings = settings
        self.engine = engine
        self.journal = Journal()
        self._records = records or Records(settings.state_dir)
        self._sandboxes: dict[str, Instance] = {}
        self._owned: dict[str, set[str]] = {}  # by owner UID
        self._tasks = Tasks("node")
        self._node = Node(
            engine=engine,
            records=self._records,
            journal=self.journal,
            settings=settings,
            starts=asyncio.Semaphore(settings.concurrent_starts),
            gone=self._gone,
            tasks=TaskServices(settings.run_dir, settings.sandboxer),
            pod_files=PodFiles(settings.sandboxer),
        )
        self._lock = -1

    @property
    def task_services(self) -> TaskServices:
        return self._node.tasks

    # The node's life

    async def open(self) -> None:
        """Finds every sandbox again. Raises EngineError or OSError where the node cannot be served, with
        BlockingIOError for another shim on the same state_dir."""
        self.settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self.settings.state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._records.open()
        await self.engine.open()
        for sandbox_id, saved in self._records.load():
            if saved is None:
                # Create was cut off before it was answered, and nobody relies on it; or its files are damaged,
                # and nobody can say any more what it is. What the engine has of it goes below.
                log.warning("half-made or damaged sandbox removed", extra={"sandbox": sandbox_id})
                self._records.discard(sandbox_id)
            else:
                self._put(Instance(self._node, saved, found=True))
        for leftover in await self.engine.list() - self._sandboxes.keys():
            log.warning("leftover without a record removed", extra={"sandbox": leftover})
            await self.engine.remove(leftover)
        for leftover in self._node.tasks.list() - self._sandboxes.keys():
            await self._node.tasks.end(leftover)
        # A copy: a Shutdown that had been cut off may end meanwhile.
        for instance in tuple(self._sandboxes.values()):
            await instance.recover()
        self._tasks.spawn(self._regularly(self.settings.usage_interval, self._sample))
        self._tasks.spawn(self._regularly(self.settings.collect_interval, self._collect))
        self._tasks.spawn(self._regularly(self.settings.collect_interval, self._remove_forgotten))

    async def close(self) -> None:
        """Lets go of everything; sandboxes run on."""
        self.journal.close()
        await self._tasks.cancel()
        for instance in tuple(self._sandboxes.values()):
            await instance.close()
        await self.engine.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # Sandboxes

    def all(self) -> tuple[Instance, ...]:
        """Every one that is on disk."""
        return tuple(each for each in self._sandboxes.values() if each.durable)

    def get(self, sandbox_id: str, owner: OwnerKey | None) -> Instance:
        """The sandbox that a call means. Raises UnknownSandbox; WrongState where it is another owner's."""
        instance = self._sandboxes.get(sandbox_id)
        if instance is None:
            raise UnknownSandbox(sandbox_id)
        recorded = instance.record.owner
        if owner is not None and (owner.uid, owner.instance) != (recorded.uid, recorded.instance):
            raise WrongState(
                f"sandbox {sandbox_id!r} belongs to instance {recorded.instance} of {recorded.uid!r}, "
                f"not to instance {owner.instance} of {owner.uid!r}"
            )
        return instance

    async def create(
        self, sandbox_id: str, config: node_pb2.SandboxConfig | None, owner: OwnerKey | None
    ) -> Instance:
        """Makes a sandbox, or finds it made. config: None, or without containers: a sandbox process alone.

        Raises BadRequest, Taken (another digest), WrongState (an older instance), NotReady, Full, OSError.
        """
        if not valid_id(sandbox_id):
            raise BadRequest(
                "sandbox_id must be letters and digits with single `.`, `_` or `-` between, at most 76"
            )
        config = config or node_pb2.SandboxConfig()
        _check(sandbox_id, config, owner)
        instance = self._sandboxes.get(sandbox_id)
        if instance is None:
            self._admit(owner)
            record = changes.new_record(sandbox_id, config, datetime.now(UTC))
            instance = Instance(self._node, Saved(config, record, Asked()), found=False)
            self._put(instance)
        elif instance.record.digest != config.digest or instance.record.owner != config.owner:
            raise Taken(f"sandbox {sandbox_id!r} exists with another digest or owner")
        elif instance.removing:
            raise NotReady(f"sandbox {sandbox_id!r} is being shut down")
        await instance.create()
        if not config.containers:  # there is nothing to fetch for it, and containerd asks no second time
            await instance.prepared()
        return instance

    def _admit(self, owner: OwnerKey | None) -> None:
        """Raises WrongState for an instance that a later one has replaced, NotReady while an earlier one is
        still here, Full."""
        if owner is not None:
            kept = [self._sandboxes[each].record.owner.instance for each in self._owned.get(owner.uid, ())]
            highest = max([self._records.fence(owner.uid), *kept])
            if owner.instance < highest:
                raise WrongState(f"instance {owner.instance} is older than {highest}, which was seen already")
            if kept:
                raise NotReady(f"instance {max(kept)} of the same owner has not been shut down")
        if len(self._sandboxes) >= self.settings.sandboxes:
            raise Full(f"the node takes {self.settings.sandboxes} sandboxes at most")

    def _put(self, instance: Instance) -> None:
        self._sandboxes[instance.sandbox_id] = instance
        self._owned.setdefault(instance.record.owner.uid, set()).add(instance.sandbox_id)

    def _gone(self, sandbox_id: str) -> None:
        instance = self._sandboxes.pop(sandbox_id, None)
        if instance is None:
            return
        uid = instance.record.owner.uid
        self._owned[uid].discard(sandbox_id)
        if not self._owned[uid]:
            del self._owned[uid]

    # Now and then

    async def _regularly(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except (EngineError, OSError) as error:
                log.warning("not done this time", extra={"work": work.__name__, "error": str(error)})

    async def _sample(self) -> None:
        for instance in self.all():
            if instance.live:
                with contextlib.suppress(WrongState):  # it has just ended
                    await instance.metrics()
            await asyncio.sleep(0)

    async def _collect(self) -> None:
        used = {c.image_id for i in self.all() for c in i.record.containers if c.image_id}
        if any(i.record.state == node_pb2.STATE_PREPARING for i in self._sandboxes.values()):
            return  # what it fetches is not in any record yet
        await self.engine.collect(frozenset(used))

    async def _remove_forgotten(self) -> None:
        """Pods that never ran: CRI starts one as soon as it is made, and where that fails it asks for no Shutdown."""
        oldest = datetime.now(UTC).timestamp() - self.settings.sandboxer.forgotten_after
        for instance in self.all():
            never_ran = instance.record.state in (node_pb2.STATE_CREATED, node_pb2.STATE_FAILED)
            if instance.config.containerd.pod and never_ran and instance.record.created_at.seconds < oldest:
                log.warning("pod that never ran removed", extra={"sandbox": instance.sandbox_id})
                with contextlib.suppress(NotReady):
                    await instance.shutdown()


def _check(sandbox_id: str, config: node_pb2.SandboxConfig, owner: OwnerKey | None) -> None:
    """What can be said without the engine. Raises BadRequest that names the field."""
    if owner is not None:
        if not valid_id(owner.uid):
            raise BadRequest("owner.uid must be an identifier")
        if owner.instance < 1:
            raise BadRequest("owner.instance must be at least 1")
        if (config.owner.uid, config.owner.instance) != (owner.uid, owner.instance):
            raise BadRequest("owner: the configuration's must be the one in the call's metadata")
        if sandbox_id != owner.sandbox_id:
            raise BadRequest(f"sandbox_id must be {owner.sandbox_id!r}, made of the owner's UID and instance")
    if len(config.containers) > MAX_CONTAINERS:
        raise BadRequest(f"containers: must be at most {MAX_CONTAINERS}")
    for field, names in (
        ("containers", [each.name for each in config.containers]),
        ("volumes", [each.name for each in config.volumes]),
    ):
        for name in names:
            if not valid_id(name):
                raise BadRequest(f"{field}[].name: {name!r} must be an identifier")
        if len(set(names)) != len(names):
            raise BadRequest(f"{field}[].name must be unique")
