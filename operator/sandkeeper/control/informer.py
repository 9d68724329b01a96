"""What wakes the operator: every source of news ends in the store and, as a key, in the queue.

The watch makes it quick; a slow round over all keys and a comparison with a LIST make it sure. Neither the
order nor the number of calls here matters: a pass reads the world, whatever woke it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Protocol

from sandkeeper.api import READY
from sandkeeper.control.observation import Key
from sandkeeper.control.ports import KubeError, Raw
from sandkeeper.control.queue import Queue
from sandkeeper.control.store import Store, key_of, newer

log = logging.getLogger(__name__)

# A write that the watch has not shown after this long means that the watch is behind, or dead.
ECHO_LATE = 60.0
# A watch that lists so long after our last comparison has had a gap.
_RELISTED = 10.0


class _Kube(Protocol):
    def sandboxes(self, namespace: str | None = None) -> AsyncIterator[Raw]: ...
    async def nodes(self) -> list[Raw]: ...


class _Nodes(Protocol):
    def put(self, body: Raw) -> None: ...
    def remove(self, name: str, uid: str) -> None: ...
    def uids(self) -> Mapping[str, str]: ...


class _Metrics(Protocol):
    def watch_event(self, resource: str, kind: str) -> None: ...
    def watch_missed(self) -> None: ...


class Informer:
    """Feeds store, nodes and queue. The handlers of `app` call the two `…_event` methods."""

    def __init__(
        self,
        store: Store,
        nodes: _Nodes,
        queue: Queue[Key],
        kube: _Kube,
        metrics: _Metrics,
        namespaces: tuple[str, ...],
    ) -> None:
        self._store = store
        self._nodes = nodes
        self._queue = queue
        self._kube = kube
        self._metrics = metrics
        self._namespaces = namespaces
        # Own writes that the watch is yet to show, oldest first.
        self._echoes: OrderedDict[Key, tuple[str, float]] = OrderedDict()
        self._compare_now = asyncio.Event()
        self.compared_at: float | None = None

    # News

    def sandbox_event(self, kind: str | None, body: Raw) -> None:
        """A watch event; `kind` is None for what the watch listed when it began."""
        self._metrics.watch_event("sandboxes", kind or "LISTED")
        if kind is None and self.compared_at is not None and time.monotonic() - self.compared_at > _RELISTED:
            # The watch began anew: it tells nothing of what was deleted in between.
            self.compare_soon()
        key = key_of(body)
        echo = self._echoes.get(key)
        if echo is not None and (
            kind == "DELETED" or not newer(echo[0], body["metadata"]["resourceVersion"])
        ):
            del self._echoes[key]
        if kind == "DELETED":
            if self._store.remove(key):
                self._queue.add(key)
            return
        if self._store.put(body) is not None:
            self._queue.add(key)

    def node_event(self, kind: str | None, body: Raw) -> None:
        """A watch event of a SandboxNode."""
        self._metrics.watch_event("sandboxnodes", kind or "LISTED")
        if kind == "DELETED":
            self._nodes.remove(body["metadata"]["name"], body["metadata"]["uid"])
        else:
            self._nodes.put(body)

    def answered(self, body: Raw, wrote: bool) -> None:
        """An answer of the API server to a write or live read of ours: the next pass sees it without waiting.

        A write names the version that it was built on, so its answer holds nothing new for the pass that made
        it, and the watch event that follows is no news. A read may show what nobody has looked at yet.
        """
        key = self._store.put(body)
        if key is None:
            return
        self._echoes.pop(key, None)
        self._echoes[key] = (body["metadata"]["resourceVersion"], time.monotonic())
        if not wrote:
            self._queue.add(key)

    def records_changed(self, uids: Iterable[str]) -> None:
        """Records of these owners changed on a node."""
        for uid in uids:
            if (key := self._store.by_uid(uid)) is not None:
                self._queue.add(key)

    def node_changed(self, name: str) -> None:
        """A node came, went or changed: its Sandboxes, and those that wait for a node, want a look."""
        for key in (*self._store.on_node(name), *self._store.on_node("")):
            self._queue.add(key)

    def watch_lag(self) -> float:
        """Seconds that the oldest of our own writes has waited for the watch to show it; 0 with none."""
        for key in list(self._echoes):
            if self._store.get(key) is None:
                del self._echoes[key]
                continue
            return time.monotonic() - self._echoes[key][1]
        return 0.0

    # Rounds

    async def fill(self) -> None:
        """Read everything before the first pass, so that no pass takes half a picture for the whole."""
        for body in await self._kube.nodes():
            self._nodes.put(body)
        settled: list[Key] = []
        for namespace in self._namespaces or (None,):
            async for body in self._kube.sandboxes(namespace):
                if (key := self._store.put(body)) is None:
                    continue
                # What came or changed while no operator was there must not wait for a look at all the others.
                if _ready(body):
                    settled.append(key)
                else:
                    self._queue.add(key)
        for key in settled:
            self._queue.add(key)
        self.compared_at = time.monotonic()

    async def resync(self, interval: float) -> None:
        """Put every key into the queue once per `interval`, spread over it."""
        while True:
            keys = self._store.keys()
            pause = interval / max(1, len(keys))
            began = time.monotonic()
            for count, key in enumerate(keys, start=1):
                # In steps of a tenth of a second: thousands of tiny sleeps cost more than they spread.
                if (ahead := began + count * pause - time.monotonic()) > 0.1:
                    await asyncio.sleep(ahead)
                self._queue.add(key)
            await asyncio.sleep(max(0.1, began + interval - time.monotonic()))

    async def compare(self, interval: float) -> None:
        """Compare with a LIST once per `interval`, or soon after `compare_soon`."""
        while True:
            try:
                async with asyncio.timeout(interval * random.uniform(0.9, 1.1)):  # noqa: S311 - not for secrets
                    await self._compare_now.wait()
            except TimeoutError:
                pass
            self._compare_now.clear()
            try:
                await self.compare_once()
            except KubeError as error:
                log.warning("The LIST that repairs the watch failed", extra={"error": str(error)})
                await asyncio.sleep(min(10.0, interval))
                self._compare_now.set()

    def compare_soon(self) -> None:
        """Ask for a comparison: something looks as if the watch had missed it."""
        self._compare_now.set()

    async def compare_once(self) -> int:
        """Compare store and nodes with a LIST, mend what differs, and return how much did."""
        began, missed = time.monotonic(), 0
        # What is in the store now, and not in a LIST that begins later, is gone; what comes meanwhile is not.
        known, nodes_known = set(self._store.keys()), self._nodes.uids()
        listed: set[Key] = set()
        for namespace in self._namespaces or (None,):
            async for body in self._kube.sandboxes(namespace):
                key = key_of(body)
                listed.add(key)
                echoed = key in self._echoes and time.monotonic() - self._echoes[key][1] < ECHO_LATE
                if self._store.put(body) is not None or (key not in known and self._store.get(key) is None):
                    self._queue.add(key)
                    # The watch may simply be a moment behind; a metric, not an alarm.
                    missed += not echoed
        for key in known - listed:
            if self._store.remove(key):
                self._queue.add(key)
                missed += 1
        uids: set[str] = set()
        for node in await self._kube.nodes():
            uids.add(node["metadata"]["uid"])
            self._nodes.put(node)
        for name, uid in nodes_known.items():
            if uid not in uids:
                self._nodes.remove(name, uid)
                missed += 1
        for _ in range(missed):
            self._metrics.watch_missed()
        if missed:
            log.warning("The watch had missed changes", extra={"missed": missed})
        self._echoes = OrderedDict((key, echo) for key, echo in self._echoes.items() if echo[1] > began)
        self.compared_at = time.monotonic()
        return missed


def _ready(body: Raw) -> bool:
    """It is said to be as it should: most likely nothing is to be done."""
    metadata, status = body["metadata"], body.get("status") or {}
    if metadata.get("deletionTimestamp") or status.get("observedGeneration") != metadata.get("generation"):
        return False
    return any(each["type"] == READY and each["status"] == "True" for each in status.get("conditions") or ())
