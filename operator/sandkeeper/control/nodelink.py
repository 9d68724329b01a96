"""The line to one node's shim: one channel, one Watch stream, a List at intervals and after stream errors.

What it holds is a cache with a stated age. The stream makes it quick, the List makes it right: it repairs
whatever a stream missed, and its age is the node's health (the kubelet's PLEG is the model).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from sandkeeper.control.observation import Absent, Present, RecordView, Unknown
from sandkeeper.wire import node_pb2

log = logging.getLogger(__name__)

CONNECTING = "Connecting"
READY = "ShimReady"
UNREACHABLE = "ShimUnreachable"
IDENTITY_MISMATCH = "IdentityMismatch"

# After so many failures in a row the channel is made anew.
_ANEW = 5


class LinkClient(Protocol):
    """What a line needs of wire.client.ShimClient, besides what ports.ShimPort has."""

    async def info(self) -> node_pb2.InfoResponse: ...
    async def list(self) -> node_pb2.ListResponse: ...
    def watch(self, epoch: str, after: int) -> AsyncIterator[node_pb2.WatchResponse]: ...
    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: between Lists, until a silent node is unreachable, and between attempts to reach it."""

    relist: float = 30.0
    unreachable: float = 40.0
    call: float = 10.0
    retry_first: float = 0.1
    retry_max: float = 5.0


class WrongNode(Exception):
    """Another node answers at this address than the one that the SandboxNode names."""


class NodeLink:
    """Follows one shim from `start` to `stop`.

    `on_records(uids)` is called with the owners of records that changed, `on_state(link)` when the node
    becomes reachable or unreachable or says something new of itself, `on_resumed()` when the line is whole
    again after a break, however short. All must be quick.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Any],
        *,
        timing: Timing,
        on_records: Callable[[Iterable[str]], None],
        on_state: Callable[[NodeLink], None],
        on_resumed: Callable[[], None],
        observe: Callable[[str, str, str, float], None] | None = None,
    ) -> None:
        self.name = name
        # None until the first attempt; another one after a while of failures (its certificate may be renewed).
        self.client: Any = None
        self.info = node_pb2.InfoResponse()
        self.reachable = False
        self.reason = CONNECTING
        self.message = "not listed yet"
        # It has answered once, or its time to answer for the first time is over.
        self.settled = False
        # The first attempt to reach it has ended, well or not.
        self.tried = asyncio.Event()
        self._connect = connect
        self._timing = timing
        self._on_records = on_records
        self._on_state = on_state
        self._on_resumed = on_resumed
        self._observe = observe
        self._records: dict[str, node_pb2.SandboxRecord] = {}
        self._prints: dict[str, bytes] = {}
        self._by_owner: dict[str, set[str]] = {}
        self._epoch = ""
        self._sequence = 0
        # Events that came while a List was under way: the List may be older than they are.
        self._meanwhile: list[node_pb2.WatchResponse] | None = None
        self._listed_at: float | None = None
        self._following = False
        self._began = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow, in a task of its own."""
        self._task = asyncio.create_task(self._run(), name=f"node {self.name}")

    async def stop(self) -> None:
        """End the task and close the channel."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._disconnect()

    def record(self, sandbox_id: str) -> RecordView:
        """What the node last said of a sandbox; see ports.NodesPort.record."""
        if not self.reachable:
            return Unknown()
        found = self._records.get(sandbox_id)
        if found is not None:
            return Present(found)
        return Absent() if self._following else Unknown()

    def records(self) -> tuple[node_pb2.SandboxRecord, ...]:
        """Everything that the node last said it has."""
        return tuple(self._records.values())

    def holdings(self, uid: str) -> tuple[node_pb2.SandboxRecord, ...]:
        """The records of one owner."""
        return tuple(self._records[id_] for id_ in sorted(self._by_owner.get(uid, ())))

    def relist_age(self) -> float | None:
        """Seconds since the node last answered List; None if it never did."""
        return None if self._listed_at is None else time.monotonic() - self._listed_at

    # Following

    async def _run(self) -> None:
        delay, failures = self._timing.retry_first, 0
        while True:
            try:
                line: LinkClient = self._connected()
                await self._relist(line)
                delay, failures = self._timing.retry_first, 0
                await self._follow(line)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                self._lost(error)
                failures += 1
                if failures % _ANEW == 0:
                    await self._disconnect()
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - not for secrets
                delay = min(delay * 2, self._timing.retry_max)
            finally:
                self.tried.set()

    def _connected(self) -> Any:
        if self.client is None:
            self.client = self._connect()
        return self.client

    async def _disconnect(self) -> None:
        client, self.client = self.client, None
        if client is not None:
            await client.close()

    async def _relist(self, line: LinkClient) -> None:
        self._meanwhile = []
        try:
            async with asyncio.timeout(self._timing.call):
                info = await self._timed("Info", line.info())
                if info.node_name != self.name:
                    raise WrongNode(f"the shim at this address calls itself {info.node_name!r}")
                # Taken before the call: what the answer shows may be as old as that.
                asked = time.monotonic()
                listed = await self._timed("List", line.list())
        finally:
            meanwhile, self._meanwhile = self._meanwhile or [], None
        self._take(listed, meanwhile)
        self._listed_at = asked
        resumed, self._following = not self._following, True
        news = info != self.info
        self.info = info
        self._judge(READY, "the shim answers", news)
        if resumed:
            # What was Unknown and is now Absent no record tells: whoever found it so waits for a word.
            self._on_resumed()
        self.tried.set()

    async def _follow(self, line: LinkClient) -> None:
        epoch = self._epoch
        stream = asyncio.create_task(self._consume(line, epoch), name=f"watch {self.name}")
        try:
            while True:
                done, _ = await asyncio.wait({stream}, timeout=self._timing.relist)
                if done:
                    stream.result()
                    raise ConnectionError("the Watch stream ended")
                await self._relist(line)
                if self._epoch != epoch:
                    raise ConnectionError("the shim has started anew")
        finally:
            stream.cancel()
            await asyncio.gather(stream, return_exceptions=True)

    async def _consume(self, line: LinkClient, epoch: str) -> None:
        async for event in line.watch(epoch, self._sequence):
            if self._epoch != epoch:
                return
            if self._meanwhile is not None:
                self._meanwhile.append(event)
            if event.sequence > self._sequence:
                self._sequence = event.sequence
                changed: set[str] = set()
                self._apply(event, changed)
                if changed:
                    self._on_records(changed)

    async def _timed(self, method: str, call: Any) -> Any:
        began, result = time.perf_counter(), "OK"
        try:
            return await call
        except Exception as error:
            result = type(error).__name__
            raise
        finally:
            if self._observe is not None:
                self._observe(self.name, method, result, time.perf_counter() - began)

    # The cache

    def _take(self, listed: node_pb2.ListResponse, meanwhile: list[node_pb2.WatchResponse]) -> None:
        changed: set[str] = set()
        if listed.epoch != self._epoch:
            # The shim has started anew: its counting has too.
            self._epoch, meanwhile = listed.epoch, []
            self._sequence = listed.sequence
        self._sequence = max(self._sequence, listed.sequence)
        seen = set()
        for record in listed.sandboxes:
            seen.add(record.sandbox_id)
            self._set(record, changed)
        for sandbox_id in self._records.keys() - seen:
            self._drop(sandbox_id, changed)
        for event in meanwhile:
            if event.sequence > listed.sequence:
                self._apply(event, changed)
        if changed:
            self._on_records(changed)

    def _apply(self, event: node_pb2.WatchResponse, changed: set[str]) -> None:
        if event.removed:
            self._drop(event.sandbox.sandbox_id, changed)
        else:
            self._set(event.sandbox, changed)

    def _set(self, record: node_pb2.SandboxRecord, changed: set[str]) -> None:
        # Usage differs with every List; it is kept, but is no news that wants a pass.
        bare = node_pb2.SandboxRecord()
        bare.CopyFrom(record)
        bare.ClearField("usage")
        mark = bare.SerializeToString(deterministic=True)
        sandbox_id, uid = record.sandbox_id, record.owner.uid
        if self._prints.get(sandbox_id) != mark:
            before = self._records.get(sandbox_id)
            if before is not None and before.owner.uid != uid:
                self._drop(sandbox_id, changed)
            self._prints[sandbox_id] = mark
            self._by_owner.setdefault(uid, set()).add(sandbox_id)
            changed.add(uid)
        self._records[sandbox_id] = record

    def _drop(self, sandbox_id: str, changed: set[str]) -> None:
        record = self._records.pop(sandbox_id, None)
        if record is None:
            return
        del self._prints[sandbox_id]
        uid = record.owner.uid
        self._by_owner[uid].discard(sandbox_id)
        if not self._by_owner[uid]:
            del self._by_owner[uid]
        changed.add(uid)

    # Health

    def _lost(self, error: Exception) -> None:
        following, self._following = self._following, False
        reason = IDENTITY_MISMATCH if isinstance(error, WrongNode) else UNREACHABLE
        message = str(error) or type(error).__name__
        if reason == IDENTITY_MISMATCH:
            # Nothing that this server says is about our node.
            self._listed_at = None
        log.log(
            logging.WARNING if following else logging.DEBUG,
            "The line to a node broke" if following else "A node is not reached",
            extra={"node": self.name, "error": message},
        )
        self._judge(reason, message[:1024], news=False)

    def _judge(self, reason: str, message: str, news: bool) -> None:
        """Decide whether the node is reachable: a broken stream alone does not make it unreachable."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        told = (self.reachable, self.reason, self.message, self.settled)
        grace = self._timing.unreachable
        heard = self.relist_age()
        self.reachable = heard is not None and heard < grace
        waited = time.monotonic() - self._began
        self.settled = self.settled or heard is not None or waited >= grace
        if reason == READY or not self.reachable:
            self.reason, self.message = reason, message
        # Within its grace a silent node counts as it did before; look again when that is over.
        left = grace - heard if heard is not None and self.reachable else grace - waited
        if reason != READY and (self.reachable or not self.settled):
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, left) + 0.01, self._judge, reason, message, False)
        if news or told != (self.reachable, self.reason, self.message, self.settled):
            self._on_state(self)
