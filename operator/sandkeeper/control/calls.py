"""Calls to shims that may take long: at most one per object, and none holds up the pass that made it.

A Stop may take the whole grace period. The pass waits for a moment, because most calls are quick; then it
goes on, tells in the status what is under way, and the end of the call wakes the next pass. A call is lost
with the operator, which is no harm: each one is idempotent and the next pass makes it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sandkeeper.control.observation import Key

T = TypeVar("T")


@dataclass(slots=True)
class _Call(Generic[T]):
    name: str
    instance: int
    task: asyncio.Task[T]


class Calls(Generic[T]):
    """`wake(key)` is called when a call that its pass did not wait for has ended."""

    def __init__(self, wake: Callable[[Key], None], patience: float = 3.0) -> None:
        self._wake = wake
        self._patience = patience
        self._calls: dict[Key, _Call[T]] = {}

    def under_way(self, key: Key) -> str:
        """The name of the call that is under way for `key`, empty for none."""
        call = self._calls.get(key)
        return call.name if call is not None and not call.task.done() else ""

    def collect(self, key: Key) -> tuple[int, T] | None:
        """The result of a call that ended since, with the instance that it was about; once."""
        call = self._calls.get(key)
        if call is None or not call.task.done():
            return None
        del self._calls[key]
        return None if call.task.cancelled() else (call.instance, call.task.result())

    async def make(self, key: Key, name: str, instance: int, call: Coroutine[Any, Any, T]) -> T | None:
        """The result of `call`, or None where it takes longer than the patience of a pass."""
        task = asyncio.create_task(call, name=f"{name} {key.namespace}/{key.name}")
        self._calls[key] = _Call(name, instance, task)
        # Cancelling the pass does not cancel the call: it ends by itself, or with the operator.
        await asyncio.wait({task}, timeout=self._patience)
        if not task.done():
            task.add_done_callback(lambda _: self._wake(key))
            return None
        del self._calls[key]
        return task.result()

    async def close(self) -> None:
        """Cancel what is under way."""
        tasks = [call.task for call in self._calls.values()]
        self._calls.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
