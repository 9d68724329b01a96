"""Very many Sandboxes: made and deleted over a few connections, followed by one watch that keeps only moments."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from sandkeeper.api import API_VERSION, SANDBOXES
from sandkeeper.localcluster.watching import WatchError, connection, manifest, ready

CONNECTIONS = 32
SLOWEST = 20.0  # per second: what is not Ready by then is lost
_PATH = f"/apis/{API_VERSION}/namespaces/default/{SANDBOXES}"
_MERGE = {"Content-Type": "application/merge-patch+json"}
_ENDLESS = aiohttp.ClientTimeout(total=None)


@dataclass
class Made:
    """What came of creating some: seconds. `each`: from the request to Ready in the watch; `lost`: not Ready in a
    LIST after the deadline."""

    count: int
    took: float
    each: list[float] = field(default_factory=list)
    lost: int = 0

    @property
    def per_s(self) -> float:
        return (self.count - self.lost) / self.took


class Crowd:
    """Moments are of `time.perf_counter`."""

    def __init__(self, session: aiohttp.ClientSession, server: str) -> None:
        self._session, self._url = session, server + _PATH
        self._names: set[str] = set()
        self._seen: set[str] = set()
        self._ready: dict[str, float] = {}
        self._gone: dict[str, float] = {}
        self._news = asyncio.Event()
        self.watches = 0

    async def created(self, name: str) -> None:
        """Returns when the watch has shown it."""
        async with asyncio.timeout(60):
            while name not in self._seen:
                self._news.clear()
                await self._news.wait()

    def ready_at(self, name: str) -> float:
        return self._ready[name]

    async def make(self, names: Iterable[str], *, timeout: float) -> Made:
        """Creates them as quickly as the API server takes them; returns when all are Ready, or at the timeout."""
        names, sent = list(names), {}
        began = time.perf_counter()

        async def create(name: str) -> None:
            sent[name] = time.perf_counter()
            await self._request("POST", self._url, json=manifest(name))
            self._names.add(name)

        await few_at_a_time(create, names)
        await self._until(lambda: all(name in self._ready for name in names), began + timeout)
        ended = max((self._ready[name] for name in names if name in self._ready), default=began)
        each = [self._ready[name] - sent[name] for name in names if name in self._ready]
        made = Made(len(names), max(ended - began, 1e-9), each)
        if len(each) < len(names):
            items = (await self.send("GET"))["items"]
            made.lost = len(set(names) - {item["metadata"]["name"] for item in items if ready(item)})
        return made

    async def delete(self, names: Iterable[str], *, timeout: float) -> Made:
        """Deletes them; returns when all are gone, or at the timeout with `lost` of them still there."""
        names, sent = list(names), {}
        began = time.perf_counter()

        async def delete(name: str) -> None:
            sent[name] = time.perf_counter()
            await self._request("DELETE", f"{self._url}/{name}")

        await few_at_a_time(delete, names)
        await self._until(lambda: all(name in self._gone for name in names), began + timeout)
        each = [self._gone[name] - sent[name] for name in names if name in self._gone]
        ended = max((self._gone[name] for name in names if name in self._gone), default=began)
        for name in names:
            self._names.discard(name)
            self._seen.discard(name)
            self._ready.pop(name, None)
            self._gone.pop(name, None)
        return Made(len(names), max(ended - began, 1e-9), each, lost=len(names) - len(each))

    async def follow(self, started: asyncio.Event) -> None:
        """Watches until it is cancelled. The API server ends the watch of a client that is slow for a moment: it
        goes on from the last version seen, or from a new LIST where that is forgotten."""
        version = ""
        while True:
            if not version:
                version = await self._relist()
            version = await self._watch(version, started)
            self.watches += 1

    async def _relist(self) -> str:
        listed, now = await self.send("GET"), time.perf_counter()
        there = {item["metadata"]["name"] for item in listed["items"]}
        for item in listed["items"]:
            self._note(item["metadata"]["name"], item, now)
        for name in self._names - there:
            self._gone.setdefault(name, now)
        self._news.set()
        return str(listed["metadata"]["resourceVersion"])

    async def _watch(self, version: str, started: asyncio.Event) -> str:
        """The last version seen when the watch ended, empty where the API server has forgotten it."""
        query = {"watch": "1", "resourceVersion": version}
        async with self._session.get(self._url, params=query, timeout=_ENDLESS) as answer:
            started.set()
            buffer = b""
            async for chunk in answer.content.iter_any():
                now = time.perf_counter()
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        return ""
                    body = event["object"]
                    version = body["metadata"]["resourceVersion"]
                    self._note(body["metadata"]["name"], {} if event["type"] == "DELETED" else body, now)
                self._news.set()
        return version

    def _note(self, name: str, body: dict[str, Any], now: float) -> None:
        self._seen.add(name)
        if not body:
            self._gone[name] = now
        elif name not in self._ready and ready(body):
            self._ready[name] = now

    async def _until(self, done: Callable[[], bool], deadline: float) -> None:
        while not done() and (left := deadline - time.perf_counter()) > 0:
            self._news.clear()
            try:
                async with asyncio.timeout(left):
                    await self._news.wait()
            except TimeoutError:
                return
            await asyncio.sleep(0.01)  # `done` looks at all of them: not after every event

    async def send(self, verb: str, name: str = "", **options: Any) -> dict[str, Any]:
        """One request about a Sandbox, or to the collection; the body of the answer. Raises WatchError."""
        url = f"{self._url}/{name}" if name else self._url
        answer: dict[str, Any] = json.loads(await self._request(verb, url, **options))
        return answer

    async def patch(self, name: str, body: dict[str, Any], subresource: str = "") -> dict[str, Any]:
        """A merge patch. Raises WatchError."""
        return await self.send("PATCH", name + subresource, json=body, headers=_MERGE)

    async def _request(self, verb: str, url: str, **options: Any) -> bytes:
        async with self._session.request(verb, url, **options) as answer:
            text = await answer.read()
            if answer.status >= 300:
                raise WatchError(f"{verb} {url}: {text[:300].decode(errors='replace')}")
            return text


async def few_at_a_time(work: Callable[[str], Awaitable[None]], names: list[str]) -> None:
    left = iter(names)

    async def worker() -> None:
        for name in left:
            await work(name)

    await asyncio.gather(*(worker() for _ in range(CONNECTIONS)))


@asynccontextmanager
async def crowd(kubeconfig: Path) -> AsyncIterator[Crowd]:
    server, context = connection(kubeconfig)
    connector = aiohttp.TCPConnector(ssl=context, limit=CONNECTIONS + 4)
    async with aiohttp.ClientSession(connector=connector) as session:
        found, started = Crowd(session, server), asyncio.Event()
        following = asyncio.create_task(found.follow(started))
        try:
            async with asyncio.timeout(60):
                await started.wait()
            yield found
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
