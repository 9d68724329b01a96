"""The work queue: keys that want a look, each looked at by one pass at a time.

What kopf lacks (it coalesces nothing): any number of adds while a key waits make one pass, and any number
while it is being worked on make one more. Delays, back-off per key and bounded concurrency are here too, so
the reconciler is only ever asked "look at this key".
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, Protocol, TypeVar

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)


class QueueObserver(Protocol):
    """Told of every pass; must be quick and not raise."""

    def depth(self, waiting: int, running: int, delayed: int) -> None: ...
    def started(self, waited: float) -> None: ...
    def finished(self, outcome: str, took: float) -> None: ...


class Queue(Generic[K]):
    """Calls `worker(key)` for every added key: never two at once for one key, at most `concurrency` at once.

    The worker returns the seconds until the key wants another look, or None. If it raises, the key is tried
    again after a back-off that doubles with each failure in a row (with jitter), up to `backoff_max`.

    A pass that waits for a node that does not answer should `step_aside`: it stops counting against
    `concurrency`, up to `slow_limit` such passes, so that one hung node does not hold up everybody else's. One
    that waits for the API server should not: that is everybody's, and more at a time make it slower still.

    asyncio only: every method is called in the loop's thread.
    """

    def __init__(
        self,
        worker: Callable[[K], Awaitable[float | None]],
        *,
        concurrency: int = 16,
        backoff_base: float = 0.05,
        backoff_max: float = 60.0,
        event_wait_max: float = 1.0,
        slow_limit: int = 1024,
        observer: QueueObserver | None = None,
    ) -> None:
        self._worker = worker
        self._concurrency = concurrency
        self._backoff_base = backoff_base
        self._backoff_max = backoff_max
        self._event_wait_max = event_wait_max
        self._slow_limit = slow_limit
        self._observer = observer
        self._ready: deque[K] = deque()
        self._since: dict[K, float] = {}  # waiting keys, and since when
        self._running: dict[K, tuple[asyncio.Task[None], float]] = {}
        self._dirty: set[K] = set()  # running keys that were added again
        self._delayed: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._slow: set[K] = set()
        self._accepting = True
        self._started = False
        self._stop = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, key: K) -> None:
        """Ask for a look at `key` now.

        A key whose last pass failed waits for its back-off, but no longer than `event_wait_max`: news may be
        what mends it, and must not make it a busy loop either.
        """
        if not self._accepting:
            return
        if key in self._running:
            self._dirty.add(key)
        elif failures := self._failures.get(key):
            self.add_after(key, min(self._backoff(failures), self._event_wait_max))
        else:
            self._enqueue(key)

    def add_after(self, key: K, seconds: float) -> None:
        """Ask for a look at `key` in `seconds`. The earliest of several such wishes holds.

        A pass makes the wishes before it void: it looks at the whole world and says anew when to look again.
        """
        if not self._accepting or key in self._since:
            return
        if seconds <= 0:
            if key in self._running:
                self._dirty.add(key)
            else:
                self._enqueue(key)
            return
        loop = asyncio.get_running_loop()
        when = loop.time() + seconds
        pending = self._delayed.get(key)
        if pending is not None:
            if pending.when() <= when:
                return
            pending.cancel()
        self._delayed[key] = loop.call_at(when, self._due, key)

    def step_aside(self, key: K) -> None:
        """The pass under way for `key` counts no longer; nothing happens where there is none."""
        if key in self._running and len(self._slow) < self._slow_limit:
            self._slow.add(key)
            self._pump()

    async def run(self) -> None:
        """Work until `stop`. Cancelling it cancels the passes."""
        self._started = True
        self._pump()
        try:
            await self._stop.wait()
        finally:
            self._accepting = False
            tasks = [task for task, _ in self._running.values()]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.gather(*tasks, return_exceptions=True)

    async def stop(self, grace: float = 0.0) -> bool:
        """Start no more passes, give the running ones `grace` seconds, then end `run`.

        Returns whether all passes ended by themselves. What is left waiting is found anew at the next start.
        """
        self._accepting = False
        for handle in self._delayed.values():
            handle.cancel()
        self._delayed.clear()
        self._ready.clear()
        self._since.clear()
        self._dirty.clear()
        drained = True
        try:
            await asyncio.wait_for(self._idle.wait(), grace)
        except TimeoutError:
            drained = False
        self._stop.set()
        return drained

    @property
    def waiting(self) -> int:
        """Keys that wait for a slot."""
        return len(self._ready)

    @property
    def running(self) -> int:
        """Passes under way."""
        return len(self._running)

    @property
    def delayed(self) -> int:
        """Keys with a look due later."""
        return len(self._delayed)

    def oldest_waiting(self) -> float:
        """Seconds that the key which waits longest has waited; 0 with none."""
        return time.monotonic() - self._since[self._ready[0]] if self._ready else 0.0

    def oldest_running(self) -> float:
        """Seconds that the longest pass has been under way; 0 with none."""
        return max((time.monotonic() - began for _, began in self._running.values()), default=0.0)

    def _enqueue(self, key: K) -> None:
        if key in self._since:
            return
        self._undelay(key)
        self._since[key] = time.monotonic()
        self._ready.append(key)
        self._pump()

    def _due(self, key: K) -> None:
        del self._delayed[key]
        if key in self._running:
            self._dirty.add(key)
        else:
            self._enqueue(key)

    def _undelay(self, key: K) -> None:
        if (handle := self._delayed.pop(key, None)) is not None:
            handle.cancel()

    def _pump(self) -> None:
        if not self._started:
            return
        while self._ready and len(self._running) - len(self._slow) < self._concurrency:
            key = self._ready.popleft()
            now = time.monotonic()
            waited = now - self._since.pop(key)
            if self._observer is not None:
                self._observer.started(waited)
            self._idle.clear()
            self._running[key] = (asyncio.create_task(self._pass(key), name=f"pass {key}"), now)
        self._tell_depth()

    async def _pass(self, key: K) -> None:
        began = time.monotonic()
        outcome, again = "error", None
        try:
            again = await self._worker(key)
            self._failures.pop(key, None)
            outcome = "done" if again is None else "requeue"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Exception:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            again = self._backoff(failures)
            log.exception("A pass failed; it is tried again", extra={"key": str(key), "failures": failures})
        finally:
            if self._observer is not None:
                self._observer.finished(outcome, time.monotonic() - began)
            self._leave(key, again)

    def _leave(self, key: K, again: float | None) -> None:
        del self._running[key]
        self._slow.discard(key)
        dirty = key in self._dirty
        self._dirty.discard(key)
        if again is not None:
            self.add_after(key, again)
        if dirty:
            self.add(key)
        if not self._running:
            self._idle.set()
        self._pump()

    def _backoff(self, failures: int) -> float:
        # Full doubling with the upper half random: passes that failed together do not come back together.
        full = min(self._backoff_max, self._backoff_base * 2.0 ** min(failures - 1, 30))
        return full * random.uniform(0.5, 1.0)  # noqa: S311 - not for secrets

    def _tell_depth(self) -> None:
        if self._observer is not None:
            self._observer.depth(len(self._ready), len(self._running), len(self._delayed))
