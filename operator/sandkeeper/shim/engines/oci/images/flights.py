"""One piece of work per key at a time; whoever asks meanwhile gets its result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from sandkeeper.shim.engines.oci.images.types import Image, Progress


@dataclass(slots=True)
class _Flight:
    task: asyncio.Task[Image]
    listeners: list[Progress]
    said: list[tuple[str, str]]
    waiting: int = 0


@dataclass(slots=True)
class Flights:
    _flights: dict[str, _Flight] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._flights)

    async def fly(self, key: str, work: Callable[[Progress], Awaitable[Image]], progress: Progress) -> Image:
        """Joins the flight of this key or begins it. It ends early only when nobody waits any more."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._begin(key, work)
        flight.listeners.append(progress)
        for reason, message in flight.said:
            progress(reason, message)
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            flight.listeners.remove(progress)
            if flight.waiting == 0 and not flight.task.done():
                # A new caller must not join what is being cancelled.
                self._drop(key, flight)
                flight.task.cancel()

    def _begin(self, key: str, work: Callable[[Progress], Awaitable[Image]]) -> _Flight:
        listeners: list[Progress] = []
        said: list[tuple[str, str]] = []

        def tell(reason: str, message: str) -> None:
            said.append((reason, message))
            for listener in tuple(listeners):
                listener(reason, message)

        async def run() -> Image:
            return await work(tell)

        flight = _Flight(asyncio.create_task(run(), name=f"image {key}"), listeners, said)
        self._flights[key] = flight
        flight.task.add_done_callback(lambda task: self._landed(key, flight, task))
        return flight

    def _landed(self, key: str, flight: _Flight, task: asyncio.Task[Image]) -> None:
        self._drop(key, flight)
        if not task.cancelled():
            task.exception()  # seen: nobody may be left to see it

    def _drop(self, key: str, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def close(self) -> None:
        """Cancels all work and waits until it has cleaned up after itself."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
