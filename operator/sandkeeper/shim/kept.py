"""One sandbox's record: changed in one place, on disk before anybody is told."""

from __future__ import annotations

import asyncio
import logging

from sandkeeper.shim import changes
from sandkeeper.shim.records import Asked, Records, Saved
from sandkeeper.shim.watch import Journal
from sandkeeper.wire import node_pb2

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
"""Between attempts to note what must not be lost, such as an exit while the disk is full."""


class Kept:
    """`record` is replaced as a whole, never changed in place: whoever holds one may keep it."""

    def __init__(self, records: Records, journal: Journal, saved: Saved, *, durable: bool) -> None:
        """durable: it is on disk already."""
        self.config = saved.config
        self.record = saved.record
        self.asked: Asked = saved.asked
        self._records = records
        self._journal = journal
        self._disk = asyncio.Lock()
        self._durable = durable
        self._forgotten = False

    @property
    def sandbox_id(self) -> str:
        return self.record.sandbox_id

    @property
    def live(self) -> bool:
        """Its processes run, or are frozen."""
        return self.record.state in changes.LIVE

    @property
    def durable(self) -> bool:
        """It has been written once. Before, a kill would leave nothing of it, and nobody may hear of it."""
        return self._durable

    @property
    def forgotten(self) -> bool:
        return self._forgotten

    async def create(self) -> None:
        """Writes it for the first time. Updates wait for that. Raises OSError."""
        async with self._disk:
            await asyncio.to_thread(self._records.create, self._saved(self.record))
            self._durable = True
            self._journal.changed(self.record)

    async def update(self, change: changes.Change, *, sync: bool = False) -> None:
        """Changes the record, and writes what was asked. sync: must outlive a power cut. Raises OSError."""
        if sync:
            # To its end even if the caller is cancelled: a write may not be under way when the folder is removed.
            await asyncio.shield(asyncio.ensure_future(self._update_durably(change)))
            return
        async with self._disk:
            if not self._forgotten:
                fresh = changes.changed(self.record, change)
                self._records.save(self._saved(fresh))
                self._become(fresh)

    async def insist(self, change: changes.Change, *, sync: bool = False) -> None:
        """As `update`, again and again until the disk takes it."""
        while True:
            try:
                return await self.update(change, sync=sync)
            except OSError as error:
                log.error("tried again", extra={"sandbox": self.sandbox_id, "error": str(error)})
            await asyncio.sleep(RETRY_SECONDS)

    async def _update_durably(self, change: changes.Change) -> None:
        async with self._disk:
            if not self._forgotten:
                fresh = changes.changed(self.record, change)
                await asyncio.to_thread(self._records.save, self._saved(fresh), sync=True)
                self._become(fresh)

    def tell(self, change: changes.Change) -> None:
        """Changes the record for whoever looks; not worth a write."""
        if not self._forgotten:
            self._become(changes.changed(self.record, change))

    async def forget(self) -> None:
        """Leaves only the fence. Raises OSError."""
        async with self._disk:
            await asyncio.to_thread(self._remove)
            self._forgotten = True
        self._journal.removed(self.record)

    def _remove(self) -> None:
        owner = self.record.owner
        if owner.uid:
            # Before the record goes: until then the record itself is the fence.
            self._records.raise_fence(owner.uid, owner.instance)
        self._records.remove(self.sandbox_id)

    def _become(self, fresh: node_pb2.SandboxRecord) -> None:
        before, self.record = self.record, fresh
        if before != fresh and self._durable:
            self._journal.changed(fresh)

    def _saved(self, record: node_pb2.SandboxRecord) -> Saved:
        return Saved(self.config, record, self.asked)
