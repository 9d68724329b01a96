"""The journal of changes that Watch streams: numbered, bounded, one for the node."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator

from sandkeeper.shim.errors import Outdated
from sandkeeper.wire import node_pb2

KEPT = 16_384
"""How many changes a watcher may be behind before it has to List again."""


class Journal:
    """Every change gets the next number. A new start of the shim is a new epoch and counts anew, because what
    happened in between is not in it."""

    def __init__(self, kept: int = KEPT) -> None:
        self.epoch = uuid.uuid4().hex
        self.sequence = 0
        self._changes: deque[node_pb2.WatchResponse] = deque(maxlen=kept)
        self._news = asyncio.Event()
        self._closed = False

    def changed(self, record: node_pb2.SandboxRecord) -> None:
        """Notes a record as it is now."""
        self._note(node_pb2.WatchResponse(sandbox=record))

    def removed(self, record: node_pb2.SandboxRecord) -> None:
        """Notes that a sandbox is gone."""
        bare = node_pb2.SandboxRecord(sandbox_id=record.sandbox_id, owner=record.owner)
        self._note(node_pb2.WatchResponse(sandbox=bare, removed=True))

    def close(self) -> None:
        """Ends every watcher's stream."""
        self._closed = True
        self._news.set()

    async def follow(self, epoch: str, after: int) -> AsyncIterator[node_pb2.WatchResponse]:
        """Every change after `after`, in order and without a gap. Raises Outdated where there would be one."""
        if epoch != self.epoch:
            raise Outdated("epoch: the shim has started anew; List again")
        if after > self.sequence:
            raise Outdated(f"after_sequence: {after} has not happened yet; List again")
        while True:
            first = self.sequence - len(self._changes) + 1
            if after + 1 < first:
                raise Outdated(f"after_sequence: changes before {first} are forgotten; List again")
            # A copy: changes come while the consumer is slow.
            for change in [self._changes[i] for i in range(after + 1 - first, len(self._changes))]:
                yield change
                after = change.sequence
            if self._closed:
                return
            if after == self.sequence:
                news = self._news
                await news.wait()

    def _note(self, change: node_pb2.WatchResponse) -> None:
        self.sequence += 1
        change.sequence = self.sequence
        self._changes.append(change)
        news, self._news = self._news, asyncio.Event()
        news.set()
