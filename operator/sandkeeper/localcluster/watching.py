"""Creates Sandboxes and watches them: what a user of the API sees, and when. For the demo and `make bench`."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from sandkeeper.api import API_VERSION, ASSIGNMENT_ANNOTATION, SANDBOX, SANDBOXES
from sandkeeper.localcluster.cluster import OFFLINE_IMAGE

Body = dict[str, Any]
Wanted = Callable[[Body], bool]
"""Asked about each state of an object; {} is one that is gone."""

_ROOT = f"/apis/{API_VERSION}/namespaces/{{}}/{SANDBOXES}"
CONNECTIONS = 64
"""Beside the watch. One per Sandbox would be measured with it: a TLS handshake costs as much as a request or two."""
_ENDLESS = aiohttp.ClientTimeout(total=None)


class WatchError(Exception):
    """The API server refused a request, or what was waited for did not come."""


@dataclass(frozen=True, slots=True)
class Marks:
    """The way of one Sandbox to Ready: seconds after its creation was sent.

    `accepted`, `assigned` and `ready` are when this client saw it, so that `assigned` can be a little later than
    `created`; `created` and `started` are the shim's own times (the same machine's clock, in microseconds).
    """

    accepted: float
    assigned: float
    created: float
    started: float
    ready: float


def manifest(name: str, *command: str, memory: str = "64Mi", **spec: Any) -> Body:
    """A Sandbox of one container of the offline image; it sleeps for a day where no command is given."""
    container = {
        "name": "main",
        "image": OFFLINE_IMAGE,
        "command": list(command or ("sleep", "86400")),
        "resources": {"limits": {"memory": memory}},
    }
    return {
        "apiVersion": API_VERSION,
        "kind": SANDBOX,
        "metadata": {"name": name},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 0, **spec},
    }


def condition(body: Body, kind: str) -> str:
    """Its status (True, False, Unknown), empty where it is not there."""
    conditions = body.get("status", {}).get("conditions", [])
    return next((str(item["status"]) for item in conditions if item["type"] == kind), "")


def ready(body: Body) -> bool:
    return condition(body, "Ready") == "True"


def assigned(body: Body) -> bool:
    return ASSIGNMENT_ANNOTATION in body.get("metadata", {}).get("annotations", {})


class Watcher:
    """One connection that writes and one that watches; moments are of `time.perf_counter`."""

    def __init__(self, session: aiohttp.ClientSession, server: str, namespace: str) -> None:
        self._session = session
        self._url = server + _ROOT.format(namespace)
        self._waiting: dict[str, list[tuple[Wanted, asyncio.Future[float]]]] = {}
        self.seen: dict[str, Body] = {}
        self.writes: dict[str, int] = {}

    async def follow(self, started: asyncio.Event) -> None:
        """Watches until it is cancelled. Raises WatchError where the API server has forgotten the last version seen.

        It ends the watch of a client that was slow for a moment; then this one goes on where it was.
        """
        async with self._session.get(self._url) as answer:
            version = (await answer.json())["metadata"]["resourceVersion"]
        while True:
            query = {"watch": "1", "resourceVersion": version}
            async with self._session.get(self._url, params=query, timeout=_ENDLESS) as answer:
                started.set()
                buffer = b""
                async for chunk in answer.content.iter_any():
                    now = time.perf_counter()
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for line in lines:
                        version = self._note(json.loads(line), now)

    def broken(self, error: BaseException) -> None:
        """Nothing more will be seen: whoever waits gets the error."""
        for _, future in (each for waiting in self._waiting.values() for each in waiting):
            if not future.done():
                future.set_exception(error)
        self._waiting.clear()

    def _note(self, event: Body, now: float) -> str:
        """The version that the event is of."""
        if event["type"] == "ERROR":
            raise WatchError(str(event["object"].get("message")))
        name = event["object"]["metadata"]["name"]
        body: Body = {} if event["type"] == "DELETED" else event["object"]
        self.writes[name] = self.writes.get(name, 0) + 1
        if body:
            self.seen[name] = body
        else:
            self.seen.pop(name, None)
        still = []
        for wanted, future in self._waiting.pop(name, []):
            if future.done():
                continue
            if wanted(body):
                future.set_result(now)
            else:
                still.append((wanted, future))
        if still:
            self._waiting[name] = still
        return str(event["object"]["metadata"]["resourceVersion"])

    def when(self, name: str, wanted: Wanted) -> asyncio.Future[float]:
        """The moment at which the watch first shows what is wanted; from now on."""
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, []).append((wanted, future))
        return future

    async def create(self, body: Body) -> None:
        """Raises WatchError where it is refused."""
        async with self._session.post(self._url, json=body) as answer:
            if answer.status >= 300:
                raise WatchError(f"{body['metadata']['name']}: {await answer.text()}")
            await answer.read()

    async def delete(self, name: str) -> None:
        """Raises WatchError where it is refused."""
        async with self._session.delete(f"{self._url}/{name}") as answer:
            if answer.status >= 300:
                raise WatchError(f"{name}: {await answer.text()}")
            await answer.read()

    async def create_until_ready(self, body: Body, *, timeout: float = 60) -> Marks:
        """Creates it and waits for Ready. Raises WatchError at the timeout, with the status that it has then."""
        name = body["metadata"]["name"]
        was_assigned, was_ready = self.when(name, assigned), self.when(name, ready)
        sent, wall = time.perf_counter(), time.time()
        await self.create(body)
        accepted = time.perf_counter()
        is_ready = await self._in_time(name, was_ready, "Ready", timeout)
        status = self.seen[name]["status"]
        return Marks(
            accepted=accepted - sent,
            assigned=await was_assigned - sent,
            created=_moment(status["createdAt"]) - wall,
            started=_moment(status["startedAt"]) - wall,
            ready=is_ready - sent,
        )

    async def create_until_finished(self, body: Body, *, timeout: float = 60) -> Body:
        """Creates it and waits for its end; returns the object. Raises WatchError."""
        name = body["metadata"]["name"]
        finished = self.when(name, lambda seen: condition(seen, "Finished") == "True")
        await self.create(body)
        await self._in_time(name, finished, "finished", timeout)
        return self.seen[name]

    async def delete_until_gone(self, name: str, *, timeout: float = 60) -> float:
        """Seconds until the object is gone. Raises WatchError."""
        gone = self.when(name, lambda seen: not seen)
        began = time.perf_counter()
        await self.delete(name)
        return await self._in_time(name, gone, "gone", timeout) - began

    async def _in_time(self, name: str, future: asyncio.Future[float], what: str, timeout: float) -> float:
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            status = json.dumps(self.seen.get(name, {}).get("status"))
            raise WatchError(f"{name} was not {what} within {timeout:g} s; its status: {status}") from None


def _moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def connection(kubeconfig: Path) -> tuple[str, ssl.SSLContext]:
    config = yaml.safe_load(kubeconfig.read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    context = ssl.create_default_context(cafile=cluster["certificate-authority"])
    context.load_cert_chain(user["client-certificate"], user["client-key"])
    return cluster["server"], context


@asynccontextmanager
async def watching(kubeconfig: Path, namespace: str) -> AsyncIterator[Watcher]:
    """A Watcher on a local cluster (its kubeconfig names files: CA, client certificate and key)."""
    server, context = connection(kubeconfig)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context, limit=CONNECTIONS + 1)
    ) as session:
        watcher, started = Watcher(session, server, namespace), asyncio.Event()

        async def follow() -> None:
            try:
                await watcher.follow(started)
            except Exception as error:
                watcher.broken(error)
                raise

        task = asyncio.create_task(follow())
        try:
            async with asyncio.timeout(30):
                await started.wait()
            yield watcher
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
